"""Small decoders of the families that are known layer by layer, and of some that only look like them."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM

COMMON = {
    "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3, "eos_token_id": None,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FUSED = {
    "Llama": {"mlp_bias": True, "attention_bias": True},
    "Mistral": {"sliding_window": None, "head_dim": 16},
    "Qwen2": {"num_key_value_heads": 4},
    "Qwen3": {"head_dim": 8, "hidden_act": "gelu"},
}
OTHERS = {
    "Granite": {"residual_multiplier": 0.5},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "SmolLM3": {"no_rope_layers": [0, 1]},
    "Gemma": {"head_dim": 8},
}


def made(name: str, changes: dict):
    """A model in which every parameter counts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**{**COMMON, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
