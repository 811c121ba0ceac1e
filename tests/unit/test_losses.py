"""Every loss: a number worked by hand, a slow reference, its invariances, its gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plaudit.batch import Batch, collate
from plaudit.losses import (
    all_pairs,
    best_of,
    bradley_terry,
    clipped_surrogate,
    clipped_value,
    nll,
    plackett_luce,
    squared_error,
)
from plaudit.numerics import at_actions, before_actions, token_logprobs

Found = tuple[Tensor, dict[str, Tensor]]
SCORES = st.floats(-8, 8)
SEEDS = st.integers(0, 2**31)


def double(values: Sequence[Any] | float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.6


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------------------------------------------------- nll


def test_nll_by_hand_counts_actions_only() -> None:
    logprobs = torch.tensor([[9.0, -1.0, -2.0], [9.0, -4.0, torch.nan]], requires_grad=True)
    actions = torch.tensor([[0, 1, 1], [0, 1, 0]], dtype=torch.bool)
    loss, stats = nll(logprobs, actions)
    assert loss.item() == 7
    assert stats == {}
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [[0, -1, -1], [0, -1, 0]]


# ---------------------------------------------------------------------------------------------------- Bradley-Terry


def pair_by_loops(
    chosen: list[float], rejected: list[float], preference: list[float], margin: list[float], noise: float
) -> list[float]:
    terms = []
    for c, r, p, m in zip(chosen, rejected, preference, margin, strict=True):
        won = (1 - noise) * sigmoid(c - r - m) + noise * 0.5
        lost = (1 - noise) * sigmoid(r - c - m) + noise * 0.5
        terms.append(-p * math.log(won) - (1 - p) * math.log(lost))
    return terms


def test_bradley_terry_by_hand() -> None:
    # sigmoid(log 3) = 3/4: the first pair costs log 4/3, the second, put in the wrong order, log 4.
    chosen, rejected = double([math.log(3), 0]), double([0, math.log(3)])
    loss, stats = bradley_terry(chosen, rejected)
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(4), rel=1e-12)
    assert stats["accuracy"].item() == 1
    assert stats["margin"].item() == pytest.approx(0, abs=1e-12)
    # With a margin of log 3, the first lead is worth nothing and the second costs log 10.
    loss, _ = bradley_terry(chosen, rejected, margin=math.log(3))
    assert loss.item() == pytest.approx(math.log(2) + math.log(10), rel=1e-12)
    # Three of four people: cross entropy of (3/4, 1/4) with itself.
    loss, _ = bradley_terry(chosen[:1], rejected[:1], preference=0.75)
    assert loss.item() == pytest.approx(0.562335144618808, rel=1e-12)


def test_B8_equal_scores_cost_log_2_whatever_the_label_and_the_noise() -> None:
    scores = normal(5)
    for preference, noise in itertools.product((0.0, 0.3, 0.5, 1.0), (0.0, 0.1, 1.0)):
        loss, stats = bradley_terry(scores, scores, preference, noise=noise)
        assert loss.item() == pytest.approx(5 * math.log(2), rel=1e-12)
        assert stats["accuracy"].item() == 2.5


def test_noise_has_the_published_floor_and_ceiling() -> None:
    # Christiano et al.: with 10 % random answers no prediction is surer than 95 %.
    loss, _ = bradley_terry(double([0, 1e6, -1e6]), double([0, 0, 0]), noise=0.1)
    assert loss.item() == pytest.approx(math.log(2) - math.log(0.95) - math.log(0.05), rel=1e-12)
    assert -math.log(0.95) == pytest.approx(0.0513, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(SCORES, SCORES, st.floats(0, 1), st.floats(0, 2)), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.1, 0.5]),
)
def test_bradley_terry_is_the_loop(pairs: list[tuple[float, float, float, float]], noise: float) -> None:
    chosen, rejected, preference, margin = (list(column) for column in zip(*pairs, strict=True))
    loss, stats = bradley_terry(*map(double, (chosen, rejected, preference, margin)), noise=noise)
    assert loss.item() == pytest.approx(sum(pair_by_loops(chosen, rejected, preference, margin, noise)), rel=1e-9)
    right = ahead = 0.0
    for c, r, p, _ in pairs:
        right += 0.5 if p == 0.5 or c == r else float((c > r) == (p > 0.5))
        ahead += 0.0 if p == 0.5 else (c - r if p > 0.5 else r - c)
    assert stats["accuracy"].item() == pytest.approx(right)
    assert stats["margin"].item() == pytest.approx(ahead, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(-50, 50), st.sampled_from([0.0, 0.1]))
def test_B18_a_shift_changes_nothing_and_a_swap_is_the_opposite_label(seed: int, shift: float, noise: float) -> None:
    chosen, rejected = normal(2, 4, seed=seed)
    preference = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    margin = preference.flip(0)
    loss, stats = bradley_terry(chosen, rejected, preference, margin, noise)
    for other, other_stats in (
        bradley_terry(chosen + shift, rejected + shift, preference, margin, noise),
        bradley_terry(rejected, chosen, 1 - preference, margin, noise),
    ):
        torch.testing.assert_close(other, loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other_stats, stats, rtol=1e-9, atol=1e-9)


def test_huge_leads_keep_a_finite_loss_and_gradient() -> None:
    lead = torch.tensor([1e4, -1e4], requires_grad=True)
    loss, _ = bradley_terry(lead, torch.zeros(2))
    assert loss.item() == 1e4
    assert torch.autograd.grad(loss, lead)[0].tolist() == [0, -1]


def test_B39_weight_2_is_the_pair_twice_and_order_does_not_matter() -> None:
    chosen, rejected, preference = normal(3, 4)
    preference = preference.sigmoid()
    weight = double([1, 2, 0, 1])
    twice = torch.tensor([3, 1, 0, 1])
    weighted = bradley_terry(chosen, rejected, preference, 0.2, 0.1, weight)
    repeated = bradley_terry(chosen[twice], rejected[twice], preference[twice], 0.2, 0.1)
    torch.testing.assert_close(weighted, repeated, rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------- Bradley-Terry as a reward model: B18


WINS = double([[0, 7, 3, 5], [2, 0, 6, 4.5], [4, 3, 0, 8], [1, 2.5, 2, 0]])  # halves are ties


def mm_strengths(wins: Tensor) -> Tensor:
    """Hunter 2004, eq. 3: gamma_i <- W_i / sum_j N_ij / (gamma_i + gamma_j); log strengths of mean 0."""
    gamma = torch.ones(len(wins), dtype=torch.float64)
    games = wins + wins.T
    for _ in range(2000):
        gamma = wins.sum(1) / (games / (gamma[:, None] + gamma[None, :])).sum(1)
    return gamma.log() - gamma.log().mean()


def newton(loss: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The minimum of a convex function that does not see a common shift; of mean 0."""
    scores = torch.zeros(size, dtype=torch.float64)
    for _ in range(30):
        leaf = scores.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        hessian = torch.autograd.functional.hessian(loss, scores)
        scores = scores - torch.linalg.solve(hessian + torch.ones(size, size, dtype=torch.float64), gradient)
    return scores - scores.mean()


def test_B18_one_hot_reward_model_is_hunters_mm() -> None:
    i, j = torch.triu_indices(4, 4, 1)
    games = (WINS + WINS.T)[i, j]
    features = torch.eye(4, dtype=torch.float64)

    def by_pairs(scores: Tensor) -> Tensor:
        return bradley_terry(features[i] @ scores, features[j] @ scores, WINS[i, j] / games, weight=games)[0]

    def by_matrix(scores: Tensor) -> Tensor:
        preference = WINS / (WINS + WINS.T).clamp(min=1)
        return all_pairs(features @ scores, preference, WINS + WINS.T)[0]

    strengths = mm_strengths(WINS)
    for loss in (by_pairs, by_matrix):
        torch.testing.assert_close(newton(loss, 4), strengths, rtol=0, atol=1e-10)


def test_B18_a_tie_is_half_a_win_for_each() -> None:
    one, other = normal(2, 3)
    tied = bradley_terry(one, other, 0.5)[0]
    torch.testing.assert_close(tied, (bradley_terry(one, other)[0] + bradley_terry(other, one)[0]) / 2)


# -------------------------------------------------------------------------------------------------------- all pairs


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), SEEDS, st.sampled_from([0.0, 0.1]))
def test_all_pairs_is_bradley_terry_pair_by_pair(size: int, seed: int, noise: float) -> None:
    scores = normal(size, seed=seed)
    weight = normal(size, size, seed=seed + 1).clamp(min=0)
    preference = normal(size, size, seed=seed + 2).sigmoid()
    preference[weight == 0] = torch.nan
    total, sums = double(0.0), {"accuracy": double(0.0), "margin": double(0.0)}
    for i in range(size):
        for j in range(i + 1, size):
            if weight[i, j] > 0:
                loss, stats = bradley_terry(
                    scores[i : i + 1], scores[j : j + 1], preference[i, j], noise=noise, weight=weight[i, j]
                )
                total = total + loss
                sums = {name: sums[name] + value for name, value in stats.items()}
    found, stats = all_pairs(scores, preference, weight, noise)
    torch.testing.assert_close(found, total, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(stats, sums, rtol=1e-10, atol=1e-12)


def test_all_pairs_of_a_ranking_share_one_unit() -> None:
    # A > B > C with scores log 2, 0, 0: P(A > B) = P(A > C) = 2/3, P(B > C) = 1/2.
    better = torch.ones(3, 3).triu(1)
    loss, stats = all_pairs(torch.tensor([math.log(2), 0, 0]), better, better / 3)
    assert loss.item() == pytest.approx((2 * math.log(1.5) + math.log(2)) / 3, rel=1e-6)
    assert stats["accuracy"].item() == pytest.approx(2.5 / 3, rel=1e-6)


def test_B39_all_pairs_follows_a_permutation_of_the_items() -> None:
    scores, order = normal(5), torch.tensor([3, 0, 4, 1, 2])
    preference = normal(5, 5, seed=1).sigmoid()
    preference = preference.triu(1) + (1 - preference.triu(1).T).tril(-1)
    weight = normal(5, 5, seed=2).square()
    weight = weight + weight.T
    shuffled = all_pairs(scores[order], preference[order][:, order], weight[order][:, order], 0.1)
    torch.testing.assert_close(shuffled, all_pairs(scores, preference, weight, 0.1), rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------- Plackett-Luce


def ranking_by_loops(scores: list[float], ranks: list[int]) -> float:
    """-log probability, each item drawn from those that are not ranked better (Breslow's ties)."""
    total = 0.0
    for score, rank in zip(scores, ranks, strict=True):
        total += math.log(sum(math.exp(s) for s, r in zip(scores, ranks, strict=True) if r >= rank)) - score
    return total


def test_plackett_luce_by_hand() -> None:
    # Strengths 3, 2, 1: the order (2, 3, 1) has probability 2/6 * 3/4 * 1.
    scores = double([[3, 2, 1]]).log()
    loss, stats = plackett_luce(scores, torch.tensor([[2, 1, 3]]), torch.ones(1, 3, dtype=torch.bool))
    assert loss.item() == pytest.approx(math.log(4), rel=1e-12)
    assert stats["accuracy"].item() == 0
    # First and second tied: each drawn from all three, 3/6 * 2/6; then the last from itself.
    loss, stats = plackett_luce(scores, torch.tensor([[1, 1, 2]]), torch.ones(1, 3, dtype=torch.bool))
    assert loss.item() == pytest.approx(math.log(6), rel=1e-12)
    assert stats["accuracy"].item() == 1
    # The first was not ranked: 2/3 that the second comes before the third, whatever the first's score and rank.
    loss, stats = plackett_luce(scores, torch.tensor([[9, 1, 2]]), torch.tensor([[False, True, True]]))
    assert loss.item() == pytest.approx(math.log(1.5), rel=1e-12)
    assert stats["accuracy"].item() == 1


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_B19_all_orders_together_have_probability_one(size: int) -> None:
    scores = normal(size)
    orders = list(itertools.permutations(range(1, size + 1)))
    mask = torch.ones(1, size, dtype=torch.bool)
    total = sum(math.exp(-plackett_luce(scores[None], torch.tensor([o]), mask)[0].item()) for o in orders)
    assert total == pytest.approx(1, abs=1e-12)
    batch = plackett_luce(scores.expand(len(orders), -1), torch.tensor(orders), mask.expand(len(orders), -1))
    assert batch[1]["accuracy"].item() == math.factorial(size) / size


def test_B8_equal_scores_make_every_order_equally_likely() -> None:
    loss, _ = plackett_luce(torch.zeros(2, 4), torch.tensor([[1, 2, 3, 4], [3, 1, 4, 2]]), torch.ones(2, 4) > 0)
    assert loss.item() == pytest.approx(2 * math.log(24), rel=1e-6)


def test_B19_two_items_are_a_pair() -> None:
    scores = normal(6, 2)
    ranks = torch.tensor([[1, 2], [2, 1]]).repeat(3, 1)
    chosen, rejected = scores.gather(1, ranks - 1).unbind(1)
    found = plackett_luce(scores, ranks, torch.ones(6, 2, dtype=torch.bool))
    expected = bradley_terry(chosen, rejected)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=0)
    assert found[1]["accuracy"] == expected[1]["accuracy"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(SCORES, st.integers(1, 4), st.booleans()), min_size=3, max_size=3), max_size=4))
def test_plackett_luce_is_the_loop_and_does_not_see_what_was_not_ranked(
    groups: list[list[tuple[float, int, bool]]],
) -> None:
    if not groups:
        return
    scores = double([[score for score, _, _ in group] for group in groups]).requires_grad_()
    ranks = torch.tensor([[rank for _, rank, _ in group] for group in groups])
    mask = torch.tensor([[there for _, _, there in group] for group in groups])
    loss, stats = plackett_luce(scores, ranks, mask)
    shown = [[(s, r) for s, r, there in group if there] for group in groups]
    expected = sum(ranking_by_loops([s for s, _ in g], [r for _, r in g]) for g in shown)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert 0 <= stats["accuracy"].item() <= sum(bool(g) for g in shown)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all()
    assert gradient[~mask].eq(0).all()
    torch.testing.assert_close(gradient.sum(1), torch.zeros(len(groups), dtype=torch.float64), atol=1e-9, rtol=0)


# ------------------------------------------------------------------------------- the best of several, and numbers


def test_best_of_by_hand() -> None:
    # exp(scores) = 1, 2, 5: the second is chosen with probability 2/8, of the first two with 2/3, one of them with 3/8.
    scores, everybody = double([[0, math.log(2), math.log(5)]]), torch.ones(1, 3, dtype=torch.bool)
    for best, mask, chance, right in (
        ([False, True, False], everybody, 2 / 8, 0),
        ([False, True, False], torch.tensor([[True, True, False]]), 2 / 3, 1),
        ([True, True, False], everybody, 3 / 8, 0),
        ([False, False, True], everybody, 5 / 8, 1),
        ([True, True, True], everybody, 1, 1),
        ([False, False, True], torch.tensor([[True, True, False]]), 1, 0),  # chosen from elsewhere: nothing is said
    ):
        loss, stats = best_of(scores, torch.tensor([best]), mask)
        assert loss.item() == pytest.approx(-math.log(chance), abs=1e-12)
        assert stats["accuracy"] == right


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(SCORES, st.booleans(), st.booleans()), min_size=4, max_size=4), min_size=1, max_size=4),
    st.floats(-20, 20),
)
def test_best_of_is_the_loop_and_a_shift_of_a_group_changes_nothing(
    groups: list[list[tuple[float, bool, bool]]], shift: float
) -> None:
    scores = double([[score for score, _, _ in group] for group in groups]).requires_grad_()
    best = torch.tensor([[chosen for _, chosen, _ in group] for group in groups])
    mask = torch.tensor([[there for _, _, there in group] for group in groups])
    loss, _ = best_of(scores, best, mask)
    expected = 0.0
    for group in groups:
        odds = [(math.exp(score), chosen) for score, chosen, there in group if there]
        if any(chosen for _, chosen in odds):
            expected -= math.log(sum(odd for odd, chosen in odds if chosen) / sum(odd for odd, _ in odds))
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    moved = scores.detach() + shift * torch.arange(len(groups)).double()[:, None]
    assert best_of(moved, best, mask)[0].item() == pytest.approx(loss.item(), rel=1e-9, abs=1e-9)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all()
    assert gradient[~mask].eq(0).all()


def test_squared_error_by_hand() -> None:
    scores = double([1.5, -2, 0]).requires_grad_()
    loss, stats = squared_error(scores, torch.tensor([1.0, 1.0, 0.0]))
    assert loss.item() == 0.25 + 9
    assert stats == {}
    assert torch.autograd.grad(loss, scores)[0].tolist() == [1, -6, 0]


# ------------------------------------------------------------------------------------------------ clipped surrogate


def test_clipped_surrogate_by_hand() -> None:
    # Ratios 1.5, 0.5, 1.5, 1.1 with advantages 2, 2, -2, -2; the last column is no action.
    ratios = double([[7, 1.5, 0.5, 1.5, 1.1, 7]])
    advantages = double([[9, 2, 2, -2, -2, 9]])
    actions = torch.tensor([[0, 1, 1, 1, 1, 0]], dtype=torch.bool)
    loss, stats = clipped_surrogate(ratios.log(), torch.zeros_like(ratios), advantages, actions, 0.2)
    assert loss.item() == pytest.approx(-(2.4 + 1.0 - 3.0 - 2.2), rel=1e-12)
    assert stats["ratio"].item() == pytest.approx(4.6, rel=1e-12)
    assert stats["clip_fraction"].item() == 1
    expected = sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.5, 1.1))
    assert stats["approx_kl"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(1.31, 2.0, 0.0), (1.29, 2.0, -2.58), (0.89, -2.0, 0.0), (0.91, -2.0, 1.82), (0.5, 2.0, -1.0), (3.0, -2.0, 6.0)],
)
def test_B12_the_clip_stops_the_gradient_on_one_side_only(ratio: float, advantage: float, gradient: float) -> None:
    logprobs = double([[0.0, math.log(ratio)]]).requires_grad_()
    actions = torch.tensor([[False, True]])
    nothing = torch.zeros_like(logprobs)
    loss, stats = clipped_surrogate(logprobs, nothing, nothing + advantage, actions, (0.1, 0.3))
    found = torch.autograd.grad(loss, logprobs)[0]
    assert found[0, 1].item() == (0 if gradient == 0 else pytest.approx(gradient, rel=1e-12))
    assert found[0, 0].item() == 0
    assert stats["clip_fraction"].item() == (gradient == 0)


def test_B11_a_policy_that_has_not_moved_has_ratio_1_and_the_plain_policy_gradient() -> None:
    logprobs = normal(3, 5).requires_grad_()
    advantages, actions = normal(3, 5, seed=1), random_mask(3, 5, seed=2)
    loss, stats = clipped_surrogate(logprobs, logprobs.detach(), advantages, actions, 0.2)
    assert stats["ratio"] == actions.sum()
    assert stats["clip_fraction"] == stats["approx_kl"] == 0
    (gradient,) = torch.autograd.grad(loss, logprobs)
    plain = -(logprobs * advantages * actions).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, logprobs)[0], rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(-3, 3), st.booleans()), min_size=1, max_size=8),
    st.floats(0.01, 0.9),
    st.floats(0.01, 0.9),
)
def test_clipped_surrogate_is_the_loop(tokens: list[tuple[float, float, float, bool]], low: float, high: float) -> None:
    total = 0.0
    for new, old, advantage, acts in tokens:
        ratio = math.exp(new - old)
        total -= acts * min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    new, old, advantage = (double([column]) for column in list(zip(*tokens, strict=True))[:3])
    actions = torch.tensor([[acts for *_, acts in tokens]])
    loss, stats = clipped_surrogate(new, old, advantage, actions, (low, high))
    assert loss.item() == pytest.approx(total, rel=1e-9, abs=1e-12)
    assert stats["approx_kl"].item() >= 0


# --------------------------------------------------------------------------------------------------- clipped values


def test_b12_clipped_value_by_hand() -> None:
    # Old value 0, clip 0.2. Return 1: a value of 0.5 counts as 0.2 (error 0.8), one of -0.5 stays (error 1.5).
    values = double([[9, 0.5, -0.5, 0.1]]).requires_grad_()
    actions = torch.tensor([[False, True, True, True]])
    returns = torch.ones_like(values)
    loss, stats = clipped_value(values, torch.zeros_like(values), returns, actions, 0.2)
    assert loss.item() == pytest.approx(0.5 * (0.64 + 2.25 + 0.81), rel=1e-12)
    assert stats["value_clip_fraction"].item() == 1
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(gradient, double([[0, 0, -1.5, -0.9]]), rtol=1e-12, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2), st.booleans()), min_size=1, max_size=8),
    st.floats(0.01, 1),
)
def test_clipped_value_is_the_loop(tokens: list[tuple[float, float, float, bool]], clip: float) -> None:
    total = 0.0
    for value, old, target, acts in tokens:
        near = min(max(value, old - clip), old + clip)
        total += acts * 0.5 * max((value - target) ** 2, (near - target) ** 2)
    value, old, target = (double([column]) for column in list(zip(*tokens, strict=True))[:3])
    loss, _ = clipped_value(value, old, target, torch.tensor([[acts for *_, acts in tokens]]), clip)
    assert loss.item() == pytest.approx(total, rel=1e-9, abs=1e-12)


# -------------------------------------------------------------------------------------- what all of them have in common


def token_losses(actions: Tensor) -> dict[str, Callable[[Tensor], Found]]:
    """Losses of (B, T) outputs, the rest fixed; advantages and ratios away from the kinks."""
    old = normal(*actions.shape, seed=11)
    advantages, returns = normal(*actions.shape, seed=12), normal(*actions.shape, seed=13)
    return {
        "nll": lambda x: nll(x, actions),
        "surrogate": lambda x: clipped_surrogate(x, old, advantages, actions, (0.2, 0.3)),
        "value": lambda x: clipped_value(x, old, returns, actions, 0.2),
    }


def pair_losses() -> dict[str, Callable[[Tensor], Found]]:
    """Losses of 6 scores."""
    preference = normal(3, seed=21).sigmoid()
    square = normal(6, 6, seed=22).sigmoid()
    ranks = torch.tensor([[1, 2, 2], [3, 1, 2]])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    return {
        "pairs": lambda s: bradley_terry(s[0::2], s[1::2], preference, 0.3),
        "noisy pairs": lambda s: bradley_terry(s[0::2], s[1::2], preference, 0.3, 0.1, preference + 1),
        "all pairs": lambda s: all_pairs(s, square, square.T.clamp(min=0.5) - 0.5),
        "noisy all pairs": lambda s: all_pairs(s, square, square.T, 0.1),
        "ranking": lambda s: plackett_luce(s.view(2, 3), ranks, mask),
        "best": lambda s: best_of(s.view(2, 3), ranks == 1, mask),
        "number": lambda s: squared_error(s, preference.repeat(2)),
    }


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["nll", "surrogate", "value"])
def test_B24_token_losses_pass_gradcheck(name: str, seed: int) -> None:
    loss = token_losses(random_mask(3, 4, seed=seed))[name]
    assert torch.autograd.gradcheck(lambda x: loss(x)[0], normal(3, 4, seed=seed + 30).requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("name", list(pair_losses()))
def test_B24_preference_losses_pass_gradcheck(name: str) -> None:
    loss = pair_losses()[name]
    assert torch.autograd.gradcheck(lambda s: loss(s)[0], normal(6, seed=31).requires_grad_(), atol=1e-6)


def test_B24_statistics_carry_no_gradient_and_are_scalars() -> None:
    actions = random_mask(3, 4)
    outputs = normal(3, 4).requires_grad_(), normal(6).requires_grad_()
    found = [loss(outputs[0]) for loss in token_losses(actions).values()]
    found += [loss(outputs[1]) for loss in pair_losses().values()]
    for loss, stats in found:
        assert loss.dim() == 0
        assert loss.requires_grad
        assert all(value.dim() == 0 and not value.requires_grad for value in stats.values())


def test_B25_nothing_flows_to_old_policies_advantages_returns() -> None:
    new, old, advantages, returns = (normal(2, 3, seed=s).requires_grad_() for s in range(4))
    actions = torch.ones(2, 3, dtype=torch.bool)
    total = clipped_surrogate(new, old, advantages, actions, 0.2)[0] + clipped_value(new, old, returns, actions, 0.2)[0]
    found = torch.autograd.grad(total, [new, old, advantages, returns], allow_unused=True)
    assert found[0].abs().sum() > 0
    assert found[1:] == (None, None, None)


@pytest.mark.parametrize("name", ["nll", "surrogate", "value"])
def test_what_lies_outside_actions_is_neither_read_nor_moved(name: str) -> None:
    actions = random_mask(3, 4)
    rubbish = torch.where(actions, 0.0, torch.nan)
    expected, stats = token_losses(actions)[name](normal(3, 4))
    given = normal(3, 4).add(rubbish).requires_grad_()
    streams = [normal(3, 4, seed=s) + rubbish for s in (11, 12, 13)]
    losses: dict[str, Callable[[Tensor], Found]] = {
        "nll": lambda x: nll(x, actions),
        "surrogate": lambda x: clipped_surrogate(x, streams[0], streams[1], actions, (0.2, 0.3)),
        "value": lambda x: clipped_value(x, streams[0], streams[2], actions, 0.2),
    }
    loss, dirty = losses[name](given)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dirty, stats, rtol=1e-12, atol=0)
    assert torch.autograd.grad(loss, given)[0][~actions].eq(0).all()
    nothing = torch.zeros_like(actions)
    for empty in token_losses(nothing).values():
        loss, stats = empty(normal(3, 4).requires_grad_())
        assert [loss.item(), *(value.item() for value in stats.values())] == [0] * (1 + len(stats))


@pytest.mark.parametrize("name", ["nll", "surrogate", "value"])
def test_B39_row_order_does_not_matter_and_a_row_twice_counts_twice(name: str) -> None:
    actions, outputs, old, other = random_mask(4, 5), normal(4, 5), normal(4, 5, seed=1), normal(4, 5, seed=2)

    def loss(rows: Tensor) -> Found:
        x, o, y, a = outputs[rows], old[rows], other[rows], actions[rows]
        return {
            "nll": lambda: nll(x, a),
            "surrogate": lambda: clipped_surrogate(x, o, y, a, 0.2),
            "value": lambda: clipped_value(x, o, y, a, 0.2),
        }[name]()

    whole = loss(torch.arange(4))
    torch.testing.assert_close(loss(torch.tensor([2, 0, 3, 1])), whole, rtol=1e-12, atol=1e-12)
    more, row = loss(torch.tensor([0, 1, 2, 3, 1])), loss(torch.tensor([1]))
    torch.testing.assert_close(more[0], whole[0] + row[0], rtol=1e-12, atol=1e-12)
    for key, value in more[1].items():
        torch.testing.assert_close(value, whole[1][key] + row[1][key], rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------- micro-batches make no odds: B29


def eight_rows() -> Batch:
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(0, 6, (count,), generator=generator).tolist()

    lengths = [1, 9, 2, 2, 5, 1, 7, 3]
    return collate([words(1 + i % 3) for i in range(8)], [words(n) for n in lengths], groups=[0, 0, 1, 1, 2, 2, 3, 3])


def bigram_loss(name: str, table: Tensor, batch: Batch) -> Tensor:
    """A loss of a model whose hidden states are one-hot tokens and whose head is `table` (6, 6)."""
    states = torch.nn.functional.one_hot(batch.tokens, 6).double()
    chosen, entropy = token_logprobs(
        before_actions(states, batch.actions), table, batch.tokens[batch.actions], with_entropy=True, chunk=4
    )
    logprobs = at_actions(chosen, batch.actions)
    old, target = torch.cos(batch.tokens * 7.0).double() - 2, torch.sin(batch.tokens * 3.0).double()
    assert entropy is not None
    if name == "nll":
        return nll(logprobs, batch.actions)[0]
    if name == "surrogate":
        return clipped_surrogate(logprobs, old, target, batch.actions, 0.2)[0]
    if name == "value":
        return clipped_value(at_actions(entropy, batch.actions), old, target, batch.actions, 0.2)[0]
    score = logprobs.sum(1)
    if name == "pairs":
        return bradley_terry(score[0::2], score[1::2], 0.9)[0]
    if name == "all pairs":
        same = (batch.groups[:, None] == batch.groups[None, :]).double()
        return all_pairs(score, same, same)[0]
    mask = torch.ones(len(batch) // 2, 2, dtype=torch.bool)
    return plackett_luce(score.view(-1, 2), torch.tensor([[1, 2]]).expand(len(batch) // 2, 2), mask)[0]


@pytest.mark.parametrize("name", ["nll", "surrogate", "value", "pairs", "all pairs", "ranking"])
def test_B29_the_gradient_does_not_depend_on_the_split(name: str) -> None:
    batch, table = eight_rows(), normal(6, 6).requires_grad_()
    (whole,) = torch.autograd.grad(bigram_loss(name, table, batch), table)
    assert whole.abs().sum() > 0
    counts = set()
    for budget in (1, 20, 30, 50, 10_000):
        parts = [part for part, _ in batch.parts(budget)]
        counts.add(len(parts))
        gradient = sum(torch.autograd.grad(bigram_loss(name, table, part), table)[0] for part in parts)
        torch.testing.assert_close(gradient, whole, rtol=1e-10, atol=1e-12)
    assert counts >= {1, 2, 4}
