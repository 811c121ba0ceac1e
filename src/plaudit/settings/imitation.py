"""Settings of learning by imitation."""

from __future__ import annotations

from dataclasses import dataclass

from plaudit.settings.common import Count, Positive, Training


@dataclass(frozen=True, kw_only=True)
class SFT(Training):
    """Supervised fine-tuning: learn to continue prompts as the demonstrations do."""

    output: str = "runs/sft"
    """Run folder."""
    max_tokens: Count = 1024
    """Longer demonstrations are left out and counted."""
    learning_rate: Positive = 2e-5
    """Peak learning rate of AdamW."""
    dropout: bool = False
    """Keep the model's own dropout on while training."""
