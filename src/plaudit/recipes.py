"""From settings to finished runs: the only place that knows every class. Heavy imports wait until the settings,
the paths and the data have been looked at."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaudit import checks, config, data, machine, sources
from plaudit.errors import PlauditError
from plaudit.records import Comparison, Demonstration, Loaded, Prompt, Ranking, Rating
from plaudit.run import Run
from plaudit.settings import PPO, SFT, Reward
from plaudit.settings.common import Common, Training
from plaudit.settings.policy_gradient import OnPolicy

if TYPE_CHECKING:
    from plaudit.algorithms.base import Algorithm
    from plaudit.algorithms.on_policy import Asked
    from plaudit.algorithms.reward import Judged
    from plaudit.policy import Policy
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
    algorithm, tokenizer = _BUILDERS[type(settings)](settings, world, loaded)
    named = config.verb_of(type(settings))
    trainer = Trainer(
        run, world, settings, [hooks.Evaluating(), hooks.Logging(), hooks.Progressing(named), hooks.Saving()]
    )
    trainer.messages += loaded.notes
    trainer.fit(algorithm)
    if world.is_main:
        save_pretrained(algorithm.policy, tokenizer, run.final)
        figures = _SUMMARIES[type(settings)](algorithm, run)
        run.finish(
            {
                "verb": named,
                "steps": trainer.step,
                "seconds": trainer.seconds_before + time.perf_counter() - started,
                "peak_memory_mb": machine.peak_memory_mb(),
                "tokens_per_second": trainer.tokens / max(trainer.seconds, 1e-9),
                **figures,
            }
        )
    world.barrier()


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
    if isinstance(settings, OnPolicy):
        checks.check_rewards(listed(settings.rewards))
        checks.check_rollout(settings.rollout, settings.batch_size, settings.group)
    loaded = load_records(settings)
    return dataclasses.replace(settings, model=sources.resolve(settings.model, _say)), loaded


def load_records(settings: Training) -> Data:
    """What a run trains on and holds out, read before any model is. Raises PlauditError."""
    kind = {SFT: Demonstration, PPO: Prompt}.get(type(settings)) or _judgement_kind(settings)
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


def _judgement_kind(settings: Training) -> type[Any]:
    columns = data.columns_of(settings.data, settings.split)
    if "chosen" in columns and "rejected" in columns:
        return Comparison
    if "ranking" in columns:
        return Ranking
    return Rating


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


# --------------------------------------------------------------------------------------------------- the algorithms


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


def encode(settings: Training, template: Template, loaded: Data) -> list[Any]:
    """What a run learns from, as token ids; what is too long for it is counted in the notes. Raises PlauditError if
    all of it is."""
    if isinstance(settings, SFT):
        items: list[Any] = [template.encode(d.prompt, d.completion) for d in loaded.training]
        kept, notes = data.within(items, len, settings.max_tokens, "demonstration")
    elif isinstance(settings, Reward):
        kept, notes = data.within(_judged(loaded.training, template), len, settings.max_tokens, "text")
    else:
        kept, notes = asked_of(loaded.training, template, settings.max_prompt_tokens)
    loaded.notes += notes
    return kept


def _policy(settings: Training, world: World, value_head: bool = False) -> Policy:
    from plaudit.loading import load_policy

    policy = load_policy(
        settings.model,
        precision=world.precision,
        train_layers=settings.train_layers,
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        value_head=value_head,
    )
    return policy.to(world.device)


def _sft(settings: SFT, world: World, loaded: Data) -> tuple[Algorithm, Any]:
    from plaudit.algorithms.sft import SupervisedFineTuning

    template = template_of(settings)
    training = encode(settings, template, loaded)
    held = [row for d in loaded.held if len(row := template.encode(d.prompt, d.completion)) <= settings.max_tokens]
    policy = _policy(settings, world)
    policy.train(settings.dropout)
    return SupervisedFineTuning(settings, world, policy, training, held), template.tokenizer


def _reward(settings: Reward, world: World, loaded: Data) -> tuple[Algorithm, Any]:
    from plaudit.algorithms.reward import FromComparisons, FromRankings, FromRatings
    from plaudit.loading import load_reward_model

    template = template_of(settings)
    training = encode(settings, template, loaded)
    held = [item for item in _judged(loaded.held, template) if len(item) <= settings.max_tokens]
    policy = load_reward_model(
        settings.model,
        template.tokenizer,
        precision=world.precision,
        train_layers=settings.train_layers,
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
    ).to(world.device)
    policy.train(settings.dropout)
    kinds = {Comparison: FromComparisons, Ranking: FromRankings, Rating: FromRatings}
    return kinds[type(loaded.training[0])](settings, world, policy, training, held), template.tokenizer


def _judged(records: list[Any], template: Template) -> list[Judged]:
    from plaudit.algorithms.reward import Judged

    items = []
    for record in records:
        if isinstance(record, Comparison):
            texts, margin = [record.chosen, record.rejected], record.margin or 0.0
            targets = [[record.preference, margin], [1 - record.preference, -margin]]
        elif isinstance(record, Ranking):
            texts, targets = list(record.completions), [[float(rank)] for rank in record.ranks]
        else:
            texts, targets = [record.completion], [list(record.ratings)]
        ids = template.tokenizer([template.text(record.prompt, text) for text in texts]).input_ids
        items.append(Judged(ids, targets))
    return items


def _ppo(settings: PPO, world: World, loaded: Data) -> tuple[Algorithm, Any]:
    from plaudit.algorithms.ppo import ProximalPolicyOptimisation
    from plaudit.rewards import load_rewards
    from plaudit.sampler import LocalSampler

    template = template_of(settings)
    training = encode(settings, template, loaded)
    policy = _policy(settings, world, value_head=True)
    rewards = load_rewards(
        settings.rewards,
        weights=settings.reward_weights,
        clip=settings.reward_clip,
        normalise=settings.reward_normalise,
        precision=world.precision,
        device=world.device,
        tokens_per_pass=settings.tokens_per_pass,
    )
    sampler = LocalSampler(policy.backbone, template.decode, dtype=world.sampling_dtype)
    held = [asked for asked in _encoded(loaded.held, template) if len(asked) <= settings.max_prompt_tokens]
    algorithm = ProximalPolicyOptimisation(settings, world, policy, template, sampler, rewards, training, held)
    return algorithm, template.tokenizer


def asked_of(records: list[Prompt], template: Template, limit: int) -> tuple[list[Asked], list[str]]:
    """Prompts as token ids, and a sentence about those that are too long."""
    return data.within(_encoded(records, template), len, limit, "prompt")


def _encoded(records: list[Prompt], template: Template) -> list[Asked]:
    from plaudit.algorithms.on_policy import Asked

    return [Asked(record, template.prompt(record.prompt)) for record in records]


_BUILDERS: dict[type, Callable[..., tuple[Algorithm, Any]]] = {SFT: _sft, Reward: _reward, PPO: _ppo}


# ------------------------------------------------------------------------------------------------------- summaries


def _metric(run: Run, name: str, last: bool) -> float | None:
    values = [row[name] for row in run.metrics() if name in row]
    return values[-1 if last else 0] if values else None


def _sft_summary(algorithm: Algorithm, run: Run) -> dict[str, Any]:
    return {name: _metric(run, "heldout_nll", last) for name, last in (("nll_before", False), ("nll_after", True))}


def _reward_summary(algorithm: Any, run: Run) -> dict[str, Any]:
    return algorithm.found


def _ppo_summary(algorithm: Algorithm, run: Run) -> dict[str, Any]:
    return {name: _metric(run, name, True) for name in ("score", "kl")}


_SUMMARIES: dict[type, Callable[..., dict[str, Any]]] = {SFT: _sft_summary, Reward: _reward_summary, PPO: _ppo_summary}
