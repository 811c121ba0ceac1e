"""Losses of offline learning by hand-worked numbers, slow loops and properties."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from plaudit.offline_losses import (
    conservative,
    expectile,
    next_values,
    temporal_difference,
    weighted_imitation,
)

# Two rows: the first acts in columns 1, 3 and 4, the second in column 2 only, the third never.
ACTIONS = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


def stream(seed: int = 0, *more: int) -> torch.Tensor:
    """Random numbers for every column, NaN where nobody acts."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*ACTIONS.shape, *more, generator=generator, dtype=torch.float64)
    return values.masked_fill(~ACTIONS.view(*ACTIONS.shape, *[1] * len(more)), torch.nan)


def test_b20_the_next_value_is_that_of_the_rows_next_action_and_0_after_the_last():
    values = torch.arange(15.0).view(3, 5).masked_fill(~ACTIONS, torch.nan).requires_grad_()
    found = next_values(values, ACTIONS)
    assert found.tolist() == [[0, 3, 0, 4, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert not found.requires_grad
    assert next_values(values, torch.zeros_like(ACTIONS)).tolist() == [[0.0] * 5] * 3


def test_b20_the_temporal_difference_by_hand():
    actions = torch.tensor([[False, True, True]])
    q = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [0.5, -1.0]]])
    rewards, following = torch.tensor([[7.0, 0.5, 2.0]]), torch.tensor([[7.0, 3.0, 0.0]])
    total, stats = temporal_difference(q, rewards, following, actions, gamma=0.5)
    # targets 0.5 + 0.5 * 3 = 2 and 2: (1, 0) and (1.5, 3) off
    assert total.item() == 1 + 0 + 2.25 + 9
    assert stats == {}


def test_b20_losses_are_what_plain_loops_give_and_nan_outside_actions_does_no_harm():
    q, rewards, following, values, targets = stream(0, 2), stream(1), stream(2), stream(3), stream(4)
    logprobs, q_logprobs = -stream(5).abs(), -stream(6, 2).abs()
    td = value = cql = imitation = 0.0
    for b, t in ACTIONS.nonzero().tolist():
        error = targets[b, t] - values[b, t]
        value += float((0.2 if error < 0 else 0.8) * error**2)
        imitation -= min(math.exp(1.5 * error), 100.0) * float(logprobs[b, t])
        for k in range(2):
            td += float((rewards[b, t] + 0.9 * following[b, t] - q[b, t, k]) ** 2)
            cql -= float(q_logprobs[b, t, k])
    assert temporal_difference(q, rewards, following, ACTIONS, 0.9)[0].item() == pytest.approx(td, abs=1e-12)
    assert expectile(values, targets, ACTIONS, 0.8)[0].item() == pytest.approx(value, abs=1e-12)
    assert conservative(q_logprobs, ACTIONS)[0].item() == pytest.approx(cql, abs=1e-12)
    total, stats = weighted_imitation(logprobs, targets - values, ACTIONS, 1.5)
    assert total.item() == pytest.approx(imitation, abs=1e-12)
    assert stats["nll"].item() == pytest.approx(-float(logprobs[ACTIONS].sum()))


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.7, 0.9, 0.999])
def test_b20_the_minimiser_is_the_expectile(tau):
    targets = torch.tensor([[-2.0, 0.0, 0.5, 3.0]], dtype=torch.float64)
    actions = torch.ones(1, 4, dtype=torch.bool)

    def slope(level: float) -> float:
        value = torch.tensor(level, dtype=torch.float64, requires_grad=True)
        expectile(value.expand(1, 4), targets, actions, tau)[0].backward()
        return value.grad.item()

    low, high = -2.0, 3.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    assert slope(low) == pytest.approx(0, abs=1e-9)
    if tau == 0.5:
        assert low == pytest.approx(targets.mean().item(), abs=1e-9)
    # The definition: what lies above, weighted by tau, balances what lies below, weighted by 1 - tau.
    above, below = (targets - low).clamp(min=0).sum(), (low - targets).clamp(min=0).sum()
    assert tau * above.item() == pytest.approx((1 - tau) * below.item(), abs=1e-9)
    if tau == 0.999:
        assert 2.9 < low < 3.0


def test_b20_the_conservative_term_is_a_cross_entropy_of_q():
    q = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens = torch.tensor([0, 6, 3, 3, 1])
    actions = torch.tensor([[False, True, True, True, True, True]])
    chosen = torch.zeros(1, 6, 1, dtype=torch.float64)
    chosen[0, 1:, 0] = q.log_softmax(1)[torch.arange(5), tokens]
    expected = sum(math.log(sum(math.exp(x) for x in row)) - row[a] for row, a in zip(q.tolist(), tokens, strict=True))
    assert conservative(chosen, actions)[0].item() == pytest.approx(float(expected), abs=1e-12)
    cross_entropy = torch.nn.functional.cross_entropy(q, tokens, reduction="sum")
    assert conservative(chosen, actions)[0].item() == pytest.approx(cross_entropy.item(), abs=1e-12)


def test_imitation_counts_good_tokens_more_and_no_token_beyond_the_cut():
    actions = torch.tensor([[False, True, True, True]])
    logprobs = torch.tensor([[0.0, -1.0, -2.0, -4.0]], requires_grad=True)
    advantages = torch.tensor([[9.0, 0.0, math.log(2.0), 50.0]], requires_grad=True)
    total, stats = weighted_imitation(logprobs, advantages, actions, beta=1.0)
    assert total.item() == pytest.approx(1 + 2 * 2 + 100 * 4)
    assert stats["nll"].item() == 7
    assert stats["awac_weight"].item() == pytest.approx(1 + 2 + 100)
    total.backward()
    assert logprobs.grad.tolist()[0] == pytest.approx([0, -1, -2, -100])
    assert advantages.grad is None
    assert weighted_imitation(logprobs, advantages, actions, beta=0.0)[0].item() == 7


def test_b25_nothing_flows_to_targets_rewards_and_next_values():
    given = [torch.nan_to_num(stream(i)).requires_grad_() for i in range(3)]
    q = torch.nan_to_num(stream(4, 2)).requires_grad_()
    values = torch.nan_to_num(stream(5)).requires_grad_()
    total = temporal_difference(q, given[0], given[1], ACTIONS, 0.9)[0] + expectile(values, given[2], ACTIONS, 0.7)[0]
    total.backward()
    assert [tensor.grad for tensor in given] == [None, None, None]
    assert q.grad.abs().sum() > 0
    assert values.grad.abs().sum() > 0


def test_b24_gradients():
    q, values = torch.nan_to_num(stream(0, 2)).requires_grad_(), torch.nan_to_num(stream(1)).requires_grad_()
    rewards, targets = torch.nan_to_num(stream(2)), torch.nan_to_num(stream(3))
    assert gradcheck(lambda x: temporal_difference(x, rewards, targets, ACTIONS, 0.9)[0], q, atol=1e-6)
    assert gradcheck(lambda x: expectile(x, targets, ACTIONS, 0.7)[0], values, atol=1e-6)
    assert gradcheck(lambda x: conservative(x, ACTIONS)[0], q, atol=1e-6)
    assert gradcheck(lambda x: weighted_imitation(x, targets, ACTIONS, 0.7)[0], values, atol=1e-6)
