"""Encoder-decoder models: the prompt goes to the encoder, and what was said after it to the decoder.

A `Batch` is what it always is. What precedes a row's first action is its prompt; column t of every stream still belongs
to token t. The decoder reads its start token and then the actions, so the state that predicts the first action is the
one after the start token (Raffel et al. 2020, arXiv:1910.10683).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from plaudit.batch import Batch
from plaudit.decoding import slab_cache
from plaudit.errors import PlauditError
from plaudit.layout import Layout


def prompt_lengths(batch: Batch) -> Tensor:
    """(B,) how many tokens precede the first action; all of a row without any."""
    return torch.where(batch.actions.any(1), batch.actions.int().argmax(1), batch.lengths)


def start_of(model: Any) -> int:
    """The token that the decoder begins with. Raises PlauditError if the model names none."""
    for config in (model.config, model.generation_config):
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise PlauditError("model: its config.json has no decoder_start_token_id: add it (T5 takes its padding token).")


def arrange(batch: Batch) -> Layout:
    """How rows lie in the decoder: row b holds the start token and then what follows its prompt, but for the last
    token, which predicts nothing. At place 0, `source` names the prompt's last token, whose stead the start takes."""
    lengths, columns = prompt_lengths(batch), batch.tokens.shape[1]
    width = max(int((batch.lengths - lengths).max()), 1)
    rows = torch.arange(len(batch), device=lengths.device)[:, None]
    places = torch.arange(width, device=lengths.device)
    source = rows * columns + (places + lengths[:, None] - 1).clamp(0, columns - 1)
    own = (torch.arange(columns, device=lengths.device) + 1 - lengths[:, None]).clamp(0, width - 1)
    return Layout(source, rows * width + own, places.expand(len(batch), width), None, 0.0)


def run(model: Any, batch: Batch, layout: Layout, plain_head: bool) -> tuple[Tensor, Tensor | None]:
    """(B * L, d) the decoder's last states, in the places of `layout`, and, unless the head is plain, (B * L, V) the
    model's own logits."""
    lengths = prompt_lengths(batch)
    width = int(lengths.max())
    asked = torch.arange(width, device=lengths.device) < lengths[:, None]
    prompts = {"input_ids": (batch.tokens[:, :width] * asked), "attention_mask": asked.long()}
    said = layout.spread(batch.tokens * batch.attention)
    said[:, 0] = start_of(model)
    if plain_head:
        known = model.get_encoder()(**prompts).last_hidden_state
        states = model.get_decoder()(
            input_ids=said,
            encoder_hidden_states=known,
            encoder_attention_mask=prompts["attention_mask"],
            use_cache=False,
        ).last_hidden_state
        return states.flatten(0, 1), None
    output = model(**prompts, decoder_input_ids=said, use_cache=False, output_hidden_states=True)
    return output.decoder_hidden_states[-1].flatten(0, 1), output.logits.flatten(0, 1)


class Decoder:
    """The decoder, its caches, and what the encoder made of the prompts, for one batch of rows of which each is one
    token longer at every step. Rows begin together, so nothing in the decoder is padded.

    guide: last states (n, d) -> (n, V), added to their logits.
    """

    refills = False

    def __init__(self, model: Any, guide: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self.guide = model, guide
        config = model.get_decoder().config
        # Keys and values of prompts never grow, so they need no slabs.
        self.cache = EncoderDecoderCache(slab_cache(config), DynamicCache(config=config))

    def start(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Encode every distinct prompt once; logits (rows, V) of what the rows begin with."""
        distinct = list(dict.fromkeys(prompts))
        width = max(map(len, distinct))
        tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in distinct])
        mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in distinct])
        device = self.model.get_input_embeddings().weight.device
        self.mask = mask.to(device)
        self.known = self.model.get_encoder()(input_ids=tokens.to(device), attention_mask=self.mask).last_hidden_state
        logits = self.step(torch.full((len(distinct),), start_of(self.model), device=device))
        if len(distinct) < len(prompts):
            place = {prompt: i for i, prompt in enumerate(distinct)}
            owners = torch.tensor([place[prompt] for prompt in prompts], device=device)
            self.select(owners)
            logits = logits[owners]
        return logits

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was; rows may repeat or be left out."""
        self.cache.reorder_cache(rows)
        self.known, self.mask = self.known[rows], self.mask[rows]

    def step(self, ids: Tensor) -> Tensor:
        """Append ids (rows,) and return the logits (rows, V) of what follows."""
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.known),
            attention_mask=self.mask,
            decoder_input_ids=ids[:, None],
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=self.guide is not None,
        )
        logits: Tensor = output.logits[:, -1]
        return logits if self.guide is None else logits + self.guide(output.decoder_hidden_states[-1][:, -1])
