"""What a run does by one held-out figure: learning rates, an early end, the best policy."""

import json
from types import SimpleNamespace

import pytest
import torch

import examples
import plaudit
import watched
from plaudit import PlauditError
from plaudit.algorithms.sft import SupervisedFineTuning
from plaudit.checkpoint import load, unpack
from plaudit.trainer import Interrupted, Trainer
from plaudit.watching import Watch, higher_is_better

# By the batches that were handed out; what comes before the first step does not count.
SCRIPT = {0: 1.0, 1: 9.0, 2: 7.0, 3: 7.0, 4: 8.0, 5: 7.5, 6: 6.0, 7: 6.5, 8: 6.5, 9: 6.5, 10: 6.5}


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(SupervisedFineTuning, "evaluate", lambda self: {"heldout_nll": SCRIPT[self.position]})


def seen(values, higher=False, drop_after=2):
    watch, states = Watch(), []
    for step, value in enumerate(values, 1):
        watch = watch.seen(value, step, higher, drop_after)
        states.append((watch.best, watch.best_step, watch.since, watch.drops))
    return states


def test_s0_25_what_is_seen_of_a_figure_by_hand():
    # Equal is not better; a drop comes with the second value in a row that is not, then the count begins anew.
    assert seen([3.0, 2.0, 2.0, 2.5, 4.0, 1.0, 5.0, 5.0, 5.0, 5.0]) == [
        (3.0, 1, 0, 0),
        (2.0, 2, 0, 0),
        (2.0, 2, 1, 0),
        (2.0, 2, 2, 1),
        (2.0, 2, 3, 1),
        (1.0, 6, 0, 1),
        (1.0, 6, 1, 1),
        (1.0, 6, 2, 2),
        (1.0, 6, 3, 2),
        (1.0, 6, 4, 3),
    ]
    assert seen([3.0, 2.0, 4.0], higher=True) == [(3.0, 1, 0, 0), (3.0, 1, 1, 0), (4.0, 3, 0, 0)]
    assert seen([float("nan"), 2.0, float("nan")])[::2] == [(None, 0, 1, 0), (2.0, 2, 1, 0)]
    assert [higher_is_better(name) for name in ("heldout_nll", "heldout_accuracy/de")] == [False, True]


def test_s0_25_learning_rates_of_step_and_plateau(at, tmp_path):
    def rates(settings, drops):
        trainer = Trainer(None, None, settings)
        trainer.steps, trainer.optimizer, found = 8, SimpleNamespace(param_groups=[]), []
        for trainer.step in range(8):
            trainer.watch = Watch(drops=drops[trainer.step])
            found.append(trainer._set_learning_rate())
        return found

    given = {"learning_rate": 1.0, "drop_every": 3, "drop_factor": 0.5}
    step = examples.settings("sft", at, tmp_path, schedule="step", warmup=0.0, **given)
    assert rates(step, [0] * 8) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    warm = examples.settings("sft", at, tmp_path, schedule="step", warmup=0.25, **given)
    assert rates(warm, [0] * 8) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 0.5, 0.5, 0.5])
    plateau = examples.settings("sft", at, tmp_path, schedule="plateau", warmup=0.0, **given)
    assert rates(plateau, [0, 0, 1, 1, 1, 2, 2, 2]) == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patience": 2}, "patience: name the held-out figure to go by"),
        ({"schedule": "plateau", "save_best": True}, "schedule and save_best: name the held-out figure"),
        ({"patience": 2, "watch": "val_loss"}, "watch: there is no held-out figure 'val_loss': choose one of heldout_"),
        ({"patience": 2, "watch": "heldout_nll", "evaluate_every": 0}, "known after evaluations only: set evaluate_e"),
        ({"watch": "heldout_nll"}, "watch: nothing looks at it"),
        ({"patience": 2, "watch": "heldout_score"}, "there is no heldout_score here, this run has heldout_accuracy, h"),
        ({"patience": 2, "watch": "heldout_nll", "eval_data": None}, "this run holds nothing out: set holdout or eval"),
    ],
)
def test_s0_24_a_figure_that_is_absent_is_refused_before_the_first_step(changes, sentence, at, tmp_path):
    with pytest.raises(PlauditError, match=sentence):
        watched.train(examples.settings("sft", at, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_s0_24_s0_25_patience_ends_a_run_at_just_that_step(at, tmp_path, scripted):
    # The best of the first five comes at step 2, so that the third evaluation without a better one is that of step 5.
    changes = {"patience": 3, "watch": "heldout_nll", "evaluate_every": 1, "steps": 9}
    run = plaudit.train(examples.settings("sft", at, tmp_path / "run", **changes))
    assert [line["step"] for line in run.metrics()] == [0, 1, 2, 3, 4, 5]
    assert run.summary["steps"] == 5
    more = plaudit.train(examples.settings("sft", at, tmp_path / "more", **{**changes, "patience": 4}))
    assert more.summary["steps"] == 9  # at step 6 it gets better, three later evaluations do not


def test_s4_18_final_is_the_policy_that_had_the_best_figure(at, tmp_path, scripted):
    changes = {"save_best": True, "watch": "heldout_nll", "evaluate_every": 2, "steps": 5, "save_every": 1, "keep": 2}
    seen = watched.train(examples.settings("sft", at, tmp_path / "run", **changes))
    folder = tmp_path / "run"
    assert sorted(path.name for path in (folder / "checkpoints").glob("*")) == [
        "step-000002",  # the best, kept beyond `keep`
        "step-000003",
        "step-000004",
    ]
    best = unpack(*load(folder / "checkpoints" / "step-000002"))["policy"]
    for name, parameter in seen.trainer.algorithm.policy.learning().items():
        assert torch.equal(parameter.detach(), best[name]), name
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["best_step"], summary["steps"], summary["nll_after"]) == (2, 5, 7.0)
    last = {**changes, "save_best": False, "watch": ""}
    last = plaudit.train(examples.settings("sft", at, tmp_path / "last", **last))
    assert watched.final(last.folder) != watched.final(folder)
    short = {**changes, "steps": 2, "schedule": "constant", "warmup": 0.0}
    short = plaudit.train(examples.settings("sft", at, tmp_path / "short", **short))
    assert short.summary["best_step"] == 2  # the last is the best: nothing to go back to


def test_s0_25_s4_18_all_of_it_survives_a_break_bit_for_bit(at, tmp_path, scripted):
    changes = {"schedule": "plateau", "drop_after": 1, "drop_factor": 0.5, "warmup": 0.0, "evaluate_every": 1}
    changes |= {"watch": "heldout_nll", "patience": 4, "save_best": True, "steps": 10, "save_every": 3}
    whole = watched.train(examples.settings("sft", at, tmp_path / "whole", **changes))
    assert max(whole.digests) == 10
    rates = [line.get("learning_rate") for line in watched.logged(tmp_path / "whole")[0]]
    assert rates[1:] == pytest.approx([3e-3 * 0.5**drops for drops in (0, 0, 0, 1, 2, 3, 3, 4, 5, 6)])
    for step in (4, 8, 9):
        with pytest.raises(Interrupted):
            watched.train(examples.settings("sft", at, tmp_path / "broken", **changes), signal_after=step)
    rest = watched.train(examples.settings("sft", at, tmp_path / "broken", **changes))
    assert rest.digests == {10: whole.digests[10]}
    assert watched.logged(tmp_path / "broken") == watched.logged(tmp_path / "whole")
    assert watched.final(tmp_path / "broken") == watched.final(tmp_path / "whole")


def test_s0_25_a_break_after_the_early_end_changes_nothing(at, tmp_path, scripted):
    changes = {"patience": 2, "watch": "heldout_nll", "evaluate_every": 1, "steps": 9, "save_best": True}
    whole = watched.train(examples.settings("sft", at, tmp_path / "whole", **changes))
    assert max(whole.digests) == 4
    with pytest.raises(Interrupted):
        watched.train(examples.settings("sft", at, tmp_path / "run", **changes), signal_after=4)
    assert watched.train(examples.settings("sft", at, tmp_path / "run", **changes)).digests == {}
    assert watched.final(tmp_path / "run") == watched.final(tmp_path / "whole")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole")]
    assert [(summary["steps"], summary["best_step"]) for summary in summaries] == [(4, 2)] * 2
