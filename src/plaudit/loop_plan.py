"""The file of a loop: its settings, those of its parts, and the folders of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plaudit import checks, config, data, machine, pipeline
from plaudit.errors import PlauditError
from plaudit.feedback import serving
from plaudit.feedback.desk import kept
from plaudit.feedback.items import Item
from plaudit.feedback.queries import due
from plaudit.records import Prompt, left_out
from plaudit.settings import VERBS, Reward
from plaudit.settings.feedback import Annotate, Loop, Queries
from plaudit.settings.policy_gradient import VPG, OnPolicy

FREE = ("output", "device", "threads", "port", "address", "wait", "target")
"""What may change between the beginning of a loop and its going on."""
SECTIONS = ("queries", "reward", "policy", "synthetic")
FITTING = {
    "members": 3,
    "batch_size": 16,
    "epochs": 4.0,
    "noise": 0.1,
    "holdout": 0.1,
    "weight_decay": 0.01,
    "adaptive_weight_decay": True,
    "normalise_scale": True,
}
"""What reward models do here where the section `reward` says nothing: as the paper, and more epochs over few labels."""
OWN = {
    "reward": ("data", "output", "seed", "split"),
    "policy": ("model", "data", "rewards", "output", "reference", "seed", "split"),
    "synthetic": ("url", "token", "token_file", "people", "limit", "patience"),
}
"""Settings in a section that the loop itself decides."""


def read(path: str | Path, overrides: Sequence[str] = ()) -> Loop:
    """The settings in a loop's file, checked with all their sections before anything runs.

    `overrides` are `field=value` and `section.field=value`, values written as in YAML. Data and the files of functions
    are looked for beside `path` where the current directory has none. Raises PlauditError.
    """
    file = config.read_yaml(path)
    for override in overrides:
        _override(file, override)
    file.setdefault("output", f"runs/{Path(path).stem}")
    settings = config.from_mapping(Loop, file, str(path))
    folder = Path(path).parent
    synthetic = {
        name: pipeline.beside(value, folder) if name == "rewards" else value
        for name, value in settings.synthetic.items()
    }
    settings = replace(settings, prompts=pipeline.beside(settings.prompts, folder), synthetic=synthetic)
    Sections.of(settings, str(path))
    return settings


def _override(file: dict[str, Any], override: str) -> None:
    name, found, text = override.partition("=")
    section, dot, field = name.partition(".")
    if not found or (dot and section not in SECTIONS):
        form = f"field=value or section.field=value, a section being {', '.join(SECTIONS)}"
        raise PlauditError(f"{override!r} is no override: write {form}.")
    into = file
    if dot:
        into = file[section] = file.get(section) or {}
        if not isinstance(into, dict):
            raise PlauditError(f"{section}: is {into!r:.60}, but must be a mapping of its settings.")
    into[field if dot else name] = config.parse_value(text)


@dataclass(frozen=True)
class Sections:
    """The settings of the parts of a round, as they are before the loop fills in the round's own."""

    queries: Queries
    reward: Reward
    policy: OnPolicy
    synthetic: Annotate | None

    @classmethod
    def of(cls, settings: Loop, where: str = "loop") -> Sections:
        """Raises PlauditError, naming the section and what is wrong with it."""
        for section, names in OWN.items():
            for name in names:
                if name in getattr(settings, section):
                    raise PlauditError(f"{where}: {section}: `{name}` is the loop's to decide: leave it out.")
        shared = {name: getattr(settings, name) for name in ("precision", "device", "threads")}
        verb = str(settings.policy.get("verb", "ppo"))
        known = [name for name, kind in VERBS.items() if issubclass(kind, OnPolicy)]
        if verb not in known:
            raise PlauditError(f"{where}: policy: {verb!r} does not learn from its own samples: {', '.join(known)} do.")
        reward = {"model": settings.model, **shared, **FITTING, **settings.reward, "data": "labels.jsonl"}
        policy = {**shared, **settings.policy, "model": settings.model, "data": "prompts.jsonl", "rewards": "reward"}
        synthetic = {**shared, **settings.synthetic}
        found = cls(
            config.from_mapping(Queries, settings.queries, f"{where}: queries"),
            config.from_mapping(Reward, reward, f"{where}: reward"),
            config.from_mapping(VERBS[verb], policy, f"{where}: policy"),
            config.from_mapping(Annotate, synthetic, f"{where}: synthetic") if settings.synthetic else None,
        )
        if found.queries.method in ("disagreement", "margin") and found.reward.members < 2:
            raise PlauditError(
                f"{where}: queries: {found.queries.method} needs several reward models: give `reward` members, 3 say."
            )
        if settings.target and not found.reward.holdout and found.reward.eval_data is None:
            raise PlauditError(f"{where}: target: no answer is held out to be foreseen: raise `holdout` in `reward`.")
        for name, part in (("reward", found.reward), ("policy", found.policy)):
            if part.holdout == 1 and part.eval_data is None:
                raise PlauditError(f"{where}: {name}: with `holdout` 1 nothing is left to train on: lower it.")
        if 0 < len(settings.people) < settings.overlap:
            raise PlauditError(f"{where}: overlap: {settings.overlap} people are to answer, but fewer are named.")
        questions(settings)
        return found

    def names(self, settings: Loop) -> tuple[str, ...]:
        """Who answers; nobody by name where whoever has the link may join."""
        if settings.people or self.synthetic is None:
            return settings.people
        return tuple(f"synthetic-{number}" for number in range(1, settings.overlap + 1))


def look_ahead(settings: Loop, sections: Sections) -> list[Prompt]:
    """The prompts, and what can be known to be wrong before anything is sampled: afterwards the settings are bound,
    and a mistake that ends the loop would cost people's answers. Raises PlauditError."""
    from plaudit.hooks import tell

    if machine.processes()[1] > 1:
        raise PlauditError("a loop is one process, which people talk to: start it without a launcher.")
    serving.origin_of(settings.address)
    checks.check_data(settings.prompts)
    checks.check_model(settings.model)
    reward, policy = sections.reward, sections.policy
    checks.check_model(reward.model)
    checks.check_reward(reward, "comparison", [])
    for own in (reward.eval_data, reward.normalise_on, policy.eval_data):
        checks.check_data(own)
    checks.check_rollout(policy.rollout, policy.batch_size, policy.group, once=isinstance(policy, VPG))
    checks.check_learning_from_samples(policy)
    if sections.synthetic is not None:
        checks.check_rewards(checks.listed(sections.synthetic.rewards))
    if settings.reference == "first" and policy.lora_rank and settings.rounds > 1:
        raise PlauditError("reference: an adapter is held to the policy that its round begins with: take last.")
    loaded = data.load(settings.prompts, Prompt, settings.split)
    prompts = loaded.records
    for note in left_out(loaded.dropped):
        tell(note)
    if settings.target and reward.eval_data is None and len({data.key_of(one.prompt) for one in prompts}) < 2:
        raise PlauditError(
            "target: of a single prompt no answer can be held out to be foreseen: give more prompts, or `eval_data` in "
            "`reward`."
        )
    return prompts


def questions(settings: Loop) -> list[int]:
    """How many questions each round asks: the `first` share before any training, the others by the schedule, and all
    of them together exactly. Raises PlauditError for a round that would ask nothing."""
    total, rounds = settings.labels // settings.overlap, settings.rounds
    if settings.first:
        last = max(rounds - 1, 1)
        ends = [due(settings.schedule, number, last, total, first=settings.first) for number in range(rounds)]
    else:
        ends = [due(settings.schedule, number, rounds, total, first=0.0) for number in range(1, rounds + 1)]
    ends[-1] = total
    counts = [end - before for end, before in zip(ends, [0, *ends], strict=False)]
    if 0 in counts:
        problem = f"round {counts.index(0) + 1} of {rounds} would ask nothing"
        raise PlauditError(f"labels: {problem}: raise labels, or lower first or rounds.")
    return counts


@dataclass(frozen=True)
class Round:
    """One round's folder: what it asked, what it learned from, and what came of it."""

    number: int
    questions: int
    folder: Path

    @property
    def ask(self) -> Path:
        return self.folder / "ask.jsonl"

    @property
    def labels(self) -> Path:
        return self.folder / "labels.jsonl"

    @property
    def reward(self) -> Path:
        return self.folder / "reward"

    @property
    def policy(self) -> Path:
        return self.folder / "policy"

    def items(self) -> list[Item]:
        """What it asked, in the order in which it was chosen; [] before that."""
        return kept(self.ask)
