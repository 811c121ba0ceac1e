"""Does torch.compile pay? One learning step on SmolLM2-135M, three ways: plaudit's own layers side by side,
transformers' layers with padded rows, and the same compiled.

python benchmarks/compiled.py [--rows 8] [--prompt 96] [--answer 64] [--steps 5]

Prints seconds of a step (the best of `--steps`), what compiling took, and after how many steps it would have paid
against plaudit's own way. Needs a C++ compiler, which plaudit itself does not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable

import torch

from plaudit import machine
from plaudit.batch import collate
from plaudit.layout import padded
from plaudit.loading import load_policy
from plaudit.machine import Guard
from plaudit.sources import pull


def best(step: Callable[[], None], steps: int) -> float:
    """Seconds of the fastest."""
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"rows": 8, "prompt": 96, "answer": 64, "steps": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    if not (shutil.which("g++") or shutil.which("clang++")):
        sys.exit("torch.compile needs g++ or clang++, and there is neither.")
    machine.keep_memory()
    policy = load_policy(str(pull("smollm2-135m-instruct")), precision="bfloat16")
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(1000, 40000, (asked.prompt,), generator=draw).tolist()
    answers = torch.randint(1000, 40000, (asked.rows, asked.answer), generator=draw).tolist()
    batch = collate([prompt] * asked.rows, answers, [0] * asked.rows)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = -policy(batch).logprobs.sum() / asked.rows
        loss.backward()
        policy.zero_grad(set_to_none=True)

    with Guard() as guard:
        step()
        own = best(step, asked.steps)
        policy.layout = lambda rows: padded(rows, policy.width)
        step()
        plain = best(step, asked.steps)
        policy.base.compile()
        start = time.perf_counter()
        step()
        step()
        compiled = best(step, asked.steps)
        compiling = time.perf_counter() - start - (asked.steps + 2) * compiled
    gain = own - compiled
    print(f"| way | seconds a step |\n|---|---|\n| plaudit's own layers, side by side | {own:.2f} |")
    print(f"| transformers' layers, padded | {plain:.2f} |\n| the same, compiled | {compiled:.2f} |")
    print(f"\nCompiling took {compiling:.0f} s; ", end="")
    print(f"it pays after {compiling / gain:.0f} steps." if gain > 0 else "it never pays.")
    print(f"Other processes used {guard.others:.2f} cores meanwhile.")


if __name__ == "__main__":
    main()
