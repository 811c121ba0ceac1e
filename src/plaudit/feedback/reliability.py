"""How far each person can be relied on, how strong the models are that were judged, and what several people say
together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from plaudit.feedback.habits import source_name
from plaudit.feedback.items import Answer, Label
from plaudit.feedback.kappas import FIRST, SECOND, Table, undetermined

Array = NDArray[np.float64]

RIGHT, WRONG = 10.0, 1.0
"""The Beta prior of a reliability, that of Crowd-BT: as if a person had been seen right ten times and wrong once."""
SPREAD = 2.0
"""The median of the log-normal prior of the spread, in log-odds; its own spread is a factor e either way."""
NODES = np.linspace(-6, 6, 121)
"""Differences over their spread, at which the integral over them is summed: the trapezoidal rule, which for a Gaussian
weight converges faster than any power. Gauss-Hermite nodes are too sparse for a sigmoid where the spread is large."""


class Reliability(NamedTuple):
    """By person, the probability of seeing a comparison as it is rather than the other way round, and the standard
    deviation of the differences in log-odds between the two sides; `items` is how many comparisons say so."""

    people: dict[str, float]
    spread: float
    items: int


def reliability(table: Table) -> Reliability | None:
    """Bradley-Terry with annotator reliability: P(k prefers a to b) = eta_k sigma(d) + (1 - eta_k) sigma(-d).

    The model is that of Chen, Bennett, Collins-Thompson and Horvitz 2013 ("Pairwise ranking aggregation in a
    crowdsourced setting", WSDM, Crowd-BT), d being the difference of the two candidates' strengths. Where every item
    has candidates of its own, as here, there are as many differences as items, and fitting them beside eta would drive
    every eta to 1; so they are integrated out under d ~ N(0, spread^2), and eta and spread take their joint maximum a
    posteriori, the former in log-odds. A tie counts half for either side.

    None for ratings and where no two people answered the same. Each two candidates of a ranking count as a comparison.
    """
    if table.kind == "rate" or not len(table.items):
        return None
    from scipy.optimize import minimize
    from scipy.special import expit

    halves = np.where(table.decided == FIRST, 1.0, np.where(table.decided == SECOND, 0.0, 0.5))
    known = table.decided >= 0
    first, second = np.where(known, halves, 0.0), np.where(known, 1 - halves, 0.0)
    weights = np.exp(-(NODES**2) / 2)
    weights /= weights.sum()
    count = len(table.people)

    def loss(point: Array) -> tuple[float, Array]:
        """Minus the log posterior, and its gradient."""
        eta, spread = expit(point[:count])[:, None], np.exp(point[count])
        wins = expit(spread * NODES)
        sides = eta * wins + (1 - eta) * (1 - wins)
        logs = first @ np.log(sides) + second @ np.log1p(-sides)
        top = logs.max(1, keepdims=True)
        joint = np.exp(logs - top) * weights
        evidence = joint.sum(1, keepdims=True)
        after = joint / evidence
        slope = (first.T @ after) / sides - (second.T @ after) / (1 - sides)
        by_eta = (slope * (2 * wins - 1)).sum(1) * (eta * (1 - eta))[:, 0]
        by_spread = ((slope * (2 * eta - 1)).sum(0) * wins * (1 - wins) * NODES).sum() * spread
        away = point[count] - np.log(SPREAD)
        prior = (RIGHT * np.log(eta) + WRONG * np.log1p(-eta)).sum() - away**2 / 2
        slopes = np.append(by_eta + RIGHT - (RIGHT + WRONG) * eta[:, 0], by_spread - away)
        return float(-(np.log(evidence) + top).sum() - prior), -slopes

    start = np.append(np.full(count, np.log(RIGHT / WRONG)), np.log(SPREAD))
    bounds = [(-12.0, 12.0)] * count + [(-4.0, 4.0)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    eta = expit(found[:count])
    return Reliability(dict(zip(table.people, map(float, eta), strict=True)), float(np.exp(found[count])), len(first))


# -------------------------------------------------------------------------------------------------------- strengths


def strengths(labels: Iterable[Label], seed: int = 0, resamples: int = 200) -> dict[str, Any]:
    """Bradley-Terry strengths (Bradley and Terry 1952) of the models that were judged, by the name of their source.

    {"models": {name: {"value", "low", "high", "why", "comparisons"}}, "why"}: log strengths with mean 0, fitted by
    choix (Maystre and Grossglauser 2015, I-LSR), ties half for each, with the percentile bootstrap over items. `why` is
    a sentence where they are not determined: a model that never lost to any of some others would be infinitely strong.
    A model's `why` says how many resamples are left out because they are so, and that there is no interval (None) where
    they are too many.
    """
    items: dict[str, list[Label]] = {}
    for label in labels:
        if label.answer.ranks is not None and not label.repeat:
            items.setdefault(label.item.id, []).append(label)
    wins, names = _wins(items.values())
    if len(names) < 2:
        return {"models": {}, "why": "The candidates do not say which models they come from, or there is only one."}
    total = wins.sum(0).reshape(len(names), -1)
    why = _undetermined(total, names)
    if why:
        return {"models": {}, "why": why}
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        weights = np.bincount(rng.integers(len(wins), size=len(wins)), minlength=len(wins))
        again = (weights @ wins).reshape(len(names), -1)
        if not _undetermined(again, names):
            drawn.append(_fitted(again))
    why, enough = undetermined(resamples - len(drawn), resamples)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0).tolist() if enough else ([None] * len(names),) * 2
    figures = zip(names, _fitted(total).tolist(), low, high, (total + total.T).sum(1).tolist(), strict=True)
    models = {
        name: {"value": value, "low": a, "high": b, "why": why, "comparisons": round(met)}
        for name, value, a, b, met in sorted(figures, key=lambda row: -row[1])
    }
    return {"models": models, "why": ""}


def _wins(items: Iterable[Sequence[Label]]) -> tuple[Array, list[str]]:
    """(items, models^2) how often each model beat each other one on each item, ties half; and the models' names."""
    found: list[list[tuple[str, str, float]]] = []
    for labels in items:
        sources = [source_name(candidate) for candidate in labels[0].item.candidates]
        rows = []
        for label in labels:
            for (a, rank), (b, other) in combinations(zip(sources, label.answer.ranks or (), strict=True), 2):
                if a and b and a != b:
                    rows.append((a, b, 0.5 + 0.5 * ((rank < other) - (rank > other))))
        found.append(rows)
    names = sorted({name for rows in found for a, b, _ in rows for name in (a, b)})
    place = {name: index for index, name in enumerate(names)}
    wins = np.zeros((len(found), len(names), len(names)))
    for item, rows in zip(wins, found, strict=True):
        for a, b, won in rows:
            item[place[a], place[b]] += won
            item[place[b], place[a]] += 1 - won
    return wins.reshape(len(found), len(names) ** 2), names


def _undetermined(wins: Array, names: Sequence[str]) -> str:
    """A sentence if the strengths have no finite estimate (Ford 1957): some models never lost to, or never met, the
    others."""
    from scipy.sparse.csgraph import connected_components

    parts, member = connected_components(wins > 0, connection="strong")
    if parts == 1:
        return ""
    for part in range(parts):
        inside = member == part
        if not wins[np.ix_(~inside, inside)].any():
            who = " and ".join(name for name, within in zip(names, inside, strict=True) if within)
            return f"Nothing beat {who} or met it from outside, so that strengths have no finite estimate yet."
    raise AssertionError("one part of several has no way in")


def _fitted(wins: Array) -> Array:
    import choix

    # By default it gives up after 100 steps; a cycle of uneven wins can take thousands.
    strength: Array = choix.ilsr_pairwise_dense(wins, max_iter=100_000)
    strength -= strength.mean()
    return strength


# -------------------------------------------------------------------------------------------------------- consensus


def consensus(answers: Sequence[Answer]) -> Answer | None:
    """What several people say of one item together; None if nobody could compare.

    Ranks are by the mean rank (Borda 1784): for two candidates that is the majority, and a tie where there is none. It
    treats people and candidates alike and knows ties. A rating is the mean of the ratings.
    """
    ranks = [answer.ranks for answer in answers if answer.ranks is not None]
    ratings = [answer.rating for answer in answers if answer.rating is not None]
    if ratings:
        return Answer(rating=sum(ratings) / len(ratings))
    if not ranks:
        return None
    # Places count ties by their middle, so that many tiers or few do not make an answer weigh more.
    sums = [sum(_borda(given)[place] for given in ranks) for place in range(len(ranks[0]))]
    order = {score: tier for tier, score in enumerate(sorted(set(sums), reverse=True), 1)}
    return Answer(ranks=tuple(order[score] for score in sums))


def _borda(ranks: Sequence[int]) -> list[int]:
    """How many candidates each beats, less how many beat it."""
    return [sum((rank < other) - (rank > other) for other in ranks) for rank in ranks]
