"""Files and Hub data sets -> records -> token rows, in an order that any step can be resumed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from plaudit import records
from plaudit.checks import LINES, TABLES, TEXT, names_of
from plaudit.errors import PlauditError
from plaudit.records import Demonstration, Loaded, Prompt, Text

R = TypeVar("R")


def load(data: str | Sequence[str], kind: type[R], split: str = "train") -> Loaded:
    """All records of `kind` in `data`. Raises PlauditError, naming file, line and column, where they are not."""
    return records.parse(_rows(names_of(data), split), kind)


def columns_of(data: str | Sequence[str], split: str = "train") -> set[str]:
    """The columns of the first row. Raises PlauditError if there is none."""
    where, row = next(_rows(names_of(data), split), ("", None))
    if row is None:
        raise PlauditError(f"data: {data!r} has no rows{where}.")
    return set(row)


def _rows(names: list[str], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names:
        if name.endswith(LINES):
            yield from records.rows(Path(name).expanduser())
        elif name.endswith(TEXT):
            yield name, {"text": _text(name)}
        else:
            yield from _dataset_rows(name, split)


def _text(name: str) -> str:
    """A whole file of plain text, its line breaks all `\\n`."""
    try:
        return Path(name).expanduser().read_text("utf-8-sig")
    except OSError as error:
        raise PlauditError(f"data: cannot read {name!r}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise PlauditError(f"data: {name!r} is not UTF-8 (byte {error.start}: {error.reason}).") from None


def _dataset_rows(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    path = Path(name).expanduser()
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            table = datasets.load_from_disk(str(path))
            table = table[split] if isinstance(table, datasets.DatasetDict) else table
        elif path.is_file():
            if path.suffix not in TABLES:
                known = ", ".join([*LINES, TEXT, *TABLES])
                raise PlauditError(f"data: {name!r} is of no kind that can be read: {known}, or a folder of these.")
            table = datasets.load_dataset(TABLES[path.suffix], data_files=str(path), split="train")
        else:
            table = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise PlauditError(f"data: cannot read {name!r} (split {split!r}): {reason}") from error
    for number, row in enumerate(table):
        yield f"{name}[{number}]", dict(row)


def key_of(prompt: Text) -> str:
    """A stable name for a prompt."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def asked(record: Any) -> Text:
    """What tells on which side of a hold-out a record falls: its prompt or, where it has none, what was said, in
    whichever order."""
    if record.prompt:
        prompt: Text = record.prompt
        return prompt
    said = [getattr(record, name) for name in ("completion", "chosen", "rejected") if hasattr(record, name)]
    said += getattr(record, "completions", ())
    return said[0] if len(said) == 1 else json.dumps(sorted(said, key=json.dumps))


def hold_out(items: Sequence[R], share: float, prompt: Callable[[R], Text]) -> tuple[list[R], list[R]]:
    """(training, held out): whole prompts go to one side, by their hash, so that no prompt is on both and the same
    prompt always falls on the same side.

    Where few prompts would leave one side empty, the prompt whose hash is nearest goes there: at least one is held
    out, and never all, unless `share` is 0 or 1, or there is only one prompt."""
    places = [int(key_of(prompt(item))[:8], 16) for item in items]
    limit = int(share * 16**8)
    if places and 0 < share < 1:
        limit = min(max(limit, min(places) + 1), max(places))
    held = [place < limit for place in places]
    return (
        [item for item, out in zip(items, held, strict=True) if not out],
        [item for item, out in zip(items, held, strict=True) if out],
    )


def hold_out_end(text: Demonstration, share: float) -> tuple[list[Demonstration], list[Demonstration]]:
    """(training, held out) where one plain text is all there is: its last `share` of characters is held out."""
    assert isinstance(text.completion, str)
    cut = len(text.completion) - round(share * len(text.completion))
    parts = (replace(text, completion=part) for part in (text.completion[:cut], text.completion[cut:]))
    training, held = ([part] if part.completion else [] for part in parts)
    return training, held


def fraction(items: Sequence[R], share: float, seed: int) -> list[R]:
    """A share of the items, drawn by the seed and in their order. What a smaller share holds, a larger one holds too.

    Raises PlauditError if that is none of them.
    """
    count = int(share * len(items) + 1e-9)  # 0.29 of 100 are 29
    if not count:
        raise PlauditError(f"train_fraction: {share:g} of {len(items)} rows is none: raise it.")
    return [items[i] for i in sorted(np.random.default_rng(seed).permutation(len(items))[:count])]


def long_enough(prompts: Sequence[Prompt], characters: int, name: str) -> tuple[list[Prompt], list[str]]:
    """Prompts of at least so many characters, and a sentence about the others. Raises PlauditError, naming the setting
    that the data come from, if none is left; where that is "", none may be."""

    def length(text: Text) -> int:
        return len(text) if isinstance(text, str) else sum(len(turn["content"]) for turn in text)

    kept = [prompt for prompt in prompts if length(prompt.prompt) >= characters]
    if name and not kept:
        raise PlauditError(f"{name}: every prompt has fewer than {characters} characters: lower min_prompt_characters.")
    dropped = len(prompts) - len(kept)
    told = f"{dropped} of {len(prompts)} prompts have fewer than {characters} characters and are left out."
    return kept, [told] if dropped else []


class Order:
    """An endless sequence of batches of indices below `count`: each epoch a new permutation, each index once in it.

    A pure function of seed and step: nothing needs to be saved to go on in the middle. Batches run across the
    boundary between two epochs, so that none is short.
    """

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self._epoch = -1
        self._permutation: list[int] = []

    def __getitem__(self, step: int) -> list[int]:
        places = range(step * self.batch, (step + 1) * self.batch)
        return [self._permuted(place // self.count)[place % self.count] for place in places]

    def steps(self, epochs: float) -> int:
        """Steps that see the data `epochs` times."""
        return max(1, round(epochs * self.count / self.batch))

    def _permuted(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.count).tolist()
        return self._permutation


def within(
    items: Iterable[R], length: Callable[[R], int], limit: int, what: str, needed: bool = True
) -> tuple[list[R], list[str]]:
    """Items of at most `limit` tokens, and a sentence about the others. Raises PlauditError if none is left of what is
    `needed`."""
    items = list(items)
    kept = [item for item in items if length(item) <= limit]
    if needed and not kept:
        shortest = min(length(item) for item in items)
        raise PlauditError(
            f"every {what} is longer than {limit} tokens (the shortest has {shortest}): raise the limit."
        )
    dropped = len(items) - len(kept)
    return kept, [f"{dropped} of {len(items)} {what}s are longer than {limit} tokens and left out."] if dropped else []
