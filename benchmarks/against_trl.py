"""plaudit and TRL at the same work, in turn A B A B, each turn a process of its own.

python benchmarks/against_trl.py [--work grpo dpo ...] [--rounds 2] [--steps 3] [--precision bfloat16]
                                 [--data ../shared/data] [--tuned-allocator] [--output runs/against_trl.json]

Both learn from the same texts, in the same order, as the same tokens, with the same model (SmolLM2-135M), number type,
optimizer, rows and optimizer steps; `works.py` has the sizes, `our_side.py` and `trl_side.py` the settings. What is not
the same: PPO shuffles its openings in TRL's own way, and has a value model of its own there where plaudit has a value
head; `ppo_top8` is compared with the same run of TRL, which cannot train the last layers alone. TRL is 1.16.0, and
1.12.0 for PPO, in environments that are made on the first call and kept in the cache.

seconds      of a step, or of a rollout with all that is learned of it: the median of the steps after the first; the
             ratio is that of two neighbouring turns, with the smallest and the largest of all rounds
tokens       real tokens, padding left out, of the rows that a step learns of: each rollout's count once
completions  mean tokens, since both sides draw, and rows end where they end
peak memory  of the process (VmHWM) until its last step has ended
start        from the start of the process, imports included, to the end of its first step
matrix rate  what learning cannot do without, as `operations.py` counts it, over its time and over what a square product
             reached in the same run

hh-rlhf lies in the folder that --data names: hh-rlhf/helpful-base/test.jsonl.gz and harmless-base. The model and the
movie reviews are pulled from the package index. --tuned-allocator gives TRL the settings of glibc that suit training on
a CPU, which it does not choose by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from environments import environment
from plaudit.machine import Guard
from plaudit.sources import pull
from texts import in_order, rows, write
from works import WORKS, Work

HERE = Path(__file__).parent
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
SIDES = ("plaudit", "TRL")


def reward_model(model: str, folder: Path) -> None:
    """A classifier from the same weights, its head drawn at random."""
    import torch

    from plaudit.loading import load_reward_model, load_tokenizer, save_pretrained

    torch.manual_seed(0)
    tokenizer = load_tokenizer(model)
    save_pretrained(load_reward_model(model, tokenizer), tokenizer, folder)


def prepared(work: Work, folder: Path, data: Path) -> dict[str, Work]:
    """The work of each side, its texts written."""
    from plaudit.loading import load_tokenizer

    model, reviews = pull("smollm2-135m-instruct"), pull("movie-reviews")
    rewards = folder.parent / "reward-model"
    if work.kind == "ppo" and not (rewards / "config.json").exists():
        reward_model(str(model), rewards)
    found = rows(work, load_tokenizer(str(model)), data, reviews)
    sides = {}
    for side, own in zip(SIDES, (found, in_order(work, found)), strict=True):
        place = folder / side
        place.mkdir(parents=True, exist_ok=True)
        write(place / "rows.jsonl", own)
        sides[side] = replace(
            work,
            model=str(model),
            rewards=str(rewards) if work.kind == "ppo" else "",
            data=str(place / "rows.jsonl"),
            output=str(place / "run"),
        )
        sides[side].write(place / "work.json")
    return sides


def turn(side: str, work: Work, tuned: bool) -> dict[str, Any]:
    """What one side reports, with the cores that others used meanwhile. Raises SystemExit if it fails."""
    settings = str(Path(work.output).with_name("work.json"))
    shell = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / "our_side.py"), settings]
    if side == "TRL":
        python = environment("1.12.0" if work.kind == "ppo" else "1.16.0")
        command = [str(python), str(HERE / "trl_side.py"), settings]
        shell.pop("PYTHONPATH", None)
        shell |= {"TRL_EXPERIMENTAL_SILENCE": "1"} | (TUNED if tuned else {})
        if work.precision == "bfloat16":
            shell["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch` does: PPO looks nowhere else
    with Guard() as guard:
        done = subprocess.run(command, env=shell, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-6000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"others": guard.others}


def measure(name: str, work: Work, rounds: int, folder: Path, data: Path, tuned: bool) -> dict[str, Any]:
    """Both sides in turn."""
    sides = prepared(work, folder / name, data)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(1, rounds + 1):
        for side in SIDES:
            found[side].append(turn(side, sides[side], tuned))
            seconds = median(found[side][-1]["seconds"])
            print(f"{name}, round {number}: {side} {seconds:.2f} s", file=sys.stderr, flush=True)
        ours, theirs = (found[side][-1]["tokens"] for side in SIDES)
        if not work.sampled and ours != theirs:
            raise SystemExit(f"{name}: the two sides read different rows: {ours} and {theirs} tokens.")
    return {"work": name, "tuned": tuned, **found}


# ---------------------------------------------------------------------------------------------------------- tables


def over(turns: list[dict[str, Any]], figure: str) -> float:
    """The median over all steps of all turns."""
    return median(value for one in turns for value in one[figure])


def speed(turns: list[dict[str, Any]]) -> float:
    return sum(sum(one["tokens"]) for one in turns) / sum(sum(one["seconds"]) for one in turns)


def spread(pairs: list[tuple[float, float]]) -> str:
    """The ratio of the first to the second of each pair: median, smallest, largest."""
    ratios = [first / second for first, second in pairs]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def share(turns: list[dict[str, Any]]) -> str:
    """Of the matrix rate, while learning."""
    rate = max(one["matrix_rate"] for one in turns)
    shares = []
    for one in turns:
        sampling = one["sampling"] or [0.0] * len(one["seconds"])
        took = [whole - sampled for whole, sampled in zip(one["seconds"], sampling, strict=True)]
        shares += [done / seconds / rate for done, seconds in zip(one["operations"], took, strict=True)]
    return f"{median(shares):.0%} of {rate / 1e9:.0f} GFLOP/s"


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    both = [found[side] for side in SIDES]
    ours, theirs = both
    turns = list(zip(theirs, ours, strict=True))
    seconds = spread([(median(a["seconds"]), median(b["seconds"])) for a, b in turns])
    memory = spread([(b["peak_mb"], a["peak_mb"]) for a, b in turns])
    lines = [("seconds", *(f"{over(side, 'seconds'):.2f}" for side in both), seconds)]
    if ours[0]["sampling"]:
        drawn = spread([(median(a["sampling"]), median(b["sampling"])) for a, b in turns])
        rest = [[rest_of(one) for one in side] for side in both]
        learned = spread([(median(a), median(b)) for b, a in zip(*rest, strict=True)])
        lines.append(("of these, sampling", *(f"{over(side, 'sampling'):.2f}" for side in both), drawn))
        lines.append(("and the rest", *(f"{median(s for one in side for s in one):.2f}" for side in rest), learned))
        lengths = [mean(value for one in side for value in one["completion_tokens"]) for side in both]
        lines.append(("completions, tokens", *(f"{length:.1f}" for length in lengths), ""))
    lines += [
        ("tokens a second", *(f"{speed(side):.0f}" for side in both), ""),
        ("peak memory, MB", *(f"{max(one['peak_mb'] for one in side):.0f}" for side in both), f"{memory} of TRL's"),
        ("start to first step, s", *(f"{median(one['started'] for one in side):.1f}" for side in both), ""),
        ("matrix rate, learning", share(ours), "", ""),
        ("cores of others", *(f"{max(one['others'] for one in side):.2f}" for side in both), ""),
    ]
    title = f"{found['work']}{' (TRL with a tuned allocator)' if found['tuned'] else ''}"
    rows = [f"| {title} | plaudit | TRL | TRL / plaudit |", "|---|---|---|---|"]
    return "\n".join(rows + [f"| {' | '.join(line)} |" for line in lines])


def rest_of(one: dict[str, Any]) -> list[float]:
    """Seconds of each step that were not sampling."""
    return [whole - sampled for whole, sampled in zip(one["seconds"], one["sampling"], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="to be timed, instead of those that `works.py` gives each work")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--tuned-allocator", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/against_trl.json"))
    options = parser.parse_args()
    folder = options.output.resolve().with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for name in options.work:
        work = replace(WORKS[name], steps=options.steps or WORKS[name].steps, precision=options.precision)
        results.append(measure(name, work, options.rounds, folder, options.data, options.tuned_allocator))
        options.output.write_text(json.dumps(results, indent=1))
        print(table(results[-1]) + "\n", flush=True)


if __name__ == "__main__":
    main()
