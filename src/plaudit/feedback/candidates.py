"""Items out of files of candidates: whatever was sampled or collected, and is to be judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from plaudit.errors import PlauditError
from plaudit.feedback.forms import check_answer, dumped, item_from_json
from plaudit.feedback.items import MOST, Answer, Candidate, Item, Kind, check_item
from plaudit.records import Comparison, Ranking, Rating, left_out, parse, ranks_of
from plaudit.rows import Row, Text, kind_of, named, rows

SOURCES = ("models", "sources", "model", "source")
_OWN = ("prompt", "completions", "completion", *SOURCES, "gold", "query")
R = TypeVar("R", Comparison, Ranking, Rating)
Located = list[tuple[str, Item]]
"""Items, each with where the row stands that it comes from, or the first of its rows."""
Dropped = dict[str, list[str]]
"""Where the rows stand that ask nothing, by the reason."""
_SAME, _TWICE = "all its candidates are the same", "an earlier row asks the same"
_ALONE = "no other completion of the same prompt is left to judge it beside"


def read_items(
    paths: str | Path | Sequence[str | Path],
    kind: Kind | None = None,
    tell: Callable[[str], None] = lambda sentence: None,
) -> list[Item]:
    """The items in one or several JSON-lines files of candidates.

    A row holds `completions` (two are to be compared, more ranked, one rated), or `chosen` and `rejected` (both become
    candidates), or one `completion`; `kind` asks for another use: `rate` makes an item of each completion. Rows of one
    `completion` each, from several files or with `kind` compare or rank, are put together by their prompt, one from
    each file in turn. `models` (or `sources`) name where each comes from; by default, of several files, the file.
    `gold` makes an item that checks who answers: "A > B = C" in the order of the row, a number to be rated, or true
    where `chosen` is right. A row of an item's own form (`kind`, `candidates`) is taken as it is. Items whose
    candidates are all the same, that were asked before, or that want for a second candidate are left out, and `tell`
    hears how many. Raises PlauditError, naming file, line and column.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    items: Located = []
    dropped: Dropped = {}
    pairs: dict[str, Row] = {}
    single: list[list[Row]] = [[] for _ in files]
    for file, found in zip(files, single, strict=True):
        for where, values in rows(file):
            row = Row(where, values, _OWN)
            if row.has("candidates"):
                items.append((where, item_from_json(values, where)))
            elif row.has("completions"):
                items += _items_of(row, kind)
            elif row.has("chosen", "rejected"):
                pairs[where] = row
            elif row.has("completion"):
                found.append(row)
            else:
                raise _nothing(row)
    items += _of_pairs(pairs, kind, dropped)
    if kind == "rate" or (kind is None and len(files) == 1):
        items += [
            one
            for row in chain(*single)
            for one in _asked(row, "rate", row.prompt(), [row.text("completion")], row.columns())
        ]
    else:
        items += _together(dict(zip(_names(files), single, strict=True)), kind or "compare", dropped)
    kept = _distinct(items, dropped)
    if not kept:
        why = "; ".join(["no two candidates for one prompt that differ", *left_out(dropped)])
        raise PlauditError(f"{files[0]}: holds nothing to judge: {why}.")
    for note in left_out(dropped):
        tell(note)
    return kept


def _distinct(items: Located, dropped: Dropped) -> list[Item]:
    """The items that ask something, each once."""
    kept: list[Item] = []
    seen: set[str] = set()
    for where, item in items:
        if item.kind != "rate" and not _differ(item):
            dropped.setdefault(_SAME, []).append(where)
        elif item.id in seen and item.gold is None:  # with one, the store looks whether it says the same
            dropped.setdefault(_TWICE, []).append(where)
        else:
            kept.append(item)
            seen.add(item.id)
    return kept


def _nothing(row: Row) -> PlauditError:
    needs = "`completions`, or `chosen` and `rejected`, or a `completion`"
    return PlauditError(f"{row.where}: what is to be judged needs {needs}, but this row holds {named(row.values)}.")


def _differ(item: Item) -> bool:
    return any(candidate.text != item.candidates[0].text for candidate in item.candidates)


def _items_of(row: Row, kind: Kind | None) -> Located:
    """The items of a row with `completions`."""
    values = row.values.get("completions")
    if not isinstance(values, list) or not 1 <= len(values) <= MOST:
        raise row.error("completions", f"must be a list of 1 to {MOST} answers")
    texts = [row.as_text("completions", value) for value in values]
    return _asked(row, kind, row.prompt(), texts, row.columns())


def _asked(row: Row, kind: Kind | None, prompt: Text, texts: list[Text], columns: Mapping[str, Any]) -> Located:
    """One item of all texts, or one of each if they are to be rated."""
    found = [Candidate(text, source) for text, source in zip(texts, sources_of(row, len(texts)), strict=True)]
    kind = kind or ("rate", "compare", "rank")[min(len(texts), 3) - 1]
    groups = [(one,) for one in found] if kind == "rate" else [tuple(found)]
    return [(row.where, _checked(row, Item(kind, prompt, group, _query(row), None, columns))) for group in groups]


def located(
    values: Iterable[tuple[str, Mapping[str, Any]]], kind: type[R]
) -> tuple[list[tuple[str, R]], dict[str, list[str]]]:
    """(where, record) of each row that is usable as a record of this kind, and where the others stand, by reason.
    Raises PlauditError as `parse` does."""
    name = "\0where"  # a column that no file has
    loaded = parse(((where, {**row, name: where}) for where, row in values), kind)
    found = []
    for record in loaded.records:
        columns = dict(record.columns)
        found.append((columns.pop(name), replace(record, columns=columns)))
    return found, loaded.dropped


def _of_pairs(pairs: Mapping[str, Row], kind: Kind | None, dropped: Dropped) -> Located:
    """The items of rows with `chosen` and `rejected`, by where they stand."""
    items: Located = []
    if not pairs:
        return items
    kept = (
        (where, {name: row.values[name] for name in row.values if name not in _OWN[1:]}) for where, row in pairs.items()
    )
    found, left = located(kept, Comparison)
    dropped |= left
    for where, pair in found:
        items += _asked(pairs[where], kind, pair.prompt, [pair.chosen, pair.rejected], pair.columns)
    return items


def _names(files: Sequence[str | Path]) -> list[str]:
    """What files are called: without folder and ending if that tells them apart."""
    short = [Path(file).name.partition(".")[0] for file in files]
    return short if len(set(short)) == len(short) else list(map(str, files))


def _together(files: Mapping[str, Sequence[Row]], kind: Kind, dropped: Dropped) -> Located:
    """Single completions of the same prompt, as pairs or in lists of at most nine: one from each file in turn."""
    prompts: dict[str, list[list[tuple[Row, Candidate]]]] = {}
    for number, (file, found) in enumerate(files.items()):
        for row in found:
            same = prompts.setdefault(dumped(row.prompt(), row.where), [[] for _ in files])
            (source,) = sources_of(row, 1)
            if not source and len(files) > 1:
                source = {"model": file}
            same[number].append((row, Candidate(row.text("completion"), source)))
    items: Located = []
    for lists in prompts.values():
        in_turn = [one for turn in zip_longest(*lists) for one in turn if one is not None]
        for part in _chunks(in_turn, 2 if kind == "compare" else MOST):
            first, candidates = part[0][0], tuple(candidate for _, candidate in part)
            if len(part) == 1:
                dropped.setdefault(_ALONE, []).append(first.where)
                continue
            columns = _shared([row.columns() for row, _ in part])
            items.append(
                (first.where, _checked(first, Item(kind, first.prompt(), candidates, _query(first), None, columns)))
            )
    return items


def _shared(columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all of them say alike."""
    first, *others = columns
    return {
        name: value for name, value in first.items() if all(name in other and other[name] == value for other in others)
    }


def _chunks(found: list[tuple[Row, Candidate]], size: int) -> Iterator[list[tuple[Row, Candidate]]]:
    """Parts of `size`, and what is left over."""
    for start in range(0, len(found), size):
        yield found[start : start + size]


def _checked(row: Row, item: Item) -> Item:
    """The item, with its gold answer if the row has one."""
    check_item(item, row.where)
    dumped(row.values, row.where)
    if len({type(candidate.text) for candidate in item.candidates}) > 1:
        raise PlauditError(f"{row.where}: completions must be all texts or all lists of messages.")
    gold = row.values.get("gold")
    if gold is None or gold is False:
        return item
    answer = _gold(row, item, gold)
    check_answer(item, answer, f"{row.where}: `gold`")
    return replace(item, gold=answer)


def _gold(row: Row, item: Item, value: Any) -> Answer:
    if item.kind == "rate" and value is not True:
        return Answer(rating=row.number("gold", value))
    if item.kind != "rate" and value is True and row.has("chosen", "rejected"):
        return Answer((1, 2))
    if item.kind != "rate" and isinstance(value, str):
        return Answer(ranks_of(value, f"{row.where}: `gold`"))
    forms = "a number to be rated, an order such as 'A > B', or true where `chosen` is right"
    raise row.error("gold", f"must be {forms}, not {value!r:.60}")


def _query(row: Row) -> dict[str, Any]:
    value = row.values.get("query") or {}
    if not isinstance(value, dict):
        raise row.error("query", f"must be an object that says why this is asked, not {kind_of(value)}")
    return value


def sources_of(row: Row, count: int) -> list[dict[str, Any]]:
    """Where each candidate comes from, as far as the row says: one for each, or one for all."""
    name = row.first(*SOURCES)
    values = row.values[name] if name else None
    if name not in ("models", "sources"):
        values = [values] * count
    if not isinstance(values, list) or len(values) != count:
        raise row.error(str(name), f"must be a list with one entry for each of the {count} candidates")
    return [_named(row, str(name), value) for value in values]


def _named(row: Row, name: str, value: Any) -> dict[str, Any]:
    if value is None or isinstance(value, dict):
        return value or {}
    if not isinstance(value, str):
        raise row.error(name, f"must name a model or describe it, not be {kind_of(value)}")
    return {"model": value}
