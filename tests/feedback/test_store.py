"""The store: who is asked what, what stands after any sequence of events, and that nothing acknowledged is lost."""

import contextlib
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st

from plaudit.errors import PlauditError
from plaudit.feedback import schema
from plaudit.feedback.items import Answer, Candidate, Item, Label, read_answer
from plaudit.feedback.store import Conflict, Rules, Store, StoreFull

ONE = Rules()
FIRST = Answer((1, 2))


def pair(number: int, **more) -> Item:
    return Item("compare", f"prompt {number}", (Candidate("a", {"model": "x"}), Candidate("b", {"model": "y"})), **more)


def ranking(number: int, count: int = 4) -> Item:
    return Item("rank", f"prompt {number}", tuple(Candidate(f"answer {place}") for place in range(count)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


@contextlib.contextmanager
def study(path, items, people=("ann", "bob", "cleo")):
    with Store.open(path) as store:
        store.add(items)
        for person in people:
            store.join(person)
        yield store


def asked(store, person, count=1, rules=ONE, now=0.0):
    return [assignment.item.prompt for assignment in store.next(person, count, rules, now)]


def give(store, person, *, rules=ONE, now=0.0, key="", answer=FIRST):
    """The next item of this person, answered."""
    (assignment,) = store.next(person, 1, rules, now)
    key = key or f"{assignment.id} {now}"
    return store.answer(assignment.id, person, answer.reordered(assignment.order), key=key, ms=900, now=now)


# ------------------------------------------------------------------------------------------------ asking


def test_the_order_shown_is_drawn_stored_and_undone_in_the_label(path):
    wanted = Answer((3, 1, 2, 1), strength=2, note="n", rewrite="r")
    with study(path, [ranking(number) for number in range(60)]) as store:
        orders = set()
        for number in range(60):
            (assignment,) = store.next("ann", 1, ONE, 5.0)
            assert store.next("ann", 1, ONE, 6.0) == [assignment]  # a reload shows the same
            assert [c.text for c in assignment.shown] == [f"answer {place}" for place in assignment.order]
            orders.add(assignment.order)
            label = store.answer(
                assignment.id, "ann", wanted.reordered(assignment.order), key=str(number), ms=70, now=9.0
            )
            assert (label.answer, label.order, label.item) == (wanted, assignment.order, ranking(number))
            assert (label.person, label.shown_at, label.answered_at, label.ms) == ("ann", 5.0, 9.0, 70)
        assert len(orders) > 12  # of 24
        assert len({label.id for label in store.labels()}) == 60


def test_an_item_goes_to_as_many_people_as_wanted_and_to_nobody_twice(path):
    rules = Rules(overlap=2)
    with study(path, [pair(1), pair(2)]) as store:
        assert asked(store, "ann", 5, rules) == ["prompt 1", "prompt 2"]
        assert asked(store, "bob", 1, rules) == ["prompt 1"]
        assert asked(store, "cleo", 5, rules) == ["prompt 2"]  # both places of the first are leased
        for person in ("ann", "ann", "bob", "cleo"):
            give(store, person, rules=rules)
        assert [asked(store, person, 5, rules) for person in ("ann", "bob", "cleo")] == [[], [], []]
        assert sorted((label.item.prompt[-1], label.person) for label in store.labels()) == [
            ("1", "ann"), ("1", "bob"), ("2", "ann"), ("2", "cleo"),
        ]  # fmt: skip


def test_priority_comes_first_then_what_is_nearest_to_its_overlap_then_the_oldest(path):
    rules = Rules(overlap=2)
    with study(path, [pair(1), pair(2), pair(3)]) as store:
        store.add([pair(4)], priority=1)
        (first, second) = store.next("ann", 2, rules, 0.0)
        assert [first.item.prompt, second.item.prompt] == ["prompt 4", "prompt 1"]
        store.skip(second.id, "ann", key="s", now=0.0)
        (_, third) = store.next("ann", 2, rules, 0.0)
        assert third.item.prompt == "prompt 2"
        store.answer(third.id, "ann", Answer((1, 2)), key="a", ms=0, now=0.0)
        assert asked(store, "bob", 9, rules) == ["prompt 4", "prompt 2", "prompt 1", "prompt 3"]


def test_a_lease_that_ends_frees_the_item_and_a_late_answer_counts_while_nobody_else_has_it(path):
    with study(path, [pair(1)]) as store:
        (mine,) = store.next("ann", 1, ONE, 0.0)
        assert asked(store, "bob", now=599.0) == []
        (theirs,) = store.next("bob", 1, ONE, 600.0)
        assert theirs.item == mine.item
        with pytest.raises(Conflict, match="answered by others meanwhile"):
            store.answer(mine.id, "ann", Answer((1, 2)), key="late", ms=0, now=601.0)
        label = store.answer(theirs.id, "bob", Answer((1, 1)), key="later", ms=0, now=5000.0)  # nobody had it since
        assert store.labels() == [label]
        with pytest.raises(Conflict, match="answered by others meanwhile"):
            store.answer(mine.id, "ann", Answer((1, 2)), key="late", ms=0, now=6000.0)
        assert store.labels() == [label]


def test_looking_again_prolongs_a_lease(path):
    with study(path, [pair(1)]) as store:
        store.next("ann", 1, ONE, 0.0)
        (assignment,) = store.next("ann", 1, ONE, 500.0)
        assert assignment.leased_until == 1100.0
        assert asked(store, "bob", now=900.0) == []
        assert give(store, "ann", now=1000.0).shown_at == 0.0  # it has been before ann's eyes all the while


def test_what_lapsed_is_shown_anew(path):
    with study(path, [pair(1)]) as store:
        (before,) = store.next("ann", 1, ONE, 0.0)
        (again,) = store.next("ann", 1, ONE, 1000.0)
        assert (again.id, again.order, again.leased_until) == (before.id, before.order, 1600.0)
        assert give(store, "ann", now=1001.0).shown_at == 1000.0


def test_what_was_skipped_comes_again_only_when_nothing_else_is_left(path):
    with study(path, [pair(number) for number in range(3)]) as store:
        for number in range(2):
            (assignment,) = store.next("ann", 1, ONE, 0.0)
            store.skip(assignment.id, "ann", key=f"s{number}", now=0.0)
            store.skip(assignment.id, "ann", key=f"s{number}", now=0.0)  # sent twice
        assert store.skipped() == {"ann": 2}
        assert asked(store, "ann", 2) == ["prompt 2", "prompt 0"]
        assert asked(store, "bob", 5) == ["prompt 1"]
        give(store, "ann")
        assert asked(store, "ann", 5) == ["prompt 0"]


def test_what_was_skipped_comes_again_in_the_order_of_skipping(path):
    with study(path, [pair(number) for number in range(3)]) as store:
        held = store.next("ann", 3, ONE, 0.0)
        for place in (2, 0, 1):
            store.skip(held[place].id, "ann", key=f"s{place}", now=0.0)
        assert asked(store, "ann", 1) == ["prompt 2"]
        assert asked(store, "ann", 3) == ["prompt 2", "prompt 0", "prompt 1"]


def test_gold_items_are_given_in_their_share_and_to_everybody(path):
    gold = [pair(number, gold=Answer((1, 2))) for number in range(1000, 1400)]
    rules = Rules(gold_share=0.2, seed=3)
    with study(path, [*(pair(number) for number in range(400)), *gold]) as store:
        prompts = asked(store, "ann", 400, rules)
        share = sum(len(prompt) > len("prompt 999") for prompt in prompts) / 400
        assert 0.14 < share < 0.26  # three standard errors
        (mine,) = store.next("bob", 1, Rules(gold_share=1.0), 0.0)
        assert mine.item == gold[0]  # which ann has as well, though one answer to each item is enough
        assert prompts.count(mine.item.prompt) == 1
        give(store, "bob", rules=Rules(gold_share=1.0))
        progress = store.progress("bob", rules, 1.0)
        assert (progress.done, progress.mine, progress.left) == (0, 1, 400)
        assert not [p for p in asked(store, "cleo", 400, ONE) if len(p) > len("prompt 999")]


def test_a_repeat_comes_once_five_answers_later_at_the_earliest_and_fills_no_place(path):
    rules = Rules(overlap=2, repeat_share=1.0)
    with study(path, [pair(number) for number in range(7)]) as store:
        for now in range(5):
            assert give(store, "ann", rules=rules, now=float(now)).repeat == 0
        again = give(store, "ann", rules=rules, now=5.0)
        assert (again.item.prompt, again.repeat) == ("prompt 0", 1)
        while asked(store, "ann", 1, rules, 6.0):
            give(store, "ann", rules=rules, now=6.0)
        repeats = [label.item.prompt for label in store.labels() if label.repeat]
        assert len(set(repeats)) == len(repeats) >= 3
        assert {label.repeat for label in store.labels()} == {0, 1}
        order = [(label.item.prompt, label.repeat) for label in store.labels()]
        for prompt in repeats:
            assert order.index((prompt, 1)) - order.index((prompt, 0)) >= 5
        assert asked(store, "bob", 9, Rules(overlap=2)) == [f"prompt {number}" for number in range(7)]


def test_the_same_seed_draws_the_same_gold_items(tmp_path):
    items = [*(pair(number) for number in range(60)), *(pair(900 + n, gold=Answer((1, 2))) for n in range(60))]
    drawn = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        with study(tmp_path / name, items) as store:
            drawn.append(asked(store, "ann", 60, Rules(gold_share=0.5, seed=seed)))
    assert drawn[0] == drawn[1] != drawn[2]


# ------------------------------------------------------------------------------------------------ answering


@pytest.mark.parametrize(
    ("kind", "given", "problem"),
    [
        ("rank", {"tiers": [1, 2**62]}, "none is left out between"),
        ("rank", {"tiers": [0, 1]}, "none is left out between"),
        ("rate", {"rating": 10**400}, "needs a number"),
        ("rate", {"rating": float("nan")}, "needs a number"),
    ],
)
def test_numbers_of_any_size_are_refused_in_a_sentence(kind, given, problem):
    with pytest.raises(PlauditError, match=problem):
        read_answer(kind, 2, given)


def test_a_key_counts_once_and_for_one_request(path):
    with study(path, [pair(1), pair(2)]) as store:
        (first, second) = store.next("ann", 2, ONE, 0.0)
        label = store.answer(first.id, "ann", Answer((1, 2)), key="k", ms=5, now=1.0)
        assert store.answer(first.id, "ann", Answer((2, 1)), key="k", ms=99, now=2.0) == label
        for again in (
            lambda: store.answer(second.id, "ann", Answer((1, 2)), key="k", ms=5, now=1.0),
            lambda: store.skip(first.id, "ann", key="k", now=1.0),
            lambda: store.undo("bob", key="k", now=1.0),
        ):
            with pytest.raises(Conflict, match="key: was used for something else"):
                again()
        with pytest.raises(Conflict, match="answered already"):
            store.answer(first.id, "ann", Answer((1, 2)), key="other", ms=5, now=1.0)
        assert store.labels() == [label]


def test_undo_takes_back_the_last_answer_and_asks_again_as_before(path):
    with study(path, [pair(1), pair(2), pair(3)]) as store:
        give(store, "ann", now=1.0)
        (assignment,) = store.next("ann", 1, ONE, 2.0)
        shown = Answer((2, 1), strength=3, note="why")
        store.answer(assignment.id, "ann", shown, key="k", ms=5, now=2.0)
        give(store, "bob", now=3.0)
        again, before = store.undo("ann", key="u", now=4.0)
        assert (again.id, again.order, before, again.leased_until) == (assignment.id, assignment.order, shown, 604.0)
        assert store.undo("ann", key="u", now=5.0) == (again, before)  # sent twice
        assert [label.item.prompt for label in store.labels()] == ["prompt 1", "prompt 3"]
        assert store.next("ann", 1, ONE, 5.0) == [again]
        assert asked(store, "cleo", 5, now=5.0) == []
        label = store.answer(assignment.id, "ann", Answer((1, 1)), key="k2", ms=5, now=6.0)
        assert store.labels()[-1] == label
        assert [store.undo("ann", key=f"v{turn}", now=7.0) is None for turn in range(3)] == [False, False, True]
        assert [label.person for label in store.labels()] == ["bob"]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer((1, 2, 3)), "3 ranks do not fit 2 candidates"),
        (Answer((1, 3)), "leave none out"),
        (Answer((1, 2**62)), "leave none out"),
        (Answer(rating=3.0), "rating does not fit"),
        (Answer((1, 1), strength=1), "nothing was found better"),
        (Answer((1, 2), note="\ud800"), "surrogate"),
    ],
)
def test_an_answer_that_does_not_fit_is_not_kept(path, answer, problem):
    with study(path, [pair(1)]) as store:
        (assignment,) = store.next("ann", 1, ONE, 0.0)
        with pytest.raises(PlauditError, match=problem):
            store.answer(assignment.id, "ann", answer, key="k", ms=5, now=0.0)
        with pytest.raises(PlauditError, match="none of 'bob'"):
            store.answer(assignment.id, "bob", Answer((1, 2)), key="k", ms=5, now=0.0)
        assert store.labels() == []
        assert store.answer(assignment.id, "ann", Answer(), key="k", ms=5, now=0.0).answer == Answer()


PEOPLE = ("ann", "bob", "cleo")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["next", "next", "answer", "answer", "answer", "skip", "undo", "wait", "reopen"]),
        st.sampled_from(PEOPLE),
        st.integers(0, 9),
    ),
    min_size=30,
    max_size=60,
)


class Model:
    """What the store should do, in a few lists: leases [item, person, until, skipped, standing answer's place]."""

    def __init__(self, priorities, overlap):
        self.priorities, self.overlap, self.now, self.place = priorities, overlap, 0, 0
        self.held: dict[tuple[int, str], dict] = {}

    def of(self, item):
        return [lease for (other, _), lease in self.held.items() if other == item]

    def free(self, item, person):
        taken = [
            1
            for (other, who), lease in self.held.items()
            if other == item and (lease["label"] or (lease["until"] > self.now and who != person))
        ]
        return len(taken) < self.overlap

    def next(self, person, count):
        mine = [(item, lease) for (item, who), lease in self.held.items() if who == person and not lease["label"]]
        mine.sort(key=lambda one: one[1]["skipped"])
        given = [
            item for item, lease in mine
            if lease["until"] > self.now or (not lease["skipped"] and self.free(item, person))
        ][:count]  # fmt: skip

        def rank(item):
            return -self.priorities[item], -sum(bool(lease["label"]) for lease in self.of(item)), item

        new = [item for item in range(len(self.priorities)) if (item, person) not in self.held]
        given += sorted((item for item in new if self.free(item, person)), key=rank)[: count - len(given)]
        again = [
            (lease["skipped"], item) for item, lease in mine
            if lease["skipped"] and lease["until"] <= self.now and self.free(item, person)
        ]  # fmt: skip
        given += [item for _, item in sorted(again)][: count - len(given)]
        for item in given:
            lease = self.held.setdefault((item, person), {"skipped": 0, "label": None, "until": 0})
            if lease["until"] < self.now + 50:
                lease["until"] = self.now + 100
        return given

    def labels(self):
        standing = [(*lease["label"], item, who) for (item, who), lease in self.held.items() if lease["label"]]
        return [(item, who, ranks) for _, ranks, item, who in sorted(standing)]


def a_folder():
    """Where a flush costs nothing, if there is such a place: what is tried here is not the disk."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


@trying(max_examples=60)
@given(
    STEPS,
    st.integers(1, 3),
    st.lists(st.integers(0, 1), min_size=1, max_size=5),
)
def test_any_sequence_of_events_leaves_the_labels_that_a_simple_model_has(steps, overlap, priorities):
    model, rules = Model(priorities, overlap), Rules(overlap=overlap, lease_seconds=100)
    with a_folder() as folder, contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.open(Path(folder) / "s.db"))
        for number, priority in enumerate(priorities):
            store.add([ranking(number, 3)], priority=priority)
        for person in PEOPLE:
            store.join(person)
        assignments = {}
        for turn, (step, person, number) in enumerate(steps, 1):
            if step == "wait":
                model.now += 30 * number
            elif step == "reopen":
                store.close()
                store = stack.enter_context(Store.open(Path(folder) / "s.db"))
            elif step == "next":
                found = store.next(person, number % 3 + 1, rules, float(model.now))
                places = [int(one.item.prompt.split()[1]) for one in found]
                assert places == model.next(person, number % 3 + 1)
                assignments |= {(place, person): one for place, one in zip(places, found, strict=True)}
            elif step == "undo":
                undone(store, model, person, f"k{turn}")
            else:
                mine = [key for key in assignments if key[1] == person]
                if mine:
                    key = mine[number % len(mine)]
                    answered(store, model, step, key, assignments[key], turn, number)
            labels = [(int(la.item.prompt.split()[1]), la.person, la.answer.ranks) for la in store.labels()]
            assert labels == model.labels()
        assert store.newest(2, 1) == store.labels()[::-1][1:3]
        counts = store.progress(None, rules, float(model.now))
        wanted = model.labels()
        assert counts.people == {person: sum(who == person for _, who, _ in wanted) for person in PEOPLE}
        assert counts.left == len(priorities) * overlap - len(wanted)


def answered(store, model, step, key, assignment, turn, number):
    """One answer or skip, sent twice, in the store and the model."""
    lease, (item, person) = model.held[key], key
    ranks = [(1, 2, 3), (2, 1, 1), (3, 2, 1), (1, 1, 1)][number % 4]
    shown = Answer(ranks).reordered(assignment.order)

    def send():
        if step == "skip":
            store.skip(assignment.id, person, key=f"k{turn}", now=float(model.now))
        else:
            store.answer(assignment.id, person, shown, key=f"k{turn}", ms=1, now=float(model.now))

    late = step == "answer" and lease["until"] <= model.now and not model.free(item, person)
    if lease["label"] or late:
        with pytest.raises(Conflict):
            send()
    else:
        send()
        send()
        model.place += 1
        lease |= {"skipped": model.place, "until": 0} if step == "skip" else {"label": (model.place, ranks)}


def undone(store, model, person, key):
    """The last answer taken back, sent twice."""
    mine = [lease for (_, who), lease in model.held.items() if who == person and lease["label"]]
    found = store.undo(person, key=key, now=float(model.now), lease_seconds=100)
    assert (found is None) == (not mine)
    if found:
        assert store.undo(person, key=key, now=float(model.now)) == found
        last = max(mine, key=lambda lease: lease["label"])
        assert found[1].restored(found[0].order).ranks == last["label"][1]
        last |= {"label": None, "until": model.now + 100}


def test_eight_threads_fill_every_place_once(path):
    items, rules = [pair(number) for number in range(12)], Rules(overlap=3)
    people = [f"person {number}" for number in range(8)]
    with study(path, items, people) as store:

        def work(person):
            turn = 0
            while found := store.next(person, 2, rules, 0.0):
                for assignment in found:
                    turn += 1
                    for _ in range(2):  # a double click
                        store.answer(assignment.id, person, Answer((1, 2)), key=f"{person} {turn}", ms=1, now=0.0)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, people))
        labels = store.labels()
        assert len(labels) == 36 == len({(label.item.id, label.person) for label in labels})
        assert {item.id: sum(label.item.id == item.id for label in labels) for item in items} == {
            item.id: 3 for item in items
        }


# ------------------------------------------------------------------------------------------------ the study


def test_items_are_known_by_what_they_ask_and_come_back_whole(path):
    item = Item(
        "rank",
        [{"role": "user", "content": "\x00 ‮ 🎉"}],
        (Candidate("a", {"model": "x", "step": 3}), Candidate("b"), Candidate("</script>")),
        {"method": "margin", "propensity": 0.25},
        Answer((2, 1, 1)),
        {"topic": None},
    )
    with study(path, []) as store:
        assert (store.add([item, pair(1), item]), store.add([pair(1), pair(2)])) == (2, 1)
        assert store.items() == [item, pair(1), pair(2)]
        with pytest.raises(PlauditError, match="item 2: to compare needs 2 candidates, but there are 1"):
            store.add([pair(5), Item("compare", "p", (Candidate("a"),))])
        assert len(store.items()) == 3


def test_a_right_answer_that_comes_later_is_kept_as_an_event_and_checks_people_from_then_on(path):
    always = Rules(gold_share=1.0)
    with study(path, [pair(1, columns={"topic": "t"}), pair(2)]) as store:
        give(store, "ann")
        version = store.version
        assert store.add([pair(1, gold=FIRST), pair(2)]) == 0
        assert store.version != version
        assert store.items() == [pair(1, columns={"topic": "t"}, gold=FIRST), pair(2)]
        assert [label.item.gold for label in store.labels()] == [FIRST]
        assert asked(store, "bob", 1, always) == ["prompt 1"]  # though one answer is all that is wanted of others
        (kept,) = store._db.execute("SELECT answer FROM gold").fetchall()
        assert kept == ('{"ranks": [1, 2]}',)
        assert store.add([pair(1), pair(1, gold=FIRST)]) == 0
        known = r"item 2: the right answer to \"prompt 1\" is B > A, but A > B in the store already"
        with pytest.raises(PlauditError, match=known):
            store.add([pair(3), pair(1, gold=Answer((2, 1)))])
        assert store.items() == [pair(1, columns={"topic": "t"}, gold=FIRST), pair(2)]
        imported = Label("elsewhere", pair(2, gold=Answer((2, 1))), "cleo", FIRST, (), 0.0, 0.0, 0)
        assert store.take([imported]) == ["new"]
        assert store.items()[1].gold == Answer((2, 1))


def test_tokens_are_secret_and_can_be_renewed(path):
    with study(path, [], ()) as store:
        token = store.join("  Zoe\u0301 ")
        boss = store.join("boss", role="manager")
        assert (store.who(token).name, store.who(token).role) == ("Zo\u00e9", "person")
        assert (store.who(boss).role, store.who("nonsense"), store.people()) == ("manager", None, ["Zo\u00e9"])
        new = store.renew("Zo\u00e9")
        assert store.who(token) is None
        assert store.who(new).name == "Zo\u00e9"
        with pytest.raises(PlauditError, match="nobody is called"):
            store.renew("stranger")
    held = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert not [secret for secret in (token, new, boss) if secret.encode() in held]
    assert [oct(file.stat().st_mode & 0o077) for file in path.parent.iterdir()] == ["0o0"] * len(
        list(path.parent.iterdir())
    )


@pytest.mark.parametrize("name", ["", "  ", "x" * 81, "a\x00b", "a\nb", "a\u202eb", "\ud800", "ann"])
def test_a_name_that_hides_or_is_taken_is_refused(path, name):
    with study(path, []) as store:
        with pytest.raises(PlauditError, match="name:"):
            store.join(name)
        assert store.people() == ["ann", "bob", "cleo"]


def test_the_study_says_what_it_is_about(path):
    with study(path, []) as store:
        store.describe(title="T", instructions="Old.")
        store.describe(instructions="Which is kinder?")
    with Store.read(path) as store:
        assert (store.title, store.instructions, store.setting("criteria")) == ("T", "Which is kinder?", "")


def test_progress_says_what_is_left_for_whom_and_how_fast_it_goes(path):
    rules = Rules(overlap=2)
    with study(path, [pair(number) for number in range(4)]) as store:
        for turn in range(3):
            give(store, "ann", rules=rules, now=100.0 + 10 * turn)
        give(store, "bob", rules=rules, now=130.0)
        mine, everyone = store.progress("ann", rules, 130.0), store.progress(None, rules, 130.0)
        assert (mine.done, mine.left, mine.mine, mine.people) == (4, 1, 3, {"ann": 3, "bob": 1, "cleo": 0})
        assert (everyone.left, store.progress("bob", rules, 130.0).left) == (4, 3)
        assert (mine.per_minute, everyone.per_minute) == (6.0, 8.0)  # 3 and 4 answers in 30 seconds
        assert store.progress("cleo", rules, 130.0).per_minute == 0


# ------------------------------------------------------------------------------------------------ the file


def test_only_giving_a_question_out_does_not_wait_for_the_disk(path):
    with study(path, [pair(1), pair(2)]) as store:
        (first,) = store.next("ann", 1, ONE, 0.0)
        assert store._db.execute("PRAGMA synchronous").fetchone() == (1,)
        store.skip(first.id, "ann", key="a", now=1.0)
        assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
        store.next("bob", 1, ONE, 1.0)
        store.add([pair(3)])
        assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_the_file_is_set_to_lose_nothing(path):
    with study(path, [pair(1)]) as store:
        give(store, "ann")
        db = store._db
        values = [
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
        assert values == ["wal", 2, 1]
        assert db.execute("PRAGMA application_id").fetchone() == (schema.APPLICATION,)
        assert db.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS),)
        tables = db.execute(
            "SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND type = 'table'"
        ).fetchall()
        assert {name: strict for name, strict in tables if not name.startswith("sqlite_")} == dict.fromkeys(
            ("meta", "item", "person", "assignment", "event", "gold"), 1
        )
        store.add([pair(1, gold=FIRST)])
        for change in ("UPDATE event SET ms = 1", "DELETE FROM event", "UPDATE gold SET at = 1", "DELETE FROM gold"):
            with pytest.raises(sqlite3.IntegrityError, match="events are never"):
                db.execute(change)
        assert [label.ms for label in store.labels()] == [900]


def test_one_writes_and_others_read_meanwhile(path):
    with study(path, [pair(1), pair(2)]) as store, Store.read(path) as reader, Store.read(path) as another:
        with pytest.raises(PlauditError, match="another process writes to this store"):
            Store.open(path)
        versions = [(reader.version, store.version)]
        give(store, "ann")
        versions.append((reader.version, store.version))
        assert reader.labels() == another.labels() == store.labels() != []
        position = reader.position
        give(store, "bob")
        versions.append((reader.version, store.version))
        store.describe(title="T")
        versions.append((reader.version, store.version))
        assert [len(set(side)) for side in zip(*versions, strict=True)] == [4, 4]
        assert [label.person for label in reader.labels(after=position)] == ["bob"]
        for change in (
            lambda: reader.add([pair(3)]),
            lambda: give(reader, "ann"),
            lambda: reader.undo("ann", key="u", now=0.0),
        ):
            with pytest.raises(PlauditError, match="for reading only"):
                change()
    with Store.open(path) as store:  # the hold ends with the writer
        assert len(store.labels()) == 2


def test_a_link_to_a_store_is_the_same_store(path):
    link = path.with_name("link.db")
    link.symlink_to(path)
    with Store.open(link) as store:
        store.add([pair(1)])
        with pytest.raises(PlauditError, match="another process writes to this store"):
            Store.open(path)
    with Store.read(path) as reader:
        assert len(reader.items()) == 1


def test_what_was_imported_is_repeated_whole_and_neither_undone_nor_an_answer_of_late(path):
    labels = [Label(str(n), pair(n), "ann", FIRST, (), 0.0, 0.0, 0) for n in range(5)]
    with study(path, [pair(9)]) as store:
        store.take(labels)
        assert store.undo("ann", key="u", now=1e9) is None
        assert store.labels() == labels
        (again,) = store.next("ann", 1, Rules(repeat_share=1.0), 1e9)
        assert (again.repeat, sorted(again.order)) == (1, [0, 1])
        store.answer(again.id, "ann", FIRST, key="k", ms=5, now=1e9 + 30)
        assert [store.progress(name, ONE, 1e9 + 30).per_minute for name in ("ann", None)] == [2, 2]
        assert store.undo("ann", key="v", now=1e9 + 40)[0].id == again.id
        assert store.labels() == labels


def test_numbers_that_json_does_not_know_never_reach_the_questions(path):
    with study(path, [pair(1)]) as store:
        for value in (float("nan"), float("inf")):
            with pytest.raises(PlauditError, match="item 1: holds NaN or an infinite number"):
                store.add([pair(2, columns={"reward": value})], priority=1)
        assert asked(store, "ann", 2) == ["prompt 1"]


def test_a_store_can_be_read_after_its_writer_has_gone(path):
    with pytest.raises(PlauditError, match="no such store"):
        Store.read(path)
    with study(path, [pair(1)]) as store:
        label = give(store, "ann")
    with Store.read(path) as reader:
        assert reader.labels() == [label]


def foreign(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")


@pytest.mark.parametrize("make", [lambda path: path.write_text("a novel\n" * 100), foreign, lambda path: path.mkdir()])
def test_a_file_that_is_no_store_is_refused_and_left_alone(path, make):
    make(path)
    before = path.is_file() and path.read_bytes()
    for how in (Store.open, Store.read):
        with pytest.raises(PlauditError, match=r"study\.db: (is there, but is not a store|cannot be read)"):
            how(path)
    assert list(path.parent.iterdir()) == [path]
    assert (path.is_file() and path.read_bytes()) == before


def test_a_newer_store_is_refused_and_an_older_one_brought_up_to_date(path, monkeypatch):
    with study(path, [pair(1)]) as store:
        label = give(store, "ann")
    known = schema.MIGRATIONS
    monkeypatch.setattr(schema, "MIGRATIONS", (*known, "ALTER TABLE item ADD COLUMN colour TEXT; bad"))
    with pytest.raises(PlauditError, match="older plaudit"):
        Store.read(path)
    with pytest.raises(PlauditError, match="cannot be opened"):
        Store.open(path)
    monkeypatch.setattr(schema, "MIGRATIONS", (*known, "ALTER TABLE item ADD COLUMN colour TEXT;"))
    for _ in range(2):  # the second time there is nothing to do, which the column would show
        with Store.open(path) as store:
            assert store.labels() == [label]
            assert "colour" in {row[1] for row in store._db.execute("PRAGMA table_info(item)")}
    monkeypatch.undo()
    for how in (Store.open, Store.read):
        with pytest.raises(PlauditError, match="newer plaudit; upgrade"):
            how(path)


def test_a_store_of_the_first_version_is_brought_up_to_date(path, monkeypatch):
    known = schema.MIGRATIONS
    monkeypatch.setattr(schema, "MIGRATIONS", known[:1])
    with study(path, [pair(1), pair(2)]) as store:
        label = give(store, "ann")
        (other,) = store.next("ann", 1, ONE, 0.0)
        store.skip(other.id, "ann", key="s", now=1.0)
    monkeypatch.undo()
    with Store.open(path) as store:
        assert (store.labels(), store.newest(9), store.skipped()) == ([label], [label], {"ann": 1})


def test_a_damaged_store_is_refused(path):
    with study(path, [pair(number) for number in range(200)]):
        pass
    content = bytearray(path.read_bytes())
    for page in range(3, len(content) // 4096):
        content[4096 * page : 4096 * page + 200] = b"\xff" * 200
    path.write_bytes(content)
    for how in (Store.open, Store.read):
        with pytest.raises(PlauditError, match=r"study\.db: (is damaged|cannot be opened)"):
            how(path)


def test_a_full_disk_acknowledges_nothing_and_leaves_the_store_usable(path):
    with study(path, [pair(number) for number in range(400)]) as store:
        give(store, "ann")
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        (assignment,) = store.next("ann", 1, ONE, 0.0)
        before, long = store.labels(), Answer((1, 2), note="n" * 9000)
        for change in (
            lambda: store.answer(assignment.id, "ann", long, key="k", ms=1, now=0.0),
            lambda: store.add([pair(1000 + number) for number in range(400)]),
        ):
            with pytest.raises(StoreFull, match="free some space"):
                change()
        assert (store.labels(), len(store.items())) == (before, 400)
        assert store.progress("ann", ONE, 0.0).mine == 1
        store._db.execute("PRAGMA max_page_count = 1000000")
        label = store.answer(assignment.id, "ann", long, key="k", ms=1, now=0.0)
        assert store.labels() == [*before, label]


def test_a_disk_that_refuses_to_write_acknowledges_nothing(path):
    with study(path, [pair(1), pair(2)]) as store:
        (assignment,) = store.next("ann", 1, ONE, 0.0)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = max(file.stat().st_size for file in path.parent.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(StoreFull):
                store.answer(assignment.id, "ann", Answer((1, 2), note="n" * 9000), key="k", ms=1, now=0.0)
            assert store.labels() == []
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        label = store.answer(assignment.id, "ann", Answer((1, 2)), key="k", ms=1, now=0.0)
    with Store.open(path) as store:
        assert store.labels() == [label]


WRITER = """
import sys
from plaudit.feedback.items import Answer
from plaudit.feedback.store import Rules, Store
store, start = Store.open(sys.argv[1]), int(sys.argv[2])
for turn in range(start, start + 1000):
    (assignment,) = store.next("ann", 1, Rules(), float(turn))
    label = store.answer(assignment.id, "ann", Answer((1, 2)), key=f"k{turn}", ms=turn, now=float(turn))
    print(turn, flush=True)
"""


def test_no_acknowledged_answer_is_lost_when_the_writer_is_killed(path):
    with study(path, [pair(number) for number in range(3000)]):
        pass
    acknowledged = []
    for start, lines in ((0, 5), (1000, 40), (2000, 120)):
        command = [sys.executable, "-c", WRITER, str(path), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            acknowledged += [int(writer.stdout.readline()) for _ in range(lines)]
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
        with Store.read(path) as reader:  # even before a writer has cleaned up
            assert set(acknowledged) <= {label.ms for label in reader.labels()}
    with Store.open(path) as store:
        given = [label.ms for label in store.labels()]
        assert set(acknowledged) <= set(given)
        assert len(set(given)) == len(given) <= len(acknowledged) + 3
        assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
