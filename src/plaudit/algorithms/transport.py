"""Learning from the answers of a whole batch as distributions: pairs that are sorted before they are compared."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from plaudit import preferences
from plaudit.algorithms.base import Stats
from plaudit.algorithms.preference import Paired
from plaudit.batch import Batch


class OptimalTransport(Paired):
    """AOT, see `preferences.aot`: the k-th margin of the whole batch meets the k-th reference margin.

    Which of them meet is settled over all micro-batches and processes before any gradient is taken. Each row then knows
    the slope of the loss to its log-probability and what the loss is, so that the parts add up to both.
    """

    def compared(self, own: Tensor, kept: Tensor) -> Tensor:
        """(P,) the loss of each pair, from log-probabilities of chosen and rejected answers by the policy and by the
        reference, both (P, 2)."""
        margins, reference = own[:, 0] - own[:, 1], kept[:, 0] - kept[:, 1]
        return preferences.aot(margins, reference, self.settings.beta, self.settings.label_smoothing)

    def prepared(self, batch: Batch) -> Batch:
        own, kept = self.sides(self.over(batch, self.policy).logprobs, batch)
        start = sum(self.world.gather([len(own)])[: self.world.rank])
        pairs = torch.tensor(self.world.gather(torch.stack([own, kept], 1).tolist()), dtype=torch.float64)
        everyone = pairs[:, 0].clone().requires_grad_()
        losses = self.compared(everyone, pairs[:, 1])
        (slopes,) = torch.autograd.grad(losses.sum(), everyone)
        mine = slice(start, start + len(own))
        slope, value = slopes[mine].to(own), losses.detach()[mine].to(own)
        baselines = torch.stack([value - (slope * own).sum(1), torch.zeros_like(value)], 1).flatten()
        return replace(batch, weights=slope.flatten(), baselines=baselines)

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        assert batch.weights is not None
        assert batch.baselines is not None
        logprobs = self.model(batch).logprobs
        total = (batch.weights.detach() * self.totals(logprobs, batch) + batch.baselines.detach()).sum()
        return total, self.figures(logprobs, batch)

    def objective(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        return self.compared(*self.sides(logprobs, batch)).sum(), self.figures(logprobs, batch)

    def sides(self, logprobs: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor]:
        """(P, 2) log-probabilities of chosen and rejected answers, by the policy and by the reference."""
        own, kept = self.totals(logprobs, batch), self.totals(batch.reference_logprobs, batch).detach()
        return own.view(-1, 2), kept.view(-1, 2)

    def figures(self, logprobs: Tensor, batch: Batch) -> Stats:
        """The statistics of pairs."""
        rewards = self.settings.beta * self.ratios(logprobs, batch)
        return preferences.pair_figures(rewards[0::2], rewards[1::2])


class UnpairedOptimalTransport(OptimalTransport):
    """Unpaired AOT, see `preferences.aot_unpaired`: the k-th log-ratio of all chosen answers meets the k-th of all
    rejected ones."""

    def compared(self, own: Tensor, kept: Tensor) -> Tensor:
        chosen, rejected = (own - kept).unbind(1)
        return preferences.aot_unpaired(chosen, rejected, self.settings.beta, self.settings.label_smoothing)
