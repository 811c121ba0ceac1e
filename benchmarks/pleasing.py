"""A reward that costs nothing and is the same on both sides."""

from __future__ import annotations

from typing import Any


def vowels(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """How many vowels there are, in tens."""
    return [sum(text.count(vowel) for vowel in "aeiou") / 10 for text in completions]
