"""The families of algorithms: what each reads, and the classes that it is made of. The only place that knows every
class; they load when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from plaudit import data, encoding, pairing, sources
from plaudit.errors import PlauditError
from plaudit.records import Comparison, Demonstration, Prompt, Ranking, Rating
from plaudit.settings import ILQL, PPO, SFT, Reward, policy_gradient, preference
from plaudit.settings.common import Following, Training
from plaudit.settings.online import BestOfN, OnlineDPO, OnlineIPO
from plaudit.settings.policy_gradient import OnPolicy

if TYPE_CHECKING:
    from plaudit.algorithms.base import Algorithm
    from plaudit.policy import Policy
    from plaudit.templates import Encoded, Template
    from plaudit.world import World

Build = Callable[[Any, "World", "Template", list[Any], list[Any]], "Algorithm"]
"""(settings, world, template, encoded training data, encoded held-out data) -> the algorithm, ready to train."""

Rows = list[dict[str, Any]]
"""Lines of metrics.jsonl."""


@dataclass(frozen=True)
class Family:
    """What algorithms with settings of one base class have in common.

    unit     what one item of the data is called in a sentence
    limit    the setting that says how many tokens an item may have
    record   settings -> the kind of record that is read
    encode   records -> items, whose `len` is in tokens
    figures  the algorithm and the lines of metrics.jsonl -> what the run's summary says beside its cost
    cut      settings, items, template -> items, where some are to be cut before their length is looked at
    convert  settings, records, and the setting that names these, "" where they may come to nothing -> records in the
             form that is learned from, and sentences about what was left out
    """

    unit: str
    limit: str
    record: Callable[[Any], type]
    encode: Callable[[list[Any], Template], list[Any]]
    build: Build
    figures: Callable[[Any, Rows], dict[str, Any]]
    cut: Callable[[Any, list[Any], Template], list[Any]] = lambda settings, items, template: items
    convert: Callable[[Any, list[Any], str], tuple[list[Any], list[str]]] = lambda _, records, name: (records, [])


def family_of(settings: Training) -> Family:
    """The family that these settings belong to."""
    return next(FAMILIES[base] for base in type(settings).__mro__ if base in FAMILIES)


# ------------------------------------------------------------------------------------------------------ algorithms


def _policy(settings: Training, world: World, **heads: Any) -> Policy:
    """The policy that the settings name, with the heads that `load_policy` is asked for."""
    from plaudit.loading import load_policy

    policy = load_policy(
        settings.model,
        precision=world.precision,
        train_layers=settings.train_layers,
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        **heads,
    )
    return _ready(settings, world, policy)


def _ready(settings: Training, world: World, policy: Policy) -> Policy:
    """The policy where it is going to learn, and as sparing of memory as it is to be."""
    from plaudit.backbone import checkpoint_layers

    if settings.gradient_checkpointing:
        checkpoint_layers(policy.backbone)
    if isinstance(settings, Following):
        policy.wide_reference = bool(settings.reference_every) and settings.reference_share < 1
    return policy.to(world.device)


def _sft(settings: SFT, world: World, template: Template, *items: list[Any]) -> Algorithm:
    from plaudit.algorithms.sft import SupervisedFineTuning

    policy = _policy(settings, world)
    if policy.encodes and settings.learn == "all":
        raise PlauditError("learn: an encoder-decoder model reads prompts and writes completions: take `completion`.")
    _check_readable(settings, policy, _lengths(policy, items[0] + items[1]))
    policy.train(settings.dropout)
    return SupervisedFineTuning(settings, world, policy, *items)


def _reward(settings: Reward, world: World, template: Template, *items: list[Any]) -> Algorithm:
    from plaudit.algorithms.reward import FromComparisons, FromRankings, FromRatings
    from plaudit.algorithms.reward_objectives import BestOf, Binary, PlackettLuce, Regression
    from plaudit.loading import load_reward_model

    kinds = {
        (Comparison, "bradley_terry"): FromComparisons,
        (Ranking, "bradley_terry"): FromRankings,
        (Ranking, "plackett_luce"): PlackettLuce,
        (Ranking, "best_of"): BestOf,
        (Rating, "bradley_terry"): FromRatings,
        (Rating, "regression"): Regression,
        (Rating, "binary"): Binary,
    }
    algorithm = kinds[encoding.judgement_kind(settings), settings.objective]
    anchor = _anchor(settings, template)
    policy = load_reward_model(
        settings.model,
        template.tokenizer,
        precision=world.precision,
        train_layers=settings.train_layers,
        lora_rank=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
    )
    policy = _ready(settings, world, policy)
    texts = [text for item in items[0] + items[1] for text in item.texts] + anchor
    _check_readable(settings, policy, map(len, texts))
    policy.train(settings.dropout)
    return algorithm(settings, world, policy, *items, anchor)


def _anchor(settings: Reward, template: Template) -> list[list[int]]:
    """The texts whose mean score is to be 0, of no more tokens than any other. Raises PlauditError if there is none."""
    if settings.normalise_on is None:
        return []
    records = data.load(settings.normalise_on, Demonstration, settings.split).records
    texts = template.tokenizer([template.text(record.prompt, record.completion) for record in records]).input_ids
    return data.within(texts, len, settings.max_tokens, "demonstration of normalise_on")[0]


def _lengths(policy: Policy, texts: Iterable[Encoded]) -> Iterator[int]:
    """Of what the model reads at once: prompt and answer together, or one after the other in an encoder-decoder."""
    for text in texts:
        yield from (len(text.prompt), len(text.completion)) if policy.encodes else (len(text),)


def _check_readable(settings: Any, policy: Policy, lengths: Iterable[int]) -> None:
    """Raises PlauditError for a text that the model has no positions for."""
    from plaudit.backbone import limit_of

    limit, longest = limit_of(policy.backbone), max(lengths)
    if longest > limit:
        raise PlauditError(
            f"max_tokens: a text has {longest} tokens, and {settings.model!r} reads at most {limit}: "
            f"set max_tokens to {limit}, which leaves longer ones out."
        )


def on_policy_classes() -> dict[type, type[Algorithm]]:
    """The algorithm of each settings class that samples."""
    from plaudit.algorithms import group_relative as grouped
    from plaudit.algorithms import online, ppo
    from plaudit.algorithms import policy_gradient as known
    from plaudit.algorithms import weighed_ratios as weighed

    return {
        PPO: ppo.ProximalPolicyOptimisation,
        policy_gradient.VPG: known.VanillaPolicyGradient,
        policy_gradient.RLOO: known.LeaveOneOut,
        policy_gradient.ReinforcePP: known.ReinforcePlusPlus,
        policy_gradient.GRPO: grouped.GroupRelativePolicyOptimisation,
        policy_gradient.DrGRPO: grouped.GroupRelativeDoneRight,
        policy_gradient.LitePPO: grouped.LiteClipped,
        policy_gradient.GDPO: grouped.GroupRewardDecoupled,
        policy_gradient.GMPO: grouped.GeometricMean,
        policy_gradient.DAPO: grouped.DynamicSampling,
        policy_gradient.GSPO: grouped.GroupSequencePolicyOptimisation,
        policy_gradient.CISPO: weighed.ClippedWeights,
        policy_gradient.LUSPO: grouped.LengthUnbiased,
        policy_gradient.SAPO: weighed.SoftAdaptive,
        policy_gradient.VESPO: weighed.VariationalSequence,
        OnlineDPO: online.OnlineDirectPreference,
        OnlineIPO: online.OnlineIdentityPreference,
        BestOfN: online.BestOfSeveral,
    }


def _on_policy(settings: OnPolicy, world: World, template: Template, *items: list[Any]) -> Algorithm:
    from plaudit.rewards import load_rewards
    from plaudit.sampler import LocalSampler

    valued = {"value_head": True, "value_hidden": settings.value_hidden} if isinstance(settings, PPO) else {}
    policy = _policy(settings, world, **valued)
    if reference := getattr(settings, "reference", ""):
        policy.keep_reference(_policy(replace(settings, model=sources.resolve(reference)), world))
    rewards = load_rewards(
        settings.rewards,
        weights=settings.reward_weights,
        clip=settings.reward_clip,
        normalise=settings.reward_normalise,
        scale=settings.reward_scale,
        moments=settings.reward_moments,
        precision=world.precision,
        device=world.device,
        tokens_per_pass=settings.tokens_per_pass,
    )
    sampler = LocalSampler(policy.backbone, template.decode, dtype=world.sampling_dtype)
    algorithm: Callable[..., Algorithm] = on_policy_classes()[type(settings)]
    return algorithm(settings, world, policy, template, sampler, rewards, *items)


def _ilql(settings: ILQL, world: World, template: Template, *items: list[Any]) -> Algorithm:
    from plaudit.algorithms.ilql import ImplicitLanguageQLearning, normalised

    if world.shards:
        raise PlauditError("ilql: its heads cannot be spread over processes: launch it without FSDP, as plain copies.")
    policy = _policy(settings, world, action_heads=True)
    _check_readable(settings, policy, _lengths(policy, items[0] + items[1]))
    logged = normalised(*items) if settings.reward_normalise else items
    return ImplicitLanguageQLearning(settings, world, policy, *logged)


def preference_classes() -> dict[type, type[Algorithm]]:
    """The algorithm of each settings class that learns from preferences."""
    from plaudit.algorithms import direct, transport, unpaired
    from plaudit.algorithms import preference as paired

    return {
        preference.DPO: paired.DirectPreference,
        preference.RobustDPO: paired.RobustDirectPreference,
        preference.NormalisedDPO: paired.NormalisedDirectPreference,
        preference.DivergenceDPO: direct.DivergencePreference,
        preference.LengthDesensitisedDPO: direct.LengthDesensitised,
        preference.WPO: direct.WeightedPreference,
        preference.IPO: paired.IdentityPreference,
        preference.AveragedIPO: paired.AveragedIdentityPreference,
        preference.Hinge: paired.HingePreference,
        preference.EXO: paired.EfficientExact,
        preference.NCA: paired.NoiseContrastive,
        preference.SPPO: paired.SelfPlayPreference,
        preference.AOT: transport.OptimalTransport,
        preference.UnpairedAOT: transport.UnpairedOptimalTransport,
        preference.PairedBCO: unpaired.PairedBinaryClassifier,
        preference.MPO: direct.MixedPreference,
        preference.APOZero: paired.AnchoredZero,
        preference.APODown: paired.AnchoredDown,
        preference.DiscoPOP: paired.DiscoveredPreference,
        preference.RRHF: paired.RankResponses,
        preference.CPO: paired.ContrastivePreference,
        preference.SLiC: paired.SequenceLikelihood,
        preference.ReferenceFreeIPO: paired.ReferenceFreeIdentity,
        preference.SimPO: paired.SimplePreference,
        preference.AlphaPO: paired.ShapedPreference,
        preference.ORPO: paired.OddsRatio,
        preference.KTO: unpaired.KahnemanTversky,
        preference.UnpairedAPOZero: unpaired.UnpairedAnchoredZero,
        preference.BCO: unpaired.BinaryClassifier,
    }


def _preference(settings: preference.Preference, world: World, template: Template, *items: list[Any]) -> Algorithm:
    if world.shards and isinstance(settings, preference.WPO):
        raise PlauditError("wpo: it reads the whole vocabulary, over which FSDP spreads the head: take another loss.")
    policy = _policy(settings, world)
    answers = [answer for item in items[0] + items[1] for answer in item.encoded]
    _check_readable(settings, policy, _lengths(policy, answers))
    algorithm: Callable[..., Algorithm] = preference_classes()[type(settings)]
    return algorithm(settings, world, policy, *items)


# --------------------------------------------------------------------------------------------------------- figures


def _metric(rows: Rows, name: str, last: bool) -> float | None:
    values = [row[name] for row in rows if name in row]
    return values[-1 if last else 0] if values else None


def _before_and_after(algorithm: Algorithm, rows: Rows) -> dict[str, Any]:
    return {name: _metric(rows, "heldout_nll", last) for name, last in (("nll_before", False), ("nll_after", True))}


def _found(algorithm: Any, rows: Rows) -> dict[str, Any]:
    return dict(algorithm.found)


def _reached(algorithm: Algorithm, rows: Rows) -> dict[str, Any]:
    figures = {name: _metric(rows, name, True) for name in ("score", "kl")}
    return {name: value for name, value in figures.items() if value is not None}


def _told_apart(algorithm: Algorithm, rows: Rows) -> dict[str, Any]:
    figures = {f"preference_{name}": _metric(rows, f"heldout_{name}", True) for name in ("loss", "accuracy", "margin")}
    return {name: value for name, value in figures.items() if value is not None}


_PREFERENCE = Family(
    unit="pair",
    limit="max_tokens",
    record=encoding.preference_kind,
    encode=encoding.answered,
    build=_preference,
    figures=_told_apart,
    convert=lambda settings, records, name: pairing.comparisons(records, settings.soft, name),
)
_SINGLE = replace(_PREFERENCE, unit="answer", convert=lambda _, records, name: pairing.thumbs(records, name))
_RANKED = replace(_PREFERENCE, unit="ranking", convert=lambda _, records, name: pairing.rankings(records, name))

FAMILIES: dict[type, Family] = {
    SFT: Family(
        unit="demonstration",
        limit="max_tokens",
        record=lambda _: Demonstration,
        encode=encoding.demonstrated,
        build=_sft,
        figures=_before_and_after,
        cut=encoding.cut_texts,
    ),
    ILQL: Family("text", "max_tokens", lambda _: Rating, encoding.logged, _ilql, _before_and_after),
    Reward: Family("text", "max_tokens", encoding.judgement_kind, encoding.judged, _reward, _found),
    preference.Preference: _PREFERENCE,
    preference.KTO: _SINGLE,
    preference.UnpairedAPOZero: _SINGLE,
    preference.BCO: _SINGLE,
    preference.RRHF: _RANKED,
    OnPolicy: Family(
        unit="prompt",
        limit="max_prompt_tokens",
        record=lambda _: Prompt,
        encode=encoding.asked_of,
        build=_on_policy,
        figures=_reached,
        cut=encoding.shortened,
        convert=encoding.long_enough,
    ),
}
