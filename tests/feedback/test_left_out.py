"""What is not asked, or not learned from, is told in the terminal: nothing falls away without a word."""

from __future__ import annotations

import json
import re

import pytest

import tiny
from plaudit import asking, labelling, versus
from plaudit.errors import PlauditError
from plaudit.feedback import serving
from plaudit.feedback.candidates import read_items
from plaudit.feedback.items import Candidate, Item
from plaudit.feedback.store import Store
from plaudit.records import Prompt
from plaudit.run import Run
from plaudit.settings.feedback import Compare, Label


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(*answers):
    return [(Prompt(f"p{n}"), [Candidate(text) for text in texts]) for n, texts in enumerate(answers)]


@pytest.fixture
def served(monkeypatch):
    """The door without the server."""
    monkeypatch.setattr(serving, "serve", lambda options, ready: 0)


def test_b01_every_row_of_candidates_that_asks_nothing_is_counted_with_the_place_of_the_first(tmp_path):
    told = []
    rows = [
        {"prompt": "p", "completions": ["a", "b"]},
        {"prompt": "q", "completions": ["same", "same"]},
        {"prompt": "p", "completions": ["a", "b"]},
        {"prompt": "r", "chosen": "c", "rejected": "c"},
        {"prompt": "r", "chosen": "c", "rejected": "d"},
        {"prompt": "s", "completion": "alone"},
        {"prompt": "t", "completion": "1"},
        {"prompt": "t", "completion": "2"},
        {"prompt": "t", "completion": "3"},
        {"prompt": "u", "completion": "alone"},
    ]
    path = written(tmp_path / "c.jsonl", *rows)
    items = read_items(path, "compare", told.append)
    assert [(item.prompt, len(item.candidates)) for item in items] == [("p", 2), ("r", 2), ("t", 2)]
    assert told == [
        f"1 rows left out: chosen and rejected are the same (the first is {path}:4)",
        f"3 rows left out: no other completion of the same prompt is left to judge it beside (the first is {path}:6)",
        f"1 rows left out: all its candidates are the same (the first is {path}:2)",
        f"1 rows left out: an earlier row asks the same (the first is {path}:3)",
    ]


def test_b01_where_nothing_is_left_the_reasons_are_in_the_error(tmp_path):
    path = written(tmp_path / "c.jsonl", {"prompt": "p", "completion": "a"}, {"prompt": "q", "completion": "b"})
    with pytest.raises(PlauditError, match=r"holds nothing to judge: .*2 rows left out: no other completion .*:1\)"):
        read_items(path, "compare")


def test_b09_a_right_answer_that_comes_in_a_second_row_is_not_left_out(tmp_path):
    told = []
    row = {"prompt": "p", "completions": ["a", "b"]}
    items = read_items(written(tmp_path / "c.jsonl", row, {**row, "gold": "A > B"}), tell=told.append)
    assert told == []
    with Store.open(tmp_path / "s.db") as store:
        store.add(items)
        (item,) = store.items()
    assert item.gold.ranks == (1, 2)


def test_b01_the_terminal_is_told_by_label_and_the_file_stays_as_it_was(tmp_path, served, capsys):
    rows = [{"prompt": "p", "completions": ["a", "b"]}, {"prompt": "q", "completions": ["same", "same"]}]
    data = written(tmp_path / "c.jsonl", *rows)
    labelling.label(Label(data=data, store=str(tmp_path / "s.db")))
    assert f"1 rows left out: all its candidates are the same (the first is {data}:2)\n" in capsys.readouterr().err


def test_b02_what_policies_say_alike_is_counted(tmp_path):
    told = []
    items = asking.questions(said("ab", "aa", "cc"), told.append)
    assert [item.prompt for item in items] == ["p0"]
    assert told == ["2 of 3 prompts are not asked about: all answers to them are the same."]
    told.clear()
    items = asking.questions(said("aba", "abc", "bbb"), told.append)
    assert [len(item.candidates) for item in items] == [2, 3]
    assert told == [
        "1 of 3 prompts are not asked about: all answers to them are the same.",
        "1 answers say what another one says to the same prompt; such are shown once.",
    ]
    told.clear()
    asking.questions(said("ab"), told.append)
    assert told == []


def test_b01_prompts_that_come_twice_are_counted_once(tmp_path):
    told = []
    path = written(tmp_path / "p.jsonl", *({"prompt": word} for word in ("one", "two", "one", "one")))
    assert [prompt.prompt for prompt in asking.distinct(path, "train", told.append)] == ["one", "two"]
    assert told == ["2 of 4 prompts are there more than once; each is asked about once."]


def test_b20_pairs_that_a_loop_passes_over_are_counted_by_reason(monkeypatch):
    """By hand: of three prompts one is answered alike, one with nothing, one as before; then each of the three anew."""
    known, fresh = (Item("compare", "p2", (Candidate("a"), Candidate(other))) for other in "bc")
    empty = Item("compare", "p1", (Candidate("a"), Candidate(" ")))
    others = [Item("compare", f"p{n}", (Candidate("x"), Candidate("y"))) for n in range(2)]
    rounds = iter([[empty, known], [fresh, *others]])
    monkeypatch.setattr(asking, "candidates", lambda *_, **__: next(rounds))
    told = []
    prompts = [Prompt(f"p{n}") for n in range(3)]
    found = asking.unasked(
        "policy", prompts, 3, None, None, before=[known], seed=1, advance=lambda count: None, tell=told.append
    )
    assert found == [fresh, *others]
    assert told == [
        "3 of 6 pairs that were sampled are not asked about: 1 say the same twice, 1 hold an empty answer, "
        "1 came before."
    ]


def test_b01_compare_counts_the_prompts_that_it_does_not_ask_about(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(asking, "answers", lambda *_, **__: said("ab", "aa", "bb"))
    data = written(tmp_path / "p.jsonl", *({"prompt": f"p{n}"} for n in (0, 1, 2, 3, 3)))
    for name in "ab":
        tiny.folder(tmp_path / name, chat=False)
    settings = Compare(
        a=str(tmp_path / "a"), b=str(tmp_path / "b"), data=data, prompts=3, people=True, device="cpu"
    )  # fmt: skip
    with Run.open(str(tmp_path / "out"), {"verb": "compare"}) as run:
        versus._asked(settings, run)
    err = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert "1 of 5 prompts are there more than once; each is asked about once." in err
    assert "3 of 4 prompts are sampled from, as `prompts` says." in err
    assert "2 of 3 prompts are not asked about: both say the same to them, which counts as a tie." in err
