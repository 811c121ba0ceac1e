"""Every verb that trains, for a few steps on the task of the quickstart: does it run, and where does it go?

python benchmarks/learning/every_verb.py [--steps 4] [--base runs/quickstart]

Rated reviews teach sft, reward and ilql; openings and the reward model those that learn from their own samples; and
pairs of the SFT model's own continuations, the one that VADER likes better chosen, all that learn from preferences.
Prints the loss of the first and the last step of each. The quickstart must have been run before.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import plaudit
from plaudit.records import Prompt, load
from plaudit.settings import FAMILIES, VERBS
from plaudit.settings.common import Training

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from judge import vader

SAMPLED = {**FAMILIES["Policy gradient"], **FAMILIES["Online preference and search"]}


def pairs(base: Path, output: Path, count: int) -> Path:
    """Two continuations of each of so many openings, judged; those that are equally good are left out."""
    path, drawn = output / "pairs.jsonl", output / "drawn.jsonl"
    if path.exists():
        return path
    settings = plaudit.Sample(
        model=str(base / "sft" / "final"),
        data=str(base / "data" / "train.jsonl"),
        output=str(drawn),
        n=2,
        limit=count,
        max_new_tokens=24,
    )
    if not drawn.exists():
        plaudit.sample(settings)
    rows = [json.loads(line) for line in drawn.read_text("utf-8").splitlines()]
    scores = vader([row["prompt"] for row in rows], [row["completion"] for row in rows])
    found = []
    for i in range(0, len(rows), 2):
        worse, better = sorted((i, i + 1), key=lambda place: scores[place])
        if scores[worse] < scores[better]:
            sides = {"chosen": rows[better]["completion"], "rejected": rows[worse]["completion"]}
            found.append({"prompt": rows[i]["prompt"], **sides})
    path.write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
    return path


def settings_of(verb: str, asked: argparse.Namespace, compared: Path) -> Training:
    """Its own defaults, but for the data and how long it runs."""
    base = asked.base
    given: dict[str, Any] = {
        "model": str(base / "sft" / "final"),
        "data": str(base / "data" / "train.jsonl"),
        "output": str(asked.output / verb),
        "steps": asked.steps,
        "batch_size": 16,
        "train_layers": 4,
        "eval_limit": 16,
        "save_every": 0,
    }
    if verb in SAMPLED:
        given |= {"rewards": str(base / "reward" / "final"), "rollout": 16, "max_new_tokens": 24, "holdout": 0.0}
        if verb == "best_of_n":
            given |= {"rollout": 64, "batch_size": 64}
    elif verb in FAMILIES["Direct preference"]:
        given["data"] = str(compared)
    found: Training = VERBS[verb](**given)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--output", type=Path, default=Path("runs/every-verb"))
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    compared = pairs(asked.base, asked.output, 96)
    prompts = len(load(compared, Prompt).records)
    print(f"{prompts} pairs; {asked.steps} steps of 16.\n\n| verb | first loss | last loss |\n|---|---|---|")
    for verb, cls in VERBS.items():
        if issubclass(cls, Training):
            losses = [
                row["loss"] for row in plaudit.train(settings_of(verb, asked, compared)).metrics() if "loss" in row
            ]
            print(f"| {verb} | {losses[0]:.4f} | {losses[-1]:.4f} |", flush=True)


if __name__ == "__main__":
    main()
