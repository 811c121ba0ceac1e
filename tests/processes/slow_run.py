"""The command line, slowed down and telling what it is doing, so that a test can break in at that moment."""

import os
import sys
import time
from typing import Any

import torch

from plaudit import cli
from plaudit.algorithms.ppo import ProximalPolicyOptimisation
from plaudit.rewards import Rewards


def slowly(owner: type, name: str, what: str, seconds: float) -> None:
    function = getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        print(what, flush=True)
        time.sleep(seconds)
        return function(*args, **kwargs)

    setattr(owner, name, slow)


torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # a kill loses nothing that was written; only a power cut would
slowly(ProximalPolicyOptimisation, "loss", "step", 0.02)
slowly(Rewards, "each", "rollout", 0.1)
sys.exit(cli.main(sys.argv[1:]))
