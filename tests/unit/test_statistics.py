import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from plaudit.statistics import (
    bootstrap,
    calibration,
    correlations,
    distinct_n,
    one_rater_accuracy,
    pair_probabilities,
    pairwise_accuracy,
    wilson,
    win_rate,
)

whole = st.integers(-4, 4)
quick = settings(max_examples=40, deadline=None)


def test_wilson_golden():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def test_wilson_ends_solve_the_score_equation():
    low, high = wilson(13.5, 40, confidence=0.9)
    for end in (low, high):
        assert abs(13.5 / 40 - end) / math.sqrt(end * (1 - end) / 40) == pytest.approx(1.6448536, abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="a share needs"):
        wilson(successes, n)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.76])
def test_wilson_coverage(share):
    """B22."""
    counts, times = np.unique(np.random.default_rng(0).binomial(200, share, 20_000), return_counts=True)
    inside = [wilson(int(count), 200)[0] <= share <= wilson(int(count), 200)[1] for count in counts]
    assert 0.93 <= (np.array(inside) * times).sum() / 20_000 <= 0.97


def test_win_rate_coverage():
    """B22: 20 % ties, a true rate of 0.65."""
    inside, draws = 0, np.random.default_rng(1).multinomial(200, (0.55, 0.2, 0.25), 1_000)
    for wins, ties, losses in draws:
        outcome = win_rate(np.repeat([1.0, 0.0, -1.0], [wins, ties, losses]), np.zeros(200))
        inside += outcome.low <= 0.65 <= outcome.high
    assert 0.93 <= inside / len(draws) <= 0.97


def test_bootstrap_coverage():
    """B22: the mean of a skewed quantity; 1,200 samples keep its own error below 0.7 percent."""
    samples = np.random.default_rng(2).gamma(4.0, 0.25, (1_200, 200))
    intervals = [bootstrap(sample, resamples=600) for sample in samples]
    assert 0.93 <= np.mean([low <= 1.0 <= high for low, high in intervals]) <= 0.97


def test_bootstrap_of_another_statistic_and_its_seed():
    values = np.random.default_rng(3).normal(size=201)
    low, high = bootstrap(values, np.median, resamples=2_000)
    assert low < np.median(values) < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(math.pi / 2 / 201), rel=0.35)
    assert bootstrap(values, np.median, resamples=500) == bootstrap(values, np.median, resamples=500)
    narrow = bootstrap(values, np.median, confidence=0.5, resamples=2_000)
    assert low < narrow.low < narrow.high < high


def test_win_rate_by_hand():
    result = win_rate([3, 2, 5, 1, 1, 0, 4, 4, 9], [1, 1, 4, 0, 0, 1, 4, 4, 2])
    assert (result.wins, result.losses, result.ties, result.n) == (6, 1, 2, 9)
    assert result.rate == pytest.approx(7 / 9)
    # Sign test without the ties: 2 P(X >= 6 of 7) = 2 (7 + 1) / 128.
    assert result.p_value == pytest.approx(16 / 128)


def test_win_rate_interval_is_that_of_resampling():
    a, b = np.random.default_rng(4).integers(0, 4, (2, 60))
    outcomes = np.sign(a - b) / 2 + 0.5
    drawn = np.random.default_rng(5).integers(0, 60, (100_000, 60))
    low, high = np.quantile(outcomes[drawn].mean(1), [0.025, 0.975])
    result = win_rate(a, b)
    assert (result.low, result.high) == pytest.approx((low, high), abs=1 / 120)


def test_win_rate_when_all_prompts_agree_is_not_certain():
    result = win_rate([1, 1, 1, 1, 1], [0, 0, 0, 0, 0])
    assert (result.low, result.high, result.rate) == (*wilson(5, 5), 1.0)
    assert result.p_value == pytest.approx(2 / 32)
    ties = win_rate([1, 1, 1], [1, 1, 1])
    assert (ties.rate, ties.p_value) == (0.5, 1.0)
    assert ties.low == pytest.approx(1 - ties.high)


@quick
@given(st.lists(st.tuples(whole, whole), min_size=1, max_size=60))
def test_swapping_the_sides_flips_the_win_rate(pairs):
    a, b = zip(*pairs, strict=True)
    one, other = win_rate(a, b), win_rate(b, a)
    assert one.rate == pytest.approx(1 - other.rate)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low))
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)
    assert one.p_value == pytest.approx(other.p_value)
    assert one.low <= one.rate <= one.high


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0]), ([float("nan")], [1.0])])
def test_win_rate_refuses(a, b):
    with pytest.raises(ValueError, match="a win rate needs"):
        win_rate(a, b)


def test_calibration_by_hand():
    result = calibration([0.1, 0.3, 0.9, 0.7, 1.0], [0.0, 1.0, 1.0, 0.5, 1.0], bins=2)
    assert result.table == [
        {"confidence": pytest.approx(0.2), "observed": pytest.approx(0.5), "count": 2},
        {"confidence": pytest.approx(2.6 / 3), "observed": pytest.approx(2.5 / 3), "count": 3},
    ]
    assert result.error == pytest.approx((2 * 0.3 + 3 * (0.1 / 3)) / 5)


def test_calibration_of_the_truth_and_of_overconfidence():
    chance = np.random.default_rng(6).uniform(size=50_000)
    outcome = np.random.default_rng(7).uniform(size=50_000) < chance
    assert calibration(chance, outcome).error < 0.01
    sharpened = chance**3 / (chance**3 + (1 - chance) ** 3)
    assert calibration(sharpened, outcome).error > 0.1
    assert sum(row["count"] for row in calibration(chance, outcome).table) == 50_000


@pytest.mark.parametrize(
    ("probabilities", "outcomes"), [([], []), ([0.5], [0.5, 0.5]), ([1.1], [1]), ([0.1], [2]), ([math.nan], [1])]
)
def test_calibration_refuses(probabilities, outcomes):
    with pytest.raises(ValueError, match=r"outcome"):
        calibration(probabilities, outcomes)


def slow_pairwise(scores, targets, gap):
    right = pairs = 0
    for i, j in itertools.combinations(range(len(scores)), 2):
        if targets[i] == targets[j] or abs(targets[i] - targets[j]) < gap:
            continue
        pairs += 1
        product = (scores[i] - scores[j]) * (targets[i] - targets[j])
        right += 1 if product > 0 else 0.5 if product == 0 else 0
    return right, pairs


@quick
@given(st.lists(st.tuples(whole, whole), max_size=25), st.integers(0, 3))
def test_pairwise_accuracy_is_the_loop(items, gap):
    scores, targets = [item[0] for item in items], [item[1] for item in items]
    right, pairs = slow_pairwise(scores, targets, gap)
    accuracy, counted = pairwise_accuracy(scores, targets, gap)
    assert counted == pairs
    assert math.isnan(accuracy) if pairs == 0 else accuracy == pytest.approx(right / pairs)


@quick
@given(st.lists(st.tuples(whole, whole), min_size=2, max_size=25))
def test_only_the_order_of_scores_matters(items):
    scores, targets = np.array(items).T
    accuracy, pairs = pairwise_accuracy(scores, targets, 1)
    assert pairwise_accuracy(np.exp(scores), targets, 1) == pytest.approx((accuracy, pairs), nan_ok=True)
    assert pairwise_accuracy(-scores, targets, 1) == pytest.approx((1 - accuracy, pairs), nan_ok=True)
    assert pairwise_accuracy(scores, 3 * targets, 3) == pytest.approx((accuracy, pairs), nan_ok=True)


def test_a_gap_of_one_survives_rounding():
    assert 2.05 - 1.05 < 1
    assert pairwise_accuracy([1, 0], [2.05, 1.05], 1.0) == (1.0, 1)


def test_blocks_do_not_change_the_result(monkeypatch):
    scores, targets = np.random.default_rng(8).normal(size=(2, 90))
    ratings = np.random.default_rng(9).integers(-4, 5, (90, 6))
    scored, rated = pairwise_accuracy(scores, targets, 0.5), one_rater_accuracy(ratings, 1)
    monkeypatch.setattr("plaudit.statistics.CELLS", 500)
    assert pairwise_accuracy(scores, targets, 0.5) == pytest.approx(scored)
    assert one_rater_accuracy(ratings, 1) == pytest.approx(rated)


def test_pairwise_accuracy_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="each score needs its target"):
        pairwise_accuracy([1, 2], [1, 2, 3])


def test_correlations_by_hand_and_as_scipy_has_them():
    # Ranks 1, 3, 2 against 1, 2, 3: two of three places differ by one.
    found = correlations([0, 5, 1], [10, 20, 30])
    assert found == pytest.approx((0.5 / math.sqrt(7), 0.5), rel=1e-12)
    draw = np.random.default_rng(3)
    scores, targets = draw.normal(size=50), draw.integers(0, 4, size=50)
    expected = pearsonr(scores, targets).statistic, spearmanr(scores, targets).statistic
    assert correlations(scores, targets) == pytest.approx(expected, rel=1e-9)
    assert correlations(scores, -3 * scores + 1) == pytest.approx((-1, -1))
    for nothing in (([1, 1], [0, 1]), ([0, 1], [2, 2]), ([1], [2]), ([], [])):
        assert correlations(*nothing) is None
    with pytest.raises(ValueError, match="each score needs its target"):
        correlations([1, 2], [1])


def slow_one_rater(ratings, gap):
    right = judged = 0
    for x, y in itertools.combinations(ratings, 2):
        if abs(np.mean(x) - np.mean(y)) < gap - 1e-9 or abs(np.mean(x) - np.mean(y)) < 1e-9:
            continue
        for k in range(min(len(x), len(y))):
            if len(x) < 2 or len(y) < 2:
                continue
            others = np.mean([*x[:k], *x[k + 1 :]]) - np.mean([*y[:k], *y[k + 1 :]])
            judged += 1
            right += 0.5 if x[k] == y[k] or abs(others) < 1e-9 else (x[k] > y[k]) == (others > 0)
    return right / judged if judged else math.nan


@quick
@given(st.lists(st.lists(whole, min_size=1, max_size=5), max_size=10), st.integers(0, 2))
def test_one_rater_is_the_loop(ratings, gap):
    assert one_rater_accuracy(ratings, gap).accuracy == pytest.approx(slow_one_rater(ratings, gap), nan_ok=True)


def test_one_rater_by_hand():
    # Two items; means 7/3 and 1. Rater 0 is right, rater 1 ties, rater 2 errs: others' means are 3 and 0, ...
    ratings = [[3, 1, 3], [1, 1, 1], [math.nan, math.nan, math.nan]]
    assert one_rater_accuracy(ratings, 1) == (pytest.approx(2.5 / 3), 1)
    assert one_rater_accuracy([[4, 4, 1], [0, 0, 2]], 1) == (pytest.approx(2 / 3), 1)
    assert one_rater_accuracy([[4, 4], [3, 4]], 1).pairs == 0


def test_one_rater_without_an_answer_is_left_out():
    assert one_rater_accuracy([[4, math.nan, 2], [0, 1, 1]], 1) == one_rater_accuracy([[4, 2], [0, 1]], 1) == (1.0, 1)


def test_one_rater_of_a_thousand_items_by_a_simulation():
    truth = np.random.default_rng(10).normal(0, 2, (1_000, 1))
    ratings = truth + np.random.default_rng(11).normal(0, 1, (1_000, 20))
    accuracy, pairs = one_rater_accuracy(ratings, 1)
    assert 0.9 < accuracy < 0.96
    assert pairs > 300_000
    exact = pairwise_accuracy(ratings[:, 0], ratings[:, 1:].mean(1), 1).accuracy
    assert accuracy == pytest.approx(exact, abs=0.01)


def test_pair_probabilities_by_hand():
    predicted, observed = pair_probabilities([1.0, 0.0, 7.0, 1.0], [[2, 0], [1], [math.nan], [0, 0, 1]])
    sigma = 1 / (1 + math.exp(-1))
    assert predicted == pytest.approx([sigma, 0.5, 1 - sigma])
    # {2, 0} against {1}; {2, 0} against {0, 0, 1}: 3 wins, 2 ties of 6; {1} against {0, 0, 1}: 2 wins, 1 tie of 3.
    assert observed == pytest.approx([0.5, 4 / 6, 2.5 / 3])


@quick
@given(st.lists(st.tuples(whole, st.lists(whole, min_size=1, max_size=4)), min_size=2, max_size=8))
def test_pair_probabilities_are_the_loop_and_fit_calibration(items):
    scores, ratings = [item[0] for item in items], [item[1] for item in items]
    predicted, observed = pair_probabilities(scores, ratings)
    for (i, j), p, share in zip(itertools.combinations(range(len(items)), 2), predicted, observed, strict=True):
        assert p == pytest.approx(1 / (1 + math.exp(scores[j] - scores[i])))
        judged = [(x > y) + 0.5 * (x == y) for x in ratings[i] for y in ratings[j]]
        assert share == pytest.approx(np.mean(judged))
    assert 0 <= calibration(predicted, observed).error <= 1


def test_distinct_by_hand():
    texts = ["a b a b", "a b c", "d"]
    assert distinct_n(texts, 1) == pytest.approx(4 / 8)
    assert distinct_n(texts, 2) == pytest.approx(3 / 5)
    assert distinct_n(["one two"], 3) == 0.0


def test_import_loads_neither_scipy_nor_torch():
    loaded = "import sys, plaudit.statistics; print({'scipy', 'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
