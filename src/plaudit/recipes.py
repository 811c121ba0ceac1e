"""From settings to finished runs. Heavy imports wait until the settings, the paths and the data have been looked at."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from plaudit import checks, config, data, machine, memory, sources
from plaudit.errors import PlauditError
from plaudit.families import family_of
from plaudit.records import Demonstration, left_out
from plaudit.run import Run, write_atomically
from plaudit.settings import SFT, Reward
from plaudit.settings.common import ByColumn, Common, Following, Machine, Training
from plaudit.settings.policy_gradient import VPG, OnPolicy
from plaudit.settings.scratch import Scratch, described
from plaudit.watching import check_watch

if TYPE_CHECKING:
    from plaudit.templates import Template
    from plaudit.world import World

S = TypeVar("S", bound=Common)

# What may change between the beginning of a run and its going on: nothing that the numbers depend on.
FREE = ("output", "device", "threads", "log_every", "keep", "save_every", "track", "track_project")

# In the run folder: what the machine decided when the run began.
FOUND = "machine.json"


def train(settings: Training) -> Run:
    """Trains what the settings describe and returns the run, whose `final` folder `from_pretrained` opens.

    A run that was interrupted goes on where it was; one that is finished is left as it is. Rewards may be functions,
    and data rows in memory. Raises PlauditError for what the user can put right, and `trainer.Interrupted` after SIGINT
    or SIGTERM.
    """
    settings, loaded = prepare(in_files(settings))
    if isinstance(settings, Reward) and settings.members > 1:
        return _train_members(settings)
    rank, size = machine.processes()
    # The first of several processes writes the folder; the others read there, and hear from it what is done.
    with opened(settings, FREE) if rank == 0 else Run(Path(settings.output), -1) as run:
        world = start_world(settings) if size > 1 else None
        if run.finished if world is None else world.share(run.finished):
            if rank == 0:
                say(f"{run.folder}: already complete.")
            return run
        _fit(settings, loaded, run, world)
        return run


def in_files(settings: S) -> S:
    """The settings with rows that were given in memory in files of the run folder, which the first of several processes
    writes for all. Raises PlauditError."""
    held = memory.rows_of(settings)
    if not held:
        return settings
    paths: dict[str, Any] = {name: memory.path_of(settings.output, name, content) for name, content in held.items()}
    settings = config.check(dataclasses.replace(settings, **paths))
    rank, size = machine.processes()
    if rank == 0:
        for name, path in paths.items():
            memory.write(path, held[name])
    if size > 1:  # the first says where once it has written
        settings = dataclasses.replace(settings, **start_world(settings).share(paths))
    return settings


def _train_members(settings: Reward) -> Run:
    """Trains an ensemble: one reward model after the other, each a run of its own in the folder of the whole."""
    rank, _ = machine.processes()
    with opened(settings, FREE) if rank == 0 else Run(Path(settings.output), -1) as whole:
        if whole.finished:
            if rank == 0:
                say(f"{whole.folder}: already complete.")
            return whole
        own: dict[str, Any] = {"members": 1, "bootstrap": True, "normalise_scale": True}
        summaries = []
        for number in range(settings.members):
            place: dict[str, Any] = {"output": str(whole.folder / f"member-{number}"), "seed": settings.seed + number}
            summaries.append(train(dataclasses.replace(settings, **own, **place)).summary)
            machine.release()
        columns = {name: [summary.get(name) for summary in summaries] for name in summaries[0]}
        means = {name: statistics.fmean(v) for name, v in columns.items() if all(isinstance(x, float) for x in v)}
        totals = {name: sum(columns[name]) for name in ("steps", "seconds")}
        peak = max(columns["peak_memory_mb"])
        if rank == 0:
            whole.finish({"verb": "reward", "members": len(summaries), **means, **totals, "peak_memory_mb": peak})
        return whole


def _fit(settings: Training, loaded: Data, run: Run, world: World | None) -> None:
    from plaudit import hooks
    from plaudit.loading import save_pretrained
    from plaudit.trainer import Trainer

    machine.forget_peak()
    started = time.perf_counter()
    world = world or start_world(settings)
    settings = begun(settings, loaded, run.folder, world)
    template = template_of(settings)
    loaded = encode(settings, template, loaded)
    settings = settled(settings, run.folder, world)

    def keep(tokens: int) -> None:
        kept = {"precision": world.precision, "tokens_per_pass": tokens}
        write_atomically(run.folder / FOUND, json.dumps(kept) + "\n")

    if world.is_main:
        keep(settings.tokens_per_pass)
    family = family_of(settings)
    algorithm = family.build(settings, world, template, loaded.training, loaded.held)
    algorithm.held_by = loaded.held_by
    named = config.verb_of(type(settings))
    beside = [hooks.Sparing(keep), hooks.Evaluating(), hooks.Logging(), hooks.Progressing(named)]
    trainer = Trainer(run, world, settings, beside)
    trainer.messages += loaded.notes + algorithm.remarks

    def finish() -> None:
        algorithm.finish()
        policy = algorithm.policy.whole()
        if world.is_main:
            save_pretrained(policy, template.tokenizer, run.final)
            run.finish(
                {
                    "verb": named,
                    "steps": trainer.step,
                    "seconds": trainer.seconds_before + time.perf_counter() - started,
                    "peak_memory_mb": machine.peak_memory_mb(),
                    "tokens_per_second": trainer.tokens / max(trainer.seconds, 1e-9),
                    **family.figures(algorithm, [row for row in run.metrics() if row["step"] <= trainer.chosen]),
                    **({"best_step": trainer.chosen} if settings.save_best else {}),
                }
            )
        world.barrier()

    trainer.fit(algorithm, finish)


@contextmanager
def opened(settings: Common, free: Collection[str]) -> Iterator[Run]:
    """The run of these settings. Where a mistake ends it before its first step is done, the settings are not kept: the
    corrected command would be refused for differing from them. What was evaluated before that step is done again."""
    named = config.verb_of(type(settings))
    with Run.open(settings.output, {"verb": named, **config.to_mapping(settings)}, free) as run:
        try:
            yield run
        except PlauditError:
            learned = any(row["step"] for row in run.metrics()) or run.checkpoints.exists()
            if not (run.finished or learned):
                (run.folder / "config.yaml").unlink()
            raise


# -------------------------------------------------------------------------------------------------- before the model


@dataclasses.dataclass
class Data:
    """Records to train on and to hold out, the latter also by the values of a column, and sentences about what was left
    out."""

    training: list[Any]
    held: list[Any]
    notes: list[str]
    held_by: dict[str, list[Any]] = dataclasses.field(default_factory=dict)


def prepare(settings: Training) -> tuple[Training, Data]:
    """Checked settings, with the model pulled if it is one that plaudit knows, and the records: all that can be known
    to be wrong before a model is loaded. Raises PlauditError."""
    settings = config.check(settings)
    checks.check_data(settings.data)
    checks.check_data(settings.eval_data)
    if shape := described_by(settings):
        settings = _within_context(settings, shape)
    else:
        checks.check_model(settings.model)
    checks.check_processes(settings.batch_size, machine.processes()[1])
    check_watch(settings)
    checks.check_unread(settings)
    if isinstance(settings, OnPolicy):
        checks.check_rewards(checks.listed(settings.rewards))
        checks.check_rollout(settings.rollout, settings.batch_size, settings.group, once=isinstance(settings, VPG))
        checks.check_learning_from_samples(settings)
        checks.check_reference(getattr(settings, "reference", ""), settings.lora_rank)
    if isinstance(settings, Following):
        checks.check_following(settings)
    loaded = load_records(settings)
    if isinstance(settings, Reward):
        checks.check_data(settings.normalise_on)
        kind = type(loaded.training[0]).__name__.lower()
        checks.check_reward(settings, kind, [getattr(record, "ratings", ()) for record in loaded.training])
    return dataclasses.replace(settings, model=sources.resolve(settings.model, say)), loaded


def load_records(settings: Training) -> Data:
    """What a run trains on and holds out, read before any model is. Raises PlauditError."""
    family = family_of(settings)
    kind = family.record(settings)
    loaded = data.load(settings.data, kind, settings.split)
    training, notes = loaded.records, left_out(loaded.dropped)
    if settings.eval_data is not None:
        other = data.load(settings.eval_data, kind, settings.split)
        held, name = other.records, "eval_data"
        notes += left_out(other.dropped)
    else:
        # Before anything is made of them, so that what comes from one record stays on one side.
        (training, held), name = _held_out(training, settings.holdout), ""
    if not training:
        raise PlauditError(f"data: nothing is left to train on with holdout {settings.holdout}: lower it.")
    chosen = data.fraction(training, settings.train_fraction, settings.seed)
    if len(chosen) < len(training):
        notes.append(f"{len(chosen)} of {len(training)} rows are learned from (train_fraction).")
    training, more = family.convert(settings, chosen, "data")
    held, of_held = family.convert(settings, held, name)
    notes += more + [f"held out: {note}" for note in of_held]
    held = held[: settings.eval_limit]
    by = _by_value(held, settings.eval_by) if isinstance(settings, ByColumn) and settings.eval_by else {}
    return Data(training, held, notes, by)


def _by_value(records: list[Any], column: str) -> dict[str, list[Any]]:
    """Records by what their column holds, in the order of its values. Raises PlauditError if none has such a column."""
    found: dict[str, list[Any]] = {}
    for record in records:
        if column in record.columns:
            found.setdefault(str(record.columns[column]), []).append(record)
    if not found:
        there = ", ".join(sorted({name for record in records for name in record.columns})) or "no other columns"
        raise PlauditError(f"eval_by: no held-out row has a column {column!r}: they have {there}.")
    return dict(sorted(found.items()))


def _held_out(records: list[Any], share: float) -> tuple[list[Any], list[Any]]:
    """(training, held out); of a single text, the end is held out."""
    first = records[0]
    plain = isinstance(first, Demonstration) and first.prompt == "" and isinstance(first.completion, str)
    if plain and len(records) == 1:
        return data.hold_out_end(first, share)
    return data.hold_out(records, share, data.asked)


def described_by(settings: Training) -> Scratch | None:
    """The model that the settings describe, if it is one to begin from scratch. Raises PlauditError."""
    return described(settings.model) if isinstance(settings, SFT | Reward) else None


def _within_context(settings: Any, shape: Scratch) -> Any:
    """The settings with no more tokens in a row than the model is going to read."""
    if getattr(settings, "overlap", 0) >= shape.context:
        raise PlauditError(f"overlap ({settings.overlap}) must be less than the model's context ({shape.context}).")
    return dataclasses.replace(settings, max_tokens=min(settings.max_tokens, shape.context))


def begun(settings: Training, loaded: Data, folder: Path, world: World | None = None) -> Training:
    """The settings of a run in `folder`, whose model is one that exists: made there, if it was only described."""
    shape = described_by(settings)
    if shape is None:
        return settings
    if world is None or world.is_main:
        from plaudit import scratch

        scratch.make(shape, loaded.training, settings.seed, folder)
    if world is not None:
        world.barrier()
    return dataclasses.replace(settings, model=str(folder / "initial"))


def settled(settings: Training, folder: Path, world: World) -> Training:
    """The settings with the tokens of a pass found if they are to be, and the world with its number type: the same in
    all processes, and in a run that goes on the same as at its beginning, whatever is free now."""
    from plaudit import budget

    precision, tokens = world.precision, settings.tokens_per_pass
    if world.is_main:
        kept = found_before(folder)
        if settings.precision == "auto":
            precision = kept.get("precision", precision)
        # Fewer than were asked for, if memory ran out since.
        tokens = min(filter(None, (tokens, kept.get("tokens_per_pass", 0))), default=0)
        if not tokens:
            needs = budget.needs_of(settings, precision)
            tokens = budget.tokens_that_fit(budget.free_on(world.device), needs, world.device.type)
    world.precision, tokens = world.share((precision, tokens))
    return dataclasses.replace(settings, tokens_per_pass=tokens)


def found_before(folder: Path) -> dict[str, Any]:
    """What the machine decided when the run in `folder` began; nothing where there is no step to go on from."""
    path = folder / FOUND
    found: dict[str, Any] = {}
    if path.exists() and (folder / "checkpoints").exists():
        found = json.loads(path.read_bytes())
    return found


def say(message: str) -> None:
    """`hooks.tell`, which loads only when there is something to tell."""
    from plaudit.hooks import tell

    tell(message)


def start_world(settings: Machine) -> World:
    """Seeds, threads, device and number type that the settings ask for."""
    import numpy as np
    import torch

    from plaudit import speed
    from plaudit.world import World

    machine.keep_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    # plaudit itself draws from torch's generator alone, but reward functions may draw from any.
    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    torch.manual_seed(settings.seed)
    world = World.start(device=settings.device)
    # One process decides for all: the others wait, and so leave it the cores to measure on.
    chosen = speed.choose(settings.precision, world.device).precision if world.is_main else ""
    world.precision = world.share(chosen)
    return world


def template_of(settings: Training) -> Template:
    """How this run writes its texts."""
    from plaudit.loading import encodes, end_every_text, load_tokenizer
    from plaudit.templates import Template

    tokenizer = load_tokenizer(settings.model)
    if isinstance(settings, Reward):
        end_every_text(tokenizer)
    return Template(tokenizer, encodes(settings.model))


def encode(settings: Training, template: Template, loaded: Data) -> Data:
    """The same as token ids, with what is too long left out and counted in the notes. Raises PlauditError if that
    leaves nothing to train on."""
    family = family_of(settings)
    limit = getattr(settings, family.limit)

    def encoded(records: list[Any]) -> list[Any]:
        return family.cut(settings, family.encode(records, template), template)

    def readable(records: list[Any]) -> tuple[list[Any], list[str]]:
        items = encoded(records)[: settings.eval_limit]
        return data.within(items, len, limit, f"held-out {family.unit}", needed=False)

    training, notes = data.within(encoded(loaded.training), len, limit, family.unit)
    held, more = readable(loaded.held)
    by = {value: readable(records)[0] for value, records in loaded.held_by.items()}
    return Data(training, held, loaded.notes + notes + more, by)
