"""plaudit's command line on models that are sharded over the processes of a CPU, where accelerate itself shards none.

A launcher starts it as `sharded.py FOLDER WORDS...`; each process notes in FOLDER/rank-N.json, a line for each batch
that went through the model, how many passes that took and how many of them were repeats for the others' sake."""

import json
import os
import sys
from pathlib import Path

import accelerate
import torch
from accelerate.state import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

from plaudit import cli
from plaudit.algorithms.base import Algorithm

PLAIN, PASSES = accelerate.Accelerator, Algorithm.passes


def sharding(**options):
    accelerator = PLAIN(**options)
    # Whoever asks for the state anew is given what stands in the first.
    for state in (PartialState._shared_state, accelerator.state.__dict__):
        state["distributed_type"] = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=True
    )
    return accelerator


def counted(algorithm, batch):
    parts = PASSES(algorithm, batch)
    with Path(sys.argv[1], f"rank-{algorithm.world.rank}.json").open("a") as file:
        file.write(json.dumps([len(parts), sum(places is None for _, places in parts)]) + "\n")
    return parts


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerate.Accelerator, Algorithm.passes = sharding, counted
    code = cli.main(sys.argv[2:])
    sys.stdout.flush()
    os._exit(code)
