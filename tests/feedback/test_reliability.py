"""Who can be relied on, which model is stronger, and what several people say together: in worlds where it is known."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labelled import compared, item, label, rated
from scipy.special import expit

from plaudit.feedback import kappas
from plaudit.feedback.agreement import summary
from plaudit.feedback.items import Answer
from plaudit.feedback.reliability import consensus, reliability, strengths


def world(eta: dict[str, float], items: int, spread: float, overlap: int, seed: int) -> dict[str, str]:
    """Answers by the model: each item is asked of `overlap` people drawn at random."""
    rng = np.random.default_rng(seed)
    wins = expit(rng.normal(0, spread, items))
    answers = {person: [" "] * items for person in eta}
    for place in range(items):
        for person in rng.permutation(list(eta))[:overlap]:
            right = eta[person] * wins[place] + (1 - eta[person]) * (1 - wins[place])
            answers[person][place] = "12"[int(rng.random() >= right)]
    return {person: "".join(said) for person, said in answers.items()}


@pytest.mark.parametrize(
    ("eta", "spread", "overlap", "items"),
    [
        ({"a": 0.95, "b": 0.9, "c": 0.8, "d": 0.65, "e": 0.5}, 3.0, 5, 1000),
        ({"a": 0.95, "b": 0.85, "c": 0.7}, 3.0, 3, 2000),
        ({"a": 0.95, "b": 0.9, "c": 0.85, "d": 0.8, "e": 0.75}, 3.0, 3, 2000),
        ({"a": 0.95, "b": 0.9, "c": 0.9, "d": 0.2}, 4.0, 4, 1000),
    ],
    ids=["five people", "three people", "three of five", "one who answers the wrong way round"],
)
def test_reliabilities_are_found_again(eta, spread, overlap, items):
    """Within 0.08, about two standard errors and the little that the prior pulls where the spread is large."""
    table = kappas.table(compared(world(eta, items, spread, overlap, seed=2)), "compare")
    found = reliability(table)
    assert found.people == pytest.approx(eta, abs=0.08)
    assert found.spread == pytest.approx(spread, rel=0.6)
    assert found.items == items


def test_the_posterior_is_the_one_that_the_docstring_gives():
    """Its maximum over a grid, with the integral by brute force."""
    labels = compared({"ann": "1121=2112", "bob": "1122=2111"})
    table = kappas.table(labels, "compare")
    d = np.linspace(-40, 40, 8001)
    code = {kappas.FIRST: 1.0, kappas.EQUAL: 0.5, kappas.SECOND: 0.0}
    said = np.vectorize(code.get)(table.decided)

    def posterior(a: float, b: float, spread: float) -> float:
        weight = np.exp(-((d / spread) ** 2) / 2)
        weight /= weight.sum()
        total = 0.0
        for x, y in said:
            sides = [eta * expit(d) + (1 - eta) * expit(-d) for eta in (a, b)]
            given = sides[0] ** x * (1 - sides[0]) ** (1 - x) * sides[1] ** y * (1 - sides[1]) ** (1 - y)
            total += np.log((given * weight).sum())
        beta = sum(10 * np.log(eta) + np.log(1 - eta) for eta in (a, b))
        return total + beta - np.log(spread / 2) ** 2 / 2

    found = reliability(table)
    best = posterior(found.people["ann"], found.people["bob"], found.spread)
    for step in (0.98, 1.02):
        assert posterior(found.people["ann"] * step, found.people["bob"], found.spread) < best
        assert posterior(found.people["ann"], found.people["bob"] * step, found.spread) < best
        assert posterior(found.people["ann"], found.people["bob"], found.spread * step) < best


def test_ratings_and_strangers_have_no_reliability():
    assert reliability(kappas.table(rated([[1, 2], [1, 3]]), "rate")) is None
    assert reliability(kappas.table(compared({"ann": "12  ", "bob": "  12"}), "compare")) is None


# -------------------------------------------------------------------------------------------------------- strengths


def contests(rows):
    """(first model, second model, choice) each."""
    return [
        label(item(f"Item {i}", models=(a, b)), "ann", Answer({"1": (1, 2), "2": (2, 1), "=": (1, 1)}[choice]))
        for i, (a, b, choice) in enumerate(rows)
    ]


def test_strengths_of_two_models_are_the_log_odds():
    found = strengths(contests([("x", "y", "1")] * 6 + [("y", "x", "1")] * 2 + [("x", "y", "=")] * 2))["models"]
    assert found["x"]["value"] == pytest.approx(np.log(7 / 3) / 2)
    assert found["y"]["value"] == pytest.approx(-np.log(7 / 3) / 2)
    assert found["x"]["low"] < found["x"]["value"] < found["x"]["high"]
    assert found["x"]["comparisons"] == 10


def test_strengths_of_several_models_solve_the_likelihood_equations():
    """At the maximum every model has won as often as its strength would have it."""
    rng = np.random.default_rng(0)
    truth = {"w": 1.0, "x": 0.4, "y": -0.2, "z": -1.2}
    rows = []
    for a, b in itertools.combinations(truth, 2):
        rows += [(a, b, "12"[int(rng.random() > expit(truth[a] - truth[b]))]) for _ in range(400)]
    found = strengths(contests(rows), resamples=20)["models"]
    assert list(found) == list(truth)
    value = {name: row["value"] for name, row in found.items()}
    assert sum(value.values()) == pytest.approx(0)
    for name in truth:
        won = sum((a if choice == "1" else b) == name for a, b, choice in rows)
        expected = sum(expit(value[name] - value[b if a == name else a]) for a, b, _ in rows if name in (a, b))
        assert won == pytest.approx(expected, abs=0.01)
        assert found[name]["low"] < truth[name] + 0.15
        assert truth[name] - 0.15 < found[name]["high"]


def test_strengths_of_a_cycle_of_uneven_wins_are_found_too():
    """Iterations of Luce's spectral ranking close in on these slowly."""
    won = {"ab": 100, "ba": 5, "bc": 1, "cb": 1, "cd": 1, "dc": 5, "de": 100, "ed": 5, "ef": 51, "fe": 5, "fa": 20}
    rows = [(a, b, "1") for (a, b), count in won.items() for _ in range(count)]
    value = {name: row["value"] for name, row in strengths(contests(rows), resamples=5)["models"].items()}
    for name in value:
        expected = sum(
            n * expit(value[name] - value[pair.replace(name, "")]) for pair, n in won.items() if name in pair
        )
        assert sum(n for pair, n in won.items() if pair[0] == name) == pytest.approx(expected, abs=1e-3)


def test_a_ranking_is_all_of_its_pairs():
    one = label(item("Item", "rank", (" a", " b", " c"), ("x", "y", "z")), "ann", Answer((1, 2, 3)))
    back = label(item("Other", "rank", (" a", " b", " c"), ("x", "y", "z")), "ann", Answer((3, 2, 1)))
    found = strengths([one, back])["models"]
    assert {name: row["comparisons"] for name, row in found.items()} == {"x": 4, "y": 4, "z": 4}
    assert [row["value"] for row in found.values()] == pytest.approx([0, 0, 0])


def test_a_model_that_never_lost_is_said_to_have_no_strength():
    found = strengths(contests([("x", "y", "1")] * 5))
    assert found["models"] == {}
    assert "Nothing beat x" in found["why"]
    assert "do not say which models" in strengths(compared({"ann": "12"}))["why"]


@pytest.mark.parametrize(
    ("lost", "told"),
    [(1, r"\d+ of 200 resamples leave it undetermined: too many for an interval."),
     (4, r"\d of 200 resamples leave it undetermined: the interval is that of the others."), (30, "$")],
)  # fmt: skip
def test_resamples_without_a_loss_are_told_and_make_no_interval_narrow(lost, told):
    """A resample of n items misses one of `lost` losses with probability (1 - lost / n)^n, about exp(-lost)."""
    labels = contests([("x", "y", "1")] * 60 + [("y", "x", "1")] * lost)
    found = strengths(labels)["models"]["x"]
    assert re.match(told, found["why"]), found
    assert (found["low"] is None, found["high"] is None) == (lost == 1, lost == 1)
    notes = summary(labels, resamples=200)["notes"]
    assert [note for note in notes if "undetermined" in note] == [f"Strengths: {found['why']}"] * (lost < 30)


# -------------------------------------------------------------------------------------------------------- consensus


def said(*ranks):
    return [Answer(each) for each in ranks]


@pytest.mark.parametrize(
    ("answers", "together"),
    [
        (said((1, 2), (1, 2), (2, 1)), (1, 2)),
        (said((1, 2), (2, 1)), (1, 1)),
        (said((1, 1), (1, 1), (2, 1)), (2, 1)),
        (said(None, (2, 1)), (2, 1)),
        (said((1, 2, 3), (1, 3, 2), (2, 1, 3)), (1, 2, 3)),
        # By places: a 1, 2, 1.5; b 2.5, 2, 1.5; c 2.5, 2, 3.
        (said((1, 2, 2), (1, 1, 1), (1, 1, 2)), (1, 2, 3)),
    ],
)
def test_consensus_worked_by_hand(answers, together):
    assert consensus(answers).ranks == together


def test_consensus_of_ratings_and_of_nobody():
    assert consensus([Answer(rating=1.0), Answer(rating=2.0)]) == Answer(rating=1.5)
    assert consensus(said(None, None)) is None


rankings = st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=5)


@settings(max_examples=50, deadline=None)
@given(rankings, st.permutations(range(4)))
def test_consensus_treats_candidates_alike(given_ranks, order):
    dense = [Answer(tuple(sorted(set(row)).index(value) + 1 for value in row)) for row in given_ranks]
    renamed = [answer.reordered(order) for answer in dense]
    assert consensus(renamed) == consensus(dense).reordered(order)
    assert consensus([dense[0]]) == dense[0]
