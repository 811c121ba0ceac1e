"""Implicit language Q-learning (Snell et al. 2022, arXiv:2206.11871): what each token is worth, from logged texts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plaudit.algorithms.base import FromData, Stats
from plaudit.algorithms.sft import rows
from plaudit.batch import Batch
from plaudit.errors import PlauditError
from plaudit.losses import nll
from plaudit.numerics import masked_sum
from plaudit.offline_losses import conservative, expectile, next_values, temporal_difference, weighted_imitation
from plaudit.settings import ILQL
from plaudit.templates import Encoded


@dataclass(frozen=True, kw_only=True)
class Logged(Encoded):
    """A text that somebody wrote, and what each token after the prompt earned."""

    rewards: list[float]


def normalised(items: list[Logged], others: list[Logged]) -> tuple[list[Logged], list[Logged]]:
    """Both with rewards r / s, less m / s at each text's last action: m is the mean and s the standard deviation of
    the returns of `items`. Raises PlauditError if all returns are equal."""
    returns = [math.fsum(item.rewards) for item in items]
    mean = math.fsum(returns) / len(returns)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in returns) / len(returns))
    if spread <= 1e-12 * max(abs(mean), 1.0):
        raise PlauditError(
            f"data: every text earned {mean:g}, so none is better than another: rate them apart, or "
            "set reward_normalise to false."
        )

    def shifted(item: Logged) -> Logged:
        rewards = [reward / spread for reward in item.rewards]
        last = max(k for k, acting in enumerate(item.actions) if acting)
        rewards[last] -= mean / spread
        return replace(item, rewards=rewards)

    return [shifted(item) for item in items], [shifted(item) for item in others]


class ImplicitLanguageQLearning(FromData):
    """V is an expectile of what the target Q heads give the logged tokens, Q is the reward plus the discounted V of
    the next state, and the policy imitates; decoding tilts it by Q - V. The unit is a token."""

    settings: ILQL

    def collate(self, indices: list[int]) -> Batch:
        return self.logged(self.data, indices)

    def logged(self, items: list[Logged], indices: list[int]) -> Batch:
        """The batch of these items, with what each action earned."""
        batch = rows(items, indices)
        rewards = torch.zeros(batch.tokens.shape)
        for row, item in enumerate(items[i] for i in indices):
            rewards[row, len(item.prompt) : len(item)] = torch.tensor(item.rewards)
        return replace(batch, rewards=rewards)

    def weight(self, batch: Batch) -> Tensor:
        return batch.actions.sum()

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        settings, actions, rewards = self.settings, batch.actions, batch.rewards
        found = self.model(batch, worth=True)
        advantages = found.target_q - found.values
        following = next_values(found.values, actions)
        td, _ = temporal_difference(found.q, rewards, following, actions, settings.gamma)
        value, _ = expectile(found.values, found.target_q, actions, settings.expectile)
        cql, _ = conservative(found.q_logprobs, actions)
        imitated, stats = weighted_imitation(found.logprobs, advantages, actions, settings.awac_beta)
        stats |= {"td_loss": td.detach(), "value_loss": value.detach(), "cql_loss": cql.detach()}
        for name, stream in {"q": found.target_q, "value": found.values}.items():
            stats[name] = masked_sum(stream.detach(), actions)
        return td + value + settings.cql * cql + settings.awac * imitated, stats

    def after_step(self, step: int) -> None:
        if step % self.settings.target_every == 0:
            self.policy.heads.follow(self.settings.polyak)

    def evaluate(self) -> dict[str, float]:
        """Nats per token of the held-out texts, and how far a head's Q is from its target, squared."""
        if not self.held:
            return {}
        batch = self.logged(self.held, list(range(len(self.held)))).to(self.world.device)
        found = self.over(batch, lambda part: self.policy(part, worth=True))
        actions, settings = batch.actions, self.settings
        following = next_values(found.values, actions)
        td, _ = temporal_difference(found.q, batch.rewards, following, actions, settings.gamma)
        total, _ = nll(found.logprobs, actions)
        count = actions.sum()
        return {"heldout_nll": float(total / count), "heldout_td": float(td / count / 2)}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "target": self.policy.heads.target.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.policy.heads.target.load_state_dict(state["target"])
