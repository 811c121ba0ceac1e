"""Reward models: what all of them have in common, and Bradley-Terry over comparisons, over rankings, and over all pairs
of rated texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plaudit import statistics
from plaudit.algorithms.base import FromData, Stats
from plaudit.batch import Batch, collate
from plaudit.losses import all_pairs, bradley_terry
from plaudit.policy import Output, Policy
from plaudit.settings import Reward
from plaudit.world import World

LOOKS = 20
"""How often in a run its weight decay is adapted."""

LOOKED_AT = 128
"""Rows of either side, learned from or not, that the weight decay is adapted by."""


@dataclass(frozen=True)
class Judged:
    """Texts that people compared with each other, as token rows, and one list of numbers for each: what these
    numbers are is the business of the class that learns from them."""

    texts: list[list[int]]
    targets: list[list[float]]

    def __len__(self) -> int:
        return max(len(text) for text in self.texts)


class RewardModelling(FromData):
    """What all ways of judging have in common.

    data, validation  what is learned from, and what the weight decay is adapted on
    held              what evaluations are made on
    anchor            texts whose mean score is to be 0 in the end
    found             what the last evaluation reported
    """

    evaluates_first = False

    def __init__(
        self,
        settings: Reward,
        world: World,
        policy: Policy,
        data: list[Judged],
        held: list[Judged],
        anchor: Sequence[list[int]] = (),
    ) -> None:
        self.places, rest = divided(data, settings)
        super().__init__(settings, world, policy, [data[i] for i in self.places], held)
        self.validation, self.anchor = [data[i] for i in rest], list(anchor)
        if settings.adaptive_weight_decay and not rest:
            kept = f"nothing is left of {len(data)} rows to see by, so weight_decay stays {settings.weight_decay:g}"
            self.remarks.append(f"adaptive_weight_decay: {kept}.")
        self.weight_decay = settings.weight_decay if settings.adaptive_weight_decay else None
        self.found: dict[str, Any] = {}

    def batches(self) -> Iterator[Batch]:
        rows = super().batches()
        while True:
            # By the step to come, not after the last one, so that a run that goes on does the same.
            if self.validation and self.position and self.position % max(1, self.steps // LOOKS) == 0:
                self.adapt_weight_decay()
            yield next(rows)

    def collate(self, indices: list[int]) -> Batch:
        chosen = [self.data[i] for i in indices]
        index = torch.tensor([self.places[i] for i, item in zip(indices, chosen, strict=True) for _ in item.texts])
        return replace(self.rows(chosen), index=index)

    def rows(self, items: list[Judged]) -> Batch:
        """The texts of all items, those of one item in one group."""
        texts = [text for item in items for text in item.texts]
        groups = [g for g, item in enumerate(items) for _ in item.texts]
        targets = [row for item in items for row in item.targets]
        width = max(len(row) for row in targets)
        filled = torch.tensor([row + [float("nan")] * (width - len(row)) for row in targets])
        return replace(collate(texts, [[]] * len(texts), groups), targets=filled)

    # ------------------------------------------------------------------------------------------------- the loss

    def scores(self, batch: Batch) -> Tensor:
        """(B,) the score of each row."""
        scores: Tensor = self.model(batch, logprobs=False, scores=True).scores
        return scores

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        return self.judge(batch, self.scores(batch))

    def judge(self, batch: Batch, scores: Tensor) -> tuple[Tensor, Stats]:
        """What `loss` says of these scores (B,)."""
        raise NotImplementedError

    def centred(self, total: Tensor, sums: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """The loss with the squares of `sums` beside it, weighted: r + r' of each pair, of which the loss itself reads
        the difference only (Eisenstein et al. 2023, arXiv:2312.09244, eq. 2), or r of a text judged by itself."""
        return total + self.settings.centering * (weight * sums.square()).sum()

    # ----------------------------------------------------------------------------------- scores without gradient

    def quiet_scores(self, batch: Batch) -> Tensor:
        """(B,) scores without gradient or dropout."""

        def scored(part: Batch) -> Output:
            output: Output = self.policy(part, logprobs=False, scores=True)
            return output

        scores = self.over(batch, scored).scores
        assert scores is not None
        return scores

    def measured(self, items: list[Judged]) -> dict[str, float]:
        batch = self.rows(items).to(self.world.device)
        found = self.report(batch, self.quiet_scores(batch).float())
        if items is self.held:
            self.found = found
        return {name: value for name, value in found.items() if isinstance(value, float)}

    def report(self, batch: Batch, scores: Tensor) -> dict[str, Any]:
        """Figures of held-out rows with these scores (B,), and the tables that a report draws; nothing where none can
        be told."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------- normalisation

    def finish(self) -> None:
        """Shifts the scores so that those of the anchor have mean 0 (Ouyang et al. 2022, section 3.5), and divides them
        by their standard deviation if asked to (Christiano et al. 2017, section 2.2.3)."""
        scaled = self.settings.normalise_scale
        texts = self.anchor or ([text for item in self.data for text in item.texts] if scaled else [])
        if not texts:
            self.policy.normalise_scores(0.0, 1.0)  # however the model was scaled that it began with
            return
        scores = self.quiet_scores(collate(texts, [[]] * len(texts)).to(self.world.device)).double()
        mean, deviation = float(scores.mean()), float(scores.std(correction=0))
        told_apart = deviation > 1e-6 * max(abs(mean), 1.0)  # scores that are all alike have no scale
        self.policy.normalise_scores(mean, deviation if scaled and told_apart else 1.0)
        self.found |= {"score_mean": mean, "score_deviation": deviation}

    # ------------------------------------------------------------------------------------ adaptive weight decay

    def adapt_weight_decay(self) -> None:
        """Looks how far the loss on the validation part lies above that on what is learned from."""
        unseen, seen = map(self.mean_loss, self.looked_at)
        if seen > 0 and unseen > 0:
            assert self.weight_decay is not None
            self.weight_decay = adapted(self.weight_decay, unseen / seen, self.settings.learning_rate)
            self.notes |= {"validation_ratio": unseen / seen, "weight_decay": self.weight_decay}

    @cached_property
    def looked_at(self) -> list[Batch]:
        """The validation part and what is learned from, as many rows of each, with what frozen layers make of them."""
        both = [self.rows(items[:LOOKED_AT]).to(self.world.device) for items in (self.validation, self.data)]
        return [self.sharing_trunk(batch) for batch in both]

    def mean_loss(self, batch: Batch) -> float:
        """The loss per unit, without gradient or dropout; 0 where there is no unit."""
        units = float(self.units(batch))
        return float(self.judge(batch, self.quiet_scores(batch))[0]) / units if units else 0.0

    def units(self, batch: Batch) -> Tensor:
        """() how many units `judge` sums over."""
        return self.weight(batch)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "weight_decay": self.weight_decay}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.weight_decay = state["weight_decay"]


def divided(items: Sequence[Judged], settings: Reward) -> tuple[list[int], list[int]]:
    """Places of the items that are learned from and, for an adaptive weight decay, of those that are not: after a
    bootstrap those never drawn, which are 1/e of all on average; without one, a random 1/e.

    What is drawn are questions, each with all answers to it: what one person said of two texts is no test of what was
    learned from another person about the same two. Few questions may leave nothing to be kept back."""
    if not (settings.bootstrap or settings.adaptive_weight_decay):
        return list(range(len(items))), []
    questions: dict[Any, list[int]] = {}
    for place, item in enumerate(items):
        questions.setdefault(tuple(sorted(map(tuple, item.texts))), []).append(place)
    places, count = list(questions.values()), len(questions)
    draw = np.random.default_rng((settings.seed, count, LOOKS))
    part = round(count / math.e)
    chosen = draw.integers(count, size=count) if settings.bootstrap else draw.permutation(count)[part:]
    rest = np.setdiff1d(np.arange(count), chosen) if settings.adaptive_weight_decay else chosen[:0]
    learned, kept = ([place for question in part for place in places[question]] for part in (chosen, rest))
    return learned, kept


def adapted(decay: float, ratio: float, learning_rate: float) -> float:
    """The next weight decay, so that validation loss / training loss comes to lie between 1.1 and 1.5 (Christiano et
    al. 2017, section 2.2.3): twice or half the present one, and never so much that a step takes a tenth of a weight."""
    if ratio > 1.5:
        return min(2 * decay, 0.1 / learning_rate)
    return decay / 2 if ratio < 1.1 else decay


class FromComparisons(RewardModelling):
    """Rows 2i and 2i + 1 are a pair; its targets are (how far the first is preferred, by what margin). The unit is
    a pair (Bradley & Terry 1952; margins as in Touvron et al. 2023, eq. 2)."""

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch) // 2, device=batch.tokens.device)

    def judge(self, batch: Batch, scores: Tensor) -> tuple[Tensor, Stats]:
        assert batch.targets is not None
        preference, margin = batch.targets[0::2].unbind(1)
        total, stats = bradley_terry(scores[0::2], scores[1::2], preference, margin, noise=self.settings.noise)
        return self.centred(total, scores[0::2] + scores[1::2]), stats

    def report(self, batch: Batch, scores: Tensor) -> dict[str, Any]:
        assert batch.targets is not None
        return of_pairs((scores[0::2] - scores[1::2]).cpu(), batch.targets[0::2, 0].cpu())


class FromRankings(RewardModelling):
    """The targets are ranks, 1 the best. All pairs of a prompt are one unit together, whatever their number, and
    ties make no pair (Ouyang et al. 2022, eq. 1)."""

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(preference, weight), both (B, B): the chance that row i is put above row j, and how much that counts."""
        assert batch.targets is not None
        rank = batch.targets[:, 0]
        better = (rank[:, None] < rank[None, :]).float()
        same = batch.groups[:, None] == batch.groups[None, :]
        weight = (same & (rank[:, None] != rank[None, :])).float()
        with torch.autocast(weight.device.type, enabled=False):  # counts, which bfloat16 would round
            pairs = (same.float() @ weight.sum(1)) / 2
        return better, weight / pairs.clamp(min=1)[:, None]

    def weight(self, batch: Batch) -> Tensor:
        return self.pairs(batch)[1].triu(1).sum()

    def judge(self, batch: Batch, scores: Tensor) -> tuple[Tensor, Stats]:
        preference, weight = self.pairs(batch)
        total, stats = all_pairs(scores, preference, weight, noise=self.settings.noise)
        return self.centred(total, scores[:, None] + scores[None, :], weight.triu(1)), stats

    def report(self, batch: Batch, scores: Tensor) -> dict[str, Any]:
        """How well these scores (B,) put the texts of each prompt in people's order."""
        preference, weight = (matrix.cpu() for matrix in self.pairs(batch))
        i, j = torch.nonzero(weight.triu(1), as_tuple=True)
        scores = scores.cpu()
        return of_pairs(scores[i] - scores[j], preference[i, j])


class FromRatings(RewardModelling):
    """The targets are what each of several people gave a text, on one scale: every two texts of a batch are a pair,
    and how far the first is preferred is the chance that one person, drawn at random, rates it above what another
    rates the second. The unit is a pair.

    A batch that goes through the model in one part is compared with itself. Otherwise each part needs the scores of
    rows that are elsewhere, in another part or process. So all are scored beforehand, and each part takes the gradient
    of its own rows against these: the sum over parts is the gradient of the whole.

    everybody  scores (N,) and targets (N, R) of the whole batch over all processes, where it is spread
    """

    everybody: tuple[Tensor, Tensor] | None = None

    def begin(self, batch: Batch) -> None:
        self.everybody = None
        if self.world.size == 1 and len(batch) * int(batch.lengths.max()) <= self.tokens_per_pass:
            return
        assert batch.targets is not None
        gathered = self.world.gather([(self.quiet_scores(batch).cpu(), batch.targets.cpu())])
        width = max(targets.shape[1] for _, targets in gathered)
        filled = [
            torch.nn.functional.pad(targets, (0, width - targets.shape[1]), value=torch.nan) for _, targets in gathered
        ]
        device = batch.tokens.device
        self.everybody = torch.cat([scores for scores, _ in gathered]).to(device), torch.cat(filled).to(device)

    def pairs(self, targets: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """(preference, weight), both (B, N), of (B, R) against (N, R) ratings: the chance that row i is put above the
        other row j, and 1 where the two are a pair, which no row is with itself."""
        gap = (targets.nanmean(1)[:, None] - others.nanmean(1)[None, :]).abs()
        return chances(targets, others), ((gap > 0) & (gap >= self.settings.minimum_gap)).float()

    def weight(self, batch: Batch) -> Tensor:
        assert batch.targets is not None
        if self.everybody is None:
            return self.units(batch)
        return self.pairs(batch.targets, self.everybody[1])[1].sum() / 2

    def units(self, batch: Batch) -> Tensor:
        assert batch.targets is not None
        return self.pairs(batch.targets, batch.targets)[1].triu(1).sum()

    def judge(self, batch: Batch, scores: Tensor) -> tuple[Tensor, Stats]:
        assert batch.targets is not None
        preference, weight = self.pairs(batch.targets, batch.targets)
        total, stats = all_pairs(scores, preference, weight, noise=self.settings.noise)
        return self.centred(total, scores[:, None] + scores[None, :], weight.triu(1)), stats

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        if self.everybody is None:
            return super().loss(batch)
        assert batch.targets is not None
        others, said = self.everybody
        scores = self.scores(batch)
        preference, weight = self.pairs(batch.targets, said)
        own, other = torch.broadcast_tensors(scores[:, None], others.to(scores.dtype)[None, :])
        given = (tensor.flatten() for tensor in (own, other, preference))
        twice, stats = bradley_terry(*given, noise=self.settings.noise, weight=weight.flatten())
        twice = self.centred(twice, own + other, weight)
        # Each pair comes twice, once with the gradient of either side: the gradient is whole, the value is halved.
        return twice - twice.detach() / 2, {name: value / 2 for name, value in stats.items()}

    def report(self, batch: Batch, scores: Tensor) -> dict[str, Any]:
        assert batch.targets is not None
        values, ratings = scores.cpu().numpy(), batch.targets.cpu().numpy()
        predicted, observed = statistics.pair_probabilities(values, ratings)
        if not len(predicted):
            return {}
        return of_ratings(values, ratings, self.settings.report_gap) | _calibrated(predicted, observed)


def chances(targets: Tensor, others: Tensor) -> Tensor:
    """(B, R) and (N, R') ratings, NaN where one is missing -> (B, N) the share of pairs of people of whom the first, on
    text i, rates above the second, on the other text j; equal ratings count half."""
    levels = torch.cat([targets[targets.isfinite()], others[others.isfinite()]]).unique()
    given, met = ((rows[:, :, None] == levels).float().sum(1) for rows in (targets, others))
    below = met.cumsum(1) - met / 2
    # Counts and halves are exact in float32, however rows are put together, but not in bfloat16.
    with torch.autocast(targets.device.type, enabled=False):
        return given @ below.T / (given.sum(1)[:, None] * met.sum(1)[None, :]).clamp(min=1)


def of_pairs(lead: Tensor, preference: Tensor) -> dict[str, Any]:
    """Figures of pairs from how far the first of each leads and is preferred, both (P,): people's ties have no right
    answer, and equal scores are half right. Nothing if all are ties."""
    side = torch.sign(preference - 0.5)
    if not side.any():
        return {}
    right = (1 + torch.sign(lead) * side)[side != 0] / 2
    favoured = torch.where(lead >= 0, preference, 1 - preference)  # how far people preferred what the model puts first
    figures = _calibrated(torch.sigmoid(lead.abs()).numpy(), favoured.numpy())
    return {"accuracy": float(right.mean()), **figures}


def of_ratings(values: Any, ratings: Any, gap: float) -> dict[str, Any]:
    """How well scores (n,) order the pairs of texts whose mean ratings, of (n, R), differ by at least `gap`, and how
    well one person does; NaN if there is no such pair."""
    accuracy = statistics.pairwise_accuracy(values, np.nanmean(ratings, 1), gap)
    one = statistics.one_rater_accuracy(ratings, gap)
    return {"accuracy": accuracy.accuracy, "pairs": accuracy.pairs, "accuracy_one_rater": one.accuracy}


def _calibrated(predicted: Any, observed: Any) -> dict[str, Any]:
    found = statistics.calibration(predicted, observed)
    return {"calibration_error": found.error, "reliability": found.table, "margins": _margins(predicted, observed)}


def _margins(predicted: Any, observed: Any) -> list[dict[str, float]]:
    """How often the text that people prefer leads by how much, where they prefer one: columns of a histogram. Below 0
    the model has it wrong; a lead of more than 16 counts as 16."""
    sure = np.clip(np.asarray(predicted, float), 1e-7, 1 - 1e-7)
    side = np.sign(np.asarray(observed, float) - 0.5)
    leads = (np.log(sure) - np.log1p(-sure)) * side
    counts, edges = np.histogram(leads[side != 0], 24)
    columns = zip(edges.tolist(), edges.tolist()[1:], counts.tolist(), strict=False)
    return [{"from": start, "to": end, "count": count} for start, end, count in columns]
