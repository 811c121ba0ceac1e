"""Ensembles: members that were trained apart, gone on with where they stopped, and read as one reward."""

from __future__ import annotations

import json

import pytest
import torch

import examples
import plaudit
import tiny
import watched
from plaudit import PlauditError, machine, recipes
from plaudit.checks import check_rewards, members_of
from plaudit.rewards import load_rewards
from plaudit.trainer import Interrupted


def settings(at, output, **changes):
    quiet = {"model": str(at / "model"), "dropout": False, "evaluate_every": 0, "save_every": 0, "weight_decay": 0.0}
    return examples.settings("comparisons", at, output, **{**quiet, "steps": 3, "members": 2, **changes})


@pytest.fixture(autouse=True, scope="module")
def _no_cleaning_between_members():
    """Memory is given back after each member, which takes longer than these members do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "release", lambda: None)
        yield


@pytest.fixture(scope="module")
def ensemble(at, tmp_path_factory):
    """The folder of an ensemble of two, broken off in the second member, and gone on with."""
    folder = tmp_path_factory.mktemp("ensemble") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train, calls = recipes.train, []

        def stopped(given):
            calls.append(given.output)
            if len(calls) == 2:  # the second member
                watched.train(given, signal_after=2)
            return train(given)

        patch.setattr(recipes, "train", stopped)
        with pytest.raises(Interrupted, match="stopped at step 2, which is saved"):
            recipes._train_members(settings(at, folder))
    assert not (folder / "summary.json").exists()
    first = (folder / "member-0" / "summary.json").read_bytes()
    run = plaudit.train(settings(at, folder))
    assert (folder / "member-0" / "summary.json").read_bytes() == first
    assert run.finished
    return folder


PROMPTS, SAID = ["1:", "22:", "3:", ""], ["ab", "cadg", "aah", "b"]


def test_members_are_bootstraps_with_seeds_of_their_own_and_each_is_normalised(ensemble, at, tmp_path):
    whole = plaudit.train(settings(at, tmp_path / "whole"))
    for number in range(2):
        assert watched.final(ensemble / f"member-{number}") == watched.final(whole.folder / f"member-{number}")
    alone = settings(at, tmp_path / "alone", members=1, bootstrap=True, normalise_scale=True, seed=1)
    run = plaudit.train(alone)
    assert watched.final(run.folder) == watched.final(ensemble / "member-1")
    assert watched.final(ensemble / "member-0") != watched.final(ensemble / "member-1")
    tokenizer = tiny.tokenizer()
    said = [tokenizer.decode(row[:-1]) for item in examples.built(alone).data for row in item.texts]
    scores = load_rewards(str(run.final))([""] * len(said), said, {})
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_the_summary_is_of_all_members(ensemble):
    whole, *each = (
        json.loads((folder / "summary.json").read_text())
        for folder in (ensemble, ensemble / "member-0", ensemble / "member-1")
    )
    assert whole["members"] == 2
    assert whole["steps"] == 6
    assert whole["accuracy"] == pytest.approx((each[0]["accuracy"] + each[1]["accuracy"]) / 2)
    assert whole["seconds"] == pytest.approx(each[0]["seconds"] + each[1]["seconds"])


def test_scores_become_one_by_the_rule(ensemble):
    each = torch.stack([load_rewards(name)(PROMPTS, SAID, {}) for name in members_of(str(ensemble))])
    assert each.shape == (2, 4)
    assert (each[0] - each[1]).abs().min() > 1e-3

    def found(rule):
        return load_rewards(f"ensemble:{rule}@{ensemble}")(PROMPTS, SAID, {})

    torch.testing.assert_close(found("mean"), each.mean(0))
    torch.testing.assert_close(found("minimum"), each.amin(0))
    # The deviation of two numbers is half of what lies between them.
    torch.testing.assert_close(found("mean-1std"), each.amin(0))
    torch.testing.assert_close(found("mean-0.5std"), each.mean(0) - (each[0] - each[1]).abs() / 4)
    source = load_rewards(f"ensemble:mean@{ensemble}").sources[f"ensemble:mean@{ensemble}"]
    variance = ((each[0] - each[1]) / 2).square()
    assert source.disagreement(PROMPTS, SAID) == pytest.approx(variance.tolist(), rel=1e-4)


def test_a_policy_learns_from_an_ensemble(ensemble, at, tmp_path):
    given = {"rewards": f"ensemble:mean-1std@{ensemble}", "steps": 1, "eval_data": None, "save_every": 0}
    run = plaudit.train(examples.settings("ppo", at, tmp_path / "run", **given))
    assert "score" in run.metrics()[-1]


@pytest.mark.parametrize("rule", ["median", "mean-std", "mean--1std", "", "mean-1std2"])
def test_a_rule_that_is_none(rule, ensemble):
    with pytest.raises(
        PlauditError, match="write ensemble:mean@FOLDER, ensemble:minimum@FOLDER, or ensemble:mean-1std"
    ):
        check_rewards([f"ensemble:{rule}@{ensemble}"])


def test_a_folder_that_holds_no_members(at, ensemble):
    for folder in (at / "model", "nowhere", ensemble / "member-0"):
        with pytest.raises(PlauditError, match="holds no member-0/final: give the run folder of `plaudit reward` with"):
            check_rewards([f"ensemble:mean@{folder}"])
    with pytest.raises(PlauditError, match=r"has no config\.json"):
        check_rewards([str(ensemble)])
