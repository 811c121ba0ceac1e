"""Where memory runs out, passes become smaller and the run goes on."""

import json

import pytest
import torch

import examples
import plaudit
import watched
from plaudit import PlauditError
from plaudit.policy import Policy
from plaudit.recipes import FOUND
from plaudit.trainer import Interrupted

FULL = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
}


ROOM = 26  # tokens; the longest row has about 16


@pytest.fixture
def small(monkeypatch):
    """Memory that holds so many tokens, counted with their padding, in a pass with gradients or in any."""

    def limit(tokens, learning=True, error=FULL["accelerator"]):
        forward, calls = Policy.forward, []

        def limited(self, batch, **asked):
            output = forward(self, batch, **asked)
            if torch.is_grad_enabled() >= learning:
                calls.append(batch.tokens.numel())
                if calls[-1] > tokens:
                    raise error
            return output

        monkeypatch.setattr(Policy, "forward", limited)
        return calls

    return limit


def apart(seen, whole):
    """The mean distance of weights. Adam makes whole steps of rounding where a gradient is 0, as of biases of keys."""
    gaps = [
        (a - b).detach().abs().flatten()
        for a, b in zip(
            seen.trainer.algorithm.policy.learning().values(),
            whole.trainer.algorithm.policy.learning().values(),
            strict=True,
        )
    ]
    return float(torch.cat(gaps).mean())


@pytest.mark.parametrize(
    ("kind", "learning", "error"),
    [("sft", True, "cpu"), ("ppo", True, "accelerator"), ("ppo", False, "cpu"), ("ratings", True, "accelerator")],
)
def test_s1_20_the_same_step_is_done_again_in_smaller_passes(kind, learning, error, at, tmp_path, small, capsys):
    changes = {"tokens_per_pass": 1024, "dropout": False} if kind != "ppo" else {"tokens_per_pass": 1024}
    whole = watched.train(examples.settings(kind, at, tmp_path / "whole", **changes))
    assert json.loads((tmp_path / "whole" / FOUND).read_text())["tokens_per_pass"] == 1024
    calls = small(ROOM, learning, FULL[error])
    seen = watched.train(examples.settings(kind, at, tmp_path / "run", **changes))
    tokens = seen.trainer.algorithm.tokens_per_pass
    assert tokens in (64, 32, 16)
    assert json.loads((tmp_path / "run" / FOUND).read_text())["tokens_per_pass"] == tokens
    assert max(calls) > ROOM >= calls[-1]
    assert (seen.rows, len(seen.digests)) == (whole.rows, len(whole.digests))
    assert apart(seen, whole) < 1e-5
    assert "memory ran out: passes have " in capsys.readouterr().err


def test_s1_20_only_what_one_pass_left_is_thrown_away(at, tmp_path, monkeypatch):
    """It fails in the second part of a step, whose first part has left gradients."""
    changes = {"dropout": False, "steps": 3, "evaluate_every": 0, "eval_data": None}
    whole = watched.train(examples.settings("sft", at, tmp_path / "whole", **changes))
    forward, learned = Policy.forward, []

    def failing(self, batch, **asked):
        learned.append(len(batch))
        if len(learned) == 2:
            raise FULL["accelerator"]
        return forward(self, batch, **asked)

    monkeypatch.setattr(Policy, "forward", failing)
    seen = watched.train(examples.settings("sft", at, tmp_path / "run", **changes))
    assert seen.trainer.algorithm.tokens_per_pass < 48
    assert apart(seen, whole) < 1e-5
    assert seen.trainer.figures["loss"] == pytest.approx(whole.trainer.figures["loss"], rel=1e-5)


def test_s1_20_a_run_that_goes_on_begins_with_what_was_found(at, tmp_path, small):
    changes = {"tokens_per_pass": 1024, "dropout": False}
    small(ROOM)
    with pytest.raises(Interrupted):
        watched.train(examples.settings("sft", at, tmp_path / "run", **changes), signal_after=3)
    found = json.loads((tmp_path / "run" / FOUND).read_text())["tokens_per_pass"]
    calls = small(ROOM)
    rest = watched.train(examples.settings("sft", at, tmp_path / "run", **changes))
    assert rest.trainer.algorithm.tokens_per_pass == found
    assert max(calls) <= ROOM


def test_s1_20_a_row_that_does_not_fit_alone_is_refused(at, tmp_path, small):
    calls = small(4)
    with pytest.raises(
        PlauditError, match=r"memory ran out in a pass that held one row, .* Set gradient_checkpointing"
    ):
        plaudit.train(examples.settings("sft", at, tmp_path / "run", tokens_per_pass=2**20, dropout=False))
    assert len(calls) < 12
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_s1_20_other_mistakes_are_not_taken_for_a_lack_of_memory(at, tmp_path, small):
    calls = small(4, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        plaudit.train(examples.settings("sft", at, tmp_path / "run", evaluate_every=0, eval_data=None))
    assert len(calls) == 1


def test_s1_11_a_batch_whose_mean_ratio_is_too_high_is_left_out(at, tmp_path, capsys):
    changes = {"steps": 4, "eval_data": None, "evaluate_every": 0, "learning_rate": 3e-2, "batch_size": 8, "reuse": 4}
    free = watched.train(examples.settings("ppo", at, tmp_path / "free", **changes, ratio_threshold=10.0))
    ratios = [line["ratio"] for line in watched.logged(tmp_path / "free")[0]]
    assert ratios[0] == pytest.approx(1, abs=1e-6)
    assert max(ratios) == ratios[worst := ratios.index(max(ratios))] > 1.001
    limit = (1 + max(ratios)) / 2
    first = next(i for i, ratio in enumerate(ratios) if ratio > limit)
    assert first <= worst
    seen = watched.train(examples.settings("ppo", at, tmp_path / "run", **changes, ratio_threshold=limit))
    assert [seen.digests[i] == free.digests[i] for i in range(1, first + 1)] == [True] * first
    after = watched.logged(tmp_path / "run")[0]
    assert after[first]["ratio"] > limit
    if first + 1 < len(after):  # nothing was learned in between
        assert after[first + 1]["ratio"] == pytest.approx(after[first]["ratio"], rel=1e-5)
    said = capsys.readouterr().err
    assert (
        f"step {first + 1}: the mean ratio is {after[first]['ratio']:.3g}, more than ratio_threshold, so nothing"
        in said
    )
