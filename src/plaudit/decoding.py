"""What decoding is made of: a slab cache, a shadow of the model with prepacked weights, an exact cheap draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.pytorch_utils import Conv1D

BLOCK = 256
"""Vocabulary entries per block of the draw: about the square root of a usual vocabulary, so both searches are short."""

PACKED_ROWS = 32
"""The batch size that packed weights are laid out for; they serve others too (measured from 1 to 512)."""


class SlabLayer(DynamicLayer):
    """Keys and values of one full-attention layer in slabs that are written in place.

    transformers' own layer concatenates the whole past at every step. Here room is made ahead, in blocks
    of `room` tokens, and `update` hands out views (B, heads, length, d) of the slabs.
    """

    room = 128

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        end = self.length + key_states.shape[-2]
        if end > self.keys.shape[-2]:
            self.keys, self.values = self._moved(self.keys, end), self._moved(self.values, end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was; rows may repeat or be left out."""
        self.keys = self._moved(self.keys, self.length, beam_idx)
        self.values = self._moved(self.values, self.length, beam_idx)

    def _moved(self, slab: Tensor, length: int, rows: Tensor | None = None) -> Tensor:
        size, heads, _, width = slab.shape
        size = size if rows is None else len(rows)
        new = slab.new_empty(size, heads, -(-length // self.room) * self.room, width)
        past = slab[:, :, : self.length]
        new[:, :, : self.length] = past if rows is None else past[rows]
        return new


def slab_cache(config: Any) -> Cache:
    """transformers' cache for a model of this `config`, with slabs for all layers that attend to the whole past.

    Sliding windows and recurrent states keep transformers' own layers.
    """
    cache = DynamicCache(config=config)
    cache.layers = [SlabLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class PackedLinear(nn.Module):
    """A linear layer whose weight oneDNN has reordered once, which every call of `F.linear` does anew."""

    def __init__(self, weight: Tensor, bias: Tensor | None, packed: Tensor) -> None:
        super().__init__()
        self.packed = packed
        # Shared, not copied: some models look at the data type of a layer's weight.
        self._parameters["weight"], self._parameters["bias"] = weight, bias

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")


def packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine multiplies faster with weights that oneDNN has reordered."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass
class Prepared:
    """What a shadow made of one parameter, and the fingerprint that the parameter had then."""

    source: Tensor
    fingerprint: tuple[int, ...] | None
    cast: Tensor
    packed: Tensor | None = None


class Shadow:
    """A model that computes what `source` computes, in evaluation mode, without touching it.

    Every module is copied shallowly, so parameters and buffers are shared; only the linear layers are
    replaced by packed ones (where that is faster), and parameters are cast when `dtype` asks for it.
    `module` is the copy. After the weights of `source` have changed, `refresh` brings it up to date.
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.source = source
        self.dtype = dtype
        self._prepared: dict[int, Prepared] = {}
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Build the copy anew; weights are cast and packed again only if they differ from the last time."""
        self._previous, self._prepared = self._prepared, {}
        self._copies: dict[int, nn.Module] = {}
        self.module = self._copy(self.source)
        self._previous, self._copies = {}, {}

    def _copy(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._copies:
            self._copies[id(module)] = self._packed(module) or self._shallow(module)
        return self._copies[id(module)]

    def _shallow(self, module: nn.Module) -> nn.Module:
        copy = object.__new__(type(module))
        copy.__dict__.update(module.__dict__)
        # A forward that somebody wrapped (autocast, offloading) is bound to the learner's module.
        copy.__dict__.pop("forward", None)
        copy.__dict__.update(
            training=False,
            _parameters={name: p if p is None else self._cast(p) for name, p in module._parameters.items()},
            _buffers=dict(module._buffers),
            _modules={name: m if m is None else self._copy(m) for name, m in module._modules.items()},
        )
        return copy

    def _packed(self, module: nn.Module) -> nn.Module | None:
        """The packed layer for `module`, or None. The exact types only: subclasses compute something else."""
        if type(module) not in (nn.Linear, Conv1D):
            return None
        weight, bias = module.weight, module.bias
        if not packable(self.dtype or weight.dtype, weight.device):
            return None
        prepared = self._prepare(weight)
        if prepared.packed is None:
            rows = prepared.cast.t() if type(module) is Conv1D else prepared.cast
            prepared.packed = torch.ops.mkldnn._reorder_linear_weight(rows.detach().contiguous(), PACKED_ROWS)
        return PackedLinear(prepared.cast, None if bias is None else self._cast(bias), prepared.packed)

    def _cast(self, parameter: Tensor) -> Tensor:
        same = self.dtype in (None, parameter.dtype) or not parameter.is_floating_point()
        return parameter if same else self._prepare(parameter).cast

    def _prepare(self, parameter: Tensor) -> Prepared:
        """What was made of `parameter` before, if that still holds. A tied parameter is prepared once."""
        if id(parameter) not in self._prepared:
            mark = fingerprint(parameter)
            prepared = self._previous.get(id(parameter))
            if prepared is None or mark is None or prepared.fingerprint != mark:
                cast = parameter if self.dtype is None else parameter.to(self.dtype)
                prepared = Prepared(parameter, mark, cast)
            self._prepared[id(parameter)] = prepared
        return self._prepared[id(parameter)]


def fingerprint(tensor: Tensor) -> tuple[int, ...] | None:
    """Place, shape and content of `tensor` in a few numbers; None off the CPU, where copying is as quick.

    A tensor's version counter would cost nothing, but a fused optimizer step, a write through `.data` and
    merging an adapter all leave it as it was. The content enters as the sum of squares of its 64-bit words
    modulo 2^64: unlike a plain sum it does not miss changes that cancel out.
    """
    if tensor.device.type != "cpu":
        return None
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() * flat.element_size() % 8 == 0 and flat.data_ptr() % 8 == 0
    words = flat.view(torch.int64) if whole else flat.view(torch.uint8).to(torch.int64)
    return (tensor.data_ptr(), *tensor.shape, int(torch.dot(words, words)))


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one index of each row from softmax(logits) by the inverse of its distribution function.

    logits (B, V) float32 or float64, -inf where forbidden; uniforms (B,) float64 in [0, 1).
    Returns ids (B,): the first index whose cumulated probability exceeds the uniform, never one of
    probability 0, and the log-probabilities (B,) float64 of these.

    The search goes over sums of `BLOCK` entries first and then inside one block, so that the only work of
    the size of the vocabulary is one exponential and one sum; `torch.multinomial` does several times that.
    """
    size, vocabulary = logits.shape
    peak = logits.amax(1, keepdim=True)
    weights = (logits - peak).exp_()
    if vocabulary % BLOCK:
        weights = F.pad(weights, (0, -vocabulary % BLOCK))
    weights = weights.view(size, -1, BLOCK)
    cumulated = weights.sum(2).double().cumsum(1)
    target = uniforms[:, None] * cumulated[:, -1:]
    block = (cumulated <= target).sum(1, keepdim=True)
    before = F.pad(cumulated, (1, 0)).gather(1, block)
    inside = weights[torch.arange(size, device=logits.device), block[:, 0]].double().cumsum(1)
    # The block's sum was rounded: what is left of the target must stay below what the block really holds.
    rest = torch.minimum(target - before, torch.nextafter(inside[:, -1:], torch.zeros_like(target)))
    ids = block * BLOCK + (inside <= rest).sum(1, keepdim=True)
    logprobs = (logits.gather(1, ids) - peak).double() - cumulated[:, -1:].log()
    return ids[:, 0], logprobs[:, 0]


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """`logits` (B, V) with -inf outside the `top_k` likeliest (0: all) and then the smallest set of mass >= `top_p`."""
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(1, descending=True)
        probabilities = ordered.softmax(1)
        drop = probabilities.cumsum(1) - probabilities >= top_p
        logits = logits.masked_fill(torch.empty_like(drop).scatter_(1, order, drop), -torch.inf)
    return logits
