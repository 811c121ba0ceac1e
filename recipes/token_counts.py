"""Pieces of a text, each rated by how often a letter occurs in it: what a reward model learns to count from.

python recipes/token_counts.py input.txt [--letter h] [--sizes 8 16 32 64 256] [--overlaps 0 0 0 8 64] [--output counts]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from plaudit.records import Rating, write

SIZES, OVERLAPS, MOST = (8, 16, 32, 64, 256), (0, 0, 0, 8, 64), 100


def lines_of(text: str) -> list[str]:
    """The lines that say something, each closed by a line break."""
    return [line.strip() + "\n" for line in text.splitlines() if line.strip()]


def pieces(lines: Sequence[str], sizes: Sequence[int], overlaps: Sequence[int]) -> list[str]:
    """The text in pieces of each size in turn, each piece beginning with the last `overlap` characters of the one
    before it; without sizes, its lines. The last piece of a size may be shorter. One overlap serves all sizes.

    Raises ValueError where an overlap leaves a piece nothing new, or their number fits neither one nor the sizes.
    """
    if not sizes:
        return list(lines)
    several = list(overlaps) * len(sizes) if len(overlaps) == 1 else overlaps
    text = "".join(lines)
    found = []
    for size, overlap in zip(sizes, several, strict=True):
        if not 0 <= overlap < size:
            raise ValueError(f"an overlap of {overlap} leaves pieces of {size} nothing new.")
        found += [text[i : i + size] for i in range(0, max(len(text) - overlap, 1), size - overlap)]
    return found


def rated(texts: Iterable[str], letter: str) -> list[Rating]:
    """Each text with its count, at most 100, as its rating: what the reward `count:LETTER` gives."""
    return [Rating("", text, (float(min(text.count(letter), MOST)),)) for text in texts]


def make(
    text: str, letter: str, sizes: Sequence[int] = SIZES, overlaps: Sequence[int] = OVERLAPS, holdout: float = 0.1
) -> tuple[list[Rating], list[Rating]]:
    """(training, held out): the end of the text is held out before anything is cut, so that no part of it is in a
    training piece of another size."""
    lines = lines_of(text)
    cut = len(lines) - round(holdout * len(lines))
    training, held = (rated(pieces(part, sizes, overlaps), letter) for part in (lines[:cut], lines[cut:]))
    for records in (training, held):
        random.Random(0).shuffle(records)  # or the first held-out rows, those that are looked at, were of one size
    return training, held


def main() -> None:
    """Writes train.jsonl and heldout.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--letter", default="h")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--overlaps", type=int, nargs="+", default=OVERLAPS)
    parser.add_argument("--holdout", type=float, default=0.1)
    parser.add_argument("--output", type=Path, default=Path("counts"))
    given = parser.parse_args()
    parts = make(given.text.read_text("utf-8"), given.letter, given.sizes, given.overlaps, given.holdout)
    given.output.mkdir(parents=True, exist_ok=True)
    for name, records in zip(("train", "heldout"), parts, strict=True):
        write(given.output / f"{name}.jsonl", records)
        print(f"{given.output / name}.jsonl: {len(records)} pieces")


if __name__ == "__main__":
    main()
