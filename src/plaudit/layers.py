"""Decoder layers of the Llama shape as a learner runs them: transformers' own numbers, with less kept for the backward
pass and fewer passes over memory.

Under autocast transformers' layers keep a copy of their input for each matrix, and most of what lies between two
matrices twice. Here a norm gives the type that the matrices multiply in, and what is cheap is computed again.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import SiLUActivation

from plaudit.attention import Blocks, along
from plaudit.fused import adapters_of, fusable


def lean(layers: nn.ModuleList) -> None:
    """From now on those of the layers that are known run as `forward` says whenever rows lie side by side. Layers that
    somebody has patched or hooked are left alone; hooks that come later go unheard."""
    for layer in layers:
        if fusable(layer) and "forward" not in vars(layer):
            layer.forward = partial(forward, layer)


def forward(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **others: Any,
) -> Tensor:
    """(1, N, d) -> (1, N, d), as the layer's own class has it, up to rounding."""
    if not isinstance(attention_mask, Blocks) or position_embeddings is None:
        own = type(layer).forward
        return own(
            layer, hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **others
        )
    attention, mlp = layer.self_attn, layer.mlp
    normed = _normed(layer.input_layernorm, hidden_states)
    queries, keys, values = (
        _product(module, normed).view(*normed.shape[:2], -1, attention.head_dim)[0]
        for module in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    cos, sin = (part[0, :, None] for part in position_embeddings)
    queries = _Turned.apply(queries, cos, sin, attention.scaling, normed.dtype)
    keys = _Turned.apply(keys, cos, sin, 1.0, normed.dtype)
    found = along(attention_mask.plan, queries, keys, functional.pad(values, (0, 0, 0, 0, 0, 1)))
    hidden_states = hidden_states + _product(attention.o_proj, found.flatten(1)[None])
    normed = _normed(layer.post_attention_layernorm, hidden_states)
    gate, up = _product(mlp.gate_proj, normed), _product(mlp.up_proj, normed)
    swish, down = isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)), mlp.down_proj
    if swish and type(down) is nn.Linear:
        return hidden_states + _GatedProduct.apply(gate, up, down.weight, down.bias)
    gated = _Gated.apply(gate, up) if swish else mlp.act_fn(gate) * up
    return hidden_states + _product(down, gated)


def _product(module: Any, inputs: Tensor) -> Tensor:
    """(..., in) -> (..., out) of a linear layer; with an adapter, whose own code would copy what goes in to float32
    and back, and pass over what comes out three times."""
    if type(module) is nn.Linear and module.weight.dtype != inputs.dtype:
        return _Product.apply(inputs, module.weight, module.bias)
    names = adapters_of(module)
    if names is None or len(names) != 1:
        return module(inputs)
    (name,) = names
    if not torch.is_autocast_enabled(inputs.device.type) and module.lora_A[name].weight.dtype != inputs.dtype:
        return module(inputs)
    found = module.base_layer(inputs)
    low = functional.linear(module.lora_dropout[name](inputs), module.lora_A[name].weight)
    matrix = module.lora_B[name].weight.to(low.dtype).t()
    high = torch.addmm(found.flatten(0, -2), low.flatten(0, -2), matrix, alpha=module.scaling[name])
    return high.view(found.shape)


class _Product(torch.autograd.Function):
    """(..., in), (out, in), (out,) or None -> (..., out) in the type of what comes in. Weights of another type are
    converted again in the backward pass, where autocast would keep them converted in between: that costs a pass over
    them, and saves half as much memory again as they take."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.bias = None if bias is None else bias.dtype
        return _multiplied(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        into_inputs = _into_inputs(gradient, weight) if ctx.needs_input_grad[0] else None
        into_weight = _into_weight(gradient, inputs, weight) if ctx.needs_input_grad[1] else None
        into_bias = gradient.flatten(0, -2).sum(0, dtype=ctx.bias) if ctx.needs_input_grad[2] else None
        return into_inputs, into_weight, into_bias


def _multiplied(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(inputs, weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))


def _into_inputs(gradient: Tensor, weight: Tensor) -> Tensor:
    return (gradient.flatten(0, -2) @ weight.to(gradient.dtype)).view(*gradient.shape[:-1], -1)


def _into_weight(gradient: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    return (gradient.flatten(0, -2).t() @ inputs.flatten(0, -2)).to(weight.dtype)


def _normed(module: Any, hidden: Tensor) -> Tensor:
    """The module's root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), in the type that matrices are
    multiplied in."""
    if hidden.dtype == torch.float64:
        return module(hidden)  # which may round to float32 inside: its own numbers are asked for
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return _Normed.apply(hidden, module.weight, module.variance_epsilon, dtype)


def _wide(part: Tensor) -> Tensor:
    return part.to(torch.promote_types(part.dtype, torch.float32))


class _Normed(torch.autograd.Function):
    """(..., d), (d,) -> (..., d) in `dtype`, by way of float32; keeps what came in, and one number a token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = hidden.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (length.square() / hidden.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (wide * scale).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        normed, pull = hidden.float() * scale, gradient.float()
        into_weight = None
        if ctx.needs_input_grad[1]:
            into_weight = (pull * normed).flatten(0, -2).sum(0).to(weight.dtype)
        pull = pull * weight
        along_state = (pull * normed).sum(-1, keepdim=True) / hidden.shape[-1]
        return pull.addcmul_(normed, along_state, value=-1).mul_(scale).to(hidden.dtype), into_weight, None, None


class _Turned(torch.autograd.Function):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): (N, H, D), with cos and sin (N, 1, D), times `scale`
    -> (N + 1, H, D) in `dtype`, the last row being zeros. In between everything is float32 at least."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.scale, ctx.dtype = scale, states.dtype
        cos, sin = (_wide(part) * scale for part in (cos, sin))
        first, second = states.to(cos.dtype).chunk(2, -1)
        turned = states.to(cos.dtype) * cos
        half = first.shape[-1]
        turned[..., :half].addcmul_(second, sin[..., :half], value=-1)
        turned[..., half:].addcmul_(first, sin[..., half:])
        found = states.new_zeros(len(states) + 1, *states.shape[1:], dtype=dtype)
        found[:-1] = turned
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = (_wide(part) * ctx.scale for part in ctx.saved_tensors)
        pull = gradient[:-1].to(cos.dtype)
        turned = pull * cos
        half = pull.shape[-1] // 2
        turned[..., :half].addcmul_(pull[..., half:], sin[..., half:])
        turned[..., half:].addcmul_(pull[..., :half], sin[..., :half], value=-1)
        return turned.to(ctx.dtype), None, None, None, None


class _Gated(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202), of which only gate and up are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _into_gate(gradient, gate, up), functional.silu(gate).mul_(gradient)


def _into_gate(gradient: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.silu_backward(gradient * up, gate)
    return found


class _GatedProduct(torch.autograd.Function):
    """`_Product` of `_Gated`, which does not keep what it multiplies: made of gate and up it costs one pass more, and
    would take a sixth of all that a layer keeps."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.bias = None if bias is None else bias.dtype
        return _multiplied(functional.silu(gate).mul_(up), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        pull = _into_inputs(gradient, weight)
        swish = functional.silu(gate)
        into_weight = _into_weight(gradient, swish * up, weight) if ctx.needs_input_grad[2] else None
        into_bias = gradient.flatten(0, -2).sum(0, dtype=ctx.bias) if ctx.needs_input_grad[3] else None
        return _into_gate(pull, gate, up), swish.mul_(pull), into_weight, into_bias
