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


def kl_abs(logprobs: Tensor, reference: Tensor) -> Tensor:
    """|log pi - log ref|, of the shape of both: no divergence, but a price on every departure (TRL 0.7's `abs`)."""
    return kl_k1(logprobs, reference).abs()


def kl_k2(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2, of the shape of both: biased, but its gradient is that of KL(pi || ref) in
    expectation (Schulman 2020, k2)."""
    return 0.5 * kl_k1(logprobs, reference).square()


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi) >= 0, of the shape of both: unbiased, with less variance than k1 (Schulman 2020,
    k3). As a loss, its expected gradient is that of KL(ref || pi), the other direction."""
    ratio = -kl_k1(logprobs, reference)
    return torch.expm1(ratio) - ratio


def kl_straight_through(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2, of the shape of both: as a loss, the better estimate that also pulls
    along KL(pi || ref), as k3 alone does not (Tang & Munos 2025, arXiv:2506.09477)."""
    pulling = kl_k2(logprobs, reference)
    return kl_k3(logprobs, reference).detach() + pulling - pulling.detach()


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


@dataclass(frozen=True)
class BudgetedKL:
    """The weight of the KL term as the multiplier of a constraint: at most `budget` nats per completion.

    Dual ascent (Arrow, Hurwicz & Uzawa 1958): the weight rises while the divergence is above the budget and falls
    while it is below, down to 0, where the constraint costs nothing. It moves by `rate` times how far the divergence is
    off, as a share of the budget and at most 1, so that one great excess is not paid for long after it is over.
    """

    coefficient: float
    budget: float
    rate: float = 0.05

    def updated(self, kl: float, n: int) -> BudgetedKL:
        """After a rollout, of n completions, whose mean divergence was `kl`."""
        error = min(max(kl / self.budget - 1, -1.0), 1.0)
        return replace(self, coefficient=max(0.0, self.coefficient + self.rate * error))


# ---------------------------------------------------------------------------------------------------------- rewards


def last_action(actions: Tensor) -> Tensor:
    """(B, T) -> (B,) the column of each row's last action; 0, which is never an action, for a row without any."""
    return (actions * torch.arange(actions.shape[1], device=actions.device)).amax(1)


def kl_shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    reference: Tensor,
    actions: Tensor,
    coefficient: float,
    divergence: Tensor | None = None,
) -> Tensor:
    """scores (B,) and (B, T) streams -> (B, T) rewards: -coefficient * divergence (B, T), by default k1, at each
    action, and the score at the last.

    Ziegler et al. 2019 (arXiv:1909.08593), eq. 2, token by token. A row without actions earns nothing.
    """
    penalty = coefficient * (kl_k1(logprobs, reference) if divergence is None else divergence).detach()
    rewards = torch.where(actions, -penalty, torch.zeros_like(penalty))
    earned = torch.where(actions.any(1), scores.detach().to(rewards.dtype), torch.zeros_like(rewards[:, 0]))
    return rewards.scatter_add(1, last_action(actions)[:, None], earned[:, None])


def overlong_penalty(lengths: Tensor, limit: int, share: float) -> Tensor:
    """(N,) lengths in tokens -> (N,) between 0 and -1: nothing up to limit * (1 - share), then falling to -1 at the
    limit. Yu et al. 2025 (arXiv:2503.14476), eq. 13, whose cache is limit * share; nothing at all for share 0."""
    lengths = lengths.float()
    return ((limit * (1 - share) - lengths) / (limit * share)).clamp(-1, 0) if share else torch.zeros_like(lengths)


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


def rewards_to_go(rewards: Tensor, actions: Tensor) -> Tensor:
    """(B, T) -> (B, T) what each action and those after it in its row earn, undiscounted; zero outside actions."""
    earned = torch.where(actions, rewards.detach(), torch.zeros_like(rewards))
    return torch.where(actions, earned.flip(1).cumsum(1).flip(1), earned)


# ----------------------------------------------------------------------------- advantages among completions of a prompt

# Rewards of a group that are closer than this are equal: what tells them apart is rounding, and dividing by it would
# turn that into a lesson.
EQUAL = 1e-6


def degenerate(rewards: Tensor, group: int) -> Tensor:
    """(N,) -> (N / group,) True for groups, of `group` neighbours, whose rewards are all equal: they teach nothing."""
    sets = rewards.detach().view(-1, group)
    return sets.amax(1) - sets.amin(1) <= EQUAL


def group_centred(rewards: Tensor, group: int) -> Tensor:
    """(N,) -> (N,) each reward less the mean of its group, of `group` neighbours; exactly 0 where all are equal.

    Liu et al. 2025 (arXiv:2503.20783), Dr. GRPO.
    """
    sets = rewards.detach().double().view(-1, group)
    centred = sets - sets.mean(1, keepdim=True)
    return centred.masked_fill(degenerate(rewards, group)[:, None], 0).flatten().to(rewards.dtype)


def group_standardised(rewards: Tensor, group: int) -> Tensor:
    """(N,) -> (N,) `group_centred` over the group's standard deviation, which is the unbiased one; exactly 0 where all
    are equal. Shao et al. 2024 (arXiv:2402.03300), section 4.1.2."""
    centred = group_centred(rewards.double(), group).view(-1, group)
    spread = (centred.square().sum(1, keepdim=True) / max(group - 1, 1)).sqrt()
    return torch.where(spread > 0, centred / spread, torch.zeros_like(centred)).flatten().to(rewards.dtype)


def decoupled(each: Tensor, weights: Tensor, group: int) -> Tensor:
    """(K, N) rewards by K sources -> (N,) the sum by `weights` (K,) of what each is within its group, of `group`
    neighbours, as `group_standardised` among those that it applies to: NaN is none. Liu et al. 2026 (GDPO,
    arXiv:2601.05242)."""
    sets = each.detach().double().view(len(each), -1, group)
    applies = ~sets.isnan()
    count = applies.sum(2, keepdim=True)
    known = sets.nan_to_num(0.0)
    centred = torch.where(applies, known - known.sum(2, keepdim=True) / count.clamp(min=1), 0.0)
    spread = (centred.square().sum(2, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    placed = torch.where(spread > EQUAL, centred / spread, torch.zeros_like(centred))
    return (weights.to(placed)[:, None] * placed.flatten(1)).sum(0).to(each.dtype)


def leave_one_out(rewards: Tensor, group: int) -> Tensor:
    """(N,) -> (N,) each reward less the mean of the others of its group, of `group` neighbours; exactly 0 where all
    are equal, or alone. Ahmadian et al. 2024 (arXiv:2402.14740), RLOO."""
    return group_centred(rewards, group) * (group / max(group - 1, 1))


def ranked_between(rewards: Tensor, worst: float, best: float) -> Tensor:
    """(N,) -> (N,) False for the share `worst` with the smallest and the share `best` with the largest rewards, both
    rounded down to whole rows; of equal rewards, earlier rows count as smaller."""
    order = rewards.detach().argsort(stable=True)
    count = len(rewards)
    kept = torch.zeros(count, dtype=torch.bool, device=rewards.device)
    kept[order[int(worst * count) : count - int(best * count)]] = True
    return kept
