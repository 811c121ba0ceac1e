"""Labels out of files: lossless rows, records that plaudit exported, and records from anywhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plaudit.errors import PlauditError
from plaudit.feedback.candidates import SOURCES, located, sources_of
from plaudit.feedback.exporting import FIELDS
from plaudit.feedback.forms import answer_to_json, checked_name, dumped, label_from_json
from plaudit.feedback.gathering import is_store, stored
from plaudit.feedback.items import STRENGTHS, Answer, Candidate, Item, Kind, Label, check_item
from plaudit.records import Comparison, Ranking, Rating
from plaudit.rows import Row, Text, kind_of, named, rows


@dataclass(frozen=True)
class Read:
    """`labels` with where each stands (file:line), and where the rows stand that hold none, by the reason."""

    labels: list[tuple[str, Label]]
    dropped: dict[str, list[str]]


def read_labels(paths: str | Path | Sequence[str | Path], by: str = "") -> Read:
    """The labels in one or several stores or JSON-lines files.

    Rows of kind `labels`, and comparisons, rankings and ratings with the `provenance` that an export gave them, become
    what they were. Other such records are labels by the `person` their row names, or else by `by`; their candidates
    are put in an order that does not depend on which was preferred, and the order shown is unknown. Raises
    PlauditError, naming file, line and column.
    """
    labels: list[tuple[str, Label]] = []
    dropped: dict[str, list[str]] = {}
    pieces: dict[str, _Piece] = {}
    others: dict[Any, dict[str, Mapping[str, Any]]] = {Comparison: {}, Ranking: {}, Rating: {}}
    for file in [paths] if isinstance(paths, str | Path) else paths:
        if is_store(file):
            labels += [(f"{file}: label {number}", label) for number, label in enumerate(stored(file), 1)]
            continue
        for where, values in rows(file):
            row = Row(where, values, ())
            if row.has("item", "answer"):
                labels.append((where, label_from_json(values, where)))
            elif _is_ours(values.get("provenance")):
                _gather(row, pieces)
            else:
                others[_kind(row)][where] = values
    for piece in pieces.values():
        labels += [(piece.where, label) for label in piece.labels()]
    for kind, found in others.items():
        if found:
            records, left = located(found.items(), kind)
            labels += [(where, label) for where, record in records for label in _of(where, record, by)]
            for reason, places in left.items():
                dropped.setdefault(reason, []).extend(places)
    return Read(labels, dropped)


def _of(where: str, record: Comparison | Ranking | Rating, by: str) -> list[Label]:
    if isinstance(record, Comparison):
        return [_of_comparison(where, record, by)]
    return [_of_ranking(where, record, by)] if isinstance(record, Ranking) else _of_rating(where, record, by)


def _kind(row: Row) -> type:
    if row.has("chosen", "rejected"):
        return Comparison
    if row.has("completions", "ranking"):
        return Ranking
    if row.has("completion") and row.first("ratings", "rating", "score", "label"):
        return Rating
    needs = (
        "a label (`item`, `answer`), a comparison (`chosen`, `rejected`), a ranking (`completions`, `ranking`) or a "
        "rating (`completion`, `rating`)"
    )
    raise PlauditError(f"{row.where}: {needs} is wanted, but this row holds {named(row.values)}.")


# ------------------------------------------------------------------------------------------------ our own


def _is_ours(provenance: Any) -> bool:
    """Whether a column `provenance` is one that an export wrote."""
    return isinstance(provenance, dict) and isinstance(provenance.get("labels"), list) and "sources" in provenance


@dataclass
class _Piece:
    """What the rows read so far say of one item and its labels; a ranking may lie in rows of two candidates each."""

    where: str
    prompt: Any
    provenance: Mapping[str, Any]
    columns: dict[str, Any]
    texts: dict[int, Any]

    def labels(self) -> list[Label]:
        """The labels as they were. Raises PlauditError if something of them is missing or wrong."""
        sources = self.provenance["sources"]
        if not isinstance(sources, list) or set(self.texts) != set(range(len(sources))):
            problem = f"`provenance` is of other candidates than the file's rows hold ({len(self.texts)})"
            raise PlauditError(f"{self.where}: {problem}; was part of an export removed?")
        item = {
            "kind": self.provenance.get("kind"),
            "prompt": self.prompt,
            "candidates": [{"text": self.texts[place], "source": source} for place, source in enumerate(sources)],
            "query": self.provenance.get("query"),
            "gold": self.provenance.get("gold"),
            "columns": self.columns,
        }
        where = f"{self.where}, provenance"
        given = [one if isinstance(one, dict) else {} for one in self.provenance["labels"]]
        return [label_from_json({**one, "item": item}, where) for one in given]


def _gather(row: Row, pieces: dict[str, _Piece]) -> None:
    """Add what a row of our own holds."""
    provenance = row.values["provenance"]
    kind, texts = _texts(row, provenance)
    own = (*FIELDS[kind], "provenance")
    columns = {name: value for name, value in row.values.items() if name not in own}
    clashing = provenance.get("columns") or {}
    if not isinstance(clashing, dict):
        raise row.error("provenance", f"must hold an object in `columns`, not {kind_of(clashing)}")
    key = dumped(provenance["labels"], row.where)
    piece = pieces.setdefault(key, _Piece(row.where, row.values.get("prompt"), provenance, columns | clashing, {}))
    piece.texts |= texts


def _texts(row: Row, provenance: Mapping[str, Any]) -> tuple[str, dict[int, Any]]:
    """What kind of row it is, and the candidates in it by their place in the item."""
    if row.has("prompt", "chosen", "rejected"):
        places = provenance.get("places")
        if not isinstance(places, list) or len(places) != 2 or not all(type(place) is int for place in places):
            raise row.error("provenance", "must say in `places` which candidates are `chosen` and `rejected`")
        return "comparisons", dict(zip(places, (row.values["chosen"], row.values["rejected"]), strict=True))
    if row.has("completions", "ranking") and isinstance(row.values["completions"], list):
        return "rankings", dict(enumerate(row.values["completions"]))
    if row.has("completion") and row.first("ratings", "label"):
        return ("ratings" if row.has("ratings") else "thumbs"), {0: row.values["completion"]}
    raise row.error("provenance", "is of a row that does not hold its candidates; import the kind `labels` instead")


# ------------------------------------------------------------------------------------------------ anyone's


def _of_comparison(where: str, pair: Comparison, by: str) -> Label:
    if pair.preference not in (0.0, 0.5, 1.0):
        problem = f"a person prefers one (1 or 0) or neither (0.5), not {pair.preference:g}"
        raise PlauditError(f"{where}: `preference`: {problem}.")
    ranks = (1, 1) if pair.preference == 0.5 else (1, 2) if pair.preference == 1 else (2, 1)
    columns = dict(pair.columns)
    strength = int(pair.margin) if pair.margin in STRENGTHS and pair.preference != 0.5 else None
    if pair.margin is not None and strength is None:
        columns["margin"] = pair.margin
    return _label(
        where, "compare", pair.prompt, (pair.chosen, pair.rejected), Answer(ranks, strength=strength), columns, by
    )


def _of_ranking(where: str, ranking: Ranking, by: str) -> Label:
    dense = {rank: place for place, rank in enumerate(sorted(set(ranking.ranks)), 1)}
    answer = Answer(tuple(dense[rank] for rank in ranking.ranks))
    return _label(where, "rank", ranking.prompt, ranking.completions, answer, ranking.columns, by)


def _of_rating(where: str, rating: Rating, by: str) -> list[Label]:
    """One label of each rater: those that `person` lists, or numbered ones."""
    columns = dict(rating.columns)
    people = columns.pop("person", None)
    if people is None or isinstance(people, str):
        name = people or by
        many = len(rating.ratings) > 1
        people = [f"{name} {number}" if many and name else name for number, _ in enumerate(rating.ratings, 1)]
    if not isinstance(people, list) or len(people) != len(rating.ratings):
        raise PlauditError(f"{where}: `person` must name one person for each of the {len(rating.ratings)} ratings.")
    return [
        _label(where, "rate", rating.prompt, (rating.completion,), Answer(rating=value), {**columns, "person": who}, by)
        for value, who in zip(rating.ratings, people, strict=True)
    ]


def _label(
    where: str, kind: Kind, prompt: Text, texts: Sequence[Text], answer: Answer, columns: Mapping[str, Any], by: str
) -> Label:
    """A label of which no more is known than who judged what how. Reading the same again gives it the same id."""
    columns = dict(columns)
    dumped(columns, where)
    person = columns.pop("person", None) or by
    if not isinstance(person, str) or not person:
        raise PlauditError(f"{where}: does not say in `person` who judged; name somebody with --by.")
    person = checked_name(person, f"{where}: name")
    sources = sources_of(Row(where, columns, ()), len(texts))
    columns = {name: value for name, value in columns.items() if name not in SOURCES}
    # `chosen` comes first in every data set: kept so, agreement would mean nothing.
    order = sorted(range(len(texts)), key=lambda place: dumped(texts[place], where))
    candidates = tuple(Candidate(texts[place], sources[place]) for place in order)
    item = Item(kind, prompt, candidates, columns=columns)
    check_item(item, where)
    answer = answer.reordered(order)
    said = dumped([item.id, person, answer_to_json(answer)], where)
    name = hashlib.sha256(said.encode()).hexdigest()[:16]
    return Label(name, item, person, answer, (), 0.0, 0.0, 0)
