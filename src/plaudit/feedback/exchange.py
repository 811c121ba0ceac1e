"""Files in and out of a store: the verbs `import` and `export`."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plaudit import config
from plaudit.errors import PlauditError
from plaudit.feedback.exporting import rows_of, table, unprompted
from plaudit.feedback.importing import read_labels
from plaudit.feedback.items import Label
from plaudit.feedback.store import Store, Taken
from plaudit.run import write_atomically
from plaudit.settings.feedback import Export, Import


@dataclass(frozen=True)
class Imported:
    """How many labels were new, and where others stand (file:line) by what became of them."""

    new: int
    others: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.new} new label{'s' * (self.new != 1)}"]
        return "\n".join(lines + [f"{len(at)} {what}; the first: {at[0]}" for what, at in self.others.items() if at])


def take_in(settings: Import) -> Imported:
    """Adds the labels in files to a store, which is made if there is none, and says what became of each row.

    Raises PlauditError for a file with anything wrong in it, of which nothing is taken then.
    """
    settings = config.check(settings)
    read = read_labels(settings.data, settings.by)
    with Store.open(settings.output) as store:
        taken = store.take(label for _, label in read.labels)

    def those(fate: Taken) -> list[str]:
        return [where for (where, _), became in zip(read.labels, taken, strict=True) if became == fate]

    others = {
        "left out, already there": those("known"),
        "kept as repeats, because the same person had answered the same before": those("repeat"),
    }
    others |= {f"left out, because {reason}": places for reason, places in read.dropped.items()}
    return Imported(len(taken) - len(others["left out, already there"]), others)


def export(settings: Export) -> Path:
    """Writes what people said to a new file, and returns its path. Raises PlauditError if there is nothing to write,
    or the file exists."""
    settings = config.check(settings)
    path = Path(settings.output)
    as_table = path.suffix == ".csv"
    check_output(path, as_table, settings.kind)
    with Store.read(settings.data) as store:
        labels = chosen(store.labels(), settings)
    rows = [] if as_table else rows_of(labels, settings.kind, ties=settings.ties)
    left = [label for label in labels if settings.kind == "demonstrations" and unprompted(label)]
    told = f"rewritten answers left out for want of a prompt: {len(left)}" if left else ""
    if not (labels if as_table else rows):
        why = f"; {told}" if told else ""
        raise PlauditError(f"{settings.data}: holds nothing yet that can be exported as {settings.kind}{why}.")
    text = table(labels) if as_table else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        write_atomically(path, gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text)
    except OSError as error:
        raise PlauditError(f"output: {path} cannot be written ({error.strerror}); name another file.") from None
    if told:
        print(f"{told}; the first is label {left[0].id}", file=sys.stderr)
    return path


def check_output(path: Path, as_table: bool, kind: str) -> None:
    """Raises PlauditError unless the file can be written, and read again afterwards."""
    if path.exists():
        raise PlauditError(f"output: {path} exists already: name another file, or remove it.")
    if as_table and kind != "labels":
        raise PlauditError(f"output: {path} is a table, which holds labels as they are: give --kind labels with it.")
    if not as_table and not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise PlauditError(f"output: {path} ends neither in .jsonl nor in .jsonl.gz, nor in .csv for a table.")


def chosen(labels: Sequence[Label], settings: Export) -> list[Label]:
    """The labels that the settings ask for: what trains leaves out gold items and repeats unless they are wanted."""
    everything = settings.kind == "labels"
    kept = [
        label
        for label in labels
        if everything or ((settings.gold or label.item.gold is None) and (settings.repeats or label.repeat == 0))
    ]
    return kept[-settings.last :]
