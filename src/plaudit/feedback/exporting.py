"""Labels as records to train on, as lossless rows, or as a table, each with where it comes from.

The column `provenance` of a record holds everything about its labels and their item that the record has no place for,
so that `importing` makes the same labels of it again.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import combinations
from typing import Any, Literal

from plaudit.errors import PlauditError
from plaudit.feedback.forms import item_to_json, label_to_json
from plaudit.feedback.items import Item, Label, in_words
from plaudit.records import Comparison, Demonstration, Ranking, Rating, Record, to_row
from plaudit.rows import Text

Ties = Literal["half", "drop"]
FIELDS: dict[str, tuple[str, ...]] = {
    "comparisons": ("prompt", "chosen", "rejected", "preference", "margin"),
    "rankings": ("prompt", "completions", "ranking"),
    "ratings": ("prompt", "completion", "ratings"),
    "thumbs": ("prompt", "completion", "label"),
    "demonstrations": ("prompt", "completion"),
    "transcripts": ("chosen", "rejected"),
}
"""The columns of each kind; an item's own column of such a name is kept in `provenance`."""
TELLING = ("chosen", "rejected", "completions", "ranking", "completion", "ratings", "rating", "score", "label")
"""Columns that say what a row is: an item's own, beside what people said, would be read in its place."""


def provenance(item: Item, labels: Iterable[Label], kind: str, **more: Any) -> dict[str, Any]:
    """All that a row of `kind` has no column for: who judged, when, in which order shown, why it was asked, and where
    each candidate comes from, in the item's order."""
    asked = item_to_json(item)
    clashing = {name: value for name, value in item.columns.items() if _clashes(name, kind)}
    fields = {
        "kind": item.kind,
        "sources": [candidate.get("source", {}) for candidate in asked["candidates"]],
        "query": asked.get("query"),
        "gold": asked.get("gold"),
        "columns": clashing or None,
        **more,
        "labels": [{name: value for name, value in label_to_json(one).items() if name != "item"} for one in labels],
    }
    return {name: value for name, value in fields.items() if value is not None}


def _columns(item: Item, labels: Iterable[Label], kind: str, **more: Any) -> dict[str, Any]:
    own = {name: value for name, value in item.columns.items() if not _clashes(name, kind)}
    return {**own, "provenance": provenance(item, labels, kind, **more)}


def _clashes(name: str, kind: str) -> bool:
    return name in (*FIELDS[kind], *TELLING, "provenance")


# ------------------------------------------------------------------------------------------------ records


def comparisons(labels: Iterable[Label], *, ties: Ties = "half") -> list[Comparison]:
    """Each two candidates of which a label says something, the better one as `chosen`.

    Of two that were compared, a tie is a preference of one half, or left out (`ties`), and a strength is the margin.
    Rankings become comparisons of each two of different rank: C(K, 2) less the ties (arXiv:2203.02155). What could
    not be compared is never in it.
    """
    found = []
    for label in labels:
        ranks = label.answer.ranks or ()
        for i, j in combinations(range(len(ranks)), 2):
            tie = ranks[i] == ranks[j]
            if tie and (label.item.kind == "rank" or ties == "drop"):
                continue
            better, worse = (i, j) if ranks[i] <= ranks[j] else (j, i)
            found.append(_comparison(label, better, worse, 0.5 if tie else 1.0))
    return found


def _comparison(label: Label, better: int, worse: int, preference: float) -> Comparison:
    item = label.item
    # The strength is that of the best over the next, which only in a pair is that of these two.
    strength = label.answer.strength if item.kind == "compare" else None
    return Comparison(
        item.prompt,
        item.candidates[better].text,
        item.candidates[worse].text,
        preference,
        None if strength is None else float(strength),
        _columns(item, [label], "comparisons", places=[better, worse]),
    )


def rankings(labels: Iterable[Label]) -> list[Ranking]:
    """The ranks that each label gives, comparisons being rankings of two."""
    return [
        Ranking(
            label.item.prompt,
            tuple(candidate.text for candidate in label.item.candidates),
            label.answer.ranks,
            _columns(label.item, [label], "rankings"),
        )
        for label in labels
        if label.answer.ranks is not None
    ]


def ratings(labels: Iterable[Label]) -> list[Rating]:
    """Each candidate that was rated, with all its ratings; in the order of the first of them."""
    items: dict[str, list[Label]] = {}
    for label in labels:
        if label.answer.rating is not None:
            items.setdefault(label.item.id, []).append(label)
    return [
        Rating(
            given[0].item.prompt,
            given[0].item.candidates[0].text,
            tuple(label.answer.rating for label in given if label.answer.rating is not None),
            _columns(given[0].item, given, "ratings"),
        )
        for given in items.values()
    ]


def demonstrations(labels: Iterable[Label]) -> list[Demonstration]:
    """What people wrote in place of the candidates, but for what is `unprompted`."""
    found = []
    for label in labels:
        written = label.answer.rewrite
        if written and not unprompted(label):
            chat = isinstance(label.item.prompt, list)
            completion: Text = [{"role": "assistant", "content": written}] if chat else written
            found.append(Demonstration(label.item.prompt, completion, _columns(label.item, [label], "demonstrations")))
    return found


def unprompted(label: Label) -> bool:
    """Whether somebody wrote an answer to nothing, which demonstrates nothing."""
    prompt = label.item.prompt
    return bool(label.answer.rewrite) and not (prompt.strip() if isinstance(prompt, str) else prompt)


# ------------------------------------------------------------------------------------------------ rows


def _thumb_rows(labels: Iterable[Label]) -> list[dict[str, Any]]:
    """`prompt`, `completion`, `label`, as TRL's KTO takes them."""
    rows = []
    for label in labels:
        if label.answer.rating is None:
            continue
        if label.answer.rating not in (0, 1):
            advice = "export the kind `ratings`"
            raise PlauditError(f"label {label.id}: is a rating of {label.answer.rating:g} and no thumb; {advice}.")
        (candidate,) = label.item.candidates
        fields: dict[str, Any] = {
            "prompt": label.item.prompt,
            "completion": candidate.text,
            "label": label.answer.rating == 1,
        }
        rows.append(fields | _columns(label.item, [label], "thumbs"))
    return rows


def _transcript_rows(labels: Iterable[Label]) -> list[dict[str, Any]]:
    """`chosen` and `rejected` as whole transcripts, as hh-rlhf has them (arXiv:2204.05862), which knows no ties."""
    rows = []
    for pair in comparisons(labels, ties="drop"):
        beginning = _transcript(pair.prompt)
        fields = {
            name: beginning + _said(text) for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
        }
        rows.append(fields | dict(pair.columns))
    return rows


_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def _transcript(prompt: Text) -> str:
    """The prompt up to where the assistant is to speak."""
    if isinstance(prompt, str):
        return prompt if prompt.endswith(_ASSISTANT) else f"{_HUMAN} {prompt}{_ASSISTANT}"
    turns = []
    for message in prompt:
        if message["role"] not in ("user", "assistant"):
            problem = f"a transcript has no place for a message of the role {message['role']!r:.40}"
            raise PlauditError(f"{problem}; export the kind `comparisons`.")
        turns.append(f"{_HUMAN if message['role'] == 'user' else _ASSISTANT} {message['content']}")
    return "".join(turns) + _ASSISTANT


def _said(completion: Text) -> str:
    text = completion if isinstance(completion, str) else "\n\n".join(message["content"] for message in completion)
    return text if text.startswith(" ") else f" {text}"


def _written(records: Iterable[Record]) -> list[dict[str, Any]]:
    return [to_row(record) for record in records]


def rows_of(labels: Sequence[Label], kind: str, *, ties: Ties = "half") -> list[dict[str, Any]]:
    """The rows of one kind (a name in `FIELDS`, or `labels`) that the labels give."""
    writers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "labels": lambda: [label_to_json(label) for label in labels],
        "comparisons": lambda: _written(comparisons(labels, ties=ties)),
        "rankings": lambda: _written(rankings(labels)),
        "ratings": lambda: _written(ratings(labels)),
        "thumbs": lambda: _thumb_rows(labels),
        "demonstrations": lambda: _written(demonstrations(labels)),
        "transcripts": lambda: _transcript_rows(labels),
    }
    return writers[kind]()


# ------------------------------------------------------------------------------------------------ a table


def table(labels: Sequence[Label]) -> str:
    """The labels as comma-separated values, one a line, with the candidates in the item's order.

    A cell that a spreadsheet would take for a formula gets an apostrophe in front
    (https://owasp.org/www-community/attacks/CSV_Injection).
    """
    most = max((len(label.item.candidates) for label in labels), default=0)
    letters = [chr(ord("A") + place) for place in range(most)]
    sides = [name for letter in letters for name in (f"candidate {letter}", f"source {letter}")]
    answer = ["answer", "strength", "note", "rewrite", "gold"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(["label", "person", "answered at", "seconds", "repeat", *answer, "kind", "order", "prompt", *sides])
    for label in labels:
        writer.writerow([_cell(value) for value in _line(label)])
    return out.getvalue()


def _line(label: Label) -> list[object]:
    item, answer = label.item, label.answer
    # Of what was judged elsewhere the time is not known.
    at = datetime.fromtimestamp(label.answered_at, UTC).isoformat(timespec="seconds") if label.answered_at else ""
    shown = " ".join(chr(ord("A") + place) for place in label.order)
    gold = "" if item.gold is None else in_words(item.gold)
    words = [in_words(answer), answer.strength or "", answer.note, answer.rewrite, gold]
    line: list[object] = [label.id, label.person, at, label.ms / 1000, label.repeat, *words, item.kind, shown]
    line.append(_plain(item.prompt))
    for candidate in item.candidates:
        line += [_plain(candidate.text), " ".join(f"{name}={value}" for name, value in candidate.source.items())]
    return line


def _plain(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)


def _cell(value: object) -> object:
    """A cell that no spreadsheet calculates."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value
