"""Policy gradients: what they share, and those that do without groups, or take a group's others as a baseline."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from plaudit.advantages import (
    AdaptiveKL,
    BudgetedKL,
    group_centred,
    kl_abs,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_shaped_rewards,
    kl_straight_through,
    leave_one_out,
    ranked_between,
    rewards_to_go,
)
from plaudit.algorithms.base import HeldToReference, Stats
from plaudit.algorithms.on_policy import OnPolicyAlgorithm
from plaudit.algorithms.vocabulary import exact_divergence
from plaudit.batch import Batch
from plaudit.losses import clipped_surrogate, reinforce, sequence_surrogate
from plaudit.numerics import standardise
from plaudit.policy import Output
from plaudit.settings.policy_gradient import (
    GMPO,
    RLOO,
    VPG,
    Clipped,
    PolicyGradient,
    ReinforcePP,
    Reusing,
)

IN_REWARD = {"reward": kl_k1, "reward_abs": kl_abs, "reward_mse": kl_k2, "reward_full": kl_k1}
IN_LOSS = {"k2": kl_k2, "k3": kl_k3, "straight_through": kl_straight_through}


class PolicyGradientAlgorithm(HeldToReference, OnPolicyAlgorithm):
    """KL to a reference, in the reward or in the loss; entropy; completions left out of the loss. The unit is a token.

    A subclass says what credit each action gets, and what the objective makes of it.
    """

    settings: PolicyGradient
    rescored = True
    """Whether the log-probabilities of this rollout are the learner's, not the sampler's."""

    def __init__(self, settings: PolicyGradient, *args: Any) -> None:
        super().__init__(settings, *args)
        self.controller: AdaptiveKL | BudgetedKL
        if settings.kl_budget:
            self.controller = BudgetedKL(settings.kl, settings.kl_budget, settings.kl_rate)
        else:
            self.controller = AdaptiveKL(settings.kl, settings.kl_target or None, settings.kl_horizon)
        self.penalised = settings.penalised
        if self.penalised:
            self.policy.keep_reference()

    # ------------------------------------------------------------------------------------------------- a rollout

    def advantages(self, batch: Batch) -> Batch:
        batch, rewards = self.measured(batch)
        return self.kept(replace(batch, advantages=self.credit(batch, rewards)))

    def credit(self, batch: Batch, rewards: Tensor) -> Tensor:
        """(B, T) the advantage of each action, from what it earned (B, T)."""
        raise NotImplementedError

    def measured(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch with what learner and reference make of it, and (B, T) what each action earned.

        The policy that sampled is scored again by the learner, once. Where the rollout is learned from in a single
        step and nothing else needs that pass, it is left out after the first rollout: see `loss`.
        """
        assert batch.logprobs is not None
        assert batch.scores is not None
        actions, term = batch.actions, self.settings.kl_term
        in_reward, exactly = term in IN_REWARD, term == "reward_full" and self.penalised
        needed = self.policy.value is not None or (self.penalised and in_reward) or self.per_rollout > 1
        self.rescored = needed or not self.position
        own = Output(logprobs=batch.logprobs)
        if self.rescored:
            own = self.over(batch, lambda part: self.policy(part, values=True, origins=exactly))
        assert own.logprobs is not None
        found = Output()
        if self.penalised:
            with self.policy.as_reference():
                found = self.over(batch, partial(self.policy, origins=True) if exactly else self.policy)
        reference = found.logprobs
        kept = own.logprobs if reference is None else reference
        if self.rescored:
            self.check_start(batch.logprobs, own.logprobs, kept, actions)
        weight = self.controller.coefficient
        divergence = IN_REWARD.get(term, kl_k1)(own.logprobs, kept)
        if exactly:
            divergence = exact_divergence(self.policy, self.world, own.origins, found.origins, actions)
            self.notes["kl_exact"] = self.mean(divergence.sum(1))
        shaping = weight if in_reward else 0.0
        rewards = kl_shaped_rewards(batch.scores, own.logprobs, kept, actions, shaping, divergence)
        if reference is not None:
            self.notes["kl"] = self.mean((kl_k1(own.logprobs, kept) * actions).sum(1))
            self.controller = self.controller.updated(self.notes["kl"], self.settings.rollout)
            # In the loss, the weight counts as it is now; in the reward, as it was when this was earned.
            self.notes["kl_coefficient"] = weight if in_reward else self.controller.coefficient
        kept_for_loss = None if in_reward else reference
        return replace(batch, logprobs=own.logprobs, values=own.values, reference_logprobs=kept_for_loss), rewards

    def kept(self, batch: Batch) -> Batch:
        """Without the actions of completions that are to be left out of the loss."""
        worst, best = self.settings.reject_worst, self.settings.reject_best
        if not (self.settings.mask_truncated or worst or best):
            return batch
        assert batch.scores is not None
        assert batch.truncated is not None
        everywhere = torch.cat(self.world.gather([batch.scores.cpu()]))
        mine = slice(self.world.rank * len(batch), (self.world.rank + 1) * len(batch))
        kept = ranked_between(everywhere, worst, best)[mine].to(batch.actions.device)
        if self.settings.mask_truncated:
            kept &= ~batch.truncated
        self.notes["rejected"] = 1 - self.mean(kept.float())
        return replace(batch, actions=batch.actions & kept[:, None])

    def standardised(self, gains: Tensor) -> Tensor:
        """(B,) -> (B,) with mean 0 and standard deviation 1 over the rollout, of all processes."""
        # In double precision the mean of equal numbers is that number, so that no rounding is blown up.
        everyone = torch.ones_like(gains, dtype=torch.bool)
        return standardise(gains.double(), everyone, summed=self.world.sum).to(gains.dtype)

    # ---------------------------------------------------------------------------------------------- the contract

    def share(self, batch: Batch) -> Tensor:
        """(B, T) what each action counts for in the loss, in units; 0 elsewhere."""
        return batch.actions.float()

    def counted(self, batch: Batch) -> Tensor:
        """(B, T) what each action counts for in statistics: summed, the units of the batch."""
        return self.share(batch)

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        output = self.model(batch, values=True, entropy=self.settings.entropy > 0)
        share, counted = self.share(batch), self.counted(batch)
        sampled = batch.logprobs
        if self.unmoved:  # its ratios are 1, whatever rounding says of a batch that was cut otherwise
            batch = replace(batch, logprobs=output.logprobs.detach())
        loss, stats = self.objective(output, batch)
        if not self.rescored:
            stats["sampler_gap"] = (counted * (output.logprobs.detach() - sampled).abs()).sum()
        if batch.reference_logprobs is not None:
            reference = torch.where(batch.actions, batch.reference_logprobs, torch.zeros_like(output.logprobs))
            apart = IN_LOSS[self.settings.kl_term](output.logprobs, reference)
            loss = loss + self.controller.coefficient * (share * apart).sum()
            stats["kl_loss"] = (counted * apart.detach()).sum()
        if self.settings.entropy:
            loss = loss - self.settings.entropy * (share * output.entropy).sum()
            stats["entropy"] = (counted * output.entropy.detach()).sum()
        return loss, stats

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        """() the loss without KL and entropy, and its statistics, as sums over units."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {**super().state(), "coefficient": self.controller.coefficient}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.controller = replace(self.controller, coefficient=state["coefficient"])


class ReusingAlgorithm(PolicyGradientAlgorithm):
    """Several epochs over each rollout, whose rest is given up when the policy has moved too far."""

    settings: Reusing

    def __init__(self, settings: Reusing, *args: Any) -> None:
        self.reuse = settings.reuse
        super().__init__(settings, *args)
        self.moved = 0.0  # approximate KL from the policy that sampled, at the present step

    def objection(self, figures: dict[str, float]) -> str:
        self.moved = figures["approx_kl"]
        ratio, most = figures["ratio"], self.settings.ratio_threshold
        return f"the mean ratio is {ratio:.3g}, more than ratio_threshold" if 0 < most < ratio else ""

    def after_step(self, step: int) -> None:
        """Gives up the rest of a rollout that the policy has moved too far from."""
        super().after_step(step)
        if 0 < self.settings.target_kl < self.moved:
            self.position += -self.position % self.per_rollout
        self.moved = 0.0  # a step that is skipped tells nothing of its own


class BySequence(PolicyGradientAlgorithm):
    """The unit is a sequence, of which each action is an equal part. A sequence left out of the loss is none."""

    def weight(self, batch: Batch) -> Tensor:
        return batch.actions.any(1).sum()

    def share(self, batch: Batch) -> Tensor:
        return batch.actions / batch.actions.sum(1, keepdim=True).clamp(min=1)

    def counted(self, batch: Batch) -> Tensor:
        return BySequence.share(self, batch)


def everywhere(values: Tensor, batch: Batch) -> Tensor:
    """(B,) -> (B, T): a completion's value at each of its actions."""
    return values[:, None] * batch.actions


# ---------------------------------------------------------------------------------------------------- one completion


class VanillaPolicyGradient(BySequence):
    """REINFORCE (Williams 1992): mean over completions of -(sum of log pi) * (reward - baseline)."""

    settings: VPG

    def __init__(self, settings: VPG, *args: Any) -> None:
        super().__init__(settings, *args)
        self.baseline = 0.0

    def credit(self, batch: Batch, rewards: Tensor) -> Tensor:
        gains = rewards.sum(1)
        mean = self.mean(gains)
        if self.settings.baseline == "ema":
            self.baseline = 0.9 * self.baseline + 0.1 * mean
        elif self.settings.baseline == "mean":
            self.baseline = mean
        self.notes["baseline"] = self.baseline
        return everywhere(gains - self.baseline, batch)

    def share(self, batch: Batch) -> Tensor:
        return batch.actions.float()

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        return reinforce(output.logprobs, batch.advantages, batch.actions)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "baseline": self.baseline}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.baseline = state["baseline"]


class ReinforcePlusPlus(ReusingAlgorithm):
    """REINFORCE++ (Hu 2025, arXiv:2501.03262): rewards to go, KL included, standardised over the whole rollout."""

    settings: ReinforcePP

    def credit(self, batch: Batch, rewards: Tensor) -> Tensor:
        to_go = rewards_to_go(rewards, batch.actions)
        if self.settings.baseline == "group":
            to_go = to_go + (group_centred(batch.scores, self.settings.group) - batch.scores)[:, None]
        # In double precision the mean of equal numbers is that number, so that no rounding is blown up.
        return standardise(to_go.double(), batch.actions, summed=self.world.sum).float()

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        return clipped_surrogate(
            output.logprobs, batch.logprobs, batch.advantages, batch.actions, bounds(self.settings)
        )


class LeaveOneOut(BySequence, ReusingAlgorithm):
    """RLOO (Ahmadian et al. 2024, arXiv:2402.14740): a completion is one action, its ratio the product of all."""

    settings: RLOO

    def credit(self, batch: Batch, rewards: Tensor) -> Tensor:
        led = leave_one_out(rewards.sum(1), self.settings.group)
        return everywhere(self.standardised(led) if self.settings.whiten_advantages else led, batch)

    def share(self, batch: Batch) -> Tensor:
        return batch.actions.float()

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        clip = bounds(self.settings)
        return sequence_surrogate(output.logprobs, batch.logprobs, batch.advantages, batch.actions, clip, mean=False)


def bounds(settings: Clipped | GMPO) -> tuple[float, float]:
    """How far below and above 1 a ratio may lie, or its logarithm below and above 0."""
    return settings.clip_low, settings.clip_high
