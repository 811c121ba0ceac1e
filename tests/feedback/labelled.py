"""Labels made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plaudit.feedback.items import Answer, Candidate, Item, Kind, Label


def item(
    name: str, kind: Kind = "compare", texts: Sequence[str] = (" Yes.", " No."), models: Sequence[str] = (), **more: Any
) -> Item:
    sources = [{"model": model} for model in models] or [{} for _ in texts]
    return Item(kind, name, tuple(Candidate(t, s) for t, s in zip(texts, sources, strict=True)), **more)


def label(asked: Item, person: str, answer: Answer, order: Sequence[int] = (), ms: int = 0, repeat: int = 0) -> Label:
    name = f"{asked.id}-{person}-{repeat}"
    return Label(name, asked, person, answer, tuple(order), 0.0, ms / 1000, ms, repeat)


CHOICES: dict[str, tuple[int, ...] | None] = {"1": (1, 2), "2": (2, 1), "=": (1, 1), "?": None}


def compared(answers: Mapping[str, str], **more: Any) -> list[Label]:
    """{"ann": "12=?"}: what each person says of item 0, 1, 2, 3; a space where nothing was said."""
    found = []
    for person, said in answers.items():
        for place, choice in enumerate(said):
            if choice != " ":
                found.append(label(item(f"Item {place}", **more), person, Answer(CHOICES[choice])))
    return found


def rated(columns: Sequence[Sequence[float | None]]) -> list[Label]:
    """(people, items) of ratings, None where there is none."""
    return [
        label(item(f"Item {place}", "rate", (" Yes.",)), f"person {number}", Answer(rating=float(rating)))
        for number, row in enumerate(columns)
        for place, rating in enumerate(row)
        if rating is not None
    ]


def ranked(rankings: Mapping[str, Sequence[Sequence[int]]]) -> list[Label]:
    """{"ann": [(1, 2, 3), ...]}: the ranks that each person gives on item 0, 1, ..."""
    texts = [" One.", " Two.", " Three.", " Four.", " Five."]
    return [
        label(item(f"Item {place}", "rank", texts[: len(ranks)]), person, Answer(tuple(ranks)))
        for person, several in rankings.items()
        for place, ranks in enumerate(several)
    ]
