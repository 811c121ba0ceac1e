"""Settings of where rewards come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from plaudit.settings.common import NotNegative


class OrFunction:
    """Marks a text that names a reward: from Python it may be the function itself."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        def checked(value: Any, as_text: Any) -> Any:
            return value if callable(value) else as_text(value)

        return core_schema.no_info_wrap_validator_function(checked, handler(source))


if TYPE_CHECKING:
    RewardSource = str | Callable[..., Sequence[float | None]]
    SeveralSources = Sequence[RewardSource]
else:
    RewardSource = Annotated[str, OrFunction()]
    SeveralSources = tuple[RewardSource, ...]


@dataclass(frozen=True, kw_only=True)
class RewardSources:
    """What completions are rewarded with: a weighted sum of text-level sources."""

    rewards: RewardSource | SeveralSources
    """Each a reward model folder or Hub name, `file.py:function` called as (prompts, completions, **columns) ->
    list[float], `label:POSITIVE@MODEL` for a classifier's probability of a label, `count:WORD`, or
    `ensemble:RULE@FOLDER` of reward models, RULE being `mean`, `minimum` or `mean-1std`. NaN or None from a source
    means that it does not apply to that completion, and leaves it out of the sum."""
    reward_weights: tuple[float, ...] = ()
    """One weight for each source; by default all 1."""


@dataclass(frozen=True, kw_only=True)
class ShapedRewards(RewardSources):
    """What is done to rewards before anything is learned from them."""

    reward_normalise: bool = False
    """Divide rewards by their running standard deviation, after taking off their running mean."""
    reward_scale: bool = False
    """Divide rewards by their running standard deviation, and leave their mean where it is."""
    reward_moments: Literal["running", "first"] = "running"
    """Whose mean and standard deviation these are: of all rewards so far, or of the first rollout's, before the policy
    has moved."""
    reward_clip: NotNegative = 0.0
    """Rewards are cut to plus or minus this, after that; 0 leaves them."""
