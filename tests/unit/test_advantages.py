"""Advantages, divergences, shaped rewards; and tabular policies whose optimum is known in closed form."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plaudit.advantages import AdaptiveKL, RunningMoments, gae, kl_k1, kl_k2, kl_k3, kl_shaped_rewards, last_action
from plaudit.losses import clipped_surrogate

SEEDS = st.integers(0, 2**31)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


# ------------------------------------------------------------------------------------------------------------- GAE


def gae_of_a_row(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """The explicit sum over later temporal differences."""
    ahead = [*values, 0.0][1:]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, ahead, strict=True)]
    advantages = [
        math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def test_gae_by_hand() -> None:
    # gamma 1/2, lambda 1/2. Last: 8 - 2 = 6. Before it: 0 + 2/2 - 4 + 6/4 = -1.5.
    advantages, returns = gae(
        torch.tensor([[0.0, 0, 8, 9]]), torch.tensor([[9.0, 4, 2, 9]]), mask([[0, 1, 1, 0]]), gamma=0.5, lam=0.5
    )
    assert advantages.tolist() == [[0, -1.5, 6, 0]]
    assert returns.tolist() == [[0, 2.5, 8, 0]]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    SEEDS,
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_B10_the_recursion_is_the_explicit_sum_and_sees_actions_only(
    acts: list[list[bool]], seed: int, gamma: float, lam: float
) -> None:
    actions = torch.tensor([[False, *row] for row in acts])
    outside = torch.where(actions, 0.0, torch.nan)
    rewards, values = normal(2, *actions.shape, seed=seed) + outside
    advantages, returns = gae(rewards, values, actions, gamma, lam)
    assert advantages[~actions].eq(0).all()
    assert returns[~actions].eq(0).all()
    for i, row in enumerate(actions):
        expected = gae_of_a_row(rewards[i, row].tolist(), values[i, row].tolist(), gamma, lam)
        assert advantages[i, row].tolist() == pytest.approx(expected[0], abs=1e-12)
        assert returns[i, row].tolist() == pytest.approx(expected[1], abs=1e-12)


def test_B10_lambda_1_is_the_monte_carlo_return_and_lambda_0_the_temporal_difference() -> None:
    rewards, values = normal(2, 3, 5)
    actions = mask([[0, 1, 1, 1, 1], [0, 0, 1, 0, 1], [0, 1, 1, 1, 0]])
    advantages, returns = gae(rewards, values, actions, gamma=1.0, lam=1.0)
    to_come = (rewards * actions).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_come * actions, rtol=0, atol=1e-12)
    torch.testing.assert_close(advantages, (to_come - values) * actions, rtol=0, atol=1e-12)
    differences, _ = gae(rewards, values, actions, gamma=0.9, lam=0.0)
    r, v = rewards[1], values[1]
    expected = torch.stack([r[2] + 0.9 * v[4] - v[2], r[4] - v[4]])
    torch.testing.assert_close(differences[1, [2, 4]], expected, rtol=0, atol=1e-12)


def test_B10_exact_values_leave_no_advantage_on_average() -> None:
    # Two coins: heads with chance 0.3, then 0.8; each head earns 1, two heads 5 more. All four outcomes, weighted.
    first, second, lam, gamma = 0.3, 0.8, 0.7, 0.9
    worth = {0: second, 1: second * 6}
    start = first * (1 + gamma * worth[1]) + (1 - first) * gamma * worth[0]
    outcomes = list(itertools.product((0, 1), (0, 1)))
    chances = torch.tensor(
        [(first if a else 1 - first) * (second if b else 1 - second) for a, b in outcomes], dtype=torch.float64
    )
    rewards = torch.tensor([[0.0, a, b * (1 + 5 * a)] for a, b in outcomes], dtype=torch.float64)
    values = torch.tensor([[0.0, start, worth[a]] for a, _ in outcomes], dtype=torch.float64)
    advantages, _ = gae(rewards, values, mask([[0, 1, 1]] * 4), gamma, lam)
    torch.testing.assert_close(chances @ advantages, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_B10_padding_and_observations_do_not_leak() -> None:
    rewards, values = normal(2, 2, 4)
    narrow = gae(rewards, values, torch.ones(2, 4, dtype=torch.bool), 0.9, 0.8)
    wide = torch.tensor([1, 2, 5, 6])
    actions = torch.zeros(2, 9, dtype=torch.bool)
    actions[:, wide] = True
    spread = [torch.full((2, 9), 1e6, dtype=torch.float64).index_copy(1, wide, stream) for stream in (rewards, values)]
    for found, expected in zip(gae(*spread, actions, 0.9, 0.8), narrow, strict=True):
        torch.testing.assert_close(found[:, wide], expected, rtol=0, atol=1e-12)
        assert found.sum().item() == pytest.approx(expected.sum().item(), abs=1e-12)


def test_B25_nothing_flows_through_advantages() -> None:
    rewards, values = normal(2, 3).requires_grad_(), normal(2, 3).requires_grad_()
    assert not any(t.requires_grad for t in gae(rewards, values, torch.ones(2, 3, dtype=torch.bool)))
    logprobs = normal(2, 3).requires_grad_()
    shaped = kl_shaped_rewards(rewards[:, 0], logprobs, logprobs * 2, torch.ones(2, 3, dtype=torch.bool), 0.1)
    assert not shaped.requires_grad


# ----------------------------------------------------------------------------------------------------- divergences


def test_divergences_by_hand() -> None:
    # The policy is twice as likely as the reference to say this.
    policy, reference = torch.tensor(0.5, dtype=torch.float64).log(), torch.tensor(0.25, dtype=torch.float64).log()
    log2 = math.log(2)
    assert kl_k1(policy, reference).item() == pytest.approx(log2, rel=1e-12)
    assert kl_k2(policy, reference).item() == pytest.approx(log2**2 / 2, rel=1e-12)
    assert kl_k3(policy, reference).item() == pytest.approx(0.5 - 1 + log2, rel=1e-12)


def test_k3_of_nearly_equal_policies_is_not_lost_to_rounding() -> None:
    found = kl_k3(torch.tensor(0.0), torch.tensor(1e-3))
    assert found.item() == pytest.approx(1e-6 / 2 + 1e-9 / 6, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.floats(-20, 0), st.floats(-20, 0))
def test_k3_is_never_negative(policy: float, reference: float) -> None:
    assert kl_k3(torch.tensor(policy), torch.tensor(reference)).item() >= -1e-9


def policies(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the policy, its log-probabilities and the reference's, over 6 answers."""
    logits = normal(6, seed=seed).requires_grad_()
    return logits, logits.log_softmax(0), normal(6, seed=seed + 1).log_softmax(0)


def test_B4_by_enumeration_k1_and_k3_are_the_divergence_and_k2_is_not() -> None:
    _, policy, reference = policies()
    divergence = (policy.exp() * (policy - reference)).sum()
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, reference)).sum(), divergence, rtol=0, atol=1e-12)
    assert abs((policy.exp() * kl_k2(policy, reference)).sum() - divergence) > 1e-3


def expected_gradient(estimator: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """E over answers of the gradient of the estimator on one answer."""
    logits, policy, reference = policies()
    return torch.autograd.grad((policy.exp().detach() * estimator(policy, reference)).sum(), logits)[0]


def test_B5_k1_pulls_nowhere_k2_along_the_divergence_k3_along_the_reverse_one() -> None:
    logits, policy, reference = policies()
    forward = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)[0]
    reverse = torch.autograd.grad((reference.exp() * (reference - policy)).sum(), logits)[0]
    torch.testing.assert_close(expected_gradient(kl_k1), torch.zeros_like(forward), rtol=0, atol=1e-12)
    torch.testing.assert_close(expected_gradient(kl_k2), forward, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected_gradient(kl_k3), reverse, rtol=0, atol=1e-12)
    assert (expected_gradient(kl_k3) - forward).norm() > 0.1


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
def test_B24_B25_divergences_pass_gradcheck_and_leave_the_reference_alone(
    estimator: Callable[[Tensor, Tensor], Tensor],
) -> None:
    policy, reference = normal(2, 3).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: estimator(x, reference.detach()), policy, atol=1e-6)
    total = estimator(policy, reference).sum()
    assert torch.autograd.grad(total, [policy, reference], allow_unused=True)[1] is None


# ---------------------------------------------------------------------------------------------------------- rewards


def test_the_last_action_is_the_column_of_the_end_token() -> None:
    actions = mask([[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]])
    assert last_action(actions).tolist() == [4, 1, 5, 0]


def test_the_penalty_is_paid_at_each_action_and_the_score_earned_at_the_last() -> None:
    actions = mask([[0, 1, 0, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    logprobs = torch.tensor([[9.0, -1, 9, -2, 9], [9, 9, -1, -1, -1], [9, 9, 9, 9, 9]])
    reference = torch.tensor([[torch.nan, -3, 1, -1, 1], [1, 1, -1, -2, -4], [1, 1, 1, 1, 1]])
    rewards = kl_shaped_rewards(torch.tensor([10.0, 20, 30]), logprobs, reference, actions, 0.5)
    # k1 is 2 and -1 in the first row, 0, 1, 3 in the second; the third row never acted.
    assert rewards.tolist() == [[0, -1, 0, 10.5, 0], [0, 0, 0, -0.5, 18.5], [0, 0, 0, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), SEEDS, st.floats(0, 2))
def test_shaped_rewards_add_up_to_score_less_divergence(acts: list[list[bool]], seed: int, coefficient: float) -> None:
    actions = torch.tensor([[False, *row] for row in acts])
    logprobs, reference = normal(2, *actions.shape, seed=seed)
    scores = normal(len(acts), seed=seed + 1)
    rewards = kl_shaped_rewards(scores, logprobs, reference, actions, coefficient)
    divergence = ((logprobs - reference) * actions).sum(1)
    expected = torch.where(actions.any(1), scores - coefficient * divergence, torch.zeros_like(scores))
    torch.testing.assert_close(rewards.sum(1), expected, rtol=0, atol=1e-12)
    assert rewards[~actions].eq(0).all()


# ------------------------------------------------------------------------------------ controller and moments: B21


def test_B21_the_controller_gives_the_published_figure_and_rests_at_its_target() -> None:
    controller = AdaptiveKL(coefficient=2.0, target=6.0, horizon=10_000)
    assert controller.updated(12.0, 512).coefficient == pytest.approx(2 * 1.01024, rel=1e-12)
    assert controller.updated(6.0, 512) == controller
    assert controller.updated(6.6, 512).coefficient == pytest.approx(2 * (1 + 0.1 * 0.0512), rel=1e-12)
    assert controller.updated(0.0, 512).coefficient == pytest.approx(2 * (1 - 0.2 * 0.0512), rel=1e-12)
    assert controller.coefficient == 2.0


def test_B21_without_a_target_the_coefficient_is_fixed() -> None:
    controller = AdaptiveKL(0.05)
    assert controller.updated(100.0, 10_000) == controller


def test_B21_the_controller_finds_the_coefficient_that_holds_the_target() -> None:
    # A policy whose divergence is 3 / coefficient holds 6 nats at 1/2.
    controller = AdaptiveKL(5.0, 6.0, 1000)
    for _ in range(200):
        controller = controller.updated(3 / controller.coefficient, 256)
    assert controller.coefficient == pytest.approx(0.5, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(-1000, 1000), max_size=6), max_size=6))
def test_B21_running_moments_are_the_two_pass_statistics(chunks: list[list[float]]) -> None:
    moments = RunningMoments()
    for chunk in chunks:
        moments = moments.updated(torch.tensor(chunk))
    seen = [float(v) for chunk in chunks for v in torch.tensor(chunk)]
    mean = math.fsum(seen) / len(seen) if seen else 0.0
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in seen) / len(seen)) if seen else 0.0
    assert moments.count == len(seen)
    assert moments.mean == pytest.approx(mean, abs=1e-9)
    assert moments.std == pytest.approx(deviation, abs=1e-5)


def test_running_moments_survive_json_and_a_far_away_mean() -> None:
    moments = RunningMoments().updated(torch.tensor([1e6 + 1, 1e6 + 3])).updated(torch.tensor([1e6 + 5]))
    assert (moments.count, moments.mean) == (3, 1e6 + 3)
    assert moments.std == pytest.approx(math.sqrt(8 / 3), rel=1e-9)
    assert RunningMoments(**json.loads(json.dumps(asdict(moments)))) == moments


# --------------------------------------------------------------------------- policies with a known optimum: B1 to B3


ARMS, BETA = 8, 0.5


def bandit() -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, reference log-probabilities, and the optimum ref * exp(reward / beta) / Z, of eight answers."""
    rewards, reference = normal(ARMS, seed=3), normal(ARMS, seed=4).log_softmax(0)
    return rewards, reference, (reference + rewards / BETA).softmax(0)


def k3_fixed_point(rewards: Tensor, reference: Tensor) -> Tensor:
    """Where k3 as a loss leads: beta * ref / (c - reward), with c by bisection such that it sums to 1."""
    low, high = float(rewards.max()) + 1e-12, float(rewards.max()) + 100
    for _ in range(200):
        middle = (low + high) / 2
        over = float((BETA * reference.exp() / (middle - rewards)).sum()) > 1
        low, high = (middle, high) if over else (low, middle)
    return BETA * reference.exp() / (high - rewards)


def distance(one: Tensor, other: Tensor) -> float:
    """Total variation."""
    return float((one - other).abs().sum() / 2)


def test_B1_exact_gradients_reach_the_closed_form() -> None:
    rewards, reference, optimum = bandit()
    logits = torch.zeros(ARMS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        policy = logits.log_softmax(0)
        return (policy.exp() * (rewards - BETA * kl_k1(policy, reference))).sum()

    def loss() -> Tensor:
        optimizer.zero_grad()
        negative = -value()
        negative.backward()
        return negative

    optimizer.step(loss)
    best = BETA * float((reference + rewards / BETA).logsumexp(0))
    with torch.no_grad():
        assert 0 <= best - value() + 1e-12 < 1e-5
        assert distance(logits.softmax(0), optimum) < 1e-3
        logits.copy_(optimum.log())
        assert value().item() == pytest.approx(best, abs=1e-12)


def test_B3_the_fixed_points_of_the_two_penalties_are_where_their_gradients_vanish() -> None:
    rewards, reference, optimum = bandit()
    other = k3_fixed_point(rewards, reference)
    assert other.sum().item() == pytest.approx(1, abs=1e-12)
    assert distance(optimum, other) > 0.1
    for point, rests in ((other, True), (optimum, False)):
        logits = point.log().requires_grad_()
        policy = logits.log_softmax(0)
        penalty = (policy.exp().detach() * kl_k3(policy, reference)).sum()
        (gradient,) = torch.autograd.grad((policy.exp() * rewards).sum() - BETA * penalty, logits)
        assert (gradient.norm() < 1e-10) == rests


def test_B2_sampled_policy_gradient_with_k1_in_the_reward_reaches_the_optimum() -> None:
    rewards, reference, optimum = bandit()
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(ARMS, dtype=torch.float64)
    actions = torch.ones(1, 512, dtype=torch.bool)
    steps, kept = 3000, torch.zeros(ARMS, dtype=torch.float64)
    for step in range(steps):
        leaf = logits.requires_grad_()
        policy = leaf.log_softmax(0)
        now = policy.detach().exp()
        answers = torch.multinomial(now, 512, replacement=True, generator=generator)[None]
        chosen = policy[answers]
        # Each answer is a completion of one token, so that its score is earned where its penalty is paid.
        earned = kl_shaped_rewards(
            rewards[answers[0]], chosen.view(-1, 1), reference[answers].view(-1, 1), actions.view(-1, 1), BETA
        ).view(1, -1)
        loss, _ = clipped_surrogate(chosen, chosen, earned - earned.mean(), actions, 0.2)
        (gradient,) = torch.autograd.grad(loss / 512, leaf)
        logits = logits.detach() - 0.5 * gradient
        if step >= steps // 2:
            kept += now / (steps - steps // 2)
    assert distance(kept, optimum) < 0.01
    assert distance(kept, k3_fixed_point(rewards, reference)) > 0.1
