"""The one loop."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from plaudit import checkpoint, machine
from plaudit.algorithms.base import Algorithm
from plaudit.batch import Batch
from plaudit.errors import PlauditError, SharedError
from plaudit.run import Run
from plaudit.settings.common import Training
from plaudit.sharding import gathered, part_like, spread_moments
from plaudit.watching import Watch, higher_is_better
from plaudit.world import World


class Interrupted(BaseException):
    """SIGINT or SIGTERM came: the last finished step is saved, and `code` is the exit status to leave with.

    No `Exception`, since it may rise inside a person's reward function, and many of those catch all of them.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped at step {step}, which is saved: the same command goes on from there.")
        self.code = 128 + number


class Hook(Protocol):
    """Something done beside training: logging, evaluating, saving."""

    def begin(self, trainer: Trainer) -> None: ...
    def after_step(self, trainer: Trainer) -> None: ...
    def end(self, trainer: Trainer) -> None: ...


class Trainer:
    """Runs an algorithm for its steps. Every algorithm uses this loop and none has one of its own.

    step      optimizer steps that are done
    figures   the statistics of the last step, per unit
    owed      whether the hooks have not yet finished with the last step
    watch     what the held-out figure `settings.watch` has come to
    """

    def __init__(self, run: Run, world: World, settings: Training, hooks: Sequence[Hook] = ()) -> None:
        self.run, self.world, self.settings, self.hooks = run, world, settings, hooks
        self.step = 0
        self.steps = 0
        self.tokens = 0
        self.seconds = 0.0
        self.seconds_before = 0.0  # of this process's start
        self.skipped = 0
        self.figures: dict[str, float] = {}
        self.messages: list[str] = []
        self.owed = False
        self.watch = Watch()
        self._signal = 0
        self._interruptible = False
        self._idle = False  # whether the batch at hand has nothing to learn from

    def fit(self, algorithm: Algorithm, finish: Callable[[], None]) -> None:
        """Trains to the last step, from the last checkpoint if there is one, and calls `finish`, which no signal
        cuts short.

        Raises Interrupted after a signal, PlauditError for a loss that is not finite, and whatever a reward function
        raises; all of them leave a checkpoint of the last finished step.
        """
        begun: list[Hook] = []
        try:
            with self._signals():
                try:
                    self.begin(algorithm)
                    for hook in self.hooks:
                        hook.begin(self)
                        begun.append(hook)
                    if self.owed:
                        self._after_step()
                    self._loop(algorithm)
                except Interrupted:
                    # Between two optimizer steps nothing but the snapshot and the weights counts, and both are whole.
                    self.save()
                    raise
                self._return_to_best()
                finish()
                if self._signal:
                    raise Interrupted(self._signal, self.step)
        finally:
            for hook in begun:
                hook.end(self)

    def _loop(self, algorithm: Algorithm) -> None:
        start, held = time.perf_counter(), 0.0
        batches = algorithm.batches()
        while self.step < self.steps:
            batch = self._learn(algorithm, batches)
            self._update(algorithm, batch)
            self.tokens += int(self.world.sum(batch.attention.sum()))
            now = time.perf_counter()
            self.seconds += now - start
            start = now
            self._snapshot()
            self._after_step()
            held = machine.bounded(held)
            if self.world.stop_requested(bool(self._signal)):
                raise Interrupted(self._signal or signal.SIGTERM, self.step)

    def _learn(self, algorithm: Algorithm, batches: Iterator[Batch]) -> Batch:
        """The next batch, its gradients taken."""
        with self._saving_on_error(), self.interruptible():
            batch = next(batches)
            self._gradients(algorithm, batch)
        return batch

    def _after_step(self) -> None:
        self.owed = True
        with self._saving_on_error():
            for hook in self.hooks:
                hook.after_step(self)
        self.owed = False
        every = self.settings.save_every
        best = self.settings.save_best and self.watch.best_step == self.step
        if self.step < self.steps and (best or (every and self.step % every == 0)):
            self.save()

    def observe(self) -> None:
        """Takes note of the figure that is watched, and ends the run if it has not got better for long enough."""
        settings = self.settings
        if self.step > self.watch.step:  # or the hooks are called again after a mistake in one of them
            value = self.world.share(self.figures.get(settings.watch, math.nan))  # a correlation may be none
            self.watch = self.watch.seen(value, self.step, higher_is_better(settings.watch), settings.drop_after)
        self._end_early()

    def _end_early(self) -> None:
        if self.settings.patience and self.watch.since >= self.settings.patience and self.step < self.steps:
            self.steps = self.step
            self.messages.append(
                f"ends after step {self.step}: {self.settings.watch} has not got better in {self.watch.since} "
                f"evaluations, since step {self.watch.best_step}"
            )

    @property
    def chosen(self) -> int:
        """The step whose policy is the final one."""
        return self.watch.best_step if self.settings.save_best and self.watch.best_step else self.step

    def _return_to_best(self) -> None:
        if self.chosen < self.step:
            self._restored(checkpoint.named(self.run.checkpoints, self.chosen))
            self.algorithm.evaluate()
            self.messages.append(f"final is the policy of step {self.chosen}, the best by {self.settings.watch}")

    @contextmanager
    def _saving_on_error(self) -> Iterator[None]:
        """Inside, the weights are those of the last finished step: what fails there, a person's reward function most
        likely, costs no step."""
        try:
            yield
        except Exception as error:
            alone = self.world.size > 1 and not isinstance(error, SharedError)
            # Nothing to keep, or to keep it by; or the others do not know of it, and would not save too.
            if self.step == 0 or alone or self.world.engine is not None:
                raise
            self.save()
            if isinstance(error, PlauditError):
                saved = f"Step {self.step} is saved: once that is mended, the same command goes on from there."
                raise PlauditError(f"{error}\n{saved}") from error
            raise

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal takes effect at once: nothing is done there that could be left half done. With several
        processes it waits, since all of them must stop at the same place. Raises Interrupted."""
        self._interruptible = self.world.size == 1
        if self._interruptible and self._signal:
            raise Interrupted(self._signal, self.step)
        try:
            yield
        finally:
            self._interruptible = False

    def begin(self, algorithm: Algorithm) -> None:
        """Optimizer, processes, checkpoint: all that comes before the first step."""
        self.algorithm, self.steps = algorithm, algorithm.steps
        self.optimizer = _optimizer(algorithm, self.settings)
        algorithm.model, self.optimizer = self.world.prepare(algorithm.policy, self.optimizer)
        if self.world.engine is not None and (self.settings.save_every or self.settings.save_best):
            raise PlauditError(
                "save_every: under DeepSpeed the optimizer is spread over processes, and nothing here gathers it: set "
                "save_every 0 and no save_best, or take FSDP version 2."
            )
        # Looked up once: a signal may come while the reference stands in for some of the policy's modules.
        self._learning = algorithm.policy.learning()
        self._resume()
        if self.world.is_main:
            # What precedes the first step is done again if that step was not finished.
            self.run.rewind(self.step or -1)
        self._snapshot()
        if self._signal and self.world.size == 1:
            raise Interrupted(self._signal, self.step)

    # ------------------------------------------------------------------------------------------------- one step

    def _gradients(self, algorithm: Algorithm, batch: Batch) -> None:
        """Gradients and figures of a batch, in as many parts as memory asks for."""
        algorithm.fitting(batch, lambda: self._take_gradients(algorithm, batch))

    def _take_gradients(self, algorithm: Algorithm, batch: Batch) -> None:
        """Gradients of the loss per unit, where units are counted over all micro-batches and processes first."""
        algorithm.policy.zero_grad()  # of parts that were done when memory ran out
        algorithm.begin(batch)
        units = self.world.sum(algorithm.weight(batch))
        total = units.clamp(min=1e-12)
        sums: dict[str, Tensor] = {}
        parts = algorithm.passes(batch)
        for number, (part, places) in enumerate(parts, 1):
            with self.world.synchronised(algorithm.model, number == len(parts)):
                with self.world.autocast():
                    loss, stats = algorithm.loss(part)
                self.world.backward(loss * 0 if places is None else loss / total)
            if places is None:
                continue
            for name, value in {"loss": loss.detach(), **stats}.items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
        names = sorted(sums)
        # All figures travel together: one reduction and one wait for the device a step, however many there are.
        means = self.world.sum(torch.stack([sums[name] for name in names])) / total
        *values, counted = torch.cat([means, units.to(means).view(1)]).tolist()
        self._idle = counted == 0
        self.figures = dict(zip(names, values, strict=True))

    def _update(self, algorithm: Algorithm, batch: Batch) -> None:
        limit = self.settings.max_grad_norm or None
        norm = float(self.world.clip(list(self._learning.values()), limit))
        self.figures["gradient_norm"] = norm
        if math.isfinite(norm) and math.isfinite(self.figures["loss"]):
            self.figures["learning_rate"] = self._set_learning_rate()
            if algorithm.weight_decay is not None:
                self._set_weight_decay(algorithm.weight_decay)
            objection = algorithm.objection(self.figures)
            if objection:
                self.messages.append(f"step {self.step + 1}: {objection}, so nothing is learned from it")
            elif not self._idle:  # or what moved the policy would be momentum and weight decay alone
                self.optimizer.step()
            self.skipped = 0
        else:
            self._not_finite(batch)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.figures = algorithm.notes | self.figures
        algorithm.notes = {}
        algorithm.after_step(self.step)

    def _not_finite(self, batch: Batch) -> None:
        rows = [] if batch.index is None else sorted(set(batch.index.tolist()))
        where = f"step {self.step + 1} ({self.algorithm.named(rows[:16])})"
        self.skipped += 1
        if self.settings.on_nan == "stop" or self.skipped > 10:
            self.optimizer.zero_grad(set_to_none=True)
            if self.step:
                self.save()
            raise PlauditError(
                f"the loss or its gradient is not finite at {where}; the weights are as they were before it. "
                "Lower the learning rate, look at these rows, or set on_nan to skip."
            )
        self.messages.append(f"{where}: loss or gradient not finite, step skipped")

    def _set_learning_rate(self) -> float:
        """Computed from the step and the watched figure, so that no scheduler has a state of its own to save."""
        settings = self.settings
        warmup = round(settings.warmup * self.steps)
        share = (self.step - warmup) / max(self.steps - warmup, 1)
        falling = {
            "constant": 1.0,
            "linear": 1 - share,
            "cosine": 0.5 * (1 + math.cos(math.pi * share)),
            "step": settings.drop_factor ** (max(self.step - warmup, 0) // settings.drop_every),
            "plateau": settings.drop_factor**self.watch.drops,
        }
        factor = (self.step + 1) / (warmup + 1) if self.step < warmup else falling[settings.schedule]
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return settings.learning_rate * factor

    def _set_weight_decay(self, decay: float) -> None:
        """Where there is any: vectors have none."""
        for group in self.optimizer.param_groups:
            if group["weight_decay"]:
                group["weight_decay"] = decay

    # ------------------------------------------------------------------------------------------ save and resume

    def _snapshot(self) -> None:
        """What a save needs beside weights and moments, as of the step just done. A signal may come in the middle
        of the next rollout: these are references and a few kilobytes, so they are taken at every step."""
        self._kept = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "algorithm": self.algorithm.state(),
            "random": checkpoint.random_states(),
        }

    def save(self) -> None:
        """A checkpoint of the last finished step; none under DeepSpeed, whose moments nothing here gathers."""
        if self.world.engine is not None:
            self.messages.append(f"step {self.step} is not saved: DeepSpeed spreads the optimizer over processes")
            return
        owed = {"figures": self.figures, "shown": self.algorithm.shown} if self.owed else None
        everywhere = self.world.gather([self._kept | {"owed": owed, "watch": asdict(self.watch)}])
        learning = {name: p.detach() for name, p in self._learning.items()}
        tree = gathered({"policy": learning, "optimizer": self.optimizer.state_dict()}, keep=self.world.is_main)
        if self.world.is_main:
            tensors, state = checkpoint.pack({"ranks": everywhere, **tree})
            best = self.watch.best_step if self.settings.save_best else None
            checkpoint.save(self.run.checkpoints, self._kept["step"], tensors, state, self.settings.keep, best)
        self.world.barrier()

    def _resume(self) -> None:
        path, skipped = checkpoint.latest(self.run.checkpoints)
        self.messages += skipped
        if path is None:
            return
        tree, mine = self._restored(path)
        self.optimizer.load_state_dict(spread_moments(tree["optimizer"], self.optimizer))
        self.step, self.tokens, self.seconds = mine["step"], mine["tokens"], mine["seconds"]
        self.skipped, self.seconds_before = mine["skipped"], mine["seconds"]
        self.watch = Watch(**mine["watch"])
        checkpoint.restore_random_states(mine["random"])
        self.owed = mine["owed"] is not None
        if self.owed:
            self.figures, self.algorithm.shown = mine["owed"]["figures"], mine["owed"]["shown"]
        self.messages.append(f"goes on from step {self.step}")
        self._end_early()

    def _restored(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """A checkpoint and this process's part of it, its weights and its algorithm's state taken up."""
        tree = checkpoint.unpack(*checkpoint.load(path))
        if set(self._learning) != set(tree["policy"]):
            raise PlauditError(f"{path} was saved from another model or another set of trained weights.")
        with torch.no_grad():
            for name, parameter in self._learning.items():
                parameter.copy_(part_like(tree["policy"][name], parameter))
        mine = tree["ranks"][self.world.rank % len(tree["ranks"])]
        self.algorithm.restore(mine["algorithm"])
        return tree, mine

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM stop the run at the next point where nothing is half done."""

        def handle(number: int, frame: FrameType | None) -> None:
            first, self._signal = not self._signal, number
            if first and self._interruptible:
                self._interruptible = False
                raise Interrupted(number, self.step)

        if threading.current_thread() is not threading.main_thread():  # which alone receives signals
            yield
            return
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _optimizer(algorithm: Algorithm, settings: Training) -> torch.optim.Optimizer:
    """AdamW with float32 state; weight decay on matrices only; heads of values may learn at their own rate."""
    value_rate = getattr(settings, "value_learning_rate", 0.0) or settings.learning_rate
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in algorithm.policy.learning().items():
        rate = value_rate if name.startswith(("value.", "heads.")) else settings.learning_rate
        groups.setdefault((rate, settings.weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    fused = algorithm.policy.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(described, betas=(0.9, settings.adam_beta2), eps=1e-8, fused=fused)
