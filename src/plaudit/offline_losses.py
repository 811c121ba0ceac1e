"""Losses of learning from logged actions, as pure functions: each returns a SUM over its units, see `losses`."""

from __future__ import annotations

import torch
from torch import Tensor

from plaudit.losses import Stats
from plaudit.numerics import at_actions, masked_sum

LARGEST_WEIGHT = 100.0
"""Where advantage weights are cut, as in the code of Kostrikov et al. 2021."""


def next_values(values: Tensor, actions: Tensor) -> Tensor:
    """(B, T) the value of the state that each action leads to: that of the row's next action, 0 after its last.

    values[:, t] is the value of the state in which action t is taken. Columns that are no actions are stepped over.
    Nothing flows back.
    """
    row = actions.nonzero()[:, 0]
    chosen = values.detach()[actions]
    following = torch.where(row[1:] == row[:-1], chosen[1:], torch.zeros_like(chosen[1:]))
    return at_actions(torch.cat([following, chosen.new_zeros(min(len(chosen), 1))]), actions)


def expectile(values: Tensor, targets: Tensor, actions: Tensor, tau: float) -> tuple[Tensor, Stats]:
    """|tau - [u < 0]| u^2 of every action, u = target - value. The unit is a token.

    All tensors (B, T). The minimiser is the tau-expectile of the targets: their mean at 1/2, their maximum as tau
    goes to 1. Nothing flows to the targets. Kostrikov et al. 2021 (arXiv:2110.06169), eq. 5.
    """
    error = torch.where(actions, targets.detach() - values, torch.zeros_like(values))
    share = torch.where(error < 0, torch.full_like(error, 1 - tau), torch.full_like(error, tau))
    return (share * error.square()).sum(), {}


def temporal_difference(
    q: Tensor, rewards: Tensor, following: Tensor, actions: Tensor, gamma: float
) -> tuple[Tensor, Stats]:
    """(r + gamma V(s') - Q)^2 of every action, summed over the K heads of q (B, T, K). The unit is a token.

    rewards, following (B, T): what the action earned, and the value of the state that it led to, 0 where the text
    ended. Nothing flows to either. Kostrikov et al. 2021 (arXiv:2110.06169), eq. 6.
    """
    target = rewards.detach().to(q.dtype) + gamma * following.detach().to(q.dtype)
    error = torch.where(actions[..., None], target[..., None] - q, torch.zeros_like(q))
    return error.square().sum(), {}


def conservative(q_logprobs: Tensor, actions: Tensor) -> tuple[Tensor, Stats]:
    """log sum_a exp Q(s, a) - Q(s, a_t) of every action, summed over the heads. The unit is a token.

    q_logprobs (B, T, K): log-softmax of each head's Q at the logged token, so that this is the cross-entropy of a
    policy softmax(Q). Kumar et al. 2020 (arXiv:2006.04779), eq. 4, as Snell et al. 2022 (arXiv:2206.11871) use it.
    """
    return -masked_sum(q_logprobs, actions[..., None]), {}


def weighted_imitation(logprobs: Tensor, advantages: Tensor, actions: Tensor, beta: float) -> tuple[Tensor, Stats]:
    """-exp(beta A) log pi of every action, the weight cut at 100. The unit is a token.

    All tensors (B, T). Nothing flows to the advantages; beta 0 is plain imitation. Nair et al. 2020
    (arXiv:2006.09359), eq. 13; Kostrikov et al. 2021, eq. 7.

    Statistics: nll (without the weights), awac_weight.
    """
    advantage = torch.where(actions, advantages.detach().to(logprobs.dtype), torch.zeros_like(logprobs))
    weight = (beta * advantage).exp().clamp(max=LARGEST_WEIGHT)
    stats = {"nll": -masked_sum(logprobs.detach(), actions), "awac_weight": masked_sum(weight, actions)}
    return -masked_sum(weight * logprobs, actions), stats
