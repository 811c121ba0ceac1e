"""Our sampler against Hugging Face's `generate`, and against what the machine can do.

python benchmarks/generation.py [--model smollm2-135m-instruct] [--batches 1 8 32 128] [--rounds 3]

Both sample at temperature 1 from the same weights in one process, in turn A B A B: bfloat16, or float32 where the
machine does not multiply in bfloat16. Prompts are pieces of 32 tokens of movie reviews, and 64 tokens are asked for.

full     every row runs to the limit
ends     rows end: a set of frequent tokens stops them on both sides, found so that the mean length is about 20; both
         sides draw, so lengths differ from one call to the next, and tokens a second count what was really produced
stream   256 such prompts; ours takes them in one call with a window of 32 rows, generate in batches of 32
groups   4 prompts, 8 answers each, to the limit; ours computes a prompt once, generate once for each answer

The bound is a floor under decoding steps. A step reads all weights (a tied head once) and the keys and values of its
rows, and multiplies each row with all weights and its past, so it takes at least

    max(bytes / memory rate, operations / matrix rate)

where both rates are measured in the same run: a sum over 512 MB, and a square product, with all threads. Steps are
those that the lengths of our rows need when rows that have ended cost nothing; in the stream the window is always full.
The first token of a row comes out of its prompt. So our share of the bound is the floor over the time of a call less
the time of the same call for one token.

Prints a Markdown table: medians over the rounds, ratios with the smallest and the largest, and the cores that other
processes used. Packing the weights for decoding, once for each update, is timed apart.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from plaudit.machine import Guard
from plaudit.sampler import LocalSampler, Sampling
from plaudit.sources import resolve
from plaudit.speed import choose, measured

STREAM, WINDOW = 256, 32
PROMPTS, ANSWERS = 4, 8
CALIBRATION = 128


@dataclass(frozen=True)
class Work:
    """`prompts` prompts with `copies` completions each, `rows` of them at once; `ends`: rows stop on their own.

    In a `stream` our sampler gets all prompts in one call.
    """

    name: str
    prompts: int
    rows: int
    copies: int = 1
    ends: bool = False
    stream: bool = False


@dataclass(frozen=True)
class Bound:
    """What a decoding step moves and multiplies, and how fast the machine can do either.

    weights     bytes of all weights that a step reads
    cached      bytes of the keys and values of one token
    products    operations of one row with all weights
    attention   operations of one row with one cached token
    memory      bytes a second
    matrix      operations a second
    """

    weights: float
    cached: float
    products: float
    attention: float
    memory: float
    matrix: float

    def step(self, rows: float, past: float) -> float:
        """Seconds that a step of `rows` rows takes at least, whose caches hold `past` tokens together."""
        read = self.weights + past * self.cached
        return max(read / self.memory, (rows * self.products + past * self.attention) / self.matrix)

    def seconds(self, lengths: Sequence[int], prompt: int, window: int) -> float:
        """Seconds that the steps for rows of these lengths take at least, after prompts of `prompt` tokens.

        Up to `window` rows begin together and leave as they end; of more rows, `window` always run.
        """
        if len(lengths) <= window:
            running = (sum(length > step for length in lengths) for step in range(1, max(lengths)))
            return sum(self.step(rows, rows * (prompt + t)) for t, rows in enumerate(running, 1))
        row_steps = sum(length - 1 for length in lengths)
        past = sum((length - 1) * prompt + length * (length - 1) / 2 for length in lengths)
        return row_steps / window * self.step(window, past * window / row_steps) if row_steps else 0.0


def frequent_stops(rows: Sequence[Sequence[int]], target: float) -> list[int]:
    """Tokens, the most frequent first, that cut `rows` to a mean length of `target`, or as little above as may be.

    A token whose stop would bring the mean below `target` is passed over.
    """
    stops: set[int] = set()
    reached = mean(map(len, rows))
    for token, _ in Counter(chain.from_iterable(rows)).most_common():
        if reached <= 1.02 * target:
            break
        with_it = mean(ended(row, stops | {token}) for row in rows)
        if with_it >= target:
            stops.add(token)
            reached = with_it
    return sorted(stops)


def ended(row: Sequence[int], stops: set[int]) -> int:
    """The length of a row that ends with its first stop token."""
    return next((i for i, token in enumerate(row, 1) if token in stops), len(row))


def best(work: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the quickest of several runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def bound_of(model: Any, dtype: torch.dtype) -> Bound:
    """What decoding with `model` takes, and the rates of this machine, measured now."""
    config = model.config
    wide = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    looked_up = 0 if inputs is head else inputs.numel()
    count = sum(parameter.numel() for parameter in model.parameters()) - looked_up
    large = torch.ones(128 << 20)
    return Bound(
        weights=count * dtype.itemsize,
        cached=2 * config.num_hidden_layers * config.num_key_value_heads * wide * dtype.itemsize,
        products=2 * count,
        attention=4 * config.num_hidden_layers * config.num_attention_heads * wide,
        memory=large.numel() * 4 / best(large.sum),
        matrix=1e9 * measured((dtype,), ((4096, 4096, 4096),))[0],
    )


def reviews(tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """`count` pieces of `length` tokens from the snippets, one after another."""
    tokens: list[int] = []
    with Path(resolve("movie-reviews"), "train.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            tokens += tokenizer(row["prompt"] + row["completion"] + "\n", add_special_tokens=False).input_ids
            if len(tokens) >= length * count:
                break
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


def theirs(model: Any, prompts: list[list[int]], work: Work, new: int, stops: list[int], seed: int) -> list[int]:
    """The lengths of the rows that `generate` makes, batch by batch."""
    torch.manual_seed(seed)
    # The model's own end token would come in by the back door of the defaults.
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=new, pad_token_id=0, eos_token_id=stops or None
    )
    at_once = work.rows // work.copies
    lengths = []
    for start in range(0, len(prompts), at_once):
        tokens = torch.tensor(prompts[start : start + at_once])
        with torch.inference_mode():
            found = model.generate(tokens, attention_mask=torch.ones_like(tokens), num_return_sequences=work.copies)
        lengths += [ended(row, set(stops)) for row in found[:, tokens.shape[1] :].tolist()]
    return lengths


def ours(sampler: LocalSampler, prompts: list[list[int]], work: Work, sampling: Sampling, seed: int) -> list[list[int]]:
    """The lengths of our rows, call by call."""
    generator = torch.Generator().manual_seed(seed)
    at_once = len(prompts) if work.stream else work.rows // work.copies
    calls = (prompts[start : start + at_once] for start in range(0, len(prompts), at_once))
    found = (sampler.sample(call, sampling, work.copies, generator).completions for call in calls)
    return [[len(row) for row in completions] for completions in found]


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds, and what `run` returned."""
    start = time.perf_counter()
    found = run(*arguments)
    return time.perf_counter() - start, found


def measure(model: Any, bound: Bound, prompts: list[list[int]], work: Work, options: Any, stops: list[int]) -> str:
    """One row of the table."""
    prompts, stops = prompts[: work.prompts], stops if work.ends else []
    whole, first = Sampling(options.new, stop_ids=tuple(stops)), Sampling(1)
    sampler = LocalSampler(model, rows=work.rows)
    theirs(model, prompts[: work.rows // work.copies], work, 2, stops, 0)
    ours(sampler, prompts[: work.rows // work.copies], work, Sampling(2), 0)
    rates: dict[str, list[float]] = {"theirs": [], "ours": [], "ratio": [], "bound": [], "share": []}
    lengths: dict[str, list[int]] = {"theirs": [], "ours": []}
    with Guard() as guard:
        for seed in range(options.rounds):
            slow, other = timed(theirs, model, prompts, work, options.new, stops, seed)
            quick, own = timed(ours, sampler, prompts, work, whole, seed)
            prefill, _ = timed(ours, sampler, prompts, work, first, seed)
            floor = sum(bound.seconds(call, options.prompt, work.rows) for call in own)
            rows = list(chain.from_iterable(own))
            lengths["theirs"] += other
            lengths["ours"] += rows
            rates["theirs"].append(sum(other) / slow)
            rates["ours"].append(sum(rows) / quick)
            rates["ratio"].append(rates["ours"][-1] / rates["theirs"][-1])
            rates["bound"].append((sum(rows) - len(rows)) / floor)
            rates["share"].append(floor / (quick - prefill))
    middle = {name: median(values) for name, values in rates.items()}
    cells = [
        work.name,
        f"{work.rows}",
        f"{mean(lengths['theirs']):.1f} / {mean(lengths['ours']):.1f}",
        f"{middle['theirs']:.0f}",
        f"{middle['ours']:.0f}",
        f"{middle['ratio']:.2f} ({min(rates['ratio']):.2f} to {max(rates['ratio']):.2f})",
        f"{middle['bound']:.0f}",
        f"{100 * middle['share']:.0f} %",
        f"{guard.others:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def works(batches: Sequence[int], stream: int) -> list[Work]:
    """What is measured. Small batches with ends are repeated over more prompts, or chance would decide."""
    return [
        *(Work("full", batch, batch) for batch in batches),
        *(Work("ends", max(batch, 16), batch, ends=True) for batch in batches),
        Work(f"stream of {stream}", stream, WINDOW, ends=True, stream=True),
        Work(f"groups of {ANSWERS}", PROMPTS, PROMPTS * ANSWERS, copies=ANSWERS),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a folder, or a name that can be pulled")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion at most")
    parser.add_argument("--mean", type=float, default=20.0, help="mean length of rows that end on their own")
    parser.add_argument("--stream", type=int, default=STREAM, help="prompts of the stream")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dtype = getattr(torch, choose("auto", torch.device("cpu")).precision)
    folder = resolve(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    asked = works(options.batches, options.stream)
    prompts = reviews(tokenizer, options.prompt, max([CALIBRATION, *(work.prompts for work in asked)]))
    bound = bound_of(model, dtype)
    packing, sampler = timed(LocalSampler, model)
    # A draw of its own: on the rows that the stops were chosen by, their mean would come out too well.
    own_draw = torch.Generator().manual_seed(options.rounds)
    free = sampler.sample(prompts[:CALIBRATION], Sampling(options.new), 1, own_draw)
    stops = frequent_stops(free.completions, options.mean)
    print(
        f"{options.model}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, prompts of "
        f"{options.prompt} tokens, up to {options.new} new; memory {bound.memory / 1e9:.1f} GB/s, matrices "
        f"{bound.matrix / 1e9:.0f} GFLOP/s; weights packed in {packing:.2f} s.\n"
        f"Rows with ends stop at {', '.join(repr(tokenizer.decode([token])) for token in stops)}.\n"
    )
    print("| work | at once | mean length, HF / ours | HF, tokens/s | ours | ratio (range) | bound | share | others |")
    print("|---" * 9 + "|", flush=True)
    for work in asked:
        print(measure(model, bound, prompts, work, options, stops), flush=True)


if __name__ == "__main__":
    main()
