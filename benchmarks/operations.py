"""How many operations a step cannot do without, and how many a second this machine does.

A multiplication and an addition are two operations. Counted for each token and each parameter of a layer's matrices: 2
forward, 2 backward for what is before it, and 2 backward for the parameter itself where it learns. So a step is 6 where
all weights learn; 4 where adapters do, whose own parameters count 6; and 2 without a gradient. Attention counts 4
operations forward for each pair of a token and one that it sees, times the width of all heads, and twice that backward.
The head counts at scored positions alone, and its embedding as no operation. A prompt counts once for all the answers
of its group. Nothing that is computed twice counts twice. Norms, softmaxes, the optimizer and the sampler's decoding
count nothing: what is compared with the matrix rate is learning.

What is learned of, and how often it is looked at without a gradient: DPO, once by the reference; KTO, once by the
reference, and mismatched answers, of which there are as many, by both; GRPO, once by the reference; PPO, once by the
reference, once for the values (without the head) and once by the reward model, then as often as there are epochs. With
a frozen trunk, that is run once for policy and reference together, and all else is above it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from plaudit.batch import Batch
from works import Work

# Passes without a gradient over what is learned of: (through the layers, through the head).
LOOKS = {"sft": (0, 0), "reward": (0, 0), "dpo": (1, 1), "kto": (3, 3), "grpo": (1, 1), "ppo": (2, 1)}


@dataclass(frozen=True)
class Family:
    """Rows of one group: how many tokens they share at the beginning, the length of each, and all their actions."""

    shared: int
    lengths: tuple[int, ...]
    actions: int

    @property
    def tokens(self) -> int:
        return self.shared + sum(length - self.shared for length in self.lengths)

    @property
    def seen(self) -> int:
        """Pairs of a token and one that it sees, itself included."""
        shared = self.shared * (self.shared + 1) // 2
        return shared + sum(length * (length + 1) // 2 - shared for length in self.lengths)


def families(batch: Batch) -> list[Family]:
    """The groups of a batch. What is an action is never shared, nor a whole row."""
    lengths, actions = batch.lengths.tolist(), batch.actions.sum(1).tolist()
    found = []
    for block in batch.blocks():
        rows = block.tolist()
        first = [int(batch.actions[i].int().argmax()) if actions[i] else lengths[i] - 1 for i in rows]
        limit = min(first) if len(rows) > 1 else 0
        differs = (batch.tokens[rows, :limit] != batch.tokens[rows[0], :limit]).any(0)
        shared = int(differs.int().argmax()) if bool(differs.any()) else limit
        found.append(Family(shared, tuple(lengths[i] for i in rows), sum(actions[i] for i in rows)))
    return found


@dataclass(frozen=True)
class Shape:
    """A model: its layers; of each, the parameters of its matrices, the width of all heads, and the parameters of its
    adapters; and the parameters of the head."""

    layers: int
    matrices: int
    heads: int
    adapters: int
    head: int


def shape_of(config: Any, rank: int) -> Shape:
    """Of a Llama-like model."""
    width, hidden, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    kept = config.num_key_value_heads * config.head_dim
    sides = [(width, heads), (width, kept), (width, kept), (heads, width), *[(width, hidden)] * 3]
    return Shape(
        config.num_hidden_layers,
        sum(a * b for a, b in sides),
        heads,
        rank * sum(a + b for a, b in sides),
        width * config.vocab_size,
    )


def forward(shape: Shape, rows: Iterable[Family], layers: int) -> float:
    """Operations of so many layers without a gradient."""
    return layers * sum(2.0 * shape.matrices * one.tokens + 4.0 * shape.heads * one.seen for one in rows)


def learning(work: Work, shape: Shape, parts: Sequence[Sequence[Family]]) -> float:
    """Operations of one of the work's `steps`, whose optimizer steps learned of these parts."""
    once = [one for part in parts[: len(parts) // work.epochs] for one in part]
    every = [one for part in parts for one in part]
    whole = not (work.lora or work.top)
    above = work.top or shape.layers
    looks, headed = LOOKS[work.kind]
    total = looks * forward(shape, once, above) + headed * head(shape, once)
    total += forward(shape, once, shape.layers - above)
    if work.kind == "ppo":
        total += forward(shape, once, shape.layers)
    total += (2 if work.lora else 3) * forward(shape, every, above)
    if work.lora:
        total += forward(replace(shape, matrices=3 * shape.adapters), every, above)  # and attention's third part
    return total + (3 if whole else 2) * head(shape, every)


def head(shape: Shape, rows: Iterable[Family]) -> float:
    return sum(2.0 * shape.head * one.actions for one in rows)


def matrix_rate(precision: str, size: int = 2048, times: int = 10) -> float:
    """Operations a second of a square product, the best of several."""
    a, b = (torch.randn(size, size).to(getattr(torch, precision)) for _ in range(2))
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
