"""A run folder as read, and what it has come to: the report's text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plaudit.config import read_yaml
from plaudit.errors import PlauditError
from plaudit.run import read_lines
from plaudit.wording import (
    APOSTROPHE,
    DASH,
    capitalised,
    change,
    duration,
    figure,
    is_number,
    model_name,
    number,
    percent,
)

SAMPLES = 10

TITLES = {
    "pull": "Data",
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "ppo": "PPO",
    "robust_dpo": "Robust DPO",
    "dpo_norm": "DPO, averaged over tokens",
    "f_dpo": "DPO by another divergence",
    "ld_dpo": "DPO less fond of length",
    "ipo_avg": "IPO, averaged over tokens",
    "aot_unpaired": "AOT, unpaired",
    "bco_pair": "BCO of pairs",
    "apo_zero": "APO-zero",
    "apo_down": "APO-down",
    "apo_zero_unpaired": "APO-zero, unpaired",
    "discopop": "DiscoPOP",
    "slic": "SLiC",
    "cpo_ipo": "IPO without a reference",
    "simpo": "SimPO",
    "alphapo": "AlphaPO",
    "reinforce_pp": "REINFORCE++",
    "dr_grpo": "Dr. GRPO",
    "lite_ppo": "Lite PPO",
    "online_dpo": "Online DPO",
    "online_ipo": "Online IPO",
    "best_of_n": "Best of n",
    "evaluate": "Evaluation",
}
COMPARED = {"win_rate", "win_rate_low", "win_rate_high", "p_value", "prompts"}  # said once, beside the table of models


@dataclass
class Stage:
    """One run folder as read: `facts` are its figures from summary.json."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return TITLES.get(self.name, capitalised(model_name(self.name)))

    @property
    def models(self) -> dict[str, dict[str, float | None]]:
        """What an evaluation found of each model: the facts that are themselves figures by name."""
        return {
            name: {figure: value for figure, value in fact.items() if figure not in COMPARED}
            for name, fact in self.facts.items()
            if isinstance(fact, dict) and fact and all(value is None or is_number(value) for value in fact.values())
        }

    def points(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it is a number."""
        rows = [row for row in self.metrics if is_number(row.get(name))]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def has(self, *names: str) -> bool:
        return all(is_number(self.facts.get(name)) for name in names)


# ---- reading ----------------------------------------------------------------------------------------------------


def read(folder: Path) -> list[Stage]:
    """The stages of a pipeline folder in their order, or a run folder as its only stage.

    Raises PlauditError if `folder` is neither, or if one of its files can't be read.
    """
    summary = _summary(folder / "summary.json")
    if "stages" in summary:
        costs = summary["stages"]
        return [_run(folder / name, name, {**costs[name], **summary.get(name, {})}) for name in costs]
    if not summary and not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise PlauditError(
            f"{folder} is not a run: it has no summary.json, config.yaml or metrics.jsonl; "
            "give the folder that a run was written into."
        )
    stage = _run(folder, folder.resolve().name, {})
    stage.name = str(stage.config.get("verb", stage.name))
    return [stage]


def _run(folder: Path, name: str, facts: dict[str, Any]) -> Stage:
    config = folder / "config.yaml"
    return Stage(
        name=name,
        config=read_yaml(config) if config.is_file() else {},
        metrics=read_lines(folder / "metrics.jsonl"),
        samples=read_lines(folder / "samples.jsonl"),
        facts={**_summary(folder / "summary.json"), **facts},
    )


def _summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise PlauditError(f"{path} is not valid JSON ({error}); remove it and run again.") from None
    if not isinstance(content, dict):
        raise PlauditError(f"{path} holds no figures by name; remove it and run again.")
    return content


# ---- samples ----------------------------------------------------------------------------------------------------


def compared_samples(stage: Stage) -> list[list[dict[str, Any]]]:
    """What each model of an evaluation said to the same prompt, side by side."""
    models = list(stage.models)
    rows = [row for row in stage.samples if all(name in row for name in models)]
    return [
        [
            {
                "title": model_name(name),
                "prompt": row.get("prompt", ""),
                "text": row[name],
                "scores": {kind: row.get(f"{name}_{kind}") for kind in ("judge", "reward") if f"{name}_{kind}" in row},
            }
            for name in models
        ]
        for row in rows[:SAMPLES]
    ]


def training_samples(stage: Stage) -> list[list[dict[str, Any]]]:
    """What was said at the first and at the last step that kept samples, side by side."""
    rows = [row for row in stage.samples if "completion" in row]
    steps = sorted({row["step"] for row in rows})
    sides = [
        [
            {
                "title": f"step {step:,}",
                "prompt": row.get("prompt", ""),
                "text": row["completion"],
                "scores": {"score": row["score"]} if "score" in row else {},
            }
            for row in rows
            if row["step"] == step
        ][:SAMPLES]
        for step in dict.fromkeys((*steps[:1], *steps[-1:]))
    ]
    return [[side[place] for side in sides if place < len(side)] for place in range(max(map(len, sides), default=0))]


# ---- what is said first -----------------------------------------------------------------------------------------


def headline(stages: Sequence[Stage]) -> str:
    """The outcome in one sentence, from the last stage that has one to tell."""
    for stage in reversed(stages):
        for sentence in (_evaluated(stage), _agreed(stage), _fitted(stage), _scored(stage)):
            if sentence:
                return sentence.replace("'", APOSTROPHE)
    steps = max((stage.metrics[-1]["step"] for stage in stages if stage.metrics), default=0)
    return f"{steps:,} steps so far, and no outcome yet."


def _moved(before: float, after: float) -> str:
    first, last = number(before, 2), number(after, 2)
    if first == last:
        return f"stayed at {first}"
    return f"{'rose' if after > before else 'fell'} from {first} to {last}"


def _evaluated(stage: Stage) -> str:
    models, facts, parts = stage.models, stage.facts, []
    if len(models) < 2:
        return ""
    (first, before), *_, (last, after) = models.items()
    judge = before.get("judge"), after.get("judge")
    if judge[0] is not None and judge[1] is not None:
        parts.append(f"the judge's mean {_moved(judge[0], judge[1])}")
    if stage.has("win_rate"):
        prompts = f" on {facts['prompts']:,} prompts" if stage.has("prompts") else ""
        rate = f"{model_name(last)}'s win rate over {model_name(first)}{prompts} is {percent(facts['win_rate'])}"
        parts.append(f"{rate} ({interval(stage)})" if interval(stage) else rate)
    sentence = ", and ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}.{_doubt(stage)}" if sentence else ""


def interval(stage: Stage) -> str:
    """The 95 % interval of the win rate, if there is one."""
    if not stage.has("win_rate_low", "win_rate_high"):
        return ""
    return f"95% interval {100 * stage.facts['win_rate_low']:.1f}{DASH}{percent(stage.facts['win_rate_high'])}"


def _doubt(stage: Stage) -> str:
    if (
        stage.has("win_rate_low", "win_rate_high")
        and stage.facts["win_rate_low"] <= 0.5 <= stage.facts["win_rate_high"]
    ):
        return " Chance alone could give that win rate."
    return ""


def _agreed(stage: Stage) -> str:
    if stage.has("preference_accuracy"):
        share = percent(stage.facts["preference_accuracy"])
        return f"The policy's own reward is right on {share} of held-out judgements."
    if not stage.has("accuracy"):
        return ""
    rater = percent(stage.facts["accuracy_one_rater"]) if stage.has("accuracy_one_rater") else ""
    beside = f"; one human rater, on {rater}" if rater else ""
    return f"The reward model is right on {percent(stage.facts['accuracy'])} of held-out pairs{beside}."


def _fitted(stage: Stage) -> str:
    if not stage.has("nll_before", "nll_after"):
        return ""
    return f"The held-out loss {_moved(stage.facts['nll_before'], stage.facts['nll_after'])} nats per token."


def _scored(stage: Stage) -> str:
    steps, values = stage.points("score")
    if len(values) < 2:
        return ""
    # One batch's score says little: a tenth of the run at either end says more.
    part = max(1, len(values) // 10)
    moved = _moved(sum(values[:part]) / part, sum(values[-part:]) / part)
    return f"The score {moved} over {steps[-1]:,} steps (mean of the first and of the last tenth)."


def cards(stages: Sequence[Stage]) -> list[tuple[str, str, str]]:
    """(label, figure, note) of what matters most."""
    found = [card for stage in stages for card in (*_compared(stage), *_learned(stage))]
    seconds, memory = _costed(stages, "seconds"), _costed(stages, "peak_memory_mb")
    if seconds:
        note = f"{figure(max(memory), 'peak_memory_mb')} of memory at most" if memory else ""
        found.append(("Time", duration(sum(seconds)), note))
    # What was compared is the outcome, whichever stage it was.
    return sorted(found, key=lambda card: card[0] not in ("Win rate", "Judge", "Positive", "KL"))


def _compared(stage: Stage) -> list[tuple[str, str, str]]:
    if len(stage.models) < 2:
        return []
    found = [("Win rate", percent(stage.facts["win_rate"]), interval(stage))] if stage.has("win_rate") else []
    before, *_, after = stage.models.values()

    def both(name: str) -> tuple[float, float] | None:
        first, last = before.get(name), after.get(name)
        return (first, last) if first is not None and last is not None else None

    if judge := both("judge"):
        found.append(("Judge", f"{number(judge[0], 2)} → {number(judge[1], 2)}", change(*judge, 2)))
    if positive := both("positive_share"):
        first, last = (100 * share for share in positive)
        found.append(("Positive", f"{first:.0f}% → {last:.0f}%", f"{change(first, last, 0)} points"))
    if (kl := after.get("kl")) is not None:
        found.append(("KL", number(kl, 2), "nats per completion"))
    return found


def _learned(stage: Stage) -> list[tuple[str, str, str]]:
    found = []
    if stage.has("accuracy"):
        rater = (
            f"one human rater {percent(stage.facts['accuracy_one_rater'])}" if stage.has("accuracy_one_rater") else ""
        )
        found.append(("Reward model accuracy", percent(stage.facts["accuracy"]), rater or "of held-out pairs"))
    if stage.has("nll_before", "nll_after"):
        first, last = (number(stage.facts[name], 2) for name in ("nll_before", "nll_after"))
        found.append(("Held-out loss", f"{first} → {last}", "nats per token"))
    return found


def _costed(stages: Iterable[Stage], name: str) -> list[float]:
    return [stage.facts[name] for stage in stages if stage.has(name)]


def costs(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Where a pipeline's time went: title, share in percent and facts of each stage."""
    total = sum(_costed(stages, "seconds"))
    if len(stages) < 2 or not total:
        return []
    timed = [stage for stage in stages if stage.has("seconds")]
    return [{"title": s.title, "share": 100 * s.facts["seconds"] / total, "facts": s.facts} for s in timed]
