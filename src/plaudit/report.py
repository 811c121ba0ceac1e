"""`write(folder)`: a run, or a pipeline of runs, as one HTML page that needs nothing but itself.

Colours are CSS variables, inside the plots too, so that one page reads well in light, in dark and on paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from plaudit.outcome import (
    Stage,
    cards,
    compared_samples,
    costs,
    headline,
    interval,
    read,
    training_samples,
)
from plaudit.plots import curves, frontier, histograms, margins, reliability
from plaudit.run import write_atomically
from plaudit.wording import change, figure, flat, is_number, label, model_name, number, plain

COST = ("seconds", "peak_memory_mb", "tokens_per_second")


def write(folder: Path) -> Path:
    """Writes report.html into `folder`, a run or a pipeline of stages, and returns its path.

    Raises PlauditError if `folder` is neither, or if one of its files can't be read.
    """
    folder = Path(folder)
    stages = read(folder)
    page = render(
        title=folder.resolve().name,
        headline=headline(stages),
        cards=cards(stages),
        costs=costs(stages),
        outcomes=[_outcome(stage, stages) for stage in stages if stage.models],
        stages=[section for stage in stages if (section := _section(stage))],
    )
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def render(*, refresh: int = 0, **parts: Any) -> str:
    """The page of these parts, which report.html names; browsers load it again every `refresh` seconds, if any."""
    page: str = _template().render(refresh=refresh, **parts)
    return page


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(number=number, figure=figure, label=label, model_name=model_name, plain=plain)
    return environment.from_string(Path(__file__).with_suffix(".html").read_text("utf-8"))


def _outcome(stage: Stage, stages: Sequence[Stage]) -> dict[str, Any]:
    """An evaluation: its table, win rate, plots and samples."""
    models = stage.models
    columns = list(dict.fromkeys(name for row in models.values() for name in row))
    first, last = next(iter(models)), list(models)[-1]
    moves = {name: _move(name, models[first].get(name), models[last].get(name)) for name in columns}
    figures = [*histograms(stage), *(plot for other in stages for plot in frontier(other, stage))]
    samples = compared_samples(stage)
    return {
        "title": "Before and after",
        "models": models,
        "columns": columns,
        "moves": moves if len(models) == 2 else {},
        "win": stage.facts if stage.has("win_rate", "win_rate_low", "win_rate_high") else None,
        "interval": interval(stage),
        "figures": figures,
        "samples": samples,
        "shown": f"The first {len(samples)} prompts, as they came",
    }


def _move(name: str, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    if figure(before, name).endswith("%"):
        return change(100 * before, 100 * after, 1)
    return change(before, after, 3 if max(abs(before), abs(after)) < 1 else 2)


def _section(stage: Stage) -> dict[str, Any] | None:
    """A stage's own part of the page; None if it cost time and nothing more is known."""
    facts = {name: value for name, value in stage.facts.items() if is_number(value)}
    if stage.models:  # said in the outcome
        facts = {name: value for name, value in facts.items() if name in COST}
    figures = [*curves(stage), *reliability(stage), *margins(stage)]
    if not (facts.keys() - COST or figures or stage.config or stage.samples):
        return None
    return {
        "name": stage.name,
        "title": stage.title,
        "facts": facts,
        "figures": figures,
        "settings": flat(stage.config),
        "samples": training_samples(stage),
    }
