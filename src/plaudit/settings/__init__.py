"""What a run can be told: one flat frozen dataclass for each verb, defaults being the vetted values."""

from plaudit.settings.evaluation import Evaluate
from plaudit.settings.imitation import SFT
from plaudit.settings.policy_gradient import PPO
from plaudit.settings.pulling import Pull
from plaudit.settings.reward import Reward
from plaudit.settings.sampling import Sample

FAMILIES: dict[str, dict[str, type]] = {
    "Imitation": {"sft": SFT},
    "Reward models": {"reward": Reward},
    "Policy gradient": {"ppo": PPO},
    "Models and data": {"pull": Pull, "sample": Sample, "evaluate": Evaluate},
}
"""The verbs that take settings, by family, in the order in which a newcomer meets them."""

VERBS: dict[str, type] = {verb: settings for family in FAMILIES.values() for verb, settings in family.items()}

__all__ = ["FAMILIES", "PPO", "SFT", "VERBS", "Evaluate", "Pull", "Reward", "Sample"]
