"""Where the time and the memory of a step go: `python benchmarks/profile_step.py [--work grpo ppo dpo ...]
[--precision bfloat16] [--data ../shared/data]`.

The works are those of `against_trl.py` (its data too), plaudit's side alone, each in a process of its own. The first
step of a work warms up, three are timed, and in a fifth every operation is: a Markdown table with the share of each
kind of operation in the time of the fifth step, sampling apart from learning. What is left of the clock is Python, and
the timing itself, which makes small operations look longer than they are. torch's own profiler is of no use here: what
it remembers comes to lie between the tensors, so that large ones no longer find a place, and half of what it then sees
is fresh memory. A second table says what the memory at its peak, until the fourth step has ended, held: what must be
there for AdamW to learn in float32, and the rest.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from against_trl import prepared
from our_side import Watch, run
from plaudit import machine
from works import WORKS, Work

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise", "mkldnn::_reorder_linear_weight"),
    "attention": (
        "aten::bmm",
        "aten::baddbmm",
        "aten::matmul",
        "aten::softmax",
        "aten::_softmax_backward_data",
        "aten::scaled_dot_product_attention",
        "aten::index_select",
        "aten::index_add_",
    ),
    "conversions and copies": ("aten::_to_copy", "aten::to", "aten::copy_", "aten::cat", "aten::clone"),
    "vocabulary: exponentials, draws": ("aten::exp_", "aten::exp", "aten::amax", "aten::scatter_add_", "aten::cumsum"),
    "AdamW, clipping": ("aten::_fused_adamw_", "aten::_foreach_norm", "aten::_foreach_mul_"),
    "embedding's gradient": ("aten::embedding_dense_backward",),
}
ELSE, OUTSIDE = "norms, rotations, gates, sums", "outside of operations"
PHASES = ("learning", "sampling")


def kind_of(operation: str) -> str:
    return next((kind for kind, names in KINDS.items() if operation in names), ELSE)


class Timed(TorchDispatchMode):
    """Adds up the seconds of every operation, by phase and kind."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = PHASES[0]
        self.seconds: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        found = func(*args, **(kwargs or {}))
        self.seconds[self.phase, kind_of(func._schema.name)] += time.perf_counter() - start
        return found


class Profiled(Watch):
    """A watch that has every operation of the last of the work's steps timed."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.timed = Timed()
        self.clock: Counter[str] = Counter()
        self.libraries = machine.resident_mb()
        self._since = 0.0

    def begin(self, trainer: Any) -> None:
        super().begin(trainer)
        if self.work.sampled:
            sampler = trainer.algorithm.sampler
            sampler.sample, sampler.refresh = self._apart(sampler.sample), self._apart(sampler.refresh)

    def after_step(self, trainer: Any) -> None:
        super().after_step(trainer)
        done = len(self.marks.ends)
        if trainer.step % self.work.updates or done < self.work.steps:
            return
        if done == self.work.steps:
            self.peak, self.held = self.marks.peak, held(trainer)
            self.timed.__enter__()
            self._since = time.perf_counter()
        else:
            self._turn("")
            self._since = 0.0
            self.timed.__exit__(None, None, None)

    def _apart(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def sampling(*args: Any, **kwargs: Any) -> Any:
            self._turn("sampling")
            found = function(*args, **kwargs)
            self._turn("learning")
            return found

        return sampling

    def _turn(self, phase: str) -> None:
        if self._since:
            now = time.perf_counter()
            self.clock[self.timed.phase] += now - self._since
            self.timed.phase, self._since = phase, now

    def shares(self) -> dict[tuple[str, str], float]:
        """By phase and kind, of the time that the step took while it was looked at."""
        found = dict(self.timed.seconds)
        for phase, seconds in self.clock.items():
            found[phase, OUTSIDE] = seconds - sum(own for (at, _), own in self.timed.seconds.items() if at == phase)
        return {key: seconds / sum(self.clock.values()) for key, seconds in found.items()}


def held(trainer: Any) -> dict[str, float]:
    """MB of what stays from step to step."""
    policy = trainer.algorithm.policy
    reference = [part for kept in policy._reference for part in kept.parameters()]
    moments = [part for state in trainer.optimizer.state.values() for part in state.values() if torch.is_tensor(part)]
    return {
        "weights": megabytes(policy.parameters()),
        "gradients": megabytes(part for part in policy.parameters() if part.requires_grad),
        "moments": megabytes(moments),
        "reference": megabytes(reference),
    }


def megabytes(tensors: Iterable[torch.Tensor]) -> float:
    return sum(part.numel() * part.element_size() for part in tensors) / 1e6


def profiled(work: Work) -> dict[str, Any]:
    """What is printed of one work."""
    watch = Profiled(work)
    with machine.Guard() as guard:
        run(work, watch)
    found = watch.report()
    sampling = found["sampling"] or [0.0] * work.steps
    steps = list(zip(found["seconds"], sampling, found["operations"], strict=True))[:-1]
    kept = {"Python and libraries": watch.libraries, **watch.held}
    return {
        "seconds": median(seconds for seconds, _, _ in steps),
        "rate": median(done / (seconds - drawing) for seconds, drawing, done in steps) / found["matrix_rate"],
        "shares": watch.shares(),
        "memory": kept | {"all else": watch.peak - sum(kept.values())},
        "peak": watch.peak,
        "others": guard.others,
    }


def table(title: str, rows: dict[str, list[str]], works: list[str]) -> str:
    lines = [f"| {title} | {' | '.join(works)} |", "|---" * (len(works) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def times(found: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The rows of the first table."""
    rows = {
        "seconds": [f"{one['seconds']:.2f}" for one in found],
        "matrix rate, learning": [f"{one['rate']:.0%}" for one in found],
    }
    for phase in PHASES:
        for kind in (*KINDS, ELSE, OUTSIDE):
            shares = [one["shares"].get((phase, kind), 0.0) for one in found]
            if max(shares) >= 0.005:
                rows[f"{phase}: {kind}"] = [f"{share:.0%}" if share else "" for share in shares]
    return rows | {"cores of others": [f"{one['others']:.2f}" for one in found]}


def memory(found: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The rows of the second table."""
    names = list(found[0]["memory"])
    rows = {name: [f"{one['memory'][name]:,.0f}" for one in found] for name in names}
    return rows | {"peak": [f"{one['peak']:,.0f}" for one in found]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=Path("runs/profile_step"))
    options = parser.parse_args()
    works = [replace(WORKS[name], steps=4, precision=options.precision) for name in options.work]
    folder = options.output.resolve()
    sides = [prepared(work, folder / name, options.data) for name, work in zip(options.work, works, strict=True)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        found = list(pool.map(profiled, [side["plaudit"] for side in sides]))
    print(table("time", times(found), options.work) + "\n\n" + table("memory, MB", memory(found), options.work))


if __name__ == "__main__":
    main()
