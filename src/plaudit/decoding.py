"""What decoding is made of: a slab cache, a shadow of the model with prepacked weights, an exact cheap draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.pytorch_utils import Conv1D

from plaudit.fused import FusedLayer, Product, adapters_of, fusable
from plaudit.numerics import warmed
from plaudit.sharding import assembled

BLOCK = 256
"""Vocabulary entries per block of the draw: about the square root of a usual vocabulary, so both searches are short."""

SCRATCH = 2**19
"""Entries of logits that are worked on at a time on the CPU: they stay in its cache."""

PACKED_ROWS = 32
"""The batch size that packed weights are laid out for; they serve others too (measured from 1 to 512)."""


class SlabLayer(DynamicLayer):
    """Keys and values of one full-attention layer in slabs that are written in place.

    transformers' own layer concatenates the whole past at every step. Here room for `room` more tokens is made ahead,
    and `update` hands out views (B, heads, length, d) of the slabs. Columns are counted from the first one ever; those
    before `begin` are seen by no row any more, and go when the slabs move.
    """

    room = 128

    def __init__(self) -> None:
        super().__init__()
        self.begin = self.end = self.origin = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        end = self.end + key_states.shape[-2]
        if end > self.origin + self.keys.shape[-2]:
            self._move(self.begin, end)
        first, last = self.begin - self.origin, end - self.origin
        self.keys[:, :, self.end - self.origin : last] = key_states
        self.values[:, :, self.end - self.origin : last] = value_states
        self.end = end
        return self.keys[:, :, first:last], self.values[:, :, first:last]

    def write(self, slots: Tensor, size: int, end: int, keys: Tensor, values: Tensor) -> None:
        """Rows `slots` of `size` become these keys and values (n, heads, width, d), whose last column is `end` - 1."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.begin = self.origin = self.end = end
            self.keys, self.values = (x.new_empty(size, x.shape[1], 0, x.shape[3]) for x in (keys, values))
        first = end - keys.shape[-2]
        if first < self.origin:
            self._move(min(first, self.begin), end)
        self.keys[slots, :, first - self.origin : end - self.origin] = keys
        self.values[slots, :, first - self.origin : end - self.origin] = values
        self.end = end

    def get_seq_length(self) -> int:
        return self.end - self.begin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was; rows may repeat or be left out."""
        self._move(self.begin, self.end, beam_idx)

    def _move(self, first: int, last: int, rows: Tensor | None = None) -> None:
        """New slabs for the columns from `first` to `last` and some more, with these rows (None: all) of the old."""
        kept = slice(self.begin - self.origin, self.end - self.origin)
        moved = []
        for slab in (self.keys, self.values):
            past = slab[:, :, kept] if rows is None else slab[rows, :, kept]
            # Zeros, since a column that is hidden from a row counts 0 times in its sums, which must not be 0 * inf.
            new = slab.new_zeros(past.shape[0], past.shape[1], last - first + self.room, past.shape[3])
            new[:, :, self.begin - first : self.end - first] = past
            moved.append(new)
        (self.keys, self.values), self.origin = moved, first


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
        return multiply(inputs, self.packed, self.bias)


def multiply(inputs: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """(..., in) -> (..., out) with a matrix that oneDNN has reordered."""
    return torch.ops.mkldnn._linear_pointwise.default(inputs, packed, bias, "none", [], "")


def packable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this machine multiplies faster with weights that oneDNN has reordered."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class Linear:
    """The matrix (out, in) of a linear layer: the parameters it is made of, and how it is made of them."""

    parameters: tuple[Tensor, ...]
    matrix: Callable[[], Tensor]
    weight: nn.Parameter
    bias: nn.Parameter | None


def linear_of(module: Any) -> Linear | None:
    """What `module` multiplies with, if it is a linear layer, or one with LoRA adapters (which are merged into the
    matrix, never into the module); None for everything else. The exact types only: subclasses compute something else.
    """
    base, adapters = getattr(module, "base_layer", module), adapters_of(module)
    known = base is module or type(module).__module__ == "peft.tuners.lora.layer"
    if adapters is None or not known or type(base) not in (nn.Linear, Conv1D):
        return None

    def matrix() -> Tensor:
        weight = base.weight
        if adapters:
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            weight = sum((module.get_delta_weight(name) for name in adapters), start=wide)
        return weight.t() if type(base) is Conv1D else weight

    low_rank = [part[name].weight for name in adapters for part in (module.lora_A, module.lora_B)]
    return Linear((base.weight, *low_rank), matrix, base.weight, base.bias)


@dataclass(frozen=True)
class Made:
    """What a shadow made of some parameters, and the fingerprints that these had then."""

    parameters: tuple[Tensor, ...]
    fingerprints: list[tuple[int, ...] | None]
    tensor: Tensor


class Shadow:
    """A model that computes what `source` computes, in evaluation mode, without touching it.

    Every module is copied shallowly, so parameters and buffers are shared; only the linear layers are
    replaced by packed ones (where that is faster), layers of the Llama shape by fused ones (on the CPU), and
    parameters are cast when `dtype` asks for it. LoRA adapters are merged on the way where layers are replaced.
    `module` is the copy, until the next refresh. After the weights of `source` have changed, `refresh` brings it up to
    date. If `source` is spread over processes, each of them gathers all weights there: they must refresh together, and
    then compute alone.
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.source = source
        self.dtype = dtype
        self._made: dict[tuple[Any, ...], Made] = {}
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Build the copy anew; weights are cast and packed again only if they differ from the last time."""
        # The old copy goes first: what is made anew then takes its memory, where two models might not fit.
        self.module = nn.Module()
        self._previous, self._made = self._made, {}
        self._marks: dict[int, tuple[int, ...] | None] = {}
        self._copies: dict[int, nn.Module] = {}
        self.module = self._copy(assembled(self.source))
        self._previous, self._marks, self._copies = {}, {}, {}

    def release(self) -> None:
        """Let go of the copy, and of all that was made of weights that learn: they are going to change, and would be
        made anew by the next `refresh`, which must come before the copy is used again."""
        self.module = nn.Module()
        self._made = {
            key: made
            for key, made in self._made.items()
            if None not in made.fingerprints and not any(p.requires_grad for p in made.parameters)
        }

    def _copy(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._copies:
            self._copies[id(module)] = self._packed(module) or self._fused(module) or self._shallow(module)
        return self._copies[id(module)]

    def _shallow(self, module: nn.Module) -> nn.Module:
        copy = object.__new__(type(module))
        copy.__dict__.update(module.__dict__)
        # A forward that somebody wrapped (autocast, offloading) is bound to the learner's module.
        copy.__dict__.pop("forward", None)
        # What is hooked to the copy stays off the learner.
        hooks = {k: v.copy() for k, v in module.__dict__.items() if k.endswith("_hooks") and isinstance(v, dict)}
        copy.__dict__.update(
            hooks,
            training=False,
            _parameters={name: p if p is None else self._cast(p) for name, p in module._parameters.items()},
            _buffers=dict(module._buffers),
            _modules={name: m if m is None else self._copy(m) for name, m in module._modules.items()},
        )
        return copy

    def _packed(self, module: nn.Module) -> nn.Module | None:
        """The packed layer for `module`, or None."""
        linear = linear_of(module)
        if linear is None or not packable(self.dtype or linear.weight.dtype, linear.weight.device):
            return None
        bias = None if linear.bias is None else self._cast(linear.bias)
        return PackedLinear(self._cast(linear.weight), bias, self._matrix([linear]))

    def _fused(self, module: nn.Module) -> nn.Module | None:
        """The fused layer for `module`, or None."""
        if not fusable(module) or next(module.parameters()).device.type != "cpu":
            return None
        parts = [m for half in (module.self_attn, module.mlp) for name, m in half.named_children() if "_proj" in name]
        whole = all(linear_of(part) for part in parts)
        return FusedLayer(module, self._product, self._cast) if whole else None

    def _product(self, *modules: nn.Module) -> Product:
        """The outputs of these linear layers one after the other, in one product."""
        linears = [linear for module in modules if (linear := linear_of(module)) is not None]
        matrix, bias = self._matrix(linears), None
        if any(linear.bias is not None for linear in linears):
            biases = [linear.weight.new_zeros(1) if linear.bias is None else linear.bias for linear in linears]
            bias = torch.cat([self._cast(bias).expand(m.out_features) for bias, m in zip(biases, modules, strict=True)])
        packed = packable(matrix.dtype, matrix.device)
        return partial(multiply, packed=matrix, bias=bias) if packed else partial(F.linear, weight=matrix, bias=bias)

    def _matrix(self, linears: list[Linear]) -> Tensor:
        """The matrices of `linears` below each other, packed where that is faster."""

        def make() -> Tensor:
            parts = [linear.matrix().detach() for linear in linears]
            parts = [part.to(self.dtype or linear.weight.dtype) for part, linear in zip(parts, linears, strict=True)]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
            packs = packable(whole.dtype, whole.device)
            return torch.ops.mkldnn._reorder_linear_weight(whole, PACKED_ROWS) if packs else whole

        return self._make("matrix", tuple(p for linear in linears for p in linear.parameters), make)

    def _cast(self, parameter: Tensor) -> Tensor:
        if self.dtype in (None, parameter.dtype) or not parameter.is_floating_point():
            return parameter
        return self._make("cast", (parameter,), lambda: parameter.to(self.dtype))

    def _make(self, what: str, parameters: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """What was made of `parameters` before, if that still holds. A tied parameter is prepared once."""
        key = (what, *map(id, parameters))
        if key not in self._made:
            marks = [self._mark(parameter) for parameter in parameters]
            made = self._previous.pop(key, None)
            if made is None or None in marks or made.fingerprints != marks:
                made = None
                made = Made(parameters, marks, make())
            self._made[key] = made
        return self._made[key].tensor

    def _mark(self, parameter: Tensor) -> tuple[int, ...] | None:
        if id(parameter) not in self._marks:
            self._marks[id(parameter)] = fingerprint(parameter)
        return self._marks[id(parameter)]


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


def draw(logits: Tensor, uniforms: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Draw one index of each row from softmax(logits / temperature) by the inverse of its distribution function.

    logits (B, V), -inf where forbidden; uniforms (B,) float64 in [0, 1); temperature above 0, one number or (B,).
    Returns ids (B,): the first index whose cumulated probability exceeds the uniform, never one of
    probability 0, and the log-probabilities (B,) float64 of these.

    The search goes over sums of `BLOCK` entries first and then inside one block, so that the only work of
    the size of the vocabulary is one exponential and one sum; `torch.multinomial` does several times that.
    """
    peak, sums = _sums(logits, temperature)
    cumulated = sums.cumsum(1)
    target = uniforms[:, None] * cumulated[:, -1:]
    block = (cumulated <= target).sum(1, keepdim=True)
    before = F.pad(cumulated, (1, 0)).gather(1, block)
    places = block * BLOCK + torch.arange(BLOCK, device=logits.device)
    beyond = places >= logits.shape[1]
    near = warmed(logits.gather(1, places.clamp(max=logits.shape[1] - 1)), temperature) - peak
    inside = near.exp().masked_fill(beyond, 0).double().cumsum(1)
    # The block's sum was rounded: what is left of the target must stay below what the block really holds.
    rest = torch.minimum(target - before, torch.nextafter(inside[:, -1:], torch.zeros_like(target)))
    inner = (inside <= rest).sum(1, keepdim=True)
    logprobs = near.gather(1, inner).double() - cumulated[:, -1:].log()
    return (block * BLOCK + inner)[:, 0], logprobs[:, 0]


def scored(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (B,) float64 of ids (B,) under softmax(logits), logits (B, V)."""
    peak, sums = _sums(logits, 1.0)
    chosen = logits.gather(1, ids[:, None]).to(peak.dtype) - peak
    return (chosen.double() - sums.sum(1, keepdim=True).log())[:, 0]


def _sums(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Of logits (B, V) over the temperature, one number or (B,): the largest (B, 1), in float32 or wider, and the sums
    (B, blocks) float64 of exp(logit - largest) over blocks of `BLOCK` entries.

    On the CPU a few rows at a time, in the same memory: fresh memory of the size of all logits costs more than the
    exponentials."""
    size, vocabulary = logits.shape
    step = max(1, SCRATCH // vocabulary) if logits.device.type == "cpu" else max(1, size)
    dtype, blocks = torch.promote_types(logits.dtype, torch.float32), -(-vocabulary // BLOCK)
    scratch = torch.zeros(min(step, size), blocks * BLOCK, dtype=dtype, device=logits.device)
    peaks, sums = [], []
    for number, rows in enumerate(logits.split(step)):
        weights = scratch[: len(rows), :vocabulary].copy_(rows)
        if isinstance(temperature, Tensor):
            weights.div_(temperature[number * step :][: len(rows), None].to(dtype))
        elif temperature != 1:
            weights.div_(temperature)
        peaks.append(weights.amax(1, keepdim=True))
        weights.sub_(peaks[-1]).exp_()
        sums.append(scratch[: len(rows)].view(len(rows), blocks, BLOCK).sum(2).double())
    return torch.cat(peaks), torch.cat(sums)


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
