"""What stands: labels, assignments and figures, read from the tables of the store."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plaudit.feedback.assigning import Assignment, Rules
from plaudit.feedback.forms import answer_from_json, item_from_json
from plaudit.feedback.items import Item, Label
from plaudit.feedback.recording import IMPORTED

LATELY = 50
"""The rate of answering is that of so many last answers."""


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` and `left` count answers to ordinary items (not gold, not repeats), `left` for one person only those open
    to that person; `mine` and `people` count all answers that stand; `per_minute` is the rate of late."""

    done: int
    left: int
    mine: int
    people: dict[str, int]
    per_minute: float


def item(body: str) -> Item:
    """The item in a row."""
    return item_from_json(json.loads(body), "item")


def assignment(db: sqlite3.Connection, number: int) -> Assignment:
    """The assignment with this number."""
    name, body, person, shown, until, repeat = db.execute(
        "SELECT a.id, i.body, p.name, a.shown, a.leased_until, a.repeat FROM assignment AS a"
        " JOIN item AS i ON i.number = a.item JOIN person AS p ON p.number = a.person WHERE a.number = ?",
        (number,),
    ).fetchone()
    return Assignment(name, item(body), person, tuple(json.loads(shown)), until, repeat)


_GIVEN = """
  SELECT e.id, i.number, i.body, p.name, e.answer, a.shown, a.shown_at, e.at, e.ms, a.repeat
  FROM {source} AS e
  JOIN assignment AS a ON a.number = e.assignment
  JOIN item AS i ON i.number = a.item
  JOIN person AS p ON p.number = a.person
  WHERE {condition} ORDER BY e.number
"""


def labels(db: sqlite3.Connection, after: int) -> list[Label]:
    """Answers that stand, of events after this one."""
    items: dict[int, Item] = {}
    rows = db.execute(_GIVEN.format(source="label", condition="e.number > ?"), (after,)).fetchall()
    return [_label(row, items) for row in rows]


@dataclass(frozen=True, slots=True)
class News:
    """Since an event: the answers given that stand, the ids of all that were undone, and the `positions` now."""

    labels: list[Label]
    undone: list[str]
    position: int
    gold: int


def positions(db: sqlite3.Connection) -> tuple[int, int]:
    """The numbers of the last event, and of the last right answer that came after its item."""
    query = "SELECT (SELECT coalesce(max(number), 0) FROM event), (SELECT coalesce(max(number), 0) FROM gold)"
    event, gold = db.execute(query).fetchone()
    return event, gold


def news(db: sqlite3.Connection, after: int) -> News:
    """What has become of the answers since an event."""
    query = "SELECT given.id FROM event AS undo JOIN event AS given ON given.number = undo.undoes WHERE undo.number > ?"
    undone = [name for (name,) in db.execute(query, (after,))]
    return News(labels(db, after), undone, *positions(db))


_NEWEST = "SELECT answered FROM assignment WHERE answered IS NOT NULL ORDER BY answered DESC LIMIT ? OFFSET ?"


def newest(db: sqlite3.Connection, count: int, skip: int) -> list[Label]:
    """So many of the answers that stand, the newest first, after so many still newer ones."""
    items: dict[int, Item] = {}
    rows = db.execute(_GIVEN.format(source="event", condition=f"e.number IN ({_NEWEST})"), (count, skip)).fetchall()
    return [_label(row, items) for row in reversed(rows)]


def label(db: sqlite3.Connection, key: str) -> Label:
    """The answer that was given under this key, whether it still stands or not."""
    return _label(db.execute(_GIVEN.format(source="event", condition="e.key = ?"), (key,)).fetchone(), {})


def _label(row: Sequence[Any], items: dict[int, Item]) -> Label:
    """A row of `_GIVEN`; `items` remembers those already read."""
    name, number, body, person, answer, shown, shown_at, at, ms, repeat = row
    if number not in items:
        items[number] = item(body)
    given = answer_from_json(json.loads(answer), "answer")
    return Label(name, items[number], person, given, tuple(json.loads(shown)), shown_at, at, ms, repeat)


_OPEN = "FROM item AS i WHERE i.gold = 0 AND i.answers < :overlap"
_OPEN_TO_PERSON = f"""
  SELECT (SELECT count(*) {_OPEN}) - (
    SELECT count(*) FROM assignment AS a JOIN item AS i ON i.number = a.item
    WHERE a.person = :person AND a.answered IS NOT NULL AND a.repeat = 0 AND i.gold = 0 AND i.answers < :overlap
  )
"""


def progress(db: sqlite3.Connection, person: int | None, rules: Rules, now: float) -> Progress:
    """How far the study is, for all or for one person."""
    counts = db.execute("SELECT number, name, role, answers FROM person").fetchall()
    values = {"overlap": rules.overlap, "person": person}
    (done,) = db.execute("SELECT coalesce(sum(answers), 0) FROM item WHERE gold = 0").fetchone()
    query = f"SELECT coalesce(sum(:overlap - answers), 0) {_OPEN}" if person is None else _OPEN_TO_PERSON
    (left,) = db.execute(query, values).fetchone()
    mine = sum(answers for number, _, _, answers in counts if number == person)
    people = {name: answers for _, name, role, answers in counts if role == "person" or answers}
    return Progress(done, left, mine, people, _rate(db, person, now))


def _rate(db: sqlite3.Connection, person: int | None, now: float) -> float:
    """Answers a minute, of one person or all: the last few, since the first of them was shown; imported ones, of
    whatever time, are no answers of late."""
    whose = "" if person is None else "AND a.person = :person"
    count, start = db.execute(
        f"SELECT count(*), min(since) FROM (SELECT min(a.shown_at, e.at) AS since, {IMPORTED} AS imported"
        f" FROM assignment AS a JOIN event AS e ON e.number = a.answered WHERE a.answered IS NOT NULL {whose}"
        " ORDER BY a.answered DESC LIMIT :lately) WHERE NOT imported",
        {"person": person, "lately": LATELY},
    ).fetchone()
    return 60 * count / max(now - start, 1.0) if count else 0.0


def skipped(db: sqlite3.Connection) -> dict[str, int]:
    """How often each person skipped something."""
    query = (
        "SELECT p.name, count(*) FROM event AS e JOIN assignment AS a ON a.number = e.assignment"
        " JOIN person AS p ON p.number = a.person WHERE e.kind = 'skip' GROUP BY p.number ORDER BY p.number"
    )
    return dict(db.execute(query).fetchall())
