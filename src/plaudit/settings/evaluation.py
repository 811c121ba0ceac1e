"""Settings of comparing policies."""

from __future__ import annotations

from dataclasses import dataclass

from plaudit.settings.common import Common, Count, NotNegative
from plaudit.settings.rewards import RewardSource, RewardSources
from plaudit.settings.sampling import Asking, Sampling


@dataclass(frozen=True, kw_only=True)
class Evaluate(Asking, Sampling, RewardSources, Common):
    """Two or more policies on the same prompts: reward, independent judge, win rate, KL, diversity, fluency."""

    model: str = ""
    """The reference: KL and perplexity are measured under it; by default the first of `policies`."""
    policies: tuple[str, ...]
    """`name=folder` of each policy; the first is the one that the others are compared with."""
    output: str = "runs/evaluate"
    """Run folder."""
    judge: RewardSource | None = None
    """An independent judge, given as a reward is; by default the reward judges."""
    judge_positive: float = 0.0
    """A completion is counted as positive when the judge gives more than this."""
    ilql_beta: NotNegative = 0.0
    """Add so much of Q - V to the log-probabilities of those policies that `plaudit ilql` made."""
    prompts: Count = 200
    """Prompts to sample from."""
    rows: Count = 64
    """Completions that are sampled side by side."""
    shown: Count = 10
    """Samples that the report shows side by side."""
