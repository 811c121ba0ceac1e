"""The run folder: resolved configuration, metrics, samples, checkpoints, final model, summary and report."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from plaudit.config import difference, dump_yaml, plain, read_yaml
from plaudit.errors import PlauditError


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file so that, whatever happens, either the old or the new content is there. Text is UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    # The rename itself lives in the folder, which has a cache of its own.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines log, without a last line that a killed process left half-written; [] if no file.

    Raises PlauditError for any other line that is not a JSON object with a `step`.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise PlauditError(f"{path}:{number}: not a line of a log; mend or remove it.")
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"


GIVEN = "given"
"""In a run folder: rows and models that a program held in memory and gave the run."""
UNOWNED = (GIVEN, ".gitkeep", ".DS_Store")
"""What may lie in a folder before the run that it is for."""


class Run:
    """One run folder, held by one process at a time. Use `Run.open`, and `close` or `with`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.final = folder / "final"
        self.report = folder / "report.html"
        self._lock = lock

    @classmethod
    def open(cls, folder: str | Path, settings: Mapping[str, Any], free: Collection[str] = ()) -> Run:
        """Start or resume the run in `folder`.

        `settings` is the resolved configuration, `verb` included. When the folder holds a configuration, only the
        settings named in `free` may differ from it, and the new ones are written. Raises
        PlauditError when others differ, when another process holds the folder, when it holds files of somebody else's,
        and when it can't be written.
        """
        folder = Path(folder)
        run = cls(folder, _locked(folder))
        try:
            run._configure({"verb": settings["verb"], **plain(settings)}, free)
            run.rewind(math.inf)
        except BaseException:
            run.close()
            raise
        return run

    def _configure(self, settings: dict[str, Any], free: Collection[str]) -> None:
        path = self.folder / "config.yaml"
        old = read_yaml(path) if path.exists() else None
        if old == settings:
            return
        if old is not None:
            sides = (old, settings)
            bound = [{name: _here(value) for name, value in side.items() if name not in free} for side in sides]
            changes = difference(*bound)
            if changes:
                listed = "".join(f"\n  {change}" for change in changes)
                advice = "Restore the old values to resume, or choose another --output."
                raise PlauditError(f"{self.folder} holds a run with other settings:{listed}\n{advice}")
        write_atomically(path, dump_yaml(settings))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl; NaN and infinities are written as null."""
        self._append("metrics.jsonl", [{"step": step, **metrics}])

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append one line per row to samples.jsonl."""
        self._append("samples.jsonl", [{"step": step, **row} for row in rows])

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_lines(self.folder / "metrics.jsonl")

    def rewind(self, step: float) -> None:
        """Forget what was logged after `step` (a half-written last line too), so that a resumed run repeats nothing."""
        for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
            kept = "".join(_line(row) for row in read_lines(path) if row["step"] <= step)
            if path.exists() and path.read_bytes() != kept.encode():
                write_atomically(path, kept)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: from now on the run is finished."""
        write_atomically(self.folder / "summary.json", json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n")

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.folder / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any]:
        """What `finish` wrote. Raises PlauditError when the run is not finished."""
        if not self.finished:
            raise PlauditError(f"{self.folder} has no summary yet: its run is not finished.")
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text("utf-8"))
        return summary

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _here(value: Any) -> Any:
    """A setting, without the run's folder where it names what was given: by other words the folder is the same."""
    if isinstance(value, list):
        return [_here(part) for part in value]
    return str(Path(*Path(value).parts[-2:])) if isinstance(value, str) and Path(value).parent.name == GIVEN else value


def check_own(folder: Path) -> None:
    """Raises PlauditError for a folder with files that no run left there; what a program gives a run may come first."""
    ours = any((folder / name).exists() for name in (".lock", "config.yaml"))
    if not ours and folder.is_dir() and any(entry.name not in UNOWNED for entry in folder.iterdir()):
        raise PlauditError(f"{folder} holds files that no run of plaudit left there; choose another --output.")


def _locked(folder: Path) -> int:
    """Make the folder and hold it: the system frees the lock when the process ends, however it ends."""
    check_own(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise PlauditError(f"{folder} {reason}; choose another --output.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise PlauditError(f"{folder} is in use by another process; wait for it or choose another --output.") from None
    return lock
