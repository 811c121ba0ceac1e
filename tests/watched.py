"""Training watched from inside: what every step left behind, bit for bit, and ways to break a run off."""

from __future__ import annotations

import hashlib
import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import plaudit
from plaudit import checkpoint, hooks
from plaudit.trainer import Trainer


class Killed(BaseException):
    """Stands for a kill: nothing of plaudit catches it."""


def digest(trainer: Trainer) -> str:
    """SHA-256 over all that the next steps depend on: weights, moments, random states, the algorithm's state."""
    kept = {name: value for name, value in trainer._kept.items() if name != "seconds"}
    weights = {name: p.detach() for name, p in trainer.algorithm.policy.named_parameters()}
    return _sha256({"weights": weights, "optimizer": trainer.optimizer.state_dict(), "kept": kept})


def learned(trainer: Trainer) -> str:
    """SHA-256 over weights and moments alone."""
    moments = {i: dict(trainer.optimizer.state[p]) for i, p in enumerate(trainer.optimizer.state)}
    return _sha256({"weights": trainer._learning, "moments": moments})


@dataclass
class Seen:
    """What calls of `train` did, by step: the state that each left, the rows and tokens that it learned from.

    first: the first step of the last call.
    """

    digests: dict[int, str] = field(default_factory=dict)
    rows: dict[int, list[int]] = field(default_factory=dict)
    tokens: dict[int, list[list[int]]] = field(default_factory=dict)
    first: int = 0
    trainer: Any = None


def train(
    settings: Any, seen: Seen | None = None, *, signal_after: int = 0, kill_after: int = 0, number: int = signal.SIGTERM
) -> Seen:
    """`plaudit.train`, watched. A signal comes after one step; a kill after one, before anything is saved of it."""
    seen = Seen() if seen is None else seen

    class Watching(hooks.Progressing):
        def begin(self, trainer: Trainer) -> None:
            seen.trainer, seen.first = trainer, trainer.step + 1
            super().begin(trainer)

        def after_step(self, trainer: Trainer) -> None:
            super().after_step(trainer)
            seen.digests[trainer.step] = digest(trainer)
            if trainer.step == kill_after:
                raise Killed
            if trainer.step == signal_after:
                signal.raise_signal(number)

    gradients = Trainer._gradients

    def watched(trainer: Trainer, algorithm: Any, batch: Any) -> None:
        seen.rows[trainer.step + 1] = batch.index.tolist()
        seen.tokens[trainer.step + 1] = batch.tokens.tolist()
        gradients(trainer, algorithm, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "Progressing", Watching)
        patch.setattr(Trainer, "_gradients", watched)
        plaudit.train(settings)
    return seen


def _sha256(tree: dict[str, Any]) -> str:
    tensors, state = checkpoint.pack(tree)
    whole = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def logged(folder: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """metrics.jsonl and samples.jsonl, without what a clock measured."""
    read = [
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for path in (Path(folder) / "metrics.jsonl", Path(folder) / "samples.jsonl")
    ]
    rows = [[{k: v for k, v in row.items() if k != "time/seconds"} for row in file] for file in read]
    return rows[0], rows[1]


def final(folder: str | Path) -> bytes:
    """The bytes of the finished model's weights."""
    return (Path(folder) / "final" / "model.safetensors").read_bytes()


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard's files in a folder hold, by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {(name, event.step): event.value for name in found.Tags()["scalars"] for event in found.Scalars(name)}
