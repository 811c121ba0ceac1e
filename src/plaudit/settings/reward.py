"""Settings of reward models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt

from plaudit.settings.common import Count, NotNegative, Positive, Training


@dataclass(frozen=True, kw_only=True)
class Reward(Training):
    """A reward model from comparisons, rankings or ratings."""

    output: str = "runs/reward"
    """Run folder."""
    max_tokens: Count = 1024
    """Longer texts are left out and counted."""
    learning_rate: Positive = 1e-5
    """Peak learning rate of AdamW."""
    noise: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of answers assumed to be given at random (Christiano et al. 2017 take 0.1)."""
    centering: NotNegative = 0.0
    """Weight of the mean squared score, which keeps scores near zero."""
    minimum_gap: NotNegative = 0.0
    """Ratings whose means differ by less make no pair."""
    report_gap: NotNegative = 1.0
    """Held-out accuracy on ratings counts the pairs whose means differ by at least this."""
    dropout: bool = False
    """Keep the model's own dropout on while training."""
