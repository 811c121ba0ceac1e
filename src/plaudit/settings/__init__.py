"""What a run can be told: one flat frozen dataclass for each verb, defaults being the vetted values."""

from plaudit.settings.evaluation import Evaluate
from plaudit.settings.imitation import SFT
from plaudit.settings.policy_gradient import PPO
from plaudit.settings.pulling import Pull
from plaudit.settings.reward import Reward
from plaudit.settings.sampling import Sample

VERBS: dict[str, type] = {
    "pull": Pull,
    "sft": SFT,
    "reward": Reward,
    "ppo": PPO,
    "evaluate": Evaluate,
    "sample": Sample,
}
"""The verbs that take settings, in the order in which a newcomer meets them."""


__all__ = ["PPO", "SFT", "VERBS", "Evaluate", "Pull", "Reward", "Sample"]
