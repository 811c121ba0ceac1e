"""Writing events, and what must hold before one is written; all inside a transaction of the store."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from typing import Any, Literal

from plaudit.errors import PlauditError
from plaudit.feedback.assigning import FREE, Assignment
from plaudit.feedback.forms import (
    MOST_MS,
    answer_from_json,
    answer_to_json,
    check_answer,
    checked_name,
    dumped,
    item_to_json,
)
from plaudit.feedback.items import Answer, Item, Label, check_item, in_words

IMPORTED = "instr(e.key, char(10)) > 0"
"""Of an event `e` that came from elsewhere: no client's key holds a new line."""


Taken = Literal["new", "repeat", "known"]
"""What becomes of a label from elsewhere: it is new, a repeat here though it was none there, or known already."""


class Conflict(PlauditError):
    """Somebody, or the same person elsewhere, was first."""


def person(db: sqlite3.Connection, name: str) -> int:
    """A person's number. Raises PlauditError for an unknown name."""
    found = db.execute("SELECT number FROM person WHERE name = ?", (name,)).fetchone()
    if found is None:
        raise PlauditError(f"person: nobody is called {name!r:.90}.")
    return int(found[0])


def item(db: sqlite3.Connection, asked: Item, priority: int, where: str) -> bool:
    """Add an item, or its right answer where only that is new, and return whether the item is.

    Raises PlauditError, naming `where`, for an item that cannot be asked, and for one with another right answer here.
    """
    check_item(asked, where)
    body = dumped(item_to_json(asked), where)
    added = db.execute(
        "INSERT INTO item (id, body, gold, priority) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (asked.id, body, asked.gold is not None, priority),
    ).rowcount
    if not added and asked.gold is not None:
        _gild(db, asked.id, asked.gold, where)
    return bool(added)


def _gild(db: sqlite3.Connection, name: str, right: Answer, where: str) -> None:
    """Keep the right answer to an item that came without one. Raises PlauditError if it came with another one."""
    number, body = db.execute("SELECT number, body FROM item WHERE id = ?", (name,)).fetchone()
    found, given = json.loads(body), answer_to_json(right)
    known = found.get("gold")
    if known is None:
        answer = dumped(given, where)
        db.execute("INSERT INTO gold (item, at, answer) VALUES (?, ?, ?)", (number, time.time(), answer))
        db.execute(
            "UPDATE item SET gold = 1, body = ? WHERE number = ?", (dumped({**found, "gold": given}, where), number)
        )
    elif known != given:
        asked = json.dumps(found["prompt"], ensure_ascii=False)
        sides = f"{in_words(right)}, but {in_words(answer_from_json(known, where))} in the store already"
        advice = "leave it out of the row, or take another store"
        raise PlauditError(f"{where}: the right answer to {asked:.60} is {sides}, which keeps it: {advice}.")


def own(db: sqlite3.Connection, assignment: str, name: str) -> tuple[int, bool]:
    """The number of this person's assignment, and whether its answer stands. Raises PlauditError for another's."""
    found = db.execute(
        "SELECT a.number, a.answered IS NOT NULL FROM assignment AS a JOIN person AS p ON p.number = a.person"
        " WHERE a.id = ? AND p.name = ?",
        (assignment, name),
    ).fetchone()
    if found is None:
        raise PlauditError(f"assignment: {assignment!r:.60} is none of {name!r:.90}.")
    return found[0], bool(found[1])


def unanswered(db: sqlite3.Connection, assignment: str, name: str) -> int:
    """The number of this person's assignment. Raises Conflict if it is answered already."""
    number, answered = own(db, assignment, name)
    if answered:
        raise Conflict("assignment: this is answered already; undo that answer to give another.")
    return number


def open_to(db: sqlite3.Connection, assignment: str, name: str, now: float) -> int:
    """The number of an assignment that may be answered now: its lease lasts, or the item is still free.

    Raises Conflict otherwise.
    """
    number = unanswered(db, assignment, name)
    (free,) = db.execute(
        f"SELECT a.leased_until > :now OR a.overlap IS NULL OR {FREE.replace(':overlap', 'a.overlap')}"
        " FROM assignment AS a JOIN item AS i ON i.number = a.item WHERE a.number = :number",
        {"now": now, "person": person(db, name), "number": number},
    ).fetchone()
    if not free:
        raise Conflict("assignment: the time for this was over, and it was answered by others meanwhile.")
    return number


def seen(db: sqlite3.Connection, key: str, name: str, kind: str, assignment: str | None) -> bool:
    """Whether this very request was made before. Raises Conflict if its key was used for another one."""
    if not 1 <= len(key) <= 200 or not key.isprintable():
        raise PlauditError("key: is a text of 1 to 200 printable characters, made anew for each answer.")
    found = db.execute(
        "SELECT p.name, e.kind, a.id FROM event AS e JOIN assignment AS a ON a.number = e.assignment"
        " JOIN person AS p ON p.number = a.person WHERE e.key = ?",
        (key,),
    ).fetchone()
    if found is not None and found != (name, kind, assignment or found[2]):
        raise Conflict("key: was used for something else already; make a new one for each answer.")
    return found is not None


def event(db: sqlite3.Connection, key: str, kind: str, assignment: int, at: float, **more: Any) -> None:
    """Append one event."""
    values = {"id": secrets.token_hex(8), "answer": None, "ms": 0, "undoes": None, **more}
    db.execute(
        "INSERT INTO event (id, key, kind, assignment, at, answer, ms, undoes)"
        " VALUES (:id, :key, :kind, :assignment, :at, :answer, :ms, :undoes)",
        {"key": key, "kind": kind, "assignment": assignment, "at": at, **values},
    )


def answer(db: sqlite3.Connection, key: str, asked: Assignment, given: Answer, ms: int, now: float) -> None:
    """Append an answer, in the item's order, to what was asked. Raises PlauditError if it does not fit."""
    check_answer(asked.item, given, "answer")
    if not 0 <= ms <= MOST_MS:
        raise PlauditError(f"ms: is a number of milliseconds from 0, not {ms}.")
    number, _ = own(db, asked.id, asked.person)
    event(db, key, "answer", number, now, answer=dumped(answer_to_json(given), "answer"), ms=ms)


def take(db: sqlite3.Connection, label: Label) -> Taken:
    """Add a label from elsewhere, unless it is there, with its item and its person where they are new."""
    if db.execute("SELECT 1 FROM event WHERE id = ?", (label.id,)).fetchone():
        return "known"
    where = f"label {label.id}"
    name = checked_name(label.person)
    check_answer(label.item, label.answer, where)
    item(db, label.item, 0, where)
    db.execute("INSERT INTO person (name, role) VALUES (?, 'person') ON CONFLICT DO NOTHING", (name,))
    (asked,) = db.execute("SELECT number FROM item WHERE id = ?", (label.item.id,)).fetchone()
    who = person(db, name)
    taken = dict(db.execute("SELECT repeat, answered FROM assignment WHERE item = ? AND person = ?", (asked, who)))
    repeat = label.repeat if taken.get(label.repeat) is None else max(taken) + 1
    (number,) = db.execute(
        "INSERT INTO assignment (id, item, person, repeat, shown, shown_at, leased_until) VALUES (?, ?, ?, ?, ?, ?, 0)"
        " ON CONFLICT (item, person, repeat) DO UPDATE SET shown = excluded.shown, shown_at = excluded.shown_at"
        " RETURNING number",
        (secrets.token_hex(8), asked, who, repeat, json.dumps(label.order), label.shown_at),
    ).fetchone()
    body = dumped(answer_to_json(label.answer), where)
    event(db, f"imported\n{label.id}", "answer", number, label.answered_at, id=label.id, answer=body, ms=label.ms)
    return "new" if repeat == label.repeat else "repeat"
