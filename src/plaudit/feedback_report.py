"""`agreement.html` and its figures in the terminal: what labels say of people and of models, on one page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plaudit.plots import AFTER, BEFORE, INK, MUTED, RULE, Figure, draw
from plaudit.wording import DASH, number, percent

NAMES = {
    "raw": "Raw agreement",
    "cohen": "Cohen’s κ",
    "fleiss": "Fleiss’ κ",
    "alpha": "Krippendorff’s \N{GREEK SMALL LETTER ALPHA}",
    "tau": "Kendall’s τ-b",
}
MEANINGS = {
    "raw": "share of pairs of people who decide the same",
    "cohen": "agreement of two people beyond chance, mean over all two",
    "fleiss": "agreement of all beyond chance",
    "alpha": "disagreement beside that of chance, by the distance of answers",
    "tau": "how alike two people order an item’s candidates, mean",
}
KINDS = {"compare": "comparisons", "rank": "rankings", "rate": "ratings"}
LONGEST = 16  # characters of a name in a plot
MOST_PEOPLE = 24  # in a plot; a table holds them all


def page(found: dict[str, Any], title: str) -> str:
    """The whole page of a summary (see `feedback.agreement.summary`), which needs nothing but itself."""
    import jinja2
    from markupsafe import Markup

    here = Path(__file__)
    # One style for all reports.
    style = re.search(r"<style>\n(.*?)</style>", here.with_name("report.html").read_text("utf-8"), re.DOTALL)
    assert style is not None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(number=number, percent=percent, spread=spread, share=share)
    return environment.from_string(here.with_suffix(".html").read_text("utf-8")).render(
        style=Markup(style[1]),
        title=title,
        headline=headline(found),
        cards=cards(found),
        found=found,
        names=NAMES,
        meanings=MEANINGS,
        kinds=KINDS,
        agreement=[plot for kind, own in found["kinds"].items() for plot in _agreement(kind, own)],
        people=_people(found),
        habits=_habits(found["overall"]),
        models=[*_strengths(found), *_tiers(found)],
    )


def show(found: dict[str, Any]) -> None:
    """Prints the figures as tables."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=True)
    table = Table("figure", "value", "95 % interval", title=headline(found), title_justify="left")
    for kind, own in found["kinds"].items():
        for name, value in own["figures"].items():
            table.add_row(f"{NAMES[name]}, {KINDS[kind]}", number(value["value"], 4), spread(value, 4))
    for name, row in found["strengths"]["models"].items():
        table.add_row(f"strength of {escape(name)}", number(row["value"], 4), spread(row, 4))
    for name, value in _shares(found["overall"]).items():
        table.add_row(name, percent(value["value"]), spread(value))
    console.print(table, highlight=False)
    table = Table("person", "labels", "agrees with others", "reliability", "gold", "seconds")
    for name, own in found["people"].items():
        relied = [value for value in own["reliability"].values() if value is not None]
        others, gold = percent(own["others"]["value"]), percent(own["gold"]["value"])
        reliable = ", ".join(number(value, 3) for value in relied) or DASH
        table.add_row(escape(name), str(own["labels"]), others, reliable, gold, number(own["seconds"]["median"], 1))
    console.print(table, highlight=False)
    for note in found["notes"]:
        console.print(escape(note), highlight=False)


def headline(found: dict[str, Any]) -> str:
    """The outcome in a sentence."""
    people, kinds = len(found["people"]), found["kinds"]
    main = max(kinds, key=lambda kind: kinds[kind]["labels"], default=None)
    who = "One person" if people == 1 else f"{people} people"
    if main is None or kinds[main]["figures"]["raw"]["value"] is None:
        return f"{who} gave {found['labels']:,} answers."
    raw = percent(kinds[main]["figures"]["raw"]["value"])
    return f"{who} gave {found['labels']:,} answers, and any two of them decide the same in {raw} of {KINDS[main]}."


def cards(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The few figures that stand at the top: (name, value, note)."""
    shown = [("Answers", f"{found['labels']:,}", f"to {found['items']:,} items, of {len(found['people'])} people")]
    for kind, own in found["kinds"].items():
        alpha = own["figures"]["alpha"]
        if alpha["value"] is not None:
            shown.append((NAMES["alpha"], number(alpha["value"], 3), f"{KINDS[kind]}, {own['level']}"))
    position, median = found["overall"]["position"], found["overall"]["seconds"]["median"]
    if position["n"]:
        note = f"preferred, of {position['n']:,} decided; p = {number(position['p_value'])}"
        shown.append(("Shown first", percent(position["value"]), note))
    if median is not None:
        shown.append(("Time", f"{number(median, 1)} s", "median of an answer"))
    return shown


def spread(value: dict[str, Any], decimals: int | None = None) -> str:
    """The interval of a figure, of a share in per cent; or why there is none."""
    if value["low"] is None:
        return str(value.get("why", "")) or DASH
    if decimals is None:
        return f"{percent(value['low'])} to {percent(value['high'])}"
    return f"{number(value['low'], decimals)} to {number(value['high'], decimals)}"


def share(value: dict[str, Any]) -> str:
    """A share of so many."""
    return f"{percent(value['value'])} of {value['n']:,}" if value["n"] else DASH


def _shares(overall: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The shares that say something of habits, where there are any."""
    names = {
        "preferred what was shown first": "position",
        "preferred the longer": "length",
        "ties": "ties",
        "can’t compare": "cant",
        "same as oneself before": "oneself",
        "same as the known answer": "gold",
    }
    return {said: overall[name] for said, name in names.items() if overall[name]["n"]}


# ---- plots --------------------------------------------------------------------------------------------------------


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _dots(
    rows: Sequence[tuple[str, float, float | None, float | None]],
    decimals: int,
    middle: float | None = None,
    ends: tuple[float, ...] = (),
) -> str:
    """One row for each (name, value, low, high), the first at the top, around a dashed line at `middle`; `ends` are on
    the axis whatever the values, so that small differences look small."""
    spans = [value for row in rows for value in (*row[1:], middle) if value is not None] + list(ends)

    def paint(axes: Any) -> None:
        if middle is not None:
            axes.axvline(middle, color=MUTED, linewidth=0.8, dashes=(3, 3))
        for place, (_, value, low, high) in enumerate(reversed(rows)):
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=AFTER, linewidth=5, alpha=0.35)
            axes.scatter([value], [place], s=26, color=AFTER, linewidths=0, zorder=3)
            text = number(value, decimals)
            axes.text(1.03, place, text, transform=axes.get_yaxis_transform(), color=INK, va="center")
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x")
        edge = 0.06 * (max(spans) - min(spans) or 1)
        axes.set(ylim=(-0.6, len(rows) - 0.4), xlim=(min(spans) - edge, max(spans) + edge))
        axes.set_yticks(range(len(rows)), [_short(row[0]) for row in reversed(rows)])
        axes.locator_params(axis="x", nbins=4)

    return draw(44 + 22 * len(rows), 44, paint, left=116)


def _agreement(kind: str, own: dict[str, Any]) -> list[Figure]:
    """The figures with their intervals, and who agrees with whom."""
    known = [(NAMES[name], value) for name, value in own["figures"].items() if value["value"] is not None]
    plots = []
    if known:
        rows = [(name, value["value"], value["low"], value["high"]) for name, value in known]
        note = f"{own['shared']:,} shared items"
        plots.append(Figure(f"Agreement, {KINDS[kind]}", note, _dots(rows, 3, ends=(0, 1))))
    people = sorted({name for row in own["between"] for name in row["people"]})
    if 1 < len(people) <= MOST_PEOPLE:
        plots.append(Figure(f"Who agrees with whom, {KINDS[kind]}", "%", _matrix(people, own["between"])))
    return plots


def _matrix(people: list[str], between: Sequence[dict[str, Any]]) -> str:
    """A square for each two people, the fuller the more they agree."""
    place = {name: index for index, name in enumerate(people)}
    size = len(people)

    def paint(axes: Any) -> None:
        from matplotlib.patches import Rectangle

        for row in between:
            a, b = (place[name] for name in row["people"])
            for x, y in ((a, b), (b, a)):
                corner = (x - 0.48, y - 0.48)
                axes.add_patch(Rectangle(corner, 0.96, 0.96, color=RULE, alpha=0.4, linewidth=0))
                # Chance alone reaches about a third to a half: the scale begins there.
                axes.add_patch(
                    Rectangle(corner, 0.96, 0.96, color=AFTER, alpha=max(0.0, 1.4 * row["raw"] - 0.7), linewidth=0)
                )
                if size <= 9:
                    axes.text(x, y, number(100 * row["raw"], 0), ha="center", va="center", color=INK)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        axes.set_yticks(range(size), [_short(name) for name in people])
        upright = size <= 4
        names = [_short(name) if upright else "" for name in people]
        axes.set_xticks(range(size), names)

    return draw(44 + max(22 * size, 90), 8, paint, left=116)


def _people(found: dict[str, Any]) -> list[Figure]:
    """How far each person agrees with the others, and how reliable the model finds them."""
    rows = [(name, own["others"]) for name, own in found["people"].items() if own["others"]["n"]][:MOST_PEOPLE]
    plots = []
    if rows:
        dots = [(name, other["value"], other["low"], other["high"]) for name, other in rows]
        plots.append(Figure("Agreement with the others", "same decisions", _dots(dots, 2, ends=(0.5, 1))))
    for kind, own in found["kinds"].items():
        relied = list(own["reliability"]["people"].items())[:MOST_PEOPLE]
        if len(relied) > 1:
            dots = [(name, value, None, None) for name, value in relied]
            plots.append(Figure("Reliability", KINDS[kind], _dots(dots, 2, ends=(0.5, 1))))
    return plots


def _habits(overall: dict[str, Any]) -> list[Figure]:
    """What is preferred regardless, and the times that answers took."""
    plots = []
    names = {"position": "shown first", "length": "the longer"}
    rows = [(said, overall[name]) for name, said in names.items() if overall[name]["n"]]
    if rows:
        dots = [(said, own["value"], own["low"], own["high"]) for said, own in rows]
        plots.append(Figure("Preferred", "dashed: as often as not", _dots(dots, 2, middle=0.5, ends=(0.35, 0.65))))
    times = overall["seconds"]
    if sum(times["counts"]) > 1:
        plots.append(Figure("Time of an answer", "answers by seconds", _times(times)))
    return plots


def _times(times: dict[str, Any]) -> str:
    counts, edges = times["counts"], times["edges"]

    def paint(axes: Any) -> None:
        axes.bar(range(len(counts)), counts, width=0.9, color=AFTER, alpha=0.5, align="edge", linewidth=0)
        names = [f"{edge:g}" if edge < 60 else f"{edge / 60:g} min" for edge in edges]
        axes.set_xticks(range(0, len(edges), 2), names[::2])
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)

    return draw(190, 8, paint)


def _strengths(found: dict[str, Any]) -> list[Figure]:
    models = found["strengths"]["models"]
    if not models:
        return []
    rows = [(name, row["value"], row["low"], row["high"]) for name, row in models.items()]
    return [Figure("Strength", "log-odds of winning, mean 0", _dots(rows, 2, middle=0.0))]


def _tiers(found: dict[str, Any]) -> list[Figure]:
    """How often each model came first, second, and so on."""
    plots = []
    for kind in ("compare", "rank"):
        tiers = found["kinds"].get(kind, {}).get("tiers") or {}
        if tiers:
            means = {name: sum(k * count for k, count in enumerate(row)) / sum(row) for name, row in tiers.items()}
            order = sorted(means, key=means.__getitem__)
            plots.append(Figure(f"Tiers, {KINDS[kind]}", "1 is the best", _bars(order, tiers)))
    return plots


def _bars(order: Sequence[str], tiers: dict[str, list[int]]) -> str:
    most = len(next(iter(tiers.values())))

    def paint(axes: Any) -> None:
        for place, name in enumerate(reversed(order)):
            start, total = 0.0, sum(tiers[name])
            for tier, count in enumerate(tiers[name]):
                width = 100 * count / total
                colour, depth = (AFTER, 0.75 * (1 - tier / most)) if tier < most - 1 else (BEFORE, 0.25)
                axes.barh(place, width, left=start, height=0.7, color=colour, alpha=depth, linewidth=0)
                if width >= 9:
                    axes.text(start + width / 2, place, str(tier + 1), ha="center", va="center", color=INK)
                start += width
        axes.grid(visible=False)
        axes.set(xlim=(0, 100), ylim=(-0.6, len(order) - 0.4))
        axes.set_yticks(range(len(order)), [_short(name) for name in reversed(order)])
        axes.set_xticks([0, 50, 100], ["0%", "50%", "100%"])

    return draw(44 + 26 * len(order), 14, paint, left=116)
