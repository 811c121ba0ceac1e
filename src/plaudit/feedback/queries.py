"""Which of many questions are worth a person's time, how likely each was to be asked, and when to ask how many.

Each choice says with what probability every chosen question was to be chosen, given the candidates: 1 where the choice
left nothing to chance. Logged with the answers, that is what weighting by inverse propensity needs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Schedule = Literal["constant", "hyperbolic", "annealed"]


class Chosen(NamedTuple):
    """`indices` (count,) of the candidates to ask, the most wanted first; `propensities` (count,) of being chosen."""

    indices: NDArray[np.int64]
    propensities: Array


def random(candidates: int, count: int, rng: np.random.Generator) -> Chosen:
    """Any `count` of the candidates, each with probability count / candidates. Raises ValueError for too few."""
    return _mixed(np.zeros(candidates), count, rng, share=1.0)


def disagreement(differences: ArrayLike, count: int, rng: np.random.Generator, share: float = 0.0) -> Chosen:
    """Where the members of an ensemble disagree most: the largest variance over members of sigma(difference)
    (Christiano et al. 2017, arXiv:1706.03741, section 2.2.4, where 10 candidates are sampled for each question).

    `differences` (members, candidates) are each member's score of the first answer less that of the second. A `share`
    of the questions is drawn from all the others at random. Raises ValueError for too few candidates.
    """
    sure = 0.5 * (1 + np.tanh(0.5 * np.asarray(differences, np.float64)))
    return _mixed(sure.var(0), count, rng, share)


def margin(differences: ArrayLike, count: int, rng: np.random.Generator, share: float = 0.0) -> Chosen:
    """Where the ensemble as a whole can't tell: the smallest absolute mean difference (uncertainty sampling, Lewis and
    Gale 1994). Arguments as in `disagreement`."""
    return _mixed(-np.abs(np.asarray(differences, np.float64).mean(0)), count, rng, share)


def coverage(features: ArrayLike, asked: ArrayLike, count: int, rng: np.random.Generator, share: float = 0.0) -> Chosen:
    """What is least like anything asked before: candidates whose prompt was asked least often first, and among these
    the farthest from all that were asked or are chosen already (farthest-first traversal, Gonzalez 1985).

    features  (candidates, d), such as `hashed_ngrams` of the prompts
    asked     (candidates,) how often each candidate's prompt was asked before
    """
    points, before = np.asarray(features, np.float64), np.asarray(asked, np.float64)
    if len(points) != len(before):
        raise ValueError(f"{len(points)} rows of features do not fit {len(before)} candidates")
    order = _farthest_first(points, before, _enough(len(points), count))
    wanted = np.full(len(points), -1.0)
    wanted[order] = np.arange(len(order), 0, -1)
    return _mixed(wanted, count, rng, share)


def _farthest_first(points: Array, asked: Array, count: int) -> list[int]:
    """Squared distances to the nearest known point are kept up as points become known; the first, where nothing is
    known, is the one nearest to the middle."""
    known = points[asked > 0]
    squares = (points**2).sum(1)
    if len(known):
        near = np.min([squares - 2 * points @ one + one @ one for one in known], axis=0)
    else:
        near = -((points - points.mean(0)) ** 2).sum(1)
    left, order = np.ones(len(points), bool), []
    for number in range(count):
        least = left & (asked == asked[left].min())
        best = int(np.flatnonzero(least)[np.argmax(near[least])])
        order.append(best)
        left[best] = False
        away = squares - 2 * points @ points[best] + squares[best]
        near = away if number == 0 and not len(known) else np.minimum(near, away)
    return order


def hashed_ngrams(texts: Sequence[str], width: int = 512) -> Array:
    """(texts, width) counts of words and of pairs of words, hashed to columns, in rows of length 1 (Weinberger et al.
    2009, arXiv:0902.2206); a text without words is a row of zeros."""
    rows = np.zeros((len(texts), width))
    for row, text in zip(rows, texts, strict=True):
        words = text.lower().split()
        for gram in (*words, *(" ".join(pair) for pair in pairwise(words))):
            row[zlib.crc32(gram.encode()) % width] += 1
    lengths: Array = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.maximum(lengths, 1e-12)
    return rows


def _mixed(wanted: Array, count: int, rng: np.random.Generator, share: float) -> Chosen:
    """The most wanted, and round(share x count) drawn evenly from all the others: the first have propensity 1, the
    others drawn / left. Of equally wanted ones the earlier is taken."""
    if not 0 <= share <= 1:
        raise ValueError(f"the share of random questions lies between 0 and 1, not {share}")
    drawn = round(share * _enough(len(wanted), count))
    order = np.argsort(-wanted, kind="stable")
    best, others = order[: count - drawn], order[count - drawn :]
    lucky = rng.choice(others, drawn, replace=False) if drawn else others[:0]
    propensities = np.concatenate([np.ones(len(best)), np.full(drawn, drawn / max(len(others), 1))])
    return Chosen(np.concatenate([best, lucky]).astype(np.int64), propensities)


def _enough(candidates: int, count: int) -> int:
    """`count`, if there are so many candidates."""
    if not 0 <= count <= candidates:
        raise ValueError(f"{count} questions cannot be chosen from {candidates} candidates")
    return count


def query(method: str, propensity: float, **more: Any) -> dict[str, Any]:
    """What an `Item` keeps of how it came to be asked."""
    return {"method": method, "propensity": float(propensity), **more}


# -------------------------------------------------------------------------------------------------------- schedules


def due(schedule: Schedule, t: float, total: float, labels: int, *, first: float = 0.25, half: float = 0.2) -> int:
    """How many of `labels` should have been asked by time `t` of `total`: `first` of them before any training, the
    rest by the schedule, all of them at the end.

    constant    evenly
    hyperbolic  at a rate that falls as T0 / (t + T0), T0 being `half` of `total`: after that the rate is one half
                (Christiano et al. 2017, appendix A, with 25 % first)
    annealed    at a rate that falls as 0.01^(t / total), to a hundredth (the annealer of rl-teacher)

    Raises ValueError for a share outside [0, 1], a `total` or `half` that is not positive, or an unknown schedule.
    """
    if total <= 0 or half <= 0 or not 0 <= first <= 1:
        raise ValueError(f"a schedule needs total > 0, half > 0 and first from 0 to 1, not {total}, {half} and {first}")
    gone = min(max(t / total, 0.0), 1.0)
    if schedule == "constant":
        share = gone
    elif schedule == "hyperbolic":
        share = float(np.log1p(gone / half) / np.log1p(1 / half))
    elif schedule == "annealed":
        share = (1 - 0.01**gone) / 0.99
    else:
        raise ValueError(f"there is no schedule {schedule!r}")
    # Rounding errors must not leave one label out.
    return int(labels * (first + (1 - first) * share) + 1e-9)
