"""Settings of where rewards come from."""

from __future__ import annotations

from dataclasses import dataclass

from plaudit.settings.common import NotNegative


@dataclass(frozen=True, kw_only=True)
class RewardSources:
    """What completions are rewarded with: a weighted sum of text-level sources."""

    rewards: str | tuple[str, ...]
    """Each a reward model folder or Hub name, `file.py:function` called as (prompts, completions, **columns) ->
    list[float], `label:POSITIVE@MODEL` for a classifier's probability of a label, or `count:WORD`."""
    reward_weights: tuple[float, ...] = ()
    """One weight for each source; by default all 1."""
    reward_clip: NotNegative = 0.0
    """Rewards are cut to plus or minus this; 0 leaves them."""
    reward_normalise: bool = False
    """Divide rewards by their running standard deviation, after taking off their running mean."""
