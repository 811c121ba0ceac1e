"""How much of each rollout stays to be read (S4-18, trlX's rollout_logging_dir)."""

from __future__ import annotations

import json

import pytest

import examples
import watched
from plaudit import train
from plaudit.trainer import Interrupted

SHORT = {"steps": 9, "eval_data": None, "evaluate_every": 0}


def kept(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("shown", "rows"), [(0, 8), (3, 3)])
def test_s4_18_every_rollout_is_kept_with_its_step_and_scores(shown, rows, at, tmp_path):
    run = train(examples.settings("ppo", at, tmp_path / "run", shown=shown, **SHORT))
    found = kept(run.folder)
    assert [row["step"] for row in found] == [1] * rows + [5] * rows + [9] * rows
    assert all(set(row) == {"step", "prompt", "completion", "score"} for row in found)
    few = kept(train(examples.settings("ppo", at, tmp_path / "few", shown=2, **SHORT)).folder)
    assert [row for place, row in enumerate(found) if place % rows < 2] == few
    if not shown:
        assert len({(row["prompt"], row["completion"]) for row in found if row["step"] == 1}) > 4


def test_s4_18_a_break_repeats_no_rollout_and_loses_none(at, tmp_path):
    given = {"shown": 0, **SHORT}
    train(examples.settings("ppo", at, tmp_path / "whole", **given))
    with pytest.raises(Interrupted):
        watched.train(examples.settings("ppo", at, tmp_path / "run", **given), signal_after=6)
    train(examples.settings("ppo", at, tmp_path / "run", **given))
    assert kept(tmp_path / "run") == kept(tmp_path / "whole")
