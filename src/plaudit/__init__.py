"""plaudit: reinforcement learning from human feedback.

from plaudit import SFT, Reward, PPO, train

run = train(SFT(model="my-model", data="demonstrations.jsonl"))
print(run.final)  # a folder that `from_pretrained` opens
"""

from importlib import import_module
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
    GDPO,
    GMPO,
    GRPO,
    GSPO,
    ILQL,
    IPO,
    KTO,
    LUSPO,
    MPO,
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
    WPO,
    Agreement,
    AlphaPO,
    Annotate,
    APODown,
    APOZero,
    AveragedIPO,
    BestOfN,
    Compare,
    DiscoPOP,
    DivergenceDPO,
    DrGRPO,
    Evaluate,
    Export,
    Hinge,
    Import,
    Label,
    LengthDesensitisedDPO,
    LitePPO,
    Loop,
    NormalisedDPO,
    OnlineDPO,
    OnlineIPO,
    PairedBCO,
    ReferenceFreeIPO,
    ReinforcePP,
    Reward,
    RobustDPO,
    Sample,
    SimPO,
    SLiC,
    UnpairedAOT,
    UnpairedAPOZero,
)

if TYPE_CHECKING:
    from plaudit.feedback.exchange import export, take_in
    from plaudit.inference import evaluate, sample
    from plaudit.labelling import label
    from plaudit.looping import loop
    from plaudit.people import agreement, annotate
    from plaudit.recipes import train
    from plaudit.versus import compare

__version__ = "0.1.0"
__all__ = [
    "AOT",
    "BCO",
    "CISPO",
    "CPO",
    "DAPO",
    "DPO",
    "EXO",
    "GDPO",
    "GMPO",
    "GRPO",
    "GSPO",
    "ILQL",
    "IPO",
    "KTO",
    "LUSPO",
    "MPO",
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
    "WPO",
    "APODown",
    "APOZero",
    "Agreement",
    "AlphaPO",
    "Annotate",
    "AveragedIPO",
    "BestOfN",
    "Compare",
    "DiscoPOP",
    "DivergenceDPO",
    "DrGRPO",
    "Evaluate",
    "Export",
    "Hinge",
    "Import",
    "Label",
    "LengthDesensitisedDPO",
    "LitePPO",
    "Loop",
    "NormalisedDPO",
    "OnlineDPO",
    "OnlineIPO",
    "PairedBCO",
    "PlauditError",
    "ReferenceFreeIPO",
    "ReinforcePP",
    "Reward",
    "RobustDPO",
    "SLiC",
    "Sample",
    "SimPO",
    "UnpairedAOT",
    "UnpairedAPOZero",
    "agreement",
    "annotate",
    "compare",
    "evaluate",
    "export",
    "label",
    "loop",
    "sample",
    "take_in",
    "train",
]


_DOORS = {
    "agreement": "people",
    "annotate": "people",
    "compare": "versus",
    "evaluate": "inference",
    "export": "feedback.exchange",
    "label": "labelling",
    "loop": "looping",
    "sample": "inference",
    "take_in": "feedback.exchange",
    "train": "recipes",
}
"""Where the functions are that are told what to do by settings."""


def __getattr__(name: str) -> Any:
    """The doors load only when somebody goes through them."""
    if name not in _DOORS:
        raise AttributeError(f"module 'plaudit' has no attribute {name!r}")
    return getattr(import_module(f"plaudit.{_DOORS[name]}"), name)
