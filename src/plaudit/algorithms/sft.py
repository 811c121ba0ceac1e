"""Supervised fine-tuning: maximum likelihood of demonstrations."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from plaudit.algorithms.base import FromData, Stats
from plaudit.batch import Batch, collate
from plaudit.losses import nll
from plaudit.templates import Encoded


def rows(encoded: list[Encoded], indices: list[int]) -> Batch:
    """Encoded demonstrations as a batch."""
    chosen = [encoded[i] for i in indices]
    batch = collate([e.prompt for e in chosen], [e.completion for e in chosen], actions=[e.actions for e in chosen])
    return replace(batch, index=torch.tensor(indices))


class SupervisedFineTuning(FromData):
    """Negative log-likelihood of what was said after the prompt, or of whole texts; the unit is a token."""

    def collate(self, indices: list[int]) -> Batch:
        return rows(self.data, indices)

    def weight(self, batch: Batch) -> Tensor:
        return batch.actions.sum()

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        return nll(self.model(batch).logprobs, batch.actions)

    def measured(self, items: list[Encoded]) -> dict[str, float]:
        batch = rows(items, list(range(len(items)))).to(self.world.device)
        found = self.over(batch, lambda part: self.policy(part, hits=True))
        assert found.logprobs is not None
        assert found.hits is not None
        total, _ = nll(found.logprobs, batch.actions)
        count = batch.actions.sum()
        return {"nll": float(total / count), "accuracy": float(found.hits.sum() / count)}
