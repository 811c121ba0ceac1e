"""The five records that people and data sets give: JSON lines in and out, and conversions between kinds.

Columns follow the habits of Hugging Face data sets; transcripts may also be of the hh-rlhf kind,
"\\n\\nHuman: ...\\n\\nAssistant: ..." (arXiv:2204.05862). Everything a record does not use stays in its `columns`,
which reward functions receive.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Generic, TypeVar

from plaudit.config import plain
from plaudit.errors import PlauditError
from plaudit.rows import LeaveOut, Row, kind_of, named
from plaudit.rows import Text as Text
from plaudit.rows import rows as rows
from plaudit.run import write_atomically
from plaudit.turns import ASSISTANT, aligned, includes_prompt, parted, said, split


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to be answered; `where` it stands in the data, as "prompts.jsonl:17"."""

    prompt: Text
    columns: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the answer that a person would give; prompt and completion are of one form, text or messages."""

    prompt: Text
    completion: Text
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers; `preference` is the probability that a person prefers `chosen` (0.5 is a tie).

    `margin` says how much better `chosen` is, on a scale of the data set's own.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    preference: float = 1.0
    margin: float | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ranking:
    """Several answers and the rank of each: 1 is the best, ties share a rank."""

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rating:
    """One answer and what each rater gave it; a thumb is 1.0 (up) or 0.0 (down).

    Where only the columns' `token_rewards` say what it earned, their sum is the rating.
    """

    prompt: Text
    completion: Text
    ratings: tuple[float, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)


Record = Prompt | Demonstration | Comparison | Ranking | Rating
R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Loaded(Generic[R]):
    """The records of a source, and where (file:line) those that were left out stand, by reason."""

    records: list[R]
    dropped: dict[str, list[str]]


def left_out(dropped: Mapping[str, Sequence[str]]) -> list[str]:
    """A sentence for each reason why rows were left out, of where they stand."""
    return [f"{len(at)} rows left out: {reason} (the first is {at[0]})" for reason, at in dropped.items()]


# ------------------------------------------------------------------------------------------------ rows to records

_KEYS: dict[type, tuple[str, ...]] = {
    Prompt: ("prompt",),
    Demonstration: ("prompt", "completion"),
    Comparison: ("prompt", "chosen", "rejected", "preference", "margin"),
    Ranking: ("prompt", "completions", "ranking"),
    Rating: ("prompt", "completion", "ratings"),
}
"""The columns that a record is written to."""

_NEEDS: dict[type, str] = {
    Prompt: "`prompt` (or `messages`, `query`, `question`, or a transcript `chosen`)",
    Demonstration: "`prompt` and `completion` (or `messages`, `text`, or `prompt` and `chosen`)",
    Comparison: "`chosen` and `rejected`",
    Ranking: "`completions` and `ranking`",
    Rating: "`completion` and one of `ratings`, `rating`, `score`, `label` and `token_rewards`",
}

_SIDES = ("chosen", "rejected")
_SAME, _TIE = "chosen and rejected are the same", "neither answer is preferred"


def _missing(row: Row, wanted: type) -> PlauditError:
    """What the row lacks to be of the wanted kind, and what it seems to be instead."""
    name, found = wanted.__name__.lower(), _seems(row)
    columns = named(name for name in row.values if row.has(name))
    problem = f"{row.where}: a {name} needs {_NEEDS[wanted]}, but this row "
    if found is None or found is wanted:
        return PlauditError(f"{problem}holds {columns}.")
    other = found.__name__.lower()
    hint = f"take data of {name}s, or an algorithm that learns from {other}s"
    return PlauditError(f"{problem}is a {other} (it holds {columns}): {hint}.")


def _seems(row: Row) -> type | None:
    answer = row.first("completion", "text")
    if row.has("chosen", "rejected"):
        return Comparison
    if row.has("completions", "ranking"):
        return Ranking
    if answer and row.first("ratings", "rating", "score", "label", "token_rewards"):
        return Rating
    if answer or row.has("messages"):
        return Demonstration
    return Prompt if row.first("prompt", "query", "question") else None


def parse(rows: Iterable[tuple[str, Mapping[str, Any]]], kind: type[R]) -> Loaded[R]:
    """Records of one kind from any (where, row) pairs; rows that teach nothing are counted in `dropped`.

    A prompt may be missing: it is "" then, or what the answers compared have in common. Raises PlauditError
    for a row that lacks a column or has a wrong value, and when no record is left.
    """
    read: Callable[[Row], Any] = _READERS[kind]
    records: list[R] = []
    dropped: dict[str, list[str]] = {}
    for where, values in rows:
        try:
            records.append(read(Row(where, values, _KEYS[kind])))
        except LeaveOut as reason:
            dropped.setdefault(str(reason), []).append(where)
    if not records:
        reasons = "; ".join(f"{reason}: {len(places)}, first {places[0]}" for reason, places in dropped.items())
        raise PlauditError(f"The data hold no usable {kind.__name__.lower()} ({reasons or 'there are no rows'}).")
    return Loaded(records, dropped)


def load(paths: str | Path | Sequence[str | Path], kind: type[R]) -> Loaded[R]:
    """The records of one or several JSON-lines files; see `rows` and `parse`."""
    several = [paths] if isinstance(paths, str | Path) else paths
    return parse(chain.from_iterable(map(rows, several)), kind)


def _read_prompt(row: Row) -> Prompt:
    name = row.first("prompt", "messages", "query", "question", "chosen")
    if name is None:
        raise _missing(row, Prompt)
    prompt = row.text(name)
    if name == "messages":
        answered = isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant"
        prompt = prompt[:-1] if answered else prompt
    elif name == "chosen":
        if isinstance(prompt, str) and ASSISTANT not in prompt:
            raise _missing(row, Prompt)
        prompt, _ = split(prompt)
    return Prompt(prompt, row.columns(), row.where)


def _read_demonstration(row: Row) -> Demonstration:
    name = row.first("completion", "messages", "text", "chosen")
    if name is None:
        raise _missing(row, Demonstration)
    if name == "chosen" and row.has("rejected"):
        name = _preferred(row)
    completion = row.text(name)
    if name in _SIDES and (not row.has("prompt") or (includes_prompt(completion) and _is_text(row, "prompt"))):
        prompt, completion = split(completion)
    else:
        whole = name in ("messages", "text")
        prompt, completion = aligned("" if whole else row.prompt(), completion)
    return Demonstration(prompt, said(completion), row.columns())


def _preferred(row: Row) -> str:
    """Which side of a comparison more people prefer."""
    preference = _preference(row)
    if preference == 0.5:
        raise LeaveOut(_TIE)
    return _SIDES[preference < 0.5]


def _is_text(row: Row, name: str) -> bool:
    return isinstance(row.values[name], str)


def _read_comparison(row: Row) -> Comparison:
    if not row.has("chosen", "rejected"):
        raise _missing(row, Comparison)
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise row.error("rejected", f"is {kind_of(rejected)} while `chosen` is {kind_of(chosen)}")
    if chosen == rejected:
        raise LeaveOut(_SAME)
    prompt, (chosen, rejected) = _asked(row, [chosen, rejected])
    if chosen == rejected:
        raise LeaveOut(_SAME)
    margin = row.number("margin", row.values["margin"]) if row.has("margin") else None
    return Comparison(prompt, said(chosen), said(rejected), _preference(row), margin, row.columns())


def _asked(row: Row, texts: list[Any]) -> tuple[Text, list[Text]]:
    """(prompt, completions), with the prompt taken out of the texts where they include it."""
    if row.has("prompt") and not (_is_text(row, "prompt") and includes_prompt(texts[0])):
        given = row.prompt()
        return aligned(given, texts[0])[0], [aligned(given, text)[1] for text in texts]
    return parted(texts)


def _preference(row: Row) -> float:
    value = row.values.get("preference", 1.0)
    if value is None or value == "can't compare":
        raise LeaveOut("the rater could not compare")
    if not 0 <= row.number("preference", value) <= 1:
        raise row.error("preference", f"is a probability from 0 to 1, not {value}")
    return float(value)


def _read_ranking(row: Row) -> Ranking:
    if not row.has("completions", "ranking"):
        raise _missing(row, Ranking)
    values, ranking = row.take("completions"), row.take("ranking")
    if not isinstance(values, list) or len(values) < 2:
        raise row.error("completions", "must be a list of at least two answers")
    texts = [row.as_text("completions", value) for value in values]
    if len({type(text) for text in texts}) > 1:
        raise row.error("completions", "must be all texts or all lists of messages")
    ranks = ranks_of(ranking, row.where) if isinstance(ranking, str) else ranking
    if not isinstance(ranks, list | tuple) or not all(type(rank) is int and rank >= 1 for rank in ranks):
        raise row.error("ranking", "must be a list of ranks from 1 (the best) or an order such as 'A > B = C'")
    if len(ranks) != len(texts):
        raise row.error("ranking", f"ranks {len(ranks)} completions, but there are {len(texts)}")
    prompt, completions = _asked(row, texts)
    return Ranking(prompt, tuple(map(said, completions)), tuple(ranks), row.columns())


def ranks_of(order: str, where: str = "order") -> tuple[int, ...]:
    """'A > B = C > D' (best first) or 'D < B = C < A' (worst first) -> ranks of A, B, C ...: (1, 2, 2, 3).

    Raises PlauditError unless every letter from A on stands in it once and all signs point one way.
    """
    parts = re.split(r"\s*([<=>])\s*", order.strip())
    names, signs = parts[::2], parts[1::2]
    if sorted(names) != [chr(ord("A") + i) for i in range(len(names))] or {"<", ">"} <= set(signs):
        form = "each letter from A on once, joined by > and =, or by < and ="
        raise PlauditError(f"{where}: the ranking {order!r:.60} is not an order of answers: write {form}.")
    tiers = [1]
    for sign in signs:
        tiers.append(tiers[-1] + (sign != "="))
    if "<" in signs:
        tiers = [tiers[-1] + 1 - tier for tier in tiers]
    return tuple(tier for _, tier in sorted(zip(names, tiers, strict=True)))


def _read_rating(row: Row) -> Rating:
    answer, name = row.first("completion", "text"), row.first("ratings", "rating", "score", "label")
    earned = row.numbers("token_rewards", "token") if row.has("token_rewards") else None
    if answer is None or (name is None and earned is None):
        raise _missing(row, Rating)
    value = row.take(name) if name else math.fsum(earned or ())
    if name == "label" and value not in (0, 1):
        raise row.error(name, f"must be true or false, not {value!r:.60}")
    ratings = row.numbers(name, "rater") if name == "ratings" else (row.number(name or "token_rewards", value),)
    if not ratings:
        raise LeaveOut("nobody rated it")
    prompt, completion = aligned(row.prompt(), row.text(answer))
    return Rating(prompt, said(completion), ratings, row.columns())


_READERS: dict[type, Callable[[Row], Any]] = {
    Prompt: _read_prompt,
    Demonstration: _read_demonstration,
    Comparison: _read_comparison,
    Ranking: _read_ranking,
    Rating: _read_rating,
}

# ------------------------------------------------------------------------------------------------ records to others


def comparisons_of(ranking: Ranking) -> list[Comparison]:
    """One comparison for each two answers of different rank, best first: C(K, 2) of them less the ties."""
    ordered = sorted(zip(ranking.ranks, ranking.completions, strict=True), key=lambda pair: pair[0])
    return [
        Comparison(ranking.prompt, better, worse, columns=ranking.columns)
        for (rank, better), (other, worse) in combinations(ordered, 2)
        if rank != other
    ]


def ranking_of(ratings: Sequence[Rating]) -> Ranking:
    """The answers of one prompt, ranked by their mean rating; equal means tie. Keeps the columns all agree on.

    Raises ValueError when the prompts differ or `ratings` is empty.
    """
    prompt, columns = (ratings[0].prompt, ratings[0].columns) if ratings else (None, {})
    if prompt is None or any(rating.prompt != prompt for rating in ratings):
        raise ValueError("a ranking needs ratings, all of one prompt")
    means = [math.fsum(rating.ratings) / len(rating.ratings) for rating in ratings]
    tiers = {mean: tier for tier, mean in enumerate(sorted(set(means), reverse=True), 1)}
    shared = {
        name: value
        for name, value in columns.items()
        if all(name in rating.columns and rating.columns[name] == value for rating in ratings)
    }
    return Ranking(prompt, tuple(rating.completion for rating in ratings), tuple(tiers[mean] for mean in means), shared)


def ratings_of(comparison: Comparison) -> tuple[Rating, Rating]:
    """`chosen` rated by its preference (1 unless soft), and `rejected` by the rest."""
    prompt, p, columns = comparison.prompt, comparison.preference, comparison.columns
    return Rating(prompt, comparison.chosen, (p,), columns), Rating(prompt, comparison.rejected, (1 - p,), columns)


# ------------------------------------------------------------------------------------------------ writing


def to_row(record: Record) -> dict[str, Any]:
    """The record as one flat row that `parse` reads back; a column named like a field gives way to it."""
    names = {"ranking": "ranks"}
    fields = {key: plain(getattr(record, names.get(key, key))) for key in _KEYS[type(record)]}
    columns = {name: value for name, value in record.columns.items() if name not in fields}
    return {name: value for name, value in fields.items() if name != "margin" or value is not None} | columns


def write(path: str | Path, records: Iterable[Record]) -> None:
    """Write the records as JSON lines (.jsonl, or .jsonl.gz), all of them or none; `load` reads the same records."""
    text = "".join(json.dumps(to_row(record), ensure_ascii=False) + "\n" for record in records)
    path = Path(path)
    write_atomically(path, gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text)
