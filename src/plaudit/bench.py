"""What this machine reaches in training and decoding, beside what its matrix products and its memory would allow."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from plaudit import budget, checks, config, machine, sources, speed
from plaudit.algorithms.sft import SupervisedFineTuning
from plaudit.errors import PlauditError
from plaudit.hooks import progress_bar, tell
from plaudit.loading import encodes, load_policy, load_tokenizer
from plaudit.recipes import start_world
from plaudit.run import Run, read_lines, write_atomically
from plaudit.sampler import LocalSampler, Sampling
from plaudit.settings import SFT, Bench
from plaudit.templates import Encoded
from plaudit.trainer import Interrupted, Trainer
from plaudit.world import World

PROMPT = 32
"""Tokens of each prompt that is decoded from."""

ROWS = (1, 8, 32)
"""How many rows are decoded side by side."""

WAYS: dict[str, dict[str, int]] = {
    "full": {},
    "lora_rank 16": {"lora_rank": 16},
    "train_layers 8": {"train_layers": 8},
}
"""The ways of training that are measured; of a model with fewer layers, all are trained."""

BUSY = 0.1
"""Cores that others may keep busy before the figures are called into question."""


def bench(settings: Bench) -> dict[str, Any]:
    """Measures, prints one table, and writes it to `output` if there is one. Raises PlauditError for a model that is
    not a causal language model."""
    settings = config.check(settings)
    checks.check_model(settings.model)
    model = sources.resolve(settings.model, tell)
    load_tokenizer(model)
    if encodes(model):
        raise PlauditError("bench: an encoder-decoder model is not measured: name a causal language model.")
    bar, task = progress_bar("bench", 3 + len(WAYS) + len(ROWS), unit="measurements")
    with bar, machine.Guard() as guard:
        found: dict[str, Any] = {}
        for part in _measurements(settings, model, found):
            bar.update(task, advance=1, figures=part)
    found["others"] = guard.others
    Console(soft_wrap=True).print(_table(found), highlight=False)
    if guard.others > BUSY:
        tell(f"Other processes kept {guard.others:.1f} cores busy meanwhile: the figures say little of this machine.")
    if settings.output:
        write_atomically(settings.output, json.dumps(found, indent=2) + "\n")
    return found


def _measurements(settings: Bench, model: str, found: dict[str, Any]) -> Iterator[str]:
    """Fills `found`, and yields the name of each measurement when it is made."""
    # Before this process has any threads of its own that could be in the way.
    world = start_world(settings)
    shape = shape_of(budget.hollow(SFT(model=model, data="none")))
    columns = min(settings.tokens, shape.context)
    new = min(settings.new_tokens, shape.context - PROMPT)
    if new < 1:
        raise PlauditError(f"bench: {model!r} reads {shape.context} tokens, and a prompt has {PROMPT} already.")
    found |= {"model": settings.model, "machine": machine.processor(), "threads": torch.get_num_threads()}
    found |= {"torch": torch.__version__, "device": str(world.device), "precision": world.precision}
    found["start_seconds"] = first_step(settings, model, columns)
    yield "start"
    shapes = speed.SHAPES if world.device.type == "cpu" else ((4096, 4096, 4096),)
    types = (torch.float32, torch.bfloat16)
    rates = speed.measured(types, shapes, settings.seconds / 4, world.device)
    found["matrix_gflops"] = dict(zip(("float32", "bfloat16"), rates, strict=True))
    yield "matrix products"
    found["memory_gbs"] = memory_rate(world.device, settings.seconds / 2)
    yield "memory"
    matrix = found["matrix_gflops"][world.precision] * 1e9
    found["training"], found["decoding"] = {}, {}
    for name, how in WAYS.items():
        how = {key: min(value, shape.layers) if key == "train_layers" else value for key, value in how.items()}
        found["training"][name] = training(settings, model, world, shape, columns, how, matrix)
        machine.release()
        yield name
    policy = load_policy(model, precision=world.precision, learns=False).to(world.device)
    sampler = LocalSampler(policy.backbone, dtype=world.sampling_dtype)
    for rows in ROWS:
        seconds = decoding(settings, sampler, rows, new, shape)
        width = 2 if world.precision == "bfloat16" else 4
        bound = decoding_bound(shape, rows, PROMPT + new / 2, width, matrix, found["memory_gbs"] * 1e9)
        reached = rows * new / seconds
        found["decoding"][str(rows)] = {"tokens_per_second": reached, "bound": bound, "share": reached / bound}
        yield f"{rows} row{'s' * (rows > 1)}"


# ------------------------------------------------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Shape:
    """What the operations of a model are counted from.

    matrices   numbers in the matrices of its layers; head: in that of its vocabulary head
    layers     how many layers there are
    attention  heads times their width
    cached     numbers that a token keeps in the cache of keys and values, over all layers
    vocabulary, context   tokens that it knows, and that it reads at most
    """

    matrices: int
    head: int
    layers: int
    attention: int
    cached: int
    vocabulary: int
    context: int

    def body(self, context: float) -> float:
        """Operations of a token in the layers, where it attends to `context` tokens."""
        return 2 * self.matrices + self.layers * 4 * self.attention * context


def shape_of(model: Any) -> Shape:
    """The shape of a causal language model, which may be without content."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    pairs = getattr(text, "num_key_value_heads", None) or heads
    vocabulary, states = model.get_output_embeddings().weight.shape
    return Shape(
        matrices=sum(matrix.numel() for matrix in budget.matrices(model)),
        head=vocabulary * states,
        layers=text.num_hidden_layers,
        attention=heads * width,
        cached=2 * text.num_hidden_layers * pairs * width,
        vocabulary=vocabulary,
        context=getattr(text, "max_position_embeddings", None) or 2**20,
    )


def training_operations(shape: Shape, columns: int, adapters: int = 0, layers: int = 0) -> float:
    """Useful operations a token, forward and backward, in texts of `columns` tokens of which all but the first are
    learned. A matrix costs as much again for the gradient of what came into it, and once more for its own; adapters of
    so many numbers leave the matrices' own out, and of the last `layers` layers only these go backward at all."""
    attends = (columns + 1) / 2
    body, head = shape.body(attends), 2 * shape.head * (columns - 1) / columns
    if adapters:
        return body + head + (2 * body - 2 * shape.matrices) + head + 6 * adapters
    if layers:
        return body + head + 2 * body * layers / shape.layers + head
    return 3 * (body + head)


def decoding_bound(shape: Shape, rows: int, context: float, width: int, matrix: float, memory: float) -> float:
    """Tokens a second that `rows` rows cannot exceed, each with `context` tokens behind it: every step reads all
    weights and the rows' keys and values, `width` bytes a number, at `memory` bytes a second, and does its operations
    at `matrix` of them a second."""
    read = width * (shape.matrices + shape.head + rows * shape.cached * context)
    operations = rows * (shape.body(context) + 2 * shape.head)
    return rows / max(read / memory, operations / matrix)


# ----------------------------------------------------------------------------------------------------- measurements


def best_time(function: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call, of as many as fit into `seconds` and two at least."""
    best, start, calls = math.inf, time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        function()
        best, calls = min(best, time.perf_counter() - began), calls + 1
    return best


def memory_rate(device: torch.device, seconds: float, size: int = 2**26) -> float:
    """GB/s at which `size` float32 numbers, far more than caches hold, are read from memory."""
    numbers = torch.ones(size, device=device)
    return 4 * size / best_time(lambda: float(numbers.sum()), seconds) / 1e9


def first_step(settings: Bench, model: str, columns: int) -> float:
    """Seconds from the start of `plaudit sft`, in a process of its own, to the end of its first optimizer step."""
    with tempfile.TemporaryDirectory() as folder:
        data, output, said = (Path(folder, name) for name in ("texts.jsonl", "run", "said"))
        rows = [json.dumps({"text": " the" * (columns - 1)}) for _ in range(settings.rows)]
        data.write_text("\n".join(rows))
        given: dict[str, Any] = {
            "model": model,
            "data": data,
            "output": output,
            "max_tokens": columns,
            "batch_size": settings.rows,
            "precision": settings.precision,
            "threads": settings.threads,
            "holdout": 0,
            "steps": 1,
            "save_every": 0,
        }
        flags = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        flags += ["--device", settings.device] if settings.device else []
        start = time.perf_counter()
        with said.open("w") as file:
            process = subprocess.Popen([sys.executable, "-m", "plaudit.cli", "sft", *flags], stdout=file, stderr=file)
        try:
            while not any(row["step"] for row in read_lines(output / "metrics.jsonl")):
                if process.poll() not in (None, 0):
                    raise PlauditError(f"bench: the first step failed: {said.read_text().strip()[-500:]}")
                time.sleep(0.01)
            return time.perf_counter() - start
        finally:
            process.kill()  # what it would still do, saving the model, is not asked for
            process.wait()


class _Clock:
    """Ends a training when its steps but the first have taken `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.limit, self.times = seconds, list[float]()

    def begin(self, trainer: Trainer) -> None:
        self.last = time.perf_counter()

    def after_step(self, trainer: Trainer) -> None:
        now = time.perf_counter()
        self.times.append(now - self.last)
        if len(self.times) > 1 and sum(self.times[1:]) >= self.limit:
            trainer.steps = trainer.step
        self.last = time.perf_counter()

    def end(self, trainer: Trainer) -> None: ...


class _Unsaved(Trainer):
    """The one loop, of which nothing is kept."""

    def save(self) -> None: ...


def training(
    settings: Bench, model: str, world: World, shape: Shape, columns: int, how: dict[str, int], matrix: float
) -> dict[str, float]:
    """Optimizer steps of supervised fine-tuning, by the one loop, on random tokens; the first, which is slower, does
    not count."""
    quiet: dict[str, Any] = {"data": "none", "steps": 10**6, "save_every": 0, "schedule": "constant"}
    sizes = {"batch_size": settings.rows, "tokens_per_pass": settings.rows * columns}
    own = SFT(model=model, learning_rate=1e-6, **quiet, **sizes, **how)
    _forget_peak(world)
    policy = load_policy(model, precision=world.precision, **how).to(world.device)
    adapters = sum(p.numel() for p in policy.learning().values()) if "lora_rank" in how else 0
    texts = _random(settings.rows, columns, shape, settings.seed)
    items = [Encoded(ids[:1], ids[1:], [True] * (columns - 1)) for ids in texts]
    clock = _Clock(settings.seconds)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Unsaved(Run(Path(folder), -1), world, own, [clock])
        try:
            trainer.fit(SupervisedFineTuning(own, world, policy, items, []), lambda: None)
        except Interrupted as stop:
            raise KeyboardInterrupt from stop  # there is no step that could be gone on from
    seconds, tokens = min(clock.times[1:]), settings.rows * columns
    operations = training_operations(shape, columns, adapters, how.get("train_layers", 0))
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "operations_per_token": operations,
        "share": tokens / seconds * operations / matrix,
        "peak_memory_mb": _peak_mb(world),
    }


def decoding(settings: Bench, sampler: LocalSampler, rows: int, new: int, shape: Shape) -> float:
    """Seconds in which `rows` prompts get `new` tokens each, the prompts' own computation included."""
    prompts = _random(rows, PROMPT, shape, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    return best_time(lambda: sampler.sample(prompts, Sampling(max_new_tokens=new), 1, generator), settings.seconds)


def _random(rows: int, columns: int, shape: Shape, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocabulary, (rows, columns), generator=generator).tolist()


def _forget_peak(world: World) -> None:
    machine.forget_peak()
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)


def _peak_mb(world: World) -> float:
    """Of the graphics card where that computes, of the process elsewhere."""
    on_card = world.device.type == "cuda"
    return torch.cuda.max_memory_allocated(world.device) / 1e6 if on_card else machine.peak_memory_mb()


# ------------------------------------------------------------------------------------------------------------ table


def _table(found: dict[str, Any]) -> Table:
    title = "{model} in {precision} on {device}: {machine}, threads: {threads}".format(**found)
    table = Table("what", "reached", "share of what is possible", "peak memory", title=title, title_justify="left")
    for name, rate in found["matrix_gflops"].items():
        table.add_row(f"{name} products", f"{rate:,.0f} GFLOP/s")
    table.add_row("memory reads", f"{found['memory_gbs']:.1f} GB/s")
    table.add_row("start to first step", f"{found['start_seconds']:.1f} s", end_section=True)
    for name, row in found["training"].items():
        share = f"{row['share']:.0%} of {found['precision']} products"
        memory = f"{row['peak_memory_mb'] / 1e3:.2f} GB"
        table.add_row(f"training, {name}", f"{row['tokens_per_second']:,.0f} tokens/s", share, memory)
    table.add_section()
    for rows, row in found["decoding"].items():
        share = f"{row['share']:.0%} of {row['bound']:,.0f} tokens/s"
        table.add_row(f"decoding, {rows} row{'s' * (rows != '1')}", f"{row['tokens_per_second']:,.0f} tokens/s", share)
    table.add_section()
    table.add_row("cores busy elsewhere", f"{found['others']:.2f}")
    return table
