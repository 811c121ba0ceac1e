"""Items and labels as JSON values: what the store keeps, the server speaks and the files of kind `labels` hold."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from plaudit.config import plain
from plaudit.errors import PlauditError
from plaudit.feedback.items import KINDS, LONGEST_NOTE, STRENGTHS, Answer, Candidate, Item, Label, check_item, dense
from plaudit.rows import Row, kind_of

LONGEST_NAME = 80
LATEST = 2.0**36
"""Later times (after the year 4000) are in milliseconds, most likely."""
MOST_MS = 2**53
"""Whole numbers above this are not kept by every reader of JSON."""


def dumped(value: Any, where: str) -> str:
    """`value` as one line of JSON. Raises PlauditError for what JSON or UTF-8 has no form for."""
    try:
        text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise PlauditError(f"{where}: holds half of a surrogate pair, which is no text.") from None
    except ValueError:
        # SQLite before 3.42 reads no more of an item with one.
        raise PlauditError(f"{where}: holds NaN or an infinite number, which JSON does not know; use null.") from None
    return text


def check_answer(item: Item, answer: Answer, where: str) -> None:
    """Raises PlauditError unless this is an answer that the item can have, in its own order of candidates."""
    count = len(item.candidates)
    if item.kind == "rate":
        if answer.ranks is not None or answer.strength is not None:
            raise PlauditError(f"{where}: an answer that ranks does not fit an item that is to be rated.")
        if answer.rating is not None and not math.isfinite(answer.rating):
            raise PlauditError(f"{where}: a rating is a finite number, not {answer.rating}.")
    elif answer.rating is not None:
        raise PlauditError(f"{where}: a rating does not fit an item to {item.kind}.")
    elif answer.ranks is not None and len(answer.ranks) != count:
        raise PlauditError(f"{where}: {len(answer.ranks)} ranks do not fit {count} candidates.")
    elif answer.ranks is not None and not dense(answer.ranks):
        raise PlauditError(f"{where}: ranks start at 1 (the best) and leave none out, unlike {list(answer.ranks)}.")
    _check_strength(answer, where)


def _check_strength(answer: Answer, where: str) -> None:
    if answer.strength is None:
        return
    if answer.strength not in STRENGTHS:
        raise PlauditError(f"{where}: a strength is 1, 2 or 3, not {answer.strength}.")
    if answer.ranks is None or len(set(answer.ranks)) == 1:
        raise PlauditError(f"{where}: has a strength, but nothing was found better.")


def checked_name(name: str, where: str = "name") -> str:
    """A person's name without spaces around it, its letters in one spelling (NFC).

    Raises PlauditError, naming `where`, if nothing is left, it is over 80 characters, or it holds characters that steer
    or hide.
    """
    name = unicodedata.normalize("NFC", name).strip()
    if not 1 <= len(name) <= LONGEST_NAME:
        raise PlauditError(f"{where}: has 1 to {LONGEST_NAME} characters, not {len(name)}.")
    # Joiners shape letters in several scripts and emoji; all else of these kinds could pass one name off as another.
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\u200c\u200d" for c in name):
        raise PlauditError(f"{where}: holds control characters; write it without them.")
    return name


# ------------------------------------------------------------------------------------------------ writing


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """The fields of an answer that say something."""
    fields = {
        "ranks": None if answer.ranks is None else list(answer.ranks),
        "rating": answer.rating,
        "strength": answer.strength,
        "note": answer.note or None,
        "rewrite": answer.rewrite or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def item_to_json(item: Item) -> dict[str, Any]:
    """The item as `item_from_json` reads it back."""
    fields: dict[str, Any] = {
        "kind": item.kind,
        "prompt": plain(item.prompt),
        "candidates": [
            {"text": plain(candidate.text), **({"source": plain(candidate.source)} if candidate.source else {})}
            for candidate in item.candidates
        ],
    }
    if item.query:
        fields["query"] = plain(item.query)
    if item.gold is not None:
        fields["gold"] = answer_to_json(item.gold)
    if item.columns:
        fields["columns"] = plain(item.columns)
    return fields


def label_to_json(label: Label) -> dict[str, Any]:
    """The label as `label_from_json` reads it back, its item included."""
    return {
        "id": label.id,
        "person": label.person,
        "answer": answer_to_json(label.answer),
        "order": list(label.order),
        "shown_at": label.shown_at,
        "answered_at": label.answered_at,
        "ms": label.ms,
        "repeat": label.repeat,
        "item": item_to_json(label.item),
    }


# ------------------------------------------------------------------------------------------------ reading


def answer_from_json(value: Any, where: str) -> Answer:
    """The answer that `answer_to_json` wrote. Raises PlauditError, naming place and field."""
    row = _row(value, where, ("ranks", "rating", "strength", "note", "rewrite"))
    ranks = strength = rating = None
    if row.has("ranks"):
        ranks = _whole_numbers(row, "ranks")
    if row.has("rating"):
        rating = row.number("rating", row.values["rating"])
    if row.has("strength"):
        strength = _whole(row, "strength", row.values["strength"])
    for name in ("note", "rewrite"):
        text = row.values.get(name) or ""
        if not isinstance(text, str) or len(text) > LONGEST_NOTE:
            raise row.error(name, f"must be a text of at most {LONGEST_NOTE} characters")
    return Answer(ranks, rating, strength, row.values.get("note") or "", row.values.get("rewrite") or "")


def item_from_json(value: Any, where: str) -> Item:
    """The item that `item_to_json` wrote. Raises PlauditError, naming place and field, for anything else."""
    row = _row(value, where, ("kind", "prompt", "candidates", "query", "gold", "columns"))
    if row.values.get("kind") not in KINDS:
        raise row.error("kind", f"must be compare, rank or rate, not {row.values.get('kind')!r:.60}")
    dumped(row.values, where)
    candidates = row.values.get("candidates")
    if not isinstance(candidates, list):
        raise row.error("candidates", f"must be a list of objects, not {kind_of(candidates)}")
    item = Item(
        row.values["kind"],
        row.prompt(),
        tuple(_candidate(one, f"{where}, candidate {place}") for place, one in enumerate(candidates, 1)),
        _mapping(row, "query"),
        answer_from_json(row.values["gold"], f"{where}, gold") if row.has("gold") else None,
        _mapping(row, "columns"),
    )
    check_item(item, where)
    if len({type(candidate.text) for candidate in item.candidates}) > 1:
        raise PlauditError(f"{where}: candidates must be all texts or all lists of messages.")
    if item.gold is not None:
        check_answer(item, item.gold, f"{where}, gold")
    return item


def label_from_json(value: Any, where: str) -> Label:
    """The label that `label_to_json` wrote. Raises PlauditError, naming place and field, for anything else."""
    names = ("id", "person", "answer", "order", "shown_at", "answered_at", "ms", "repeat", "item")
    row = _row(value, where, names)
    for name in names:
        if not row.has(name):
            raise PlauditError(f"{where}: a label needs `{name}`, which is not there.")
    for name in ("id", "person"):
        if not isinstance(row.values[name], str) or not 1 <= len(row.values[name]) <= LONGEST_NAME:
            raise row.error(name, f"must be a text of 1 to {LONGEST_NAME} characters")
    item = item_from_json(row.values["item"], f"{where}, item")
    answer = answer_from_json(row.values["answer"], f"{where}, answer")
    check_answer(item, answer, f"{where}, answer")
    order = _whole_numbers(row, "order") if row.values["order"] != [] else ()
    if order and sorted(order) != list(range(len(item.candidates))):
        raise row.error("order", f"must hold each of the {len(item.candidates)} candidates once, counted from 0")
    dumped(row.values, where)
    return Label(
        row.values["id"],
        item,
        checked_name(row.values["person"], f"{where}: `person`"),
        answer,
        order,
        _time(row, "shown_at"),
        _time(row, "answered_at"),
        _whole(row, "ms", row.values["ms"]),
        _whole(row, "repeat", row.values["repeat"]),
    )


def _row(value: Any, where: str, names: tuple[str, ...]) -> Row:
    if not isinstance(value, Mapping):
        raise PlauditError(f"{where}: must be an object, {{...}}, not {kind_of(value)}.")
    unknown = set(value) - set(names)
    if unknown:
        raise PlauditError(f"{where}: there is no field {min(unknown)!r:.60} here; there are {', '.join(names)}.")
    return Row(where, value, names)


def _mapping(row: Row, name: str) -> dict[str, Any]:
    value = row.values.get(name) or {}
    if not isinstance(value, dict):
        raise row.error(name, f"must be an object, not {kind_of(value)}")
    return value


def _candidate(value: Any, where: str) -> Candidate:
    row = _row(value, where, ("text", "source"))
    if "text" not in row.values:
        raise PlauditError(f"{where}: a candidate needs `text`, which is not there.")
    return Candidate(row.text("text"), _mapping(row, "source"))


def _time(row: Row, name: str) -> float:
    seconds = row.number(name, row.values[name])
    if not 0 <= seconds <= LATEST:
        raise row.error(name, f"must be in seconds since 1970, not {seconds:g}")
    return seconds


def _whole(row: Row, name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST_MS:
        raise row.error(name, f"must be a whole number from 0, not {value!r:.60}")
    return value


def _whole_numbers(row: Row, name: str) -> tuple[int, ...]:
    value = row.values[name]
    if not isinstance(value, list) or not value:
        raise row.error(name, f"must be a list of whole numbers, not {value!r:.60}")
    return tuple(_whole(row, name, one) for one in value)
