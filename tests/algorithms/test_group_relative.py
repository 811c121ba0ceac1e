"""Lite PPO, GDPO, GMPO and RLOO with whitened advantages: what each class makes of its settings, by hand."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch

import examples
from plaudit import settings as verbs
from plaudit.advantages import decoupled, group_standardised
from plaudit.algorithms import group_relative, policy_gradient
from plaudit.batch import collate
from plaudit.policy import Output
from plaudit.world import World

COMMON = {"model": "", "data": "", "rewards": "", "group": 2}
EARNED = [1.0, 4.0, 2.0, 2.0]  # two prompts, two completions each


def credit(cls, settings):
    """What four completions, of 1, 2, 1 and 3 tokens, are credited with at each action."""
    batch = collate([[5]] * 4, [[6] * n for n in (1, 2, 1, 3)], [0, 0, 1, 1])
    algorithm = cls.__new__(cls)
    algorithm.settings, algorithm.world = settings, World(torch.device("cpu"))
    rewards = torch.zeros(batch.tokens.shape).scatter(1, batch.lengths[:, None] - 1, torch.tensor(EARNED)[:, None])
    found = algorithm.credit(batch, rewards)
    assert found[~batch.actions].abs().sum() == 0
    return [found[row][batch.actions[row]].tolist() for row in range(4)]


def test_lite_ppo_takes_off_the_mean_of_a_group_and_divides_by_the_spread_of_all():
    spread = statistics.pstdev(EARNED)
    expected = [[-1.5 / spread], [1.5 / spread] * 2, [0.0], [0.0] * 3]
    found = credit(group_relative.LiteClipped, verbs.LitePPO(**COMMON))
    assert found == [pytest.approx(row, abs=1e-6) for row in expected]


def test_rloo_with_whitened_advantages():
    plain = credit(policy_gradient.LeaveOneOut, verbs.RLOO(**COMMON))
    assert plain == [[-3.0], [3.0] * 2, [0.0], [0.0] * 3]
    found = credit(policy_gradient.LeaveOneOut, verbs.RLOO(**COMMON, whiten_advantages=True))
    spread = statistics.pstdev([-3.0, 3.0, 0.0, 0.0])
    assert found == [pytest.approx(row, abs=1e-6) for row in ([-3 / spread], [3 / spread] * 2, [0.0], [0.0] * 3)]


def test_gdpo_gives_a_small_reward_the_weight_of_a_large_one():
    each = torch.tensor([[1.0, 3.0, 0.0, 0.0], [0.01, 0.0, 0.02, 0.03]])
    found = decoupled(each, torch.tensor([2.0, 1.0]), 2)
    half = math.sqrt(0.5)
    assert found.tolist() == pytest.approx([-2 * half + half, 2 * half - half, -half, half], rel=1e-5)
    # Where one alone is given, it is what GRPO has.
    torch.testing.assert_close(decoupled(each[:1], torch.ones(1), 2), group_standardised(each[0], 2))
    spread = statistics.pstdev(EARNED)
    middle = statistics.fmean(EARNED)
    expected = [[(value - middle) / spread] * count for value, count in zip(EARNED, (1, 2, 1, 3), strict=True)]
    found = credit(group_relative.GroupRewardDecoupled, verbs.GDPO(**COMMON))
    assert found == [pytest.approx(row, abs=1e-6) for row in expected]


def test_gdpo_leaves_a_completion_out_of_a_reward_that_does_not_apply():
    nan = float("nan")
    each = torch.tensor([[1.0, nan, 3.0, nan, nan, 7.0], [0.0, 5.0, 1.0, 4.0, 4.0, 4.0]])
    found = decoupled(each, torch.tensor([1.0, 1.0]), 3).tolist()
    second = [(value - 2) / statistics.stdev([0.0, 5.0, 1.0]) for value in (0.0, 5.0, 1.0)]
    first = [-math.sqrt(0.5), 0.0, math.sqrt(0.5)]
    assert found == pytest.approx([a + b for a, b in zip(first, second, strict=True)] + [0.0] * 3, rel=1e-5)


def test_gdpo_learns_from_rewards_each_on_its_own_scale(at, tmp_path):
    (tmp_path / "two.py").write_text(
        "def large(completions, **columns):\n    return [1000.0 * (i % 4 == 1) for i in range(len(completions))]\n\n\n"
        "def small(completions, **columns):\n    return [0.001 * (i % 4 == 2) for i in range(len(completions))]\n"
    )
    changes = {"rewards": tuple(f"{tmp_path / 'two.py'}:{name}" for name in ("large", "small")), "reward_weights": ()}
    changes |= {"group": 4, "reward_normalise": False, "missing_end_penalty": 0.0, "kl": 0.0, "kl_target": 0.0}
    algorithm = examples.built(examples.settings("gdpo", at, tmp_path / "run", **changes))
    batch = algorithm.rollout()
    assert algorithm.notes["score"] == pytest.approx(250.00025)
    by_row = batch.advantages.sum(1) / batch.actions.sum(1)
    assert by_row.tolist() == pytest.approx([-1.0, 1.0, 1.0, -1.0] * 2, rel=1e-3)


def test_gmpo_clips_log_ratios_where_going_on_would_pay():
    batch = collate([[5], [5]], [[6, 6], [6, 6, 6]], [0, 1])
    moved = torch.tensor([[9, 0.9, -0.9, 9], [9, 0.5, -0.5, 0.1]], dtype=torch.float64)
    gains = torch.tensor([[3.0] * 4, [-1.0] * 4], dtype=torch.float64)
    batch = dataclasses.replace(batch, logprobs=torch.full_like(moved, -1.0), advantages=gains)
    own = group_relative.GeometricMean.__new__(group_relative.GeometricMean)
    own.settings = verbs.GMPO(**COMMON, clip_low=0.2, clip_high=0.4)
    logprobs = (moved - 1).requires_grad_()
    loss, stats = own.objective(Output(logprobs=logprobs), batch)
    good, bad = math.exp((0.4 - 0.9) / 2), math.exp((0.5 - 0.2 + 0.1) / 3)
    assert loss.item() == pytest.approx(-3 * good + bad, rel=1e-9)
    assert stats["ratio"].item() == pytest.approx(good + bad, rel=1e-9)
    assert stats["clip_fraction"].item() == pytest.approx(1 / 2 + 1 / 3, rel=1e-6)
    (slope,) = torch.autograd.grad(loss, logprobs)
    expected = [[0, 0, -3 * good / 2, 0], [0, bad / 3, 0, bad / 3]]
    torch.testing.assert_close(slope, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert own.weight(batch) == 2
