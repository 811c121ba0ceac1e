"""Forks processes that save in a loop, kills them at random moments, and prints as JSON what is found afterwards."""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from plaudit.checkpoint import latest, load, save
from plaudit.errors import PlauditError


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {f"tensor {i}": torch.full((20_000,), float(step)) for i in range(3)}


def save_for_ever(folder: Path, start: int, pipe: int) -> None:
    for step in range(start, start + 10_000):
        # Every other save replaces a checkpoint.
        save(folder, step, tensors(step), {"step": step}, keep=1)
        os.write(pipe, step.to_bytes(4, "little"))
        save(folder, step, tensors(step), {"step": step}, keep=1)


def kill_once(folder: Path, start: int) -> dict[str, object]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        save_for_ever(folder, start, writer)
        os._exit(1)
    os.close(writer)
    acknowledged = os.read(reader, 4)
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while data := os.read(reader, 4):
        acknowledged = data
    os.close(reader)
    path, skipped = latest(folder)
    found, state = load(path) if path else ({}, {"step": -1})
    return {
        "acknowledged": int.from_bytes(acknowledged, "little"),
        "found": state["step"],
        "skipped": skipped,
        "whole": all(torch.equal(found[name], tensor) for name, tensor in tensors(state["step"]).items()),
        "litter": [entry.name for entry in folder.glob(".*")],
    }


def under_a_limit(folder: Path) -> dict[str, object]:
    save(folder, 1, tensors(1), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    error = ""
    try:
        save(folder, 2, tensors(2), {})
    except PlauditError as raised:
        error = str(raised)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    path, _ = latest(folder)
    return {"error": error, "found": path.name if path else "", "litter": [entry.name for entry in folder.glob(".*")]}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    kills, start = [], 1
    for _ in range(12):
        kills.append(kill_once(folder / "killed", start))
        start = kills[-1]["found"] + 1
    save(folder / "killed", start, tensors(start), {"step": start})
    litter = [entry.name for entry in (folder / "killed").glob(".*")]
    print(json.dumps({"kills": kills, "litter at last": litter, "limit": under_a_limit(folder / "limited")}))


main()
