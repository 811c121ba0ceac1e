"""Tiny models and tokenizers, built from configs: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

END = "<|end|>"
BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
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
    if kind == "t5":
        shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        return T5Config(**{**shape, **ids, "decoder_start_token_id": 256, **changes})
    if kind == "bart":
        sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in BART.items()}
        quiet = {"dropout": 0.0, "init_std": 0.15, "max_position_embeddings": 64, "forced_eos_token_id": None}
        more = {**ids, "pad_token_id": 1, "decoder_start_token_id": 256}
        return BartConfig(**{"d_model": 32, **sides, **quiet, **more, **changes})
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
    """A language model in float32."""
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if kind in ("t5", "bart") else AutoModelForCausalLM
    return auto.from_config(config(kind, **changes), attn_implementation="sdpa").eval()


def folder(path: Path, kind: str = "llama", seed: int = 0, chat: bool = True, **changes: Any) -> str:
    """A model folder with its tokenizer."""
    model(kind, seed, **changes).save_pretrained(path)
    tokenizer(chat).save_pretrained(path)
    return str(path)


def encoder(path: Path, kind: str = "bert", seed: int = 0, **changes: Any) -> str:
    """A folder of an encoder as it comes pretrained: without a head, with a tokenizer that frames each text and has no
    end token. Every kind reads rows of at most 128 tokens."""
    fast = tokenizer(chat=False)
    fast.eos_token = None
    fast.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"})
    special = [(token, fast.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    fast.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    fast.save_pretrained(path)
    common = {"vocab_size": len(fast), "pad_token_id": fast.pad_token_id, "initializer_range": 0.15}
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128}
    if kind == "distilbert":
        small = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 128}
        still = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
        made: Any = DistilBertConfig(**{**common, **small, **still, **changes})
    elif kind == "deberta":
        near = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
        plain = {"position_biased_input": False, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
        made = DebertaV2Config(**{**common, **shape, **quiet, **near, **plain, **changes})
    elif kind == "roberta":  # counts its positions from the padding token's number
        shifted = {"max_position_embeddings": 128 + fast.pad_token_id + 1}
        made = RobertaConfig(**{**common, **shape, **quiet, **shifted, **changes})
    else:
        made = BertConfig(**{**common, **shape, **quiet, **changes})
    torch.manual_seed(seed)
    AutoModel.from_config(made).save_pretrained(path)
    return str(path)


def classifier(path: Path, labels: Sequence[str], seed: int = 0) -> str:
    """A folder of a text classifier with these labels."""
    torch.manual_seed(seed)
    named = dict(enumerate(labels))
    made = config(pad_token_id=256, id2label=named, label2id={label: i for i, label in named.items()})
    AutoModelForSequenceClassification.from_config(made).save_pretrained(path)
    tokenizer(chat=False).save_pretrained(path)
    return str(path)


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
