"""How far people agree: raw agreement, kappas, Krippendorff's alpha and Kendall's tau, each with an interval.

An answer is already in its item's own order, whatever order was shown, so a choice here is always of a candidate and
never of a side. Everything is a function of sums over items: a bootstrap over items weighs the same sums anew, so a
thousand resamples are one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from plaudit.feedback.items import Item, Kind, Label
from plaudit.statistics import CELLS

Array = NDArray[np.float64]
Whole = NDArray[np.int64]
MOST_DROPPED = 0.02
"""Share of resamples that may leave a figure undetermined before it gets no interval: less than one of its tails."""
MOST_LEVELS = 10
"""Ratings of more distinct values than this are a scale, of which a kappa says nothing."""
FIRST, EQUAL, SECOND = 0, 1, 2
"""What may be decided of two candidates."""
Level = Literal["nominal", "ordinal", "interval"]
LEVELS: dict[Kind, Level] = {"compare": "nominal", "rank": "ordinal", "rate": "interval"}
"""What the distances in Krippendorff's alpha are, by kind."""

NOBODY = "No item was answered by two people."
ALIKE = "All answers are the same, so that chance alone would agree as well."


@dataclass(frozen=True)
class Table:
    """Who decided what: answers of one kind, one of each person to each item, on items that two or more answered.

    items      what was asked
    people     who answered, in the order of their names
    owner      (units,) the item that each row belongs to
    decided    (units, people) FIRST, EQUAL or SECOND of two candidates of an item, or the place of a rating among
               `levels`; -1 where a person did not answer
    values     (cells, people) the rank of a candidate, or a rating; NaN where a person did not answer
    cell_owner (cells,) the item that each row of `values` belongs to
    levels     the kinds of answer that `decided` counts
    """

    kind: Kind
    items: list[Item]
    people: list[str]
    owner: Whole
    decided: Whole
    values: Array
    cell_owner: Whole
    levels: int

    @cached_property
    def counts(self) -> Array:
        """(units, levels) how many people gave each answer."""
        return np.stack([(self.decided == level).sum(1) for level in range(self.levels)], axis=1).astype(np.float64)

    def per_item(self, rows: Array, owner: Whole | None = None) -> Array:
        """(units, k) summed over the units of each item: (items, k)."""
        sums = np.zeros((len(self.items), rows.shape[1]))
        np.add.at(sums, self.owner if owner is None else owner, rows)
        return sums


@dataclass(frozen=True)
class Sums:
    """A figure in two steps: sums `each` (items, k), and the `figure` (r,) of r totals (r, k), NaN where undefined.

    `missing` says why, where there is none at all.
    """

    each: Any
    figure: Callable[[Array], Array]
    missing: str = ALIKE


def table(labels: Sequence[Label], kind: Kind) -> Table:
    """The answers of one kind as a table. What could not be compared, and repeats, are left out of it."""
    answers: dict[str, dict[str, Label]] = {}
    for label in labels:
        if label.item.kind == kind and label.answer.comparable and not label.repeat:
            answers.setdefault(label.item.id, {}).setdefault(label.person, label)
    shared = [by for by in answers.values() if len(by) > 1]
    people = sorted({person for by in shared for person in by})
    ratings = sorted({label.answer.rating for by in shared for label in by.values() if label.answer.rating is not None})
    place = {rating: index for index, rating in enumerate(ratings)}
    decided, values, owner, cell_owner = [], [], [], []
    column = {person: index for index, person in enumerate(people)}
    items = [next(iter(by.values())).item for by in shared]
    for index, (item, by) in enumerate(zip(items, shared, strict=True)):
        width = len(item.candidates)
        rows = np.full((max(width * (width - 1) // 2, 1), len(people)), -1)
        cells = np.full((width, len(people)), np.nan)
        for person, label in by.items():
            if label.answer.ranks is None:
                assert label.answer.rating is not None
                rows[:, column[person]], cells[:, column[person]] = place[label.answer.rating], label.answer.rating
            else:
                rows[:, column[person]] = decisions(label.answer.ranks)
                cells[:, column[person]] = label.answer.ranks
        decided.append(rows)
        values.append(cells)
        owner += [index] * len(rows)
        cell_owner += [index] * width
    empty = np.zeros((0, len(people)))
    return Table(
        kind=kind,
        items=items,
        people=people,
        owner=np.array(owner, np.int64),
        decided=np.concatenate([empty, *decided]).astype(np.int64),
        values=np.concatenate([empty, *values]),
        cell_owner=np.array(cell_owner, np.int64),
        levels=len(ratings) if kind == "rate" else 3,
    )


def decisions(ranks: Sequence[int]) -> list[int]:
    """FIRST, EQUAL or SECOND for each two candidates, in the order of `itertools.combinations`."""
    return [EQUAL + (a > b) - (a < b) for a, b in combinations(ranks, 2)]


# ---------------------------------------------------------------------------------------------------- the figures


def raw(table: Table) -> Sums:
    """Share of pairs of people who decided the same, over all units."""
    counts, n = table.counts, table.counts.sum(1)
    same, pairs = (counts * (counts - 1)).sum(1), n * (n - 1)
    return Sums(table.per_item(np.stack([same, pairs], 1)), lambda t: _ratio(t[:, 0], t[:, 1]))


def fleiss(table: Table) -> Sums:
    """Fleiss' kappa (Fleiss 1971, equations 1 to 7), the mean agreement being over units, however many answered each.

    With the same number of people on every unit this is the paper's.
    """
    counts = np.where(table.counts.sum(1, keepdims=True) > 1, table.counts, 0)
    n = counts.sum(1)
    used = n > 1
    agreement = np.where(used, (counts * (counts - 1)).sum(1) / np.maximum(n * (n - 1), 1), 0)
    each = table.per_item(np.column_stack([agreement, used, counts]))

    def figure(totals: Array) -> Array:
        observed = _ratio(totals[:, 0], totals[:, 1])
        shares = _ratio(totals[:, 2:], totals[:, 2:].sum(1, keepdims=True))
        return _beyond_chance(observed, (shares**2).sum(1))

    return Sums(each, figure)


def cohen(table: Table, pairs: Sequence[tuple[int, int]] | None = None) -> Sums:
    """Cohen's kappa (Cohen 1960) of two people; of several pairs of them, the mean of those that are defined
    (Light 1971). `pairs` are columns of the table, by default all."""
    from scipy.sparse import coo_array

    size = table.levels**2
    pairs = list(combinations(range(len(table.people)), 2)) if pairs is None else list(pairs)
    rows, columns = [], []
    for index, (a, b) in enumerate(pairs):
        both = (table.decided[:, a] >= 0) & (table.decided[:, b] >= 0)
        rows.append(table.owner[both])
        columns.append(index * size + table.decided[both, a] * table.levels + table.decided[both, b])
    row, column = np.concatenate(rows), np.concatenate(columns)
    # Equal places are added up.
    each = coo_array((np.ones(len(row)), (row, column)), (len(table.items), len(pairs) * size)).tocsr()

    def figure(totals: Array) -> Array:
        both = totals.reshape(len(totals), -1, table.levels, table.levels)
        both = _ratio(both, both.sum((2, 3), keepdims=True))
        observed = np.trace(both, axis1=2, axis2=3)
        chance = (both.sum(2) * both.sum(3)).sum(2)
        kappas = _beyond_chance(observed, chance)
        known = ~np.isnan(kappas)
        return _ratio(np.where(known, kappas, 0).sum(1), known.sum(1))

    return Sums(each, figure)


def tau(table: Table, pairs: Sequence[tuple[int, int]] | None = None) -> Sums:
    """Kendall's tau-b (Kendall 1945) of two people's rankings of an item's candidates, averaged over pairs of people
    and items. A ranking with everything in one tier follows nothing, and is left out."""
    each = np.zeros((len(table.items), 2))
    for a, b in combinations(range(len(table.people)), 2) if pairs is None else pairs:
        both = (table.decided[:, a] >= 0) & (table.decided[:, b] >= 0)
        x, y = table.decided[both, a] - EQUAL, table.decided[both, b] - EQUAL
        products = table.per_item(np.stack([x * y, x * x, y * y], 1).astype(np.float64), table.owner[both])
        lengths = np.sqrt(products[:, 1] * products[:, 2])
        each += np.stack([products[:, 0] / np.maximum(lengths, 1), lengths > 0], 1)
    return Sums(each, lambda t: _ratio(t[:, 0], t[:, 1]), "All rankings are in one tier, and follow nothing.")


def alpha(table: Table) -> Sums:
    """Krippendorff's alpha (Krippendorff 2011, "Computing Krippendorff's alpha-reliability"), with distances by kind:
    nominal for choices, ordinal for ranks (each candidate is a unit), interval for ratings."""
    if table.kind == "rate":
        return Sums(_squares(table), _interval_alpha)
    if table.kind == "compare":
        counts, owner, figure = table.counts, table.owner, _nominal_alpha
    else:
        ranks = np.arange(1, int(np.nanmax(table.values, initial=1)) + 1)
        counts = (table.values[:, :, None] == ranks).sum(1).astype(np.float64)
        owner, figure = table.cell_owner, _ordinal_alpha
    n = counts.sum(1)
    width = counts.shape[1]
    both = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(width)
    coincidences = both / np.maximum(n - 1, 1)[:, None, None]
    each = table.per_item(coincidences.reshape(len(counts), -1), owner)
    return Sums(each, lambda t: figure(t.reshape(len(t), width, width)))


def alpha_of(values: Array, level: Level) -> float:
    """The same for values (units, people), NaN where there is none, by the krippendorff package; NaN if undefined."""
    import krippendorff

    known = ~np.isnan(values)
    usable = known.sum(1) > 1
    if len(np.unique(values[usable][known[usable]])) < 2:
        return float("nan")
    return float(krippendorff.alpha(values[usable].T, level_of_measurement=level))


def _nominal_alpha(together: Array) -> Array:
    n_v = together.sum(2)
    n = n_v.sum(1)
    observed = _ratio(np.trace(together, axis1=1, axis2=2), n)
    return _beyond_chance(observed, _ratio((n_v * (n_v - 1)).sum(1), n * (n - 1)))


def _ordinal_alpha(together: Array) -> Array:
    """The distance of two ranks is what lies between them, half of both included, squared: it depends on how often
    each was given, and so on the resample."""
    n_v = together.sum(2)
    middles = np.cumsum(n_v, axis=1) - n_v / 2
    distances = (middles[:, :, None] - middles[:, None, :]) ** 2
    expected = n_v[:, :, None] * n_v[:, None, :] / np.maximum(n_v.sum(1) - 1, 1)[:, None, None]
    return 1 - _ratio((together * distances).sum((1, 2)), (expected * distances).sum((1, 2)))


def _squares(table: Table) -> Array:
    """(items, 4): how many ratings, their sum, their squares' sum, and the squared distances within the item."""
    known = ~np.isnan(table.values)
    usable = known & (known.sum(1, keepdims=True) > 1)
    said = np.where(usable, table.values, 0.0)
    n, total, squares = usable.sum(1), said.sum(1), (said**2).sum(1)
    within = 2 * (n * squares - total**2) / np.maximum(n - 1, 1)
    return table.per_item(np.stack([n, total, squares, within], 1), table.cell_owner)


def _interval_alpha(totals: Array) -> Array:
    n, total, squares, within = totals.T
    between = 2 * (n * squares - total**2) / np.maximum(n - 1, 1)
    return 1 - _ratio(within, np.where(between > 1e-12 * np.maximum(squares, 1), between, 0))


def _ratio(above: Array, below: Array) -> Array:
    """NaN where there is nothing to divide by."""
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)


def _beyond_chance(observed: Array, chance: Array) -> Array:
    return np.where(chance < 1 - 1e-12, (observed - chance) / np.maximum(1 - chance, 1e-12), np.nan)


# ------------------------------------------------------------------------------------------------------ intervals


def figures(table: Table, seed: int = 0, resamples: int = 1000) -> dict[str, dict[str, Any]]:
    """The figures that this kind of answer has, by name: `raw`, `cohen`, `fleiss`, `alpha`, and `tau` of rankings.

    Each is {"value", "low", "high", "why"}: the interval is the percentile bootstrap over items (Efron 1979) at 95 %;
    `why` says in a sentence why a number is missing, or how many resamples the interval leaves out.
    """
    if not table.items:
        names = ("raw", "cohen", "fleiss", "alpha", "tau")
        return {name: missing(NOBODY) for name in names[: 5 if table.kind == "rank" else 4]}
    sums = {"raw": raw(table), "alpha": alpha(table)}
    if table.kind == "rank":
        sums["tau"] = tau(table)
    if few := table.levels <= MOST_LEVELS:
        sums |= {"cohen": cohen(table), "fleiss": fleiss(table)}
    found = {name: interval(each, len(table.items), seed, resamples) for name, each in sums.items()}
    if not few:
        why = f"Of ratings with more than {MOST_LEVELS} different values, alpha says more."
        found |= {name: missing(why) for name in ("cohen", "fleiss")}
    if found["alpha"]["value"] is not None:
        values = np.where(table.decided < 0, np.nan, table.decided) if table.kind == "compare" else table.values
        found["alpha"]["value"] = alpha_of(values, LEVELS[table.kind])
    return found


def interval(sums: Sums, items: int, seed: int, resamples: int) -> dict[str, Any]:
    """A figure and its bootstrap interval over `items`, as plain values."""
    value = float(sums.figure(np.ones((1, items)) @ sums.each)[0])
    if np.isnan(value):
        return missing(sums.missing)
    block = max(1, CELLS // max(sums.each.shape))
    drawn = np.concatenate([sums.figure(weights @ sums.each) for weights in _weights(items, seed, resamples, block)])
    drawn = drawn[~np.isnan(drawn)]
    why, enough = undetermined(resamples - len(drawn), resamples)
    if not enough:
        return missing(why) | {"value": value}
    low, high = np.percentile(drawn, [2.5, 97.5])
    if high - low < 1e-12:
        return missing("The items are too few or too alike for an interval.") | {"value": value}
    return {"value": value, "low": float(low), "high": float(high), "why": why}


def undetermined(dropped: int, resamples: int) -> tuple[str, bool]:
    """What to say of a figure that so many resamples leave undetermined, nothing where none does; and whether the
    others make an interval. Those that are left out are the extreme ones, so that it would be too narrow."""
    if not dropped:
        return "", True
    said = f"{dropped:,} of {resamples:,} resamples leave it undetermined"
    if dropped > MOST_DROPPED * resamples:
        return f"{said}: too many for an interval.", False
    return f"{said}: the interval is that of the others.", True


def missing(why: str) -> dict[str, Any]:
    """A figure that is not there, and why."""
    return {"value": None, "low": None, "high": None, "why": why}


def _weights(items: int, seed: int, resamples: int, block: int) -> Iterator[Array]:
    """How often each item is in each resample, at most `block` of them at once: (r, items)."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(items, size=(rows, items)) + items * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * items).reshape(rows, items).astype(np.float64)


def between(table: Table) -> list[dict[str, Any]]:
    """For each two people with an item in common: {"people", "items", "raw", "kappa", "tau"}, None where undefined."""
    rows = []
    for a, b in combinations(range(len(table.people)), 2):
        both = (table.decided[:, a] >= 0) & (table.decided[:, b] >= 0)
        if not both.any():
            continue
        everything = np.ones((1, len(table.items)))
        found = {"kappa": cohen(table, [(a, b)])} if table.levels <= MOST_LEVELS else {}
        if table.kind == "rank":
            found["tau"] = tau(table, [(a, b)])
        row: dict[str, Any] = {
            "people": [table.people[a], table.people[b]],
            "items": len(set(table.owner[both].tolist())),
            "raw": float((table.decided[both, a] == table.decided[both, b]).mean()),
            "kappa": None,
            "tau": None,
        }
        for name, sums in found.items():
            value = float(sums.figure(everything @ sums.each)[0])
            row[name] = None if np.isnan(value) else value
        rows.append(row)
    return rows
