"""Every algorithm that learns from its own samples, on the review task of the quickstart: judge against KL.

python benchmarks/learning/reviews.py [--algorithms ppo grpo ...] [--samples 3840] [--seeds 0] [--base runs/quickstart]

All begin as the quickstart's SFT model, please its reward model, and see as many samples. Prints one table row for each
run, and draws `judge.png`. The quickstart must have been run before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import plaudit
from plaudit.settings import VERBS

ALGORITHMS = [
    "ppo",
    "vpg",
    "rloo",
    "reinforce_pp",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "online_dpo",
    "best_of_n",
]
ROLLOUT, BATCH = 128, 64
COLUMNS = [
    "judge",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "kl",
    "distinct_2",
    "perplexity",
    "reward",
    "completion_tokens",
]


def settings_of(verb: str, base: Path, output: Path, samples: int, seed: int) -> Any:
    """The same work for every algorithm: its own defaults, but for what the task decides."""
    cls = VERBS[verb]
    known = {field.name: field.default for field in dataclasses.fields(cls)}
    reuse = 2 if "reuse" in known else 1
    batch = ROLLOUT if verb == "best_of_n" else BATCH
    rollout = BATCH if verb == "vpg" else ROLLOUT  # which takes one step of each rollout
    given = {
        "model": str(base / "sft" / "final"),
        "data": str(base / "data" / "train.jsonl"),
        "rewards": str(base / "reward" / "final"),
        "output": str(output),
        "seed": seed,
        "holdout": 0.0,
        "reward_normalise": True,
        "rollout": rollout,
        "batch_size": batch,
        "steps": samples // batch * reuse,
        "reuse": reuse,
        "max_new_tokens": 32,
        "temperature": 0.8,
        "learning_rate": 3.5e-4,
        "schedule": "linear",
        "train_layers": 4,
        "save_every": 0,
        "kl": 0.05,
        **({"value_learning_rate": 1e-3, "value_clip": 0.0, "lam": 1.0} if verb == "ppo" else {}),
    }
    return cls(**{name: value for name, value in given.items() if name in known})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=ALGORITHMS)
    parser.add_argument("--samples", type=int, default=3840)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--output", type=Path, default=Path("runs/learning-reviews"))
    arguments = parser.parse_args()
    policies = {"sft": str(arguments.base / "sft" / "final")}
    for seed in arguments.seeds:
        for verb in arguments.algorithms:
            name = f"{verb}-{seed}"
            run = plaudit.train(settings_of(verb, arguments.base, arguments.output / name, arguments.samples, seed))
            policies[name] = str(run.final)
    settings = plaudit.Evaluate(
        policies=tuple(f"{name}={folder}" for name, folder in policies.items()),
        data=str(arguments.base / "data" / "heldout.jsonl"),
        rewards=str(arguments.base / "reward" / "final"),
        judge=str(Path(__file__).parents[2] / "recipes" / "judge.py") + ":vader",
        output=str(arguments.output / f"evaluate-{'-'.join(policies)}"[:200]),
        prompts=240,
        max_new_tokens=32,
        temperature=0.8,
    )
    found = plaudit.evaluate(settings).summary
    rows = {name: found[name] for name in policies}
    (arguments.output / "reviews.json").write_text(json.dumps(rows, indent=2))
    print(f"{arguments.samples} samples each.\n")
    print(f"| run | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[c]:.3g}' if c in row else '' for c in COLUMNS)} |")
    draw(rows, arguments.output / "judge.png")


def draw(rows: dict[str, dict[str, float]], path: Path) -> None:
    """Judge against KL, one point for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, row in rows.items():
        axes.scatter(row["kl"], row["judge"], s=24, color="black" if name == "sft" else None)
        axes.annotate(
            name.removesuffix("-0"), (row["kl"], row["judge"]), (4, 3), textcoords="offset points", fontsize=8
        )
    axes.set_xlabel("KL to the SFT model, nats a completion")
    axes.set_ylabel("judge (VADER compound, mean)")
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
