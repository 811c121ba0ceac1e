"""Rows of JSON-lines files, read one at a time and validated value by value."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from plaudit.errors import PlauditError

Text = str | list[dict[str, str]]
"""Plain text, or a conversation: [{"role": "user", "content": "Hello"}, ...]."""


class LeaveOut(Exception):
    """This row is well formed but teaches nothing: count it and go on."""


def rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) for each row of a .jsonl, .jsonl.gz or .json file, where = "prefs.jsonl:17".

    Lines are read one at a time. A .json file whose first character is "[" is one list, read whole.
    Raises PlauditError, naming file and line, for what can't be read or is not a JSON object in UTF-8.
    """
    path = Path(path)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix not in (".jsonl", ".json", ".ndjson"):
        raise PlauditError(f"{path}: records are read from .jsonl, .jsonl.gz or .json files; this is none of them.")
    empty = True
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for where, row in _items(lines, path) if plain.suffix == ".json" else _lines(lines, path):
                empty = False
                yield where, row
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PlauditError(f"{path}: cannot be read ({reason}); check the path and the file.") from None
    if empty:
        raise PlauditError(f"{path}: the file holds no rows.")


def _lines(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _object(_json(line, where), where)


def _items(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Many files named .json on the Hub are JSON lines, so the first line decides."""
    lines = iter(lines)
    first = next(lines, b"")
    if not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _lines(chain([first], lines), path)
        return
    for number, item in enumerate(_json(first + b"".join(lines), str(path)), 1):
        where = f"{path}, item {number}"
        yield where, _object(item, where)


def _json(data: bytes, where: str) -> Any:
    try:
        text = data.decode("utf-8-sig").rstrip("\r\n")
        value = json.loads(text)
        if "\\ud" in text.lower():  # an escaped half of a surrogate pair is JSON, but no tokenizer can encode it
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise PlauditError(f"{where}: not valid JSON ({error.msg} at {place}).") from None
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise PlauditError(f"{where}: not valid UTF-8 ({error.reason}).") from None
    except (RecursionError, ValueError):
        raise PlauditError(f"{where}: nested too deeply, or a number too long, to be read.") from None
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PlauditError(f"{where}: a row must be a JSON object, {{...}}, not {kind_of(value)}.")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


def named(names: Iterable[str]) -> str:
    """Names out of a file as an error tells them: on one line and not too long, whatever they are."""
    return ", ".join(f"`{repr(name)[1:-1]:.60}`" for name in names) or "nothing"


class Row:
    """One row while a record is made of it: gives validated values, and keeps what is left as extra columns.

    `own` names the columns that are the record's even where it doesn't take them. Methods raise PlauditError,
    naming place and column, for a value of the wrong form.
    """

    def __init__(self, where: str, values: Mapping[str, Any], own: Iterable[str]) -> None:
        self.where, self.values, self._used = where, values, set(own)

    def has(self, *names: str) -> bool:
        """Whether all of them are there; null counts as absent, since tables fill gaps with it."""
        return all(self.values.get(name) is not None for name in names)

    def first(self, *names: str) -> str | None:
        """The first of the names that is there."""
        return next((name for name in names if self.has(name)), None)

    def take(self, name: str) -> Any:
        """The value of a column, as it is."""
        self._used.add(name)
        return self.values[name]

    def text(self, name: str) -> Text:
        """The text or conversation in a column."""
        return self.as_text(name, self.take(name))

    def prompt(self) -> Text:
        """The column `prompt`, or the empty text."""
        return self.text("prompt") if self.has("prompt") else ""

    def as_text(self, name: str, value: Any) -> Text:
        """`value`, found in column `name`, if it is text or a conversation."""
        if isinstance(value, str) or (isinstance(value, list) and all(map(_is_message, value))):
            return value
        form = "text or a list of messages with the texts `role` and `content`"
        raise self.error(name, f"must be {form}, not {kind_of(value)}")

    def number(self, name: str, value: Any) -> float:
        """`value`, found in column `name`, if it is a finite number (or a boolean: 1 or 0)."""
        if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
            raise self.error(name, f"must be a number, not {value!r:.60}")
        return float(value)

    def numbers(self, name: str, each: str) -> tuple[float, ...]:
        """The list of numbers in a column, which stays untaken: one per `each`."""
        value = self.values[name]
        if not isinstance(value, list):
            raise self.error(name, f"must be a list of numbers, one per {each}, not {value!r:.60}")
        return tuple(self.number(name, one) for one in value)

    def columns(self) -> dict[str, Any]:
        """The columns that nobody took."""
        return {name: value for name, value in self.values.items() if name not in self._used}

    def error(self, name: str, problem: str) -> PlauditError:
        """The exception that says what is wrong with a column."""
        return PlauditError(f"{self.where}: `{name}` {problem}.")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
