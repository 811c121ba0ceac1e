"""The `Sampler` protocol and the in-process engine: prompts in, completions and their log-probabilities out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from plaudit import attention
from plaudit.decoding import Shadow, SlabLayer, draw, keep_likely, slab_cache
from plaudit.errors import PlauditError
from plaudit.seq2seq import Decoder


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn and when it ends.

    max_new_tokens  the limit; a row that reaches it without ending is `truncated`
    temperature     divides the logits; 0 takes the likeliest token
    stop_ids        tokens that end a row; the token is kept, since choosing it was an action
    stop_strings    texts that end a row after the token that completes them
    min_new_tokens  a row does not end before it has this many: until then, stop tokens can't be drawn
    top_k, top_p    for evaluation and inference: keep the likeliest k (0: all), then mass p (1: all)
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    min_new_tokens: int = 0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        rules = [
            (self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}: give at least 1"),
            (self.temperature >= 0, f"temperature is {self.temperature}: give 0 (greedy) or more"),
            (self.top_k >= 0, f"top_k is {self.top_k}: give 0 (all tokens) or more"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}: give a number above 0 and at most 1"),
            (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"min_new_tokens is {self.min_new_tokens}: give 0 to max_new_tokens ({self.max_new_tokens})",
            ),
            ("" not in self.stop_strings, "stop_strings holds an empty string, which would end every row: remove it"),
        ]
        for holds, message in rules:
            if not holds:
                raise PlauditError(message)

    @property
    def mirrored(self) -> bool:
        """Whether a loss that knows the temperature alone recomputes the log-probabilities of these samples."""
        filtered = self.top_k > 0 or self.top_p < 1 or (self.min_new_tokens > 1 and bool(self.stop_ids))
        return self.temperature > 0 and not filtered


@dataclass(frozen=True)
class Sampled:
    """Completed rows: `n` completions of the first prompt, then those of the second, and so on.

    completions  token ids; the stop token is included
    logprobs     of each token under the distribution it was drawn from (temperature, filters and all);
                 greedy rows carry those of temperature 1
    truncated    True where the limit cut the row, False where it ended
    """

    completions: list[list[int]]
    logprobs: list[list[float]]
    truncated: list[bool]


class Sampler(Protocol):
    """Whatever completes prompts: the engine below, or another on other machines."""

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, generator: torch.Generator
    ) -> Sampled:
        """`n` completions of every prompt (lists of token ids), drawn with `generator`."""
        ...

    def refresh(self) -> None:
        """The weights of the model have changed."""
        ...


class LocalSampler:
    """Samples from a Hugging Face language model, causal or encoder-decoder, in this process, on the device where it
    is.

    Every distinct prompt is computed once for all of its completions; rows that have ended leave the batch.
    The model itself is never touched: a `Shadow` of it, in evaluation mode, does the work. Call `refresh`
    after every change of its weights (an optimizer step, a merged adapter) and before sampling again.

    model    the language model; adapters should be merged, which is faster
    decode   token ids -> text, needed for stop strings
    dtype    what the shadow computes in (None: what the parameters are in)
    guide    last hidden states (n, d) -> (n, V), added to their logits before anything else is done with them
    rows     how many rows are decoded at once at most; the others wait
    compact  rows leave the batch when the share that still runs falls below this
    """

    def __init__(
        self,
        model: nn.Module,
        decode: Callable[[list[int]], str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        guide: Callable[[Tensor], Tensor] | None = None,
        rows: int = 256,
        compact: float = 0.75,
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._shadow = Shadow(base, dtype)
        self._decode = decode
        self._guide = guide
        self._rows = rows
        self._compact = compact

    def refresh(self) -> None:
        """Take over the weights that the model has now."""
        self._shadow.refresh()

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, generator: torch.Generator
    ) -> Sampled:
        """`n` completions of every prompt, drawn with `generator`; the same generator state gives the same rows.

        One uniform number per row and step is drawn up front, so what a row gets depends neither on when
        other rows end nor on how the rows are split into waves.

        Raises PlauditError for an empty prompt, for prompts that leave no room for `max_new_tokens` in the
        model's context, and for stop strings without `decode`.
        """
        self._check(prompts, sampling)
        size = len(prompts) * n
        uniforms = torch.rand(
            size, sampling.max_new_tokens, dtype=torch.float64, generator=generator, device=generator.device
        )
        # Rows of like length share a wave, so that padding stays small; the longest come first, so that a
        # wave that does not fit into memory fails at once.
        order = sorted(range(size), key=lambda row: -len(prompts[row // n]))
        outcome: dict[int, tuple[list[int], list[float], bool]] = {}
        for start in range(0, size, self._rows):
            wave = order[start : start + self._rows]
            completed = self._wave([tuple(prompts[row // n]) for row in wave], sampling, uniforms[wave])
            outcome.update(zip(wave, completed, strict=True))
        rows = [outcome[row] for row in range(size)]
        return Sampled([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        if sampling.stop_strings and self._decode is None:
            raise PlauditError("stop_strings need text to search: give the sampler `decode`, or use stop_ids")
        config = self._shadow.module.config
        limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise PlauditError(f"prompt {i} has no tokens, nothing to condition on: begin it with the BOS token")
            # An encoder and its decoder each have the whole context to themselves.
            apart = config.is_encoder_decoder and max(len(prompt), sampling.max_new_tokens)
            if limit and (apart or len(prompt) + sampling.max_new_tokens - 1) > limit:
                raise PlauditError(
                    f"prompt {i} has {len(prompt)} tokens and max_new_tokens is {sampling.max_new_tokens}, but the "
                    f"model's context is {limit}: shorten the prompt or lower max_new_tokens"
                )

    def _wave(
        self, prompts: list[tuple[int, ...]], sampling: Sampling, uniforms: Tensor
    ) -> list[tuple[list[int], list[float], bool]]:
        """Complete these prompts, all at once, with the uniforms (rows, max_new_tokens)."""
        size, limit = len(prompts), sampling.max_new_tokens
        model = self._shadow.module
        encodes = model.config.is_encoder_decoder
        decoder = Decoder(model, self._guide) if encodes else _Decoder(model, limit, self._guide)
        logits = decoder.prefill(prompts)
        device = logits.device
        uniforms = uniforms.to(device)
        stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
        tokens = torch.zeros(size, limit, dtype=torch.int64, device=device)
        logprobs = torch.zeros(size, limit, dtype=torch.float64, device=device)
        lengths = torch.full((size,), limit, device=device)
        running = torch.ones(size, dtype=torch.bool, device=device)
        # A token is at least one byte; the margin is for tokens that show nothing and for a cut first character.
        window = max((len(text.encode()) for text in sampling.stop_strings), default=0) + 8
        # Which row each slot of the batch holds. A row that has ended keeps its slot until the next compaction.
        rows = torch.arange(size, device=device)
        for step in range(limit):
            held_back = stop_ids if step + 1 < sampling.min_new_tokens else stop_ids[:0]
            ids, tokens_logprobs = _choose(logits, sampling, held_back, uniforms[rows, step])
            tokens[rows, step], logprobs[rows, step] = ids, tokens_logprobs
            ends = torch.isin(ids, stop_ids)
            if sampling.stop_strings and step + 1 >= sampling.min_new_tokens:
                first = max(0, step + 1 - window)
                ends |= self._completed(tokens[rows, first : step + 1], running[rows] & ~ends, sampling.stop_strings)
            lengths[rows[ends & running[rows]]] = step + 1
            running[rows] &= ~ends
            alive = running[rows]
            live = int(alive.sum())
            if live == 0 or step + 1 == limit:
                break
            if live < self._compact * len(rows):
                kept = alive.nonzero()[:, 0]
                rows, ids = rows[kept], ids[kept]
                decoder.select(kept)
            logits = decoder.step(ids)
        return [
            (row[:length], scores[:length], cut)
            for row, scores, length, cut in zip(
                tokens.tolist(), logprobs.tolist(), lengths.tolist(), running.tolist(), strict=True
            )
        ]

    def _completed(self, tails: Tensor, asked: Tensor, strings: tuple[str, ...]) -> Tensor:
        """Which of the rows that are `asked` (B,) hold one of `strings` in their last tokens `tails` (B, t)."""
        assert self._decode is not None
        found = torch.zeros_like(asked)
        for row in asked.nonzero()[:, 0].tolist():
            text = self._decode(tails[row].tolist())
            found[row] = any(string in text for string in strings)
        return found


class _Decoder:
    """The model, its cache and its masks for one batch of rows of which each is one token longer at every step."""

    def __init__(self, model: Any, room: int, guide: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model = model
        self.room = room
        self.guide = guide
        self.cache = slab_cache(model.config)
        accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepted:
            raise PlauditError(f"{type(model).__name__} takes no past_key_values: sample from it with its own generate")
        self.options: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        if "logits_to_keep" in accepted:
            self.options["logits_to_keep"] = 1
        if guide is not None:
            self.options["output_hidden_states"] = True
        self.positioned = "position_ids" in accepted
        # A mask that is ready for the attention kernel spares transformers making one at every step. Windows,
        # linear biases and other kernels need the plain one.
        self.ready = (
            self.positioned
            and model.config._attn_implementation in ("sdpa", attention.NAME)
            and not getattr(model.config, "alibi", False)
            and all(isinstance(layer, SlabLayer) for layer in self.cache.layers)
        )

    def prefill(self, prompts: list[tuple[int, ...]]) -> Tensor:
        """Compute every distinct prompt once, on the left of a common end; logits (rows, V) of what follows."""
        distinct = list(dict.fromkeys(prompts))
        lengths = [len(prompt) for prompt in distinct]
        self.width = max(lengths)
        tokens = torch.zeros(len(distinct), self.width, dtype=torch.int64)
        self.real = torch.ones(len(distinct), self.width + self.room, dtype=torch.bool)
        for i, prompt in enumerate(distinct):
            tokens[i, self.width - len(prompt) :] = torch.tensor(prompt)
            self.real[i, : self.width - len(prompt)] = False
        device = self.model.get_input_embeddings().weight.device
        self.real = self.real.to(device)
        self.padded = min(lengths) < self.width
        self.next = torch.tensor(lengths, device=device)
        positions = torch.arange(self.width, device=device) - (self.width - self.next)[:, None]
        logits = self._forward(tokens.to(device), positions.clamp(min=0), self.real[:, : self.width])
        if len(distinct) < len(prompts):
            place = {prompt: i for i, prompt in enumerate(distinct)}
            owners = torch.tensor([place[prompt] for prompt in prompts], device=device)
            self.select(owners)
            logits = logits[owners]
        return logits

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was; rows may repeat or be left out."""
        self.cache.reorder_cache(rows)
        self.real, self.next = self.real[rows], self.next[rows]

    def step(self, ids: Tensor) -> Tensor:
        """Append ids (rows,) and return the logits (rows, V) of what follows."""
        self.width += 1
        mask: Tensor | None = self.real[:, : self.width]
        if self.ready:
            # Off the CPU the fastest kernels take no mask; on it, grouped heads are quicker with one than without.
            needed = self.padded or ids.device.type == "cpu"
            mask = self.real[:, None, None, : self.width] if needed else None
        logits = self._forward(ids[:, None], self.next[:, None], mask)
        self.next = self.next + 1
        return logits

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        placed = {"position_ids": positions} if self.positioned else {}
        output = self.model(input_ids=tokens, attention_mask=mask, **placed, **self.options)
        logits: Tensor = output.logits[:, -1]
        return logits if self.guide is None else logits + self.guide(output.hidden_states[-1][:, -1])


def _choose(logits: Tensor, sampling: Sampling, held_back: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens (B,) and their log-probabilities (B,) float64, from logits (B, V) of any precision."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if len(held_back):
        logits = logits.index_fill(1, held_back, -torch.inf)
    if sampling.temperature == 0:
        best = logits.argmax(1)
        return best, logits.double().log_softmax(1).gather(1, best[:, None])[:, 0]
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    return draw(keep_likely(logits, sampling.top_k, sampling.top_p), uniforms)
