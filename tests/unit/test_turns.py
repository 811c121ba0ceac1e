"""Where the prompt ends: plain texts, dialogues of the seven irregular kinds that hh-rlhf holds, rankings; and which
side of a hold-out falls what has no prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit import PlauditError, recipes
from plaudit.data import asked, hold_out
from plaudit.records import Comparison, Demonstration, Prompt, Ranking, Rating, parse
from plaudit.settings import DPO, KTO
from plaudit.turns import common
from tiny import lines

ASKED = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"


def read(row, kind=Comparison):
    """The record, or why there is none."""
    loaded = parse([("f:1", row), ("f:2", {"prompt": "p", "chosen": "c", "rejected": "r"})], kind)
    return next(iter(loaded.dropped), None) or loaded.records[0]


# ---------------------------------------------------------------------------------------------------- plain texts


@pytest.mark.parametrize(
    ("texts", "prompt"),
    [
        (("The cat sat on the mat.", "The cat sat on the map."), "The cat sat on the"),
        (("2 + 2 = 4", "2 + 2 = 5"), "2 + 2 ="),
        (("Review:\nGood.", "Review:\nGrim."), "Review:\n"),
        (("A\n\n  indented one", "A\n\n  indented two"), "A\n\n  indented"),
        (("A:\n\n  x", "A:\n\n  y"), "A:\n\n"),
        (("Tea", "Toast"), ""),
        (("Tea", "Coffee"), ""),
        (("I agree", "I agree with you"), "I"),
        (("I agree \n", "I agree with you"), "I"),
        (("one\u00a0two", "one\u00a0three"), "one"),
        (("", "anything"), ""),
        (("今天天气很好", "今天天气不好"), ""),
    ],
)
def test_s2_07_the_prompt_of_plain_texts_is_what_both_begin_with_up_to_a_whole_word(texts, prompt):
    assert common(texts) == common(texts[::-1]) == prompt


@given(st.lists(st.text("ab \n", max_size=8), min_size=2, max_size=4))
def test_s2_07_a_shared_prompt_never_takes_a_last_word_or_cuts_one(texts):
    prompt = common(texts)
    for text in texts:
        assert text.startswith(prompt)
        rest = text[len(prompt) :]
        assert bool(rest.strip()) == bool(text.strip())
        if prompt and text.strip():
            assert prompt[-1] == "\n" or (prompt[-1] != " " and rest[0] in " \n")


def test_s2_07_comparisons_of_plain_texts_have_a_prompt_and_say_what_they_said():
    row = {"chosen": "Tea or coffee? Tea.", "rejected": "Tea or coffee? Toast."}
    assert read(row) == Comparison("Tea or coffee?", " Tea.", " Toast.")
    assert read(row | {"prompt": ""}) == Comparison("", *row.values())
    assert read({"chosen": "same words", "rejected": "same words"}) == "chosen and rejected are the same"


def test_s2_07_rankings_have_the_prompt_that_all_their_texts_begin_with():
    def ranking(texts, **more):
        return parse([("f:1", {"completions": texts, "ranking": [1, 2, 2], **more})], Ranking).records[0]

    texts = ["A word: calm", "A word: loud", "A word: calm"]
    assert ranking(texts) == Ranking("A word:", (" calm", " loud", " calm"), (1, 2, 2))
    assert ranking(texts, prompt="") == Ranking("", tuple(texts), (1, 2, 2))
    assert ranking(["same"] * 3).completions == ("same",) * 3
    assert ranking([ASKED + said for said in (" a", " b", " c")]) == Ranking(ASKED, (" a", " b", " c"), (1, 2, 2))
    user, said = {"role": "user", "content": "p"}, [{"role": "assistant", "content": text} for text in "aba"]
    told = Ranking([user], tuple([one] for one in said), (1, 2, 2))
    assert ranking([[user, one] for one in said]) == ranking([[user, one] for one in said], prompt="p") == told


# ------------------------------------------------------------------------------------------------------- dialogues


@pytest.mark.parametrize(
    ("chosen", "rejected", "found"),
    [
        (ASKED + " Because.", ASKED + " No.", Comparison(ASKED, " Because.", " No.")),
        # 7 of 8,552 rows: the dialogues differ before the last answer
        (ASKED + " Because.", ASKED.replace("Hello", "Well, hi") + " No.", Comparison(ASKED, " Because.", " No.")),
        # 10 rows: the rejected dialogue goes on
        (ASKED + " Because.", ASKED + " No.\n\nHuman: So?\n\nAssistant: Yes.", Comparison(ASKED, " Because.", " Yes.")),
        # 11 rows: the last answer of one side is empty, or nothing but space
        (ASKED + " Because.", ASKED, "a completion is empty"),
        (ASKED + " \n", ASKED + " No.", "a completion is empty"),
        # 2 rows: the person has the last word
        (ASKED + " a\n\nHuman: Wait", ASKED + " b", "ends with the person's turn"),
        (ASKED + " a", ASKED + " b\n\nHuman: Wait", "ends with the person's turn"),
        # 36 rows
        (ASKED + " Because.", ASKED + " Because.", "chosen and rejected are the same"),
        # the most turns of any row: 25 of the person
        (ASKED * 12 + " a", ASKED * 12 + " b", Comparison(ASKED * 12, " a", " b")),
    ],
    ids=["regular", "another prompt", "goes on", "no answer", "blank", "open", "open too", "identical", "long"],
)
def test_s3_17_irregular_dialogues(chosen, rejected, found):
    assert read({"chosen": chosen, "rejected": rejected}) == found


# ------------------------------------------------------------------------------- whose answer is to be imitated


def test_s2_10_the_answer_that_people_preferred_is_the_demonstration():
    row = {"prompt": "p", "chosen": "A", "rejected": "B"}

    def imitated(row):
        return parse([("f:1", row), ("f:2", {"completion": "other"})], Demonstration)

    for preference, answer in ((1, "A"), (0.6, "A"), (0.4, "B"), (0.0, "B")):
        assert imitated(row | {"preference": preference}).records[0].completion == answer
    for preference, reason in ((0.5, "neither answer is preferred"), (None, "the rater could not compare")):
        assert imitated(row | {"preference": preference}).dropped == {reason: ["f:1"]}
    only = {"prompt": "p", "chosen": "A", "preference": 0.2}
    assert imitated(only).records[0].completion == "A"  # there is no other answer that people prefer
    dialogues = {"chosen": ASKED + " A", "rejected": "\n\nHuman: What?\n\nAssistant: B", "preference": 0.1}
    assert imitated(dialogues).records[0].prompt == "\n\nHuman: What?\n\nAssistant:"


# ------------------------------------------------------------------------------------------------------- hold-out


def test_s2_07_what_has_no_prompt_is_held_out_by_what_was_said():
    rows = [Comparison("", f"a{i}", f"b{i}") for i in range(400)]
    training, held = hold_out(rows, 0.25, asked)
    assert 60 < len(held) < 140
    assert len(training) == 400 - len(held)
    swapped = [[Comparison("", one.rejected, one.chosen) for one in side] for side in (rows, training, held)]
    assert hold_out(swapped[0], 0.25, asked) == (swapped[1], swapped[2])
    assert asked(Rating("", "said", (1.0,))) == asked(Demonstration("", "said")) == "said"
    assert asked(Ranking("", ("a", "b"), (1, 2))) == asked(Ranking("", ("b", "a"), (1, 2)))
    assert asked(Comparison("p", "a", "b")) == asked(Prompt("p")) == "p"


def test_s2_07_two_hundred_comparisons_without_a_prompt_column_are_divided(tmp_path):
    rows = [{"chosen": f"x{i} good", "rejected": f"y{i} bad"} for i in range(200)]
    loaded = recipes.load_records(DPO(model="m", data=lines(tmp_path / "d.jsonl", rows), holdout=0.05))
    assert 3 < len(loaded.held) < 25
    assert len(loaded.training) + len(loaded.held) == 200


def test_s2_07_pairs_of_one_ranking_stay_on_one_side(tmp_path):
    rows = [{"completions": [f"x{i}", f"y{i}", f"z{i}"], "ranking": [1, 2, 3]} for i in range(60)]
    loaded = recipes.load_records(DPO(model="m", data=lines(tmp_path / "d.jsonl", rows), holdout=0.3))
    sides = [{pair.chosen[1:] for pair in part} for part in (loaded.training, loaded.held)]
    assert min(map(len, sides)) > 5
    assert not sides[0] & sides[1]
    assert len(loaded.training) + len(loaded.held) == 180


def test_what_is_held_out_may_come_to_nothing_but_what_is_learned_from_may_not(tmp_path):
    rows = [{"prompt": str(i), "completion": "c", "ratings": [0, 1] if i == 1 else [i % 2]} for i in range(8)]
    data = lines(tmp_path / "d.jsonl", rows)
    shares = [int(share) / 100 for share in range(1, 100)]
    alone = next(s for s in shares if len(hold_out(rows, s, lambda row: row["prompt"])[1]) == 1)
    (only,) = hold_out(rows, alone, lambda row: row["prompt"])[1]
    only["ratings"] = [0, 1]
    loaded = recipes.load_records(KTO(model="m", data=lines(tmp_path / "e.jsonl", rows), holdout=alone))
    assert loaded.held == []
    assert "held out: 1 answers left out: as many people found them good as bad" in loaded.notes
    with pytest.raises(PlauditError, match=r"nothing is left to train on with holdout 1\.0"):
        recipes.load_records(KTO(model="m", data=data, holdout=1.0))
