"""What can be known to be wrong before anything heavy loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plaudit.errors import PlauditError

LINES = (".jsonl", ".jsonl.gz", ".json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)


def names_of(data: str | Sequence[str] | None) -> list[str]:
    """The paths and names in a `data` setting: one, several, or several with commas between."""
    if data is None:
        return []
    parts = [data] if isinstance(data, str) else list(data)
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


def check_data(data: str | Sequence[str] | None) -> None:
    """Local paths exist and are not empty: told before anything heavy loads. Hub names pass.

    Raises PlauditError.
    """
    for name in names_of(data):
        path = Path(name).expanduser()
        local = name.endswith(LINES) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "." in path.suffix
        if not path.exists() and local:
            raise PlauditError(f"data: there is no file {name!r}.")
        if path.is_file() and path.stat().st_size == 0:
            raise PlauditError(f"data: {name!r} is empty.")


def read_config(name: str) -> dict[str, Any]:
    """The config.json of a local model folder, after the checks that must come before anything heavy loads.

    Raises PlauditError for a folder that is no model, or whose config asks for code of its own.
    """
    folder = Path(name)
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise PlauditError(f"model: there is no folder {name!r}.")
        return {}
    path = folder / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "a file"
        raise PlauditError(
            f"model: {name!r} has no config.json, so it is not a Hugging Face model folder (found: {found})."
        )
    config: dict[str, Any] = json.loads(path.read_text())
    hostile = [key for key in config if key.startswith("_attn_implementation") or key == "trust_remote_code"]
    if hostile:
        raise PlauditError(
            f"{path}: {hostile[0]!r} does not belong into a config.json and can run foreign code: remove it."
        )
    return config


def check_model(name: str) -> None:
    """The checks on a model folder that need nothing heavy: it exists, is a model, and brings a tokenizer.

    Raises PlauditError. Hub names pass: only the download can tell.
    """
    folder = Path(name)
    if read_config(name) and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise PlauditError(
            f"model: {name!r} has no tokenizer (none of {', '.join(_TOKENIZER_FILES[:3])} ...): "
            "save one into the folder with tokenizer.save_pretrained()."
        )


def check_rewards(specs: Sequence[str]) -> None:
    """The checks that need nothing heavy. Raises PlauditError."""
    for spec in specs:
        if ".py:" in spec:
            path = spec.rpartition(":")[0]
            if not Path(path).is_file():
                raise PlauditError(f"reward {spec!r}: there is no file {path!r}.")
        elif ":" not in spec:
            check_model(spec)
