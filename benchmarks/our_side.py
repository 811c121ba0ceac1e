"""plaudit's side of `against_trl.py`: `python our_side.py WORK.json`. A run as `plaudit.train` makes it, whose progress
bar also looks at the clock. Prints one line of JSON at the end."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from operations import Family, families, learning, matrix_rate, shape_of
from plaudit import settings as verbs
from plaudit import train
from plaudit.settings.common import Training
from process import Marks
from works import Work


def settings_of(work: Work) -> Training:
    """The settings of a run that does this work, and nothing beside it."""
    shared: dict[str, Any] = {
        "model": work.model,
        "data": work.data,
        "output": work.output,
        "holdout": 0.0,
        "steps": (work.steps + 1) * work.updates,
        "batch_size": work.batch,
        "learning_rate": work.learning_rate,
        "schedule": "linear" if work.falls else "constant",
        "warmup": 0.1 if work.falls else 0.0,
        "precision": work.precision,
        "device": "cpu",
        "seed": work.seed,
        "lora_rank": work.lora,
        "train_layers": work.top,
        "save_every": 0,
    }
    if work.keep:
        shared["tokens_per_pass"] = 4096  # whatever memory is free: what is learned shall come out the same
    if not work.sampled:
        kind = {"ipo": "ipo_avg"}.get(work.kind, work.kind)  # TRL's IPO averages over tokens
        return verbs.VERBS[kind](**shared, max_tokens=work.max_tokens)
    shared |= {
        "max_prompt_tokens": work.max_tokens,
        "max_new_tokens": work.new_tokens,
        "rollout": work.rollout,
        "group": work.group,
        "rewards": work.rewards or f"{Path(__file__).with_name('pleasing.py')}:vowels",
        "reuse": work.epochs,
    }
    return verbs.PPO(**shared) if work.kind == "ppo" else verbs.GRPO(**shared, kl=0.04, kl_term="k3")


class Watch:
    """What happened in a run: `marks` of the work's steps, and of each optimizer step the rows and their tokens."""

    def __init__(self, work: Work) -> None:
        self.work, self.marks = work, Marks()
        self.rows: list[list[Family]] = []
        self.tokens: list[int] = []

    def begin(self, trainer: Any) -> None:
        algorithm = trainer.algorithm
        made = algorithm.batches

        def watched() -> Iterator[Any]:
            for batch in made():
                self.rows.append(families(batch))
                self.tokens.append(int(batch.attention.sum()))
                yield batch

        algorithm.batches = watched
        self.config = algorithm.policy.config
        if self.work.sampled:
            algorithm.sampler.sample = self.marks.timed(algorithm.sampler.sample)
            algorithm.sampler.refresh = self.marks.timed(algorithm.sampler.refresh)

    def after_step(self, trainer: Any) -> None:
        if trainer.step % self.work.updates == 0:
            self.marks.step()

    def report(self) -> dict[str, Any]:
        """Of all steps but the first, which warms up; the rows of a rollout count once."""
        work = self.work
        parts = [self.rows[i : i + work.updates] for i in range(0, len(self.rows), work.updates)][1:]
        once = work.updates // work.epochs
        tokens = [sum(self.tokens[i : i + once]) for i in range(0, len(self.tokens), work.updates)][1:]
        drawn = [[one for part in step[:once] for one in part] for step in parts] if work.sampled else []
        shape = shape_of(self.config, work.lora)
        return self.marks.report() | {
            "tokens": tokens,
            "completion_tokens": [sum(one.actions for one in rows) / work.rollout for rows in drawn],
            "operations": [learning(work, shape, step) for step in parts],
            "matrix_rate": matrix_rate(work.precision),
        }


def run(work: Work, watch: Watch) -> Any:
    """The finished run, watched."""
    from plaudit import hooks

    class Watching(hooks.Progressing):
        def begin(self, trainer: Any) -> None:
            watch.begin(trainer)
            super().begin(trainer)

        def after_step(self, trainer: Any) -> None:
            super().after_step(trainer)
            watch.after_step(trainer)

    hooks.Progressing = Watching  # type: ignore[misc]
    shutil.rmtree(work.output, ignore_errors=True)
    return train(settings_of(work))


def main() -> None:
    work = Work.read(Path(sys.argv[1]))
    watch = Watch(work)
    done = run(work, watch)
    if work.keep:
        losses = [row["loss"] for row in done.metrics() if "loss" in row]
        print(json.dumps({"losses": losses, "tokens": watch.tokens}))
    else:
        print(json.dumps(watch.report()))


if __name__ == "__main__":
    main()
