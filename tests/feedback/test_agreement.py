"""Agreement, against figures worked by hand, published tables and other libraries."""

from __future__ import annotations

import itertools
import json

import krippendorff
import numpy as np
import pytest
from labelled import compared, item, label, ranked, rated
from scipy.stats import kendalltau

from plaudit.feedback import habits, kappas
from plaudit.feedback.agreement import summary
from plaudit.feedback.items import Answer, read_answer

# Fleiss 1971, table 1: 30 patients, how many of six psychiatrists gave each of five diagnoses.
FLEISS_1971 = """00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006"""
# Krippendorff 2011, section E: four coders, twelve units.
KRIPPENDORFF_2011 = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


def figure(labels, kind, name):
    return kappas.figures(kappas.table(labels, kind), resamples=50)[name]


def published() -> list[list[float | None]]:
    return [[None if value == "." else float(value) for value in row] for row in KRIPPENDORFF_2011]


def test_fleiss_kappa_is_that_of_the_paper():
    counts = [[int(digit) for digit in row] for row in FLEISS_1971.split()]
    diagnoses = [[level for level, count in enumerate(row) for _ in range(count)] for row in counts]
    labels = rated(list(zip(*diagnoses, strict=True)))
    assert figure(labels, "rate", "fleiss")["value"] == pytest.approx(0.430, abs=5e-4)
    assert figure(labels, "rate", "raw")["value"] == pytest.approx(0.556, abs=1e-3)  # equation 3 of the paper


def test_cohens_kappa_worked_by_hand():
    # 20 and 15 alike, 5 and 10 not: observed 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    labels = compared({"ann": "1" * 25 + "2" * 25, "bob": "1" * 20 + "2" * 5 + "1" * 10 + "2" * 15})
    found = kappas.figures(kappas.table(labels, "compare"), resamples=400)
    assert found["raw"]["value"] == pytest.approx(0.7)
    assert found["cohen"]["value"] == pytest.approx(0.4)
    assert 0.1 < found["cohen"]["low"] < 0.2 < 0.6 < found["cohen"]["high"] < 0.7  # asymptotic: 0.4 ± 0.25


def test_the_mean_kappa_is_over_pairs_of_people():
    answers = {"ann": "1122=1", "bob": "1122=2", "eve": "2121=1"}
    alone = []
    for a, b in itertools.combinations(answers, 2):
        alone.append(figure(compared({a: answers[a], b: answers[b]}), "compare", "cohen")["value"])
    rows = kappas.between(kappas.table(compared(answers), "compare"))
    assert [row["kappa"] for row in rows] == pytest.approx(alone)
    assert [row["people"] for row in rows] == [["ann", "bob"], ["ann", "eve"], ["bob", "eve"]]
    assert figure(compared(answers), "compare", "cohen")["value"] == pytest.approx(np.mean(alone))


def test_alpha_is_that_of_the_paper():
    labels = rated(published())
    assert figure(labels, "rate", "alpha")["value"] == pytest.approx(0.849, abs=5e-4)
    values = kappas.table(labels, "rate").values
    assert kappas.alpha_of(values, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert kappas.alpha_of(values, "ordinal") == pytest.approx(0.815, abs=5e-4)


@pytest.mark.parametrize("kind", ["compare", "rank", "rate"])
def test_resampled_alphas_are_those_of_the_library(kind):
    """With gaps: a unit that one person alone answered counts nowhere."""
    rng = np.random.default_rng(3)
    truth = rng.integers(3, size=40)
    people = {}
    for person in "abcd":
        wrong = rng.random(40) < 0.3
        people[person] = np.where(wrong, rng.integers(3, size=40), truth)
    if kind == "compare":
        labels = compared({p: "".join("1=2 "[v] for v in said) for p, said in people.items()})
    elif kind == "rank":
        labels = ranked({p: [[(1, 2, 3), (2, 1, 2), (3, 2, 1)][v] for v in said] for p, said in people.items()})
    else:
        labels = rated(
            [[None if i % 5 == 0 and p == "a" else v * 1.5 for i, v in enumerate(people[p])] for p in people]
        )
    labels = [one for one in labels if not (one.person == "b" and one.item.prompt in ("Item 3", "Item 7"))]
    table = kappas.table(labels, kind)
    units = np.where(table.decided < 0, np.nan, table.decided) if kind == "compare" else table.values
    owner = table.owner if kind == "compare" else table.cell_owner
    sums = kappas.alpha(table)
    for weights in kappas._weights(len(table.items), 5, 6, 6):
        for row, own in zip(weights, sums.figure(weights @ sums.each), strict=True):
            repeated = np.repeat(units, row[owner].astype(int), axis=0)
            wanted = krippendorff.alpha(repeated.T, level_of_measurement=kappas.LEVELS[kind])
            assert own == pytest.approx(wanted, abs=1e-9)
    everything = sums.figure(np.ones((1, len(table.items))) @ sums.each)[0]
    assert figure(labels, kind, "alpha")["value"] == pytest.approx(everything, abs=1e-9)


def test_tau_is_scipys_with_ties_and_missing_people():
    rng = np.random.default_rng(1)
    dense = [np.unique(rng.integers(4, size=5), return_inverse=True)[1] + 1 for _ in range(24)]
    rankings = {person: [tuple(map(int, dense[3 * i + k])) for i in range(8)] for k, person in enumerate("abc")}
    labels = [one for one in ranked(rankings) if (one.person, one.item.prompt) != ("b", "Item 2")]
    taus = []
    for place in range(8):
        given = [one.answer.ranks for one in labels if one.item.prompt == f"Item {place}"]
        taus += [kendalltau(a, b).statistic for a, b in itertools.combinations(given, 2)]
    assert figure(labels, "rank", "tau")["value"] == pytest.approx(np.nanmean(taus))


def test_the_order_shown_does_not_matter():
    """Everybody prefers the same candidate, each on another side."""
    labels = []
    for place in range(40):
        asked = item(f"Item {place}")
        for number, person in enumerate(("ann", "bob")):
            order = (0, 1) if (place + number) % 2 else (1, 0)
            side = "left" if order[0] == place % 3 % 2 else "right"
            answer = read_answer("compare", 2, {"choice": side}).restored(order)
            labels.append(label(asked, person, answer, order))
    sides = [one.answer.ranks[one.order[0]] for one in labels]
    assert sides[::2] != sides[1::2]
    assert figure(labels, "compare", "raw")["value"] == 1
    assert figure(labels, "compare", "cohen")["value"] == pytest.approx(1)


def test_what_cannot_be_compared_and_repeats_are_no_agreement():
    labels = compared({"ann": "12?1", "bob": "1?21"})
    again = label(labels[0].item, "ann", Answer((2, 1)), repeat=1)
    table = kappas.table([*labels, again], "compare")
    assert [asked.prompt for asked in table.items] == ["Item 0", "Item 3"]
    assert figure([*labels, again], "compare", "raw")["value"] == 1


def test_kappa_of_many_answers_on_one_item_by_some():
    """Unequal numbers of people: two of three on one item, all on the other."""
    found = figure(compared({"ann": "11", "bob": "21", "eve": " 2"}), "compare", "fleiss")
    observed, shares = (0 + 1 / 3) / 2, np.array([3, 2]) / 5
    assert found["value"] == pytest.approx((observed - (shares**2).sum()) / (1 - (shares**2).sum()))


@pytest.mark.parametrize(
    ("labels", "name", "said"),
    [
        (compared({"ann": "1212"}), "raw", "No item was answered by two people"),
        (compared({"ann": "1111", "bob": "1111"}), "fleiss", "All answers are the same"),
        (compared({"ann": "1111", "bob": "1111"}), "alpha", "All answers are the same"),
        (compared({"ann": "1111", "bob": "1111"}), "cohen", "All answers are the same"),
    ],
)
def test_what_is_not_defined_says_why(labels, name, said):
    found = figure(labels, "compare", name)
    assert found["value"] is None
    assert said in found["why"]


def test_equal_answers_have_a_figure_and_no_interval():
    found = figure(compared({"ann": "1212", "bob": "1212"}), "compare", "raw")
    assert (found["value"], found["low"]) == (1, None)
    assert "too few or too alike" in found["why"]


def test_kappa_is_not_for_scales():
    values = [float(i) for i in range(12)]
    found = figure(rated([values, values[::-1]]), "rate", "cohen")
    assert found["value"] is None
    assert "alpha says more" in found["why"]


def test_the_interval_covers():
    """95 % intervals of raw agreement, over 60 worlds of 150 items with a known chance of agreeing."""
    rng, inside = np.random.default_rng(0), 0
    for world in range(60):
        same = rng.random(150) < 0.75
        labels = compared({"ann": "1" * 150, "bob": "".join("12"[not s] for s in same)})
        table = kappas.table(labels, "compare")
        found = kappas.interval(kappas.raw(table), len(table.items), world, 300)
        inside += found["low"] <= 0.75 <= found["high"]
    assert inside >= 52


# ------------------------------------------------------------------------------------------------------------ habits


def test_position_is_of_places_and_length_of_candidates():
    asked = item("How?", texts=(" Short.", " Very much longer."))
    labels = [
        label(asked, "ann", Answer((1, 2)), (0, 1)),  # first, short
        label(asked, "bob", Answer((1, 2)), (1, 0)),  # last, short
        label(asked, "eve", Answer((2, 1)), (1, 0)),  # first, long
        label(asked, "joe", Answer((1, 1)), (1, 0)),
        label(asked, "kim", Answer(None), (1, 0)),
        label(asked, "lea", Answer((2, 1))),  # order not known; long
    ]
    first = habits.position(labels)
    assert (first["value"], first["n"], first["p_value"]) == (pytest.approx(2 / 3), 3, 1.0)
    longer = habits.length([*labels, label(item("Why?", texts=(" No.", " Not so.")), "ann", Answer((2, 1)))])
    assert (longer["value"], longer["n"]) == (0.75, 2)  # one half of four people, then one of one
    undecided = habits.undecided(labels)
    assert undecided["cant"]["value"] == pytest.approx(1 / 6)
    assert undecided["ties"]["value"] == pytest.approx(1 / 5)


def test_position_of_rankings_compares_the_ends():
    asked = item("How?", "rank", (" a", " bb", " ccc"))
    labels = [label(asked, "ann", Answer((1, 3, 2)), (2, 0, 1)), label(asked, "bob", Answer((3, 2, 1)), (2, 1, 0))]
    assert habits.position(labels)["value"] == 1  # rank 2 before rank 3; rank 1 before rank 3
    assert habits.length(labels)["value"] == 0.5  # rank 2 of the longest against 1; rank 1 against 3


def test_everybody_choosing_what_is_shown_first_is_noticed():
    asked = item("How?")
    labels = [
        label(asked, f"p{i}", Answer((1, 2) if i % 2 else (2, 1)), (0, 1) if i % 2 else (1, 0)) for i in range(20)
    ]
    found = summary(labels, resamples=20)
    assert found["overall"]["position"]["p_value"] == pytest.approx(2 * 0.5**20)
    assert any("shown first is preferred" in note for note in found["notes"])


def test_with_oneself_follows_the_repeats():
    asked, other = item("How?"), item("Where?")
    labels = [
        label(asked, "ann", Answer((2, 1)), repeat=2),
        label(asked, "ann", Answer((1, 2)), repeat=0),
        label(asked, "ann", Answer((1, 2)), repeat=1),
        label(other, "ann", Answer(None)),
        label(other, "bob", Answer(None)),
    ]
    found = habits.with_oneself(labels)
    assert (found["value"], found["n"]) == (0.5, 2)  # the first and second alike, the second and third not


def test_gold_and_others():
    asked = item("How?", gold=Answer((2, 1)))
    labels = [label(asked, person, Answer(ranks)) for person, ranks in zip("abc", ((2, 1), (2, 1), None), strict=True)]
    assert habits.with_gold(labels)["value"] == pytest.approx(2 / 3)  # can't compare is no right answer
    assert {who: found["value"] for who, found in habits.with_others(labels).items()} == {"a": 1, "b": 1}
    three = ranked({"ann": [(1, 2, 3)], "bob": [(1, 3, 2)]})
    assert habits.with_others(three)["ann"]["value"] == pytest.approx(2 / 3)


def test_times_count_what_was_measured():
    asked = item("How?")
    labels = [label(asked, f"p{i}", Answer((1, 2)), ms=ms) for i, ms in enumerate((0, 100, 1500, 9000, 10**7))]
    found = habits.times(labels)
    assert found["median"] == 5.25
    assert dict(zip(found["edges"], found["counts"], strict=False)) == {
        edge: {0.5: 1, 1: 1, 8: 1, 300: 1}.get(edge, 0) for edge in habits.EDGES[:-1]
    }


def test_tiers_by_model():
    labels = [
        label(item(f"Item {i}", "rank", (" a", " b", " c"), ("x", "y", "x")), "ann", Answer(ranks))
        for i, ranks in enumerate([(1, 2, 3), (1, 1, 2)])
    ]
    assert habits.tiers(labels) == {"x": [2, 1, 1], "y": [1, 1, 0]}


# ----------------------------------------------------------------------------------------------------------- summary


def test_the_summary_is_plain_json_and_repeatable():
    labels = compared({"ann": "1212=1", "bob": "1221=1", "eve": "22 1?1"}) + rated(published())
    found = summary(labels, seed=4, resamples=100)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert summary(labels, seed=4, resamples=100) == found
    assert summary(labels, seed=5, resamples=100) != found
    assert set(found["kinds"]) == {"compare", "rate"}
    assert found["people"]["eve"]["cant"]["value"] == pytest.approx(1 / 5)


def test_one_person_alone_is_told_so():
    found = summary(compared({"ann": "1212"}), resamples=10)
    assert found["kinds"]["compare"]["figures"]["fleiss"]["value"] is None
    assert "One person alone" in found["notes"][0]
    assert summary([])["notes"] == ["There are no labels yet."]
