"""What the tests of the commands share beside fixtures."""

from __future__ import annotations

from pathlib import Path

PROMPTS = [f"say {word}" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
QUICK = ("--precision", "float32", "--holdout", "0")


def weights(folder: str | Path) -> dict[str, bytes]:
    """The bytes of every file of weights in a folder."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


def times(folder: str | Path) -> dict[str, int]:
    """When each file and folder below `folder` was last changed."""
    return {str(path): path.stat().st_mtime_ns for path in [Path(folder), *sorted(Path(folder).rglob("*"))]}
