"""Settings of learning from preferences among one's own samples, and of keeping the best of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Lt

from plaudit.settings.common import Count, Positive
from plaudit.settings.policy_gradient import Held, OnPolicy, Several


@dataclass(frozen=True, kw_only=True)
class FromOwnPairs(Held):
    """What algorithms take that make pairs of their own samples: the reward picks the best and the worst of several."""

    group: Several = 2
    """Completions of each prompt, of which the best and the worst make a pair."""
    beta: Positive = 0.1
    """How firmly the policy is held to the reference."""
    reference: str = ""
    """Model that the policy is held to; by default `model`, as it is in the beginning."""


@dataclass(frozen=True, kw_only=True)
class OnlineDPO(FromOwnPairs):
    """Online DPO: the reward picks the best and the worst of several completions, and DPO learns from the pair."""

    verb: ClassVar[str] = "online_dpo"
    output: str = "runs/online_dpo"
    """Run folder."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """Share of the pairs that the reward is assumed to order wrongly."""


@dataclass(frozen=True, kw_only=True)
class OnlineIPO(FromOwnPairs):
    """Online IPO: as online DPO, with IPO's loss, which stops at a margin."""

    verb: ClassVar[str] = "online_ipo"
    output: str = "runs/online_ipo"
    """Run folder."""
    beta: Positive = 0.1
    """IPO's tau: the margin that is aimed at is 1 / (2 beta) nats a pair."""


@dataclass(frozen=True, kw_only=True)
class BestOfN(OnPolicy):
    """Rejection-sampling fine-tuning: imitate the best of several completions of each prompt."""

    verb: ClassVar[str] = "best_of_n"
    output: str = "runs/best_of_n"
    """Run folder."""
    group: Several = 8
    """Completions of each prompt, of which the best is imitated."""
    rollout: Count = 128
    """Completions that are sampled before the policy moves, over all processes."""
    batch_size: Count = 128
    """Completions that one optimizer step is taken from, over all processes; it sees the best of each group."""
