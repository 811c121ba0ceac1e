"""A setting that nothing is going to read is told, not passed over."""

from __future__ import annotations

import pytest

import examples
from plaudit import PlauditError
from plaudit.recipes import prepare

ALONE = "does not look at it: set schedule to"


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("sft", {"drop_every": 10}, rf"^drop_every: the schedule cosine {ALONE} step, or leave drop_every out\.$"),
        ("sft", {"drop_after": 3, "schedule": "step"}, rf"^drop_after: the schedule step {ALONE} plateau, or leave"),
        ("ppo", {"drop_factor": 0.5}, rf"^drop_factor: the schedule constant {ALONE} step or plateau, or leave"),
        ("dpo", {"reference_share": 0.5}, r"^reference_share: the reference never moves, .* set reference_every, or"),
        ("ppo", {"reference_share": 1.0}, r"^reference_share: the reference never moves, .* set reference_every, or"),
    ],
)
def test_s0_25_s2_06_what_nothing_reads_is_refused(kind, changes, sentence, at, tmp_path):
    with pytest.raises(PlauditError, match=sentence):
        prepare(examples.settings(kind, at, tmp_path / "run", **changes))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sft", {"drop_every": 1000, "drop_after": 2, "drop_factor": 0.1}),  # as they are by themselves
        ("sft", {"drop_every": 10, "drop_factor": 0.5, "schedule": "step"}),
        ("sft", {"drop_after": 3, "drop_factor": 0.5, "schedule": "plateau", "watch": "heldout_nll"}),
        ("dpo", {"reference_share": 0.5, "reference_every": 2}),
        ("dpo", {"reference_share": 0.6}),
    ],
)
def test_s0_25_s2_06_what_something_reads_is_taken(kind, changes, at, tmp_path):
    prepared, _ = prepare(examples.settings(kind, at, tmp_path / "run", **changes))
    assert {name: getattr(prepared, name) for name in changes} == changes
