"""Preferences among one's own samples, and the best of several: who is picked, what is learned, and that it helps."""

from __future__ import annotations

import math

import pytest
import torch

import examples
import plaudit
from plaudit import BestOfN, OnlineDPO, OnlineIPO
from plaudit.algorithms.online import extremes
from plaudit.trainer import Trainer


def figures_of(algorithm, batch):
    trainer = Trainer(None, algorithm.world, algorithm.settings)
    algorithm.policy.zero_grad()
    trainer._gradients(algorithm, batch)
    return trainer.figures


@pytest.mark.parametrize("kind", [OnlineDPO, OnlineIPO, BestOfN], ids=lambda kind: kind.__name__)
def test_it_learns_to_please_a_count(kind, talker, tmp_path):
    run = plaudit.train(examples.pleasing(kind, talker, tmp_path, group=4, steps=20))
    scores = [line["score"] for line in run.metrics()]
    assert scores[0] < 1
    assert scores[-1] > 2.5, scores  # of 8
    assert ("kl" in run.summary) == (kind is not BestOfN)


def test_the_best_and_the_worst_of_each_group():
    scores = torch.tensor([2.0, 1, 3, 5, 5, 4, 7, 7, 7])
    worst, best = extremes(scores, 3)
    assert worst.tolist() == [1, 5, 6]
    assert best.tolist() == [2, 4, 8]


def test_pairs_are_the_best_above_the_worst_and_ties_are_none(at, tmp_path):
    changes = {"group": 4, "rollout": 16, "batch_size": 16, "reward_normalise": False, "missing_end_penalty": 0.0}
    (tmp_path / "rank.py").write_text(
        "def rank(completions, **columns):\n"
        "    return [float([2, 9, 0, 5][i % 4]) * (i >= 4) for i in range(len(completions))]\n"
    )
    settings = examples.settings("online_dpo", at, tmp_path / "run", rewards=f"{tmp_path / 'rank.py'}:rank", **changes)
    algorithm = examples.built(settings)
    whole = algorithm.collated(algorithm.draw(algorithm.prompts()))
    algorithm.generator.manual_seed(settings.seed * 7919)
    batch = algorithm.rollout()
    assert algorithm.notes["degenerate"] == 0.25
    assert algorithm.weight(batch) == 3
    assert batch.scores.tolist() == [0, 0, 9, 0, 9, 0, 9, 0]
    assert batch.actions.any(1).tolist() == [False, False] + [True] * 6
    for row, place in enumerate((0, 0, 5, 6, 9, 10, 13, 14)):
        if row > 1:
            length = int(whole.lengths[place])
            assert torch.equal(batch.tokens[row, :length], whole.tokens[place, :length])
    beta, smoothing = settings.beta, settings.label_smoothing
    with torch.no_grad():
        for parameter in algorithm.policy.learning().values():
            parameter += 0.02
        logprobs = algorithm.policy(batch).logprobs
    with algorithm.policy.as_reference(), torch.no_grad():
        reference = algorithm.policy(batch).logprobs
    ratios = ((logprobs - reference) * batch.actions).sum(1).tolist()
    total = 0.0
    for pair in (1, 2, 3):
        lead = beta * (ratios[2 * pair] - ratios[2 * pair + 1])
        total += (1 - smoothing) * math.log1p(math.exp(-lead)) + smoothing * math.log1p(math.exp(lead))
    assert figures_of(algorithm, batch)["loss"] == pytest.approx(total / 3, rel=1e-4)
    assert total / 3 != pytest.approx(math.log(2), abs=1e-4)


def test_b8_at_the_start_a_pair_costs_log_2(at, tmp_path):
    algorithm = examples.built(examples.settings("online_dpo", at, tmp_path / "run"))
    figures = figures_of(algorithm, next(algorithm.batches()))
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(algorithm.notes["kl"]) < 1e-5


def test_online_ipo_aims_at_a_margin(at, tmp_path):
    algorithm = examples.built(examples.settings("online_ipo", at, tmp_path / "run", beta=0.25))
    figures = figures_of(algorithm, next(algorithm.batches()))
    assert figures["loss"] == pytest.approx(4.0, abs=1e-4)  # B8: (1 / (2 beta))^2
    loss, stats = algorithm.pairs(torch.tensor([3.0, 0.5]), torch.tensor([0.5, 0.0]))
    assert loss.item() == pytest.approx((2.5 - 2) ** 2 + (0.5 - 2) ** 2)
    assert stats["margin"].item() == pytest.approx(0.25 * 3.0)


def test_r16_where_all_are_alike_nothing_is_learned(at, tmp_path):
    (tmp_path / "same.py").write_text("def same(completions, **columns):\n    return [0.1] * len(completions)\n")
    changes = {"rewards": f"{tmp_path / 'same.py'}:same", "missing_end_penalty": 0.0}
    algorithm = examples.built(examples.settings("online_dpo", at, tmp_path / "run", **changes))
    batch = next(algorithm.batches())
    assert algorithm.weight(batch) == 0
    figures = figures_of(algorithm, batch)
    assert figures["loss"] == 0
    assert all(p.grad is None or p.grad.eq(0).all() for p in algorithm.policy.learning().values())


def test_the_best_of_n_is_imitated_and_nothing_else(at, tmp_path):
    algorithm = examples.built(examples.settings("best_of_n", at, tmp_path / "run", group=4))
    whole = algorithm.collated(algorithm.draw(algorithm.prompts()))
    algorithm.generator.manual_seed(algorithm.settings.seed * 7919)
    algorithm.rewards.moments = type(algorithm.rewards.moments)()
    batch = algorithm.rollout()
    assert len(batch) == 4
    assert batch.scores.tolist() == pytest.approx(whole.scores.view(4, 4).amax(1).tolist())
    assert algorithm.notes["best_score"] == pytest.approx(batch.scores.mean().item())
    logprobs = algorithm.policy(batch).logprobs
    expected = -(logprobs * batch.actions).sum() / batch.actions.sum()
    assert figures_of(algorithm, batch)["loss"] == pytest.approx(expected.item(), rel=1e-5)
