"""Judgements of one form as another: what is sound, what is left out, what is refused."""

import pytest

from plaudit import PlauditError
from plaudit.pairing import comparisons, rankings, thumbs
from plaudit.records import Comparison, Ranking, Rating


def pairs_of(found):
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in found]


def test_comparisons_of_rankings_and_of_ratings_of_one_prompt():
    ranking = Ranking("1", ("a", "b", "c"), (2, 1, 2))
    found, notes = comparisons([ranking], soft=False)
    assert pairs_of(found) == [("1", "b", "a"), ("1", "b", "c")]
    assert notes == []
    ratings = [
        Rating("1", "a", (1.0,)),
        Rating("2", "x", (1.0,)),
        Rating("1", "b", (0.0, 1.0)),
        Rating("1", "c", (0.5,)),
    ]
    found, notes = comparisons(ratings, soft=False)
    assert pairs_of(found) == [("1", "a", "b"), ("1", "a", "c")]
    assert notes == ["1 prompts left out: they have one answer each, and nothing to compare it with"]


def test_the_side_that_more_people_prefer_is_chosen_and_ties_are_left_out_unless_the_loss_reads_them():
    given = [Comparison("1", "a", "b", 0.2), Comparison("2", "a", "b", 0.5), Comparison("3", "a", "b")]
    found, notes = comparisons(given, soft=False)
    assert pairs_of(found) == [("1", "b", "a"), ("3", "a", "b")]
    assert found[0].preference == pytest.approx(0.8)
    assert notes == ["1 ties left out: this loss has no use for them"]
    assert comparisons(given, soft=True) == (given, [])
    with pytest.raises(PlauditError, match=r"prefer one: take data of comparisons.$"):
        comparisons(given[1:2], soft=False)


def test_rankings_of_comparisons():
    given = [Comparison("1", "a", "b", 0.2), Comparison("2", "a", "b", 0.5)]
    found, notes = rankings(given)
    assert [(one.completions, one.ranks) for one in found] == [(("b", "a"), (1, 2))]
    assert notes == ["1 prompts left out: people found their answers equally good"]


def test_other_verbs_are_named_only_to_those_whose_data_they_take():
    singles = [Rating("1", "a", (1.0,)), Rating("2", "b", (0.0,))]
    with pytest.raises(PlauditError, match=r"^data: no prompt has two answers of which .*: take `kto` or `bco`, which"):
        comparisons(singles, soft=False)
    scores = [Rating("1", "a", (5.0,)), Rating("2", "b", (1.0,))]
    for form, *more in ((rankings,), (comparisons, False)):
        with pytest.raises(PlauditError, match=r"^eval_data: no prompt has .*: take data of .* or .* by `reward`.$"):
            form(scores, *more, "eval_data")
    with pytest.raises(PlauditError, match=r"prefer one: take data of comparisons.$"):
        rankings([Ranking("1", ("a", "b"), (1, 1))])


def test_held_out_answers_may_all_be_good_but_not_all_undecided():
    found, notes = thumbs([Rating("1", "a", (1.0,))], "eval_data")
    assert ([one.ratings for one in found], notes) == ([(1.0,)], [])
    with pytest.raises(PlauditError, match=r"^eval_data: as many people found each answer good as bad: add answers"):
        thumbs([Rating("1", "a", (1.0, 0.0))], "eval_data")
    with pytest.raises(PlauditError, match=r"^eval_data: a rating of 3 is neither"):
        thumbs([Rating("1", "a", (3.0,))], "eval_data")


def test_thumbs_of_comparisons_and_of_several_people():
    given = [Comparison("1", "a", "b", 0.2), Rating("2", "c", (1.0, 1.0, 0.0)), Rating("3", "d", (1.0, 0.0))]
    found, notes = thumbs(given)
    assert [(one.completion, one.ratings) for one in found] == [("b", (1.0,)), ("a", (0.0,)), ("c", (1.0,))]
    assert notes == ["1 answers left out: as many people found them good as bad"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([Rating("1", "a", (3.0,))], r"a rating of 3 is neither good \(1, true\) nor bad \(0, false\): give each"),
        ([Ranking("1", ("a", "b"), (1, 2))], "a ranking does not say which answers are good by themselves: take `dpo`"),
        (
            [Rating("1", "a", (1.0,)), Rating("2", "b", (1.0,))],
            "all answers are good, so there is nothing to tell apart",
        ),
        ([Rating("1", "a", (0.0,))], "all answers are bad, so"),
    ],
)
def test_what_says_nothing_about_single_answers_is_refused(given, told):
    with pytest.raises(PlauditError, match=told):
        thumbs(given)
