"""Losses of policy gradients beyond PPO's: a number worked by hand, a slow reference, the clips, the aggregation."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plaudit.losses import (
    clipped_surrogate,
    clipped_weight,
    gamma_weight,
    geometric_surrogate,
    reinforce,
    sequence_surrogate,
    soft_gate,
)

Found = tuple[Tensor, dict[str, Tensor]]


def double(values: list[list[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


ACTIONS = mask([[0, 1, 1, 0, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])


def losses(actions: Tensor) -> dict[str, Callable[[Tensor, Tensor, Tensor], Found]]:
    """Each loss of (logprobs, old logprobs, advantages)."""
    lengths = actions.sum(1, keepdim=True).clamp(min=1)
    share, clip = actions / lengths, (0.2, 0.3)
    return {
        "reinforce": lambda new, old, gain: reinforce(new, gain, actions),
        "reinforce by rows": lambda new, old, gain: reinforce(new, gain, actions, share),
        "dual clip": lambda new, old, gain: clipped_surrogate(new, old, gain, actions, clip, dual_clip=1.5),
        "by rows": lambda new, old, gain: clipped_surrogate(new, old, gain, actions, clip, share=share),
        "sequences": lambda new, old, gain: sequence_surrogate(new, old, gain, actions, clip, mean=True),
        "products": lambda new, old, gain: sequence_surrogate(new, old, gain, actions, clip, mean=False),
        "weights": lambda new, old, gain: clipped_weight(new, old, gain, actions, clip),
        "long sequences": lambda new, old, gain: sequence_surrogate(
            new, old, gain, actions, clip, mean=True, share=actions.sum(1)
        ),
        "gates by rows": lambda new, old, gain: soft_gate(new, old, gain, actions, (1.0, 2.0), share, share),
        "geometric by rows": lambda new, old, gain: geometric_surrogate(new, old, gain, actions, clip),
        "gammas": lambda new, old, gain: gamma_weight(new, old, gain, actions, (2.0, 3.0), (3.0, 2.0)),
    }


NAMES = list(losses(ACTIONS))


def test_reinforce_by_hand() -> None:
    logprobs = double([[9, -1, -2], [9, -4, torch.nan]]).requires_grad_()
    gains = double([[9, 3, 3], [9, -0.5, 9]])
    loss, stats = reinforce(logprobs, gains, mask([[0, 1, 1], [0, 1, 0]]))
    assert loss.item() == 9 - 2  # -(3 * -3) - (-0.5 * -4)
    assert stats == {}
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [[0, -3, -3], [0, 0.5, 0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(4.0, -2.0, 0.0), (2.9, -2.0, 5.8), (0.5, -2.0, 0.0), (4.0, 2.0, 0.0), (1.1, -2.0, 2.2)],
)
def test_b12_a_dual_clip_bounds_what_a_bad_action_can_lose(ratio: float, advantage: float, gradient: float) -> None:
    logprobs = double([[0.0, math.log(ratio)]]).requires_grad_()
    nothing = torch.zeros_like(logprobs)
    actions = mask([[0, 1]])
    loss, stats = clipped_surrogate(logprobs, nothing, nothing + advantage, actions, 0.2, dual_clip=3.0)
    if ratio == 4.0 and advantage < 0:
        assert loss.item() == pytest.approx(6.0)  # and not 8
    found = torch.autograd.grad(loss, logprobs)[0][0, 1].item()
    assert found == pytest.approx(gradient, rel=1e-12)
    assert stats["clip_fraction"].item() == (gradient == 0)
    without, _ = clipped_surrogate(logprobs, nothing, nothing + advantage, actions, 0.2)
    assert (without.item() == loss.item()) == (ratio != 4.0 or advantage > 0)


# ------------------------------------------------------------------------------------------------------ aggregation


def test_b14_aggregation_on_lengths_1_and_9() -> None:
    # Ratios are 1, advantages 1 in the short and -2 in the long completion: every loss is a rational number.
    actions = mask([[0] + [1] + [0] * 8, [0] + [1] * 9])
    gains = torch.where(torch.tensor([[True], [False]]), 1.0, -2.0).double().expand(2, 10)
    lengths, limit = actions.sum(1, keepdim=True), 12

    def summed(share: Tensor | None) -> float:
        nothing = torch.zeros(2, 10, dtype=torch.float64)
        return clipped_surrogate(nothing, nothing, gains, actions, 0.2, share=share)[0].item()

    tokens = Fraction(-1 + 18, 10)  # dapo, bnpo: the mean over ten tokens
    sequences = Fraction(-1 + 2, 2)  # grpo: the mean over two completions of their tokens' means
    constant = Fraction(-1 + 18, 2 * limit)  # dr_grpo: one length for all
    whole = Fraction(-1 + 18, 2)  # rloo, vpg: the mean over two completions of their sums
    assert summed(None) / 10 == pytest.approx(float(tokens), rel=1e-12)
    assert summed(actions / lengths) / 2 == pytest.approx(float(sequences), rel=1e-6)
    assert summed(actions / torch.tensor(limit)) / 2 == pytest.approx(float(constant), rel=1e-6)
    assert summed(actions.double()) / 2 == pytest.approx(float(whole), rel=1e-12)
    assert len({tokens, sequences, constant, whole}) == 4


def test_statistics_may_count_otherwise_than_the_loss() -> None:
    actions = mask([[0, 1, 0, 0], [0, 1, 1, 1]])
    logprobs = double([[0, math.log(1.5), 0, 0], [0, math.log(2), 0, math.log(0.5)]])
    old, gains = torch.zeros_like(logprobs), torch.ones_like(logprobs)
    counted = actions.double() / actions.sum(1, keepdim=True)
    loss, stats = clipped_surrogate(logprobs, old, gains, actions, 0.2, share=actions / 8, counted=counted)
    assert loss.item() == pytest.approx(-(1.2 + 1.2 + 1 + 0.5) / 8, rel=1e-6)
    assert stats["ratio"].item() == pytest.approx(1.5 + 3.5 / 3)
    assert stats["clip_fraction"].item() == pytest.approx(1 + 1 / 3)


# ---------------------------------------------------------------------------------------------- ratios of sequences


def test_b15_the_ratio_of_a_sequence_is_the_geometric_mean_or_the_product() -> None:
    ratios = double([[1, 2.0, 0.9, 7], [1, 1.0, 1.21, 7]])
    gains = double([[9, 1, 1, 9], [9, -1, -1, 9]])
    actions = mask([[0, 1, 1, 0], [0, 1, 1, 0]])
    loss, stats = sequence_surrogate(ratios.log(), torch.zeros_like(ratios), gains, actions, 0.3, mean=True)
    first = 1.8**0.5  # clipped to 1.3; the second is 1.1
    assert loss.item() == pytest.approx(-1.3 + 1.1, rel=1e-12)
    assert stats["ratio"].item() == pytest.approx(first + 1.1, rel=1e-12)
    assert stats["clip_fraction"].item() == 1
    terms = [r - 1 - math.log(r) for r in (2.0, 0.9, 1.0, 1.21)]
    assert stats["approx_kl"].item() == pytest.approx(sum(terms) / 2, rel=1e-12)
    loss, stats = sequence_surrogate(ratios.log(), torch.zeros_like(ratios), gains, actions, 0.3, mean=False)
    assert loss.item() == pytest.approx(-1.3 + 1.21, rel=1e-12)
    assert stats["ratio"].item() == pytest.approx(1.8 + 1.21, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_b15_sequences_of_one_token_are_tokens(seed: int, mean: bool) -> None:
    new, old, gains = normal(3, 5, 2, seed=seed)
    actions = mask([[0, 1]] * 5)
    whole, figures = sequence_surrogate(new, old, gains, actions, (0.1, 0.4), mean=mean)
    tokens, expected = clipped_surrogate(new, old, gains, actions, (0.1, 0.4))
    torch.testing.assert_close(whole, tokens, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(figures, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_b15_sequences_are_the_loop(seed: int, mean: bool) -> None:
    actions = torch.rand(4, 6, generator=torch.Generator().manual_seed(seed)) < 0.6
    actions[0] = False  # a completion that is left out is no sequence
    new, old = 0.4 * normal(2, 4, 6, seed=seed)
    gains = normal(4, 1, seed=seed + 1).expand(4, 6)
    total = seen = 0.0
    for row in range(4):
        logs = [(new[row, t] - old[row, t]).item() for t in range(6) if actions[row, t]]
        if logs:
            ratio = math.exp(sum(logs) / len(logs) if mean else sum(logs))
            gain = gains[row, 0].item()
            total -= min(ratio * gain, min(max(ratio, 0.8), 1.3) * gain)
            seen += ratio
    loss, stats = sequence_surrogate(new, old, gains, actions, (0.2, 0.3), mean=mean)
    assert loss.item() == pytest.approx(total, rel=1e-9, abs=1e-12)
    assert stats["ratio"].item() == pytest.approx(seen, rel=1e-9)


# -------------------------------------------------------------------------------------------------------- weights


def test_b15_a_clipped_weight_leaves_every_action_its_gradient() -> None:
    ratios = double([[7, 3.0, 0.5, 1.1, 7]])
    logprobs = (ratios.log() - 1).requires_grad_()
    old = torch.full_like(ratios, -1.0)
    gains = double([[9, 2, 2, -2, 9]])
    loss, stats = clipped_weight(logprobs, old, gains, mask([[0, 1, 1, 1, 0]]), (0.2, 0.5))
    weights = double([[0, 1.5, 0.8, 1.1, 0]])
    assert loss.item() == pytest.approx(-(weights * gains * logprobs).sum().item(), rel=1e-12)
    found = torch.autograd.grad(loss, logprobs)[0]
    torch.testing.assert_close(found, -weights * gains, rtol=1e-12, atol=0)
    assert stats["clip_fraction"].item() == 2
    assert stats["ratio"].item() == pytest.approx(4.6, rel=1e-12)


def test_s2_06_a_gate_is_steepest_where_the_policy_has_not_moved_and_fades_on_either_side() -> None:
    # SAPO by hand: sigmoid is 1/2 at a ratio of 1, and 3/4 where t (ratio - 1) = log 3.
    log3 = math.log(3)
    ratios = double([[7, 1.0, 1 + log3, 1 + log3 / 2]])
    logprobs, gains = ratios.log().requires_grad_(), double([[9, 2, 1, -1]])
    actions = mask([[0, 1, 1, 1]])
    share, counted = actions / 3, actions.double() / 3
    loss, stats = soft_gate(logprobs, torch.zeros_like(ratios), gains, actions, (1.0, 2.0), share, counted)
    assert loss.item() == pytest.approx(-(2 * 4 * 0.5 + 4 * 0.75 - 2 * 0.75) / 3, rel=1e-6)
    slopes = torch.autograd.grad(loss, logprobs)[0][0]
    expected = [0, -2 / 3, -4 * 0.75 * 0.25 * (1 + log3) / 3, 4 * 0.75 * 0.25 * (1 + log3 / 2) / 3]
    assert slopes.tolist() == pytest.approx(expected, rel=1e-6)
    assert stats["ratio"].item() == pytest.approx((3 + 1.5 * log3) / 3, rel=1e-6)


def test_s2_06_a_gamma_weight_is_1_where_the_completion_is_as_likely_as_before() -> None:
    # VESPO by hand: ratios of whole completions are 1 (of 2 and 1/2) and 2, and nothing flows through them.
    ratios = double([[7, 2.0, 0.5], [7, 2.0, 7], [7, 2.0, 7]])
    logprobs, gains = (ratios.log() - 1).requires_grad_(), double([[9, 3, 3], [9, 1, 9], [9, -1, 9]])
    actions = mask([[0, 1, 1], [0, 1, 0], [0, 1, 0]])
    loss, stats = gamma_weight(logprobs, torch.full_like(ratios, -1.0), gains, actions, (2.0, 3.0), (3.0, 2.0))
    good, bad = 4 * math.exp(-3), 8 * math.exp(-2)
    slopes = torch.autograd.grad(loss, logprobs)[0]
    expected = double([[0, -3, -3], [0, -good, 0], [0, bad, 0]])
    torch.testing.assert_close(slopes, expected, rtol=1e-12, atol=0)
    said = [math.log(2) - 1, math.log(0.5) - 1]
    assert loss.item() == pytest.approx(-3 * sum(said) - (good - bad) * said[0], rel=1e-12)
    assert stats["ratio"].item() == pytest.approx(1 + 1 + 2 + 2, rel=1e-12)
    far = torch.full((1, 900), 5.0)
    for moved in (far, -far):
        loss, _ = gamma_weight(moved, 0 * far, 0 * far - 1, torch.ones(1, 900, dtype=torch.bool), (2, 3), (3, 2))
        assert loss.item() == pytest.approx(0.0, abs=1e-9)


def test_s2_06_a_longer_completion_counts_more_in_luspo() -> None:
    ratios = double([[7, 1.1, 1.1, 1.1], [7, 1.2, 7, 7]])
    actions, gains = mask([[0, 1, 1, 1], [0, 1, 0, 0]]), double([[2.0] * 4, [-1.0] * 4])
    given = ratios.log(), torch.zeros_like(ratios), gains, actions, 0.3
    loss, stats = sequence_surrogate(*given, mean=True, share=actions.sum(1))
    assert loss.item() == pytest.approx(-3 * 1.1 * 2 + 1.2, rel=1e-12)
    assert stats["ratio"].item() == pytest.approx(1.1 + 1.2, rel=1e-12)


# -------------------------------------------------------------------------------------- what all of them have in common


@pytest.mark.parametrize("name", NAMES)
def test_b11_a_policy_that_has_not_moved_has_the_plain_policy_gradient(name: str) -> None:
    new = normal(3, 5).requires_grad_()
    gains = normal(3, 1, seed=1).expand(3, 5)
    loss, stats = losses(ACTIONS)[name](new, new.detach(), gains)
    (gradient,) = torch.autograd.grad(loss, new)
    lengths = ACTIONS.sum(1, keepdim=True)
    share = ACTIONS / lengths if "rows" in name or name == "sequences" else ACTIONS.double()
    torch.testing.assert_close(gradient, -(gains * share), rtol=1e-6, atol=1e-12)
    if stats:
        assert stats.get("clip_fraction", 0) == stats["approx_kl"] == 0
        units = 3 if "rows" in name or name in ("sequences", "long sequences", "products") else 6
        assert stats["ratio"].item() == pytest.approx(units, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_b24_gradcheck(name: str) -> None:
    old, gains = normal(3, 5, seed=1), normal(3, 1, seed=2).expand(3, 5)
    if name in ("weights", "gammas"):  # the weight is held constant, so that only a fixed ratio has this gradient
        free = normal(3, 5).requires_grad_()
        (found,) = torch.autograd.grad(losses(ACTIONS)[name](free, old, gains)[0], free)
        weight = (free.detach() - old).exp().clamp(0.8, 1.3)
        if name == "gammas":
            ratio = ((free.detach() - old) * ACTIONS).sum(1, keepdim=True).exp()
            good, bad = ratio**2 * torch.exp(3 - 3 * ratio), ratio**3 * torch.exp(2 - 2 * ratio)
            weight = torch.where(gains >= 0, good, bad)
        torch.testing.assert_close(found, -(weight * gains * ACTIONS), rtol=1e-12, atol=0)
        return
    loss = losses(ACTIONS)[name]
    assert torch.autograd.gradcheck(lambda x: loss(x, old, gains)[0], normal(3, 5).requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_b25_nothing_flows_to_old_policies_or_advantages_nor_into_statistics(name: str) -> None:
    new, old, gains = (normal(3, 5, seed=s).requires_grad_() for s in range(3))
    loss, stats = losses(ACTIONS)[name](new, old, gains)
    found = torch.autograd.grad(loss, [new, old, gains], allow_unused=True)
    assert found[0].abs().sum() > 0
    assert found[1:] == (None, None)
    assert all(value.dim() == 0 and not value.requires_grad for value in stats.values())


@pytest.mark.parametrize("name", NAMES)
def test_b29_b39_rows_add_up_and_what_is_no_action_is_not_seen(name: str) -> None:
    new, old = normal(3, 5), normal(3, 5, seed=1)
    gains = normal(3, 1, seed=2).expand(3, 5)
    whole, figures = losses(ACTIONS)[name](new, old, gains)
    rows = [losses(ACTIONS[i : i + 1])[name](new[i : i + 1], old[i : i + 1], gains[i : i + 1]) for i in (2, 0, 1)]
    torch.testing.assert_close(sum(loss for loss, _ in rows), whole, rtol=1e-12, atol=1e-12)
    for key, value in figures.items():
        torch.testing.assert_close(sum(stats[key] for _, stats in rows), value, rtol=1e-12, atol=1e-12)
    rubbish = torch.where(ACTIONS, 0.0, torch.nan)
    given_ = (new + rubbish).requires_grad_()
    dirty, again = losses(ACTIONS)[name](given_, old + rubbish, gains + rubbish)
    torch.testing.assert_close(dirty, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(again, figures, rtol=1e-12, atol=0)
    assert torch.autograd.grad(dirty, given_)[0][~ACTIONS].eq(0).all()
    empty, stats = losses(torch.zeros_like(ACTIONS))[name](new, old, gains)
    assert [empty.item(), *(value.item() for value in stats.values())] == [0] * (1 + len(stats))


@pytest.mark.parametrize("gain", [1.0, 0.0, -1.0])
def test_a_long_sequence_that_has_moved_far_is_still_a_number(gain: float) -> None:
    actions = torch.ones(1, 1000, dtype=torch.bool)
    new = torch.full((1, 1000), 0.5, requires_grad=True)
    loss, _ = sequence_surrogate(
        new, torch.zeros(1, 1000), torch.full((1, 1000), gain), actions, (0.2, 0.2), mean=False
    )
    loss.backward()
    assert loss.item() == pytest.approx({1.0: -1.2, 0.0: 0.0, -1.0: math.exp(20)}[gain], rel=1e-5)
    assert new.grad is not None
    assert new.grad.isfinite().all()
