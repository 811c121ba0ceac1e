"""Learning from answers that people found good or bad, one by one: each is compared with what all are compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plaudit import preferences
from plaudit.algorithms.base import Stats
from plaudit.algorithms.preference import Answers, Paired, PreferenceLearning, rows
from plaudit.batch import Batch, collate
from plaudit.policy import Policy
from plaudit.settings import BCO, KTO, UnpairedAPOZero
from plaudit.templates import Encoded
from plaudit.world import World


class Unpaired(PreferenceLearning):
    """Each row is an answer, whose target is 1 for good and 0 for bad. The unit is an answer; what all are compared
    with stands in `baselines`."""

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch), device=batch.tokens.device)


def based(batch: Batch, baseline: float) -> Batch:
    """The batch with one baseline for all its rows."""
    assert batch.targets is not None
    return replace(batch, baselines=torch.full_like(batch.targets, baseline))


class KahnemanTversky(Unpaired):
    """KTO, see `preferences.kto`. The KL divergence that answers are compared with is estimated without a gradient:
    each prompt of the batch is given the answer to the prompt before it, over all processes, and the log-ratios of
    these mismatched answers are averaged."""

    settings: KTO

    def prepared(self, batch: Batch) -> Batch:
        together = self.order[self.position - 1]
        mismatched = self.mismatched(self.data, together)[self.world.rank :: self.world.size]
        kl = self.world.sum(self.divergence(mismatched)) / len(together)
        self.notes["kl"] = max(kl, 0.0)
        return based(batch, self.notes["kl"])

    def heldout(self) -> Batch:
        kl = self.divergence(self.mismatched(self.held, list(range(len(self.held))))) / len(self.held)
        return based(super().heldout(), max(kl, 0.0))

    def mismatched(self, items: list[Answers], indices: list[int]) -> list[Answers]:
        """Each prompt with the answer to the nearest other prompt before it, the last being before the first; cut at
        max_tokens. Where all prompts are one, with the answer before it."""
        answers = [items[i].encoded[0] for i in indices]
        found = []
        for i, asked in enumerate(answers):
            before = (answers[i - back] for back in range(1, len(answers)))
            said = next((answer for answer in before if answer.prompt != asked.prompt), answers[i - 1])
            room = self.settings.max_tokens - len(asked.prompt)
            found.append(Answers([Encoded(asked.prompt, said.completion[:room], said.actions[:room])], [0.0]))
        return found

    def divergence(self, items: list[Answers]) -> float:
        """The sum of the log-ratios of these answers."""
        batch = self.referred(rows(items, range(len(items))).to(self.world.device))
        return float(self.ratios(self.over(batch, self.policy).logprobs, batch).sum())

    def objective(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        assert batch.targets is not None
        assert batch.baselines is not None
        settings = self.settings
        return preferences.kto(
            self.ratios(logprobs, batch),
            batch.targets > 0.5,
            batch.baselines,
            settings.beta,
            settings.desirable_weight,
            settings.undesirable_weight,
        )


class UnpairedAnchoredZero(Unpaired):
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266) of single answers: `preferences.kto` against 0."""

    settings: UnpairedAPOZero

    def objective(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        assert batch.targets is not None
        own, good = self.settings, batch.targets > 0.5
        ratios = self.ratios(logprobs, batch)
        return preferences.kto(ratios, good, 0.0, own.beta, own.desirable_weight, own.undesirable_weight)


class Classifier(PreferenceLearning):
    """What both forms of BCO share: `mean` is the running mean of the rewards of all `seen` answers, those of the
    present batch included, over all processes."""

    def __init__(self, settings: Any, world: World, policy: Policy, data: list[Answers], held: list[Answers]) -> None:
        super().__init__(settings, world, policy, data, held)
        self.mean, self.seen = 0.0, 0.0

    def prepared(self, batch: Batch) -> Batch:
        rewards = self.settings.beta * self.ratios(self.over(batch, self.policy).logprobs, batch)
        total, count = self.world.sum(float(rewards.sum())), self.world.sum(float(len(batch)))
        self.seen += count
        self.mean += (total - count * self.mean) / self.seen
        self.notes["reward_mean"] = self.mean
        return based(batch, self.mean)

    def heldout(self) -> Batch:
        return based(super().heldout(), self.mean)

    def state(self) -> dict[str, Any]:
        return super().state() | {"mean": self.mean, "seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.mean, self.seen = state["mean"], state["seen"]


class PairedBinaryClassifier(Classifier, Paired):
    """BCO of pairs, see `preferences.bco_pair`."""

    def objective(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        assert batch.baselines is not None
        ratios = self.ratios(logprobs, batch)
        return preferences.bco_pair(ratios[0::2], ratios[1::2], self.settings.beta, batch.baselines[0::2])


class BinaryClassifier(Classifier, Unpaired):
    """BCO, see `preferences.bco`. `counts` is how much each item of the data counts."""

    settings: BCO

    def __init__(self, settings: BCO, world: World, policy: Policy, data: list[Answers], held: list[Answers]) -> None:
        super().__init__(settings, world, policy, data, held)
        self.counts = self.matched() if settings.match_prompts else torch.ones(len(data))

    def collate(self, indices: list[int]) -> Batch:
        return replace(super().collate(indices), weights=self.counts[indices])

    def objective(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        assert batch.targets is not None
        assert batch.baselines is not None
        weight = 1.0 if batch.weights is None else batch.weights
        good = batch.targets > 0.5
        return preferences.bco(self.ratios(logprobs, batch), good, batch.baselines, self.settings.beta, weight)

    def matched(self) -> Tensor:
        """(N,) 1 for good answers, and for bad ones how much likelier their prompt is among those of good answers."""
        settings = self.settings
        good = torch.tensor([item.targets[0] > 0.5 for item in self.data])
        counts = torch.ones(len(self.data))
        if good.all() or not good.any():
            return counts
        draw = torch.Generator().manual_seed(settings.seed)
        places = [torch.nonzero(kind).flatten() for kind in (good, ~good)]
        samples = [place[torch.randperm(len(place), generator=draw)[: settings.prompt_sample_size]] for place in places]
        low, high = settings.min_density_ratio, settings.max_density_ratio
        good_ones, bad_ones, asked = (self.embedded(sample.tolist()) for sample in (*samples, places[1]))
        counts[places[1]] = preferences.density_ratios(good_ones, bad_ones, asked, low, high)
        return counts

    @torch.no_grad()
    def embedded(self, indices: list[int]) -> Tensor:
        """(n, d) prompts as the mean of their last hidden states under the untrained policy."""
        batch = collate([self.data[i].encoded[0].prompt for i in indices], [[]] * len(indices))
        found = torch.zeros(len(batch), self.policy.width)
        base, config = self.policy.base, self.policy.backbone.config
        reader = base.encoder if getattr(config, "is_encoder_decoder", False) else base
        for part, places in batch.parts(self.tokens_per_pass):
            part = part.to(self.world.device)
            with self.world.autocast():
                output = reader(input_ids=part.tokens, attention_mask=part.attention.long())
            states = torch.where(part.attention[..., None], output.last_hidden_state.float(), 0.0).sum(1)
            found[places] = (states / part.lengths[:, None]).cpu()
        return found
