"""`Batch`: the one tensor record that samplers fill, algorithms read and the trainer splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B logical rows of T columns, padded on the right; column t always belongs to token t.

    A row is a prompt followed by what was said after it. Column 0 is never an action, because nothing
    precedes it that could have predicted it. Streams are (B, T) and mean nothing outside `actions`.

    tokens      (B, T) int64, any value where `attention` is False
    attention   (B, T) bool, True for real tokens: a prefix of each row
    actions     (B, T) bool, True where the policy chose the token (or is to learn to)
    groups      (B,) int64; equal ids stand side by side, are never split, and may share their prompt
    trunk       (B, T, d) activations of the frozen layers, kept so that they are computed once
    targets     (B,) or (B, R) what people said of the row; NaN where nobody answered
    weights     (B,) how much the row counts, and
    baselines   (B,) what it is compared with, where that depends on rows of other micro-batches
    """

    tokens: Tensor
    attention: Tensor
    actions: Tensor
    groups: Tensor
    logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    rewards: Tensor | None = None
    trunk: Tensor | None = None
    scores: Tensor | None = None
    targets: Tensor | None = None
    weights: Tensor | None = None
    baselines: Tensor | None = None
    index: Tensor | None = None
    truncated: Tensor | None = None

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def lengths(self) -> Tensor:
        """(B,) number of real tokens of each row."""
        return self.attention.sum(1)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are set, by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}

    def rows(self, index: Tensor) -> Batch:
        """The rows named by `index` (n,) in that order, cut to their longest."""
        chosen = {name: tensor[index] for name, tensor in self.tensors().items()}
        width = max(int(chosen["attention"].sum(1).max()), 1) if len(index) else 1
        full = self.tokens.shape[1]
        streams = {name for name, tensor in self.tensors().items() if tensor.dim() >= 2 and name != "targets"}
        return replace(
            self, **{name: t[:, :width] if name in streams and width < full else t for name, t in chosen.items()}
        )

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def blocks(self) -> list[Tensor]:
        """The row indices of each group, in order of appearance."""
        if len(self) == 0:
            return []
        _, counts = torch.unique_consecutive(self.groups, return_counts=True)
        return list(torch.split(torch.arange(len(self), device=self.tokens.device), counts.tolist()))

    def shuffled(self, generator: torch.Generator) -> Batch:
        """The groups in random order; rows inside a group keep theirs."""
        blocks = self.blocks()
        order = torch.randperm(len(blocks), generator=generator).tolist()
        return self.rows(torch.cat([blocks[i] for i in order])) if blocks else self

    def parts(self, tokens: int, sizes: Sequence[int] | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """Micro-batches of at most `tokens` tokens, whole groups only, longest rows first, each with the places (n,)
        that its rows have in this batch.

        `sizes` says how many tokens are computed for each group, and parts are then about equal; without it, padding
        counts too, and sorting by length keeps it small. The longest part comes first so that a run that is going to
        exceed the memory does so at once. A group larger than the budget is a part of its own.
        """
        blocks = self.blocks()
        lengths = self.lengths.tolist()
        longest = [max(lengths[row] for row in block.tolist()) for block in blocks]
        # The last part would else be a small one, and small products keep no machine busy.
        share = sum(sizes) / -(-sum(sizes) // tokens) if sizes and sum(sizes) else 0
        part: list[Tensor] = []
        width = taken = done = number = 0
        for i in sorted(range(len(blocks)), key=lambda i: (-longest[i], i)):
            width = width if part else longest[i]
            size = len(blocks[i]) * width if sizes is None else sizes[i]
            due = int((done + size / 2) / share) if share else 0
            if part and (taken + size > tokens or due > number):
                yield self._part(part)
                part, taken = [], 0
                width = longest[i]
                size = len(blocks[i]) * width if sizes is None else sizes[i]
            part.append(blocks[i])
            taken, done, number = taken + size, done + size, max(due, number)
        if part:
            yield self._part(part)

    def _part(self, blocks: list[Tensor]) -> tuple[Batch, Tensor]:
        places = torch.cat(blocks)
        return self.rows(places), places


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    groups: Sequence[int] | None = None,
    actions: Sequence[Sequence[bool]] | None = None,
) -> Batch:
    """Rows of token ids -> a `Batch`.

    `actions`, one flag per completion token, says which of them are learned (by default all of them);
    an empty prompt leaves the first completion token out, since nothing predicts it.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    size, width = len(rows), max([len(row) for row in rows] + [1])
    tokens = torch.zeros(size, width, dtype=torch.int64)
    attention = torch.zeros(size, width, dtype=torch.bool)
    acting = torch.zeros(size, width, dtype=torch.bool)
    for i, row in enumerate(rows):
        start = len(prompts[i])
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        attention[i, : len(row)] = True
        flags = [True] * len(completions[i]) if actions is None else list(actions[i])
        if len(flags) != len(completions[i]):
            raise ValueError(f"row {i} has {len(completions[i])} completion tokens and {len(flags)} flags")
        acting[i, start : len(row)] = torch.tensor(flags, dtype=torch.bool)
    acting[:, 0] = False
    ids = torch.arange(size) if groups is None else torch.tensor(groups, dtype=torch.int64)
    if len(ids) != size:
        raise ValueError(f"{size} rows and {len(ids)} group ids")
    return Batch(tokens, attention, acting, ids)
