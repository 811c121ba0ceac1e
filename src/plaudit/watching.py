"""What a run does by one held-out figure: lower its learning rate, end early, keep the best."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from plaudit.errors import PlauditError
from plaudit.settings.common import Training

HIGHER = ("accuracy", "accuracy_best", "margin", "pearson", "score", "spearman")
LOWER = ("calibration_error", "loss", "mse", "nll", "td")
"""Held-out figures of which more is better, and less. The only place that says so."""


@dataclass(frozen=True)
class Watch:
    """What has been seen of a figure since the first step: plain numbers that a checkpoint keeps.

    best, best_step  its best value, and the step that had it; None and 0 before any
    step             of the last value
    since            values in a row that were no better than the best
    stale            the same, counted anew from each time that the learning rate was lowered
    drops            how often it was lowered
    """

    best: float | None = None
    best_step: int = 0
    step: int = 0
    since: int = 0
    stale: int = 0
    drops: int = 0

    def seen(self, value: float, step: int, higher: bool, drop_after: int) -> Watch:
        """With the value of this step. What is equal, or not finite, is not better."""
        ahead = self.best is None or (value > self.best if higher else value < self.best)
        if ahead and math.isfinite(value):
            return replace(self, best=value, best_step=step, step=step, since=0, stale=0)
        later = replace(self, step=step, since=self.since + 1, stale=self.stale + 1)
        return replace(later, stale=0, drops=self.drops + 1) if later.stale >= drop_after else later


def higher_is_better(name: str) -> bool:
    """Whether more of a held-out figure, `heldout_accuracy` say, is better. Raises PlauditError for an unknown one."""
    kind = name.partition("/")[0].removeprefix("heldout_")
    if not name.startswith("heldout_") or kind not in HIGHER + LOWER:
        known = ", ".join(f"heldout_{kind}" for kind in sorted(HIGHER + LOWER))
        raise PlauditError(f"watch: there is no held-out figure {name!r}: choose one of {known}.")
    return kind in HIGHER


def check_watch(settings: Training) -> None:
    """Raises PlauditError for a figure that nobody knows or looks at, and where one is needed and none is named."""
    uses = {"schedule": settings.schedule == "plateau", "patience": settings.patience, "save_best": settings.save_best}
    users = " and ".join(name for name, used in uses.items() if used)
    if not users:
        if settings.watch:
            raise PlauditError("watch: nothing looks at it: set patience, save_best or schedule: plateau, or leave it.")
        return
    if not settings.watch:
        raise PlauditError(f"{users}: name the held-out figure to go by, as in watch: heldout_loss.")
    higher_is_better(settings.watch)
    if not settings.evaluate_every:
        raise PlauditError(f"{users}: {settings.watch} is known after evaluations only: set evaluate_every.")


def check_there(name: str, figures: Collection[str]) -> None:
    """Raises PlauditError unless the figure is among those of an evaluation."""
    found = sorted(figure for figure in figures if figure.startswith("heldout_"))
    if name not in found:
        there = f"has {', '.join(found)}: name one of them" if found else "holds nothing out: set holdout or eval_data"
        raise PlauditError(f"watch: there is no {name} here, this run {there}.")
