"""Best-of-n: its estimator, pass@k, and how far it strays."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr

from plaudit.statistics import best_of_n, best_of_n_divergence, pass_at_k


def test_best_of_n_by_hand() -> None:
    assert best_of_n([1.0, 5.0, 3.0], 2) == pytest.approx((3 + 5 + 5) / 3)
    assert best_of_n([1.0, 5.0, 3.0], 3) == 5
    assert best_of_n([1.0, 5.0, 3.0], 1) == 3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.data())
def test_b17_the_estimate_is_the_mean_over_all_subsets(rewards: list[float], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(rewards)))
    subsets = [max(subset) for subset in itertools.combinations(rewards, n)]
    assert best_of_n(rewards, n) == pytest.approx(math.fsum(subsets) / len(subsets), abs=1e-10)


@pytest.mark.parametrize(
    ("successes", "trials", "k"), [(0, 5, 2), (2, 5, 2), (4, 5, 2), (5, 5, 5), (1, 6, 6), (3, 7, 1)]
)
def test_b17_pass_at_k_is_the_mean_over_all_subsets(successes: int, trials: int, k: int) -> None:
    outcomes = [1] * successes + [0] * (trials - successes)
    subsets = [max(subset) for subset in itertools.combinations(outcomes, k)]
    assert pass_at_k(successes, trials, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-10)
    assert pass_at_k(successes, trials, k) == pytest.approx(best_of_n(outcomes, k), abs=1e-10)


def test_what_cannot_be_estimated() -> None:
    for n in (0, 4):
        with pytest.raises(ValueError, match=rf"the best of {n} cannot be estimated from 3 rewards"):
            best_of_n([1, 2, 3], n)
    for arguments in ((4, 3, 1), (-1, 3, 1), (1, 3, 4), (1, 3, 0)):
        with pytest.raises(ValueError, match="cannot be estimated"):
            pass_at_k(*arguments)


@pytest.mark.parametrize("n", range(2, 65))
def test_b16_the_best_of_n_strays_no_further_than_the_bound(n: int) -> None:
    policy = np.random.default_rng(n).dirichlet(np.ones(12))  # answers in the order of their reward
    whole = np.cumsum(policy)
    best = whole**n - (whole - policy) ** n
    assert best.sum() == pytest.approx(1, abs=1e-12)
    divergence = float(rel_entr(best, policy).sum())
    assert 0 < divergence <= best_of_n_divergence(n) == math.log(n) - (n - 1) / n
    beaten = float((best * (whole - policy / 2)).sum())  # ties half
    assert 0.5 < beaten <= n / (n + 1)
    fine = np.full(100_000, 1e-5)  # where no two answers are worth the same, both bounds are met
    whole = np.cumsum(fine)
    best = whole**n - (whole - fine) ** n
    assert float(rel_entr(best, fine).sum()) == pytest.approx(best_of_n_divergence(n), abs=1e-3)
    assert float((best * (whole - fine / 2)).sum()) == pytest.approx(n / (n + 1), abs=1e-4)


def test_the_estimate_is_that_of_samples_of_the_pmf() -> None:
    rewards = np.random.default_rng(0).choice(4, size=(2_000, 8), p=[0.4, 0.3, 0.2, 0.1]).astype(float)
    whole = np.cumsum([0.4, 0.3, 0.2, 0.1])
    expected = float((np.arange(4) * (whole**3 - (whole - [0.4, 0.3, 0.2, 0.1]) ** 3)).sum())
    assert np.mean([best_of_n(row, 3) for row in rewards]) == pytest.approx(expected, abs=0.03)
