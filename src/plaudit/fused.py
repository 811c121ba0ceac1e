"""Decoder layers of the Llama shape in fewer operations: what a shadow runs in place of transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

Product = Callable[[Tensor], Tensor]
"""(..., in) -> (..., out): what a linear layer computes, or several of the same input one after the other."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""The modules of transformers whose layers compute exactly what `FusedLayer` does. Others look much alike and differ in
a multiplier, a clamp or a norm, so nothing is taken by its looks."""

LARGE = 200_000
"""Entries of the visible keys from which on two products are quicker than the attention kernel for single queries,
which loses some time with every row and head."""


def fusable(layer: nn.Module) -> bool:
    """Whether `FusedLayer` computes what `layer` does: one of the known classes, attending to the whole past, which
    nobody watches or patches through a hook."""
    kind = type(layer)
    families = {f"transformers.models.{name}.modeling_{name}" for name in FAMILIES}
    if not (kind.__module__ in families and kind.__name__.endswith("DecoderLayer")):
        return False
    attention: Any = layer.self_attn
    config = attention.config
    # Mistral's layers ask the config, Llama's none.
    windowed = getattr(attention if hasattr(attention, "sliding_window") else config, "sliding_window", None)
    hooks = [hook for m in layer.modules() for hook in [*m._forward_hooks.values(), *m._forward_pre_hooks.values()]]
    # transformers' own, which stay on a model whose hidden states were once asked for, only look on.
    watched = any(getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks)
    return windowed is None and masked_by_sdpa(config) and not watched


def adapters_of(module: Any) -> list[str] | None:
    """The LoRA adapters at work in a linear layer, [] for one without; None where what is at work is more than two
    matrices beside the layer's own, or is switched off."""
    if (type(module).__module__, type(module).__name__) != ("peft.tuners.lora.layer", "Linear"):
        return []
    names = [] if module.merged else [name for name in module.active_adapters if name in module.lora_A]
    special = any(name in module.lora_variant or module.lora_bias[name] for name in names)
    return None if module.disable_adapters or special else names


def masked_by_sdpa(config: Any) -> bool:
    """Whether attention is computed by a kernel that is handed masks of all queries and keys."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation) is sdpa_mask


class FusedLayer(nn.Module):
    """What `layer` computes in evaluation mode, up to rounding.

    One product makes queries, keys and values, one makes the gate and what it gates, the rotation of queries and keys
    is done at once, and a single query attends without copies of the keys.

    product    of linear layers with the same input
    parameter  a parameter as the shadow wants it
    """

    def __init__(
        self, layer: Any, product: Callable[..., Product], parameter: Callable[[nn.Parameter], Tensor]
    ) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.training = False
        self.index = attention.layer_idx
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.queries = attention.q_proj.out_features // self.width
        self.turned = self.queries + attention.k_proj.out_features // self.width
        self.activation = mlp.act_fn
        self.heads = product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.joined = product(attention.o_proj)
        self.gated = product(mlp.gate_proj, mlp.up_proj)
        self.down = product(mlp.down_proj)
        self.before = _norm(layer.input_layernorm, parameter)
        self.between = _norm(layer.post_attention_layernorm, parameter)
        normed = hasattr(attention, "q_norm")
        self.head_norms = [_norm(m, parameter) for m in (attention.q_norm, attention.k_norm)] if normed else []

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        assert position_embeddings is not None
        size, length, _ = hidden_states.shape
        heads = self.heads(self.before(hidden_states)).view(size, length, -1, self.width).transpose(1, 2)
        turned = heads[:, : self.turned]
        if self.head_norms:
            parts = turned.split([self.queries, self.turned - self.queries], 1)
            turned = torch.cat([norm(part) for norm, part in zip(self.head_norms, parts, strict=True)], 1)
        turned = rotate(turned, *position_embeddings)
        queries, keys, values = turned[:, : self.queries], turned[:, self.queries :], heads[:, self.turned :]
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.index)
        hidden_states = hidden_states + self.joined(attend(queries, keys, values, attention_mask, self.scaling))
        gate, value = self.gated(self.between(hidden_states)).chunk(2, -1)
        return hidden_states + self.down(self.activation(gate) * value)


def _norm(module: Any, parameter: Callable[[nn.Parameter], Tensor]) -> Product:
    weight, eps = parameter(module.weight), module.variance_epsilon
    if weight.dtype == torch.float64:
        return module  # which rounds to float32 inside: what it computes is exactly its own
    floor = torch.tensor(eps, dtype=torch.float32, device=weight.device)

    def norm(inputs: Tensor) -> Tensor:
        wide = inputs.float()
        length = torch.linalg.vector_norm(wide, 2, -1, keepdim=True)
        scale = torch.addcmul(floor, length, length, value=1 / inputs.shape[-1]).rsqrt_()
        return (wide * scale).to(inputs.dtype).mul_(weight)

    return norm


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864) of states (B, heads, T, d), with cos and sin (B, T, d)."""
    cos, sin = cos[:, None], sin[:, None]
    half = states.shape[-1] // 2
    turned = states * cos
    turned[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return turned


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention: queries (B, H, T, d) over keys and values (B, H / g, L, d) -> (B, T, H * d).

    mask  (B or 1, 1, T, L): True where seen, or numbers that are added to the scores; None: each of T queries sees
          what lies before it in L = T columns, a single one sees all.
    """
    size, heads, length, width = queries.shape
    shared = keys.shape[1]
    if length > 1:
        keys, values = (x.repeat_interleave(heads // shared, 1) if heads > shared else x for x in (keys, values))
        found = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None, scale=scale)
        return found.transpose(1, 2).reshape(size, length, heads * width)
    # The heads that share keys are queries of one head.
    queries = queries.reshape(size, shared, heads // shared, width)
    if keys.dtype == torch.bfloat16 and keys.numel() > LARGE and mask is not None and mask.is_floating_point():
        scores = (keys @ queries.mT).mT.contiguous()
        weights = torch.add(mask.float(), scores, alpha=scale).softmax(-1)
        found = weights.to(values.dtype) @ values
    else:
        found = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale)
    return found.reshape(size, 1, heads * width)
