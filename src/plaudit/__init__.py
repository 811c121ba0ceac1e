"""plaudit: reinforcement learning from human feedback.

from plaudit import SFT, Reward, PPO, train

run = train(SFT(model="my-model", data="demonstrations.jsonl"))
print(run.final)  # a folder that `from_pretrained` opens
"""

from typing import TYPE_CHECKING, Any

from plaudit.errors import PlauditError
from plaudit.settings import (
    AOT,
    BCO,
    CISPO,
    CPO,
    DAPO,
    DPO,
    EXO,
    GRPO,
    GSPO,
    ILQL,
    IPO,
    KTO,
    LUSPO,
    NCA,
    ORPO,
    PPO,
    RLOO,
    RRHF,
    SAPO,
    SFT,
    SPPO,
    VESPO,
    VPG,
    AlphaPO,
    APODown,
    APOZero,
    AveragedIPO,
    BestOfN,
    DiscoPOP,
    DrGRPO,
    Evaluate,
    Hinge,
    NormalisedDPO,
    OnlineDPO,
    PairedBCO,
    ReinforcePP,
    Reward,
    RobustDPO,
    Sample,
    SimPO,
    UnpairedAOT,
)

if TYPE_CHECKING:
    from plaudit.inference import evaluate, sample
    from plaudit.recipes import train

__version__ = "0.1.0"
__all__ = [
    "AOT",
    "BCO",
    "CISPO",
    "CPO",
    "DAPO",
    "DPO",
    "EXO",
    "GRPO",
    "GSPO",
    "ILQL",
    "IPO",
    "KTO",
    "LUSPO",
    "NCA",
    "ORPO",
    "PPO",
    "RLOO",
    "RRHF",
    "SAPO",
    "SFT",
    "SPPO",
    "VESPO",
    "VPG",
    "APODown",
    "APOZero",
    "AlphaPO",
    "AveragedIPO",
    "BestOfN",
    "DiscoPOP",
    "DrGRPO",
    "Evaluate",
    "Hinge",
    "NormalisedDPO",
    "OnlineDPO",
    "PairedBCO",
    "PlauditError",
    "ReinforcePP",
    "Reward",
    "RobustDPO",
    "Sample",
    "SimPO",
    "UnpairedAOT",
    "evaluate",
    "sample",
    "train",
]


def __getattr__(name: str) -> Any:
    """The doors load only when somebody goes through them."""
    if name in ("evaluate", "sample"):
        from plaudit import inference

        return getattr(inference, name)
    if name == "train":
        from plaudit import recipes

        return recipes.train
    raise AttributeError(f"module 'plaudit' has no attribute {name!r}")
