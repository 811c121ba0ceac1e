"""How much better than expected: advantages, divergences from a reference, and rewards shaped by them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------ divergences


def kl_k1(logprobs: Tensor, reference: Tensor) -> Tensor:
    """log pi - log ref, of the shape of both: an unbiased estimate of KL(pi || ref) per token sampled from pi.

    Schulman 2020, "Approximating KL divergence" (http://joschu.net/blog/kl-approx.html), k1. Its gradient is 0 in
    expectation: put it in the reward, not in the loss. Nothing flows to the reference, here or in k2 and k3.
    """
    return logprobs - reference.detach()


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2, of the shape of both: biased, but its gradient is that of KL(pi || ref) in
    expectation (Schulman 2020, k2)."""
    return 0.5 * kl_k1(logprobs, reference).square()


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi) >= 0, of the shape of both: unbiased, with less variance than k1 (Schulman 2020,
    k3). As a loss, its expected gradient is that of KL(ref || pi), the other direction."""
    ratio = -kl_k1(logprobs, reference)
    return torch.expm1(ratio) - ratio


@dataclass(frozen=True)
class AdaptiveKL:
    """The weight of the KL term, moved so that the divergence stays at `target` nats per completion.

    Ziegler et al. 2019 (arXiv:1909.08593), section 2.2. Without a target the coefficient is fixed.
    """

    coefficient: float
    target: float | None = None
    horizon: float = 10_000

    def updated(self, kl: float, n: int) -> AdaptiveKL:
        """After n completions whose mean divergence was `kl`."""
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return replace(self, coefficient=self.coefficient * (1 + error * n / self.horizon))


# ---------------------------------------------------------------------------------------------------------- rewards


def last_action(actions: Tensor) -> Tensor:
    """(B, T) -> (B,) the column of each row's last action; 0, which is never an action, for a row without any."""
    return (actions * torch.arange(actions.shape[1], device=actions.device)).amax(1)


def kl_shaped_rewards(
    scores: Tensor, logprobs: Tensor, reference: Tensor, actions: Tensor, coefficient: float
) -> Tensor:
    """scores (B,) and (B, T) streams -> (B, T) rewards: -coefficient * k1 at each action, and the score at the last.

    Ziegler et al. 2019 (arXiv:1909.08593), eq. 2, token by token. A row without actions earns nothing.
    """
    penalty = coefficient * kl_k1(logprobs, reference).detach()
    rewards = torch.where(actions, -penalty, torch.zeros_like(penalty))
    earned = torch.where(actions.any(1), scores.detach().to(rewards.dtype), torch.zeros_like(rewards[:, 0]))
    return rewards.scatter_add(1, last_action(actions)[:, None], earned[:, None])


@dataclass(frozen=True)
class RunningMoments:
    """Mean and spread of all values seen so far, to normalise rewards by; three plain numbers that can be saved.

    m2 is the sum of squared distances from the mean, merged as in Chan, Golub & LeVeque 1983.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """The biased standard deviation; 0 before anything was seen."""
        return math.sqrt(self.m2 / max(self.count, 1))

    def updated(self, values: Tensor) -> RunningMoments:
        """With these values too."""
        if values.numel() == 0:
            return self
        wide = values.detach().double()
        new, mean = values.numel(), float(wide.mean())
        count, gap = self.count + new, mean - self.mean
        m2 = self.m2 + float((wide - mean).square().sum()) + gap * gap * self.count * new / count
        return RunningMoments(count, self.mean + gap * new / count, m2)


# ------------------------------------------------------------------------------------------------------- advantages


def gae(
    rewards: Tensor, values: Tensor, actions: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, both (B, T), zero outside actions; nothing flows back.

    Schulman et al. 2016 (arXiv:1506.02438), eq. 16, as the recursion A_t = delta_t + gamma * lam * A_t' with
    delta_t = r_t + gamma * V_t' - V_t, where t' is the row's next action and V is 0 after the last. values[:, t] is
    the value of the state in which action t is taken. Columns that are no actions (a prompt, an observation, padding)
    are stepped over: they neither discount nor count, and rewards there are not seen. Returns are advantages + values.
    """
    rewards, values = rewards.detach(), values.detach()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(actions.any(0).nonzero().squeeze(1).tolist()):
        acts = actions[:, t]
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        next_advantage = torch.where(acts, advantage, next_advantage)
        next_value = torch.where(acts, values[:, t], next_value)
        advantages[:, t] = torch.where(acts, advantage, advantages[:, t])
    return advantages, torch.where(actions, advantages + values, advantages)
