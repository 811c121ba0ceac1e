"""One process and two come to the same, and a run alone never loads accelerate."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from plaudit.errors import PlauditError
from plaudit.world import World, _check_deepspeed

SCRIPT = Path(__file__).parents[1] / "processes" / "ranks.py"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture
def alone():
    return World.start(device="cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process and two processes came to."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    environment |= {"OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command, folder in ((launcher, two), ([sys.executable], one)):
        done = subprocess.run([*command, SCRIPT, folder], env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    files = [one / "rank-0.json", two / "rank-0.json", two / "rank-1.json"]
    return [json.loads(file.read_text()) for file in files]


def test_two_processes_train_as_one(runs):
    one, *two = (run["train"] for run in runs)
    assert one["norm"][1] > 0.1  # so clipping is exercised
    assert one["clipped"][1:] == pytest.approx([0.1, 0.5], rel=1e-4)
    assert one["norm"][0] == one["clipped"][0]
    for rank in two:
        for measure in ("loss", "norm", "clipped", "parameters"):
            assert rank[measure] == pytest.approx(one[measure], abs=1e-6), measure
        assert rank["keys"] == one["keys"]
    assert two[0]["parameters"] == two[1]["parameters"]


def test_two_processes_exchange(runs):
    for rank, found in enumerate(run["exchange"] for run in runs[1:]):
        assert (found["rank"], found["size"], found["main"]) == (rank, 2, rank == 0)
        assert found["sum"] == [pytest.approx(0.3, abs=1e-15), [3, 30], [rank + 1, 10 * (rank + 1)]]
        assert found["maximum"] == [-6.5, [1, 10]]
        assert found["gather"] == ["0.0", "1.0", "1.1"]
        assert found["share"] == {"rank": 0}
        assert not found["lockstep"]


def test_a_request_to_one_rank_stops_both_at_the_same_step(runs):
    assert [run["exchange"]["stops"] for run in runs[1:]] == [[False, False, True]] * 2


def test_accelerate_is_loaded_only_for_several_processes(runs):
    assert [run["accelerate"] for run in runs] == [False, True, True]


def test_alone_nothing_changes(alone):
    model, optimizer = nn.Linear(2, 1), None
    assert (alone.rank, alone.size, alone.is_main, alone.lockstep) == (0, 1, True, False)
    assert alone.prepare(model, optimizer) == (model, optimizer)
    assert alone.unwrap(model) is model
    assert alone.sum(2.5) == alone.maximum(2.5) == 2.5
    assert not alone.sum(torch.ones(2, requires_grad=True)).requires_grad
    assert alone.gather([1, 2]) == [1, 2]
    assert alone.share("x") == "x"
    assert [alone.stop_requested(flag) for flag in (True, False)] == [True, False]
    alone.barrier()
    alone.close()


@pytest.mark.parametrize(("limit", "scale"), [(None, 1), (10, 1), (1.0, 0.2), (0.0, 0)])
def test_clip_returns_the_norm_before_clipping(alone, limit, scale):
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([-4.0])
    assert alone.clip(model.parameters(), limit).item() == 5
    assert model.weight.grad.tolist() == [[pytest.approx(3 * scale), 0]]
    assert model.bias.grad.item() == pytest.approx(-4 * scale)


def test_clip_without_gradients_and_with_broken_ones(alone):
    model = nn.Linear(2, 1)
    assert alone.clip(model.parameters(), 1.0).item() == 0
    model.weight.grad = torch.tensor([[math.nan, 1.0]])
    assert math.isnan(alone.clip(model.parameters(), None).item())
    assert model.weight.grad[0, 1] == 1


def test_gradients_add_up_over_micro_batches(alone):
    weight = nn.Parameter(torch.tensor(2.0))
    model = nn.ParameterList([weight])
    for i in range(3):
        with alone.synchronised(model, last=i == 2):
            alone.backward(weight * i)
    assert weight.grad.item() == 3


def test_autocast_is_bfloat16_only_on_request(alone):
    matrix = torch.ones(2, 2)
    with alone.autocast():
        assert (matrix @ matrix).dtype == torch.float32
    with World.start("bfloat16", "cpu").autocast():
        assert (matrix @ matrix).dtype == torch.bfloat16
    with World(torch.device("mps"), "bfloat16").autocast():
        assert (matrix @ matrix).dtype == torch.float32


def test_the_best_device_is_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert World.start().device.type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert World.start().device.type == "cuda"
    assert World.start(device="cuda:1").device.index == 1
    assert World.start(device="cpu").device.type == "cpu"


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(PlauditError, match="precision: 'float16' is unknown; choose one of float32, bfloat16"):
        World.start("float16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda:0", "tpu"):
        with pytest.raises(PlauditError, match=f"device: '{device}' is not to be found on this machine; it has .*cpu"):
            World.start(device=device)


class Plugin:
    def __init__(self, zero_stage, **config):
        self.zero_stage, self.deepspeed_config = zero_stage, config


def test_deepspeed_settings_that_would_change_the_numbers_are_refused():
    with pytest.raises(PlauditError, match="stage 0"):
        _check_deepspeed(Plugin(0))
    with pytest.raises(PlauditError, match="gradient_accumulation_steps must be 1 or auto"):
        _check_deepspeed(Plugin(2, gradient_accumulation_steps=4))
    with pytest.raises(PlauditError, match="cannot gather the weights that ZeRO stage 3 spreads; set stage 1 or 2"):
        _check_deepspeed(Plugin(3))
    plugin = Plugin(2, gradient_accumulation_steps="auto", train_micro_batch_size_per_gpu="auto")
    _check_deepspeed(plugin)
    assert plugin.deepspeed_config["train_micro_batch_size_per_gpu"] == 1


class Engine:
    """Writes down what DeepSpeed is asked to do."""

    def __init__(self):
        self.calls, self.optimizer = [], self

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.calls.append(is_boundary)

    def backward(self, loss):
        self.calls.append(loss.item())

    def step(self):
        self.calls.append(("step", self.clip_grad))

    def get_global_grad_norm(self):
        return 5.0


def test_deepspeed_steps_once_with_the_clip_of_the_run():
    engine = Engine()
    world = World(torch.device("cpu"), size=2, accelerator=object(), engine=engine)
    assert world.lockstep
    for last in (False, True):
        with world.synchronised(nn.Linear(1, 1), last):
            world.backward(torch.tensor(1.5))
    assert world.clip([], 0.5).item() == 5
    assert engine.calls == [False, 3.0, True, 3.0, ("step", 0.5)]
