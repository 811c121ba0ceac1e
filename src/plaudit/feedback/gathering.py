"""Labels out of whatever holds them: a store, a file of labels, or a table with a column for each person."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plaudit.errors import PlauditError
from plaudit.feedback.forms import label_from_json
from plaudit.feedback.items import Answer, Candidate, Item, Label
from plaudit.feedback.store import Store
from plaudit.rows import Row, rows

SQLITE = b"SQLite format 3\0"
ANNOTATOR = re.compile(r"annotator_?\d+")
CHOICES: dict[int, tuple[int, ...]] = {0: (1, 1), 1: (1, 2), 2: (2, 1)}
"""What an annotator's column holds: 0 for a tie, or which response is better."""


def gather(paths: Sequence[str | Path]) -> list[Label]:
    """The labels of stores and of JSON-lines files, in their order. Raises PlauditError, naming file and line.

    A row of a file is a label as `plaudit export --kind labels` writes it, or a pair in the manner of PandaLM
    (arXiv:2306.05087): `response1` and `response2`, `annotator1`, `annotator2` ... with 1, 2 or 0 for a tie (null where
    that person did not answer), `prompt` or `instruction` and `input`, and the models' names in `cmp_key` as "a_b".
    The order shown and the time are not known of such a pair. What is in several of them, by its id, counts once.
    """
    labels: dict[str, Label] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise PlauditError(f"data: there is no file {str(path)!r}.")
        for label in stored(path) if is_store(path) else _read(path):
            labels.setdefault(label.id, label)
    return list(labels.values())


def is_store(path: str | Path) -> bool:
    """Whether this is an SQLite file; not if it cannot be read, of which whoever reads it next will tell."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    except OSError:
        return False


def stored(path: str | Path) -> list[Label]:
    """The labels in a store. Raises PlauditError where the file is none."""
    with Store.read(path) as store:
        return store.labels()


def _read(path: Path) -> list[Label]:
    labels: list[Label] = []
    for where, row in rows(path):
        people = sorted((name for name in row if ANNOTATOR.fullmatch(name)), key=lambda name: (len(name), name))
        labels += _judged(where, row, people) if people else [label_from_json(row, where)]
    return labels


def _judged(where: str, values: Mapping[str, Any], people: Sequence[str]) -> list[Label]:
    """One label for each person who answered."""
    row = Row(where, values, ())
    for name in ("response1", "response2"):
        if not row.has(name):
            raise PlauditError(f"{where}: a pair with annotators needs `{name}`, which is not there.")
    models = str(values.get("cmp_key") or "").split("_")
    sources: list[dict[str, str]] = [{"model": model} for model in models] if len(models) == 2 else [{}, {}]
    # An answer that is a number or a truth value has lost its quotation marks on the way into the file.
    texts = [
        json.dumps(values[name]) if isinstance(values[name], bool | int | float) else row.text(name)
        for name in ("response1", "response2")
    ]
    candidates = (Candidate(text, source) for text, source in zip(texts, sources, strict=True))
    prompt = row.prompt() or "\n\n".join(str(values[name]) for name in ("instruction", "input") if values.get(name))
    item = Item("compare", prompt, tuple(candidates))
    labels = []
    for person in people:
        choice = values[person]
        if choice is None:
            continue
        if type(choice) is not int or choice not in CHOICES:
            raise row.error(person, f"must be 1, 2, or 0 for a tie, not {choice!r:.60}")
        labels.append(Label(f"{where} {person}", item, person, Answer(CHOICES[choice]), (), 0.0, 0.0, 0))
    return labels
