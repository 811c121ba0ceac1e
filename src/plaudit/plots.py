"""The plots of a report: matplotlib's SVG, made small, with colours that the page sets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO
from itertools import pairwise
from typing import Any

from plaudit.outcome import Stage
from plaudit.wording import MINUS, capitalised, is_number, model_name, number

MOST_POINTS = 300  # of a curve that are drawn, so that a long run's page stays small

# Title and unit, in the order in which they are shown; what is not named here follows under its own name.
METRICS = {
    "loss": ("Loss", ""),
    "nll": ("Loss", "nats per token"),
    "accuracy": ("Accuracy", "share that is right"),
    "score": ("Score", "mean of the rollout"),
    "judge": ("Judge", "mean"),
    "labels": ("Labels", "answers so far"),
    "agreement": ("Agreement", "held-out answers that the reward model foresees"),
    "kl": ("KL to the reference", "nats per completion"),
    "entropy": ("Entropy", "nats per token"),
    "clip_fraction": ("Clipped", "share of tokens"),
    "value_loss": ("Value loss", ""),
    "policy_loss": ("Policy loss", ""),
    "ratio": ("Probability ratio", "new policy over old"),
    "completion_tokens": ("Completion length", "tokens"),
    "truncated": ("Truncated", "share of completions"),
    "kl_coefficient": ("KL coefficient", ""),
    "calibration_error": ("Calibration error", ""),
    "gradient_norm": ("Gradient norm", ""),
    "learning_rate": ("Learning rate", ""),
}

# Stand-ins that `draw` turns into CSS variables, of which matplotlib knows nothing.
INK, MUTED, RULE, BEFORE, AFTER = (f"#0a0b0{digit}" for digit in "12345")
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", BEFORE: "before", AFTER: "after"}

# A curve is of training, of held-out data, or the mark that a person sets.
PARTS = [("training", BEFORE), ("held out", AFTER), ("one human", INK)]

Points = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Figure:
    """A plot with its caption; `ends` are (name, "first → last") of its curves."""

    title: str
    note: str
    svg: str
    ends: list[tuple[str, str]] = field(default_factory=list)


def draw(height: int, right: int, paint: Callable[[Any], None], left: int = 40) -> str:
    """What `paint` does to matplotlib axes, 340 by `height` units, `left` and `right` of these for labels, as SVG."""
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "plaudit",
        "text.parse_math": False,
        "font.size": 10,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": RULE,
        "grid.linewidth": 0.7,
        "axes.edgecolor": RULE,
        "axes.linewidth": 0.7,
        "axes.axisbelow": True,
        "lines.solid_capstyle": "round",
    }
    with rc_context(settings):
        canvas = Canvas(figsize=(340 / 72, height / 72))
        axes = canvas.add_axes((left / 340, 24 / height, (340 - left - right) / 340, (height - 34) / height))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, pad=5)
        axes.grid(axis="y")
        paint(axes)
        file = StringIO()
        canvas.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return Markup(_inlined(file.getvalue()))


def _inlined(svg: str) -> str:
    """Only the <svg> element, without namespaces, ids that nothing refers to, and a size and a font of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 sans-serif", svg)
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg)


def _ticks(axes: Any, name: str, most: int = 5, whole: bool = False) -> None:
    """Few round ticks with as many decimals as they need; none between whole numbers if asked for."""
    from matplotlib.ticker import MaxNLocator

    axis = getattr(axes, f"{name}axis")
    low, high = axis.get_view_interval()
    ticks = [
        tick
        for tick in MaxNLocator(most, steps=[1, 2, 5, 10], integer=whole).tick_values(low, high)
        if low <= tick <= high
    ]
    gap = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    axis.set_ticks(ticks, [number(float(tick), decimals) if decimals < 4 else _short(tick) for tick in ticks])


def _short(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return "0" if not float(mantissa) else f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)


def curves(stage: Stage) -> list[Figure]:
    """One plot per metric; what was held out, and what a person reaches, lie in the plot of what was trained."""
    names = [name for name in dict.fromkeys(name for row in stage.metrics for name in row) if name != "step"]
    names = [name for name in names if len(stage.points(name)[0]) > 1 and not name.startswith("time/")]
    panels: dict[str, list[str]] = {name: [] for name in METRICS}
    for name in sorted(names, key=_part):
        base = name.removeprefix("heldout_").removesuffix("_one_rater")
        base = "loss" if base == "nll" and "loss" in names else base
        panels.setdefault(base, []).append(name)
    return [_curve(base, {name: stage.points(name) for name in each}) for base, each in panels.items() if each]


def _part(name: str) -> int:
    return 2 if name.endswith("_one_rater") else 1 if name.startswith("heldout_") else 0


def _curve(base: str, series: dict[str, Points]) -> Figure:
    title, note = METRICS.get(base, (capitalised(base), ""))
    alone = len(series) == 1
    lines = {name: _calmed(points) for name, points in series.items()}

    def paint(axes: Any) -> None:
        labels = []
        for name, points in series.items():
            colour = AFTER if alone else PARTS[_part(name)][1]
            steps, values = lines[name]
            if lines[name] is not points:
                every = math.ceil(len(points[0]) / MOST_POINTS)
                axes.scatter(points[0][::every], points[1][::every], s=6, color=colour, alpha=0.4, linewidths=0)
            few = "o" if len(steps) <= 12 and _part(name) < 2 else None
            axes.plot(steps, values, color=colour, linewidth=1.8, marker=few, markersize=3.5)
            labels.append((values[-1], PARTS[_part(name)][0], colour))
        axes.margins(x=0.02, y=0.08)
        _ticks(axes, "y")
        _ticks(axes, "x", whole=True)
        if not alone:
            _label_ends(axes, sorted(labels))

    ends = [
        ("" if alone else PARTS[_part(name)][0], f"{number(values[0])} → {number(values[-1])}")
        for name, (_, values) in lines.items()
        if _part(name) < 2
    ]
    return Figure(title, note, draw(190, 8 if alone else 60, paint), ends)


def _label_ends(axes: Any, labels: list[tuple[float, str, str]]) -> None:
    """Names each curve, lowest first, where it ends; pushed up where the one below is too near."""
    low, high = axes.get_ylim()
    floor = -1.0
    for value, name, colour in labels:
        floor = max((value - low) / (high - low), floor + 0.09)
        axes.text(1.02, floor, name, transform=axes.transAxes, color=colour, va="center")


def _calmed(points: Points) -> Points:
    """The points themselves where they are calm, and otherwise their local mean."""
    values = points[1]
    rises = [after > before for before, after in pairwise(values)]
    turns = sum(before != after for before, after in pairwise(rises))
    return points if len(values) < 12 or turns < len(values) / 4 else _smoothed(points)


def _smoothed(points: Points) -> Points:
    """The mean near each of up to 160 places, weighted by a Gaussian over steps."""
    import numpy as np

    steps, values = np.asarray(points[0], float), np.asarray(points[1], float)
    places = np.linspace(steps[0], steps[-1], min(len(steps), 160))
    width = (steps[-1] - steps[0]) * max(0.05, 2 / len(steps))
    weights = np.exp(-0.5 * ((places[:, None] - steps) / width) ** 2)
    return places.tolist(), ((weights @ values) / weights.sum(1)).tolist()


def reliability(stage: Stage) -> list[Figure]:
    rows = stage.facts.get("reliability")
    if not rows:
        return []
    most = max(row["count"] for row in rows)
    predicted, observed = [row["confidence"] for row in rows], [row["observed"] for row in rows]

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, dashes=(3, 3))
        axes.plot(predicted, observed, color=AFTER, linewidth=1.4)
        axes.scatter(predicted, observed, s=[10 + 90 * row["count"] / most for row in rows], color=AFTER, linewidths=0)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        _ticks(axes, "x")
        _ticks(axes, "y")
        axes.text(0.97, 0.04, "dashed: as sure as people are", ha="right", color=MUTED)

    error = stage.facts.get("calibration_error")
    ends = [("calibration error", number(error))] if is_number(error) else []
    return [Figure("Reliability", "observed over predicted", draw(244, 8, paint), ends)]


def margins(stage: Stage) -> list[Figure]:
    """By how much the text that people prefer leads, pair by pair."""
    rows = stage.facts.get("margins")
    if not rows:
        return []
    counts, edges = [row["count"] for row in rows], [rows[0]["from"], *(row["to"] for row in rows)]
    wrong = sum(row["count"] for row in rows if row["to"] <= 0)

    def paint(axes: Any) -> None:
        axes.stairs(counts, edges, fill=True, color=AFTER, alpha=0.35, linewidth=0)
        axes.stairs(counts, edges, color=AFTER, linewidth=1.2)
        axes.axvline(0, color=MUTED, linewidth=0.8, dashes=(3, 3))
        _ticks(axes, "x")
        _ticks(axes, "y", whole=True)

    ends = [("wrong", f"{wrong:,} of {sum(counts):,}")] if edges[0] < 0 else []
    return [Figure("Margin", "lead of the text that people prefer; pairs", draw(190, 8, paint), ends)]


def histograms(stage: Stage) -> list[Figure]:
    """How the reward is distributed for each model, one above the other on one axis."""
    import numpy as np

    found = stage.facts.get("histograms") or {}
    values = {name: [x for x in rewards if is_number(x)] for name, rewards in found.items()}
    values = {name: rewards for name, rewards in values.items() if rewards}
    if not values:
        return []
    edges = np.histogram_bin_edges([x for rewards in values.values() for x in rewards], 32)
    counts = {name: np.histogram(rewards, edges)[0] / len(rewards) for name, rewards in values.items()}
    tallest = max(count.max() for count in counts.values())

    def paint(axes: Any) -> None:
        for place, (name, count) in enumerate(reversed(counts.items())):
            colour, mean = (AFTER if place == 0 else BEFORE), float(np.mean(values[name]))
            floor = 1.35 * place
            axes.stairs(
                count / tallest + floor, edges, baseline=floor, fill=True, color=colour, alpha=0.35, linewidth=0
            )
            axes.stairs(count / tallest + floor, edges, baseline=floor, color=colour, linewidth=1.2)
            axes.plot([mean, mean], [floor, floor + 1.08], color=INK, linewidth=1.2)
            axes.text(mean, floor + 1.11, f"{model_name(name)}, mean {number(mean, 2)}", ha="center", color=INK)
        axes.set(ylim=(0, 1.35 * len(counts)))
        axes.set_yticks([])
        _ticks(axes, "x")

    height = 34 + 105 * len(counts)
    return [Figure("Reward", "of each completion", draw(height, 8, paint))]


def frontier(stage: Stage, outcome: Stage) -> list[Figure]:
    """What was gained for how far the policy went: the judge where it was asked in training, else the score."""
    rows = [row for row in stage.metrics if is_number(row.get("kl"))]
    name = next((name for name in ("judge", "score") if sum(is_number(row.get(name)) for row in rows) > 2), None)
    if name is None:
        return []
    rows = [row for row in rows if is_number(row.get(name))]
    steps = [row["step"] for row in rows]
    raw = [[row[each] for row in rows] for each in ("kl", name)]
    path = [_smoothed((steps, values))[1] if len(rows) >= 12 else values for values in raw]
    judged = "judge" if name == "judge" else "reward"
    points = {m: (f.get("kl"), f.get(judged)) for m, f in outcome.models.items() if is_number(f.get(judged))}

    def paint(axes: Any) -> None:
        axes.scatter(*raw, s=7, color=AFTER, alpha=0.45, linewidths=0)
        axes.plot(*path, color=AFTER, linewidth=1.8)
        for model, (kl, value) in points.items():
            axes.scatter([kl or 0.0], [value], s=34, color=INK, linewidths=0, zorder=3)
            axes.annotate(model_name(model), (kl or 0.0, value), xytext=(6, -4), textcoords="offset points", va="top")
        axes.margins(x=0.08, y=0.12)
        _ticks(axes, "x")
        _ticks(axes, "y")

    title = "Judge against KL" if name == "judge" else "Score against KL"
    return [Figure(title, "nats per completion", draw(244, 8, paint))]
