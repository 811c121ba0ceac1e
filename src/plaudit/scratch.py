"""Models that begin with random weights, and tokenizers made from the data: after that, folders like any other."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from plaudit.errors import PlauditError
from plaudit.records import Comparison, Demonstration, Ranking, Rating
from plaudit.settings.scratch import Scratch

END, UNKNOWN = "<|end|>", "<|unknown|>"

Written = Demonstration | Comparison | Ranking | Rating


def make(shape: Scratch, records: Sequence[Written], seed: int, folder: Path) -> None:
    """Writes `folder/initial`, a model and a tokenizer that `from_pretrained` opens.

    The same shape, records and seed give the same bytes. A run that has checkpoints keeps the folder it began with.
    Raises PlauditError, and changes nothing, where another folder of that name stands.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # plaudit shows one, its own
    target = folder / "initial"
    if target.exists() and (folder / "checkpoints").exists():
        return
    tokenizer = tokenizer_of(shape, texts_of(records))
    with tempfile.TemporaryDirectory(prefix=".initial-", dir=folder) as place:
        made = Path(place, "initial")
        model_of(shape, len(tokenizer), tokenizer.eos_token_id, seed).save_pretrained(made)
        tokenizer.save_pretrained(made)
        if not target.exists():
            made.rename(target)
        elif _contents(target) != _contents(made):
            raise PlauditError(
                f"model: {target} holds something else than what these settings and data make: move it away, or choose "
                "another --output."
            )


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def texts_of(records: Iterable[Written]) -> Iterator[str]:
    """Every text of the records, those of conversations turn by turn."""
    for record in records:
        if isinstance(record, Comparison):
            answers = [record.chosen, record.rejected]
        else:
            answers = list(record.completions) if isinstance(record, Ranking) else [record.completion]
        for text in (record.prompt, *answers):
            yield from [text] if isinstance(text, str) else (turn["content"] for turn in text)


def tokenizer_of(shape: Scratch, texts: Iterable[str]) -> Any:
    """The tokenizer that a shape asks for: characters, with an end and an unknown token, or byte pairs (Sennrich et al.
    2016, arXiv:1508.07909; of bytes as in Radford et al. 2019) with an end token, learned from the texts."""
    from transformers import PreTrainedTokenizerFast

    if shape.tokenizer == "characters":
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text)
        kept = sorted(character for character, _ in counts.most_common(shape.vocabulary - 2))
        ids = {token: i for i, token in enumerate([END, UNKNOWN, *kept])}
        # Byte pairs of which none has been learned: single characters, whatever else the text holds.
        made = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=UNKNOWN))
        made.decoder = decoders.Fuse()
        named = {"eos_token": END, "unk_token": UNKNOWN}
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=shape.vocabulary,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        made.train_from_iterator(texts, trainer)
        named = {"eos_token": END}
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **named)


def model_of(shape: Scratch, vocabulary: int, end: int, seed: int) -> Any:
    """A causal language model of a shape, its weights drawn from the seed as its architecture's are."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    ids: dict[str, Any] = {"vocab_size": vocabulary, "eos_token_id": end, "bos_token_id": None, "pad_token_id": None}
    config: GPT2Config | LlamaConfig
    if shape.scratch == "gpt2":
        config = GPT2Config(
            n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, n_positions=shape.context, **ids
        )
    else:
        config = LlamaConfig(
            num_hidden_layers=shape.layers,
            hidden_size=shape.width,
            # Three matrices where GPT-2 has two: this many columns cost as much as its 4 * width.
            intermediate_size=-(-8 * shape.width // 24) * 8,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=shape.context,
            tie_word_embeddings=True,
            **ids,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)
