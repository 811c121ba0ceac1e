"""Settings of sampling, alone and inside the algorithms that sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from plaudit.settings.common import Common, Count, CountOrNone, NotNegative
from plaudit.settings.rewards import SeveralSources


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Which prompts of the data are asked, and how much of each."""

    min_prompt_characters: CountOrNone = 0
    """Prompts of fewer characters are left out and counted."""
    prompt_tokens: tuple[int, ...] = ()
    """Cut each prompt to its first tokens; how many is drawn by the seed between these two numbers, both included."""

    def __post_init__(self) -> None:
        given = list(self.prompt_tokens)
        if given and not (len(given) == 2 and min(given) >= 1):
            raise ValueError(f"`prompt_tokens` is {given}: give two numbers of tokens, as in [2, 7].")
        if given != sorted(given):
            raise ValueError(f"`prompt_tokens` is {given}: give the smaller number first.")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn."""

    max_prompt_tokens: Count = 512
    """Longer prompts are left out and counted, or cut."""
    long_prompts: Literal["drop", "cut"] = "drop"
    """Leave longer prompts out, or read only their last tokens; rewards see the whole prompt."""
    max_new_tokens: Count = 64
    """Limit of a completion."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Divides the logits, in sampling and in every log-probability."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the end token always does."""


@dataclass(frozen=True, kw_only=True)
class Sample(Asking, Sampling, Common):
    """Completions of prompts, into JSON lines or the terminal."""

    data: str | tuple[str, ...] | None = None
    """Prompts; without them the terminal asks for one after the other."""
    output: str = "samples.jsonl"
    """JSON lines with `prompt`, `completion`, `truncated`."""
    n: Count = 1
    """Completions of each prompt."""
    best_of: SeveralSources = ()
    """Rewards, as algorithms take them: only the best of the `n` completions is kept, with its `score`, their sum."""
    limit: CountOrNone = 0
    """Only the first so many prompts; 0 takes all."""
    temperature: NotNegative = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: CountOrNone = 0
    """Draw among the k likeliest tokens only; 0 draws among all."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Draw among the likeliest tokens that hold this probability together."""
    ilql_beta: NotNegative = 0.0
    """Add so much of Q - V to the log-probabilities of a model that `plaudit ilql` made; 0 samples it as it is."""
    rows: Annotated[int, Ge(1)] = 64
    """Completions that are sampled side by side."""
