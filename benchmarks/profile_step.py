"""Where the time of a training step goes: `python benchmarks/profile_step.py [--prompts 4] [--group 8] [--lora 16]`.

Forward and backward pass of a rollout's shape (96 tokens of prompt, 64 of each answer) through SmolLM2-135M, by kinds
of operations: a Markdown table with the share of each, from torch's profiler, after two steps without it. The step
itself is timed without the profiler, beside the operations that it cannot do without and the matrix rate of the same
run.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from operations import families, learning, matrix_rate, shape_of
from plaudit import machine
from plaudit.batch import Batch, collate
from plaudit.loading import load_policy
from plaudit.policy import Policy
from plaudit.sources import resolve
from works import WORKS

PROMPT, ANSWER = 96, 64
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::_softmax", "aten::_softmax_backward_data", "aten::index_add_", "_Attention"),
    "conversions and copies": ("aten::copy_",),
    "exponentials of the vocabulary": ("aten::exp_", "aten::amax", "aten::scatter_add_"),
    "fresh zeros": ("aten::fill_", "aten::zero_"),
}


def rows(prompts: int, group: int) -> Batch:
    """Random tokens: what they are does not matter to the time."""
    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> list[int]:
        return torch.randint(1000, 40000, (length,), generator=generator).tolist()

    asked = [drawn(PROMPT) for _ in range(prompts)]
    every = [(i, asked[i]) for i in range(prompts) for _ in range(group)]
    return collate([ids for _, ids in every], [drawn(ANSWER) for _ in every], [i for i, _ in every])


def step(policy: Policy, batch: Batch, tokens: int) -> float:
    """Seconds of both passes over all parts."""
    start = time.perf_counter()
    for part, _ in policy.parts(batch, tokens):
        with torch.autocast("cpu", torch.bfloat16):
            loss = -policy(part).logprobs.sum() / 1000
        loss.backward()
    policy.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def kind_of(operation: str) -> str:
    return next((kind for kind, names in KINDS.items() if operation in names), "all else")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--tokens-per-pass", type=int, default=4096)
    options = parser.parse_args()
    machine.keep_memory()
    policy = load_policy(resolve("smollm2-135m-instruct", print), precision="bfloat16", lora_rank=options.lora)
    batch = rows(options.prompts, options.group)
    with machine.Guard() as guard:
        for _ in range(2):
            step(policy, batch, options.tokens_per_pass)
        seconds = median(step(policy, batch, options.tokens_per_pass) for _ in range(5))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(policy, batch, options.tokens_per_pass)
    spent = dict.fromkeys([*KINDS, "all else"], 0.0)
    for event in profiled.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total
    rate = matrix_rate("bfloat16")
    work = replace(WORKS["sft"], lora=options.lora)
    done = learning(work, shape_of(policy.config, options.lora), [families(batch)])
    print(
        f"{seconds:.2f} s, {done / seconds / rate:.0%} of {rate / 1e9:.0f} GFLOP/s; others: {guard.others:.2f} cores\n"
    )
    print("| kind | share |\n|---|---|")
    for kind, part in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {part / sum(spent.values()):.0%} |")


if __name__ == "__main__":
    main()
