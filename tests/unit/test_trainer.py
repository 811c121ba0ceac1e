"""The loop's own arithmetic: learning rates, groups of parameters, what is saved and logged when."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

import examples
import plaudit
import watched
from plaudit import machine
from plaudit.errors import PlauditError
from plaudit.trainer import Trainer, _optimizer


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return examples.place(tmp_path_factory.mktemp("place"))


def rates(at, steps, **changes):
    settings = examples.settings("sft", at, at / "nowhere", learning_rate=1.0, **changes)
    trainer = Trainer(None, None, settings)
    trainer.steps = steps
    group = {"peak": 0.5}
    trainer.optimizer = SimpleNamespace(param_groups=[group])
    found = []
    for trainer.step in range(steps):
        found.append(trainer._set_learning_rate())
        assert group["lr"] == 0.5 * found[-1]
    return found


def test_learning_rates_step_by_step(at):
    assert rates(at, 4, schedule="constant", warmup=0.0) == [1, 1, 1, 1]
    assert rates(at, 5, schedule="constant", warmup=0.4) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])
    assert rates(at, 4, schedule="linear", warmup=0.0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(at, 6, schedule="linear", warmup=1 / 3) == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])
    cosine = [0.5 * (1 + math.cos(math.pi * share)) for share in (0, 0.25, 0.5, 0.75)]
    assert rates(at, 4, schedule="cosine", warmup=0.0) == pytest.approx(cosine)
    assert rates(at, 1, schedule="linear", warmup=0.05) == [1]
    assert len(rates(at, 3, schedule="linear", warmup=1.0)) == 3


def test_deepspeed_saves_nothing_and_says_so_before_the_first_step(at, tmp_path):
    settings = examples.settings("sft", at, tmp_path / "run")
    algorithm = examples.built(settings)
    algorithm.world.engine = object()
    trainer = Trainer(None, algorithm.world, settings)
    with pytest.raises(PlauditError, match=r"^save_every: under DeepSpeed the optimizer is spread over processes"):
        trainer.begin(algorithm)
    trainer.step = 2
    trainer.save()
    assert trainer.messages == ["step 2 is not saved: DeepSpeed spreads the optimizer over processes"]
    assert not (tmp_path / "run").exists()


def test_matrices_decay_and_the_value_head_has_its_own_rate(at, tmp_path):
    settings = examples.settings("ppo", at, tmp_path, value_learning_rate=0.5, adam_beta2=0.95)
    algorithm = examples.built(settings)
    optimizer = _optimizer(algorithm, settings)
    names = {id(p): name for name, p in algorithm.policy.learning().items()}
    found = {
        names[id(p)]: (group["peak"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found.keys() == algorithm.policy.learning().keys()
    assert found["value.weight"] == (0.5, 0.1)
    assert found["value.bias"] == (0.5, 0.0)
    assert found["backbone.model.layers.0.self_attn.q_proj.weight"] == (3e-3, 0.1)
    assert found["backbone.model.norm.weight"] == (3e-3, 0.0)
    assert optimizer.defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("every", "keep", "left"), [(2, 1, [4]), (2, 2, [2, 4]), (1, 3, [2, 3, 4]), (0, 1, []), (9, 1, [])]
)
def test_checkpoints_come_every_so_many_steps_and_few_are_kept(every, keep, left, at, tmp_path):
    settings = examples.settings("sft", at, tmp_path / "run", save_every=every, keep=keep, steps=5, evaluate_every=0)
    plaudit.train(settings)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.glob("*")) == [f"step-{step:06d}" for step in left]


def test_figures_are_logged_every_so_many_steps_and_at_the_end(at, tmp_path):
    settings = examples.settings("sft", at, tmp_path / "run", log_every=3, steps=7, evaluate_every=0, dropout=False)
    run = plaudit.train(settings)
    assert [line["step"] for line in run.metrics()] == [0, 3, 6, 7]
    assert [line["step"] for line in run.metrics() if "heldout_nll" in line] == [0, 7]
    assert run.summary["nll_before"] == run.metrics()[0]["heldout_nll"]
    assert run.summary["nll_after"] == run.metrics()[-1]["heldout_nll"]
    rows = [len(row["prompt"]) + len(row["completion"]) + 1 for row in examples.alphabet(15)]
    assert run.metrics()[1]["time/tokens"] <= 12 * max(rows)
    everything = dataclasses.replace(settings, batch_size=15, steps=2, log_every=1, output=str(tmp_path / "all"))
    assert [line["time/tokens"] for line in plaudit.train(everything).metrics()[1:]] == [sum(rows), 2 * sum(rows)]


def test_evaluations_between_log_lines_are_not_lost(at, tmp_path):
    settings = examples.settings("sft", at, tmp_path / "run", log_every=4, steps=8, evaluate_every=3, dropout=False)
    lines = plaudit.train(settings).metrics()
    assert [line["step"] for line in lines if "heldout_nll" in line] == [0, 3, 6, 8]


def test_gradients_are_scaled_down_to_the_norm_asked_for(at, tmp_path):
    moves = {}
    for norm in (0.0, 1e-4, 1e6):
        settings = examples.settings("sft", at, tmp_path / str(norm), max_grad_norm=norm, steps=1, dropout=False)
        moves[norm] = plaudit.train(settings).metrics()[1]
    # The norm that is logged is the one before scaling.
    assert moves[0.0]["gradient_norm"] == moves[1e-4]["gradient_norm"] == moves[1e6]["gradient_norm"] > 0.1


def test_memory_is_looked_at_after_each_step(at, tmp_path, monkeypatch):
    told = []

    def bounded(before):
        told.append(before)
        return before + 1.0

    monkeypatch.setattr(machine, "bounded", bounded)
    plaudit.train(examples.settings("sft", at, tmp_path / "run", steps=3, dropout=False))
    assert told == [0.0, 1.0, 2.0]


def test_a_batch_with_nothing_to_learn_from_moves_nothing(at, tmp_path, monkeypatch):
    settings = examples.settings("sft", at, tmp_path / "run", steps=3, evaluate_every=0, weight_decay=0.5, save_every=0)
    algorithm = examples.built(settings)
    monkeypatch.setattr(type(algorithm), "weight", lambda self, batch: batch.actions.sum() * (self.position == 1))
    seen = watched.train(settings)
    weights = {name: p.detach().clone() for name, p in seen.trainer.algorithm.policy.learning().items()}
    first = watched.train(dataclasses.replace(settings, output=str(tmp_path / "one"), steps=1, schedule="constant"))
    assert seen.trainer.step == 3
    assert {state["step"].item() for state in seen.trainer.optimizer.state.values()} == {1.0}
    assert weights.keys() == first.trainer.algorithm.policy.learning().keys()
