"""From settings to finished runs: the only place that knows every class. Heavy imports wait until the settings,
the paths and the data have been looked at."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from plaudit import checks, config, data, machine, sources
from plaudit.errors import PlauditError
from plaudit.records import Comparison, Demonstration, Loaded, Prompt, Ranking, Rating
from plaudit.run import Run
from plaudit.settings import PPO, SFT, Reward
from plaudit.settings.common import Common, Training

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
    settings = config.check(settings)
    checks.check_data(settings.data)
    checks.check_data(settings.eval_data)
    checks.check_rewards(listed(getattr(settings, "rewards", ())))
    settings = dataclasses.replace(settings, model=sources.resolve(settings.model))
    checks.check_model(settings.model)
    loaded = load_records(settings)
    with Run.open(
        settings.output, {"verb": config.verb_of(type(settings)), **dataclasses.asdict(settings)}, FREE
    ) as run:
        if run.finished:
            _say(f"{run.folder}: already complete.")
            return run
        _fit(settings, loaded, run)
        return run


def _fit(settings: Training, loaded: Data, run: Run) -> None:
    from plaudit import hooks
    from plaudit.loading import save_pretrained
    from plaudit.trainer import Trainer

    machine.forget_peak()
    started = time.perf_counter()
    world = start_world(settings)
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


# -------------------------------------------------------------------------------------------------- before the model


@dataclasses.dataclass
class Data:
    """Records to train on and to hold out, and sentences about what was left out."""

    training: list[Any]
    held: list[Any]
    notes: list[str]


def load_records(settings: Training) -> Data:
    """What a run trains on and holds out, read before any model is. Raises PlauditError."""
    kind = {SFT: Demonstration, PPO: Prompt}.get(type(settings)) or _judgement_kind(settings)
    loaded = data.load(settings.data, kind, settings.split)
    if settings.eval_data is not None:
        training, held = loaded.records, data.load(settings.eval_data, kind, settings.split).records
    else:
        training, held = data.hold_out(loaded.records, settings.holdout, lambda record: record.prompt)
    if not training:
        raise PlauditError(f"data: nothing is left to train on with holdout {settings.holdout}: lower it.")
    return Data(training, held[: settings.eval_limit], _left_out(loaded))


def _judgement_kind(settings: Training) -> type[Any]:
    columns = data.columns_of(settings.data, settings.split)
    if "chosen" in columns and "rejected" in columns:
        return Comparison
    if "ranking" in columns:
        return Ranking
    return Rating


def _left_out(loaded: Loaded[Any]) -> list[str]:
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
    import torch

    from plaudit.world import World

    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    return World.start(machine.precision(settings.precision, settings.device), settings.device)


def _policy(settings: Training, world: World, value_head: bool = False) -> tuple[Policy, Any, Template]:
    from plaudit.loading import load_policy, load_tokenizer
    from plaudit.templates import Template

    tokenizer = load_tokenizer(settings.model)
    policy = load_policy(
        settings.model,
        precision=world.precision,
        train_layers=settings.train_layers,
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        value_head=value_head,
    )
    return policy.to(world.device), tokenizer, Template(tokenizer)


def _sft(settings: SFT, world: World, loaded: Data) -> tuple[Algorithm, Any]:
    from plaudit.algorithms.sft import SupervisedFineTuning

    policy, tokenizer, template = _policy(settings, world)
    training, notes = data.within(
        [template.encode(d.prompt, d.completion) for d in loaded.training], len, settings.max_tokens, "demonstration"
    )
    held = [template.encode(d.prompt, d.completion) for d in loaded.held]
    loaded.notes += notes
    policy.train(settings.dropout)
    return SupervisedFineTuning(
        settings, world, policy, training, [row for row in held if len(row) <= settings.max_tokens]
    ), tokenizer


def _reward(settings: Reward, world: World, loaded: Data) -> tuple[Algorithm, Any]:
    from plaudit.algorithms.reward import FromComparisons, FromRankings, FromRatings
    from plaudit.loading import end_every_text, load_reward_model, load_tokenizer
    from plaudit.templates import Template

    tokenizer = load_tokenizer(settings.model)
    end_every_text(tokenizer)
    policy = load_reward_model(
        settings.model,
        tokenizer,
        precision=world.precision,
        train_layers=settings.train_layers,
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
    ).to(world.device)
    template = Template(tokenizer)
    training, notes = data.within(_judged(loaded.training, template), len, settings.max_tokens, "text")
    loaded.notes += notes
    held = [item for item in _judged(loaded.held, template) if len(item) <= settings.max_tokens]
    policy.train(settings.dropout)
    kinds = {Comparison: FromComparisons, Ranking: FromRankings, Rating: FromRatings}
    return kinds[type(loaded.training[0])](settings, world, policy, training, held), tokenizer


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

    policy, tokenizer, template = _policy(settings, world, value_head=True)
    training, notes = asked_of(loaded.training, template, settings.max_prompt_tokens)
    loaded.notes += notes
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
    held: list[Asked] = []
    return ProximalPolicyOptimisation(settings, world, policy, template, sampler, rewards, training, held), tokenizer


def asked_of(records: list[Prompt], template: Template, limit: int) -> tuple[list[Asked], list[str]]:
    """Prompts as token ids, and a sentence about those that are too long."""
    from plaudit.algorithms.on_policy import Asked

    asked = [Asked(record, template.prompt(record.prompt)) for record in records]
    return data.within(asked, len, limit, "prompt")


def describe(settings: Training, model: str, record: Any) -> Any:
    """One record as the model will see it: a rich text with the actions in green."""
    from rich.text import Text

    from plaudit.loading import load_tokenizer
    from plaudit.templates import Template

    template = Template(load_tokenizer(model))
    if isinstance(record, Demonstration):
        row = template.encode(record.prompt, record.completion)
        pieces = [(i, False) for i in row.prompt] + list(zip(row.completion, row.actions, strict=True))
    elif isinstance(record, Prompt):
        pieces = [(i, False) for i in template.prompt(record.prompt)]
    else:
        pieces = [(i, False) for i in _judged([record], template)[0].texts[0]]
    shown = Text()
    for token, acting in pieces:
        text = template.tokenizer.decode([token]).replace("\n", "\\n")
        shown.append(text, style="black on green" if acting else "dim")
    return shown


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
