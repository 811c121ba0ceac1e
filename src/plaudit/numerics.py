"""Exact numbers from hidden states and streams: the one shift, masked statistics, log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that pass through the softmax together. A float32 block of this size stays in a core's cache, so that
# logits cross the memory bus once and not once per operation.
_CACHED = 2**18


# -------------------------------------------------------------------------------------------------- the one shift


def before_actions(stream: Tensor, actions: Tensor) -> Tensor:
    """(B, T, ...), (B, T) -> (N, ...): the stream at the columns that predict the actions, row by row.

    Column t - 1 predicts the token of column t. No other function shifts a stream.
    """
    return stream[:, :-1][actions[:, 1:]]


def at_actions(values: Tensor, actions: Tensor) -> Tensor:
    """(N,), (B, T) -> (B, T): one value for each action, row by row, and zeros elsewhere. Differentiable."""
    return values.new_zeros(actions.shape).masked_scatter(actions, values)


# ---------------------------------------------------------------------------------------------- masked statistics


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """() the sum of x where the mask is True. What x holds elsewhere, NaN included, does not matter."""
    return torch.where(mask, x, torch.zeros_like(x)).sum()


def _own(total: Tensor) -> Tensor:
    return total


def masked_mean(x: Tensor, mask: Tensor, summed: Callable[[Tensor], Tensor] = _own) -> Tensor:
    """() the mean of x where the mask is True; 0 for an empty mask. `summed` adds a number up over processes."""
    return summed(masked_sum(x, mask)) / summed(mask.sum()).clamp(min=1)


def standardise(
    x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8, summed: Callable[[Tensor], Tensor] = _own
) -> Tensor:
    """x over its standard deviation where the mask is True, and 0 elsewhere.

    The variance is the biased one, as in Ziegler et al. 2019 (arXiv:1909.08593). With `shift_mean` False the mean
    stays where it was. `summed` adds a number up over processes, whose x are then parts of one.
    """
    mean = masked_mean(x, mask, summed)
    variance = masked_mean((x - mean).square(), mask, summed)
    scaled = (x - mean) * torch.rsqrt(variance + eps)
    return torch.where(mask, scaled if shift_mean else scaled + mean, torch.zeros_like(x))


# ----------------------------------------------------------------------------------------------- log-probabilities


def logprobs_of(
    logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(..., V), (...) -> (...) log-softmax(logits / temperature) at the targets, and (...) entropy in nats or None.

    The plain definition, for heads that `token_logprobs` cannot express; temperature is one number or (...). Results
    are float32 (float64 for float64). A logit may be -inf.
    """
    everything = torch.log_softmax(warmed(logits, temperature), -1)
    chosen = everything.gather(-1, targets[..., None]).squeeze(-1)
    if not with_entropy:
        return chosen, None
    # A forbidden token has probability 0 and log-probability -inf, whose product would be NaN.
    finite = everything.clamp(min=torch.finfo(everything.dtype).min)
    return chosen, -(everything.exp() * finite).sum(-1)


def warmed(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits (..., V) over the temperature, one number or (...), in float32 (float64 for float64)."""
    wide = logits.to(_wide(logits))
    return wide / (temperature[..., None].to(wide) if isinstance(temperature, Tensor) else temperature)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    scale: float = 1.0,
    soft_cap: float | None = None,
    with_entropy: bool = False,
    chunk: int = 512,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the targets under a vocabulary projection, without ever holding all logits.

    hidden (N, d), weight (V, d), targets (N,), bias (V,) or None, temperature one number or (N,).
    Returns (N,) log-softmax(cap(scale * (hidden @ weight.T + bias)) / temperature) at the targets, where
    cap(x) = soft_cap * tanh(x / soft_cap), and (N,) the entropy in nats, or None. Both are float32 (float64 for
    float64) whatever the inputs are: products are taken in the dtype of `hidden`, the softmax in float32.

    At most (chunk, V) logits exist at a time. With a frozen head the gradient to `hidden` is one vector a token,
    scale / temperature * (weight[target] - E[weight]), so it is taken along in the forward pass, where the
    probabilities are at hand; otherwise the backward pass computes the logits of each chunk again.
    """
    head_learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    learns = torch.is_grad_enabled() and hidden.requires_grad
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(_wide(hidden))
    direct = learns and not head_learns and not with_entropy
    softmax = _Softmax(temperature, scale, soft_cap, with_entropy, chunk, direct)
    found = _TokenLogprobs.apply(hidden, weight, bias, targets, softmax)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor | None]", found)


@torch.no_grad()
def likeliest(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, chunk: int = 1024) -> Tensor:
    """(N,) True where a target has the largest logit: hidden (N, d), weight (V, d), targets (N,), bias (V,) or None.
    Neither temperature nor a positive scale or cap can change that."""
    best = [
        torch.nn.functional.linear(part, weight.to(part.dtype), None if bias is None else bias.to(part.dtype)).argmax(1)
        for part in torch.split(hidden, chunk)
    ]
    return torch.cat(best) == targets if best else targets.bool()


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class _Softmax:
    """How products become logits, how much at a time, and whether the forward pass takes the gradient along."""

    temperature: float | Tensor
    scale: float
    soft_cap: float | None
    with_entropy: bool
    chunk: int
    direct: bool

    def gain(self, like: Tensor) -> Tensor:
        """(N,) d logits / d products, the slope of the cap aside."""
        return self.scale / (torch.ones_like(like) * self.temperature)

    def logits(self, raw: Tensor, bias: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        """(n, V) products, which it may overwrite -> logits in at least float32, and the slope of the cap if any."""
        logits, slope = raw.to(_wide(raw)), None
        if bias is not None:
            logits += bias
        if self.soft_cap is not None:
            logits = logits.mul_(self.scale / self.soft_cap).tanh_()
            slope = 1 - logits.square()
            logits *= self.soft_cap
        elif self.scale != 1:
            logits *= self.scale
        if isinstance(self.temperature, Tensor):
            logits /= self.temperature[rows, None]
        elif self.temperature != 1:
            logits /= self.temperature
        return logits, slope

    def block(
        self, raw: Tensor, bias: Tensor | None, targets: Tensor, rows: slice, pulls: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """(n,) log-probabilities and entropies of (n, V) products.

        pulls: the gradients (n,) that reach both, times `gain`; the gradient to the products then replaces them.
        """
        logits, slope = self.logits(raw, bias, rows)
        logits -= logits.amax(1, keepdim=True)
        chosen = logits.gather(1, targets[:, None])
        weights = logits.exp() if self.with_entropy else logits.exp_()
        total = weights.sum(1, keepdim=True)
        partition = total.log()
        entropy = partition - (weights * logits).sum(1, keepdim=True) / total if self.with_entropy else None
        if pulls:
            to_chosen, to_entropy = (pull[:, None] for pull in pulls)
            both = to_chosen if entropy is None else to_chosen + to_entropy * (logits - partition + entropy)
            weights.mul_(-both / total).scatter_add_(1, targets[:, None], to_chosen)
            raw.copy_(weights if slope is None else weights.mul_(slope))
        return (chosen - partition).squeeze(1), None if entropy is None else entropy.squeeze(1)


@dataclass(frozen=True)
class _Projection:
    """Hidden states on their way through the head, in the dtype of the hidden states; a bias is kept wide."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    softmax: _Softmax

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softmax: _Softmax) -> _Projection:
        wide = None if bias is None else bias.to(_wide(hidden))
        return cls(hidden, weight.to(hidden.dtype), wide, targets, softmax)

    def empty(self) -> Tensor:
        return self.hidden.new_empty(self.hidden.shape[0], dtype=_wide(self.hidden))

    def chunks(
        self, chosen: Tensor, entropy: Tensor | None, pulls: tuple[Tensor, ...]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Fills chosen and entropy (N,) and yields, chunk by chunk, rows and what is left of their products: with
        pulls, see `_Softmax.block`, the gradient to them."""
        count, size = self.hidden.shape[0], self.softmax.chunk
        # Fresh pages are costly: one buffer serves all chunks.
        buffer = self.hidden.new_empty(min(size, count), self.weight.shape[0])
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            raw = torch.mm(self.hidden[rows], self.weight.t(), out=buffer[: rows.stop - start])
            for part in self.blocks(rows):
                block = raw[part.start - start : part.stop - start]
                found = self.softmax.block(block, self.bias, self.targets[part], part, tuple(p[part] for p in pulls))
                chosen[part] = found[0]
                if entropy is not None and found[1] is not None:
                    entropy[part] = found[1]
            yield rows, raw

    def blocks(self, rows: slice) -> Iterator[slice]:
        # A graphics card has its own ways with memory, and many small kernels would only keep it waiting.
        size = max(1, _CACHED // self.weight.shape[0]) if self.hidden.device.type == "cpu" else self.softmax.chunk
        return (slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size))


class _TokenLogprobs(torch.autograd.Function):
    """See `token_logprobs`. Products are written where they belong by `out=`, which autocast leaves alone too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softmax: _Softmax
    ) -> tuple[Tensor, Tensor | None]:
        projection = _Projection.of(hidden, weight, bias, targets, softmax)
        chosen = projection.empty()
        entropy = projection.empty() if softmax.with_entropy else None
        direction = torch.empty_like(hidden) if softmax.direct else None
        pulls = (softmax.gain(chosen), torch.zeros_like(chosen)) if softmax.direct else ()
        for rows, raw in projection.chunks(chosen, entropy, pulls):
            if direction is not None:
                torch.mm(raw, projection.weight, out=direction[rows])
        ctx.softmax = softmax
        ctx.save_for_backward(*((direction,) if softmax.direct else (hidden, weight, bias, targets)))
        return chosen, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_chosen: Tensor, to_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.softmax.direct:
            (direction,) = ctx.saved_tensors
            return (to_chosen[:, None] * direction).to(direction.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        needed, wide = ctx.needs_input_grad, _wide(hidden)
        into_hidden = torch.empty_like(hidden) if needed[0] else None
        into_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        into_bias = torch.zeros_like(bias, dtype=wide) if needed[2] else None
        share = torch.empty_like(weight, dtype=hidden.dtype) if needed[1] else None
        projection = _Projection.of(hidden, weight, bias, targets, ctx.softmax)
        gain = ctx.softmax.gain(to_chosen)
        pulls = (to_chosen * gain, torch.zeros_like(gain) if to_entropy is None else to_entropy * gain)
        for rows, raw in projection.chunks(projection.empty(), None, pulls):
            if into_hidden is not None:
                torch.mm(raw, projection.weight, out=into_hidden[rows])
            if into_weight is not None:
                into_weight += torch.mm(raw.t(), hidden[rows], out=share)
            if into_bias is not None:
                into_bias += raw.sum(0, dtype=wide)
        weight_gradient = None if into_weight is None else into_weight.to(weight.dtype)
        bias_gradient = None if into_bias is None else into_bias.to(bias.dtype)
        return into_hidden, weight_gradient, bias_gradient, None, None
