"""Every preference loss: a number worked by hand, a slow reference, its start, its symmetries, its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from plaudit import DiscoPOP, preferences

Scalar = Callable[[float, float, float], float]
LOG3 = math.log(3)
NOUGHT, QUARTER = -math.log(0.9), -math.log(0.75)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cost(x: float, chance: float = 1.0) -> float:
    return -chance * math.log(sigmoid(x)) - (1 - chance) * math.log(sigmoid(-x))


def averaged(loss: Callable[[float], float]) -> Scalar:
    """What a person drawn at random costs whose preference is p."""
    return lambda c, r, p: p * loss(c - r) + (1 - p) * loss(r - c)


def divergence(q: float, t: float) -> float:
    return q * math.log(q / t) + (1 - q) * math.log((1 - q) / (1 - t))


def odds(x: float) -> float:
    return math.log(math.exp(x) / (1 - math.exp(x)))


# name: (settings, one pair by plain arithmetic, whether soft preferences are taken). beta is 0.5 in all of them.
PAIRS: dict[str, tuple[dict[str, Any], Scalar, bool]] = {
    "dpo": ({}, averaged(lambda h: cost(0.5 * h)), True),
    "dpo smoothed": ({"label_smoothing": 0.1}, averaged(lambda h: 0.9 * cost(0.5 * h) + 0.1 * cost(-0.5 * h)), True),
    "robust_dpo": (
        {"label_smoothing": 0.1},
        averaged(lambda h: (0.9 * cost(0.5 * h) - 0.1 * cost(-0.5 * h)) / 0.8),
        True,
    ),
    "ipo": ({}, averaged(lambda h: (h - 1) ** 2), True),
    "hinge": ({}, averaged(lambda h: max(0, 1 - 0.5 * h)), True),
    "exo": (
        {"label_smoothing": 0.25},
        lambda c, r, p: divergence(sigmoid(0.5 * (c - r)), 0.75 * p + 0.25 * (1 - p)),
        True,
    ),
    "nca": ({}, lambda c, r, p: cost(0.5 * c) + 0.5 * cost(-0.5 * c) + 0.5 * cost(-0.5 * r), False),
    "sppo": ({}, lambda c, r, p: (c - 2 * (p - 0.5)) ** 2 + (r - 2 * (0.5 - p)) ** 2, True),
    "bco_pair": ({"baseline": LOG3}, lambda c, r, p: cost(0.5 * c - LOG3) + cost(LOG3 - 0.5 * r), False),
    "apo_zero": ({}, lambda c, r, p: 1 - sigmoid(0.5 * c) + sigmoid(0.5 * r), False),
    "apo_down": ({}, lambda c, r, p: sigmoid(0.5 * c) + 1 - sigmoid(0.5 * (c - r)), False),
    "discopop": (
        {"tau": 1.0},
        lambda c, r, p: (
            (1 - sigmoid(0.5 * (c - r))) * cost(0.5 * (c - r)) + sigmoid(0.5 * (c - r)) * math.exp(-0.5 * (c - r))
        ),
        False,
    ),
    "cpo": ({"label_smoothing": 0.1}, averaged(lambda h: 0.9 * cost(0.5 * h) + 0.1 * cost(-0.5 * h)), True),
    "simpo": (
        {"gamma": LOG3, "label_smoothing": 0.1},
        lambda c, r, p: 0.9 * cost(0.5 * (c - r) - LOG3) + 0.1 * cost(-(0.5 * (c - r) - LOG3)),
        False,
    ),
    "orpo": ({}, lambda c, r, p: -c + 0.5 * cost(odds(c) - odds(r)), False),
}
# What a pair costs whose rewards are log 3 and -log 3, so that the chosen answer wins in 9 of 10 cases.
GOLDEN = {
    "dpo": NOUGHT,
    "dpo smoothed": 0.9 * NOUGHT + 0.1 * math.log(10),
    "robust_dpo": (0.9 * NOUGHT - 0.1 * math.log(10)) / 0.8,
    "ipo": (4 * LOG3 - 1) ** 2,
    "hinge": 0.0,
    "exo": 0.9 * math.log(6 / 5) + 0.1 * math.log(2 / 5),
    "nca": 1.5 * QUARTER + 0.5 * math.log(4),
    "sppo": 2 * (2 * LOG3 - 1) ** 2,
    "bco_pair": math.log(2) + NOUGHT,
    "apo_zero": 0.5,
    "apo_down": 0.85,
    "discopop": 0.1 * NOUGHT + 0.1,
    "cpo": 0.9 * NOUGHT + 0.1 * math.log(10),
    "simpo": 0.9 * QUARTER + 0.1 * math.log(4),
}
SOFT = [name for name, (_, _, soft) in PAIRS.items() if soft]


def loss_of(name: str, chosen: Tensor, rejected: Tensor, *preference: Any) -> tuple[Tensor, dict[str, Tensor]]:
    found = getattr(preferences, name.split()[0])(
        chosen, rejected, 0.5, **PAIRS[name][0], **({"preference": preference[0]} if preference else {})
    )
    return found


def some(name: str, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What the loss reads of `count` pairs: averaged log-probabilities for ORPO, log-ratios for all others."""
    chosen, rejected = 2 * normal(2, count, seed=seed)
    return (-chosen.abs() - 0.01, -rejected.abs() - 0.01) if name == "orpo" else (chosen, rejected)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_pair_by_hand(name: str) -> None:
    loss, stats = loss_of(name, double(2 * LOG3), double(-2 * LOG3))
    assert loss.item() == pytest.approx(GOLDEN[name], rel=1e-12, abs=1e-12)
    assert {key: value.item() for key, value in stats.items()} == pytest.approx(
        {"accuracy": 1, "margin": 2 * LOG3, "chosen_reward": LOG3, "rejected_reward": -LOG3}
    )


def test_orpo_by_hand() -> None:
    # Probabilities of 3/4 and 1/4 have odds of 3 and 1/3.
    loss, _ = preferences.orpo(double(math.log(0.75)), double(math.log(0.25)), 0.5)
    assert loss.item() == pytest.approx(QUARTER + 0.5 * NOUGHT, rel=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_many_pairs_are_the_loop(name: str) -> None:
    chosen, rejected = some(name, 40)
    shares = [1.0] * 40
    given: list[Any] = []
    if name in SOFT:
        shares = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).tolist()
        given = [torch.tensor(shares, dtype=torch.float64)]
    loss, stats = loss_of(name, chosen, rejected, *given)
    pairs = list(zip(chosen.tolist(), rejected.tolist(), shares, strict=True))
    assert loss.item() == pytest.approx(sum(PAIRS[name][1](*pair) for pair in pairs), rel=1e-9)
    ahead = [(c - r) * (1 if p > 0.5 else -1) for c, r, p in pairs]
    assert stats["accuracy"].item() == sum(lead > 0 for lead in ahead)
    assert stats["margin"].item() == pytest.approx(0.5 * sum(ahead), rel=1e-9)


@pytest.mark.parametrize("name", SOFT)
def test_b9_swapping_the_answers_is_the_opposite_preference(name: str) -> None:
    chosen, rejected = some(name, 6)
    share = torch.rand(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    here, there = loss_of(name, chosen, rejected, share), loss_of(name, rejected, chosen, 1 - share)
    torch.testing.assert_close(here[0], there[0], rtol=1e-12, atol=1e-12)
    for figure in here[1]:
        torch.testing.assert_close(here[1][figure], there[1][figure])
    tie = loss_of(name, chosen, rejected, 0.5)[1]
    assert (tie["accuracy"], tie["margin"]) == (3, 0)


def test_b7_robust_dpo_is_dpo_of_what_was_meant() -> None:
    chosen, rejected = normal(2, 5)
    flipped = 0.7 * preferences.robust_dpo(chosen, rejected, 0.4, label_smoothing=0.3)[0]
    flipped += 0.3 * preferences.robust_dpo(rejected, chosen, 0.4, label_smoothing=0.3)[0]
    torch.testing.assert_close(flipped, preferences.dpo(chosen, rejected, 0.4)[0])


def test_b8_starts() -> None:
    zero, beta = double(0.0), 0.3
    starts = {
        "dpo": (preferences.dpo(zero, zero, beta, label_smoothing=0.2), math.log(2)),
        "robust": (preferences.robust_dpo(zero, zero, beta, label_smoothing=0.2), math.log(2)),
        "hinge": (preferences.hinge(zero, zero, beta), 1),
        "ipo": (preferences.ipo(zero, zero, beta), 1 / (4 * beta**2)),
        "sppo": (preferences.sppo(zero, zero, beta), 1 / (2 * beta**2)),
        "nca": (preferences.nca(zero, zero, beta), 2 * math.log(2)),
        "bco_pair": (preferences.bco_pair(zero, zero, beta, 0.0), 2 * math.log(2)),
        "apo_zero": (preferences.apo_zero(zero, zero, beta), 1),
        "apo_down": (preferences.apo_down(zero, zero, beta), 1),
        "discopop": (preferences.discopop(zero, zero, beta), (math.log(2) + 1) / 2),
        "exo": (preferences.exo(zero, zero, beta, label_smoothing=0.1), -math.log(2) - math.log(0.1 * 0.9) / 2),
        "kto": (preferences.kto(zero, torch.tensor([True]), 0.0, beta), 0.5),
        "bco": (preferences.bco(zero, torch.tensor([False]), 0.0, beta), math.log(2)),
        "orpo": (preferences.orpo(zero - 1, zero - 1, beta), 1 + beta * math.log(2)),
        "simpo": (preferences.simpo(zero - 1, zero - 1, beta, 0.7), math.log(1 + math.exp(0.7))),
        "alphapo": (preferences.alphapo(zero - 1, zero - 1, beta, 0.7, 0.3), math.log(1 + math.exp(0.7))),
    }
    for name, ((loss, stats), start) in starts.items():
        assert loss.item() == pytest.approx(start, rel=1e-6), name
        assert stats["accuracy"] == 0.5, name
    for transport in (preferences.aot, preferences.aot_unpaired):
        assert transport(zero, zero, beta, 0.2).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", PAIRS)
def test_b24_gradients_of_pairs(name: str) -> None:
    chosen, rejected = (value.requires_grad_() for value in some(name, 5, seed=3))
    assert torch.autograd.gradcheck(lambda c, r: loss_of(name, c, r)[0], (chosen, rejected))
    _, stats = loss_of(name, chosen, rejected)
    assert not any(value.requires_grad for value in stats.values())


def test_s2_10_alphapo_by_hand_by_the_loop_and_b24() -> None:
    # Probabilities of 1/4 and 1/9 with alpha 1/2: rewards of (1 - 2) * 2 and (1 - 3) * 2, so the lead is 2.
    given = double(math.log(1 / 4)), double(math.log(1 / 9))
    loss, stats = preferences.alphapo(*given, LOG3, LOG3, 0.5)
    assert loss.item() == pytest.approx(QUARTER, rel=1e-12)
    assert (stats["margin"].item(), stats["chosen_reward"].item()) == pytest.approx((2 * LOG3, -2 * LOG3))
    chosen, rejected = -normal(2, 9, seed=5).abs()
    for alpha in (0.3, -0.4):
        slow = 0.0
        for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True):
            lead = 2 * ((1 - math.exp(c) ** -alpha) / alpha - (1 - math.exp(r) ** -alpha) / alpha) - 0.7
            slow += 0.9 * cost(lead) + 0.1 * cost(-lead)
        function = lambda c, r, a=alpha: preferences.alphapo(c, r, 2.0, 0.7, a, 0.1)[0]  # noqa: E731
        assert function(chosen, rejected).item() == pytest.approx(slow, rel=1e-12)
        assert torch.autograd.gradcheck(function, (chosen.requires_grad_(), rejected.requires_grad_()))
    near = preferences.alphapo(chosen, rejected, 2.0, 0.7, 1e-9)[0]
    torch.testing.assert_close(near, preferences.simpo(chosen, rejected, 2.0, 0.7)[0], rtol=1e-7, atol=0)


def test_nothing_flows_to_the_baseline_of_bco_pair() -> None:
    baseline = double(0.2).requires_grad_()
    preferences.bco_pair(normal(3).requires_grad_(), normal(3), 0.5, baseline)[0].backward()
    assert baseline.grad is None


def test_orpo_is_finite_at_both_ends() -> None:
    chosen = torch.tensor([0.0, -200.0, -1e-7], requires_grad=True)
    loss, _ = preferences.orpo(chosen, torch.tensor([-1.0, -1.0, 0.0]), 1.0)
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert loss.isfinite()
    assert gradient.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- aot


def test_aot_by_hand_and_by_sorting() -> None:
    # Sorted: 0, 1, 3 meet -1, 1, 2, so the leads are 1, 0, 1; pair 1 holds the smallest margin, pair 0 the largest.
    losses = preferences.aot(double(3, 0, 1), double(2, -1, 1), LOG3, 0.0)
    assert losses.tolist() == pytest.approx([QUARTER, QUARTER, math.log(2)])
    margins, reference = normal(2, 9)
    slow = sum(
        0.8 * cost(0.5 * (m - r)) + 0.2 * cost(-0.5 * (m - r))
        for m, r in zip(sorted(margins.tolist()), sorted(reference.tolist()), strict=True)
    )
    assert preferences.aot(margins, reference, 0.5, 0.2).sum().item() == pytest.approx(slow)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = preferences.aot(margins[order], reference, 0.5, 0.2)
    torch.testing.assert_close(moved, preferences.aot(margins, reference, 0.5, 0.2)[order])


def test_s2_08_unpaired_aot_by_hand_and_by_sorting() -> None:
    # Sorted: -1, 0, 2 meet -1, 1, 1, so the leads are 0, -1, 1; the losses stand where the chosen answers do.
    losses = preferences.aot_unpaired(double(2, -1, 0), double(1, 1, -1), LOG3, 0.0)
    assert losses.tolist() == pytest.approx([QUARTER, math.log(2), math.log(4)])
    chosen, rejected = normal(2, 9, seed=6)
    slow = sum(
        0.8 * cost(0.5 * (c - r)) + 0.2 * cost(-0.5 * (c - r))
        for c, r in zip(sorted(chosen.tolist()), sorted(rejected.tolist()), strict=True)
    )
    found = preferences.aot_unpaired(chosen, rejected, 0.5, 0.2)
    assert found.sum().item() == pytest.approx(slow)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(preferences.aot_unpaired(chosen[order], rejected, 0.5, 0.2), found[order])
    torch.testing.assert_close(preferences.aot_unpaired(chosen, rejected[order], 0.5, 0.2), found)
    weight = normal(9, seed=4)
    function = lambda c, r: (weight * preferences.aot_unpaired(c, r, 0.5, 0.2)).sum()  # noqa: E731
    assert torch.autograd.gradcheck(function, (chosen.requires_grad_(), rejected.requires_grad_()))


def test_b24_gradient_of_aot() -> None:
    margins, reference = normal(2, 6)
    weight = normal(6, seed=4)  # the gradient has to reach the right pair, and a plain sum would not tell
    function = lambda m: (weight * preferences.aot(m, reference, 0.5, 0.2)).sum()  # noqa: E731
    assert torch.autograd.gradcheck(function, (margins.requires_grad_(),))


# ------------------------------------------------------------------------------------------------------------ rrhf


def test_rrhf_by_hand() -> None:
    # The first leads the second by 1 as it should, and trails the third by a half; the best of both groups is imitated.
    averages, totals = double(-1, -2, -0.5, -1, -3), double(-3, -4, -1, -2, -9)
    ranks, groups = torch.tensor([1.0, 2, 2, 2, 1]), torch.tensor([0, 0, 0, 1, 1])
    loss, stats = preferences.rrhf(averages, totals, ranks, groups, 2.0)
    assert loss.item() == pytest.approx(2 * (0.5 + 2) + 3 + 9)
    assert stats["accuracy"].item() == pytest.approx(0.5 + 0)
    assert stats["margin"].item() == pytest.approx((1 - 0.5) / 2 - 2)
    # Two best answers share the imitation.
    loss, _ = preferences.rrhf(averages[:2], totals[:2], torch.ones(2), groups[:2], 2.0)
    assert loss.item() == pytest.approx(3.5)


def test_rrhf_is_the_loop_and_b24() -> None:
    averages, totals = normal(2, 8)
    ranks, groups = torch.tensor([1.0, 3, 2, 2, 1, 2, 1, 1]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    slow = 0.0
    for group in range(3):
        members = [i for i in range(8) if groups[i] == group]
        best = [i for i in members if ranks[i] == min(ranks[j] for j in members)]
        slow -= sum(totals[i].item() for i in best) / len(best)
        for i in members:
            for j in members:
                if ranks[i] < ranks[j]:
                    slow += 0.7 * max(0.0, (averages[j] - averages[i]).item())
    function = lambda a, t: preferences.rrhf(a, t, ranks, groups, 0.7)[0]  # noqa: E731
    assert function(averages, totals).item() == pytest.approx(slow, rel=1e-12)
    assert torch.autograd.gradcheck(function, (averages.requires_grad_(), totals.requires_grad_()))


# -------------------------------------------------------------------------------------------------- single answers

GOOD = torch.tensor([True, False, True, False])


def test_single_answers_by_hand() -> None:
    ratios = double(LOG3 + 1, LOG3 + 1)
    loss, stats = preferences.kto(ratios, GOOD[:2], 1.0, 1.0, 2.0, 5.0)
    assert loss.item() == pytest.approx(2 * 0.25 + 5 * 0.75)
    assert (stats["accuracy"].item(), stats["margin"].item()) == (1, 0)
    loss, stats = preferences.bco(ratios, GOOD[:2], 1.0, 1.0, double(1.0, 3.0))
    assert loss.item() == pytest.approx(QUARTER + 3 * math.log(4))
    assert stats["accuracy"].item() == 1


def test_single_answers_are_the_loop_and_b24_b25() -> None:
    ratios, weight = normal(2, 4)
    baseline = double(0.2, 0.2, 0.2, 0.2).requires_grad_()
    weight = weight.abs().requires_grad_()
    sides = [1 if good else -1 for good in GOOD.tolist()]
    terms = [(1 - sigmoid(0.5 * s * (x - 0.2)), s) for s, x in zip(sides, ratios.tolist(), strict=True)]
    slow = sum((1.3 if s > 0 else 0.7) * term for term, s in terms)
    classified = sum(
        w * cost(s * (0.5 * x - 0.2)) for w, s, x in zip(weight.tolist(), sides, ratios.tolist(), strict=True)
    )
    ratios.requires_grad_()
    losses = {
        "kto": (lambda x: preferences.kto(x, GOOD, baseline, 0.5, 1.3, 0.7)[0], slow),
        "bco": (lambda x: preferences.bco(x, GOOD, baseline, 0.5, weight)[0], classified),
    }
    for function, expected in losses.values():
        loss = function(ratios)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        loss.backward()
        assert torch.autograd.gradcheck(function, (ratios,))
    assert baseline.grad is None
    assert weight.grad is None


def test_density_ratios_are_those_of_the_best_classifier() -> None:
    good, bad = normal(30, 3) + double(0.5, 0, 0), normal(90, 3, seed=1)
    probes = torch.cat([torch.zeros(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)])
    lead = preferences.density_ratios(good, bad, probes, 1e-9, 1e9).log()
    bias, slope = lead[0].requires_grad_(), (lead[1:] - lead[0]).detach().requires_grad_()
    # What logistic regression with balanced classes and a penalty of half the squared norm minimises is flat there.
    penalised = 0.5 * slope.square().sum()
    for points, size, sign in ((good, 30, 1), (bad, 90, -1)):
        penalised = penalised - 120 / (2 * size) * torch.nn.functional.logsigmoid(sign * (points @ slope + bias)).sum()
    for gradient in torch.autograd.grad(penalised, (bias, slope)):
        assert gradient.abs().max() < 1e-4
    assert slope[0] > 0.2
    held = preferences.density_ratios(good, bad, 100 * double(1, -1)[:, None] * probes[1:2], 0.5, 10.0)
    assert held.tolist() == [10.0, 0.5]


def test_discopop_first_steps_go_the_right_way_at_its_default_and_not_at_the_papers():
    def slope(tau: float) -> float:
        lead = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        preferences.discopop(lead, torch.zeros(1, dtype=torch.float64), 1.0, tau)[0].backward()
        return float(lead.grad)

    for tau in (DiscoPOP.tau, 0.05):
        assert slope(tau) == pytest.approx(-0.75 + (1 - math.log(2)) / (4 * tau))
    assert slope(DiscoPOP.tau) < 0 < slope(0.05)


def test_discopop_far_behind_is_still_a_number():
    lead = torch.tensor([-500.0], requires_grad=True)
    loss, _ = preferences.discopop(lead, torch.zeros(1), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(500.0)
    assert lead.grad is not None
    assert lead.grad.isfinite().all()
