"""Which questions are asked, with what probability, and when."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import expit

from plaudit.feedback import queries


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_disagreement_is_the_variance_of_the_predicted_preference():
    # Members differ most in their scores on the first, but all of them are sure there.
    differences = np.array([[9.0, 1.0, 0.1, -2.0], [4.0, -1.0, 0.1, -2.0], [6.0, 0.0, 0.1, -2.0]])
    assert expit(differences).var(0).argmax() == 1
    assert differences.var(0).argmax() == 0
    chosen = queries.disagreement(differences, 2, rng())
    assert chosen.indices.tolist() == np.argsort(-expit(differences).var(0))[:2].tolist() == [1, 0]
    assert chosen.propensities.tolist() == [1, 1]


def test_margin_is_of_the_mean():
    differences = np.array([[3.0, 1.0, 0.2], [-3.0, 1.0, 0.4]])
    assert queries.margin(differences, 2, rng()).indices.tolist() == [0, 2]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_propensities_are_how_often_each_is_chosen(share):
    """Over all draws: the stated propensity of a candidate is the frequency with which it is chosen."""
    differences = rng(1).normal(size=(3, 12)) * 3
    counts, stated = np.zeros(12), np.zeros(12)
    for seed in range(3000):
        chosen = queries.disagreement(differences, 4, rng(seed), share)
        assert len(set(chosen.indices.tolist())) == 4
        counts[chosen.indices] += 1
        stated[chosen.indices] = chosen.propensities
    assert counts / 3000 == pytest.approx(stated, abs=0.03)
    assert stated.sum() == pytest.approx(4)
    assert (stated > 0).all() == (share > 0)


def test_random_has_the_propensity_of_a_lottery():
    chosen = queries.random(20, 5, rng())
    assert chosen.propensities.tolist() == [0.25] * 5
    assert sorted(set(chosen.indices.tolist())) == sorted(chosen.indices.tolist())
    assert queries.random(20, 5, rng(1)).indices.tolist() != chosen.indices.tolist()


def test_ties_go_to_the_earlier():
    assert queries.margin(np.zeros((2, 6)), 3, rng()).indices.tolist() == [0, 1, 2]


@given(st.integers(3, 12), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_coverage_takes_the_farthest(candidates, count, seed):
    """By brute force: each is as far from those before it as any candidate is, among those asked least often."""
    points = rng(seed).normal(size=(candidates, 2))
    asked = rng(seed).integers(0, 2, candidates)
    order = queries.coverage(points, asked, count, rng()).indices.tolist()
    known = [i for i in range(candidates) if asked[i]]
    for place, index in enumerate(order):
        left = [i for i in range(candidates) if i not in order[:place]]
        least = [i for i in left if asked[i] == min(asked[j] for j in left)]
        assert index in least
        before = known + order[:place]
        if before:
            near = {i: min(np.linalg.norm(points[i] - points[j]) for j in before) for i in least}
            assert near[index] == pytest.approx(max(near.values()), abs=1e-6)


def test_coverage_of_texts_leaves_the_same_prompt_for_last():
    texts = ["boil an egg", "boil an egg", "boil one egg", "name a river in Peru", "what is a nat"]
    features = queries.hashed_ngrams(texts)
    assert np.linalg.norm(features, axis=1) == pytest.approx(1)
    assert (features[0] == features[1]).all()
    assert features[0] @ features[2] > features[0] @ features[3]
    order = queries.coverage(features, [0] * 5, 5, rng()).indices.tolist()
    assert {order[-1]} <= {0, 1}
    assert not {0, 1} <= set(order[:4])
    assert queries.coverage(features, [3, 3, 0, 0, 0], 3, rng()).indices.tolist()[0] in (3, 4)


def test_nothing_that_is_not_there_is_chosen():
    with pytest.raises(ValueError, match="5 questions cannot be chosen from 4"):
        queries.random(4, 5, rng())
    with pytest.raises(ValueError, match="between 0 and 1"):
        queries.margin(np.zeros((2, 4)), 2, rng(), share=1.5)
    with pytest.raises(ValueError, match="do not fit"):
        queries.coverage(np.zeros((3, 2)), [0, 0], 1, rng())


# --------------------------------------------------------------------------------------------------------- schedules

RATES = {
    "constant": lambda t: 1.0,
    "hyperbolic": lambda t: 0.2 / (t + 0.2),
    "annealed": lambda t: 0.01**t,
}


@pytest.mark.parametrize("schedule", RATES)
def test_labels_come_at_the_rate_of_the_schedule(schedule):
    whole = quad(RATES[schedule], 0, 1)[0]
    for t in (0, 13, 50, 99, 100):
        wanted = 1000 * (0.25 + 0.75 * quad(RATES[schedule], 0, t / 100)[0] / whole)
        assert queries.due(schedule, t, 100, 1000) == pytest.approx(wanted, abs=1)


@pytest.mark.parametrize(("schedule", "first"), list(itertools.product(RATES, [0.0, 0.25, 1.0])))
def test_schedules_begin_with_the_first_share_and_leave_nothing(schedule, first):
    due = [queries.due(schedule, t, 70, 333, first=first) for t in range(-1, 75)]
    assert due[0] == due[1] == int(333 * first)
    assert due[-1] == due[71] == 333
    assert due == sorted(due)


def test_the_annealer_of_rl_teacher():
    """Its cumulative share is p + (1 - p)(1 - 0.01^(t/T)), which ends at 0.99 of the rest and not at all of it."""
    for t in (10, 40, 80):
        theirs = 0.25 + 0.75 * (1 - 0.01 ** (t / 100))
        assert queries.due("annealed", t, 100, 10**6) / 10**6 == pytest.approx(theirs, rel=0.01)


def test_schedules_refuse_nonsense():
    with pytest.raises(ValueError, match="no schedule"):
        queries.due("sometimes", 1, 10, 100)
    with pytest.raises(ValueError, match="needs total > 0"):
        queries.due("constant", 1, 0, 100)
