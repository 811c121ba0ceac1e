"""Heads over the states of a language model that say what each token is worth."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from plaudit.numerics import token_logprobs


class Worth(NamedTuple):
    """What heads say of N states and of the tokens that were taken there.

    values      (N,) V(s)
    q           (N, 2) Q(s, a) of each head
    q_logprobs  (N, 2) log-softmax of Q(s, .) at a, of each head
    target_q    (N,) the lower of the two target heads' Q(s, a); no gradient
    """

    values: Tensor
    q: Tensor
    q_logprobs: Tensor
    target_q: Tensor


class Perceptron(nn.Module):
    """One hidden layer, `wider` times as wide as the state. What follows it is wanted for one token or for all."""

    def __init__(self, width: int, outputs: int, wider: int = 2) -> None:
        super().__init__()
        self.into = nn.Linear(width, wider * width)
        self.out = nn.Linear(wider * width, outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def inner(self, states: Tensor) -> Tensor:
        """(N, d) -> (N, wider * d)."""
        return functional.relu(self.into(states.to(self.into.weight.dtype)))

    def at(self, inner: Tensor, tokens: Tensor) -> Tensor:
        """(N, wider * d), (N,) -> (N,) the output of one token for each state, in float32 at least."""
        wide = torch.promote_types(inner.dtype, torch.float32)
        return (inner.to(wide) * self.out.weight[tokens].to(wide)).sum(1) + self.out.bias[tokens].to(wide)

    def forward(self, states: Tensor) -> Tensor:
        """(N, d) -> (N, V) all outputs, in float32 at least."""
        found: Tensor = self.out(self.inner(states))
        return found.to(torch.promote_types(found.dtype, torch.float32))


def scalar(head: nn.Linear | Perceptron, states: Tensor) -> Tensor:
    """(N, d) -> (N,) in float32 always: eight bits of mantissa are too few for values and scores."""
    with torch.autocast(states.device.type, enabled=False):
        if isinstance(head, Perceptron):
            return head(states).squeeze(-1)
        dtype = torch.promote_types(states.dtype, torch.float32)
        bias = None if head.bias is None else head.bias.to(dtype)
        return functional.linear(states.to(dtype), head.weight.to(dtype), bias).squeeze(-1)


class ActionHeads(nn.Module):
    """Two Q heads over the vocabulary, a target copy of each, and a V head (Snell et al. 2022, arXiv:2206.11871).

    Their last layers begin at zero: before anything was learned, nothing is worth more than anything else.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.q = nn.ModuleList(Perceptron(width, vocabulary) for _ in range(2))
        self.v = Perceptron(width, 1)
        self.target = copy.deepcopy(self.q).requires_grad_(False)

    def forward(self, states: Tensor, tokens: Tensor) -> Worth:
        """states (N, d), tokens (N,). The Q of a whole vocabulary are never all held, see `token_logprobs`."""
        inner = [head.inner(states) for head in self.q]
        heads = list(zip(self.q, inner, strict=True))
        with torch.no_grad():
            targets = [head.at(head.inner(states), tokens) for head in self.target]
        return Worth(
            values=self.v.at(self.v.inner(states), torch.zeros_like(tokens)),
            q=torch.stack([head.at(z, tokens) for head, z in heads], 1),
            q_logprobs=torch.stack(
                [token_logprobs(z, head.out.weight, tokens, bias=head.out.bias)[0] for head, z in heads], 1
            ),
            target_q=torch.minimum(*targets),
        )

    @torch.no_grad()
    def advantages(self, states: Tensor) -> Tensor:
        """(N, d) -> (N, V) min Q(s, .) - V(s), where Q is that of the target heads."""
        return torch.minimum(*(head(states) for head in self.target)) - self.v(states)

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """Target heads become (1 - share) times themselves plus share times the Q heads (Polyak's average)."""
        for target, source in zip(self.target.parameters(), self.q.parameters(), strict=True):
            target.lerp_(source, share)

    def kept(self) -> dict[str, Tensor]:
        """What decoding needs: the target heads and V."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("q.")}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `kept` gave; the Q heads go on from the target heads."""
        self.load_state_dict({**tensors, **{name.replace("target.", "q."): t for name, t in tensors.items()}})
