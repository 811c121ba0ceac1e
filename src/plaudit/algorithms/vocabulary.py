"""What is read of whole distributions over the vocabulary, not only of the token that was drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from plaudit.errors import PlauditError
from plaudit.numerics import at_actions
from plaudit.policy import Policy
from plaudit.world import World

_ROWS = 256  # of which distributions over the vocabulary are held at once


@torch.no_grad()
def exact_divergence(
    policy: Policy, world: World, own: Tensor | None, reference: Tensor | None, actions: Tensor
) -> Tensor:
    """(B, T) KL(policy || reference) in nats at each action, from the states (B, T, d) that both chose it from."""
    if world.sharded:
        raise PlauditError("kl_term: the head of a sharded model is spread over processes: take another than full.")
    assert own is not None
    assert reference is not None
    found = []
    for mine, theirs in zip(own[actions].split(_ROWS), reference[actions].split(_ROWS), strict=True):
        with world.autocast():
            ours = policy.distribution(mine)
            with policy.as_reference():
                kept = policy.distribution(theirs)
        found.append((ours.exp() * (ours - kept)).sum(1))
    return at_actions(torch.cat(found), actions)


@torch.no_grad()
def closeness(policy: Policy, world: World, logprobs: Tensor | None, origins: Tensor | None, actions: Tensor) -> Tensor:
    """(B, T) log pi(token) - log sum_v pi(v)^2 at each action: how likely it is beside what a token of the policy's own
    is on average; from its log-probabilities (B, T) and the states (B, T, d) that tokens were chosen from."""
    assert logprobs is not None
    assert origins is not None
    found = []
    for states in origins[actions].split(_ROWS):
        with world.autocast():
            found.append((2 * policy.distribution(states)).logsumexp(1))
    return at_actions(logprobs[actions] - torch.cat(found), actions)
