"""The `Sampler` protocol and the in-process engine: prompts in, completions and their log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from plaudit.budget import retried
from plaudit.decoding import Shadow, draw, keep_likely, scored
from plaudit.errors import PlauditError
from plaudit.numerics import warmed
from plaudit.seq2seq import Decoder
from plaudit.slots import Slots


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn and when it ends.

    max_new_tokens  the limit; a row that reaches it without ending is `truncated`
    temperature     divides the logits; 0 takes the likeliest token. One number, or one for each prompt in turn
    stop_ids        tokens that end a row; the token is kept, since choosing it was an action
    stop_strings    texts that end a row after the token that completes them
    min_new_tokens  a row does not end before it has this many: until then, stop tokens can't be drawn
    top_k, top_p    for evaluation and inference: keep the likeliest k (0: all), then mass p (1: all)
    """

    max_new_tokens: int = 64
    temperature: float | Sequence[float] = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    min_new_tokens: int = 0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        coldest = min(self.temperature, default=0.0) if isinstance(self.temperature, Sequence) else self.temperature
        rules = [
            (self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}: give at least 1"),
            (coldest >= 0, f"temperature is {self.temperature}: give 0 (greedy) or more"),
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

    def release(self) -> None:
        """Nothing is sampled before the weights have changed and `refresh` was called."""
        ...

    def refresh(self) -> None:
        """The weights of the model have changed."""
        ...


class LocalSampler:
    """Samples from a Hugging Face language model, causal or encoder-decoder, in this process, on the device where it
    is.

    Every distinct prompt is computed once for all of its completions. A row that has ended makes room for one that
    waits; when none waits, rows that have ended leave the batch. Models whose layers must know what really came before
    a row (sliding windows, recurrent states, linear biases, encoder-decoders) take their rows in waves instead.
    The model itself is never touched: a `Shadow` of it, in evaluation mode, does the work. Call `refresh`
    after every change of its weights (an optimizer step, a merged adapter) and before sampling again.

    model    the language model; adapters may be merged or not
    decode   token ids -> text, needed for stop strings
    dtype    what the shadow computes in (None: what the parameters are in)
    guide    last hidden states (n, d) -> (n, V), added to their logits before anything else is done with them
    rows     how many rows are decoded at once at most; the others wait. Once memory has run out, half as many
    refill   rows that wait come in when this share of the slots is free: each time costs a pass over the weights
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
        refill: float = 0.125,
        compact: float = 0.75,
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._shadow = Shadow(base, dtype)
        self._decode = decode
        self._guide = guide
        self._rows = rows
        self._refill = refill
        self._compact = compact

    def refresh(self) -> None:
        """Take over the weights that the model has now."""
        self._shadow.refresh()

    def release(self) -> None:
        """Give back the memory of weights that are going to change. `refresh` before sampling again."""
        self._shadow.release()

    @torch.inference_mode()
    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, n: int, generator: torch.Generator
    ) -> Sampled:
        """`n` completions of every prompt, drawn with `generator`; the same generator state gives the same rows.

        One uniform number per row and step is drawn up front, so what a row gets depends neither on when
        other rows end nor on how many are decoded at once.

        Raises PlauditError for an empty prompt, for prompts that leave no room for `max_new_tokens` in the
        model's context, for stop strings without `decode`, and for temperatures that are not one for each prompt.
        """
        self._check(prompts, sampling)
        size = len(prompts) * n
        uniforms = torch.rand(
            size, sampling.max_new_tokens, dtype=torch.float64, generator=generator, device=generator.device
        )
        asked = [tuple(prompt) for prompt in prompts]
        first = {prompt: i for i, prompt in reversed(list(enumerate(asked)))}
        # Rows of like length stand together, so that padding stays small, and those of one prompt side by side; the
        # longest come first, so that a batch that does not fit into memory fails at once.
        order = sorted(range(size), key=lambda row: (-len(asked[row // n]), first[asked[row // n]]))
        uniforms = uniforms.to(self._shadow.module.device)
        return retried(
            lambda: self._drawn(order, asked, _Rows(sampling, uniforms, self._decode), n), lambda: self._lessen(size)
        )

    def _lessen(self, size: int) -> None:
        at_once = min(self._rows, size)
        if at_once == 1:
            raise PlauditError(
                "memory ran out while one completion was sampled alone: lower max_new_tokens or max_prompt_tokens, or "
                "take a smaller model."
            )
        self._rows = at_once // 2

    def _drawn(self, order: list[int], asked: list[tuple[int, ...]], rows: _Rows, n: int) -> Sampled:
        while order:
            order = self._run(order, [asked[row // n] for row in order], rows)
        return rows.sampled()

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        if sampling.stop_strings and self._decode is None:
            raise PlauditError("stop_strings need text to search: give the sampler `decode`, or use stop_ids")
        given = sampling.temperature
        if isinstance(given, Sequence) and len(given) != len(prompts):
            raise PlauditError(f"there are {len(given)} temperatures for {len(prompts)} prompts: give one, or one each")
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

    def _run(self, order: list[int], prompts: list[tuple[int, ...]], rows: _Rows) -> list[int]:
        """Complete the rows of `order`, which begin with `prompts`, in one batch; return those that are still to do."""
        model, device = self._shadow.module, rows.tokens.device
        longest = len(prompts[0]) + rows.sampling.max_new_tokens - 1
        encodes = model.config.is_encoder_decoder
        decoder = Decoder(model, self._guide) if encodes else Slots(model, longest, self._guide)
        logits = decoder.start(prompts[: self._rows])
        # Which row each slot holds. One that has ended leaves its slot empty until it is filled or left out.
        slots, at = torch.tensor(order[: self._rows], device=device), min(self._rows, len(order))
        last = len(order) if isinstance(decoder, Slots) and decoder.refills else at
        ids, running = rows.extend(slots, logits)
        while True:
            free = running.logical_not().nonzero()[:, 0]
            while at < last and len(free) >= max(1, self._refill * len(slots)):
                count = min(len(free), last - at)
                logits = decoder.place(free, prompts[at : at + count])
                slots[free] = rows.empty
                slots[free[:count]] = torch.tensor(order[at : at + count], device=device)
                ids[free[:count]], running[free[:count]] = rows.extend(slots[free[:count]], logits)
                at += count
                free = running.logical_not().nonzero()[:, 0]
            if len(free) == len(slots):
                return order[at:]
            slots[free] = rows.empty
            if at == last and isinstance(decoder, Slots):
                decoder.known = None  # nobody waits for these prompts any more
            if at == last and len(slots) - len(free) < self._compact * len(slots):
                kept = running.nonzero()[:, 0]
                slots, ids = slots[kept], ids[kept]
                decoder.select(kept)
            ids, running = rows.extend(slots, decoder.step(ids))


class _Rows:
    """What has been drawn so far for all rows, and the uniform numbers (rows, max_new_tokens) that it is drawn with.

    empty  a number beside those of the rows, for slots that hold none
    """

    def __init__(self, sampling: Sampling, uniforms: Tensor, decode: Callable[[list[int]], str] | None) -> None:
        size, device = len(uniforms), uniforms.device
        self.sampling, self.decode = sampling, decode
        self.empty = size
        self.temperature: float | Tensor
        if isinstance(sampling.temperature, Sequence):
            each = torch.tensor(sampling.temperature, dtype=torch.float64, device=device)
            each = each.repeat_interleave(size // max(len(each), 1))
            self.temperature = torch.cat([each, each.new_ones(1)])
        else:
            self.temperature = sampling.temperature
        self.uniforms = torch.cat([uniforms, uniforms.new_zeros(1, uniforms.shape[1])])
        self.tokens = torch.zeros(self.uniforms.shape, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros_like(self.uniforms)
        self.lengths = torch.zeros(size + 1, dtype=torch.int64, device=device)
        self.ended = torch.zeros(size + 1, dtype=torch.bool, device=device)
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
        # A token is at least one byte; the margin is for tokens that show nothing and for a cut first character.
        self.window = max((len(text.encode()) for text in sampling.stop_strings), default=0) + 8

    def extend(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draw one more token for each of `rows` (n,) from logits (n, V); (tokens, whether the row goes on)."""
        sampling, place = self.sampling, self.lengths[rows]
        early = place + 1 < sampling.min_new_tokens
        if sampling.min_new_tokens > 1 and len(self.stop_ids):
            logits[:, self.stop_ids] = logits[:, self.stop_ids].masked_fill(early[:, None], -torch.inf)
        temperature = self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature
        ids, logprobs = _choose(logits, sampling, temperature, self.uniforms[rows, place])
        self.tokens[rows, place], self.logprobs[rows, place] = ids, logprobs
        self.lengths[rows] = place + 1
        self.lengths[self.empty] = 0
        ends = (ids[:, None] == self.stop_ids).any(1)
        going = (place + 1 < sampling.max_new_tokens) & (rows != self.empty)
        if sampling.stop_strings:
            ends |= self._completed(rows, (rows != self.empty) & ~ends & ~early)
        self.ended[rows] = ends
        return ids, going & ~ends

    def _completed(self, rows: Tensor, asked: Tensor) -> Tensor:
        """Which of the rows that are `asked` (n,) hold one of the stop strings in their last tokens."""
        assert self.decode is not None
        found = torch.zeros_like(asked)
        for i in asked.nonzero()[:, 0].tolist():
            row, length = int(rows[i]), int(self.lengths[rows[i]])
            text = self.decode(self.tokens[row, max(0, length - self.window) : length].tolist())
            found[i] = any(string in text for string in self.sampling.stop_strings)
        return found

    def sampled(self) -> Sampled:
        lengths, cut = self.lengths[: self.empty].tolist(), (~self.ended[: self.empty]).tolist()
        tokens, logprobs = (
            [row[:length] for row, length in zip(table.tolist(), lengths, strict=False)]
            for table in (self.tokens, self.logprobs)
        )
        return Sampled(tokens, logprobs, cut)


def _choose(logits: Tensor, sampling: Sampling, temperature: float | Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens (n,) and their log-probabilities (n,) float64, from logits (n, V) of any precision; temperature is
    one number or (n,)."""
    if isinstance(temperature, Tensor):
        warm = temperature > 0
        drawn = _drawn(logits, sampling, temperature.where(warm, 1.0), uniforms)
        if bool(warm.all()):
            return drawn
        ids, logprobs = (torch.where(warm, a, b) for a, b in zip(drawn, _best(logits), strict=True))
        return ids, logprobs
    return _drawn(logits, sampling, temperature, uniforms) if temperature > 0 else _best(logits)


def _best(logits: Tensor) -> tuple[Tensor, Tensor]:
    best = logits.argmax(1)
    return best, scored(logits, best)


def _drawn(logits: Tensor, sampling: Sampling, temperature: float | Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    if sampling.top_k == 0 and sampling.top_p == 1:
        return draw(logits, uniforms, temperature)
    return draw(keep_likely(warmed(logits, temperature), sampling.top_k, sampling.top_p), uniforms)
