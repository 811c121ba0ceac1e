"""Learning from preferences among one's own samples, and imitating the best of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plaudit.advantages import degenerate, kl_k1
from plaudit.algorithms.base import HeldToReference, Stats
from plaudit.algorithms.on_policy import OnPolicyAlgorithm
from plaudit.batch import Batch
from plaudit.losses import nll
from plaudit.preferences import dpo, ipo
from plaudit.settings.online import BestOfN, FromOwnPairs, OnlineDPO


class FromOwnSamples(HeldToReference, OnPolicyAlgorithm):
    """The best and the worst completion of a prompt are a pair, whose loss a subclass says.

    The unit is a pair. Rows stand in pairs, the best first; a pair of equal rewards has no actions and is none.
    """

    settings: FromOwnPairs

    def __init__(self, settings: FromOwnPairs, *args: Any) -> None:
        super().__init__(settings, *args)
        self.policy.keep_reference()

    def advantages(self, batch: Batch) -> Batch:
        own = self.over(batch, self.policy).logprobs
        with self.policy.as_reference():
            reference = self.over(batch, self.policy).logprobs
        assert own is not None
        assert reference is not None
        assert batch.logprobs is not None
        assert batch.scores is not None
        self.check_start(batch.logprobs, own, reference, batch.actions)
        self.notes["kl"] = self.mean((kl_k1(own, reference) * batch.actions).sum(1))
        alike = degenerate(batch.scores, self.settings.group).repeat_interleave(2)
        worst, best = extremes(batch.scores, self.settings.group)
        rows = torch.stack([best, worst], 1).flatten()
        pairs = replace(batch, logprobs=None, reference_logprobs=reference).rows(rows)
        return replace(pairs, actions=pairs.actions & ~alike[:, None])

    def weight(self, batch: Batch) -> Tensor:
        return batch.actions[0::2].any(1).sum()

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        logprobs = self.model(batch).logprobs
        reference = torch.where(batch.actions, batch.reference_logprobs.detach(), torch.zeros_like(logprobs))
        ratios = (logprobs - reference.detach()).sum(1)
        told_apart = batch.actions[0::2].any(1)
        return self.pairs(ratios[0::2][told_apart], ratios[1::2][told_apart])

    def pairs(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Stats]:
        """The loss of pairs, and its statistics, from the log-ratios (P,) of both sides."""
        raise NotImplementedError


class OnlineDirectPreference(FromOwnSamples):
    """Online DPO (Guo et al. 2024, arXiv:2402.04792): the pairs are learned from by the loss of DPO."""

    settings: OnlineDPO

    def pairs(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Stats]:
        return dpo(chosen, rejected, self.settings.beta, label_smoothing=self.settings.label_smoothing)


class OnlineIdentityPreference(FromOwnSamples):
    """Online IPO (Calandriello et al. 2024, arXiv:2403.08635): by the loss of IPO."""

    def pairs(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Stats]:
        return ipo(chosen, rejected, self.settings.beta)


class BestOfSeveral(OnPolicyAlgorithm):
    """Rejection-sampling fine-tuning (Touvron et al. 2023, arXiv:2307.09288, section 3.2.3; Dong et al. 2023, RAFT,
    arXiv:2304.06767): maximum likelihood of the best completion of each prompt. The unit is a token."""

    settings: BestOfN

    def advantages(self, batch: Batch) -> Batch:
        assert batch.scores is not None
        _, best = extremes(batch.scores, self.settings.group)
        self.notes["best_score"] = self.mean(batch.scores[best])
        return replace(batch, logprobs=None).rows(best)

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        return nll(self.model(batch).logprobs, batch.actions)


def extremes(scores: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """(N,) -> (N / group,) twice: the row of the worst and of the best of each group, of `group` neighbours; of equals,
    the first is the worst and the last the best."""
    order = scores.view(-1, group).argsort(dim=1, stable=True)
    first = torch.arange(0, len(scores), group, device=scores.device)
    return first + order[:, 0], first + order[:, -1]
