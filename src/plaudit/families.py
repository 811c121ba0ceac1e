"""The families of algorithms: what each reads, how that becomes token ids, and the classes that it is made of. The only
place that knows every class; they load when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plaudit import data
from plaudit.records import Comparison, Demonstration, Prompt, Ranking, Rating
from plaudit.run import Run
from plaudit.settings import PPO, SFT, Reward
from plaudit.settings.common import Training
from plaudit.settings.policy_gradient import OnPolicy

if TYPE_CHECKING:
    from plaudit.algorithms.base import Algorithm
    from plaudit.algorithms.on_policy import Asked
    from plaudit.policy import Policy
    from plaudit.templates import Template
    from plaudit.world import World

Build = Callable[[Any, "World", "Template", list[Any], list[Any]], "Algorithm"]
"""(settings, world, template, encoded training data, encoded held-out data) -> the algorithm, ready to train."""


@dataclass(frozen=True)
class Family:
    """What algorithms with settings of one base class have in common.

    unit     what one item of the data is called in a sentence
    limit    the setting that says how many tokens an item may have
    record   settings -> the kind of record that is read
    encode   records -> items, whose `len` is in tokens
    figures  what the run's summary says beside its cost
    """

    unit: str
    limit: str
    record: Callable[[Any], type]
    encode: Callable[[list[Any], Template], list[Any]]
    build: Build
    figures: Callable[[Any, Run], dict[str, Any]]


def family_of(settings: Training) -> Family:
    """The family that these settings belong to."""
    return next(FAMILIES[base] for base in type(settings).__mro__ if base in FAMILIES)


# ------------------------------------------------------------------------------------------------------------ data


def judgement_kind(settings: Training) -> type[Any]:
    """Which of the three ways to judge the data hold, by the columns of their first row."""
    columns = data.columns_of(settings.data, settings.split)
    if "chosen" in columns and "rejected" in columns:
        return Comparison
    if "ranking" in columns:
        return Ranking
    return Rating


def _demonstrated(records: list[Demonstration], template: Template) -> list[Any]:
    return [template.encode(record.prompt, record.completion) for record in records]


def asked_of(records: list[Prompt], template: Template) -> list[Asked]:
    """Prompts with their token ids."""
    from plaudit.algorithms.on_policy import Asked

    return [Asked(record, template.prompt(record.prompt)) for record in records]


def _judged(records: list[Any], template: Template) -> list[Any]:
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


# ------------------------------------------------------------------------------------------------------ algorithms


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


def _sft(settings: SFT, world: World, template: Template, *items: list[Any]) -> Algorithm:
    from plaudit.algorithms.sft import SupervisedFineTuning

    policy = _policy(settings, world)
    policy.train(settings.dropout)
    return SupervisedFineTuning(settings, world, policy, *items)


def _reward(settings: Reward, world: World, template: Template, *items: list[Any]) -> Algorithm:
    from plaudit.algorithms.reward import FromComparisons, FromRankings, FromRatings
    from plaudit.loading import load_reward_model

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
    return kinds[judgement_kind(settings)](settings, world, policy, *items)


def _on_policy(settings: PPO, world: World, template: Template, *items: list[Any]) -> Algorithm:
    from plaudit.algorithms.ppo import ProximalPolicyOptimisation
    from plaudit.rewards import load_rewards
    from plaudit.sampler import LocalSampler

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
    return ProximalPolicyOptimisation(settings, world, policy, template, sampler, rewards, *items)


# --------------------------------------------------------------------------------------------------------- figures


def _metric(run: Run, name: str, last: bool) -> float | None:
    values = [row[name] for row in run.metrics() if name in row]
    return values[-1 if last else 0] if values else None


def _before_and_after(algorithm: Algorithm, run: Run) -> dict[str, Any]:
    return {name: _metric(run, "heldout_nll", last) for name, last in (("nll_before", False), ("nll_after", True))}


def _found(algorithm: Any, run: Run) -> dict[str, Any]:
    return dict(algorithm.found)


def _reached(algorithm: Algorithm, run: Run) -> dict[str, Any]:
    return {name: _metric(run, name, True) for name in ("score", "kl")}


FAMILIES: dict[type, Family] = {
    SFT: Family("demonstration", "max_tokens", lambda _: Demonstration, _demonstrated, _sft, _before_and_after),
    Reward: Family("text", "max_tokens", judgement_kind, _judged, _reward, _found),
    OnPolicy: Family("prompt", "max_prompt_tokens", lambda _: Prompt, asked_of, _on_policy, _reached),
}
