"""`write(folder)`: a run, or a pipeline of runs, as one HTML page that needs nothing but itself.

Colours are CSS variables, also inside the plots, so that one page reads well in light, dark and print.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from plaudit.errors import PlauditError

Row = Mapping[str, Any]
Points = tuple[list[float], list[float]]

SAMPLES = 10
LONGEST_TEXT = 2_000  # characters of a sample that are shown
MOST_POINTS = 300  # of a curve that are drawn, so that a long run's page stays small

STAGES = {"sft": "Supervised fine-tuning", "reward": "Reward model", "ppo": "PPO", "evaluate": "Evaluation"}

# In the order in which they are shown; what is not named here follows under its own name.
METRICS = {
    "loss": ("Loss", ""),
    "nll": ("Loss", "nats per token"),
    "accuracy": ("Accuracy", "share of pairs"),
    "score": ("Score", "mean of the batch"),
    "score_mean": ("Score", "mean of the batch"),
    "reward": ("Reward", "mean of the batch"),
    "judge": ("Judge", "mean"),
    "kl": ("KL to the reference", "nats per completion"),
    "kl_coefficient": ("KL coefficient", ""),
    "entropy": ("Entropy", "nats per token"),
    "value_loss": ("Value loss", ""),
    "policy_loss": ("Policy loss", ""),
    "ratio": ("Probability ratio", "new over old policy"),
    "clip_fraction": ("Clipped", "share of tokens"),
    "completion_length": ("Completion length", "tokens"),
    "length": ("Completion length", "tokens"),
    "gradient_norm": ("Gradient norm", ""),
    "learning_rate": ("Learning rate", ""),
}

FACTS = {
    "seconds": "time",
    "peak_memory_mb": "peak memory",
    "tokens_per_second": "tokens per second",
    "nll_before": "held-out loss before",
    "nll_after": "held-out loss after",
    "accuracy": "held-out accuracy",
    "accuracy_one_rater": "one human rater",
    "kl": "KL, nats",
    "positive_share": "positive",
    "distinct_2": "distinct-2",
}
SHARES = re.compile(r"accuracy|_share$|^win_rate")
BESIDE_TABLE = {"win_rate", "win_rate_low", "win_rate_high", "prompts"}  # shown with the table of models, not as facts

# Stand-ins that `_draw` turns into CSS variables: matplotlib itself knows no variables.
INK, MUTED, RULE, BEFORE, AFTER, THIRD = (f"#0a0b0{digit}" for digit in "123456")
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", BEFORE: "before", AFTER: "after", THIRD: "third"}


@dataclass
class Stage:
    """One run folder as read: `facts` are its figures from summary.json."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return STAGES.get(self.name, _words(self.name))

    @property
    def models(self) -> dict[str, dict[str, float]]:
        """The rows of an evaluation's table: the facts that are themselves figures by name."""
        return {
            name: fact
            for name, fact in self.facts.items()
            if isinstance(fact, dict) and fact and all(_is_number(value) for value in fact.values())
        }


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    svg: str
    ends: list[tuple[str, str]] = field(default_factory=list)


def write(folder: Path) -> Path:
    """Writes report.html into `folder`, a run or a pipeline of stages, and returns its path.

    Raises PlauditError if `folder` is neither, or if one of its files can't be read.
    """
    import jinja2

    folder = Path(folder)
    stages = read(folder)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(number=number, figure=figure, label=_label, model=_model)
    template = environment.from_string(Path(__file__).with_suffix(".html").read_text("utf-8"))
    page = template.render(
        title=folder.resolve().name,
        headline=headline(stages),
        cards=_cards(stages),
        costs=_costs(stages),
        outcomes=[_outcome(stage, stages) for stage in stages if stage.models],
        stages=[_section(stage) for stage in stages],
    )
    path = folder / "report.html"
    path.write_text(page, "utf-8")
    return path


# ---- reading ----------------------------------------------------------------------------------------------------


def read(folder: Path) -> list[Stage]:
    """The stages of a pipeline folder in their order, or a run folder as its only stage."""
    summary = _json(folder / "summary.json")
    if "stages" in summary:
        return [_read_run(folder / name, name, _stage_facts(summary, name)) for name in summary["stages"]]
    if not summary and not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise PlauditError(
            f"{folder} is not a run: it has no summary.json, config.yaml or metrics.jsonl. "
            "Give the folder that plaudit wrote the run into."
        )
    stage = _read_run(folder, folder.resolve().name, {})
    stage.name = str(stage.config.get("algorithm", stage.name))
    return [stage]


def _stage_facts(summary: dict[str, Any], name: str) -> dict[str, Any]:
    stages = summary["stages"]
    costs = stages[name] if isinstance(stages, dict) else {}
    return {**costs, **summary.get(name, {})}


def _read_run(folder: Path, name: str, facts: dict[str, Any]) -> Stage:
    # A run that went back to its last checkpoint did some steps twice: the later row is the one that counts.
    metrics = {row["step"]: row for row in _lines(folder / "metrics.jsonl") if _is_number(row.get("step"))}
    return Stage(
        name=name,
        config=_yaml(folder / "config.yaml"),
        metrics=[metrics[step] for step in sorted(metrics)],
        samples=_lines(folder / "samples.jsonl"),
        facts={**_json(folder / "summary.json"), **facts},
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise PlauditError(f"{path} is not valid JSON ({error}); remove it and run again.") from None
    if not isinstance(content, dict):
        raise PlauditError(f"{path} holds no object of figures; remove it and run again.")
    return content


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text("utf-8").split("\n")
    for place, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line) if line.strip() else {})
        except ValueError as error:
            if place == len(lines):  # no newline yet: the run is still writing it, or was killed as it did
                break
            raise PlauditError(f"{path}, line {place} is not valid JSON ({error}); remove that line.") from None
    return [row for row in rows if isinstance(row, dict) and row]


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise PlauditError(f"{path} is not valid YAML ({error}); remove it and run again.") from None
    return content if isinstance(content, dict) else {}


# ---- words and figures ------------------------------------------------------------------------------------------


def number(value: Any, decimals: int | None = None) -> str:
    """Three significant digits (or so many decimals), thousands separated, a true minus sign; a dash for no number."""
    if not _is_number(value):
        return "–"
    size = abs(value)
    if decimals is None and 0 < size < 1e-3:
        mantissa, exponent = f"{value:.2g}".split("e") if size < 1e-4 else (f"{value * 1e4:.2g}", "-4")
        text = f"{mantissa}×10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    elif decimals is None:
        places = 0 if float(value).is_integer() or size >= 100 else 2 - math.floor(math.log10(size))
        text = f"{value:,.{places}f}"
    else:
        text = f"{value:,.{decimals}f}"
        text = text.lstrip("-") if not float(text.replace(",", "")) else text
    return text.replace("-", "−")


def percent(value: Any) -> str:
    return f"{100 * value:.1f}%" if _is_number(value) else "–"


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{number(seconds, 1 if seconds < 10 else 0)} s"


def figure(value: Any, name: str) -> str:
    """`value` in the unit that `name` tells."""
    if not _is_number(value):
        return "–"
    if name == "seconds":
        return duration(value)
    if name == "peak_memory_mb":
        return f"{value / 1000:.1f} GB" if value >= 1000 else f"{value:.0f} MB"
    if name == "tokens_per_second":
        return number(value, 0 if value >= 10 else 1)
    return percent(value) if SHARES.search(name) else number(value)


def _change(before: float, after: float, decimals: int | None = None) -> str:
    text = number(after - before, decimals)
    return text if text.startswith("−") or not text.strip("0.") else f"+{text}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _words(name: str) -> str:
    words = name.replace("_", " ").replace("/", " ").strip()
    return words[:1].upper() + words[1:]


def _label(name: str) -> str:
    return FACTS.get(name, name.replace("_", " "))


def _model(name: str) -> str:
    return name.upper() if len(name) <= 4 else name


def _plain(text: Any) -> str:
    """A text, or a conversation as lines "role: content"."""
    if isinstance(text, list):
        text = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in text if isinstance(turn, dict)) + "\n"
    text = str(text)
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


# ---- what is said first -----------------------------------------------------------------------------------------


def headline(stages: Sequence[Stage]) -> str:
    """The outcome in one sentence, from the last stage that has one to tell."""
    for stage in reversed(stages):
        for sentence in (_evaluated(stage), _agreed(stage), _fitted(stage), _scored(stage)):
            if sentence:
                return sentence
    steps = max((stage.metrics[-1]["step"] for stage in stages if stage.metrics), default=0)
    return f"{stages[-1].title if stages else 'Nothing'} has run for {number(steps)} steps."


def _moved(before: float, after: float, decimals: int = 2) -> str:
    verb = "rose" if after > before else "fell" if after < before else "stayed"
    return f"{verb} from {number(before, decimals)} to {number(after, decimals)}"


def _evaluated(stage: Stage) -> str:
    models, parts = stage.models, []
    if len(models) < 2:
        return ""
    first, last = list(models)[0], list(models)[-1]
    before, after = models[first].get("judge"), models[last].get("judge")
    if before is not None and after is not None:
        parts.append(f"the judge’s mean {_moved(before, after)}")
    if _is_number(stage.facts.get("win_rate")):
        against = f"{_model(last)} won {percent(stage.facts['win_rate'])} of {_prompts(stage)} against {_model(first)}"
        parts.append(against + _interval(stage))
    sentence = ", and ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else ""


def _prompts(stage: Stage) -> str:
    prompts = stage.facts.get("prompts")
    return f"{number(prompts)} held-out prompts" if _is_number(prompts) else "held-out prompts"


def _interval(stage: Stage) -> str:
    low, high = stage.facts.get("win_rate_low"), stage.facts.get("win_rate_high")
    if not (_is_number(low) and _is_number(high)):
        return ""
    doubt = ", which chance alone could give" if low <= 0.5 <= high else ""
    return f" (95% interval {100 * low:.1f}–{percent(high)}{doubt})"


def _agreed(stage: Stage) -> str:
    if not _is_number(stage.facts.get("accuracy")):
        return ""
    rater = stage.facts.get("accuracy_one_rater")
    beside = f"; one human rater is on {percent(rater)}" if _is_number(rater) else ""
    return f"The reward model is right on {percent(stage.facts['accuracy'])} of held-out pairs{beside}."


def _fitted(stage: Stage) -> str:
    before, after = stage.facts.get("nll_before"), stage.facts.get("nll_after")
    moved = _is_number(before) and _is_number(after)
    return f"Held-out loss {_moved(before, after)} nats per token." if moved else ""


def _scored(stage: Stage) -> str:
    for name in ("score", "score_mean", "reward"):
        values = _points(stage.metrics, name)[1]
        if len(values) > 1:
            steps = number(stage.metrics[-1]["step"])
            return f"The score {_moved(values[0], values[-1])} in {steps} steps."
    return ""


def _cards(stages: Sequence[Stage]) -> list[tuple[str, str, str]]:
    """(label, figure, note) of what matters most."""
    cards = [card for stage in stages for card in _outcome_cards(stage)]
    for stage in stages:
        if _is_number(stage.facts.get("accuracy")):
            rater = stage.facts.get("accuracy_one_rater")
            note = f"one human rater {percent(rater)}" if _is_number(rater) else "of held-out pairs"
            cards.append(("Reward model accuracy", percent(stage.facts["accuracy"]), note))
        if all(_is_number(stage.facts.get(name)) for name in ("nll_before", "nll_after")):
            before, after = stage.facts["nll_before"], stage.facts["nll_after"]
            cards.append(("Held-out loss", f"{before:.2f} → {after:.2f}", "nats per token"))
    seconds, memory = _costed(stages, "seconds"), _costed(stages, "peak_memory_mb")
    if seconds:
        note = f"{figure(max(memory), 'peak_memory_mb')} of memory at most" if memory else ""
        cards.append(("Time", duration(sum(seconds)), note))
    return cards


def _outcome_cards(stage: Stage) -> list[tuple[str, str, str]]:
    cards, models = [], list(stage.models.values())
    if _is_number(stage.facts.get("win_rate")):
        interval = _interval(stage).split("(")[-1].split(",")[0].rstrip(")")
        cards.append(("Win rate", percent(stage.facts["win_rate"]), interval))
    if len(models) < 2:
        return cards
    for name, title, form in (("judge", "Judge’s mean", lambda x: number(x, 2)), ("positive_share", "Positive", _round)):
        if name in models[0] and name in models[-1]:
            before, after = models[0][name], models[-1][name]
            change = _change(100 * before, 100 * after, 0) + " points" if form is _round else _change(before, after, 2)
            cards.append((title, f"{form(before)} → {form(after)}", change))
    if "kl" in models[-1]:
        cards.append(("KL", number(models[-1]["kl"], 2), "nats per completion"))
    return cards


def _round(share: float) -> str:
    return f"{100 * share:.0f}%"


def _costed(stages: Iterable[Stage], name: str) -> list[float]:
    return [stage.facts[name] for stage in stages if _is_number(stage.facts.get(name))]


def _costs(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    total = sum(_costed(stages, "seconds"))
    if len(stages) < 2 or not total:
        return []
    return [
        {"title": stage.title, "share": 100 * stage.facts.get("seconds", 0) / total, "facts": stage.facts}
        for stage in stages
    ]
