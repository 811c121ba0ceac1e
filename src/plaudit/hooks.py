"""What happens beside training: progress and logs, evaluation, samples."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from plaudit import checkpoint
from plaudit.errors import PlauditError
from plaudit.trainer import Trainer
from plaudit.watching import check_there

console = Console(stderr=True, soft_wrap=True)
_SHOWN = ("loss", "score", "accuracy", "kl", "heldout_nll", "heldout_accuracy")


def progress_bar(title: str, total: int, done: int = 0, unit: str = "steps") -> tuple[Progress, Any]:
    """A progress bar with count, rate, time left, and room for figures; nothing where there is no terminal."""
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[figures]}"),
        console=console,
        disable=not console.is_terminal,
    )
    return bar, bar.add_task(title, total=total, completed=done, rate="", figures="")


def brief(figures: dict[str, float]) -> str:
    """The few figures that a person watches."""
    return "  ".join(f"{name} {figures[name]:.3g}" for name in _SHOWN if name in figures)


class Progressing:
    """The bar in a terminal; elsewhere a line now and then."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.figures: dict[str, float] = {}  # some come with every rollout only: the last known is shown

    def begin(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        self.bar, self.task = progress_bar(self.title, trainer.steps, trainer.step)
        self.bar.start()
        self._tell(trainer)

    def after_step(self, trainer: Trainer) -> None:
        if not trainer.world.is_main:
            return
        if trainer.figures.get("kl", 0.0) < -1:
            trainer.messages.append(
                f"step {trainer.step}: kl is estimated at {trainer.figures['kl']:.3g}, and no divergence is negative: "
                "training may be failing. Look at the samples, lower the learning rate, or raise rollout."
            )
        self._tell(trainer)
        rate = f"{trainer.tokens / max(trainer.seconds, 1e-9):,.0f} tokens/s"
        self.figures |= trainer.figures
        figures = brief(self.figures)
        self.bar.update(self.task, completed=trainer.step, rate=rate, figures=figures)
        if not console.is_terminal and (
            trainer.step % max(trainer.steps // 10, 1) == 0 or trainer.step == trainer.steps
        ):
            left = (trainer.steps - trainer.step) * trainer.seconds / trainer.step
            console.print(f"{self.title} {trainer.step}/{trainer.steps}  {rate}  {left:.0f} s left  {figures}")

    def end(self, trainer: Trainer) -> None:
        if trainer.world.is_main:
            self._tell(trainer)
            self.bar.stop()

    def _tell(self, trainer: Trainer) -> None:
        for message in trainer.messages:
            tell(f"{self.title}: {message}")
        trainer.messages.clear()


class Logging:
    """metrics.jsonl, samples.jsonl, and a tracker if one was asked for."""

    def begin(self, trainer: Trainer) -> None:
        kind = trainer.settings.track if trainer.world.is_main else "none"
        self.tracker = Tracker(kind, trainer.run.folder, trainer.settings.track_project)

    def after_step(self, trainer: Trainer) -> None:
        samples, trainer.algorithm.shown = trainer.algorithm.shown, []
        if not trainer.world.is_main:
            return
        rare = samples or trainer.step == trainer.steps or any(name.startswith("heldout") for name in trainer.figures)
        if rare or trainer.step % trainer.settings.log_every == 0:
            speed = {"time/seconds": trainer.seconds, "time/tokens": trainer.tokens}
            trainer.run.log(trainer.step, trainer.figures | speed)
            self.tracker.log(trainer.step, trainer.figures)
        if samples:
            trainer.run.samples(trainer.step, samples)
            self.tracker.table(trainer.step, samples)

    def end(self, trainer: Trainer) -> None:
        self.tracker.close()


class Tracker:
    """TensorBoard, Weights & Biases or trackio, imported only when asked for. Raises PlauditError if not installed."""

    def __init__(self, kind: str, folder: Path, project: str) -> None:
        self.kind, self.client = kind, None
        if kind == "none":
            return
        module = "torch.utils.tensorboard" if kind == "tensorboard" else kind
        try:
            library = importlib.import_module(module)
        except ImportError as error:
            raise PlauditError(f"track: {kind} is not installed: pip install 'plaudit[{kind}]'.") from error
        self.library = library
        if kind == "tensorboard":
            self.client = library.SummaryWriter(str(folder / "tensorboard"))
        else:
            self.client = (
                library.init(project=project, name=folder.name, dir=str(folder))
                if kind == "wandb"
                else (library.init(project=project, name=folder.name))
            )

    def log(self, step: int, figures: dict[str, float]) -> None:
        if self.kind == "tensorboard":
            for name, value in figures.items():
                self.client.add_scalar(name, value, step)
        elif self.client is not None:
            self.client.log(figures, step=step)

    def table(self, step: int, rows: list[dict[str, Any]]) -> None:
        """The same columns in all rows, as `samples`."""
        if self.kind == "none":
            return
        cells = [[value if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
        if self.kind == "tensorboard":
            self.client.add_text("samples", markdown_table(list(rows[0]), cells), step)
        else:
            self.client.log({"samples": self.library.Table(columns=list(rows[0]), data=cells)}, step=step)

    def close(self) -> None:
        if self.client is not None:
            self.client.close() if self.kind == "tensorboard" else self.client.finish()


def markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table as Markdown, in which line breaks are shown as ⏎."""
    lines = [columns, ["---"] * len(columns), *rows]
    shown = [[str(cell).replace("|", "\\|").replace("\n", " ⏎ ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)


class Sparing:
    """Tells when memory ran out and passes became smaller, and has it kept for a run that goes on."""

    def __init__(self, keep: Callable[[int], None]) -> None:
        self.keep = keep

    def begin(self, trainer: Trainer) -> None:
        self.tokens = trainer.settings.tokens_per_pass  # fewer may be left even before the first step

    def after_step(self, trainer: Trainer) -> None:
        tokens = trainer.algorithm.tokens_per_pass
        if tokens < self.tokens:
            trainer.messages.append(f"memory ran out: passes have {tokens} tokens from now on, not {self.tokens}")
            self.tokens = tokens
            self.keep(tokens)

    def end(self, trainer: Trainer) -> None: ...


class Evaluating:
    """Held-out figures before the first step, every so many steps, and after the last."""

    def begin(self, trainer: Trainer) -> None:
        # A run that was killed between its last step and its end still owes its last figures.
        last = trainer.step == trainer.steps and not trainer.owed
        watched = trainer.settings.watch
        if last or (trainer.step == 0 and (trainer.algorithm.evaluates_first or watched)):
            self._evaluate(trainer)
        if watched and trainer.step == 0:
            check_there(watched, trainer.figures)

    def after_step(self, trainer: Trainer) -> None:
        every = trainer.settings.evaluate_every
        if trainer.step == trainer.steps or (every and trainer.step % every == 0):
            self._evaluate(trainer)
            if trainer.settings.watch:
                trainer.observe()

    def end(self, trainer: Trainer) -> None: ...

    def _evaluate(self, trainer: Trainer) -> None:
        # Rewards may draw at random, and a run that goes on from here does not evaluate again: it must leave no trace.
        before = checkpoint.random_states()
        with trainer.interruptible():
            figures = trainer.algorithm.evaluate()
        checkpoint.restore_random_states(before)
        trainer.figures |= figures
        if figures and trainer.step == 0 and trainer.world.is_main:
            trainer.run.log(0, figures)


def tell(message: str) -> None:
    """A line for the person at the terminal, never mixed into what a command prints as its result."""
    console.print(message, highlight=False, markup=False)
