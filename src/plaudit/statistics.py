"""What evaluation reports: rates with intervals, agreement with people, calibration, variety of texts.

Pure functions of numbers and strings. scipy is imported where it is used, because it takes longer to load than all of
this takes to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

# Means of ratings carry rounding errors: 2.05 - 1.05 is a little less than 1, and must still be a gap of 1.
TOLERANCE = 1e-9
CELLS = 4_000_000  # of a temporary array, so that memory stays bounded however many items are compared


class Interval(NamedTuple):
    low: float
    high: float


class Correlations(NamedTuple):
    """Pearson's of the values, Spearman's of their ranks."""

    pearson: float
    spearman: float


class PairAccuracy(NamedTuple):
    """`accuracy` is the share of `pairs` put in the right order, ties half; NaN if there are no pairs."""

    accuracy: float
    pairs: int


@dataclass(frozen=True)
class WinRate:
    """How often a beats b on n prompts, ties half; `low` and `high` bound `rate`; `p_value` is two-sided."""

    rate: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    n: int
    p_value: float


@dataclass(frozen=True)
class Calibration:
    """`error`: expected calibration error; `table`: a row {"confidence", "observed", "count"} per bin in use."""

    error: float
    table: list[dict[str, float]]


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share (Wilson 1927; Brown, Cai and DasGupta 2001, equation 4).

    `successes` may be fractional, where a tie is half a success. Raises ValueError unless 0 <= successes <= n, n > 0.
    """
    from scipy.stats import norm

    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"a share needs 0 <= successes <= n and n > 0, not {successes} of {n}")
    z = float(norm.ppf((1 + confidence) / 2))
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    return Interval(0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval (Efron 1979) of `statistic(values, axis=...)` over `values` (n,), n >= 2."""
    from scipy import stats

    sample = np.asarray(values, dtype=np.float64)
    result = stats.bootstrap(
        (sample,),
        statistic,
        n_resamples=resamples,
        batch=max(1, CELLS // len(sample)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(result.low), float(result.high))


def win_rate(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> WinRate:
    """Win rate of `a` over `b`, two scores (n,) of the same n prompts, higher being better.

    The interval is the percentile bootstrap over prompts, and the p-value that of the exact sign test, which leaves
    ties out. Raises ValueError if the lengths differ, there are no prompts, or a score is not a number.
    """
    from scipy.stats import binomtest

    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"a win rate needs two scores of each prompt, not shapes {first.shape} and {second.shape}")
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("a win rate needs numbers, and some scores are NaN")
    n = len(first)
    wins, losses = int((first > second).sum()), int((first < second).sum())
    ties = n - wins - losses
    low, high = _bootstrap_of_rate(wins, ties, losses, confidence)
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return WinRate((wins + ties / 2) / n, low, high, wins, losses, ties, n, p_value)


def _bootstrap_of_rate(wins: int, ties: int, losses: int, confidence: float) -> Interval:
    """The percentile interval that infinitely many resamples of the n outcomes would give.

    Twice the rate of a resample is a sum of n draws from {0, 1, 2}; its distribution is the n-th power of one draw's,
    which a Fourier transform takes exactly, so no random numbers are needed.
    """
    n = wins + ties + losses
    if n in (wins, ties, losses):  # all alike: resamples cannot vary, yet n prompts do not make certainty
        return wilson(wins + ties / 2, n, confidence)
    one = np.zeros(2 * n + 1)
    one[:3] = np.array([losses, ties, wins]) / n
    mass = np.fft.irfft(np.fft.rfft(one) ** n, 2 * n + 1)
    tail = (1 - confidence) / 2
    low = int(np.searchsorted(np.cumsum(mass), tail))
    high = 2 * n - int(np.searchsorted(np.cumsum(mass[::-1]), tail))
    return Interval(low / (2 * n), high / (2 * n))


def calibration(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> Calibration:
    """Reliability table and expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3).

    `probabilities` (n,) lie in [0, 1] and fall into `bins` of equal width; `outcomes` (n,) are 0 or 1, or the share
    of people for whom it was 1. Raises ValueError if lengths differ, nothing is given or a value lies outside [0, 1].
    """
    predicted, happened = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if predicted.shape != happened.shape or predicted.ndim != 1 or not len(predicted):
        raise ValueError(f"each probability needs its outcome, not shapes {predicted.shape} and {happened.shape}")
    both = np.stack([predicted, happened])
    if not ((both >= 0) & (both <= 1)).all():
        raise ValueError("probabilities and outcomes lie between 0 and 1")
    where = np.minimum((predicted * bins).astype(np.int64), bins - 1)
    counts = np.bincount(where, minlength=bins)
    sums = np.stack([np.bincount(where, weights=row, minlength=bins) for row in both])
    used = counts > 0
    confidence, observed = sums[:, used] / counts[used]
    error = float((counts[used] * np.abs(confidence - observed)).sum() / len(predicted))
    table = [
        {"confidence": float(c), "observed": float(o), "count": int(k)}
        for c, o, k in zip(confidence, observed, counts[used], strict=True)
    ]
    return Calibration(error, table)


def pairwise_accuracy(scores: ArrayLike, targets: ArrayLike, minimum_gap: float = 0.0) -> PairAccuracy:
    """Share of pairs that `scores` (n,) put in the order of `targets` (n,), equal scores counting half.

    All pairs whose targets differ by at least `minimum_gap` count; pairs of equal targets never do.
    Raises ValueError if the lengths differ.
    """
    score, target = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if score.shape != target.shape or score.ndim != 1:
        raise ValueError(f"each score needs its target, not shapes {score.shape} and {target.shape}")
    right, pairs = 0.0, 0
    for better, worse in _pairs(target, minimum_gap, width=1):
        right += float((score[better] > score[worse]).sum()) + 0.5 * float((score[better] == score[worse]).sum())
        pairs += len(better)
    return PairAccuracy(right / pairs if pairs else float("nan"), pairs)


def correlations(scores: ArrayLike, targets: ArrayLike) -> Correlations | None:
    """How well `scores` (n,) follow `targets` (n,); None where either is constant, which follows nothing.

    Raises ValueError if the lengths differ.
    """
    from scipy.stats import rankdata

    score, target = np.asarray(scores, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    if score.shape != target.shape or score.ndim != 1:
        raise ValueError(f"each score needs its target, not shapes {score.shape} and {target.shape}")
    if len(score) < 2 or np.ptp(score) == 0 or np.ptp(target) == 0:
        return None
    ranks = rankdata(score), rankdata(target)
    return Correlations(float(np.corrcoef(score, target)[0, 1]), float(np.corrcoef(*ranks)[0, 1]))


def one_rater_accuracy(ratings: Sequence[Sequence[float]] | ArrayLike, minimum_gap: float = 0.0) -> PairAccuracy:
    """How well one rater orders pairs as the mean of the others does: the human mark for `pairwise_accuracy`.

    `ratings[i][k]` is what person k said of item i; lists may be shorter, and NaN means that k did not answer.
    The pairs are those whose means over all raters differ by at least `minimum_gap`. A rater counts for a pair whose
    two items they and somebody else rated; their own tie, or one of the others' mean, counts half.
    The accuracy is the mean over all raters and pairs; `pairs` counts each pair once.
    """
    table = _table(ratings)
    given = ~np.isnan(table)
    said = np.where(given, table, 0.0)
    totals, counts = said.sum(1, keepdims=True), given.sum(1, keepdims=True)
    others = (totals - said) / np.maximum(counts - given, 1)
    usable = given & (counts > 1)
    mean = np.where(counts[:, 0] > 0, totals[:, 0] / np.maximum(counts[:, 0], 1), np.nan)
    right, judged, pairs = 0.0, 0, 0
    for better, worse in _pairs(mean, minimum_gap, width=table.shape[1]):
        both = usable[better] & usable[worse]
        agree = _sign(said[better] - said[worse]) * _sign(others[better] - others[worse])
        right += float(((1 + agree) / 2)[both].sum())
        judged += int(both.sum())
        pairs += int(both.any(1).sum())
    return PairAccuracy(right / judged if judged else float("nan"), pairs)


def pair_probabilities(scores: ArrayLike, ratings: Sequence[Sequence[float]] | ArrayLike) -> tuple[Array, Array]:
    """For every pair of items i < j: sigma(s_i - s_j), and the share of people who would put i first.

    `scores` (n,), `ratings` as in `one_rater_accuracy`. The share is over all pairs of one rating of i and one of j,
    ties half. Both results are (n (n - 1) / 2,), ready for `calibration`; items without ratings are left out.
    """
    table = _table(ratings)
    rated = ~np.isnan(table).all(1)
    score, table = np.asarray(scores, dtype=np.float64)[rated], table[rated]
    levels = np.unique(table[~np.isnan(table)])
    # Shares of each item's ratings that are equal to, and below (half of those equal), each level.
    equal = (table[:, :, None] == levels).sum(1) / (~np.isnan(table)).sum(1)[:, None]
    below = np.cumsum(equal, axis=1) - equal / 2
    first, second = np.triu_indices(len(score), k=1)
    predicted = 0.5 * (1 + np.tanh(0.5 * (score[first] - score[second])))
    # Rounding may leave a share an ulp outside [0, 1].
    return predicted, np.clip((equal @ below.T)[first, second], 0.0, 1.0)


def best_of_n(rewards: ArrayLike, n: int) -> float:
    """The unbiased estimate, from the rewards (N,) of N >= n completions of a prompt, of the best reward of n.

    It is the mean over all subsets of n of their largest: sum over i of C(i - 1, n - 1) / C(N, n) times the i-th
    smallest reward (Nakano et al. 2021, arXiv:2112.09332). Raises ValueError unless 1 <= n <= N.
    """
    ordered = np.sort(np.asarray(rewards, dtype=np.float64))
    count = len(ordered)
    if not 1 <= n <= count:
        raise ValueError(f"the best of {n} cannot be estimated from {count} rewards")
    whole = math.comb(count, n)
    return math.fsum(math.comb(i, n - 1) / whole * ordered[i] for i in range(n - 1, count))


def pass_at_k(successes: int, trials: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k completions succeeds, of which `successes` in `trials` did:
    1 - C(trials - successes, k) / C(trials, k) (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    Raises ValueError unless 0 <= successes <= trials and 1 <= k <= trials.
    """
    if not (0 <= successes <= trials and 1 <= k <= trials):
        raise ValueError(f"pass@{k} cannot be estimated from {successes} of {trials}")
    return 1 - math.comb(trials - successes, k) / math.comb(trials, k)


def best_of_n_divergence(n: int) -> float:
    """log n - (n - 1) / n: what KL(best of n || policy) is at most, in nats (Beirami et al. 2024, arXiv:2401.01879)."""
    return math.log(n) - (n - 1) / n


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of all texts (Li et al. 2016, arXiv:1510.03055), tokens split at whitespace.

    It falls as texts are added: compare equal numbers of texts. 0 if no text has n tokens.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    tokens = text.split()
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def _table(ratings: Sequence[Sequence[float]] | ArrayLike) -> Array:
    """(n, raters), NaN where nobody answered."""
    rows = [np.asarray(row, dtype=np.float64) for row in ratings]  # type: ignore[union-attr]
    table = np.full((len(rows), max((len(row) for row in rows), default=0)), np.nan)
    for place, row in zip(table, rows, strict=True):
        place[: len(row)] = row
    return table


def _sign(values: Array) -> Array:
    return np.where(np.abs(values) > TOLERANCE, np.sign(values), 0.0)


def _pairs(values: Array, minimum_gap: float, width: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Index arrays (better, worse) of all pairs at least `minimum_gap` apart, in blocks for rows `width` wide."""
    least = max(minimum_gap - TOLERANCE, TOLERANCE)
    block = max(1, CELLS // max(1, len(values) * width))
    for start in range(0, len(values), block):
        better, worse = np.nonzero(values[start : start + block, None] - values >= least)
        yield better + start, worse
