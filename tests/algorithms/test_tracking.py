"""What a tracker is told."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

import examples
import watched
from plaudit import PlauditError, hooks, train


def test_s0_21_s1_18_tensorboard_holds_what_the_metrics_hold(at, tmp_path):
    rows = train(examples.settings("ppo", at, tmp_path / "run", steps=5, track="tensorboard")).metrics()
    written = {
        (name, row["step"]): value
        for row in rows
        for name, value in row.items()
        if row["step"] and name != "step" and not name.startswith("time/")
    }
    logged = watched.scalars(tmp_path / "run" / "tensorboard")
    assert {step for _, step in logged} == {1, 2, 3, 4, 5}
    assert {name for name, _ in logged} >= {"loss", "score", "kl", "entropy", "heldout_score"} & {n for n, _ in written}
    assert logged == pytest.approx(written, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_s0_21_other_trackers_are_told_the_same_by_their_own_calls(kind, tmp_path, monkeypatch):
    called = []
    client = SimpleNamespace(
        log=lambda figures, step: called.append((step, figures)), finish=lambda: called.append("finish")
    )
    stand_in = SimpleNamespace(init=lambda **options: called.append(options) or client)
    monkeypatch.setitem(sys.modules, kind, stand_in)
    tracker = hooks.Tracker(kind, tmp_path / "mine", "taste")
    tracker.log(3, {"score": 0.5})
    tracker.close()
    begun = {"project": "taste", "name": "mine"} | ({"dir": str(tmp_path / "mine")} if kind == "wandb" else {})
    assert called == [begun, (3, {"score": 0.5}), "finish"]


def test_s1_18_a_tracker_that_is_not_there_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(PlauditError, match=r"^track: wandb is not installed: pip install 'plaudit\[wandb\]'\.$"):
        hooks.Tracker("wandb", tmp_path, "plaudit")
