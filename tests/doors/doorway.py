"""What the tests of the commands share beside fixtures."""

from __future__ import annotations

from pathlib import Path

import yaml

from plaudit import train
from plaudit.config import verb_of

PROMPTS = [f"say {word}" for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
SHARED = {"holdout": 0.0, "precision": "float32", "save_every": 2, "learning_rate": 1e-3}
QUICK = ("--precision", "float32", "--holdout", "0")


def weights(folder: str | Path) -> dict[str, bytes]:
    """The bytes of every file of weights in a folder."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.safetensors"))}


def times(folder: str | Path) -> dict[str, int]:
    """When each file and folder below `folder` was last changed."""
    return {str(path): path.stat().st_mtime_ns for path in [Path(folder), *sorted(Path(folder).rglob("*"))]}


def flags(settings):
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words


def by_all_doors(plaudit, here, settings_class, **settings):
    """Final folders of the same settings by flags, by YAML, from Python, and by what the first run wrote down."""
    verb = verb_of(settings_class)
    settings = {**SHARED, **settings}
    written = here / "settings.yaml"
    written.write_text(yaml.safe_dump({**settings, "output": "by-yaml"}))
    by_flags = plaudit(verb, *flags({**settings, "output": "by-flags"}))
    assert (by_flags.code, by_flags.out) == (0, "by-flags\n"), by_flags.err
    assert plaudit(verb, "--config", written).code == 0
    run = train(settings_class(**settings, output="by-python"))
    assert plaudit(verb, "--config", "by-flags/config.yaml", "--output", "again").code == 0
    return [here / name / "final" for name in ("by-flags", "by-yaml", "again")] + [run.final]
