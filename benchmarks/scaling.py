"""What a step costs as the work grows: `python benchmarks/scaling.py [--output runs/scaling.png]`.

Five curves of time and one of memory, each over one size while all others stay. Forward and backward go through
`Policy.forward`, decoding through `LocalSampler`; models are of the Llama kind with random weights, in bfloat16, or
float32 where the machine does not multiply in bfloat16. Every curve gets an exponent p, by which cost grows as size^p:
the least-squares line through all points in log-log, and the line through the last two points, which shows where the
curve is heading once what does not depend on the size is small. Nothing may grow faster than it must:

length      one row: at most 2, since each token attends to all before it; near 1 while matrices outweigh attention
memory      of the same steps beyond what was there before: at most 1, since no square of the length is ever kept
group       answers that share one prompt: at most 1, and less where the prompt is computed once for several
vocabulary  at most 1: the head is one product, chunk by chunk
parameters  at most 1
context     time of one decoded token for each of the rows: at most 1, since it reads every cached key and value once

For noise 0.15 more is allowed. Prints a Markdown table, and the cores that other processes used.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from plaudit.batch import Batch, collate
from plaudit.machine import Guard, forget_peak, peak_memory_mb, release
from plaudit.policy import Policy
from plaudit.sampler import LocalSampler, Sampling
from plaudit.speed import choose

TOLERANCE = 0.15


@dataclass(frozen=True)
class Sizes:
    """What is measured. `models` are (width, layers); the others use a model of the `base` shape."""

    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    groups: tuple[int, ...] = (2, 4, 8, 16, 32)
    vocabularies: tuple[int, ...] = (8_192, 16_384, 32_768, 65_536, 151_936)
    models: tuple[tuple[int, int], ...] = ((64, 10), (128, 20), (320, 20), (576, 30), (1024, 38))
    contexts: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    base: tuple[int, int] = (256, 8)
    vocabulary: int = 32_768
    tokens: int = 256
    prompt: int = 256
    answer: int = 64
    rows: int = 8
    steps: int = 32
    repeats: int = 5


@dataclass(frozen=True)
class Curve:
    """Costs against sizes, and the largest exponent that the work itself calls for."""

    title: str
    axis: str
    sizes: Sequence[float]
    costs: Sequence[float]
    limit: float
    unit: str = "s"

    @property
    def holds(self) -> bool:
        return max(exponents(self.sizes, self.costs)) <= self.limit + TOLERANCE


def exponents(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """p of cost = c * size^p: by least squares through the logarithms of all points, and through the last two."""
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
    return slope, (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])


def model_of(shape: tuple[int, int], vocabulary: int, dtype: torch.dtype) -> Any:
    """A Llama with heads of 64 dimensions, tied embeddings and random weights."""
    width, layers = shape
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=-(-8 * width // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def tokens_of(count: int, vocabulary: int, seed: int) -> list[int]:
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds of `work` after a first run; quick work is repeated more often."""
    work()
    found: list[float] = []
    while len(found) < repeats or (sum(found) < 0.3 and len(found) < 50):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return median(found)


def learn(policy: Policy, batch: Batch) -> None:
    """Forward and backward of the log-probabilities of all actions."""
    policy.forward(batch, logprobs=True).logprobs.sum().backward()
    policy.zero_grad(set_to_none=True)


def row(length: int, vocabulary: int) -> Batch:
    """One row of which all but the first token are actions."""
    tokens = tokens_of(length, vocabulary, length)
    return collate([tokens[:1]], [tokens[1:]])


def length_curves(sizes: Sizes, dtype: torch.dtype) -> list[Curve]:
    """Seconds and memory of a step on one row."""
    policy = Policy(model_of(sizes.base, sizes.vocabulary, dtype))
    seconds, memory = [], []
    for length in sizes.lengths:
        batch = row(length, sizes.vocabulary)
        seconds.append(timed(lambda batch=batch: learn(policy, batch), sizes.repeats))
        release()
        forget_peak()
        before = peak_memory_mb()
        learn(policy, batch)
        memory.append(max(peak_memory_mb() - before, 1.0))
    axis = "tokens in the row"
    return [
        Curve("Time of a step by length", axis, sizes.lengths, seconds, 2.0),
        Curve("Memory of a step by length", axis, sizes.lengths, memory, 1.0, "MB"),
    ]


def group_curve(sizes: Sizes, dtype: torch.dtype) -> Curve:
    """Seconds of a step on one group of answers to one prompt."""
    policy = Policy(model_of(sizes.base, sizes.vocabulary, dtype))
    prompt = tokens_of(sizes.prompt, sizes.vocabulary, 0)
    seconds = []
    for count in sizes.groups:
        answers = [tokens_of(sizes.answer, sizes.vocabulary, 1 + i) for i in range(count)]
        batch = collate([prompt] * count, answers, groups=[0] * count)
        seconds.append(timed(lambda batch=batch: learn(policy, batch), sizes.repeats))
    return Curve("Time of a step by group size", "answers to one prompt", sizes.groups, seconds, 1.0)


def vocabulary_curve(sizes: Sizes, dtype: torch.dtype) -> Curve:
    """Seconds of a step on one row, the whole of which is scored."""
    seconds = []
    for vocabulary in sizes.vocabularies:
        policy, batch = Policy(model_of(sizes.base, vocabulary, dtype)), row(sizes.tokens, vocabulary)
        seconds.append(timed(lambda policy=policy, batch=batch: learn(policy, batch), sizes.repeats))
    return Curve("Time of a step by vocabulary", "tokens in the vocabulary", sizes.vocabularies, seconds, 1.0)


def model_curve(sizes: Sizes, dtype: torch.dtype) -> Curve:
    """Seconds of a step on one row, with models of the same small vocabulary."""
    counts, seconds = [], []
    vocabulary = sizes.vocabularies[0]
    batch = row(sizes.tokens, vocabulary)
    for shape in sizes.models:
        policy = Policy(model_of(shape, vocabulary, dtype))
        counts.append(float(sum(parameter.numel() for parameter in policy.parameters())))
        seconds.append(timed(lambda policy=policy: learn(policy, batch), sizes.repeats))
        del policy
        release()
    return Curve("Time of a step by model size", "parameters", counts, seconds, 1.0)


def context_curve(sizes: Sizes, dtype: torch.dtype) -> Curve:
    """Seconds of one decoding step of `rows` rows: a call for many tokens less one for a single token."""
    sampler = LocalSampler(model_of(sizes.base, sizes.vocabulary, dtype))
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for context in sizes.contexts:
        prompt = [tokens_of(context, sizes.vocabulary, context)]

        def decode(count: int, prompt: list[list[int]] = prompt) -> None:
            sampler.sample(prompt, Sampling(count), sizes.rows, generator)

        whole = timed(lambda decode=decode: decode(1 + sizes.steps), sizes.repeats)
        first = timed(lambda decode=decode: decode(1), sizes.repeats)
        seconds.append((whole - first) / sizes.steps)
    return Curve("Time of a decoding step by context", "tokens of context", sizes.contexts, seconds, 1.0)


def table(curves: Sequence[Curve]) -> str:
    """A row for each curve."""
    lines = ["| | sizes | cost | exponent | of the last two | at most | holds |", "|---" * 7 + "|"]
    for curve in curves:
        overall, last = exponents(curve.sizes, curve.costs)
        cells = [
            curve.title,
            ", ".join(map(short, curve.sizes)),
            ", ".join(quantity(cost, curve.unit) for cost in curve.costs),
            f"{overall:.2f}",
            f"{last:.2f}",
            f"{curve.limit:g}",
            "yes" if curve.holds else "**no**",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def short(size: float) -> str:
    """2048 -> 2,048; 65536 -> 66k; 1.24e8 -> 124M."""
    if size < 8000:
        return f"{size:,.0f}"
    return f"{size / 1e3:.0f}k" if size < 1e6 else f"{float(f'{size / 1e6:.3g}'):g}M"


def quantity(cost: float, unit: str) -> str:
    """0.0123 s -> 12 ms; two digits."""
    if unit == "s" and cost < 0.9995:
        cost, unit = cost * 1000, "ms"
    return f"{float(f'{cost:.2g}'):g} {unit}"


def draw(curves: Sequence[Curve], path: Path) -> None:
    """One picture of all curves; a dashed line through the last point shows the steepest growth that is allowed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    ink, muted, rule, blue = "#1f2328", "#6b7280", "#e5e7eb", "#2563eb"
    style = {"font.size": 9, "text.color": ink, "axes.edgecolor": rule, "xtick.color": muted, "ytick.color": muted}
    with rc_context(style):
        figure = Figure(figsize=(11, 6.8), dpi=160, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        for axes, curve in zip(figure.subplots(2, 3).flat, curves, strict=True):
            overall, last = exponents(curve.sizes, curve.costs)
            steepest = [curve.costs[-1] * (size / curve.sizes[-1]) ** curve.limit for size in curve.sizes]
            axes.loglog(curve.sizes, steepest, color=muted, lw=1, ls=(0, (4, 3)), label="steepest allowed")
            axes.loglog(curve.sizes, curve.costs, color=blue, lw=2, marker="o", ms=5, clip_on=False, label="measured")
            axes.set_title(curve.title, loc="left", fontweight="bold", fontsize=10.5, pad=22)
            words = f"exponent {overall:.2f}, at the end {last:.2f}, may be {curve.limit:g}"
            note = axes.text(0, 1.03, words, transform=axes.transAxes, color=muted if curve.holds else "#b91c1c")
            note.set_in_layout(False)
            axes.set_xlabel(curve.axis, color=muted)
            axes.set_ylim(min(curve.costs) / 1.8, max(curve.costs) * 1.8)
            axes.xaxis.set_major_locator(FixedLocator(curve.sizes))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: short(size)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda cost, _, unit=curve.unit: quantity(cost, unit)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.tick_params(which="both", length=0)
            axes.grid(True, color=rule, lw=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].legend(frameon=False, loc="upper left", labelcolor=ink)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def measure(sizes: Sizes, dtype: torch.dtype) -> list[Curve]:
    """All curves, in the order of the picture."""
    lengths, memory = length_curves(sizes, dtype)
    group, vocabulary = group_curve(sizes, dtype), vocabulary_curve(sizes, dtype)
    context = context_curve(sizes, dtype)
    return [lengths, group, vocabulary, model_curve(sizes, dtype), context, memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling.png"))
    arguments = parser.parse_args()
    dtype = getattr(torch, choose("auto", torch.device("cpu")).precision)
    with Guard() as guard:
        curves = measure(Sizes(), dtype)
    print(table(curves))
    draw(curves, arguments.output)
    print(
        f"\n{str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads, {guard.seconds:.0f} s, other "
        f"processes used {guard.others:.2f} cores; the picture is {arguments.output}."
    )


if __name__ == "__main__":
    main()
