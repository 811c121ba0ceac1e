"""What people are asked and what they answer.

An `Item` is a prompt with one to nine candidates; an `Answer` says what somebody thinks of them, always in the item's
own order of candidates, whatever order was shown; a `Label` is an answer with everything about how it was given.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from plaudit.errors import PlauditError
from plaudit.rows import Text

Kind = Literal["compare", "rank", "rate"]
KINDS: tuple[Kind, ...] = ("compare", "rank", "rate")
MOST = 9
"""Candidates that one item may have: as many as there are number keys."""
STRENGTHS = (1, 2, 3)
"""How much better the better one is: slightly, clearly, much."""
LONGEST_NOTE = 10_000


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer to judge; `source` (model, checkpoint, sampling) is kept and never shown to who judges."""

    text: Text
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a person thinks of an item's candidates, in the item's order.

    `ranks` (compare and rank): 1 is the best, ties share a rank, none is left out between ranks; None if the person
    could not compare. `rating` (rate): a number, a thumb being 1.0 or 0.0. `strength`: how much better the best is.
    `rewrite`: the answer that should have been given, which becomes a demonstration.
    """

    ranks: tuple[int, ...] | None = None
    rating: float | None = None
    strength: int | None = None
    note: str = ""
    rewrite: str = ""

    @property
    def comparable(self) -> bool:
        """Whether anything was decided; what could not be compared never enters the data."""
        return self.ranks is not None or self.rating is not None

    def reordered(self, order: Sequence[int]) -> Answer:
        """The same answer where `order[i]` is now at place i: from the item's order to the order shown."""
        return self if self.ranks is None else replace(self, ranks=tuple(self.ranks[place] for place in order))

    def restored(self, order: Sequence[int]) -> Answer:
        """The inverse of `reordered`: from the order shown to the item's."""
        if self.ranks is None:
            return self
        ranks = dict(zip(order, self.ranks, strict=True))
        return replace(self, ranks=tuple(ranks[place] for place in range(len(order))))


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to ask: two candidates to compare, two to nine to rank, or one to rate.

    `query` says how it came to be asked (method, propensity, round); `gold` is the known right answer of an item that
    checks who answers; `columns` are the data's own.
    """

    kind: Kind
    prompt: Text
    candidates: tuple[Candidate, ...]
    query: Mapping[str, Any] = field(default_factory=dict)
    gold: Answer | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The same for the same question: kind, prompt, texts and sources; 16 hexadecimal digits."""
        asked = [self.kind, self.prompt, [[candidate.text, dict(candidate.source)] for candidate in self.candidates]]
        return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Label:
    """An answer that stands (not undone). `order[i]` is the candidate that was shown at place i, and empty where
    that is not known; times are seconds since 1970 (UTC); `ms` is the time it took to answer; `repeat` counts earlier
    times this person was asked the same."""

    id: str
    item: Item
    person: str
    answer: Answer
    order: tuple[int, ...]
    shown_at: float
    answered_at: float
    ms: int
    repeat: int = 0


def read_answer(kind: Kind, count: int, given: Mapping[str, Any]) -> Answer:
    """The answer in what a page or a program sends, still in the order shown.

    compare: {"choice": "left" | "right" | "equal" | "cant"}; rank: {"tiers": [1, 2, 2]} (dense, 1 is the best, by
    place shown) or {"choice": "cant"}; rate: {"rating": number} or {"thumb": "up" | "down"}; each with `strength`,
    `note` and `rewrite` if wanted. Raises PlauditError, naming the field.
    """
    unknown = set(given) - {"choice", "tiers", "rating", "thumb", "strength", "note", "rewrite"}
    if unknown:
        raise PlauditError(f"answer: there is no field {min(unknown)!r:.60}.")
    ranks, rating = _judged(kind, count, given)
    strength = given.get("strength")
    if strength is not None and (type(strength) is not int or strength not in STRENGTHS):
        raise PlauditError(f"strength: is 1, 2 or 3, not {strength!r:.60}.")
    if strength is not None and (ranks is None or len(set(ranks)) == 1):
        raise PlauditError("strength: nothing was found better here; leave it out.")
    texts = {name: given.get(name, "") for name in ("note", "rewrite")}
    for name, text in texts.items():
        if not isinstance(text, str) or len(text) > LONGEST_NOTE:
            raise PlauditError(f"{name}: is a text of at most {LONGEST_NOTE} characters.")
    return Answer(ranks, rating, strength, **texts)


_CHOICES: dict[str, tuple[int, ...] | None] = {"left": (1, 2), "right": (2, 1), "equal": (1, 1), "cant": None}


def _judged(kind: Kind, count: int, given: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, float | None]:
    """(ranks, rating), one of them None."""
    if kind == "rate":
        if given.get("thumb") in ("up", "down"):
            return None, float(given["thumb"] == "up")
        rating = given.get("rating")
        if isinstance(rating, bool) or not isinstance(rating, int | float) or not abs(rating) <= sys.float_info.max:
            raise PlauditError("rating: an answer to this needs a number, or a thumb that is up or down.")
        return None, float(rating)
    choice = given.get("choice")
    if kind == "compare" and choice in _CHOICES:
        return _CHOICES[choice], None
    if kind == "compare":
        raise PlauditError("choice: an answer to this is left, right, equal or cant.")
    if choice == "cant":
        return None, None
    tiers = given.get("tiers")
    if not isinstance(tiers, list) or len(tiers) != count or not all(type(tier) is int for tier in tiers):
        raise PlauditError(f"tiers: an answer to this is a list of {count} whole numbers, or the choice cant.")
    if not dense(tiers):
        raise PlauditError("tiers: the best has 1, the next 2, and none is left out between.")
    return tuple(tiers), None


def dense(ranks: Sequence[int]) -> bool:
    """Whether ranks start at 1 and leave none out between; however large they are, without counting up to them."""
    return sorted(set(ranks)) == list(range(1, len(set(ranks)) + 1))


def in_words(answer: Answer) -> str:
    """ "B > A = C", best first; a number; or that nothing could be compared."""
    if answer.rating is not None:
        return f"{answer.rating:g}"
    if answer.ranks is None:
        return "can't compare"
    tiers: dict[int, list[str]] = {}
    for place, rank in enumerate(answer.ranks):
        tiers.setdefault(rank, []).append(chr(ord("A") + place))
    return " > ".join(" = ".join(tiers[rank]) for rank in sorted(tiers))


def check_item(item: Item, where: str) -> None:
    """Raises PlauditError unless so many candidates can be asked of in this kind."""
    needed = {"compare": (2, 2), "rank": (2, MOST), "rate": (1, 1)}[item.kind]
    if not needed[0] <= len(item.candidates) <= needed[1]:
        wanted = f"{needed[0]} to {needed[1]}" if needed[0] != needed[1] else str(needed[0])
        raise PlauditError(f"{where}: to {item.kind} needs {wanted} candidates, but there are {len(item.candidates)}.")
