"""An independent judge of movie reviews: rules and a lexicon that no model here was trained on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from plaudit.errors import PlauditError


@functools.cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise PlauditError("judge: the package vaderSentiment is missing: run `pip install vaderSentiment`.") from error
    return SentimentIntensityAnalyzer()


def vader(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """VADER's compound sentiment of prompt + completion, from -1 to 1 (Hutto and Gilbert, ICWSM 2014)."""
    analyser = _analyser()
    return [
        float(analyser.polarity_scores(prompt + completion)["compound"])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
