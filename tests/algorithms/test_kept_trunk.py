"""Where a run goes through its data again and again, frozen layers meet each row of it once."""

from __future__ import annotations

import pytest
import torch

import examples
import watched
from plaudit.algorithms import base
from plaudit.trainer import Interrupted

KINDS = ["sft", "comparisons", "rankings", "dpo", "kto", "ilql"]


def settings(kind, at, output, **changes):
    """A run of three epochs over few rows."""
    given = {"train_layers": 1, "model": str(at / "model"), "epochs": 3, "steps": 0, "batch_size": 4, "save_every": 2}
    given |= {"dropout": False} if kind not in ("dpo", "kto", "ilql") else {}
    return examples.settings(kind, at, output, **{**given, "evaluate_every": 0, "eval_data": None, **changes})


def counted(monkeypatch):
    """How many rows went through the frozen layers apart."""
    found = []
    over = base.Algorithm.over_trunk

    def counting(self, batch):
        found.append(len(batch))
        return over(self, batch)

    monkeypatch.setattr(base.Algorithm, "over_trunk", counting)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_goes_through_frozen_layers_once_in_a_run_and_no_number_changes(kind, at, tmp_path, monkeypatch):
    rows = counted(monkeypatch)
    kept = watched.train(settings(kind, at, tmp_path / "kept"))
    algorithm = kept.trainer.algorithm
    assert algorithm.steps * 4 > 2.5 * len(algorithm.data)
    fresh = algorithm.steps * 4 if kind == "kto" else 0  # answers to other prompts, made up in each step
    assert sum(rows) == len(algorithm.collate(list(range(len(algorithm.data))))) + fresh
    monkeypatch.setattr(base, "KEPT", 0)
    again = watched.train(settings(kind, at, tmp_path / "again"))
    assert kept.rows == again.rows
    weights = [list(seen.trainer.algorithm.policy.learning().values()) for seen in (kept, again)]
    gaps = torch.cat([(a - b).detach().abs().flatten() for a, b in zip(*weights, strict=True)])
    assert float(gaps.mean()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_in_a_later_epoch_finds_the_same_bits(kind, at, tmp_path):
    whole = watched.train(settings(kind, at, tmp_path / "whole", precision="bfloat16"))
    seen = watched.Seen()
    changed = settings(kind, at, tmp_path / "run", precision="bfloat16")
    half = whole.trainer.steps // 2 + 1
    with pytest.raises(Interrupted):
        watched.train(changed, seen, signal_after=half)
    watched.train(changed, seen)
    assert seen.first == half + 1
    assert seen.digests == whole.digests


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("comparisons", {"epochs": 0.8}),
        ("comparisons", {"train_layers": 0}),
        ("comparisons", {"dropout": True}),
        ("binary", {"model": "encoder"}),
    ],
)
def test_nothing_is_kept_that_serves_nobody_or_would_be_wrong(kind, changes, at, tmp_path, monkeypatch):
    rows = counted(monkeypatch)
    changes = {**changes, **({"model": str(at / changes["model"])} if "model" in changes else {})}
    watched.train(settings(kind, at, tmp_path / "run", **changes))
    assert rows == []
