"""All figures over a set of labels at once, as plain JSON values: for the report, the terminal and the reviewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plaudit.feedback import habits, kappas
from plaudit.feedback.items import KINDS, Kind, Label
from plaudit.feedback.reliability import reliability, strengths


def summary(labels: Sequence[Label], seed: int = 0, resamples: int = 1000) -> dict[str, Any]:
    """What the labels say of those who gave them and of the models judged; the same seed gives the same intervals.

    `kinds`     by kind: how many labels and items, how many `shared` by two people, the `figures` of agreement (see
                `kappas.figures`), each two people (see `kappas.between`), and `tiers` by model
    `people`    by name: labels, agreement with `others`, with `gold` and with `oneself`, share of `cant`, preference
                for the `position` shown first and for the longer, `seconds`, and `reliability` by kind
    `overall`   the same of all people together; `strengths` of the models (see `reliability.strengths`)
    `notes`     sentences about what could not be known

    A share or figure that is not defined has the value None.
    """
    people = sorted({label.person for label in labels})
    kinds = {kind: _kind([one for one in labels if one.item.kind == kind], kind, seed, resamples) for kind in KINDS}
    kinds = {kind: found for kind, found in kinds.items() if found["labels"]}
    others = habits.with_others(labels)
    found: dict[str, Any] = {
        "labels": len(labels),
        "items": len({label.item.id for label in labels}),
        "kinds": kinds,
        "overall": _habits(labels),
        "people": {},
        "strengths": strengths(labels, seed, min(resamples, 200)),
    }
    for person in people:
        own = [label for label in labels if label.person == person]
        found["people"][person] = {
            "labels": len(own),
            "others": others.get(person, habits.share(0, 0)),
            **_habits(own),
            "reliability": {kind: kinds[kind]["reliability"]["people"].get(person) for kind in kinds},
        }
    found["notes"] = _notes(found)
    return found


def _kind(labels: Sequence[Label], kind: Kind, seed: int, resamples: int) -> dict[str, Any]:
    table = kappas.table(labels, kind)
    relied = reliability(table)
    return {
        "labels": len(labels),
        "items": len({label.item.id for label in labels}),
        "shared": len(table.items),
        "level": kappas.LEVELS[kind],
        "figures": kappas.figures(table, seed, resamples),
        "between": kappas.between(table),
        "tiers": habits.tiers(labels),
        "reliability": {"people": relied.people if relied else {}, "spread": relied.spread if relied else None},
    }


def _habits(labels: Sequence[Label]) -> dict[str, Any]:
    return {
        **habits.undecided(labels),
        "position": habits.position(labels),
        "length": habits.length(labels),
        "oneself": habits.with_oneself(labels),
        "gold": habits.with_gold(labels),
        "seconds": habits.times(labels),
    }


def _notes(found: dict[str, Any]) -> list[str]:
    """What a reader should know before reading the figures."""
    if not found["labels"]:
        return ["There are no labels yet."]
    notes = []
    people, overall = len(found["people"]), found["overall"]
    shared = sum(kind["shared"] for kind in found["kinds"].values())
    if people == 1:
        notes.append("One person alone answered: agreement needs a second one on the same items.")
    elif not shared:
        notes.append("No item was answered by two people: raise `overlap` to learn how far they agree.")
    elif shared < 50:
        notes.append(f"Only {shared} items were answered by two people or more: the intervals are wide.")
    if not overall["position"]["n"] and set(found["kinds"]) != {"rate"}:
        notes.append("The order shown is not known, or nothing was decided: position bias cannot be told.")
    elif overall["position"]["n"] and overall["position"]["p_value"] < 0.01:
        side = "first" if overall["position"]["value"] > 0.5 else "last"
        notes.append(f"What is shown {side} is preferred more often than chance would have it.")
    if overall["seconds"]["median"] is None:
        notes.append("The time that answers took is not known.")
    if found["strengths"]["why"] and set(found["kinds"]) != {"rate"}:
        notes.append(found["strengths"]["why"])
    return notes + _left_out(found)


def _left_out(found: dict[str, Any]) -> list[str]:
    """Of which figures there are resamples that do not determine them."""
    notes = [
        f"{name}, {kind}: {value['why']}"
        for kind, own in found["kinds"].items()
        for name, value in own["figures"].items()
        if value["low"] is not None and value["why"]
    ]
    strength = next(iter(found["strengths"]["models"].values()), {"why": ""})
    return notes + [f"Strengths: {strength['why']}"] * bool(strength["why"])
