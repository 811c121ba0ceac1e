"""DPO by another divergence, without its favour for length, weighed by the policy, and as a part of a mixture."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from plaudit import preferences
from plaudit.algorithms.base import Stats
from plaudit.algorithms.preference import DirectPreference
from plaudit.algorithms.unpaired import PairedBinaryClassifier
from plaudit.algorithms.vocabulary import closeness
from plaudit.batch import Batch
from plaudit.policy import Output
from plaudit.settings.preference import MPO, WPO, DivergenceDPO, LengthDesensitisedDPO


class DivergencePreference(DirectPreference):
    """f-DPO (Wang et al. 2023, arXiv:2309.16240), eq. 8: see `preferences.divergence_slope`."""

    settings: DivergenceDPO

    def read(self, logprobs: Tensor, batch: Batch) -> Tensor:
        own = self.settings
        return preferences.divergence_slope(self.ratios(logprobs, batch), own.divergence, own.alpha)


class LengthDesensitised(DirectPreference):
    """LD-DPO (Liu et al. 2024, arXiv:2409.06411), eq. 10: log-probabilities beyond the length of the shorter answer of
    a pair weigh `alpha`."""

    settings: LengthDesensitisedDPO

    def totals(self, logprobs: Tensor | None, batch: Batch) -> Tensor:
        assert logprobs is not None
        place = batch.actions.cumsum(1)
        shared = place[:, -1].view(-1, 2).amin(1).repeat_interleave(2)
        weight = torch.where(place <= shared[:, None], 1.0, self.settings.alpha).to(logprobs.dtype)
        return super().totals(weight * logprobs, batch)


class WeightedPreference(DirectPreference):
    """WPO (Zhou et al. 2024, arXiv:2406.11827), eq. 2 with the sampled alignment of its section 3.2: the loss of a pair
    times how much the policy itself would answer so, through which nothing flows."""

    settings: WPO

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        output = self.model(batch, origins=True)
        return self.objective(output.logprobs, replace(batch, weights=self.likeness(output, batch)))

    def objective(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        assert batch.targets is not None
        assert batch.weights is not None
        weight = batch.weights[0::2] * batch.weights[1::2]
        values = self.read(logprobs, batch)
        own = self.settings
        return preferences.dpo(values[0::2], values[1::2], own.beta, batch.targets[0::2], own.label_smoothing, weight)

    def heldout(self) -> Batch:
        batch = super().heldout()
        found = self.over(batch, lambda part: Output(scores=self.likeness(self.policy(part, origins=True), part)))
        return replace(batch, weights=found.scores)

    def likeness(self, output: Output, batch: Batch) -> Tensor:
        """(B,) the geometric mean, over an answer, of how likely each token is beside one of the policy's own."""
        close = closeness(self.policy, self.world, output.logprobs, output.origins, batch.actions)
        return self.averages(close, batch).exp()


class MixedPreference(PairedBinaryClassifier):
    """MPO (Wang et al. 2024, arXiv:2411.10442), eq. 5 to 7: how answers compare, how good each is, how to say it."""

    settings: MPO

    def objective(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        own, ratios = self.settings, self.ratios(logprobs, batch)
        quality, _ = super().objective(logprobs, batch)
        preference, stats = preferences.dpo(ratios[0::2], ratios[1::2], own.beta)
        imitation = -self.averages(logprobs, batch)[0::2].sum()
        total = own.dpo_weight * preference + own.bco_weight * quality + own.sft_weight * imitation
        return total, stats | {"chosen_nll": imitation.detach()}
