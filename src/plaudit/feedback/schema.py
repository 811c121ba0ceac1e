"""The tables of the store, and opening its file."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from plaudit.errors import PlauditError

APPLICATION = 0x504C4155
"""Marks the file as plaudit's, in SQLite's own header: "PLAU"."""
OLDEST_SQLITE = (3, 38, 0)
"""Knows STRICT tables, and has its functions for JSON always."""

# Each script takes the file from one version to the next; what has been released is never edited.
# What triggers write (answers, answered, skipped) says again what the events say, so that choosing needs no counting;
# an event is a row of the tables `event` and `gold`.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;

    CREATE TABLE item (
      number INTEGER PRIMARY KEY,                 -- in order of adding
      id TEXT NOT NULL UNIQUE,
      body TEXT NOT NULL,                         -- JSON
      gold INTEGER NOT NULL,
      priority INTEGER NOT NULL,
      answers INTEGER NOT NULL DEFAULT 0          -- labels that stand, repeats not counted
    ) STRICT;
    CREATE INDEX item_choice ON item (gold, priority DESC, answers DESC, number);
    CREATE INDEX item_open ON item (gold, answers);

    CREATE TABLE person (
      number INTEGER PRIMARY KEY,
      name TEXT NOT NULL UNIQUE,
      role TEXT NOT NULL CHECK (role IN ('person', 'manager')),
      token TEXT UNIQUE,                          -- SHA-256; none for people who are only known from imports
      answers INTEGER NOT NULL DEFAULT 0          -- labels that stand, repeats counted
    ) STRICT;

    CREATE TABLE assignment (
      number INTEGER PRIMARY KEY,
      id TEXT NOT NULL UNIQUE,
      item INTEGER NOT NULL REFERENCES item,
      person INTEGER NOT NULL REFERENCES person,
      repeat INTEGER NOT NULL,
      shown TEXT NOT NULL,                        -- JSON: the candidates' places in the order shown
      shown_at REAL NOT NULL,
      leased_until REAL NOT NULL,
      overlap INTEGER,                            -- people wanted when it was leased; none for gold and repeats
      answered INTEGER,                           -- the answer's event, while it stands
      skipped INTEGER NOT NULL DEFAULT 0,         -- the last skip's event
      UNIQUE (item, person, repeat)
    ) STRICT;
    CREATE INDEX assignment_standing ON assignment (answered) WHERE answered IS NOT NULL;
    CREATE INDEX assignment_answered ON assignment (person, answered, repeat, item);

    CREATE TABLE event (
      number INTEGER PRIMARY KEY AUTOINCREMENT,
      id TEXT NOT NULL UNIQUE,
      key TEXT NOT NULL UNIQUE,                   -- the client's: what is sent twice happens once
      kind TEXT NOT NULL CHECK (kind IN ('answer', 'skip', 'undo')),
      assignment INTEGER NOT NULL REFERENCES assignment,
      at REAL NOT NULL,
      answer TEXT CHECK ((answer IS NOT NULL) = (kind = 'answer')),   -- JSON, in the item's order
      ms INTEGER NOT NULL DEFAULT 0,
      undoes INTEGER UNIQUE REFERENCES event CHECK ((undoes IS NOT NULL) = (kind = 'undo'))
    ) STRICT;

    CREATE VIEW label AS
      SELECT * FROM event AS given
      WHERE kind = 'answer' AND NOT EXISTS (SELECT 1 FROM event WHERE undoes = given.number);

    CREATE TRIGGER event_stays BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
    CREATE TRIGGER event_remains BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'events are never deleted'); END;

    CREATE TRIGGER answer_counts AFTER INSERT ON event WHEN NEW.kind = 'answer' BEGIN
      UPDATE item SET answers = answers + 1
        WHERE number = (SELECT item FROM assignment WHERE number = NEW.assignment AND repeat = 0);
      UPDATE person SET answers = answers + 1
        WHERE number = (SELECT person FROM assignment WHERE number = NEW.assignment);
      UPDATE assignment SET answered = NEW.number WHERE number = NEW.assignment;
    END;
    CREATE TRIGGER undo_counts AFTER INSERT ON event WHEN NEW.kind = 'undo' BEGIN
      UPDATE item SET answers = answers - 1
        WHERE number = (SELECT item FROM assignment WHERE number = NEW.assignment AND repeat = 0);
      UPDATE person SET answers = answers - 1
        WHERE number = (SELECT person FROM assignment WHERE number = NEW.assignment);
      UPDATE assignment SET answered = NULL WHERE number = NEW.assignment;
    END;
    CREATE TRIGGER skip_counts AFTER INSERT ON event WHEN NEW.kind = 'skip' BEGIN
      UPDATE assignment SET skipped = NEW.number, leased_until = 0 WHERE number = NEW.assignment;
    END;
    """,
    """
    CREATE INDEX event_skip ON event (assignment) WHERE kind = 'skip';   -- counted without reading all answers

    CREATE TABLE gold (                           -- right answers that came after their items
      number INTEGER PRIMARY KEY AUTOINCREMENT,
      item INTEGER NOT NULL UNIQUE REFERENCES item,
      at REAL NOT NULL,
      answer TEXT NOT NULL                        -- JSON, in the item's order; the item's body holds it too
    ) STRICT;
    CREATE TRIGGER gold_stays BEFORE UPDATE ON gold BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
    CREATE TRIGGER gold_remains BEFORE DELETE ON gold BEGIN SELECT RAISE(ABORT, 'events are never deleted'); END;
    """,
)


def check_file(path: Path) -> bool:
    """Whether the file is there. Raises PlauditError, having touched nothing, if it is anything but a store.

    Looks at the first 100 bytes (https://sqlite.org/fileformat.html): opening a stranger's database in SQLite could
    already change it.
    """
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise PlauditError(f"This Python has SQLite {sqlite3.sqlite_version}; the store needs 3.38 or newer.")
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise PlauditError(f"{path}: cannot be read ({error.strerror}); name the file of a store.") from None
    if head and (not head.startswith(b"SQLite format 3\0") or int.from_bytes(head[68:72], "big") != APPLICATION):
        raise PlauditError(f"{path}: is there, but is not a store of plaudit; name another file.")
    return True


def connect(path: Path, write: bool) -> sqlite3.Connection:
    """A connection to a file that `check_file` has seen. Raises PlauditError if it is damaged, newer or unreachable."""
    file = path.resolve()
    if write and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # What people wrote is theirs: only the owner may read it. SQLite gives its other files the same mode.
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    address = file.as_uri() + f"?mode={'rw' if write else 'ro'}"
    try:
        db = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False, timeout=10)
    except sqlite3.OperationalError as error:
        raise PlauditError(f"{path}: cannot be opened ({error}).") from None
    try:
        _check(db, path, write)
        if write:
            _prepare(db)
    except sqlite3.DatabaseError as error:
        db.close()
        raise PlauditError(f"{path}: cannot be opened ({error}).") from None
    except BaseException:
        db.close()
        raise
    return db


def _check(db: sqlite3.Connection, path: Path, write: bool) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise PlauditError(f"{path}: was written by a newer plaudit; upgrade plaudit to use it.")
    if version < len(MIGRATIONS) and not write:
        raise PlauditError(
            f"{path}: was written by an older plaudit; open it once with a verb that writes, as `label`."
        )
    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise PlauditError(f"{path}: is damaged ({found}); take a copy from before.")


def _prepare(db: sqlite3.Connection) -> None:
    """Settings and migrations. WAL lets others read while one writes; with FULL a commit has reached the disk."""
    db.execute("PRAGMA foreign_keys = ON")
    if db.execute("PRAGMA user_version").fetchone() == (0,):
        # Before WAL, so that it stands in the file itself, where `check_file` looks, and not in its log.
        db.execute(f"PRAGMA application_id = {APPLICATION}")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        try:
            db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")


def lock_of(path: Path) -> Path:
    """The file whose lock is the hold on a store: one for a store, by whatever link it is named."""
    file = path.resolve()
    return file.with_name(f"{file.name}.lock")


def hold(path: Path) -> int:
    """The hold on a store, which the system frees when the process ends, however it ends."""
    file = lock_of(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PlauditError(f"{path}: cannot be written ({error.strerror}); name another file.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise PlauditError(f"{path}: another process writes to this store; end that one first.") from None
    return lock
