"""Exact attention over tokens that lie side by side: every piece sees itself, and the prompt that it hangs from.

A mask over all pairs of tokens would cost as much as if each saw every other. Here only the pairs that see each other
are multiplied, as batches of small dense products, which a CPU runs at the full rate of its matrix units; the softmax
is taken in one go, since a block of scores stays in the cache. Keys of a prompt are read once for each answer, never
computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "plaudit_blocks"

QUERIES = 128
"""Queries of a block: a long row is cut, so that the future, which nobody sees, is hardly multiplied."""

SCORES = 2**22
"""Scores that are multiplied at a time, over all heads: fewer, and the products become too small for all cores."""

_NEVER = -1e30
"""What is added to the score of a key that is not seen. Finite, or a padded query, which sees none, would give NaN."""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of one row, which also see the tokens [above, below) that precede them in it."""

    start: int
    stop: int
    above: int = 0
    below: int = 0


@dataclass(frozen=True)
class _Block:
    """b stretches of at most T queries with at most S keys each, both padded on the left by the place `count`, where
    zeros are: queries (b, T), keys (b, S), and padding (b,), how many of the keys are padded."""

    queries: np.ndarray
    keys: np.ndarray
    padding: np.ndarray


@dataclass(frozen=True)
class _Indices:
    """A block for H heads of queries and G of keys, B = b * G products: the places of its queries (B * T * H / G,) and
    keys (B * S,) among the heads of all tokens, what to add to its scores (b or 1, 1, T, S), the `shape` of its scores
    (B, T * H / G, S), and the `rows` of its queries among those of all blocks."""

    queries: Tensor
    keys: Tensor
    bias: Tensor
    shape: tuple[int, int, int]
    rows: slice

    def gathered(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D), (B, S, D), (B, S, E)."""
        batch, length, seen = self.shape
        q = queries.flatten(0, 1).index_select(0, self.queries).view(batch, length, -1)
        k = keys.flatten(0, 1).index_select(0, self.keys).view(batch, seen, -1)
        v = values.flatten(0, 1).index_select(0, self.keys).view(batch, seen, -1)
        return q, k, v

    def attention(self, queries: Tensor, keys: Tensor) -> Tensor:
        """(B, T, S) how much each query takes of each key. Scores are float32 at least: in some models they are in the
        hundreds, where eight bits of mantissa tell no key from another."""
        wide = self.bias.dtype
        scores = torch.bmm(queries.to(wide), keys.mT.to(wide))
        size, _, length, seen = self.bias.shape
        each = scores.shape[1] // length
        scores.view(size, -1, each, length, seen).add_(self.bias[:, :, None])
        return torch.softmax(scores, -1, out=scores).to(queries.dtype)

    def part(self, rows: Tensor) -> Tensor:
        """The (B, T, D) of this block in (M, D) rows of all blocks."""
        return rows[self.rows].view(*self.shape[:2], -1)


@dataclass(frozen=True)
class Plan:
    """Which queries meet which keys, for `count` tokens side by side. One plan serves all layers."""

    count: int
    blocks: tuple[_Block, ...]
    _indices: dict[Any, tuple[list[_Indices], Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, pieces: Sequence[Piece], count: int) -> Plan:
        """The plan for pieces that cover `count` tokens, none twice."""
        stretches = [
            (min(stop, piece.stop), stop - QUERIES, piece)
            for piece in pieces
            for stop in range(piece.start + QUERIES, piece.stop + QUERIES, QUERIES)
        ]
        # Of like size side by side, so that little is padded.
        measured = [(stop - start, piece.below - piece.above + stop - piece.start) for stop, start, piece in stretches]
        order = sorted(range(len(stretches)), key=lambda i: (-measured[i][1], -measured[i][0]))
        blocks, taken = [], 0
        while taken < len(order):
            first = measured[order[taken]]
            end = taken + 1
            while end < len(order) and _alike(measured[order[end]], first):
                end += 1
            blocks.append(_block([stretches[i] for i in order[taken:end]], count))
            taken = end
        return cls(count, tuple(blocks))

    def indices(self, heads: int, groups: int, like: Tensor) -> tuple[list[_Indices], Tensor]:
        """The blocks for so many heads of queries and of keys, and the place of each token's heads among them."""
        key = (heads, groups, like.dtype)
        if key not in self._indices:
            self._indices[key] = self._for_heads(heads, groups, like)
        return self._indices[key]

    def _for_heads(self, heads: int, groups: int, like: Tensor) -> tuple[list[_Indices], Tensor]:
        found, begun = [], 0
        inverse = np.zeros((self.count + 1) * heads, np.int64)
        each = heads // groups
        for block in self.blocks:
            (size, length), keys = block.queries.shape, block.keys.shape[1]
            step = max(1, SCORES // (heads * length * keys))
            for low in range(0, size, step):
                part = slice(low, min(low + step, size))
                b = part.stop - low
                q = block.queries[part, None, None] * heads + np.arange(heads).reshape(1, groups, each, 1)
                k = block.keys[part, None] * groups + np.arange(groups).reshape(1, groups, 1)
                rows = slice(begun, begun + q.size)
                inverse[q.reshape(-1)] = np.arange(rows.start, rows.stop)
                begun = rows.stop
                made = [torch.from_numpy(array.reshape(-1)).to(like.device) for array in (q, k)]
                bias = _bias(block.padding[part], length, keys, like)
                found.append(_Indices(made[0], made[1], bias, (b * groups, each * length, keys), rows))
        return found, torch.from_numpy(inverse[: self.count * heads]).to(like.device)


def _alike(measured: tuple[int, int], first: tuple[int, int]) -> bool:
    """Whether stretches of these (queries, keys) may share a block: padding is then less than what a block costs."""
    real = measured[0] * measured[1]
    return 4 * real >= 3 * first[1] * max(first[0], measured[0]) and measured[0] <= first[0]


def _block(stretches: list[tuple[int, int, Piece]], count: int) -> _Block:
    spans = [
        (np.arange(start, stop), np.r_[piece.above : piece.below, piece.start : stop])
        for stop, start, piece in stretches
    ]
    longest = max(len(queries) for queries, _ in spans), max(len(keys) for _, keys in spans)
    queries, keys = (np.full((len(spans), length), count) for length in longest)
    for i, (own, seen) in enumerate(spans):
        queries[i, longest[0] - len(own) :] = own
        keys[i, longest[1] - len(seen) :] = seen
    return _Block(queries, keys, np.array([longest[1] - len(seen) for _, seen in spans]))


def _bias(padding: np.ndarray, queries: int, keys: int, like: Tensor) -> Tensor:
    """(b or 1, 1, T, S): the last query sees all keys that are there, the one before it one fewer, and so on."""
    place = np.arange(keys)
    future = place > place[-1] - np.arange(queries)[::-1, None]
    unseen = future[None] | (place < padding[:, None, None]) if padding.any() else future[None]
    wide = torch.promote_types(like.dtype, torch.float32)
    return torch.from_numpy(unseen[:, None]).to(like.device).to(wide) * _NEVER


class _Attention(torch.autograd.Function):
    """Queries (N + 1, H, D), scaled, keys (N + 1, G, D) and values (N + 1, G, E), the last of each being zeros
    -> (N, H, E).

    Nothing is kept but what came in: the backward pass takes the softmax again, as flash attention does (Dao et al.
    2022, arXiv:2205.14135).
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(queries, keys, values)
        blocks, inverse = plan.indices(queries.shape[1], keys.shape[1], queries)
        found = values.new_empty(blocks[-1].rows.stop, values.shape[2])
        for block in blocks:
            q, k, v = block.gathered(queries, keys, values)
            torch.bmm(block.attention(q, k), v, out=block.part(found))
        return found.index_select(0, inverse).view(plan.count, queries.shape[1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values = ctx.saved_tensors
        blocks, inverse = ctx.plan.indices(queries.shape[1], keys.shape[1], queries)
        above = functional.pad(gradient, (0, 0, 0, 0, 0, 1)).flatten(0, 1)
        into_queries = queries.new_empty(blocks[-1].rows.stop, queries.shape[2])
        # Many answers pull at a prompt's keys: their sum is taken in float32 at least.
        wide = torch.promote_types(keys.dtype, torch.float32)
        into_keys, into_values = (torch.zeros_like(tensor, dtype=wide).flatten(0, 1) for tensor in (keys, values))
        for block in blocks:
            q, k, v = block.gathered(queries, keys, values)
            pull = above.index_select(0, block.queries).view(*q.shape[:2], -1)
            attention = block.attention(q, k)
            into_values.index_add_(0, block.keys, torch.bmm(attention.mT, pull).flatten(0, 1).to(wide))
            scores = torch._softmax_backward_data(torch.bmm(pull, v.mT), attention, -1, attention.dtype)
            torch.bmm(scores, k, out=block.part(into_queries))
            into_keys.index_add_(0, block.keys, torch.bmm(scores.mT, q).flatten(0, 1).to(wide))
        whole = into_queries.index_select(0, inverse).view(ctx.plan.count, *queries.shape[1:])
        return (
            functional.pad(whole, (0, 0, 0, 0, 0, 1)),
            into_keys.view(keys.shape).to(keys.dtype),
            into_values.view(values.shape).to(values.dtype),
            None,
        )


def along(plan: Plan, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Scaled queries (N + 1, H, D), keys (N + 1, G, D), values (N + 1, G, E), the last of each zeros -> (N, H, E)."""
    with torch.autocast(queries.device.type, enabled=False):
        found: Tensor = _Attention.apply(queries, keys, values, plan)
    return found


class Blocks(Tensor):
    """Stands where transformers expects a mask, and carries the plan to `attend`. It holds a NaN, so that a model that
    attends in another way fails to give numbers instead of giving wrong ones."""

    plan: Plan

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> Blocks:
        made = torch.full((1, 1, 1, 1), torch.nan, device=device).as_subclass(cls)
        made.plan = plan
        return made


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention: (1, H, N, D), (1, G, N, D), (1, G, N, E) -> (1, N, H, E) along a plan, and
    plain attention without one."""
    if not isinstance(attention_mask, Blocks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    beside = (_beside(part, dtype) for part in (query * scale, key, value))
    return along(attention_mask.plan, *beside)[None], None


def _beside(part: Tensor, dtype: torch.dtype) -> Tensor:
    """(1, H, N, D) -> (N + 1, H, D) with zeros behind."""
    return functional.pad(part[0].transpose(0, 1).to(dtype), (0, 0, 0, 0, 0, 1))


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
