"""Settings of measuring what a machine reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from plaudit.settings.common import Count, CountOrNone, Positive, Precision


@dataclass(frozen=True, kw_only=True)
class Bench:
    """How fast this machine trains and decodes, and how near that is to what its processor and its memory allow."""

    model: str = "smollm2-135m-instruct"
    """Hugging Face folder or Hub name of a causal language model; `smollm2-135m-instruct` is pulled from the package
    index."""
    output: str | None = None
    """Also write what was found into this file, as JSON."""
    rows: Count = 8
    """Texts of a training step."""
    tokens: Annotated[int, Ge(2)] = 256
    """Tokens of each text, if the model reads so many."""
    new_tokens: Count = 64
    """Tokens that are decoded after each prompt of 32, if the model has room for them."""
    seconds: Positive = 2.0
    """Each measurement is repeated for so long, and made twice at least."""
    precision: Precision = "auto"
    """bfloat16 autocast over float32 weights, or float32; auto takes bfloat16 where the machine is faster in it."""
    device: str | None = None
    """cuda, mps or cpu; by default the first that is found."""
    threads: CountOrNone = 0
    """CPU threads; 0 leaves PyTorch's choice."""
    seed: Annotated[int, Ge(0)] = 0
    """Seeds the tokens, which are random."""
