"""Who is asked what next: leases of items, inside a transaction of the store."""

from __future__ import annotations

import json
import random
import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plaudit.feedback.items import Candidate, Item

PAUSE = 5
"""A repeat is a person's fifth answer after the first one at the earliest, which is no longer before one's eyes."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How items are given out: `overlap` people per item, leases of `lease_seconds`, and the shares of all that is
    given which are gold items and repeats."""

    overlap: int = 1
    lease_seconds: float = 600
    gold_share: float = 0.0
    repeat_share: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Assignment:
    """An item that one person is to answer. `order[i]` is the candidate shown at place i; `leased_until` is in seconds
    since 1970; `repeat` counts earlier times this person was asked the same."""

    id: str
    item: Item
    person: str
    order: tuple[int, ...]
    leased_until: float
    repeat: int

    @property
    def shown(self) -> tuple[Candidate, ...]:
        """The candidates in the order shown."""
        return tuple(self.item.candidates[place] for place in self.order)


# An item is free for a person while those who answered it and those others who hold a lease are fewer than wanted.
FREE = """
  i.answers + (
    SELECT count(*) FROM assignment AS other
    WHERE other.item = i.number AND other.repeat = 0 AND other.answered IS NULL
      AND other.leased_until > :now AND other.person != :person
  ) < :overlap
"""

# What this person holds, and what lapsed but is still to be had: whoever comes back sees what was there before.
_HELD = f"""
  SELECT a.number FROM assignment AS a JOIN item AS i ON i.number = a.item
  WHERE a.person = :person AND a.answered IS NULL
    AND (a.leased_until > :now OR (a.skipped = 0 AND (a.overlap IS NULL OR {FREE})))
  ORDER BY a.skipped, a.number LIMIT :count
"""

COUNT = "json_array_length(i.body, '$.candidates')"
"""How many candidates an item has."""

_NEW = f"""
  SELECT i.number, {COUNT} FROM item AS i INDEXED BY item_choice
  WHERE i.gold = :gold AND i.answers < :overlap AND {FREE}
    AND NOT EXISTS (SELECT 1 FROM assignment AS own WHERE own.item = i.number AND own.person = :person)
  ORDER BY i.priority DESC, i.answers DESC, i.number LIMIT 1
"""

_SKIPPED = f"""
  SELECT a.number FROM assignment AS a JOIN item AS i ON i.number = a.item
  WHERE a.person = :person AND a.answered IS NULL AND a.skipped > 0 AND a.leased_until <= :now
    AND (a.overlap IS NULL OR {FREE})
  ORDER BY a.skipped LIMIT 1
"""

_REPEATABLE = """
  FROM assignment AS a JOIN item AS i ON i.number = a.item
  WHERE a.person = :person AND a.repeat = 0
    AND a.answered <= (
      SELECT answered FROM assignment WHERE person = :person AND answered IS NOT NULL
      ORDER BY answered DESC LIMIT 1 OFFSET :pause - 1
    )
    AND NOT EXISTS (
      SELECT 1 FROM assignment AS again WHERE again.item = a.item AND again.person = a.person AND again.repeat = 1
    )
"""

UNBOUND = 2**62
"""An overlap that is never reached."""


def lease(db: sqlite3.Connection, person: int, count: int, rules: Rules, now: float) -> list[int]:
    """The numbers of up to `count` assignments that this person now holds, in the order they are to be shown."""
    values = {"person": person, "now": now, "overlap": rules.overlap, "count": count}
    held = [number for (number,) in db.execute(_HELD, values)]
    for number in held:
        _renew(db, number, rules, now)
    while len(held) < count:
        number = _draw(db, person, rules, now)
        if number is None:
            break
        held.append(number)
    return held


def _renew(db: sqlite3.Connection, number: int, rules: Rules, now: float) -> None:
    """Prolong a lease; one that had lapsed is shown anew. A fresh one is left, which spares a write to the disk."""
    (until,) = db.execute("SELECT leased_until FROM assignment WHERE number = ?", (number,)).fetchone()
    if until >= now + rules.lease_seconds / 2:
        return
    db.execute(
        "UPDATE assignment SET leased_until = :until, shown_at = iif(leased_until > :now, shown_at, :now),"
        " overlap = iif(overlap IS NULL, NULL, :overlap) WHERE number = :number",
        {"until": now + rules.lease_seconds, "now": now, "overlap": rules.overlap, "number": number},
    )


def _draw(db: sqlite3.Connection, person: int, rules: Rules, now: float) -> int | None:
    """One more assignment: gold or a repeat if it is their turn, else a new item, else one that was skipped."""
    (given,) = db.execute("SELECT count(*) FROM assignment WHERE person = ?", (person,)).fetchone()
    chance = random.Random(f"{rules.seed} {person} {given}")
    share = chance.random()
    values: dict[str, Any] = {"person": person, "now": now, "overlap": UNBOUND, "gold": 1, "pause": PAUSE}
    found: Sequence[int] | None = None
    if share < rules.gold_share:
        found = db.execute(_NEW, values).fetchone()
        if found is not None:
            return _assign(db, found, person, 0, None, rules, now)
    elif share < rules.gold_share + rules.repeat_share:
        (choices,) = db.execute(f"SELECT count(*) {_REPEATABLE}", values).fetchone()
        if choices:
            values["place"] = chance.randrange(choices)
            query = f"SELECT i.number, {COUNT} {_REPEATABLE} ORDER BY a.answered LIMIT 1 OFFSET :place"
            return _assign(db, db.execute(query, values).fetchone(), person, 1, None, rules, now)
    values |= {"overlap": rules.overlap, "gold": 0}
    found = db.execute(_NEW, values).fetchone()
    if found is not None:
        return _assign(db, found, person, 0, rules.overlap, rules, now)
    skipped = db.execute(_SKIPPED, values).fetchone()
    if skipped is None:
        return None
    _renew(db, skipped[0], rules, now)
    return int(skipped[0])


def _assign(
    db: sqlite3.Connection,
    found: Sequence[int],
    person: int,
    repeat: int,
    overlap: int | None,
    rules: Rules,
    now: float,
) -> int:
    item, count = found
    # Not seeded: nobody should be able to work out who was shown which side, and what was shown is written down.
    order = random.SystemRandom().sample(range(count), count)
    (number,) = db.execute(
        "INSERT INTO assignment (id, item, person, repeat, shown, shown_at, leased_until, overlap)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING number",
        (secrets.token_hex(8), item, person, repeat, json.dumps(order), now, now + rules.lease_seconds, overlap),
    ).fetchone()
    return int(number)
