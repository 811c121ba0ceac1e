"""What is not finite never reaches the weights (R15)."""

import pytest
import torch

import examples
import watched
from plaudit import PlauditError, checkpoint
from plaudit.trainer import Trainer

KINDS = ("sft", "comparisons", "ppo")
WHERE = ("loss", "gradient")


def spoil(patch, where, value, steps):
    """Puts a value that is not finite into the loss alone or into one number of one gradient alone, in these steps."""
    gradients = Trainer._gradients

    def spoiled(trainer, algorithm, batch):
        spoiling, own = trainer.step + 1 in steps, algorithm.loss
        if spoiling and where == "loss":
            algorithm.loss = lambda part: (own(part)[0] + value, {})
        gradients(trainer, algorithm, batch)
        algorithm.loss = own
        if spoiling and where == "gradient":
            list(algorithm.policy.learning().values())[-1].grad.view(-1)[-1] = value

    patch.setattr(Trainer, "_gradients", spoiled)


def told(kind, at, rows):
    """How a person is told of these rows, which stand one to a line in the data."""
    rows = sorted(set(rows))
    if kind == "ppo":
        return f"rows {', '.join(f'{at}/prompts.jsonl:{row + 1}' for row in rows)} of the data"
    return f"rows {rows} of those trained on, the first being 0"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WHERE)
def test_r15_a_run_stops_with_its_weights_whole(kind, where, at, tmp_path):
    settings = examples.settings(kind, at, tmp_path / "run", save_every=0)
    whole = watched.train(examples.settings(kind, at, tmp_path / "whole", save_every=0))
    seen = watched.Seen()
    value = torch.nan if kind == "sft" else torch.inf
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, where, value, {3})
        with pytest.raises(PlauditError) as stopped:
            watched.train(settings, seen)
    rows = told(kind, at, seen.rows[3])
    assert str(stopped.value).startswith(f"the loss or its gradient is not finite at step 3 ({rows});")
    assert "on_nan" in str(stopped.value)
    # The digest was taken after step 2; what was saved when the run stopped is that state, bit for bit.
    assert watched.digest(seen.trainer) == whole.digests[2]
    saved, _ = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-000002"
    rest = watched.train(settings)
    assert rest.digests == {step: value for step, value in whole.digests.items() if step > 2}
    assert watched.logged(tmp_path / "run") == watched.logged(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WHERE)
def test_r15_a_skipped_step_changes_neither_weights_nor_moments(kind, where, at, tmp_path, monkeypatch, capsys):
    states = []
    update = Trainer._update

    def watching(trainer, algorithm, batch):
        before = watched.learned(trainer)
        update(trainer, algorithm, batch)
        states.append(before == watched.learned(trainer))

    monkeypatch.setattr(Trainer, "_update", watching)
    with monkeypatch.context() as patch:
        spoil(patch, where, torch.inf if kind == "sft" else torch.nan, {2, 3, 5})
        seen = watched.train(examples.settings(kind, at, tmp_path / "run", on_nan="skip"))
    assert [step for step, same in enumerate(states, 1) if same] == [2, 3, 5]
    said = capsys.readouterr().err
    for step in (2, 3, 5):
        place = f"step {step} ({told(kind, at, seen.rows[step])})"
        assert f"{place}: loss or gradient not finite, step skipped" in said
    rows, _ = watched.logged(tmp_path / "run")
    lines = {row["step"]: row for row in rows}
    figure = {"loss": "loss", "gradient": "gradient_norm"}[where]
    assert [step for step in lines if step and lines[step][figure] is None] == [2, 3, 5]
    assert "learning_rate" not in lines[3]
    assert lines[4]["learning_rate"] > 0


def test_r15_ten_in_a_row_are_skipped_and_no_more(at, tmp_path, monkeypatch):
    def settings(name):
        return examples.settings("sft", at, tmp_path / name, on_nan="skip", steps=24, epochs=1.0, evaluate_every=0)

    with monkeypatch.context() as patch:
        spoil(patch, "loss", torch.nan, {*range(2, 12), *range(13, 24)})
        seen = watched.Seen()
        with pytest.raises(PlauditError, match="not finite at step 23 "):
            watched.train(settings("run"), seen)
    assert sorted(seen.digests) == list(range(1, 23))
    # How many were skipped in a row is remembered when the run goes on.
    with monkeypatch.context() as patch:
        spoil(patch, "loss", torch.nan, {23})
        with pytest.raises(PlauditError, match="not finite at step 23 "):
            watched.train(settings("run"))
    watched.train(settings("run"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_r15_a_reward_that_is_not_finite_is_named(value, at, tmp_path):
    (tmp_path / "broken.py").write_text(
        "calls = []\n"
        "def broken(prompts, completions, **columns):\n"
        "    calls.append(1)\n"
        f"    return [float({str(value)!r}) if len(calls) == 2 and i == 3 else 1.0 for i in range(len(prompts))]\n"
    )
    seen = watched.Seen()
    settings = examples.settings(
        "ppo", at, tmp_path / "run", rewards=f"{tmp_path / 'broken.py'}:broken", eval_data=None
    )
    which = rf"the prompt at {at}/prompts\.jsonl:\d+"
    said = {"nan": f"NaN or None for a completion of {which}: ", "inf": f"inf for completion 3, of {which}: "}
    with pytest.raises(PlauditError, match=rf"reward '.*broken.py:broken' returned {said[str(value)]}"):
        watched.train(settings, seen)
    assert max(seen.digests) == 4
    assert watched.digest(seen.trainer) == seen.digests[4]
