"""Following the answers while they are given, without reading them all each time."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st
from live import answer, pair, site, tasks

from plaudit.feedback import agreement, server, standing
from plaudit.feedback.following import Following
from plaudit.feedback.items import Answer, Label
from plaudit.feedback.store import Rules, Store


@trying(max_examples=12, deadline=None)
@given(steps=st.lists(st.sampled_from(["answer", "undo", "gold", "import", "look", "ask"]), max_size=25))
def test_b06_whatever_happens_what_is_followed_is_what_stands(tmp_path_factory, steps):
    items = [pair(number) for number in range(30)]
    with Store.open(tmp_path_factory.mktemp("following") / "labels.db") as store:
        store.add(items)
        for name in ("ann", "bob"):
            store.join(name)
        following = Following(store)
        for number, step in enumerate(steps):
            person, key = ("ann", "bob")[number % 2], f"{number}"
            if step == "answer":
                (asked,) = store.next(person, 1, Rules(overlap=2), now=number)
                store.answer(asked.id, person, Answer((1, 2)), key=key, ms=1, now=number)
            elif step == "undo":
                store.undo(person, key=key, now=number)
            elif step == "gold":
                store.add([replace(items[number], gold=Answer((1, 2)))])
            elif step == "import":
                store.take([Label(f"from elsewhere {number}", items[number], "cleo", Answer((2, 1)), (), 0.0, 0.0, 1)])
            elif step == "ask":
                version = following.version
                store.next(person, 2, Rules(overlap=2), now=number)
                assert following.version == version
            else:
                assert following.labels() == store.labels()
        assert following.labels() == store.labels()


def test_b08_the_review_s_figures_follow_the_answers_and_read_each_once(tmp_path, monkeypatch):
    read, worked = [], []
    monkeypatch.setattr(server, "RESTING", 0.0)
    label, summary = standing._label, agreement.summary
    monkeypatch.setattr(agreement, "summary", lambda labels: worked.append(len(labels)) or summary(labels, resamples=5))
    with site(tmp_path / "labels.db") as study:
        study.add(*(pair(number) for number in range(12)))
        ann = study.person("ann")

        def look():
            return study.manager.get("/api/agreement").json()["labels"]

        assert look() == 0
        for number in range(5):
            answer(ann, tasks(ann)[0], {"choice": "left"}, f"k{number}")
        monkeypatch.setattr(standing, "_label", lambda row, items: read.append(row[0]) or label(row, items))
        assert look() == 5
        assert (len(read), worked) == (5, [0, 5])
        # Neither a look nor a question that is given out makes work; an answer is there at once, and is alone read.
        assert look() == 5
        tasks(ann, 3)
        assert look() == 5
        assert (len(read), worked) == (5, [0, 5])
        answer(ann, tasks(ann)[0], {"choice": "right"}, "k5")
        read.clear()
        assert look() == 6
        assert len(read) == 1
        ann.post("/api/undo", json={"key": "u"})
        read.clear()
        assert look() == 5
        assert (read, worked) == ([], [0, 5, 6, 5])


def test_b08_after_long_work_comes_a_longer_rest_and_then_the_newest_figures(tmp_path, monkeypatch):
    worked = []

    def slow(labels):
        worked.append(len(labels))
        time.sleep(0.05)
        return {"labels": len(labels)}

    monkeypatch.setattr(agreement, "summary", slow)
    with site(tmp_path / "labels.db") as study:
        study.add(*(pair(number) for number in range(4)))
        ann = study.person("ann")
        study.manager.get("/api/agreement")
        answer(ann, tasks(ann)[0], {"choice": "left"}, "k")
        began = time.monotonic()
        while study.manager.get("/api/agreement").json()["labels"] == 0:
            time.sleep(0.02)
        assert time.monotonic() - began > 0.3  # nine times 0.05, less what the answer took
        assert worked == [0, 1]


def test_b20_a_desk_waits_without_reading_again_what_it_has_read(tmp_path, monkeypatch):
    items = [pair(number) for number in range(6)]
    with site(tmp_path / "labels.db") as study:
        study.add(*items)
        ann = study.person("ann")
        with Store.read(study.path) as store:
            following = Following(store)
            for number in range(3):
                answer(ann, tasks(ann)[0], {"choice": "left"}, f"k{number}")
            assert len(following.labels()) == 3
            monkeypatch.setattr(store, "news", lambda after: pytest.fail("nothing is new"))
            assert len(following.labels()) == 3
