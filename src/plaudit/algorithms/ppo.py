"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), for text as in Ziegler et al. 2019
(arXiv:1909.08593): a KL penalty in the reward of each token, a value head, several epochs over each rollout."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plaudit.advantages import gae, kl_k1, kl_shaped_rewards
from plaudit.algorithms.base import Stats
from plaudit.algorithms.on_policy import OnPolicyAlgorithm
from plaudit.batch import Batch
from plaudit.losses import clipped_surrogate, clipped_value
from plaudit.numerics import standardise
from plaudit.settings import PPO


class ProximalPolicyOptimisation(OnPolicyAlgorithm):
    """The unit is a token. The policy that sampled is scored again by the learner, once, in the pass that gives the
    values: ratios then start at 1 in every precision."""

    settings: PPO

    def __init__(self, settings: PPO, *args: Any) -> None:
        self.reuse = settings.reuse
        super().__init__(settings, *args)
        if settings.kl or settings.kl_target:
            self.policy.keep_reference()
        self.moved: list[Tensor] = []  # (sum of approximate KL, tokens) of this step's micro-batches

    def advantages(self, batch: Batch) -> Batch:
        settings, actions = self.settings, batch.actions
        own = self.over(batch, lambda part: self.policy(part, values=True))
        assert own.logprobs is not None
        assert own.values is not None
        assert batch.logprobs is not None
        reference = own.logprobs
        if settings.kl or settings.kl_target:
            with self.policy.as_reference():
                kept = self.over(batch, self.policy).logprobs
            assert kept is not None
            reference = kept
        self.check_start(batch.logprobs, own.logprobs, reference, actions)
        divergence = (kl_k1(own.logprobs, reference) * actions).sum(1)
        rewards = kl_shaped_rewards(batch.scores, own.logprobs, reference, actions, self.controller.coefficient)
        if settings.whiten_rewards:
            rewards = standardise(rewards, actions, shift_mean=False, summed=self.world.sum)
        advantages, returns = gae(rewards, own.values, actions, settings.gamma, settings.lam)
        self.notes |= {
            "kl": self.mean(divergence),
            "kl_coefficient": self.controller.coefficient,
            "return": self.mean(returns[actions]),
            "value": self.mean(own.values[actions]),
            "explained_variance": self.explained(returns, own.values, actions),
        }
        self.controller = self.controller.updated(self.notes["kl"], settings.rollout)
        if settings.whiten_advantages:
            advantages = standardise(advantages, actions, summed=self.world.sum)
        return replace(batch, logprobs=own.logprobs, values=own.values, advantages=advantages, returns=returns)

    def explained(self, returns: Tensor, values: Tensor, actions: Tensor) -> float:
        """The share of the returns' variance that the values foresaw; 0 is no better than their mean."""
        chosen = returns[actions]
        errors = chosen - values[actions]
        spread = self.mean((chosen - self.mean(chosen)).square())
        return 1 - self.mean((errors - self.mean(errors)).square()) / max(spread, 1e-12)

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        output = self.model(batch, values=True)
        policy, stats = clipped_surrogate(
            output.logprobs, batch.logprobs, batch.advantages, batch.actions, self.settings.clip
        )
        value, value_stats = clipped_value(
            output.values, batch.values, batch.returns, batch.actions, self.settings.value_clip or math.inf
        )
        self.moved.append(torch.stack([stats["approx_kl"].double(), batch.actions.sum().double()]))
        stats |= {"policy_loss": policy.detach(), "value_loss": value.detach(), **value_stats}
        return policy + self.settings.value_weight * value, stats

    def after_step(self, step: int) -> None:
        """Gives up the rest of a rollout that the policy has moved too far from."""
        moved, tokens = self.world.sum(torch.stack(self.moved).sum(0)).tolist()
        self.moved.clear()
        if self.settings.target_kl and moved / max(tokens, 1) > self.settings.target_kl:
            self.position += -self.position % self.per_rollout
