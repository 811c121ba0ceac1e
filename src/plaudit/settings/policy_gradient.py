"""Settings of algorithms that sample, score and reinforce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Le

from plaudit.settings.common import Count, NotNegative, Share, Training
from plaudit.settings.rewards import RewardSources
from plaudit.settings.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class OnPolicy(Sampling, RewardSources, Training):
    """What every algorithm that learns from its own samples takes."""

    eval_limit: Count = 64
    """At most so many held-out prompts are completed at an evaluation."""
    rollout: Count = 64
    """Completions that are sampled before the policy moves, over all processes."""
    group: Count = 1
    """Completions of each prompt."""
    missing_end_penalty: NotNegative = 0.0
    """Taken off the reward of completions that were cut at the limit."""
    kl: NotNegative = 0.05
    """Weight of the KL divergence from the reference, in reward per nat; where it is adaptive, its first value."""
    kl_target: NotNegative = 0.0
    """Adapt the weight so that this many nats per completion are held (Ziegler et al. 2019); 0 keeps it fixed."""
    kl_horizon: Count = 10000
    """Completions over which the weight adapts."""


@dataclass(frozen=True, kw_only=True)
class PPO(OnPolicy):
    """Proximal policy optimisation with a value head and a KL penalty."""

    output: str = "runs/ppo"
    """Run folder."""
    batch_size: Count = 32
    """Completions that one optimizer step sees, over all processes."""
    reuse: Count = 2
    """Epochs over each rollout."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up."""
    gamma: Share = 1.0
    """Discount."""
    lam: Share = 0.95
    """GAE's trade of bias against variance."""
    clip: Annotated[float, Gt(0), Le(1)] = 0.2
    """Probability ratios beyond 1 +- clip earn nothing."""
    value_clip: NotNegative = 0.2
    """Values that move further than this in one rollout earn nothing; 0 lets them."""
    value_weight: NotNegative = 0.1
    """Weight of the value loss."""
    value_learning_rate: NotNegative = 0.0
    """Learning rate of the value head; 0 takes the policy's."""
    whiten_advantages: bool = True
    """Standardise advantages over the rollout."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation."""
    target_kl: NotNegative = 0.0
    """Leave the rest of a rollout when the policy is so far from the one that sampled it, in nats a token; 0: never."""
