"""Where the time and the memory of a step go: `python benchmarks/profile_step.py [--work grpo ppo dpo ...]
[--precision bfloat16] [--data ../shared/data]`.

The works are those of `against_trl.py` (its data too), plaudit's side alone, each in a process of its own. The first
step of a work warms up, the second is timed, the third runs under torch's profiler: a Markdown table with the share of
each kind of operation in the time of the third step, sampling apart from learning. What is left of the clock is Python,
and the profiler itself, which makes small operations look longer than they are. A second table says what the memory at
its peak, until the second step has ended, held: what must be there for AdamW to learn in float32, and the rest.
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
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from against_trl import prepared
from our_side import Watch, run
from plaudit import machine
from works import WORKS, Work

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise", "mkldnn::_reorder_linear_weight"),
    "attention": (
        "aten::bmm",
        "aten::baddbmm",
        "aten::_softmax",
        "aten::_softmax_backward_data",
        "aten::index_add_",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "_Attention",
    ),
    "conversions and copies": ("aten::copy_", "aten::cat", "aten::index"),
    "vocabulary: exponentials, draws": ("aten::exp_", "aten::exp", "aten::amax", "aten::scatter_add_", "aten::cumsum"),
    "AdamW": ("aten::_fused_adamw_",),
    "fresh zeros": ("aten::fill_", "aten::zero_"),
}
ELSE, OUTSIDE = "norms, rotations, gates, sums", "outside of operations"
PHASES = ("learning", "sampling")


def kind_of(operation: str) -> str:
    return next((kind for kind, names in KINDS.items() if operation in names), ELSE)


class Profiled(Watch):
    """A watch that has the last of the work's steps profiled: seconds by phase and kind."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.libraries = machine.resident_mb()
        self._running: tuple[str, profile, float] | None = None

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
            machine.bounded = lambda before: before  # what the profiler remembers is no fault of the run's
            self._enter("learning")
        else:
            self._leave()

    def _apart(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def sampling(*args: Any, **kwargs: Any) -> Any:
            if self._running is None:
                return function(*args, **kwargs)
            self._leave()
            self._enter("sampling")
            found = function(*args, **kwargs)
            self._leave()
            self._enter("learning")
            return found

        return sampling

    def _enter(self, phase: str) -> None:
        profiler = profile(activities=[ProfilerActivity.CPU])
        profiler.start()
        self._running = phase, profiler, time.perf_counter()

    def _leave(self) -> None:
        assert self._running is not None
        phase, profiler, start = self._running
        took = time.perf_counter() - start
        profiler.stop()
        self._running = None
        for event in profiler.key_averages():
            seconds = event.self_cpu_time_total / 1e6
            self.seconds[phase, kind_of(event.key)] += seconds
            took -= seconds
        self.seconds[phase, OUTSIDE] += took


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
    timed = found["seconds"][0]
    learning = timed - sum(found["sampling"][:1])
    kept = {"Python and libraries": watch.libraries, **watch.held}
    return {
        "seconds": timed,
        "rate": found["operations"][0] / learning / found["matrix_rate"],
        "kinds": watch.seconds,
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
            shares = [one["kinds"][phase, kind] / sum(one["kinds"].values()) for one in found]
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
    works = [replace(WORKS[name], steps=2, precision=options.precision) for name in options.work]
    folder = options.output.resolve()
    sides = [prepared(work, folder / name, options.data) for name, work in zip(options.work, works, strict=True)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        found = list(pool.map(profiled, [side["plaudit"] for side in sides]))
    print(table("time", times(found), options.work) + "\n\n" + table("memory, MB", memory(found), options.work))


if __name__ == "__main__":
    main()
