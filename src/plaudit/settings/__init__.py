"""What a run can be told: one flat frozen dataclass for each verb, defaults being the vetted values."""

from plaudit.settings.benchmark import Bench
from plaudit.settings.evaluation import Evaluate
from plaudit.settings.feedback import Agreement, Annotate, Compare, Export, Import, Label, Loop
from plaudit.settings.imitation import SFT
from plaudit.settings.offline import ILQL
from plaudit.settings.online import BestOfN, OnlineDPO
from plaudit.settings.policy_gradient import CISPO, DAPO, GRPO, GSPO, PPO, RLOO, VPG, DrGRPO, ReinforcePP
from plaudit.settings.preference import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    KTO,
    NCA,
    ORPO,
    RRHF,
    SPPO,
    APODown,
    APOZero,
    AveragedIPO,
    DiscoPOP,
    Hinge,
    RobustDPO,
    SimPO,
)
from plaudit.settings.pulling import Pull
from plaudit.settings.reward import Reward
from plaudit.settings.sampling import Sample

FAMILIES: dict[str, dict[str, type]] = {
    "Imitation": {"sft": SFT},
    "Reward models": {"reward": Reward},
    "Direct preference": {
        "dpo": DPO,
        "robust_dpo": RobustDPO,
        "ipo": IPO,
        "ipo_avg": AveragedIPO,
        "hinge": Hinge,
        "exo": EXO,
        "nca": NCA,
        "sppo": SPPO,
        "aot": AOT,
        "apo_zero": APOZero,
        "apo_down": APODown,
        "discopop": DiscoPOP,
        "rrhf": RRHF,
        "cpo": CPO,
        "simpo": SimPO,
        "orpo": ORPO,
        "kto": KTO,
        "bco": BCO,
    },
    "Policy gradient": {
        "ppo": PPO,
        "vpg": VPG,
        "rloo": RLOO,
        "reinforce_pp": ReinforcePP,
        "grpo": GRPO,
        "dr_grpo": DrGRPO,
        "dapo": DAPO,
        "gspo": GSPO,
        "cispo": CISPO,
    },
    "Online preference and search": {"online_dpo": OnlineDPO, "best_of_n": BestOfN},
    "Offline RL": {"ilql": ILQL},
    "People": {
        "label": Label,
        "compare": Compare,
        "agreement": Agreement,
        "annotate": Annotate,
        "export": Export,
        "import": Import,
    },
    "Models and data": {"pull": Pull, "sample": Sample, "evaluate": Evaluate, "bench": Bench},
}
"""The verbs that take settings, by family, in the order in which a newcomer meets them."""

VERBS: dict[str, type] = {verb: settings for family in FAMILIES.values() for verb, settings in family.items()}

__all__ = [
    "AOT",
    "BCO",
    "CISPO",
    "CPO",
    "DAPO",
    "DPO",
    "EXO",
    "FAMILIES",
    "GRPO",
    "GSPO",
    "ILQL",
    "IPO",
    "KTO",
    "NCA",
    "ORPO",
    "PPO",
    "RLOO",
    "RRHF",
    "SFT",
    "SPPO",
    "VERBS",
    "VPG",
    "APODown",
    "APOZero",
    "Agreement",
    "Annotate",
    "AveragedIPO",
    "Bench",
    "BestOfN",
    "Compare",
    "DiscoPOP",
    "DrGRPO",
    "Evaluate",
    "Export",
    "Hinge",
    "Import",
    "Label",
    "Loop",
    "OnlineDPO",
    "Pull",
    "ReinforcePP",
    "Reward",
    "RobustDPO",
    "Sample",
    "SimPO",
]
