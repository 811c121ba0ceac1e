"""Settings of learning from logged texts and what they earned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Le, Lt

from plaudit.settings.common import Count, NotNegative, Positive, Share, Training


@dataclass(frozen=True, kw_only=True)
class ILQL(Training):
    """Implicit language Q-learning: how much each token is worth, learned from rated texts alone."""

    output: str = "runs/ilql"
    """Run folder."""
    max_tokens: Count = 1024
    """Longer texts are left out and counted."""
    learning_rate: Positive = 2e-5
    """Peak learning rate of AdamW."""
    value_learning_rate: NotNegative = 1e-3
    """Learning rate of the Q and V heads, which begin at zero; 0 takes the policy's."""
    gamma: Share = 0.99
    """Discount."""
    expectile: Annotated[float, Gt(0), Lt(1)] = 0.7
    """Which expectile of Q over the logged tokens V is: 0.5 their mean, near 1 their best."""
    polyak: Annotated[float, Gt(0), Le(1)] = 0.005
    """Share of the Q heads that the target heads take over; 1 copies them."""
    target_every: Count = 1
    """Steps after each of which they do so."""
    cql: NotNegative = 0.1
    """Weight of the term that keeps Q low for tokens that nobody wrote."""
    awac: NotNegative = 1.0
    """Weight of imitating the logged tokens, which gives the policy that decoding tilts."""
    awac_beta: NotNegative = 0.0
    """Imitate a token exp(awac_beta * advantage) times as much; 0 imitates all alike."""
    reward_normalise: bool = True
    """Take the mean return of the data off each text's last reward, and divide all rewards by the returns'
    standard deviation."""
