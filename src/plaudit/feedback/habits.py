"""What answers show of those who give them: sides and lengths that are favoured, ties, time, agreement with oneself and
with known answers.

Figures are {"value", "low", "high", "n"}: a share of n with Wilson's 95 % interval, None where n is 0.
"""

from __future__ import annotations

import statistics as numbers
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from plaudit.feedback.items import Answer, Candidate, Label
from plaudit.feedback.kappas import decisions
from plaudit.rows import Text
from plaudit.statistics import wilson

EDGES = (0.5, 1, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300, 600)
"""Seconds between which answering times are counted for a histogram; the ends take what lies beyond."""


def share(successes: float, n: int) -> dict[str, Any]:
    """A share with its interval; halves count as halves."""
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = wilson(successes, n)
    return {"value": successes / n, "low": low, "high": high, "n": n}


def likeness(a: Answer, b: Answer) -> float:
    """How much of what was decided is the same in both, from 0 to 1: over each two candidates, or the one rating. An
    answer that nothing can be compared is like another such and like nothing else."""
    if a.ranks is None or b.ranks is None:
        return float(a.ranks == b.ranks and a.rating == b.rating)
    pairs = list(zip(decisions(a.ranks), decisions(b.ranks), strict=True))
    return sum(x == y for x, y in pairs) / len(pairs)


def position(labels: Iterable[Label]) -> dict[str, Any]:
    """Of answers that put the candidates shown first and last into different tiers, how many prefer the first.

    The order shown was drawn, so without a bias it is half of them, whatever the candidates are worth; `p_value` is
    that of the exact binomial test. Labels whose order is not known (`order` is empty) are left out.
    """
    from scipy.stats import binomtest

    decided = []
    for label in labels:
        if label.answer.ranks is not None and len(label.order) > 1:
            first, last = label.answer.ranks[label.order[0]], label.answer.ranks[label.order[-1]]
            decided += [first < last] if first != last else []
    found = share(sum(decided), len(decided))
    return found | {"p_value": float(binomtest(sum(decided), len(decided)).pvalue) if decided else None}


def length(labels: Iterable[Label]) -> dict[str, Any]:
    """Of answers that put the longest and the shortest candidate into different tiers, how many prefer the longest,
    averaged over the `n` items: what several people say of one item is no several pieces of evidence.

    It may be longer because it is better: this is a habit to know of, and no proof of a fault.
    """
    decided: dict[str, list[bool]] = defaultdict(list)
    for label in labels:
        if label.answer.ranks is None:
            continue
        sizes = [characters(candidate.text) for candidate in label.item.candidates]
        long, short = (label.answer.ranks[sizes.index(size)] for size in (max(sizes), min(sizes)))
        if min(sizes) < max(sizes) and long != short:
            decided[label.item.id].append(long < short)
    return share(sum(sum(each) / len(each) for each in decided.values()), len(decided))


def characters(text: Text) -> int:
    """How long a text or a conversation is."""
    return len(text) if isinstance(text, str) else sum(len(turn["content"]) for turn in text)


def undecided(labels: Iterable[Label]) -> dict[str, dict[str, Any]]:
    """`cant`: the share of comparisons and rankings that could not be made; `ties`: of those made, the share that put
    everything into one tier."""
    judged = [label.answer for label in labels if label.item.kind != "rate"]
    made = [answer.ranks for answer in judged if answer.ranks is not None]
    ties = sum(len(set(ranks)) == 1 for ranks in made)
    return {"cant": share(len(judged) - len(made), len(judged)), "ties": share(ties, len(made))}


def with_oneself(labels: Iterable[Label]) -> dict[str, Any]:
    """How alike a person's answers to a repeated item are to those that the person gave the time before."""
    given: dict[tuple[str, str], list[Label]] = defaultdict(list)
    for label in labels:
        given[label.person, label.item.id].append(label)
    alike = []
    for several in given.values():
        several.sort(key=lambda label: label.repeat)
        alike += [likeness(a.answer, b.answer) for a, b in pairwise(several)]
    return share(sum(alike), len(alike))


def with_gold(labels: Iterable[Label]) -> dict[str, Any]:
    """How alike answers are to the known ones, on the items that have one."""
    alike = [likeness(label.answer, label.item.gold) for label in labels if label.item.gold is not None]
    return share(sum(alike), len(alike))


def with_others(labels: Sequence[Label]) -> dict[str, dict[str, Any]]:
    """By person, how alike the answers are to those of everybody else to the same items, over pairs of answers. People
    without anybody to agree with are left out."""
    by_item: dict[str, dict[str, Answer]] = defaultdict(dict)
    for label in labels:
        if label.answer.comparable and not label.repeat:
            by_item[label.item.id].setdefault(label.person, label.answer)
    found: dict[str, list[float]] = defaultdict(list)
    for answers in by_item.values():
        for person, own in answers.items():
            # One number for each item: those of several others on one item say much the same.
            alike = [likeness(own, theirs) for other, theirs in answers.items() if other != person]
            if alike:
                found[person].append(sum(alike) / len(alike))
    return {person: share(sum(alike), len(alike)) for person, alike in sorted(found.items())}


def times(labels: Iterable[Label]) -> dict[str, Any]:
    """Seconds an answer: {"median", "edges", "counts"}; times of 0, which nobody took, are left out."""
    seconds = [label.ms / 1000 for label in labels if label.ms > 0]
    counts = [0] * (len(EDGES) - 1)
    for second in seconds:
        counts[min(sum(second >= edge for edge in EDGES[1:]), len(counts) - 1)] += 1
    return {"median": numbers.median(seconds) if seconds else None, "edges": list(EDGES), "counts": counts}


def source_name(candidate: Candidate) -> str:
    """What a candidate's model is called: the `name` of its source, or its `model` and `step`; "" if it has neither."""
    source = candidate.source
    if source.get("name"):
        return str(source["name"])
    model = str(source.get("model") or "")
    return f"{model}@{source['step']}" if model and source.get("step") is not None else model


def tiers(labels: Iterable[Label]) -> dict[str, list[int]]:
    """By model, how many answers put it into the first tier, the second, and so on; an item's tiers are its own."""
    counts: dict[str, list[int]] = {}
    for label in labels:
        for candidate, rank in zip(label.item.candidates, label.answer.ranks or (), strict=False):
            if name := source_name(candidate):
                row = counts.setdefault(name, [])
                row += [0] * (rank - len(row))
                row[rank - 1] += 1
    most = max(map(len, counts.values()), default=0)
    return {name: row + [0] * (most - len(row)) for name, row in sorted(counts.items())}
