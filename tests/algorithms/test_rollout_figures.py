"""What is logged about a rollout, and the table of samples that a tracker is given (S1-18)."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import examples
from plaudit import hooks, train


@pytest.fixture(scope="module")
def rolled(at, tmp_path_factory):
    """A PPO with an absolute KL term whose policy has moved away from the reference, its rollout, and the reference's
    log-probabilities."""
    changes = {"kl_term": "reward_abs", "kl": 0.2, "kl_target": 0.0, "whiten_rewards": True, **examples.OFTEN}
    algorithm = examples.built(examples.settings("ppo", at, tmp_path_factory.mktemp("run"), **changes))
    algorithm.position = 1  # the first rollout must be that of the reference
    with torch.no_grad():
        for parameter in algorithm.policy.learning().values():
            parameter += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    batch = algorithm.rollout()
    with torch.no_grad(), algorithm.policy.as_reference():
        reference = algorithm.policy(batch).logprobs
    return algorithm, batch, reference


def test_s1_18_kl_reward_is_what_the_kl_term_takes_from_a_completion(rolled):
    algorithm, batch, reference = rolled
    taken = [
        -0.2 * sum(abs(float(own - kept)) for own, kept, acts in zip(*row, strict=True) if acts)
        for row in zip(batch.logprobs, reference, batch.actions, strict=True)
    ]
    assert min(map(abs, taken)) > 1e-3
    assert algorithm.notes["kl_reward"] == pytest.approx(np.mean(taken), abs=1e-5)
    assert abs(algorithm.notes["kl_reward"]) != pytest.approx(0.2 * abs(algorithm.notes["kl"]), rel=0.01)


def test_s1_18_means_come_with_their_standard_deviations(rolled):
    algorithm, batch, _ = rolled
    said = batch.actions.sum(1).numpy()
    asked = batch.lengths.numpy() - said
    of = {"completion_tokens": said, "prompt_tokens": asked}
    of |= {name: getattr(batch, f"{name}s")[batch.actions].numpy() for name in ("value", "return")}
    for name, values in of.items():
        assert values.std() > 0
        assert algorithm.notes[name] == pytest.approx(values.mean(), rel=1e-5, abs=1e-7)
        assert algorithm.notes[f"{name}_std"] == pytest.approx(values.std(), rel=1e-5)


def test_s1_18_one_reduction_gives_many_means(rolled, monkeypatch):
    algorithm, calls = rolled[0], []
    monkeypatch.setattr(algorithm.world, "sum", lambda value: calls.append(value) or 2 * value)  # a twin beside it
    figures = {"some": torch.tensor([1.0, 2.0, 6.0]), "none": torch.tensor([]), "one": torch.tensor([7.0])}
    assert algorithm.means(figures) == {"some": 3.0, "none": 0.0, "one": 7.0}
    assert len(calls) == 1


def test_s1_18_tensorboard_shows_the_samples_as_a_table(at, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"steps": 5, "eval_data": None, "evaluate_every": 0, "track": "tensorboard"}
    run = train(examples.settings("ppo", at, tmp_path / "run", **changes))
    found = EventAccumulator(str(run.folder / "tensorboard")).Reload().Tensors("samples/text_summary")
    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [event.step for event in found] == sorted({row["step"] for row in rows}) == [1, 5]
    for event in found:
        head, rule, *lines = event.tensor_proto.string_val[0].decode().split("\n")
        assert (head, rule) == ("| prompt | completion | score |", "| --- | --- | --- |")
        scores = [row["score"] for row in rows if row["step"] == event.step]
        assert [float(line.split("|")[-2]) for line in lines] == scores


ROWS = [
    {"prompt": "a|b\nc", "completion": "", "score": 0.5},
    {"prompt": [{"role": "user"}], "completion": "", "score": 1.0},
]


def test_s1_18_what_a_text_holds_does_not_break_its_table():
    assert hooks.markdown_table(["a", "b"], [["x|y\nz", 0.5]]) == "| a | b |\n| --- | --- |\n| x\\|y ⏎ z | 0.5 |"


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_s1_18_other_trackers_get_a_table_of_their_own(kind, tmp_path, monkeypatch):
    called = []
    client = SimpleNamespace(log=lambda figures, step: called.append((step, figures)))
    stand_in = SimpleNamespace(init=lambda **_: client, Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, kind, stand_in)
    hooks.Tracker(kind, tmp_path, "taste").table(3, ROWS)
    cells = [["a|b\nc", "", 0.5], ["[{'role': 'user'}]", "", 1.0]]
    assert called == [(3, {"samples": (["prompt", "completion", "score"], cells)})]


def test_s1_18_without_a_tracker_nothing_is_told(tmp_path):
    hooks.Tracker("none", tmp_path, "taste").table(3, ROWS)
