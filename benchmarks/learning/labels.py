"""What answers are worth: the judge against the number of labels, for random and for disagreement queries, about the
newest policy's answers (online) and about the first one's (offline), on the review task of the quickstart.

python benchmarks/learning/labels.py [--labels 100 300 1000] [--seeds 0 1 2] [--samples 768] [--base runs/quickstart]
    [--lines random-online disagreement-online random-offline disagreement-offline]
    [--hidden recipes/judge.py:vader] [--output FOLDER]

A program answers, which likes what `--hidden` likes, at a temperature, and gives every tenth answer at random. All
loops begin as the quickstart's SFT model and see as many samples. A cell that is done is read from its folder, so the
same command goes on where it was stopped, and several may share the work if each is given seeds of its own; the weights
of a loop are removed once it is judged. Prints a table, how long each cell took, and how far the lines lie apart, and
draws `labels.png`. The quickstart must have been run before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from itertools import combinations, product
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
LINES = ["random-online", "disagreement-online", "random-offline", "disagreement-offline"]
SHOWN = ("judge", "kl", "agreement")


def settings_of(arguments: argparse.Namespace, labels: int, line: str, seed: int, output: Path) -> Loop:
    """One cell's loop."""
    queries, way = line.split("-")
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
            "epochs": max(1.0, arguments.visits / labels),
            "batch_size": 16,
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


def cell(arguments: argparse.Namespace, labels: int, line: str, seed: int) -> dict[str, float]:
    """Runs one loop and judges what came of it."""
    folder = arguments.output / f"{line}-{labels}-{seed}"
    start = time.perf_counter()
    loop(settings_of(arguments, labels, line, seed, folder))
    seconds = time.perf_counter() - start
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    found = judged(arguments, folder / f"round-{last['step']:03d}" / "policy" / "final", folder / "judged", seed)
    return {**found, "seconds": seconds, "labels": last["labels"], "agreement": last.get("agreement", float("nan"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--lines", nargs="+", default=LINES, choices=LINES, help="queries, and whose answers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples", type=int, default=768, help="completions that a policy learns from, in all rounds")
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument(
        "--visits",
        type=int,
        default=600,
        help="answers that a reward model sees in the last round; all of them, at least",
    )
    parser.add_argument("--pool", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=240, help="held-out prompts that are judged")
    parser.add_argument("--hidden", default=JUDGE)
    parser.add_argument("--temperature", type=float, default=0.25)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--output", type=Path, default=Path("runs/learning-labels"))
    arguments = parser.parse_args()
    cells: dict[str, Any] = {}
    wanted = [
        (labels, line, seed)
        for seed in arguments.seeds
        for labels, line in [(0, "none"), *product(sorted(arguments.labels), arguments.lines)]
    ]
    for number, (labels, line, seed) in enumerate(wanted, 1):
        name = f"{line}-{labels}-{seed}"
        path = arguments.output / f"{name}.json"
        if not path.exists():
            with Guard() as guard:
                if labels:
                    found = cell(arguments, labels, line, seed)
                else:
                    base = arguments.base / "sft" / "final"
                    found = judged(arguments, base, arguments.output / f"sft-{seed}", seed)
            write_atomically(path, json.dumps({**found, "others": guard.others}, indent=2) + "\n")
            for trained in (arguments.output / name).glob("round-*/*/"):
                shutil.rmtree(trained)
        cells[name] = json.loads(path.read_text())
        took = f", {cells[name]['seconds']:.0f} s" if labels else ""
        print(f"{number}/{len(wanted)} {name}: judge {cells[name]['judge']:.3f}{took}", file=sys.stderr, flush=True)
    table(arguments, cells)
    print(f"\n{apart(arguments, cells)}")
    draw(arguments, cells, arguments.output / "labels.png")


def of(cells: dict[str, Any], line: str, labels: int, seeds: list[int], figure: str) -> list[float]:
    """A figure of one cell at all seeds."""
    name = f"{line if labels else 'none'}-{labels}"
    return [cells[f"{name}-{seed}"].get(figure, float("nan")) for seed in seeds]


def table(arguments: argparse.Namespace, cells: dict[str, Any]) -> None:
    """Means over seeds, with the standard deviation of the judge."""
    print(f"| labels | queries | answers of | {' | '.join(SHOWN)} |\n|---|---|---|{'---|' * len(SHOWN)}")
    for labels, line in [(0, "none-"), *product(sorted(arguments.labels), arguments.lines)]:
        queries, way = line.split("-")
        values = {figure: of(cells, line, labels, arguments.seeds, figure) for figure in SHOWN}
        means = {figure: f"{statistics.fmean(each):.3g}" for figure, each in values.items()}
        if len(arguments.seeds) > 1:
            means["judge"] += f" ± {statistics.stdev(values['judge']):.2g}"
        speaker = {"online": "the newest policy", "offline": "the first policy"}.get(way, "")
        shown = " | ".join("" if means[figure] == "nan" else means[figure] for figure in SHOWN)
        print(f"| {labels} | {queries if labels else ''} | {speaker} | {shown} |")


def apart(arguments: argparse.Namespace, cells: dict[str, Any]) -> str:
    """How far the judges of two lines lie apart, cell by cell: mean and standard deviation of the differences."""
    judges = {
        line: [value for labels in arguments.labels for value in of(cells, line, labels, arguments.seeds, "judge")]
        for line in arguments.lines
    }
    told = []
    for line, other in combinations(arguments.lines, 2):
        gaps = [a - b for a, b in zip(judges[line], judges[other], strict=True)]
        spread = f" ± {statistics.stdev(gaps):.3f}" if len(gaps) > 1 else ""
        told.append(f"{line} less {other}: {statistics.fmean(gaps):+.3f}{spread}")
    return "\n".join(told)


def draw(arguments: argparse.Namespace, cells: dict[str, Any], path: Path) -> None:
    """Judge against labels: a line through the means over seeds, and a faint point for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    places = [0, *sorted(arguments.labels)]
    for line in arguments.lines:
        colour = LINES.index(line)
        values = [of(cells, line, labels, arguments.seeds, "judge") for labels in places]
        # A little apart, so that points of different lines do not hide each other.
        shifted = [place + 0.04 * (colour - (len(LINES) - 1) / 2) for place in range(len(places))]
        dashes = "-" if line.endswith("online") else "--"
        means = [statistics.fmean(each) for each in values]
        axes.plot(shifted, means, dashes, marker="o", color=f"C{colour}", label=line.replace("-", ", "))
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
