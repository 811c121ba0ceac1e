"""A run that was interrupted ends with the bits of one that was not (R1, R2, R4, R5)."""

import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

import examples
import watched
from plaudit import PlauditError
from plaudit.trainer import Interrupted
from watched import Killed, Seen

# peft asks transformers for a name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# What differs only in its loss, or in how its weights are kept, is broken off at fewer places.
SOME = {"rankings": (2,), "ratings": (3,), "ppo-top": (3, 6), "ppo-adapter": (2, 5), "ilql": (2,), "sft-encdec": (2,)}
SOME |= {"ppo-encdec": (5,), "dpo-encdec": (2,), "grpo-encdec": (3,), "ilql-encdec": (2,)}
SOME |= dict.fromkeys(examples.PREFERENCES, (3,))
SOME |= dict.fromkeys(examples.JUDGED, (3,))
SOME |= dict.fromkeys(examples.SAMPLED, (3,))


@pytest.mark.parametrize("kind", examples.KINDS)
def test_r1_r2_going_on_after_any_step_changes_no_bit(kind, at, tmp_path):
    whole = watched.train(examples.settings(kind, at, tmp_path / "whole"))
    steps = len(whole.digests)
    assert steps >= 5
    assert len(set(whole.digests.values())) == steps
    for step in SOME.get(kind, range(1, steps + 1)):
        # One run is broken off again and again; a copy of what each break left is run to the end.
        with pytest.raises(Interrupted, match=rf"stopped at step {step}, which is saved: the same command goes on"):
            watched.train(examples.settings(kind, at, tmp_path / "broken"), signal_after=step)
        shutil.copytree(tmp_path / "broken", tmp_path / f"from {step}")
        rest = watched.train(examples.settings(kind, at, tmp_path / f"from {step}"))
        assert list(rest.digests) == list(range(step + 1, steps + 1))
        for what in ("digests", "rows", "tokens"):
            after = {number: value for number, value in getattr(whole, what).items() if number > step}
            assert getattr(rest, what) == after, f"{what} differ after step {step}"
        assert watched.logged(tmp_path / f"from {step}") == watched.logged(tmp_path / "whole"), step
        assert watched.final(tmp_path / f"from {step}") == watched.final(tmp_path / "whole"), step


def test_r2_the_examples_break_off_inside_a_rollout_and_between_two(at, tmp_path):
    seen = watched.train(examples.settings("ppo", at, tmp_path / "run"))
    algorithm = seen.trainer.algorithm
    assert algorithm.per_rollout == 4
    assert algorithm.position == 9
    assert algorithm.state()["rollout"].keys() >= {"tokens", "logprobs", "values", "advantages", "returns"}
    assert algorithm.rewards.moments.count == 3 * 8
    assert algorithm.controller.coefficient != algorithm.settings.kl


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_r3_r5_kills_between_saves_lose_no_row_and_no_bit(kind, at, tmp_path):
    changes = {"epochs": 4.0, "batch_size": 5} if kind == "sft" else {"steps": 12}
    whole = watched.train(examples.settings(kind, at, tmp_path / "whole", **changes))
    changes["save_every"] = 2
    seen, step = Seen(), 0
    draw = random.Random(1)
    while step < 9:
        # A kill after an odd step loses that step, one after an even step two: it came before the save.
        kill = draw.randint(step + 1, step + 4)
        with pytest.raises(Killed):
            watched.train(examples.settings(kind, at, tmp_path / "killed", **changes), seen, kill_after=kill)
        assert seen.first == step + 1
        step = (kill - 1) // 2 * 2
    watched.train(examples.settings(kind, at, tmp_path / "killed", **changes), seen)
    assert (seen.rows, seen.tokens, seen.digests) == (whole.rows, whole.tokens, whole.digests)
    assert watched.logged(tmp_path / "killed") == watched.logged(tmp_path / "whole")
    assert watched.final(tmp_path / "killed") == watched.final(tmp_path / "whole")
    count = len(seen.trainer.algorithm.data)
    if kind == "sft":
        places = [row for step in sorted(seen.rows) for row in seen.rows[step]]
        assert len(places) == 4 * count == 60
    else:  # two steps are one epoch over a rollout, and the next two see the same completions again
        epochs = [seen.rows[step] + seen.rows[step + 1] for step in range(1, 13, 2)]
        assert [sorted(epoch) for epoch in epochs[0::2]] == [sorted(epoch) for epoch in epochs[1::2]]
        assert all(set(Counter(epoch).values()) == {2} for epoch in epochs)
        places = [row for epoch in epochs[0::2] for row in set(epoch)]
        assert len(places) == 12
        # The third rollout takes the last three prompts of an epoch and the first of the next.
        places = places[:8] + sorted(set(places[8:]) - set(places[:8]))
    for start in range(0, len(places), count):
        assert sorted(places[start : start + count]) == list(range(count))


def test_r4_at_the_end_of_an_epoch_and_of_the_run(at, tmp_path, capsys):
    settings = examples.settings("sft", at, tmp_path / "run", epochs=4 / 5, batch_size=3)  # 4 of 5 steps
    with pytest.raises(Interrupted):
        watched.train(settings, signal_after=4)
    assert not (tmp_path / "run" / "summary.json").exists()
    rest = watched.train(settings)
    assert (rest.digests, rest.first) == ({}, 5)  # all steps were done, only the end was missing
    assert (tmp_path / "run" / "summary.json").exists()
    shown = capsys.readouterr().err
    assert "goes on from step 4" in shown
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = watched.train(settings)
    assert again.digests == {}
    assert capsys.readouterr().err == f"{tmp_path / 'run'}: already complete.\n"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    two = examples.settings("sft", at, tmp_path / "two", epochs=2.0, batch_size=3)
    with pytest.raises(Interrupted):
        watched.train(two, signal_after=5)
    rest = watched.train(two)
    assert list(rest.digests) == [6, 7, 8, 9, 10]
    assert sorted(row for rows in rest.rows.values() for row in rows) == list(range(15))


def test_r4_other_settings_are_refused_unless_no_number_depends_on_them(at, tmp_path):
    settings = examples.settings("ppo", at, tmp_path / "run", steps=4)
    whole = watched.train(examples.settings("ppo", at, tmp_path / "whole", steps=4))
    with pytest.raises(Interrupted):
        watched.train(settings, signal_after=2)
    with pytest.raises(PlauditError, match=r"(?s)other settings:.*learning_rate: 0.003 -> 0.004.*Restore"):
        watched.train(replace(settings, learning_rate=0.004))
    (tmp_path / "run").rename(tmp_path / "moved")
    free = {"log_every": 2, "save_every": 3, "keep": 2, "threads": 1, "device": "cpu", "track": "tensorboard"}
    rest = watched.train(replace(settings, output=str(tmp_path / "moved"), **free))
    assert rest.digests == {step: whole.digests[step] for step in (3, 4)}
    assert watched.final(tmp_path / "moved") == watched.final(tmp_path / "whole")
    assert list((tmp_path / "moved" / "tensorboard").iterdir())


def test_a_checkpoint_of_another_model_is_refused(at, tmp_path):
    with pytest.raises(Interrupted):
        watched.train(examples.settings("ppo", at, tmp_path / "all", steps=2), signal_after=1)
    with pytest.raises(Interrupted):
        watched.train(examples.settings("ppo-top", at, tmp_path / "top", steps=2), signal_after=1)
    shutil.rmtree(tmp_path / "top" / "checkpoints")
    shutil.copytree(tmp_path / "all" / "checkpoints", tmp_path / "top" / "checkpoints")
    with pytest.raises(PlauditError, match="step-000001 was saved from another model or another set of trained"):
        watched.train(examples.settings("ppo-top", at, tmp_path / "top", steps=2))


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_serves(at, tmp_path, capsys):
    settings = examples.settings("sft", at, tmp_path / "run", keep=2)
    whole = watched.train(examples.settings("sft", at, tmp_path / "whole"))
    with pytest.raises(Interrupted):
        watched.train(settings, signal_after=3)
    damaged = tmp_path / "run" / "checkpoints" / "step-000003" / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    rest = watched.train(settings)
    shown = capsys.readouterr().err
    assert f"{damaged} is damaged" in shown
    assert "goes on from step 2" in shown
    assert rest.digests == {step: value for step, value in whole.digests.items() if step > 2}
    assert watched.logged(tmp_path / "run") == watched.logged(tmp_path / "whole")


FAILING = """
import pathlib
calls = 0
def failing(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == {call} and not pathlib.Path(__file__ + ".mended").exists():
        raise ValueError("the judge is out for lunch")
    return [float(len(set(text))) for text in completions]
"""


@pytest.mark.parametrize(("call", "step"), [(5, 6), (2, 4)], ids=["at an evaluation", "in a rollout"])
def test_a_reward_that_fails_costs_no_step(call, step, at, tmp_path):
    held = {} if call == 5 else {"eval_data": None, "evaluate_every": 0}
    changes = {"rewards": f"{tmp_path / 'mine.py'}:failing", "save_every": 0, **held}
    (tmp_path / "mine.py").write_text(FAILING.format(call=0))
    whole = watched.train(examples.settings("ppo", at, tmp_path / "whole", **changes))
    (tmp_path / "mine.py").write_text(FAILING.format(call=call))
    settings = examples.settings("ppo", at, tmp_path / "run", **changes)
    with pytest.raises(PlauditError) as told:
        watched.train(settings)
    assert "failing' failed: ValueError: the judge is out for lunch (" in str(told.value)
    assert str(told.value).endswith(f"Step {step} is saved: once that is mended, the same command goes on from there.")
    (tmp_path / "mine.py.mended").write_text("")
    rest = watched.train(settings)
    first = step if call == 5 else step + 1  # the evaluation is made up for
    assert rest.digests == {number: value for number, value in whole.digests.items() if number >= first}
    assert watched.logged(tmp_path / "run") == watched.logged(tmp_path / "whole")
    assert watched.final(tmp_path / "run") == watched.final(tmp_path / "whole")


def test_a_mistake_before_the_first_step_keeps_nothing(at, tmp_path):
    (tmp_path / "mine.py").write_text(FAILING.format(call=1))
    settings = examples.settings("ppo", at, tmp_path / "run", rewards=f"{tmp_path / 'mine.py'}:failing", eval_data=None)
    with pytest.raises(PlauditError, match=r"out for lunch \([^\n]*$"):
        watched.train(settings)
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_s4_21_a_value_head_with_a_hidden_layer_survives_a_break_and_is_trained_further(at, tmp_path):
    changes = {"value_hidden": 4, "steps": 6, "eval_data": None, "evaluate_every": 0}
    whole = watched.train(examples.settings("ppo", at, tmp_path / "whole", **changes))
    names = whole.trainer.algorithm.policy.learning()
    assert {"value.into.weight", "value.out.weight"} <= names.keys()
    assert names["value.out.weight"].abs().max() > 0
    with pytest.raises(Interrupted):
        watched.train(examples.settings("ppo", at, tmp_path / "run", **changes), signal_after=3)
    rest = watched.train(examples.settings("ppo", at, tmp_path / "run", **changes))
    assert rest.digests == {step: digest for step, digest in whole.digests.items() if step > 3}
    changes["model"] = str(tmp_path / "run" / "final")
    further = examples.built(examples.settings("ppo", at, tmp_path / "further", **changes)).policy
    assert torch.equal(further.value.out.weight, names["value.out.weight"])
