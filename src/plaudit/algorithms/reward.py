"""Reward models: Bradley-Terry over comparisons, over rankings, and over all pairs of rated texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plaudit import statistics
from plaudit.algorithms.base import FromData, Stats
from plaudit.batch import Batch, collate
from plaudit.data import Order
from plaudit.losses import all_pairs, bradley_terry
from plaudit.policy import Policy
from plaudit.settings import Reward
from plaudit.world import World


@dataclass(frozen=True)
class Judged:
    """Texts that people compared with each other, as token rows, and one list of numbers for each: what these
    numbers are is the business of the class that learns from them."""

    texts: list[list[int]]
    targets: list[list[float]]

    def __len__(self) -> int:
        return max(len(text) for text in self.texts)


class RewardModelling(FromData):
    """What the three ways of judging have in common. `found` is what the last evaluation reported."""

    evaluates_first = False

    def __init__(self, settings: Reward, world: World, policy: Policy, data: list[Judged], held: list[Judged]) -> None:
        super().__init__(policy, world, settings.tokens_per_pass)
        self.settings, self.data, self.held = settings, data, held
        self.order = Order(len(data), settings.batch_size, settings.seed)
        self.steps = settings.steps or self.order.steps(settings.epochs)
        self.found: dict[str, Any] = {}

    def collate(self, indices: list[int]) -> Batch:
        chosen = [self.data[i] for i in indices]
        index = torch.tensor([i for i, item in zip(indices, chosen, strict=True) for _ in item.texts])
        return replace(self.rows(chosen), index=index)

    def rows(self, items: list[Judged]) -> Batch:
        """The texts of all items, those of one item in one group."""
        texts = [text for item in items for text in item.texts]
        groups = [g for g, item in enumerate(items) for _ in item.texts]
        targets = [row for item in items for row in item.targets]
        width = max(len(row) for row in targets)
        filled = torch.tensor([row + [float("nan")] * (width - len(row)) for row in targets])
        return replace(collate(texts, [[]] * len(texts), groups), targets=filled)

    def scores(self, batch: Batch) -> Tensor:
        """(B,) the score at the last token of each row."""
        scores: Tensor = self.model(batch, logprobs=False, scores=True).scores
        return scores

    def centred(self, total: Tensor, scores: Tensor, share: Tensor | float) -> Tensor:
        """The loss with the mean squared score of each pair's two texts beside it; `share`, one number or (B,), is
        how much the pairs of a row count, halved."""
        return total + self.settings.centering * (share * scores.square()).sum()

    def heldout_scores(self) -> tuple[Batch, Tensor]:
        """The held-out rows and their scores."""
        batch = self.rows(self.held).to(self.world.device)
        scores = self.over(batch, lambda part: self.policy(part, logprobs=False, scores=True)).scores
        assert scores is not None
        return batch, scores.float()

    def evaluate(self) -> dict[str, float]:
        if not self.held:
            return {}
        self.found = self.report()
        return {f"heldout_{name}": value for name, value in self.found.items() if isinstance(value, float)}

    def report(self) -> dict[str, Any]:
        """Held-out accuracy and calibration, with the reliability table that a report draws; nothing without pairs."""
        raise NotImplementedError


class FromComparisons(RewardModelling):
    """Rows 2i and 2i + 1 are a pair; its targets are (how far the first is preferred, by what margin). The unit is
    a pair (Bradley & Terry 1952; margins as in Touvron et al. 2023, eq. 2)."""

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch) // 2, device=batch.tokens.device)

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        assert batch.targets is not None
        scores = self.scores(batch)
        preference, margin = batch.targets[0::2].unbind(1)
        total, stats = bradley_terry(scores[0::2], scores[1::2], preference, margin, noise=self.settings.noise)
        return self.centred(total, scores, 0.5), stats

    def report(self) -> dict[str, Any]:
        batch, scores = self.heldout_scores()
        assert batch.targets is not None
        return _of_pairs((scores[0::2] - scores[1::2]).cpu(), batch.targets[0::2, 0].cpu())


class AllPairs(RewardModelling):
    """Every two rows may be a pair; a subclass says which are, and what people would say of them."""

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(preference, weight), both (B, B): the chance that row i is put above row j, and how much that counts."""
        raise NotImplementedError

    def weight(self, batch: Batch) -> Tensor:
        return self.pairs(batch)[1].triu(1).sum()

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        scores = self.scores(batch)
        preference, weight = self.pairs(batch)
        total, stats = all_pairs(scores, preference, weight, noise=self.settings.noise)
        return self.centred(total, scores, weight.sum(1) / 2), stats


class FromRankings(AllPairs):
    """The targets are ranks, 1 the best. All pairs of a prompt are one unit together, whatever their number, and
    ties make no pair (Ouyang et al. 2022, eq. 1)."""

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.targets is not None
        rank = batch.targets[:, 0]
        better = (rank[:, None] < rank[None, :]).float()
        same = batch.groups[:, None] == batch.groups[None, :]
        weight = (same & (rank[:, None] != rank[None, :])).float()
        pairs = (same.float() @ weight.sum(1)) / 2
        return better, weight / pairs.clamp(min=1)[:, None]

    def report(self) -> dict[str, Any]:
        batch, scores = self.heldout_scores()
        preference, weight = (matrix.cpu() for matrix in self.pairs(batch))
        i, j = torch.nonzero(weight.triu(1), as_tuple=True)
        scores = scores.cpu()
        return _of_pairs(scores[i] - scores[j], preference[i, j])


class FromRatings(AllPairs):
    """The targets are what each of several people gave a text, on one scale: every two texts of a batch are a pair,
    and how far the first is preferred is the chance that one person, drawn at random, rates it above what another
    rates the second. The unit is a pair."""

    def rows(self, items: list[Judged]) -> Batch:
        batch = super().rows(items)
        return replace(batch, groups=torch.zeros_like(batch.groups))

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.targets is not None
        means = batch.targets.nanmean(1)
        gap = (means[:, None] - means[None, :]).abs()
        return chances(batch.targets), ((gap > 0) & (gap >= self.settings.minimum_gap)).float()

    def heldout_scores(self) -> tuple[Batch, Tensor]:
        # Groups of one, or all that is held out would be a single micro-batch.
        batch = super().rows(self.held).to(self.world.device)
        scores = self.over(batch, lambda part: self.policy(part, logprobs=False, scores=True)).scores
        assert scores is not None
        return batch, scores.float()

    def report(self) -> dict[str, Any]:
        batch, scores = self.heldout_scores()
        assert batch.targets is not None
        values, ratings = scores.cpu().numpy(), batch.targets.cpu().numpy()
        gap = self.settings.report_gap
        predicted, observed = statistics.pair_probabilities(values, ratings)
        if not len(predicted):
            return {}
        accuracy = statistics.pairwise_accuracy(values, np.nanmean(ratings, 1), gap)
        figures = _figures(accuracy.accuracy, statistics.calibration(predicted, observed))
        one = statistics.one_rater_accuracy(ratings, gap)
        return {**figures, "pairs": accuracy.pairs, "accuracy_one_rater": one.accuracy}


def chances(targets: Tensor) -> Tensor:
    """(K, R) ratings, NaN where one is missing -> (K, K) the share of pairs of people of whom the first, on text i,
    rates above the second, on text j; equal ratings count half."""
    there = targets.isfinite()
    given = torch.where(there, targets, torch.zeros_like(targets))
    both = (there[:, None, :, None] & there[None, :, None, :]).float()
    above = (given[:, None, :, None] > given[None, :, None, :]).float()
    level = (given[:, None, :, None] == given[None, :, None, :]).float()
    return ((above + 0.5 * level) * both).sum((2, 3)) / both.sum((2, 3)).clamp(min=1)


def _of_pairs(lead: Tensor, preference: Tensor) -> dict[str, Any]:
    """Figures of pairs from how far the first of each leads and is preferred, both (P,): people's ties have no right
    answer, and equal scores are half right. Nothing if all are ties."""
    side = torch.sign(preference - 0.5)
    if not side.any():
        return {}
    right = (1 + torch.sign(lead) * side)[side != 0] / 2
    favoured = torch.where(lead >= 0, preference, 1 - preference)  # how far people preferred what the model puts first
    table = statistics.calibration(torch.sigmoid(lead.abs()).numpy(), favoured.numpy())
    return _figures(float(right.mean()), table)


def _figures(accuracy: float, found: statistics.Calibration) -> dict[str, Any]:
    return {"accuracy": accuracy, "calibration_error": found.error, "reliability": found.table}
