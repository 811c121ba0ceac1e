"""Tiny models and tokenizers, built from configs: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

END = "<|end|>"
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(chat: bool = True, begins: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte, and an end token; `begins`: also a token that the tokenizer puts before each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=END)
    if begins:
        fast.add_special_tokens({"bos_token": "<|begin|>"})
        opening = [("<|begin|>", fast.bos_token_id)]
        fast.backend_tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=opening)
    if chat:
        fast.chat_template = CHAT
    return fast


def config(kind: str = "llama", **changes: Any) -> Any:
    """A config of two layers and 32 dimensions."""
    ids = {"vocab_size": 257, "eos_token_id": 256, "bos_token_id": None, "pad_token_id": None}
    if kind == "gpt2":
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(**{"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 256, **quiet, **ids, **changes})
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
    }
    return kinds[kind](**{**shape, **ids, **changes})


def model(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A causal language model in float32."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config(kind, **changes), attn_implementation="sdpa").eval()


def folder(path: Path, kind: str = "llama", seed: int = 0, chat: bool = True, **changes: Any) -> str:
    """A model folder with its tokenizer."""
    model(kind, seed, **changes).save_pretrained(path)
    tokenizer(chat).save_pretrained(path)
    return str(path)


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
