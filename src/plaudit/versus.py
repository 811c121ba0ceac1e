"""`plaudit compare`: two policies before people, blind, or before a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from plaudit import checks, config, machine, sources, statistics
from plaudit.errors import PlauditError
from plaudit.feedback import serving
from plaudit.feedback.desk import Desk, keep, kept
from plaudit.feedback.items import Item, Label
from plaudit.run import Run
from plaudit.settings import Evaluate
from plaudit.settings.feedback import Compare

FREE = ("output", "device", "threads", "port", "address")
STORE = "answers.sqlite"
"""In the run folder: what people said."""
SHOWN = 10
"""Pairs that the report shows."""


def compare(settings: Compare) -> Run:
    """How often `b` is preferred to `a`; the run's summary holds the win rate.

    With `people`, the same command goes on where it was stopped, and their answers stay in the store of the folder.
    Raises PlauditError for what the user can put right.
    """
    settings = config.check(settings)
    names = _names(settings)
    if settings.people and settings.judge:
        raise PlauditError("judge: people decide with --people: leave out one of the two.")
    if settings.people:
        run = _by_people(settings, names)
    elif settings.judge:
        run = _by_judge(settings, names)
    else:
        raise PlauditError("judge: name who decides, as a reward is named, or let people decide: --people.")
    from plaudit.hooks import tell

    tell(sentence(run.summary, names))
    return run


def sentence(found: dict[str, Any], names: Sequence[str]) -> str:
    """The outcome in words."""
    if "win_rate" not in found:
        return "Nobody has decided anything."
    rate, low, high = (f"{100 * found[name]:.0f}%" for name in ("win_rate", "win_rate_low", "win_rate_high"))
    interval = f"95% interval {low} to {high}, ties half"
    return f"{names[1]} is preferred to {names[0]} in {rate} of {found['prompts']} prompts ({interval})."


def _names(settings: Compare) -> list[str]:
    """What the policies are called: as the user says, or as their run is."""
    named = []
    for policy in (settings.a, settings.b):
        name, found, _ = policy.partition("=")
        path = Path(policy)
        named.append(name if found else (path.parent if path.name == "final" else path).name or policy)
    return named if named[0] != named[1] else ["a", "b"]


def _folders(settings: Compare) -> list[str]:
    return [policy.partition("=")[2] or policy for policy in (settings.a, settings.b)]


def _by_judge(settings: Compare, names: Sequence[str]) -> Run:
    """What `evaluate` finds."""
    from plaudit.inference import evaluate

    shared = {field.name for field in fields(Evaluate)} & {field.name for field in fields(Compare)}
    given = {name: getattr(settings, name) for name in shared - {"judge"}}
    policies = tuple(f"{name}={folder}" for name, folder in zip(names, _folders(settings), strict=True))
    return evaluate(Evaluate(policies=policies, rewards=settings.judge, **given))


def _by_people(settings: Compare, names: Sequence[str]) -> Run:
    serving.origin_of(settings.address)
    checks.check_data(settings.data)
    for folder in _folders(settings):
        checks.check_model(folder)
    with Run.open(settings.output, {"verb": "compare", **asdict(settings)}, FREE) as run:
        if not run.finished:
            try:
                _asked(settings, run)
            except PlauditError:
                # The corrected command would be refused for differing from settings that led nowhere.
                (run.folder / "config.yaml").unlink()
                raise
            _answered(settings, names, run)
        return run


def _asked(settings: Compare, run: Run) -> None:
    """Samples the pairs that people are to see, once for all."""
    if (run.folder / "ask.jsonl").exists():
        return
    from plaudit import asking
    from plaudit.hooks import progress_bar, tell
    from plaudit.recipes import start_world

    distinct = asking.distinct(settings.data, settings.split, tell)
    prompts = distinct[: settings.prompts]
    if len(prompts) < len(distinct):
        tell(f"{len(prompts)} of {len(distinct)} prompts are sampled from, as `prompts` says.")
    folders = [sources.resolve(folder) for folder in _folders(settings)]
    bar, task = progress_bar("ask", len(prompts) * 2, unit="answers")
    with bar:
        said = asking.answers(
            folders,
            prompts,
            settings,
            start_world(settings),
            seed=settings.seed,
            rows=settings.rows,
            advance=lambda count: bar.advance(task, count),
            tell=tell,
        )
    machine.release()
    items = asking.questions(said)
    if not items:
        raise PlauditError(f"{settings.a} and {settings.b} say the same to all {len(said)} prompts: nothing is to ask.")
    # What both say alike is a tie that nobody needs to be asked about.
    alike = len(said) - len(items)
    if alike:
        tell(f"{alike} of {len(said)} prompts are not asked about: both say the same to them, which counts as a tie.")
    run.log(0, {"alike": alike})
    keep(run.folder / "ask.jsonl", items)


def _answered(settings: Compare, names: Sequence[str], run: Run) -> None:
    """Waits for people; what they said so far is told when somebody stops it."""
    from plaudit.hooks import progress_bar, tell

    items = kept(run.folder / "ask.jsonl")
    needed = len(items) * settings.overlap
    asking = {"port": settings.port, "address": settings.address, "overlap": settings.overlap}
    with Desk.open(run.folder / STORE, **asking) as desk:
        desk.ask(items)
        desk.tell(tell)
        bar, task = progress_bar("answers", needed, unit="answers")
        try:
            with bar:
                labels = desk.wait(items, needed, lambda count: bar.update(task, completed=count))
        except KeyboardInterrupt:
            # Ties that nobody needs to be asked about are all there from the beginning: beside a few answers they would
            # drown them.
            tell(sentence(figures(items, desk.labels(items), names, 0), names))
            if alike := _alike(run):
                tell(f"{alike} prompts to which both say the same are left out of this; in the end they count as ties.")
            raise
    run.samples(0, [_side_by_side(item, names) for item in items[:SHOWN]])
    run.finish({"verb": "compare", **figures(items, labels, names, _alike(run))})


def _alike(run: Run) -> int:
    return int(next(row["alike"] for row in run.metrics() if "alike" in row))


def _side_by_side(item: Item, names: Sequence[str]) -> dict[str, Any]:
    return {"prompt": item.prompt, **{name: one.text for name, one in zip(names, item.candidates, strict=True)}}


def figures(items: Sequence[Item], labels: Sequence[Label], names: Sequence[str], alike: int) -> dict[str, Any]:
    """How often the second candidate is preferred to the first, as `statistics.win_rate` counts it.

    A prompt is won by whom more people prefer; where both said the same it is a tie (`alike`), and where nobody could
    compare it does not count. `prompts` is 0, and there is no win rate, while nothing is decided.
    """
    votes: dict[str, list[int]] = {item.id: [] for item in items}
    for label in labels:
        if label.answer.ranks is not None:
            votes[label.item.id].append(label.answer.ranks[0] - label.answer.ranks[1])
    balance = [sum(each) for each in votes.values() if each] + [0] * alike
    found: dict[str, Any] = {
        "answers": len(labels),
        "cannot_compare": sum(not label.answer.comparable for label in labels),
        "alike": alike,
        "prompts": len(balance) if any(votes.values()) else 0,
    }
    if not found["prompts"]:
        return found
    wins = statistics.win_rate(balance, [0] * len(balance))
    shares = (wins.losses / wins.n, wins.wins / wins.n)
    models = {name: {"preferred_share": share} for name, share in zip(names, shares, strict=True)}
    rate = {"win_rate": wins.rate, "win_rate_low": wins.low, "win_rate_high": wins.high, "p_value": wins.p_value}
    return {**models, **rate, **found}
