"""Slots that hold one row each and are filled anew when theirs has ended: a causal model, its cache and its masks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from plaudit.decoding import SlabLayer, slab_cache
from plaudit.errors import PlauditError
from plaudit.fused import masked_by_sdpa

Prompt = tuple[int, ...]

PREFILLED = 4096
"""Tokens of prompts that are computed at once, padding included: enough for any machine to be busy, few enough for what
they need in passing to stay small."""


@dataclass
class Known:
    """Distinct prompts that have been computed: where each stands, its length, keys and values that end at a common
    column, and the logits (n, V) of what follows."""

    places: dict[Prompt, int]
    lengths: Tensor
    cache: Any
    logits: Tensor


class Slots:
    """A batch of slots. Each holds a row that is one token longer at every step, and a new row once that has ended.

    All rows end at the same column, since caches append there; what lies to the left of a row's own start, padding or
    keys of the row that had the slot before, is hidden from it. Columns are counted from the first one ever. Those that
    no row sees any more are neither attended to nor kept.

    model    a causal language model that takes `past_key_values`; PlauditError for others
    longest  tokens of the longest row there will be
    guide    last hidden states (n, d) -> (n, V), added to their logits
    """

    def __init__(self, model: Any, longest: int, guide: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self.longest, self.guide = model, longest, guide
        self.cache = slab_cache(model.config)
        accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepted:
            raise PlauditError(f"{type(model).__name__} takes no past_key_values: sample from it with its own generate")
        self.options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self.options["logits_to_keep"] = 1
        self.positioned = "position_ids" in accepted
        # Windows, recurrent states and linear biases need to know what really came before a row.
        whole = all(isinstance(layer, SlabLayer) for layer in self.cache.layers)
        self.refills = self.positioned and whole and not getattr(model.config, "alibi", False)
        # A mask that is ready for the attention kernel spares transformers making one at every step, and one of numbers
        # spares the kernel of the CPU making it in every layer.
        self.ready = self.refills and masked_by_sdpa(model.config)
        self.device = model.get_input_embeddings().weight.device
        kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        self.added = kinds.pop() if self.device.type == "cpu" and len(kinds) == 1 else None
        self.begin = self.end = 0
        self.padded = False
        self.known: Known | None = None

    def start(self, prompts: Sequence[Prompt]) -> Tensor:
        """Open a slot for each of `prompts`; logits (n, V) of what follows. A prompt that repeats is computed once."""
        self.starts = torch.zeros(len(prompts), dtype=torch.int64, device=self.device)
        if self.refills:
            return self.place(torch.arange(len(prompts), device=self.device), prompts)
        known = self._compute(list(dict.fromkeys(prompts)), self.cache)
        self.end = int(known.lengths.max())
        owners = torch.tensor([known.places[prompt] for prompt in prompts], device=self.device)
        self.starts = (self.end - known.lengths)[owners]
        if len(known.lengths) < len(prompts):
            self.cache.reorder_cache(owners)
        return known.logits[owners]

    def place(self, free: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Give the first of the `free` slots to rows that begin with `prompts`; logits (n, V) of what follows.

        Rows of one prompt should come one after the other, here and from one call to the next: the prompts that were
        computed last are remembered."""
        found, at = [], 0
        while at < len(prompts):
            if self.known is None or prompts[at] not in self.known.places:
                self.known = self._compute(self._next(prompts[at:]), DynamicCache(config=self.model.config))
            stop = at
            while stop < len(prompts) and prompts[stop] in self.known.places:
                stop += 1
            found.append(self._insert(self.known, free[at:stop], prompts[at:stop]))
            at = stop
        # A slot that stays empty must not keep columns that only its last row saw.
        self.starts[free[len(prompts) :]] = self.end
        self._forget()
        return torch.cat(found)

    def select(self, rows: Tensor) -> None:
        """Slot i becomes what slot `rows[i]` was; slots may repeat or be left out."""
        self.starts = self.starts[rows]
        if self.refills:
            self._forget()
        self.cache.reorder_cache(rows)

    def step(self, ids: Tensor) -> Tensor:
        """Append ids (n,), one to each slot, and return the logits (n, V) of what follows."""
        # A row that has ended goes on until its slot is used again, but never past the positions there are.
        positions = (self.end - self.starts).clamp(max=self.longest - 1)
        self.end += 1
        return self._forward(ids[:, None], positions[:, None], self._mask(), self.cache)

    def _mask(self) -> Tensor | None:
        seen = torch.arange(self.begin, self.end, device=self.device) >= self.starts[:, None]
        if not self.ready:
            return seen
        # Off the CPU the fastest kernels take no mask; on it, grouped heads are quicker with one than without.
        if not self.padded and self.device.type != "cpu":
            return None
        if self.added is not None:
            seen = torch.zeros(seen.shape, dtype=self.added).masked_fill_(~seen, -torch.inf)
        return seen[:, None, None]

    def _next(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The first distinct ones of `prompts`, as many as are computed at once."""
        chosen: dict[Prompt, None] = {}
        for prompt in prompts:
            if max(map(len, [*chosen, prompt])) * (len(chosen) + 1) > PREFILLED and chosen:
                break
            chosen[prompt] = None
        return list(chosen)

    def _compute(self, prompts: list[Prompt], cache: Any) -> Known:
        """Run distinct prompts, each on the left of a common end."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        positions = torch.arange(width) - (width - lengths)[:, None]
        tokens, positions, lengths = (x.to(self.device) for x in (tokens, positions, lengths))
        logits = self._forward(tokens, positions.clamp(min=0), positions >= 0, cache)
        return Known({prompt: i for i, prompt in enumerate(prompts)}, lengths, cache, logits)

    def _insert(self, known: Known, slots: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        owners = torch.tensor([known.places[prompt] for prompt in prompts], device=self.device)
        self.end = self.end or int(known.lengths.max())
        for layer, computed in zip(self.cache.layers, known.cache.layers, strict=True):
            if computed.is_initialized:  # layers that read another one's keys have none
                layer.write(slots, len(self.starts), self.end, computed.keys[owners], computed.values[owners])
        self.starts[slots] = self.end - known.lengths[owners]
        return known.logits[owners]

    def _forget(self) -> None:
        """Let go of the columns that no row sees."""
        self.begin, last = (int(bound) for bound in self.starts.aminmax())
        self.begin = min(self.begin, self.end)
        self.padded = last > self.begin
        for layer in self.cache.layers:
            layer.begin = self.begin

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        placed = {"position_ids": positions} if self.positioned else {}
        heard: list[Tensor] = []
        if self.guide is not None:
            head = self.model.get_output_embeddings()
            hook = head.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        output = self.model(input_ids=tokens, attention_mask=mask, past_key_values=cache, **placed, **self.options)
        logits: Tensor = output.logits[:, -1]
        if self.guide is not None:
            hook.remove()
            logits = logits + self.guide(heard[0][:, -1])
        return logits
