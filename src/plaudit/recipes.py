"""From settings to finished runs. Heavy imports wait until the settings, the paths and the data have been looked at."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaudit import checks, config, data, machine, sources
from plaudit.errors import PlauditError
from plaudit.families import family_of
from plaudit.records import Loaded
from plaudit.run import Run
from plaudit.settings import Reward
from plaudit.settings.common import Common, Training
from plaudit.settings.policy_gradient import OnPolicy

if TYPE_CHECKING:
    from plaudit.templates import Template
    from plaudit.world import World

# What may change between the beginning of a run and its going on: nothing that the numbers depend on.
FREE = ("output", "device", "threads", "log_every", "keep", "save_every", "track")


def train(settings: Training) -> Run:
    """Trains what the settings describe and returns the run, whose `final` folder `from_pretrained` opens.

    A run that was interrupted goes on where it was; one that is finished is left as it is. Raises PlauditError
    for what the user can put right, and `trainer.Interrupted` after SIGINT or SIGTERM.
    """
    settings, loaded = prepare(settings)
    rank, size = machine.processes()
    # The first of several processes writes the folder; the others read there, and hear from it what is done.
    with opened(settings, FREE) if rank == 0 else Run(Path(settings.output), -1) as run:
        world = start_world(settings) if size > 1 else None
        if run.finished if world is None else world.share(run.finished):
            if rank == 0:
                _say(f"{run.folder}: already complete.")
            return run
        _fit(settings, loaded, run, world)
        return run


def _fit(settings: Training, loaded: Data, run: Run, world: World | None) -> None:
    from plaudit import hooks
    from plaudit.loading import save_pretrained
    from plaudit.trainer import Trainer

    machine.forget_peak()
    started = time.perf_counter()
    world = world or start_world(settings)
    template = template_of(settings)
    loaded = encode(settings, template, loaded)
    family = family_of(settings)
    algorithm = family.build(settings, world, template, loaded.training, loaded.held)
    named = config.verb_of(type(settings))
    trainer = Trainer(run, world, settings, [hooks.Evaluating(), hooks.Logging(), hooks.Progressing(named)])
    trainer.messages += loaded.notes

    def finish() -> None:
        if world.is_main:
            save_pretrained(algorithm.policy, template.tokenizer, run.final)
            run.finish(
                {
                    "verb": named,
                    "steps": trainer.step,
                    "seconds": trainer.seconds_before + time.perf_counter() - started,
                    "peak_memory_mb": machine.peak_memory_mb(),
                    "tokens_per_second": trainer.tokens / max(trainer.seconds, 1e-9),
                    **family.figures(algorithm, run),
                }
            )
        world.barrier()

    trainer.fit(algorithm, finish)


@contextmanager
def opened(settings: Common, free: Collection[str]) -> Iterator[Run]:
    """The run of these settings. Where a mistake ends it before anything is done, the settings are not kept: the
    corrected command would be refused for differing from them."""
    named = config.verb_of(type(settings))
    with Run.open(settings.output, {"verb": named, **dataclasses.asdict(settings)}, free) as run:
        try:
            yield run
        except PlauditError:
            if not (run.finished or run.metrics() or run.checkpoints.exists()):
                (run.folder / "config.yaml").unlink()
            raise


# -------------------------------------------------------------------------------------------------- before the model


@dataclasses.dataclass
class Data:
    """Records to train on and to hold out, and sentences about what was left out."""

    training: list[Any]
    held: list[Any]
    notes: list[str]


def prepare(settings: Training) -> tuple[Training, Data]:
    """Checked settings, with the model pulled if it is one that plaudit knows, and the records: all that can be known
    to be wrong before a model is loaded. Raises PlauditError."""
    settings = config.check(settings)
    checks.check_data(settings.data)
    checks.check_data(settings.eval_data)
    checks.check_model(settings.model)
    checks.check_processes(settings.batch_size, machine.processes()[1])
    if isinstance(settings, OnPolicy):
        checks.check_rewards(listed(settings.rewards))
        checks.check_rollout(settings.rollout, settings.batch_size, settings.group)
    loaded = load_records(settings)
    return dataclasses.replace(settings, model=sources.resolve(settings.model, _say)), loaded


def load_records(settings: Training) -> Data:
    """What a run trains on and holds out, read before any model is. Raises PlauditError."""
    kind = family_of(settings).record(settings)
    loaded = data.load(settings.data, kind, settings.split)
    notes = left_out(loaded)
    if settings.eval_data is not None:
        other = data.load(settings.eval_data, kind, settings.split)
        training, held, notes = loaded.records, other.records, notes + left_out(other)
    else:
        training, held = data.hold_out(loaded.records, settings.holdout, lambda record: record.prompt)
    if not training:
        raise PlauditError(f"data: nothing is left to train on with holdout {settings.holdout}: lower it.")
    return Data(training, held[: settings.eval_limit], notes)


def left_out(loaded: Loaded[Any]) -> list[str]:
    """A sentence for each reason why rows were left out."""
    return [
        f"{len(places)} rows left out: {reason} (the first is {places[0]})" for reason, places in loaded.dropped.items()
    ]


def listed(value: str | tuple[str, ...]) -> list[str]:
    """One name or several, as a list."""
    return [value] if isinstance(value, str) else list(value)


def _say(message: str) -> None:
    from plaudit.hooks import tell

    tell(message)


def start_world(settings: Common) -> World:
    """Seeds, threads, device and number type that the settings ask for."""
    import numpy as np
    import torch

    from plaudit.world import World

    if settings.threads:
        torch.set_num_threads(settings.threads)
    # plaudit itself draws from torch's generator alone, but reward functions may draw from any.
    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    torch.manual_seed(settings.seed)
    return World.start(machine.precision(settings.precision, settings.device), settings.device)


def template_of(settings: Training) -> Template:
    """How this run writes its texts."""
    from plaudit.loading import end_every_text, load_tokenizer
    from plaudit.templates import Template

    tokenizer = load_tokenizer(settings.model)
    if isinstance(settings, Reward):
        end_every_text(tokenizer)
    return Template(tokenizer)


def encode(settings: Training, template: Template, loaded: Data) -> Data:
    """The same as token ids, with what is too long left out and counted in the notes. Raises PlauditError if that
    leaves nothing to train on."""
    family = family_of(settings)
    limit = getattr(settings, family.limit)
    training, notes = data.within(family.encode(loaded.training, template), len, limit, family.unit)
    held, more = data.within(family.encode(loaded.held, template), len, limit, f"held-out {family.unit}", needed=False)
    return Data(training, held, loaded.notes + notes + more)
