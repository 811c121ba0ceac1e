"""What each family of algorithms reads, and how that becomes token ids."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from plaudit import data
from plaudit.errors import PlauditError
from plaudit.records import Comparison, Demonstration, Prompt, Ranking, Rating
from plaudit.settings import SFT
from plaudit.settings.common import Training
from plaudit.settings.sampling import Asking

if TYPE_CHECKING:
    from plaudit.algorithms.on_policy import Asked
    from plaudit.templates import Template


def judgement_kind(settings: Training) -> type[Any]:
    """Which of the three ways to judge the data hold, by the columns of their first row."""
    columns = data.columns_of(settings.data, settings.split)
    if "chosen" in columns and "rejected" in columns:
        return Comparison
    if "ranking" in columns:
        return Ranking
    return Rating


def demonstrated(records: list[Demonstration], template: Template) -> list[Any]:
    return [template.encode(record.prompt, record.completion) for record in records]


def cut_texts(settings: SFT, items: list[Any], template: Template) -> list[Any]:
    """Whole texts as windows; with `learn: all`, everything is a whole text."""
    if settings.learn == "all":
        items = [item.learned_whole() for item in items]
    pieces = [item.windows(settings.max_tokens, settings.overlap) if item.whole else [item] for item in items]
    return [piece for several in pieces for piece in several]


def preference_kind(settings: Training) -> type[Any]:
    """As `judgement_kind`; what holds no judgement at all lacks a comparison."""
    kind = judgement_kind(settings)
    judged = {"ratings", "rating", "score", "label"} & data.columns_of(settings.data, settings.split)
    return kind if kind is not Rating or judged else Comparison


def answered(records: list[Any], template: Template) -> list[Any]:
    from plaudit.algorithms.preference import Answers

    items = []
    for record in records:
        if isinstance(record, Comparison):
            texts, targets = [record.chosen, record.rejected], [record.preference, 1 - record.preference]
        elif isinstance(record, Ranking):
            texts, targets = list(record.completions), [float(rank) for rank in record.ranks]
        else:
            texts, targets = [record.completion], list(record.ratings)
        items.append(Answers([template.encode(record.prompt, text) for text in texts], targets))
    return items


def asked_of(records: list[Prompt], template: Template) -> list[Asked]:
    """Prompts with their token ids."""
    from plaudit.algorithms.on_policy import Asked

    return [Asked(record, template.prompt(record.prompt)) for record in records]


def long_enough(settings: Asking, records: list[Prompt], name: str) -> tuple[list[Prompt], list[str]]:
    return data.long_enough(records, settings.min_prompt_characters, name)


def shortened(settings: Any, asked: list[Asked], template: Template) -> list[Asked]:
    """Prompts cut to so many first tokens as `prompt_tokens` draws, and, where `long_prompts` says so, to as many last
    ones as may be read. Raises PlauditError for a conversation, whose end cannot be cut off."""
    if settings.prompt_tokens:
        from numpy.random import default_rng

        counts = default_rng(settings.seed).integers(*settings.prompt_tokens, len(asked), endpoint=True).tolist()
        asked = [item.first(count, template) for item, count in zip(asked, counts, strict=True)]
    if settings.long_prompts == "drop":
        return asked
    return [replace(one, ids=one.ids[-settings.max_prompt_tokens :]) for one in asked]


def judged(records: list[Any], template: Template) -> list[Any]:
    from plaudit.algorithms.reward import Judged

    items = []
    for record in records:
        if isinstance(record, Comparison):
            texts, margin = [record.chosen, record.rejected], record.margin or 0.0
            targets = [[record.preference, margin], [1 - record.preference, -margin]]
        elif isinstance(record, Ranking):
            texts, targets = list(record.completions), [[float(rank)] for rank in record.ranks]
        else:
            texts, targets = [record.completion], [list(record.ratings)]
        ids = template.tokenizer([template.text(record.prompt, text) for text in texts]).input_ids
        items.append(Judged(ids, targets))
    return items


def logged(records: list[Rating], template: Template) -> list[Any]:
    """Rated texts with what each of their tokens earned: the mean rating at the last, unless the data say more."""
    from plaudit.algorithms.ilql import Logged

    items = []
    for record in records:
        text = template.encode(record.prompt, record.completion)
        acted = [place for place, acting in enumerate(text.actions) if acting]
        given = record.columns.get("token_rewards")
        if given is None:
            earned = {acted[-1]: math.fsum(record.ratings) / len(record.ratings)}
        elif len(acted) - len(given) in (0, 1):
            earned = dict(zip(acted, given, strict=False))
        else:
            raise PlauditError(
                f"data: `token_rewards` holds {len(given)} numbers for {record.completion!r:.40}, which the model "
                f"reads as {len(acted) - 1} tokens and its end: give one for each token, the end too if it earned "
                "something."
            )
        rewards = [float(earned.get(place, 0.0)) for place in range(len(text.actions))]
        items.append(Logged(text.prompt, text.completion, text.actions, rewards=rewards))
    return items
