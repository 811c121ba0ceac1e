"""What the comparison with TRL counts, by hand-worked numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from operations import Family, Shape, families, learning
from plaudit.batch import collate
from process import Marks
from texts import cut, in_order
from works import WORKS

SHAPE = Shape(layers=10, matrices=100, heads=1, adapters=5, head=1000)
PAIR = Family(shared=2, lengths=(3, 4), actions=3)  # 2 + 1 + 2 tokens, which see 3 + 3 + (3 + 4) others and themselves


def test_a_family_computes_what_its_rows_share_once():
    assert PAIR.tokens == 5
    assert PAIR.seen == 13


def test_families_share_no_action_and_no_whole_row():
    answers = collate([[1, 2], [1, 2]], [[7], [7, 8]], [0, 0])
    assert families(answers) == [PAIR]
    texts = collate([[1, 2, 3], [1, 2, 3, 4]], [[], []], [0, 0])
    assert families(texts) == [Family(2, (3, 4), 0)]
    alone = collate([[1, 2], [1, 2]], [[7], [7]], [0, 1])
    assert families(alone) == [Family(0, (3,), 1)] * 2


FORWARD, ATTENTION, HEAD = 10 * 2 * 100 * 5, 10 * 4 * 13, 2 * 1000 * 3


@pytest.mark.parametrize(
    ("name", "operations"),
    [
        ("sft", 3 * (FORWARD + ATTENTION + HEAD)),
        ("dpo", 4 * (FORWARD + ATTENTION + HEAD)),
        ("kto", 6 * (FORWARD + ATTENTION + HEAD)),
        # Frozen matrices and the head take no gradient of their own; adapters do, and attention's is whole.
        ("dpo_lora", 3 * (FORWARD + HEAD) + 4 * ATTENTION + 10 * 6 * 5 * 5),
    ],
)
def test_operations_of_a_step(name, operations):
    assert learning(WORKS[name], SHAPE, [[PAIR]]) == operations


def test_operations_of_ppo():
    # Reference, values and reward model once, then two epochs; the head, once for the reference.
    layers = FORWARD + ATTENTION
    assert learning(WORKS["ppo"], SHAPE, [[PAIR], [PAIR]]) == 3 * layers + 2 * 3 * layers + (1 + 2 * 3) * HEAD
    # Of ten layers two are frozen: run once for policy and reference; the reward model runs all of its own.
    assert learning(WORKS["ppo_top8"], SHAPE, [[PAIR], [PAIR]]) == pytest.approx(
        0.2 * layers + layers + (2 + 2 * 3) * 0.8 * layers + (1 + 2 * 2) * HEAD
    )


def test_the_first_step_only_warms_up():
    marks = Marks()
    marks.ends, marks.sampling = [5.0, 7.0, 10.0], [4.0, 1.0, 2.0]
    found = marks.report()
    assert found["seconds"] == [2.0, 3.0]
    assert found["sampling"] == [1.0, 2.0]


def test_a_dialogue_is_cut_before_the_last_answer():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert cut({"chosen": start + " yes", "rejected": start + " no"}) == {
        "prompt": start,
        "chosen": " yes",
        "rejected": " no",
    }
    assert cut({"chosen": start + " yes", "rejected": start + " yes"}) is None
    assert cut({"chosen": start + " yes", "rejected": "\n\nHuman: x\n\nAssistant: no"}) is None


def test_trl_is_given_the_rows_in_the_order_in_which_plaudit_takes_them():
    from plaudit.data import Order

    work = replace(WORKS["dpo"], steps=2)
    rows = [{"prompt": str(i)} for i in range(12)]
    order = Order(12, 4, 0)
    assert in_order(work, rows) == [rows[i] for step in range(3) for i in order[step]]
    assert in_order(work, rows) != rows
