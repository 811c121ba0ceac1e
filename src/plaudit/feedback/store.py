"""The store: one SQLite file with what is asked, who answers, and everything that was answered.

Events (answers, skips, undoings) are only ever appended; what stands is worked out from them. Whatever a method
returns has reached the disk. One process writes, and others read while it lives.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from plaudit.errors import PlauditError
from plaudit.feedback import recording, schema, standing
from plaudit.feedback.assigning import Assignment as Assignment
from plaudit.feedback.assigning import Rules as Rules
from plaudit.feedback.assigning import lease
from plaudit.feedback.forms import answer_from_json, checked_name, dumped
from plaudit.feedback.items import Answer, Item, Label
from plaudit.feedback.recording import Conflict as Conflict
from plaudit.feedback.recording import Taken as Taken
from plaudit.feedback.standing import Progress as Progress

Role = Literal["person", "manager"]


class StoreFull(PlauditError):
    """The disk is full or fails; nothing of the change was kept, and the store can be used as before."""


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who answers, or who manages the study."""

    name: str
    role: Role


class Store:
    """The file that holds a study. Use `Store.open` to write, `Store.read` to read, and `close` or `with`.

    Methods may be called from several threads. Each that changes something is one transaction, and raises StoreFull
    when the disk does not take it.
    """

    def __init__(self, path: Path, db: sqlite3.Connection, hold: int) -> None:
        self.path = path
        self._db = db
        self._hold = hold
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """The writer of a store, which is made or brought to this version where needed.

        Raises PlauditError when another process writes it, and when the file is damaged, newer, or no store.
        """
        path = Path(path)
        schema.check_file(path)
        # One writer at a time, because SQLite before 3.51.3 can lose what was written when two connections write or
        # checkpoint a WAL at the same moment (the "WAL-reset bug"), and readers that cannot write never checkpoint.
        hold = schema.hold(path)
        try:
            return cls(path, schema.connect(path, write=True), hold)
        except BaseException:
            os.close(hold)
            raise

    @classmethod
    def read(cls, path: str | Path) -> Store:
        """A store to look into, beside its writer. Raises PlauditError when there is none, or it can't be read."""
        path = Path(path)
        if not schema.check_file(path):
            raise PlauditError(f"{path}: there is no such store; `plaudit label` or `plaudit import` makes one.")
        return cls(path, schema.connect(path, write=False), -1)

    @property
    def version(self) -> str:
        """Another text after anything was written, by this process or another."""
        with self._lock:
            (others,) = self._db.execute("PRAGMA data_version").fetchone()
            return f"{others}.{self._db.total_changes}.{self.position}"

    @property
    def position(self) -> int:
        """The number of the last event, for `labels(after=)`."""
        return self.positions[0]

    @property
    def positions(self) -> tuple[int, int]:
        """The numbers of the last event, and of the last right answer that came after its item."""
        with self._lock:
            return standing.positions(self._db)

    # -------------------------------------------------------------------------------------------- the study

    def describe(self, **settings: str) -> None:
        """Keep texts about the study by name: title, instructions, criteria."""
        with self._change() as db:
            for name, value in settings.items():
                dumped(value, name)
                db.execute(
                    "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value", (name, value)
                )

    def setting(self, name: str) -> str:
        """What `describe` kept under this name, or the empty text."""
        with self._lock:
            found = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(found[0]) if found else ""

    @property
    def title(self) -> str:
        """What the study is called."""
        return self.setting("title")

    @property
    def instructions(self) -> str:
        """What people are told to look for."""
        return self.setting("instructions")

    def add(self, items: Iterable[Item], *, priority: int = 0) -> int:
        """Adds those items that are not there yet, by `Item.id`, and returns how many. Higher priorities come first.

        Of an item that is there without a right answer, a `gold` that comes is kept. Raises PlauditError, having added
        nothing, for an item that cannot be asked, and for a `gold` that contradicts the one which is there.
        """
        with self._change() as db:
            return sum(recording.item(db, item, priority, f"item {place}") for place, item in enumerate(items, 1))

    def items(self) -> list[Item]:
        """All items, in the order they were added."""
        with self._lock:
            rows = self._db.execute("SELECT body FROM item ORDER BY number").fetchall()
        return [standing.item(body) for (body,) in rows]

    # -------------------------------------------------------------------------------------------- people

    def join(self, name: str, *, role: Role = "person", token: str = "") -> str:
        """Makes a person and returns the secret token that proves to be them; only its SHA-256 is kept.

        With a `token` that the caller made, the same call again finds the same person. Raises PlauditError if the name
        is taken, empty, over 80 characters, or holds control characters.
        """
        name = checked_name(name)
        own = token or secrets.token_urlsafe(24)
        with self._change() as db:
            found = db.execute("SELECT token FROM person WHERE name = ?", (name,)).fetchone()
            if found is None:
                db.execute("INSERT INTO person (name, role, token) VALUES (?, ?, ?)", (name, role, _hashed(own)))
            elif not token or found[0] != _hashed(token):
                raise Conflict(f"name: {name!r} is taken; choose another.")
        return own

    def renew(self, name: str) -> str:
        """A new token for a person who is known; the old one is void. Raises PlauditError for an unknown name."""
        token = secrets.token_urlsafe(24)
        with self._change() as db:
            changed = db.execute("UPDATE person SET token = ? WHERE name = ?", (_hashed(token), name)).rowcount
            if not changed:
                raise PlauditError(f"name: nobody is called {name!r:.90}.")
        return token

    def who(self, token: str) -> Person | None:
        """Whose token this is."""
        with self._lock:
            found = self._db.execute("SELECT name, role FROM person WHERE token = ?", (_hashed(token),)).fetchone()
        return Person(*found) if found else None

    def people(self) -> list[str]:
        """Names of those who answer, in the order they came."""
        with self._lock:
            rows = self._db.execute("SELECT name FROM person WHERE role = 'person' ORDER BY number").fetchall()
        return [name for (name,) in rows]

    # -------------------------------------------------------------------------------------------- asking and answering

    def next(self, person: str, count: int, rules: Rules, now: float) -> list[Assignment]:
        """Up to `count` items for this person to answer, leased until `now + rules.lease_seconds`.

        First what the person holds already, as it was shown; then, of what fewer than `rules.overlap` people have or
        hold, the highest priority, the nearest to its overlap, the oldest; last what the person skipped.
        """
        with self._change(at_once=False) as db:
            numbers = lease(db, recording.person(db, person), count, rules, now)
            return [standing.assignment(db, number) for number in numbers]

    def answer(self, assignment: str, person: str, answer: Answer, *, key: str, ms: int, now: float) -> Label:
        """Keeps an answer that is in the order shown, `ms` milliseconds after it was; the same `key` gives the first
        label again.

        Raises Conflict when the assignment is answered already, or its lease ended and others have the item; and
        PlauditError when it is not this person's or the answer does not fit.
        """
        with self._change() as db:
            if recording.seen(db, key, person, "answer", assignment):
                return standing.label(db, key)
            asked = standing.assignment(db, recording.open_to(db, assignment, person, now))
            if answer.ranks is not None and len(answer.ranks) != len(asked.order):
                raise PlauditError(f"answer: {len(answer.ranks)} ranks do not fit {len(asked.order)} candidates.")
            recording.answer(db, key, asked, answer.restored(asked.order), ms, now)
            return standing.label(db, key)

    def assigned(self, assignment: str, person: str) -> Assignment:
        """What this person was asked under this id, whenever it was. Raises PlauditError if it is none of theirs."""
        with self._lock:
            return standing.assignment(self._db, recording.own(self._db, assignment, person)[0])

    def skip(self, assignment: str, person: str, *, key: str, now: float) -> None:
        """Lets an item go; it comes to this person again only when nothing else is left. Raises as `answer` does."""
        with self._change() as db:
            if not recording.seen(db, key, person, "skip", assignment):
                recording.event(db, key, "skip", recording.unanswered(db, assignment, person), now)

    def undo(
        self, person: str, *, key: str, now: float, lease_seconds: float = 600
    ) -> tuple[Assignment, Answer] | None:
        """Takes back this person's last answer that stands, and leases its item again; None if there is none.

        The answer comes back in the order shown; the same `key` takes back nothing more. What was imported stays.
        """
        with self._change() as db:
            if not recording.seen(db, key, person, "undo", None):
                last = db.execute(
                    "SELECT a.number, a.answered FROM assignment AS a JOIN event AS e ON e.number = a.answered"
                    f" WHERE a.person = ? AND NOT {recording.IMPORTED} ORDER BY a.answered DESC LIMIT 1",
                    (recording.person(db, person),),
                ).fetchone()
                if last is None:
                    return None
                recording.event(db, key, "undo", last[0], now, undoes=last[1])
                db.execute("UPDATE assignment SET leased_until = ? WHERE number = ?", (now + lease_seconds, last[0]))
            query = "SELECT u.assignment, e.answer FROM event u JOIN event e ON e.number = u.undoes WHERE u.key = ?"
            number, body = db.execute(query, (key,)).fetchone()
            asked = standing.assignment(db, number)
            return asked, answer_from_json(json.loads(body), "answer").reordered(asked.order)

    def take(self, labels: Iterable[Label]) -> list[Taken]:
        """Adds labels from elsewhere with all that belongs to them, and returns what became of each.

        One whose `Label.id` is there already is not added. Where a person has another answer to the same item here, the
        one that comes becomes a repeat.
        """
        with self._change() as db:
            return [recording.take(db, label) for label in labels]

    # -------------------------------------------------------------------------------------------- looking

    def labels(self, *, after: int = 0) -> list[Label]:
        """The answers that stand, in the order they were given; only those given after an earlier `position`, if that
        is named."""
        with self._lock:
            return standing.labels(self._db, after)

    def news(self, after: int) -> standing.News:
        """What has become of the answers since an earlier `position`."""
        with self._look() as db:
            return standing.news(db, after)

    def newest(self, count: int, skip: int = 0) -> list[Label]:
        """Up to `count` of the answers that stand, the newest first, after the `skip` newest; no others are read."""
        with self._lock:
            return standing.newest(self._db, count, skip)

    def progress(self, person: str | None, rules: Rules, now: float) -> Progress:
        """How far the study is, for all or for one person."""
        with self._look() as db:
            return standing.progress(db, None if person is None else recording.person(db, person), rules, now)

    def skipped(self) -> dict[str, int]:
        """How often each person skipped something."""
        with self._lock:
            return standing.skipped(self._db)

    # -------------------------------------------------------------------------------------------- transactions

    @contextmanager
    def _look(self) -> Iterator[sqlite3.Connection]:
        """Several looks at one state."""
        with self._lock:
            self._db.execute("BEGIN")
            try:
                yield self._db
            finally:
                self._db.execute("COMMIT")

    @contextmanager
    def _change(self, at_once: bool = True) -> Iterator[sqlite3.Connection]:
        """All of a change or nothing, and on the disk once this ends; or, unless `at_once`, once the next one ends that
        is: should the power fail before, only a question has to be given out again."""
        if self._hold < 0:
            raise PlauditError(f"{self.path}: was opened for reading only.")
        with self._lock:
            try:
                self._db.execute(f"PRAGMA synchronous = {'FULL' if at_once else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                # The low byte is the kind of error: https://sqlite.org/rescode.html
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                    raise StoreFull(f"{self.path}: cannot be written ({error}); free some space, then go on.") from None
                raise

    def close(self) -> None:
        """Let another process write."""
        with self._lock:
            self._db.close()
            if self._hold >= 0:
                os.close(self._hold)
                self._hold = -1

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
