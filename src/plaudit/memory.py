"""Rows that a Python program holds in memory, as files that a run folder keeps: named by what they hold, so that the
settings say which rows a run had, and it is resumed with the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from plaudit.errors import PlauditError
from plaudit.run import GIVEN, check_own, write_atomically

_FIELDS = ("data", "eval_data", "normalise_on")


def rows_of(settings: Any) -> dict[str, bytes]:
    """The settings that hold rows and not names of files, and these rows as JSON lines. Raises PlauditError."""
    given: dict[str, Any] = {name: getattr(settings, name, None) for name in _FIELDS}
    return {name: _lines(name, value) for name, value in given.items() if _is_rows(value)}


def path_of(folder: str, name: str, content: bytes) -> str:
    """The file of these rows in a run folder."""
    return str(Path(folder, GIVEN, f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"))


def write(path: str, content: bytes) -> None:
    """Writes a file unless it is there: its name says what it holds. Raises PlauditError where that can't be."""
    if Path(path).exists():
        return
    check_own(Path(path).parents[1])
    try:
        write_atomically(path, content)
    except OSError as error:
        raise PlauditError(
            f"{Path(path).parents[1]} cannot be written ({error.strerror}); choose another output."
        ) from None


def _is_rows(value: Any) -> bool:
    """Anything to go through that is not a name or names."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return False
    return not (isinstance(value, list | tuple) and all(isinstance(part, str) for part in value))


def _lines(name: str, rows: Iterable[Any]) -> bytes:
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise PlauditError(
                f"{name}: row {number} is {type(row).__name__}: give dicts in a list, one split of a data set, or the "
                "name of a file."
            )
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False).encode())
        except (TypeError, ValueError) as error:
            raise PlauditError(f"{name}: row {number} cannot be kept as JSON ({error}): leave that out.") from None
    if not lines:
        raise PlauditError(f"{name}: there are no rows in what was given.")
    return b"\n".join(lines) + b"\n"
