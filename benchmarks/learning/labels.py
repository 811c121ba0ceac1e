"""What answers are worth: the judge against the number of labels, for random and for disagreement queries, about the
newest policy's answers (online) and about the first one's (offline), on the review task of the quickstart.

python benchmarks/learning/labels.py [--labels 100 300 1000] [--queries random disagreement] [--ways online offline]
    [--seeds 0 1 2] [--samples 1536] [--base runs/quickstart] [--hidden recipes/judge.py:vader] [--output FOLDER]

A program answers, which likes what `--hidden` likes, at a temperature, and gives every tenth answer at random. All
loops begin as the quickstart's SFT model and see as many samples. Cells that are done are read from `cells.json`, so
the same command goes on where it was stopped; the weights of a loop are removed once it is judged. Prints a table and
how long each cell took, and draws `labels.png`. The quickstart must have been run before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import plaudit
from plaudit.looping import loop
from plaudit.machine import Guard
from plaudit.run import write_atomically
from plaudit.settings.feedback import Loop

JUDGE = str(Path(__file__).parents[2] / "recipes" / "judge.py") + ":vader"
ROLLOUT, BATCH, REUSE = 128, 64, 2
SHOWN = ("judge", "kl", "agreement", "seconds")


def settings_of(arguments: argparse.Namespace, labels: int, queries: str, way: str, seed: int, output: Path) -> Loop:
    """One cell's loop."""
    base, rounds = arguments.base, arguments.rounds
    rollouts = max(1, round(arguments.samples / ROLLOUT / rounds))
    return Loop(
        model=str(base / "sft" / "final"),
        prompts=str(base / "data" / "train.jsonl"),
        output=str(output),
        rounds=rounds,
        labels=labels,
        first=1 / rounds,
        online=way == "online",
        seed=seed,
        queries={"method": queries, "pool": arguments.pool},
        reward={
            "members": arguments.members,
            "epochs": arguments.epochs,
            "batch_size": 32,
            "learning_rate": 3e-4,
            "train_layers": 4,
            "max_tokens": 96,
            "save_every": 0,
        },
        policy={
            "verb": "ppo",
            "holdout": 0.0,
            "steps": rollouts * ROLLOUT // BATCH * REUSE,
            "rollout": ROLLOUT,
            "batch_size": BATCH,
            "reuse": REUSE,
            "max_new_tokens": 32,
            "temperature": 0.8,
            "learning_rate": 3.5e-4,
            "train_layers": 4,
            "value_learning_rate": 1e-3,
            "value_clip": 0.0,
            "lam": 1.0,
            "kl": 0.05,
            "save_every": 0,
        },
        synthetic={"rewards": arguments.hidden, "temperature": arguments.temperature, "noise": 0.1, "seed": seed},
    )


def judged(arguments: argparse.Namespace, policy: Path, output: Path, seed: int) -> dict[str, float]:
    """What the judge says of a policy on prompts that nobody trained on, and how far it is from the SFT model."""
    evaluated = plaudit.evaluate(
        plaudit.Evaluate(
            model=str(arguments.base / "sft" / "final"),
            policies=(f"policy={policy}",),
            data=str(arguments.base / "data" / "heldout.jsonl"),
            rewards=JUDGE,
            output=str(output),
            prompts=arguments.prompts,
            max_new_tokens=32,
            temperature=0.8,
            seed=seed,
        )
    )
    found = evaluated.summary["policy"]
    return {name: found[name] for name in ("judge", "positive_share", "kl", "distinct_2", "completion_tokens")}


def cell(arguments: argparse.Namespace, labels: int, queries: str, way: str, seed: int) -> dict[str, float]:
    """Runs one loop and judges what came of it."""
    folder = arguments.output / f"{queries}-{way}-{labels}-{seed}"
    start = time.perf_counter()
    loop(settings_of(arguments, labels, queries, way, seed, folder))
    seconds = time.perf_counter() - start
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    found = judged(arguments, folder / f"round-{last['step']:03d}" / "policy" / "final", folder / "judged", seed)
    return {**found, "seconds": seconds, "labels": last["labels"], "agreement": last.get("agreement", float("nan"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--queries", nargs="+", default=["random", "disagreement"])
    parser.add_argument("--ways", nargs="+", default=["online", "offline"], choices=["online", "offline"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--samples", type=int, default=1536, help="completions that a policy learns from, in all rounds"
    )
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--pool", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=240, help="held-out prompts that are judged")
    parser.add_argument("--hidden", default=JUDGE)
    parser.add_argument("--temperature", type=float, default=0.25)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--output", type=Path, default=Path("runs/learning-labels"))
    arguments = parser.parse_args()
    path = arguments.output / "cells.json"
    cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    wanted = [(0, "none", "none", seed) for seed in arguments.seeds]
    wanted += sorted(product(arguments.labels, arguments.queries, arguments.ways, arguments.seeds))
    for number, (labels, queries, way, seed) in enumerate(wanted, 1):
        name = f"{queries}-{way}-{labels}-{seed}"
        if name in cells:
            continue
        with Guard() as guard:
            if labels:
                cells[name] = cell(arguments, labels, queries, way, seed)
            else:
                base = arguments.base / "sft" / "final"
                cells[name] = judged(arguments, base, arguments.output / f"sft-{seed}", seed)
        cells[name]["others"] = guard.others
        write_atomically(path, json.dumps(cells, indent=2) + "\n")
        for trained in (arguments.output / name).glob("round-*/*/"):
            shutil.rmtree(trained)
        took = f", {cells[name]['seconds']:.0f} s" if labels else ""
        print(f"{number}/{len(wanted)} {name}: judge {cells[name]['judge']:.3f}{took}", file=sys.stderr, flush=True)
    table(arguments, cells)
    draw(arguments, cells, arguments.output / "labels.png")


def of(cells: dict[str, Any], queries: str, way: str, labels: int, seeds: list[int], figure: str) -> list[float]:
    """A figure of one cell at all seeds."""
    names = ["none-none-0"] * len(seeds) if not labels else [f"{queries}-{way}-{labels}"] * len(seeds)
    return [cells[f"{name}-{seed}"].get(figure, float("nan")) for name, seed in zip(names, seeds, strict=True)]


def table(arguments: argparse.Namespace, cells: dict[str, Any]) -> None:
    """Means over seeds, with the standard deviation of the judge."""
    print(f"| labels | queries | answers of | {' | '.join(SHOWN)} |\n|---|---|---|{'---|' * len(SHOWN)}")
    rows = [(0, "none", "none"), *sorted(product(arguments.labels, arguments.queries, arguments.ways))]
    for labels, queries, way in rows:
        values = {figure: of(cells, queries, way, labels, arguments.seeds, figure) for figure in SHOWN}
        means = {figure: f"{statistics.fmean(each):.3g}" for figure, each in values.items()}
        if len(arguments.seeds) > 1:
            means["judge"] += f" ± {statistics.stdev(values['judge']):.2g}"
        speaker = {"online": "the newest policy", "offline": "the first policy"}.get(way, "")
        shown = " | ".join("" if means[figure] == "nan" else means[figure] for figure in SHOWN)
        print(f"| {labels} | {queries if labels else ''} | {speaker} | {shown} |")


def draw(arguments: argparse.Namespace, cells: dict[str, Any], path: Path) -> None:
    """Judge against labels: a line through the means over seeds, and a faint point for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    places = [0, *sorted(arguments.labels)]
    lines = len(arguments.queries) * len(arguments.ways)
    for colour, (queries, way) in enumerate(product(arguments.queries, arguments.ways)):
        values = [of(cells, queries, way, labels, arguments.seeds, "judge") for labels in places]
        # A little apart, so that points of different lines do not hide each other.
        shifted = [place + 0.04 * (colour - (lines - 1) / 2) for place in range(len(places))]
        dashes = "-" if way == "online" else "--"
        means = [statistics.fmean(each) for each in values]
        axes.plot(shifted, means, dashes, marker="o", color=f"C{colour}", label=f"{queries}, {way}")
        for place, each in zip(shifted, values, strict=True):
            axes.scatter([place] * len(each), each, s=12, color=f"C{colour}", alpha=0.4, linewidths=0)
    axes.set_xticks(range(len(places)), [f"{labels:,}" for labels in places])
    axes.set_xlabel("labels")
    axes.set_ylabel("judge (VADER compound, mean)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
