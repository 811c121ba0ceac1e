"""How fast this machine multiplies, measured once and remembered, and what a run computes in for that reason."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import linear

from plaudit import machine
from plaudit.run import write_atomically
from plaudit.sources import cache_folder

WORTH = 1.2
"""bfloat16 keeps eight bits of a number: it has to be so many times as fast as float32 to be taken."""

SHAPES = ((1024, 576, 1536), (512, 512, 512))
"""(m, k, n) of the products (m, k) @ (k, n) that are measured: a layer of a small model, and a square."""


@dataclass(frozen=True)
class Rates:
    """Matrix products of a machine, GFLOP/s."""

    float32: float
    bfloat16: float


@dataclass(frozen=True)
class Choice:
    """What a run computes in, and why, in words; `rates` if a measurement decided."""

    precision: str
    why: str
    rates: Rates | None = None


def choose(asked: str, device: torch.device) -> Choice:
    """`auto` -> bfloat16 where the device multiplies faster in it, else float32; anything else as it is."""
    if asked != "auto":
        return Choice(asked, "as asked for")
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return Choice("bfloat16", "this GPU has it") if able else Choice("float32", "this GPU has no bfloat16")
    if device.type != "cpu" or not has_bfloat16():
        return Choice("float32", "this processor has no instructions for bfloat16")
    return faster(rates())


def has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 by itself."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def faster(found: Rates) -> Choice:
    """bfloat16 if it is clearly faster by these rates, else float32."""
    gain = found.bfloat16 / found.float32
    said = f"bfloat16 is {gain:.2f} times as fast: {found.bfloat16:.0f} against {found.float32:.0f} GFLOP/s, measured"
    if gain >= WORTH:
        return Choice("bfloat16", said, found)
    return Choice("float32", f"{said}, too little for what it rounds away", found)


def rates() -> Rates:
    """This processor's rates in both types, with as many threads as there are now: measured the first time, in under a
    second, and remembered in the user's cache, so that every later run makes the same choice."""
    path = cache_folder() / "machine.json"
    key = f"{machine.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # there is no such file yet, or it is damaged and is written anew
        known = json.loads(path.read_bytes())
    if key in known:
        return Rates(**known[key])
    single, half = measured((torch.float32, torch.bfloat16))
    found = Rates(single, half)
    with suppress(OSError):  # a cache that can't be written to costs the next run its own measurement
        write_atomically(path, json.dumps({**known, key: asdict(found)}, indent=2) + "\n")
    return found


def measured(
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    seconds: float = 0.1,
    device: torch.device | str = "cpu",
) -> list[float]:
    """GFLOP/s of each type: the operations of one product of each shape, over the best times of these.

    The types take turns for `seconds` each and at least twice, so that what else the machine does meets all alike.
    """
    spent = [0.0] * len(dtypes)
    for m, k, n in shapes:
        # Ones, since random numbers would be taken from those that the run was seeded for.
        pairs = [(torch.ones(m, k, dtype=d, device=device), torch.ones(n, k, dtype=d, device=device)) for d in dtypes]
        best = [float("inf")] * len(dtypes)
        start, rounds = time.perf_counter(), 0
        while rounds < 2 or time.perf_counter() - start < seconds * len(dtypes):
            for i, (left, right) in enumerate(pairs):
                best[i] = min(best[i], timed(left, right))
            rounds += 1
        spent = [total + each for total, each in zip(spent, best, strict=True)]
    operations = sum(2 * m * k * n for m, k, n in shapes)
    return [operations / each / 1e9 for each in spent]


@torch.no_grad()
def timed(left: torch.Tensor, right: torch.Tensor) -> float:
    """Seconds of one product, to its end."""
    start = time.perf_counter()
    product = linear(left, right)
    if product.device.type == "cuda":
        torch.cuda.synchronize(product.device)
    elif product.device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start
