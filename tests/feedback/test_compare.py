"""Two policies before people, and before a judge."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from people import answering, longest

import tiny
from plaudit import evaluate, versus
from plaudit.errors import PlauditError
from plaudit.feedback.desk import Desk, kept
from plaudit.feedback.items import Answer, Candidate, Item, Label
from plaudit.feedback.store import Store
from plaudit.settings import Evaluate
from plaudit.settings.feedback import Compare
from plaudit.versus import compare, figures

WORDS = ("one", "two", "three", "four", "five", "six")
SHORT = {"max_new_tokens": 6, "precision": "float32"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.folder(tmp_path / "sft" / "final", seed=0, chat=False)
    tiny.folder(tmp_path / "ppo" / "final", seed=1, chat=False)
    tiny.lines(tmp_path / "prompts.jsonl", [{"prompt": f"say {word}"} for word in WORDS])
    return tmp_path


def settings(**more):
    return Compare(a="sft/final", b="ppo/final", data="prompts.jsonl", output="out", **SHORT, **more)


def test_people_decide_blind_and_their_answers_stay(here, capsys):
    with answering(here / "out" / "answers.sqlite"):
        run = compare(settings(people=True))
    with Store.read(here / "out" / "answers.sqlite") as store:
        labels = store.labels()
    items = kept(here / "out" / "ask.jsonl")
    assert [label.item.id for label in labels] == [item.id for item in items]
    # Whoever stood on the left, it is the longer answer of the two that won.
    decided = [label for label in labels if label.answer.comparable]
    wins = 0
    for label in decided:
        sft, ppo = (one.text for one in label.item.candidates)
        assert [one.source["model"] for one in label.item.candidates] == ["sft/final", "ppo/final"]
        assert label.answer.ranks == ((2, 1) if len(ppo) > len(sft) else (1, 2))
        wins += len(ppo) > len(sft)
    found = run.summary
    assert found["win_rate"] == pytest.approx(wins / len(decided))
    assert (found["answers"], found["prompts"]) == (len(items), len(decided))
    assert found["win_rate_low"] < found["win_rate"] < found["win_rate_high"]
    assert f"ppo is preferred to sft in {100 * wins / len(decided):.0f}%" in capsys.readouterr().err
    # A second time nothing is asked: it is all there.
    before = (here / "out" / "summary.json").read_bytes()
    compare(settings(people=True))
    assert (here / "out" / "summary.json").read_bytes() == before


@pytest.fixture
def _interruptible():
    """Shells start what runs in the background deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_tells_the_figures_so_far_and_the_same_command_goes_on(here, capsys, monkeypatch):
    monkeypatch.setattr(versus, "_alike", lambda run: 60)

    def interrupt():
        while len(done) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    def left(prompt, answers):
        return {"choice": "left"}

    with answering(here / "out" / "answers.sqlite", rule=left, most=2) as done:
        watcher = threading.Thread(target=interrupt)
        watcher.start()
        with pytest.raises(KeyboardInterrupt):
            compare(settings(people=True))
        watcher.join()
    # Of the two that were answered: 60 ties that nobody was asked about would make it 49 % to 51 %, whatever is said.
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(r"ppo is preferred to sft in (0|50|100)% of 2 prompts", told)
    assert "60 prompts to which both say the same are left out of this; in the end they count as ties." in told
    assert not (here / "out" / "summary.json").exists()
    with answering(here / "out" / "answers.sqlite", name="ben", rule=left):
        found = compare(settings(people=True)).summary
    with Store.read(here / "out" / "answers.sqlite") as store:
        assert [label.person for label in store.labels()] == ["anna"] * 2 + ["ben"] * (found["answers"] - 2)
    assert found["answers"] == len(kept(here / "out" / "ask.jsonl"))


def test_a_judge_finds_what_evaluate_finds(here):
    (here / "judge.py").write_text("def e(completions, **rest):\n    return [float(len(c)) for c in completions]\n")
    found = compare(settings(judge="judge.py:e")).summary
    same = Evaluate(policies=("sft=sft/final", "ppo=ppo/final"), data="prompts.jsonl", rewards="judge.py:e", **SHORT)
    expected = evaluate(same).summary
    assert {name: found[name] for name in ("win_rate", "sft", "ppo")} == {
        name: expected[name] for name in ("win_rate", "sft", "ppo")
    }
    with pytest.raises(PlauditError, match="judge: name who decides, as a reward is named, or let people decide"):
        compare(settings())
    with pytest.raises(PlauditError, match="judge: people decide with --people: leave out one of the two"):
        compare(settings(judge="judge.py:e", people=True))


def test_where_nobody_can_compare_anything_that_is_said(here, capsys):
    with answering(here / "out" / "answers.sqlite", rule=lambda prompt, answers: {"choice": "cant"}):
        found = compare(settings(people=True)).summary
    assert found["cannot_compare"] == found["answers"] > 0
    assert (found["prompts"], "win_rate" in found) == (0, False)
    assert "Nobody has decided anything." in capsys.readouterr().err


def test_a_mistake_before_anything_is_asked_does_not_bind_the_folder(here):
    for limit in (2, 3):
        with pytest.raises(PlauditError, match=f"every prompt is longer than {limit} tokens"):
            compare(settings(people=True, max_prompt_tokens=limit))


def test_a_server_that_breaks_off_is_told_of_in_a_sentence():
    def hear_and_hang_up():
        with listener.accept()[0] as caller:
            caller.recv(1000)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=hear_and_hang_up).start()
        served = SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}", manager_token="t")
        served.join_url = served.people = None
        with pytest.raises(PlauditError, match=r"the label server does not answer \(.+\); the same command starts it"):
            Desk(served, None).post("/api/items", {})


def label(item, person, ranks):
    return Label(f"{person}-{item.id}", item, person, Answer(ranks), (0, 1), 0.0, 1.0, 1000)


def test_votes_of_several_people_and_what_both_said_alike():
    items = [Item("compare", f"prompt {i}", (Candidate("a"), Candidate("b"))) for i in range(4)]
    labels = [label(items[0], person, ranks) for person, ranks in (("x", (2, 1)), ("y", (2, 1)), ("z", (1, 2)))]
    labels += [label(items[1], "x", (1, 2)), label(items[1], "y", (2, 1)), label(items[2], "x", (1, 1))]
    labels += [label(items[3], "x", None)]
    found = figures(items, labels, ["a", "b"], alike=1)
    # One prompt is won two to one, one is split, one is equal, one was said alike; the last was not compared.
    assert (found["prompts"], found["answers"], found["cannot_compare"]) == (4, 7, 1)
    assert found["win_rate"] == pytest.approx((1 + 0.5 * 3) / 4)
    assert figures(items, labels[6:], ["a", "b"], alike=1) == {
        "answers": 1, "cannot_compare": 1, "alike": 1, "prompts": 0,
    }  # fmt: skip
    assert json.dumps(found)


def test_the_rule_of_the_tests_person():
    assert [longest("", ["ab", "a"]), longest("", ["a", "ab"]), longest("", ["a", "b"])] == [
        {"choice": "left"},
        {"choice": "right"},
        {"choice": "cant"},
    ]
