"""Reward models by other objectives than Bradley-Terry: whole rankings, the best of several, numbers, good and bad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from plaudit import statistics
from plaudit.algorithms.base import Stats
from plaudit.algorithms.reward import FromRankings, RewardModelling, of_pairs, of_ratings
from plaudit.batch import Batch
from plaudit.losses import best_of, bradley_terry, plackett_luce, squared_error


class WholeRankings(FromRankings):
    """Rankings prompt by prompt instead of pair by pair. The unit is a prompt, unless all its texts are tied."""

    def table(self, batch: Batch, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(scores, ranks, mask), each (G, K), prompt by prompt, and (B, B) how much two rows count as a pair of their
        prompt: 0, and False in the mask, where all texts of a prompt are tied."""
        assert batch.targets is not None
        weight = self.pairs(batch)[1]
        compared = weight.any(1)
        blocks = batch.blocks()
        table, ranks, mask = (
            pad_sequence([values[block] for block in blocks], batch_first=True)
            for values in (scores, batch.targets[:, 0], compared)
        )
        return table, ranks, mask, weight.triu(1)

    def report(self, batch: Batch, scores: Tensor) -> dict[str, Any]:
        found = super().report(batch, scores)
        if not found:
            return {}
        table, ranks, mask, _ = self.table(batch, scores)
        learned = mask.any(1)
        _, stats = best_of(table, _best(ranks, mask), mask)
        return {**found, "accuracy_best": float(stats["accuracy"] / learned.sum())}


class PlackettLuce(WholeRankings):
    """The likelihood of each whole ranking (Plackett 1975; Luce 1959)."""

    def judge(self, batch: Batch, scores: Tensor) -> tuple[Tensor, Stats]:
        table, ranks, mask, weight = self.table(batch, scores)
        total, stats = plackett_luce(table, ranks, mask)
        return self.centred(total, scores[:, None] + scores[None, :], weight), stats


class BestOf(WholeRankings):
    """The likelihood of the choice of the best (Ziegler et al. 2019, eq. 1), whatever the order of the others."""

    def judge(self, batch: Batch, scores: Tensor) -> tuple[Tensor, Stats]:
        table, ranks, mask, weight = self.table(batch, scores)
        total, stats = best_of(table, _best(ranks, mask), mask)
        return self.centred(total, scores[:, None] + scores[None, :], weight), stats


def _best(ranks: Tensor, mask: Tensor) -> Tensor:
    """(G, K) who has the first rank of its group."""
    return ranks == ranks.masked_fill(~mask, torch.inf).amin(1, keepdim=True)


class Pointwise(RewardModelling):
    """Each text is judged by itself, by the mean of its ratings. The unit is a text."""

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch), device=batch.tokens.device)

    def means(self, batch: Batch) -> Tensor:
        """(B,) mean ratings."""
        assert batch.targets is not None
        return batch.targets.nanmean(1)


class Regression(Pointwise):
    """Squared error: the score is a guess of the mean rating."""

    def judge(self, batch: Batch, scores: Tensor) -> tuple[Tensor, Stats]:
        total, stats = squared_error(scores, self.means(batch))
        return self.centred(total, scores), stats

    def report(self, batch: Batch, scores: Tensor) -> dict[str, Any]:
        assert batch.targets is not None
        means = self.means(batch)
        found: dict[str, Any] = {"mse": float(squared_error(scores, means)[0] / len(batch))}
        values = scores.cpu().numpy()
        correlations = statistics.correlations(values, means.cpu().numpy())
        if correlations is not None:
            found |= correlations._asdict()
        order = of_ratings(values, batch.targets.cpu().numpy(), self.settings.report_gap)
        return found | (order if order["pairs"] else {})


class Binary(Pointwise):
    """Good or bad: the cross-entropy of sigmoid(score), which is Bradley-Terry against a text of score 0."""

    def judge(self, batch: Batch, scores: Tensor) -> tuple[Tensor, Stats]:
        good, nothing = self.means(batch), torch.zeros_like(scores)
        total, stats = bradley_terry(scores, nothing, good, noise=self.settings.noise)
        return self.centred(total, scores), stats

    def report(self, batch: Batch, scores: Tensor) -> dict[str, Any]:
        return of_pairs(scores.cpu(), self.means(batch).cpu())
