"""What the server shows of a question and of an answer, and to whom."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from plaudit.errors import PlauditError
from plaudit.feedback.assigning import Assignment
from plaudit.feedback.forms import answer_to_json
from plaudit.feedback.items import Answer, Label


def task(asked: Assignment) -> dict[str, Any]:
    """What a person sees of an item: nothing of models, of gold, or of why it is asked."""
    return {
        "assignment": asked.id,
        "kind": asked.item.kind,
        "prompt": asked.item.prompt,
        "answers": [candidate.text for candidate in asked.shown],
        "count": len(asked.order),
        "lease_seconds": max(0.0, asked.leased_until - time.time()),
        "again": False,
    }


def check_rating(asked: Assignment, given: Mapping[str, Any], ratings: tuple[int, int]) -> None:
    """Raises PlauditError for a rating off the scale. A thumb is 1 or 0, so it fits only where the scale says so."""
    lowest, highest = ratings
    if asked.item.kind != "rate":
        return
    if "thumb" in given and ratings != (0, 1):
        raise PlauditError(f"thumb: this study rates from {lowest} to {highest}.")
    rating = given.get("rating")
    if isinstance(rating, int | float) and not lowest <= rating <= highest:
        raise PlauditError(f"rating: is a number from {lowest} to {highest}.")


def sent(asked: Assignment, answer: Answer, thumbs: bool) -> dict[str, Any]:
    """The inverse of `read_answer`: what was sent, in the order shown."""
    texts = {name: text for name in ("note", "rewrite") if (text := getattr(answer, name))}
    if answer.strength is not None:
        texts["strength"] = answer.strength
    if answer.rating is not None:
        return {**texts, **({"thumb": "up" if answer.rating else "down"} if thumbs else {"rating": answer.rating})}
    if answer.ranks is None:
        return {**texts, "choice": "cant"}
    if asked.item.kind == "compare":
        first, second = answer.ranks
        return {**texts, "choice": "equal" if first == second else "left" if first < second else "right"}
    return {**texts, "tiers": list(answer.ranks)}


def reviewed(label: Label) -> dict[str, Any]:
    """All about an answer, for the manager: here models are named. `order` is empty where it is not known."""
    return {
        "id": label.id,
        "person": label.person,
        "kind": label.item.kind,
        "prompt": label.item.prompt,
        "candidates": [{"text": one.text, "source": dict(one.source)} for one in label.item.candidates],
        "answer": answer_to_json(label.answer),
        "order": list(label.order),
        "answered_at": label.answered_at,
        "ms": label.ms,
        "repeat": label.repeat,
        "gold": label.item.gold is not None,
    }
