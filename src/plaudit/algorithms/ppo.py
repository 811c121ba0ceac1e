"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), for text as in Ziegler et al. 2019
(arXiv:1909.08593): a KL penalty in the reward of each token, a value head, several epochs over each rollout."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from plaudit.advantages import gae
from plaudit.algorithms.base import Stats
from plaudit.algorithms.policy_gradient import ReusingAlgorithm
from plaudit.batch import Batch
from plaudit.losses import clipped_surrogate, clipped_value
from plaudit.numerics import standardise
from plaudit.policy import Output
from plaudit.settings import PPO


class ProximalPolicyOptimisation(ReusingAlgorithm):
    """The unit is a token. Values come from the pass in which the learner scores what was sampled."""

    settings: PPO

    def advantages(self, batch: Batch) -> Batch:
        settings, actions = self.settings, batch.actions
        batch, rewards = self.measured(batch)
        assert batch.values is not None
        assert batch.scores is not None
        # Before rewards are whitened, so that it is in the units of the score: a completion's score is added at its
        # last action, and the rest is the KL term's.
        of_kl = rewards.sum(1) - batch.scores * actions.any(1)
        if settings.whiten_rewards:
            rewards = standardise(rewards, actions, shift_mean=False, summed=self.world.sum)
        advantages, returns = gae(rewards, batch.values, actions, settings.gamma, settings.lam)
        came, expected = returns[actions], batch.values[actions]
        self.notes |= self.means({"return": came, "value": expected, "kl_reward": of_kl})
        self.notes |= self.deviations({"return": came, "value": expected}, self.notes)
        self.notes["explained_variance"] = self.explained(came, expected)
        if settings.whiten_advantages:
            advantages = standardise(advantages, actions, summed=self.world.sum)
        return self.kept(replace(batch, advantages=advantages, returns=returns))

    def explained(self, came: Tensor, expected: Tensor) -> float:
        """The share of the returns' variance that the values (N,) of as many actions foresaw; 0 is no better than their
        mean."""
        missed = {"missed": came - expected}
        left = self.deviations(missed, self.means(missed))["missed_std"]
        return 1 - left**2 / max(self.notes["return_std"] ** 2, 1e-12)

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        settings = self.settings
        policy, stats = clipped_surrogate(
            output.logprobs,
            batch.logprobs,
            batch.advantages,
            batch.actions,
            settings.clip,
            dual_clip=settings.dual_clip,
        )
        value, value_stats = clipped_value(
            output.values, batch.values, batch.returns, batch.actions, settings.value_clip or math.inf
        )
        stats |= {"policy_loss": policy.detach(), "value_loss": value.detach(), **value_stats}
        return policy + settings.value_weight * value, stats
