"""Advantages among the completions of a prompt, and the weights and penalties of what algorithms that sample share."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plaudit.advantages import (
    BudgetedKL,
    degenerate,
    group_centred,
    group_standardised,
    kl_k2,
    kl_k3,
    kl_straight_through,
    leave_one_out,
    overlong_penalty,
    ranked_between,
    rewards_to_go,
)

KINDS = [group_centred, group_standardised, leave_one_out]
GROUPS = st.lists(st.lists(st.integers(-40, 40), min_size=3, max_size=3), min_size=1, max_size=4)


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_group_advantages_by_hand() -> None:
    rewards = double([1, 2, 6, 0, 0, 3])
    assert group_centred(rewards, 3).tolist() == [-2, -1, 3, -1, -1, 2]
    assert leave_one_out(rewards, 3).tolist() == [-3, -1.5, 4.5, -1.5, -1.5, 3]
    first, second = math.sqrt(7), math.sqrt(3)  # unbiased: (4 + 1 + 9) / 2 and (1 + 1 + 4) / 2
    expected = [-2 / first, -1 / first, 3 / first, -1 / second, -1 / second, 2 / second]
    assert group_standardised(rewards, 3).tolist() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(GROUPS)
def test_b13_group_advantages_are_the_loops_and_sum_to_0(groups: list[list[int]]) -> None:
    rewards = double([r / 8 for group in groups for r in group])
    out, centred, scaled = [], [], []
    for group in groups:
        values = [r / 8 for r in group]
        spread = statistics.stdev(values)
        for i, r in enumerate(values):
            others = values[:i] + values[i + 1 :]
            out.append(r - sum(others) / 2)
            centred.append(r - sum(values) / 3)
            scaled.append(0.0 if spread == 0 else (r - sum(values) / 3) / spread)
    assert leave_one_out(rewards, 3).tolist() == pytest.approx(out, abs=1e-9)
    assert group_centred(rewards, 3).tolist() == pytest.approx(centred, abs=1e-9)
    assert group_standardised(rewards, 3).tolist() == pytest.approx(scaled, abs=1e-9)
    for kind in KINDS:
        assert kind(rewards, 3).view(-1, 3).sum(1).abs().max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(GROUPS, st.floats(0.1, 10), st.floats(-5, 5))
def test_b13_grpo_does_not_see_scale_or_shift(groups: list[list[int]], scale: float, shift: float) -> None:
    rewards = double([r / 8 for group in groups for r in group])
    moved = group_standardised(scale * rewards + shift, 3)
    torch.testing.assert_close(moved, group_standardised(rewards, 3), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6])
def test_r16_equal_rewards_and_groups_of_one_give_exactly_0(kind, value: float) -> None:
    rewards = torch.full((6,), value)
    assert kind(rewards, 3).eq(0).all()
    assert kind(torch.tensor([1.0, -2.0, value]), 1).eq(0).all()
    nearly = rewards.clone()
    nearly[1] += 1e-7  # lost to rounding, or what is left of it
    assert kind(nearly, 3).eq(0).all()
    assert kind(torch.tensor([0.0, 0.0, 1e-3]), 3)[2] > 0


def test_which_groups_teach_nothing() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 2.0])
    assert degenerate(rewards, 2).tolist() == [True, False, True]
    assert degenerate(rewards, 6).tolist() == [False]
    assert degenerate(rewards, 1).all()


def test_b25_nothing_flows_through_group_advantages() -> None:
    rewards = torch.randn(6, requires_grad=True)
    assert not any(kind(rewards, 3).requires_grad for kind in KINDS)


def test_rewards_to_go_by_hand() -> None:
    rewards = torch.tensor([[9.0, -1, 9, -2, 10], [9, 1, 2, 9, 9]])
    actions = torch.tensor([[0, 1, 0, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    assert rewards_to_go(rewards, actions).tolist() == [[0, 7, 0, 8, 10], [0, 3, 2, 0, 0]]
    assert rewards_to_go(rewards + torch.where(actions, 0.0, torch.nan), actions).isfinite().all()


# -------------------------------------------------------------------------------------------- divergences and weights


def test_b5_the_straight_through_term_is_k3_and_pulls_as_k2() -> None:
    policy = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reference = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.testing.assert_close(kl_straight_through(policy, reference), kl_k3(policy, reference), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(kl_straight_through(policy, reference).sum(), [policy, reference], allow_unused=True)
    (expected,) = torch.autograd.grad(kl_k2(policy, reference).sum(), policy)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=0)
    assert found[1] is None


def test_b21_a_budget_is_held_from_above_and_costs_nothing_below() -> None:
    control = BudgetedKL(0.1, budget=2.0, rate=0.08)
    assert control.updated(3.0, 64).coefficient == pytest.approx(0.14)
    assert control.updated(1.0, 64).coefficient == pytest.approx(0.06)
    assert control.updated(0.0, 64).coefficient == pytest.approx(0.02)
    assert control.updated(4.0, 64).coefficient == control.updated(40.0, 64).coefficient == pytest.approx(0.18)
    assert control.updated(0.0, 64).updated(0.0, 64).coefficient == 0.0
    assert control.updated(2.0, 64) == control
    # A policy whose divergence answers a weight w with 1 / w settles where the constraint binds: w = 1 / budget.
    for _ in range(400):
        control = control.updated(min(1 / max(control.coefficient, 1e-3), 10.0), 64)
    assert control.coefficient == pytest.approx(0.5, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------- rewards


def test_overlong_completions_pay_by_how_far_they_reach_into_the_last_share() -> None:
    lengths = torch.tensor([1, 80, 85, 90, 100])
    assert overlong_penalty(lengths, 100, 0.2).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1])
    assert overlong_penalty(lengths, 100, 0.0).tolist() == [0] * 5
    assert overlong_penalty(lengths, 100, 1.0).tolist() == pytest.approx([-0.01, -0.8, -0.85, -0.9, -1])


def test_ranks_leave_out_whole_rows_at_either_end() -> None:
    rewards = torch.tensor([3.0, 1, 2, 5, 4])
    assert ranked_between(rewards, 0.4, 0.0).tolist() == [True, False, False, True, True]
    assert ranked_between(rewards, 0.0, 0.2).tolist() == [True, True, True, False, True]
    assert ranked_between(rewards, 0.39, 0.39).tolist() == [True, False, True, False, True]
    assert ranked_between(torch.zeros(4), 0.5, 0.0).tolist() == [False, False, True, True]
    assert ranked_between(rewards, 0.0, 0.0).all()
