"""The measurement that decides what a run computes in: its arithmetic, its memory, and what follows from it."""

from __future__ import annotations

import json

import pytest
import torch

from plaudit import speed
from plaudit.speed import Rates

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAUDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "machine.json"


@pytest.fixture
def able(monkeypatch):
    monkeypatch.setattr(speed, "has_bfloat16", lambda: True)


def remembers(cache, rates):
    key = f"{speed.machine.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    cache.parent.mkdir(exist_ok=True)
    cache.write_text(json.dumps({key: rates}))


def test_bfloat16_is_taken_where_it_is_clearly_faster():
    assert speed.faster(Rates(100, 119)).precision == "float32"
    taken = speed.faster(Rates(100, 120))
    assert (taken.precision, taken.rates) == ("bfloat16", Rates(100, 120))
    assert taken.why == "bfloat16 is 1.20 times as fast: 120 against 100 GFLOP/s, measured"


def test_a_rate_is_all_operations_over_the_best_times(monkeypatch):
    times = {
        (2, torch.float32): iter([5e-6, 3e-6]),
        (2, torch.bfloat16): iter([1e-6, 2e-6]),
        (4, torch.float32): iter([7e-6, 9e-6]),
        (4, torch.bfloat16): iter([4e-6, 3e-6]),
    }
    asked = []

    def timed(left, right):
        asked.append((len(left), left.dtype))
        assert right.shape[1] == left.shape[1]
        return next(times[len(left), left.dtype])

    monkeypatch.setattr(speed, "timed", timed)
    found = speed.measured((torch.float32, torch.bfloat16), ((2, 30, 50), (4, 10, 20)), seconds=0)
    operations = 2 * 2 * 30 * 50 + 2 * 4 * 10 * 20  # 7,600
    assert found == pytest.approx([operations / 10e-6 / 1e9, operations / 4e-6 / 1e9])
    assert asked[:4] == [(2, torch.float32), (2, torch.bfloat16)] * 2  # in turn


def test_measuring_takes_none_of_the_run_s_random_numbers():
    before = torch.get_rng_state()
    assert min(speed.measured((torch.float32,), ((8, 8, 8),), seconds=0)) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_what_was_measured_once_is_remembered(cache, monkeypatch):
    monkeypatch.setattr(speed, "measured", lambda dtypes: [10.0, 25.0])
    assert speed.rates() == Rates(10.0, 25.0)
    monkeypatch.setattr(speed, "measured", lambda dtypes: [1.0, 1.0])
    assert speed.rates() == Rates(10.0, 25.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)  # another machine, as far as speed goes
    assert speed.rates() == Rates(1.0, 1.0)
    assert sorted(entry["float32"] for entry in json.loads(cache.read_text()).values()) == [1.0, 10.0]


def test_a_damaged_memory_is_written_anew_and_none_at_all_does_no_harm(cache, monkeypatch):
    monkeypatch.setattr(speed, "measured", lambda dtypes: [10.0, 25.0])
    cache.parent.mkdir()
    cache.write_text('{"half a li')
    assert speed.rates() == Rates(10.0, 25.0)
    assert len(json.loads(cache.read_text())) == 1
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_text("no folder")
    assert speed.rates() == Rates(10.0, 25.0)


def test_auto_follows_the_measurement_and_nothing_else_does(cache, able):
    remembers(cache, {"float32": 100.0, "bfloat16": 240.0})
    assert speed.choose("auto", CPU).precision == "bfloat16"
    assert speed.choose("float32", CPU) == speed.Choice("float32", "as asked for")
    remembers(cache, {"float32": 100.0, "bfloat16": 60.0})
    assert speed.choose("auto", CPU).precision == "float32"
    assert "0.60 times as fast" in speed.choose("auto", CPU).why
    assert speed.choose("bfloat16", CPU).precision == "bfloat16"


def test_where_nothing_is_to_be_gained_nothing_is_measured(cache, monkeypatch):
    monkeypatch.setattr(speed, "has_bfloat16", lambda: False)
    monkeypatch.setattr(speed, "measured", None)
    assert speed.choose("auto", CPU).precision == "float32"
    assert speed.choose("auto", torch.device("mps")).precision == "float32"
    assert not cache.exists()


def test_a_gpu_is_asked(monkeypatch):
    for able, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able, **emulated: able)
        assert speed.choose("auto", torch.device("cuda")).precision == expected
