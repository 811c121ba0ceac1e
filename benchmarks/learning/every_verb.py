"""Every verb that trains, for a few steps on the task of the quickstart, from Python, from flags and from YAML.

python benchmarks/learning/every_verb.py [VERB ...] [--steps 4] [--base runs/quickstart] [--output runs/every-verb]

Rated reviews teach sft, reward and ilql; openings and the reward model those that learn from their own samples; and
pairs of the SFT model's own continuations, the one that VADER likes better chosen, all that learn from preferences.
Prints the loss of the first and the last step of each, and whether all three ways came to the same metrics, to the last
digit. A verb that is done is read, not run again. The quickstart must have been run before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import plaudit
from plaudit.config import to_mapping, to_yaml, verb_of
from plaudit.records import Comparison, load
from plaudit.settings import FAMILIES, VERBS
from plaudit.settings.common import Training

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from judge import vader

SAMPLED = {**FAMILIES["Policy gradient"], **FAMILIES["Online preference and search"]}
TRAINING = [verb for verb, settings in VERBS.items() if issubclass(settings, Training)]


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


def flags(settings: Training) -> list[str]:
    """What is not a default, as the command line takes it."""
    given = to_mapping(settings)
    words: list[str] = []
    for field in fields(settings):
        if getattr(settings, field.name) != field.default:
            words += [f"--{field.name.replace('_', '-')}", str(given[field.name])]
    return words


def metrics(settings: Training, way: str) -> list[dict[str, Any]]:
    """What a run wrote down, step by step, but for what the clock says; the run is made if it is not there."""
    settings = replace(settings, output=f"{settings.output}-{way}")
    output, verb = Path(settings.output), verb_of(type(settings))
    if not (output / "summary.json").exists():
        command = [str(Path(sys.executable).with_name("plaudit")), verb]
        if way == "python":
            plaudit.train(settings)
        elif way == "flags":
            subprocess.run([*command, *flags(settings)], check=True, capture_output=True)
        else:
            output.with_suffix(".yaml").write_text(to_yaml(settings), "utf-8")
            subprocess.run([*command, "--config", output.with_suffix(".yaml")], check=True, capture_output=True)
        for weights in output.rglob("*.safetensors"):
            weights.unlink()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="*", metavar="VERB", default=TRAINING)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--output", type=Path, default=Path("runs/every-verb"))
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    compared = pairs(asked.base, asked.output, 96)
    count = len(load(compared, Comparison).records)
    print(f"{count} pairs; {asked.steps} steps of 16.\n")
    print("| verb | first loss | last loss | flags and YAML |\n|---|---|---|---|")
    for verb in asked.verbs:
        python, *others = (metrics(settings_of(verb, asked, compared), way) for way in ("python", "flags", "yaml"))
        losses = [row["loss"] for row in python if "loss" in row]
        same = "the same" if all(other == python for other in others) else "differ"
        print(f"| {verb} | {losses[0]:.4f} | {losses[-1]:.4f} | {same} |", flush=True)


if __name__ == "__main__":
    main()
