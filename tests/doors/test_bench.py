"""`plaudit bench` on a tiny model: every figure is there, positive, and follows from the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from plaudit import bench, machine
from plaudit.loading import load_policy

QUICKLY = ("--seconds", 0.01, "--rows", 2, "--tokens", 16, "--new-tokens", 4, "--precision", "float32")


def test_figures_are_positive_and_follow_from_each_other(plaudit, models, monkeypatch):
    monkeypatch.setattr(bench, "ROWS", (1, 4))
    monkeypatch.setattr(bench, "BUSY", 1000.0)  # how busy others are is no matter here
    said = plaudit("bench", "--model", models / "plain", *QUICKLY, "--output", "found.json")
    assert (said.code, said.err) == (0, "")
    found = json.loads(Path("found.json").read_text())
    assert (found["precision"], found["device"], found["threads"]) == ("float32", "cpu", 1)
    rates, memory = found["matrix_gflops"], found["memory_gbs"]
    assert min(*rates.values(), memory, found["start_seconds"]) > 0
    assert found["others"] >= 0
    shape = bench.shape_of(load_policy(str(models / "plain")).backbone)
    assert list(found["training"]) == ["full", "lora_rank 16", "train_layers 8"]
    for name, row in found["training"].items():
        assert row["peak_memory_mb"] > 10
        assert row["tokens_per_second"] == pytest.approx(2 * 16 / row["seconds"])
        done = row["tokens_per_second"] * row["operations_per_token"]
        assert row["share"] == pytest.approx(done / (rates["float32"] * 1e9))
        adapters = 16 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)) if "lora" in name else 0
        layers = 2 if "layers" in name else 0
        assert row["operations_per_token"] == pytest.approx(bench.training_operations(shape, 16, adapters, layers))
    assert list(found["decoding"]) == ["1", "4"]
    for rows, row in found["decoding"].items():
        bound = bench.decoding_bound(shape, int(rows), 34.0, 4, rates["float32"] * 1e9, memory * 1e9)
        assert row["bound"] == pytest.approx(bound)
        assert row["share"] == pytest.approx(row["tokens_per_second"] / bound)
        assert 0 < row["share"] < 1
    for row in (*found["training"].values(), *found["decoding"].values()):
        assert f"{row['tokens_per_second']:,.0f} tokens/s" in said.out


def test_others_at_work_are_told_of(plaudit, models, monkeypatch):
    monkeypatch.setattr(bench, "_measurements", lambda settings, model, found: iter(()))
    monkeypatch.setattr(bench, "_table", lambda found: "")
    busy = iter([0.0, 1000.0])
    monkeypatch.setattr(machine, "_busy", lambda: next(busy))
    said = plaudit("bench", "--model", models / "plain")
    assert "cores busy meanwhile: the figures say little of this machine" in said.err


def test_models_that_it_cannot_measure_are_refused(plaudit, here):
    assert plaudit("bench", "--model", "./none").err == "plaudit bench: model: there is no folder './none'.\n"
    model = tiny.folder(here / "t5", "t5")
    assert plaudit("bench", "--model", model).err == (
        "plaudit bench: an encoder-decoder model is not measured: name a causal language model.\n"
    )
    model = tiny.folder(here / "short", max_position_embeddings=32)
    assert "reads 32 tokens, and a prompt has 32 already." in plaudit("bench", "--model", model).err


def test_a_first_step_that_fails_says_why(models, monkeypatch):
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    with pytest.raises(bench.PlauditError, match="bench: the first step failed"):
        bench.first_step(bench.Bench(model=str(models / "plain")), str(models / "plain"), 16)
