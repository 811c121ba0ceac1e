"""Learning from preferences without a reward model: pairs of answers, and rankings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plaudit import preferences, reference
from plaudit.algorithms.base import FromData, HeldToReference, Stats
from plaudit.batch import Batch, collate
from plaudit.numerics import at_actions
from plaudit.policy import Policy
from plaudit.settings.preference import Precomputable, Referenced
from plaudit.settings.preference import Preference as Settings
from plaudit.templates import Encoded
from plaudit.world import World

_AT_ONCE = 512  # items whose reference is computed side by side, so that a large data set needs no large tensor


@dataclass(frozen=True)
class Answers:
    """Answers to one prompt, and a number for each: how far a pair's answer is preferred, a rank, 1.0 for good."""

    encoded: list[Encoded]
    targets: list[float]

    def __len__(self) -> int:
        return max(len(answer) for answer in self.encoded)


def rows(items: Sequence[Answers], indices: Sequence[int], known: list[Tensor] | None = None) -> Batch:
    """The answers of these items, those of one item in one group; `known` are the reference's log-probabilities of the
    actions of each item, if they were computed before."""
    chosen = [items[i] for i in indices]
    encoded = [answer for item in chosen for answer in item.encoded]
    groups = [g for g, item in enumerate(chosen) for _ in item.encoded]
    batch = collate(
        [e.prompt for e in encoded], [e.completion for e in encoded], groups, actions=[e.actions for e in encoded]
    )
    targets = torch.tensor([target for item in chosen for target in item.targets])
    index = torch.tensor([i for i, item in zip(indices, chosen, strict=True) for _ in item.encoded])
    batch = replace(batch, targets=targets, index=index)
    if known is None:
        return batch
    return replace(batch, reference_logprobs=at_actions(torch.cat([known[i] for i in indices]), batch.actions))


class PreferenceLearning(HeldToReference, FromData):
    """What all of them have in common: answers as rows, the reference's log-probabilities beside them, and held-out
    figures. A subclass says what the objective is; where that couples rows of a batch, `prepared` adds to each row what
    it has to know of the others."""

    settings: Any

    def __init__(
        self, settings: Settings, world: World, policy: Policy, data: list[Answers], held: list[Answers]
    ) -> None:
        super().__init__(settings, world, policy, data, held)
        self.known: list[Tensor] | None = None
        self.known_held: list[Tensor] | None = None
        self.held_rows: Batch | None = None
        self.refers = isinstance(settings, Referenced)
        if isinstance(settings, Precomputable) and settings.precompute_reference:
            # Nothing has been learned or restored yet: the policy is its own reference.
            self.known, self.known_held = self.remembered(data), self.remembered(held)
        elif self.refers:
            policy.keep_reference()

    def objective(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        """The sum of the loss over the batch's units, from the policy's log-probabilities (B, T)."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        return self.objective(self.model(batch).logprobs, batch)

    def collate(self, indices: list[int]) -> Batch:
        return rows(self.data, indices, self.known)

    def batches(self) -> Iterator[Batch]:
        for batch in super().batches():
            yield self.prepared(self.referred(batch))

    def prepared(self, batch: Batch) -> Batch:
        """The batch with what each of its rows has to know of the others, over all processes."""
        return batch

    # --------------------------------------------------------------------------------------------------- reference

    def referred(self, batch: Batch) -> Batch:
        """The batch with the reference's log-probabilities, if there is a reference."""
        if not self.refers or batch.reference_logprobs is not None:
            return batch
        batch = self.sharing_trunk(batch)  # of policy and reference
        with self.policy.as_reference():
            return replace(batch, reference_logprobs=self.over(batch, self.policy).logprobs)

    def remembered(self, items: list[Answers]) -> list[Tensor]:
        """The log-probabilities of the actions of each item under the present policy, from the cache if they are there;
        the processes share the work."""
        if not items:
            return []
        path = reference.file_of(self.policy, self.world.precision, [item.encoded for item in items])
        found = self.world.share(reference.read(path) if self.world.is_main else None)
        if found is not None:
            return found
        mine = list(range(len(items)))[self.world.rank :: self.world.size]
        computed: list[tuple[int, Tensor]] = []
        for start in range(0, len(mine), _AT_ONCE):
            some = mine[start : start + _AT_ONCE]
            batch = rows(items, some).to(self.world.device)
            logprobs = self.over(batch, self.policy).logprobs
            assert logprobs is not None
            lengths = [int(batch.actions[block].sum()) for block in batch.blocks()]
            computed += zip(some, torch.split(logprobs[batch.actions].cpu(), lengths), strict=True)
        in_order = [logprobs for _, logprobs in sorted(self.world.gather(computed), key=lambda one: one[0])]
        if self.world.is_main:
            reference.write(path, in_order)
        return in_order

    def move_reference(self) -> None:
        super().move_reference()
        self.held_rows = None

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.held_rows = None

    # -------------------------------------------------------------------------------------------- what is read of rows

    def totals(self, logprobs: Tensor | None, batch: Batch) -> Tensor:
        """(B,) log-probabilities (B, T) of whole answers."""
        assert logprobs is not None
        return torch.where(batch.actions, logprobs, torch.zeros_like(logprobs)).sum(1)

    def averages(self, logprobs: Tensor | None, batch: Batch) -> Tensor:
        """(B,) log-probabilities (B, T) of answers, averaged over their tokens."""
        return self.totals(logprobs, batch) / batch.actions.sum(1).clamp(min=1)

    def ratios(self, logprobs: Tensor | None, batch: Batch) -> Tensor:
        """(B,) log pi - log pi_ref of whole answers; nothing flows to the reference."""
        kept = self.totals(batch.reference_logprobs, batch).detach()
        return self.totals(logprobs, batch) - kept

    def average_ratios(self, logprobs: Tensor | None, batch: Batch) -> Tensor:
        """(B,) log-ratios, averaged over the tokens of each answer."""
        return self.ratios(logprobs, batch) / batch.actions.sum(1).clamp(min=1)

    # ---------------------------------------------------------------------------------------------------- evaluation

    def heldout(self) -> Batch:
        """The held-out rows with all that the objective reads; what the reference says of them is computed once."""
        if self.held_rows is None:
            batch = rows(self.held, range(len(self.held)), self.known_held)
            self.held_rows = self.referred(batch.to(self.world.device))
        return self.held_rows

    def evaluate(self) -> dict[str, float]:
        if not self.held:
            return {}
        batch = self.heldout()
        logprobs = self.over(batch, self.policy).logprobs
        assert logprobs is not None
        total, stats = self.objective(logprobs, batch)
        figures = {"loss": total, "accuracy": stats["accuracy"], "margin": stats["margin"]}
        return {f"heldout_{name}": float(value / self.weight(batch)) for name, value in figures.items()}


# ---------------------------------------------------------------------------------------------------------- pairs


class Paired(PreferenceLearning):
    """Rows 2i and 2i + 1 are the chosen and the rejected answer to one prompt. The unit is a pair."""

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch) // 2, device=batch.tokens.device)

    def objective(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        assert batch.targets is not None
        values = self.read(logprobs, batch)
        return self.pairs(values[0::2], values[1::2], batch.targets[0::2])

    def read(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """(B,) what the loss reads of each answer."""
        return self.ratios(logprobs, batch)

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        """The loss of pairs, and its statistics; all (P,)."""
        raise NotImplementedError


class DirectPreference(Paired):
    """DPO, see `preferences.dpo`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        smoothing = self.settings.label_smoothing
        return preferences.dpo(chosen, rejected, self.settings.beta, preference, smoothing)


class RobustDirectPreference(Paired):
    """Robust DPO, see `preferences.robust_dpo`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        smoothing = self.settings.label_smoothing
        return preferences.robust_dpo(chosen, rejected, self.settings.beta, preference, smoothing)


class NormalisedDirectPreference(DirectPreference):
    """DPO on log-ratios averaged over the tokens of each answer (Lambert et al. 2024, Tülu 3, arXiv:2411.15124)."""

    def read(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return self.average_ratios(logprobs, batch)


class IdentityPreference(Paired):
    """IPO, see `preferences.ipo`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        return preferences.ipo(chosen, rejected, self.settings.beta, preference)


class AveragedIdentityPreference(IdentityPreference):
    """IPO on log-ratios averaged over the tokens of each answer."""

    def read(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return self.average_ratios(logprobs, batch)


class HingePreference(Paired):
    """The hinge loss, see `preferences.hinge`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        return preferences.hinge(chosen, rejected, self.settings.beta, preference)


class EfficientExact(Paired):
    """EXO, see `preferences.exo`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        smoothing = self.settings.label_smoothing
        return preferences.exo(chosen, rejected, self.settings.beta, preference, smoothing)


class NoiseContrastive(Paired):
    """NCA, see `preferences.nca`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        return preferences.nca(chosen, rejected, self.settings.beta)


class SelfPlayPreference(Paired):
    """SPPO, see `preferences.sppo`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        return preferences.sppo(chosen, rejected, self.settings.beta, preference)


class AnchoredZero(Paired):
    """APO-zero, see `preferences.apo_zero`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        return preferences.apo_zero(chosen, rejected, self.settings.beta)


class AnchoredDown(Paired):
    """APO-down, see `preferences.apo_down`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        return preferences.apo_down(chosen, rejected, self.settings.beta)


class DiscoveredPreference(Paired):
    """DiscoPOP, see `preferences.discopop`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        return preferences.discopop(chosen, rejected, self.settings.beta, self.settings.tau)


# ------------------------------------------------------------------------------------------------- no reference


class Imitating(Paired):
    """Pairs without a reference, and imitation of the chosen answer, averaged over its tokens: of each answer of a
    pair, by as many people as preferred it."""

    def objective(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        assert batch.targets is not None
        total, stats = super().objective(logprobs, batch)
        imitation = -(batch.targets * self.averages(logprobs, batch)).sum()
        return total + self.settings.sft_weight * imitation, stats | {"chosen_nll": imitation.detach()}

    def read(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return self.totals(logprobs, batch)


class ContrastivePreference(Imitating):
    """CPO, see `preferences.cpo`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        smoothing = self.settings.label_smoothing
        return preferences.cpo(chosen, rejected, self.settings.beta, preference, smoothing)


class SequenceLikelihood(Imitating):
    """SLiC (Zhao et al. 2023, arXiv:2305.10425): `preferences.hinge` of log pi itself, summed over tokens."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        return preferences.hinge(chosen, rejected, self.settings.beta, preference)


class ReferenceFreeIdentity(Imitating):
    """`preferences.ipo` of log pi itself, averaged over the tokens of each answer."""

    def read(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return self.averages(logprobs, batch)

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        return preferences.ipo(chosen, rejected, self.settings.beta, preference)


class SimplePreference(Paired):
    """SimPO, see `preferences.simpo`."""

    def read(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return self.averages(logprobs, batch)

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        settings = self.settings
        return preferences.simpo(chosen, rejected, settings.beta, settings.gamma, settings.label_smoothing)


class ShapedPreference(SimplePreference):
    """AlphaPO, see `preferences.alphapo`."""

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        own = self.settings
        return preferences.alphapo(chosen, rejected, own.beta, own.gamma, own.alpha, own.label_smoothing)


class OddsRatio(Paired):
    """ORPO, see `preferences.orpo`."""

    def read(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return self.averages(logprobs, batch)

    def pairs(self, chosen: Tensor, rejected: Tensor, preference: Tensor) -> tuple[Tensor, Stats]:
        return preferences.orpo(chosen, rejected, self.settings.beta)


class RankResponses(PreferenceLearning):
    """RRHF, see `preferences.rrhf`: the targets are ranks, 1 the best. The unit is a prompt with its answers."""

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch.blocks()), device=batch.tokens.device)

    def objective(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Stats]:
        assert batch.targets is not None
        averages, totals = self.averages(logprobs, batch), self.totals(logprobs, batch)
        return preferences.rrhf(averages, totals, batch.targets, batch.groups, self.settings.rank_weight)
