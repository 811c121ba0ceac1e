"""Policy gradients: each learns, reaches the optimum that is its own, and weighs tokens as its paper says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import examples
import plaudit
import tiny
from plaudit import (
    CISPO,
    DAPO,
    GDPO,
    GMPO,
    GRPO,
    GSPO,
    LUSPO,
    RLOO,
    SAPO,
    VESPO,
    VPG,
    DrGRPO,
    LitePPO,
    PlauditError,
    ReinforcePP,
)
from plaudit.trainer import Trainer

LETTERS = {letter: tiny.tokenizer()(letter).input_ids[0] for letter in examples.LETTERS}
GROUPED = (RLOO, GRPO, DrGRPO, LitePPO, GDPO, DAPO, GSPO, GMPO, CISPO, LUSPO, SAPO, VESPO)


def built(kind, at, tmp_path, **changes):
    return examples.built(examples.settings(kind, at, tmp_path / "run", **changes))


def gradient(algorithm, batch):
    trainer = Trainer(None, algorithm.world, algorithm.settings)
    algorithm.policy.zero_grad()
    trainer._gradients(algorithm, batch)
    return torch.cat([p.grad.flatten() for p in algorithm.policy.learning().values()]), trainer.figures


# ------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("kind", [ReinforcePP, *GROUPED], ids=lambda kind: kind.__name__)
def test_it_learns_to_please_a_count(kind, talker, tmp_path):
    changes = {"rollout": 32, "batch_size": 32, "learning_rate": 1e-2, "steps": 16}
    if kind in (GSPO, CISPO, LUSPO, SAPO, VESPO):
        changes |= {"reuse": 2, "steps": 28}
    if issubclass(kind, GSPO):  # clips as narrow as for long texts would hold these few steps back
        changes |= {"clip_low": 0.05, "clip_high": 0.05}
    run = plaudit.train(examples.pleasing(kind, talker, tmp_path, **changes))
    scores = [line["score"] for line in run.metrics() if "score" in line]
    assert scores[0] < 1
    assert scores[-1] > 5, scores  # of 8


def test_s0_the_reward_is_hacked_without_kl_and_not_with_it(talker, tmp_path):
    # The seed's VPG: a small character model, the count of one letter, no KL; within 100 steps it says nothing else.
    free = plaudit.train(
        examples.pleasing(VPG, talker, tmp_path, steps=60, rollout=32, batch_size=32, learning_rate=1e-2)
    )
    lines = free.metrics()
    assert lines[0]["score"] < 1
    assert free.summary["score"] > 0.95 * 8
    assert all(line["score"] <= 8 for line in lines)
    held = plaudit.train(
        examples.pleasing(
            VPG,
            talker,
            tmp_path,
            steps=30,
            rollout=32,
            batch_size=32,
            learning_rate=1e-2,
            kl=2.0,
            output=str(tmp_path / "held"),
        )
    )
    assert held.summary["score"] < 2
    assert 0 < held.summary["kl"] < 2


# ----------------------------------------------------------------------------------------------------- known optima

WORTH = {"a": 2.0, "b": 1.5, "c": 1.5, "d": 1.5, "f": -1.5, "g": -1.5, "h": -1.5}
BETA = 0.5


def probabilities(folder):
    """(20, 257) what a model says first to prompts that it has not seen."""
    tokenizer, model = tiny.tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    ids = [tokenizer(f"{i} ", return_tensors="pt").input_ids for i in range(10, 30)]
    with torch.no_grad():
        return torch.cat([model(i).logits[:, -1] for i in ids]).double().softmax(1)


def tilted(reference, reward):
    """ref exp(r / beta) / Z."""
    weighed = reference * (reward / BETA).exp()
    return weighed / weighed.sum(1, keepdim=True)


def fixed_point_of_k3(reference, reward):
    """beta ref / (lambda - r), lambda by bisection: what is left alone where k3 is the loss (B3)."""
    low = reward.max() + torch.zeros(len(reference), 1, dtype=torch.float64)
    high = low + BETA
    for _ in range(100):
        middle = (low + high) / 2
        heavy = (BETA * reference / (middle - reward)).sum(1, keepdim=True) > 1
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    return BETA * reference / (high - reward)


def distance(one, other):
    return float((one - other).abs().sum(1).mean() / 2)


# The straight-through term has the gradient of k2, bit by bit almost: tests/unit/test_group_advantages.py.
@pytest.mark.parametrize("term", ["reward", "k2", "k3"])
def test_b1_b2_b3_each_kl_term_leads_to_its_own_optimum(term, talker, tmp_path):
    (tmp_path / "rewards.py").write_text(
        f"def worth(prompts, completions, **columns):\n    return [{WORTH}.get(text, 0.0) for text in completions]\n"
    )
    changes = {"rewards": f"{tmp_path / 'rewards.py'}:worth", "kl": BETA, "kl_term": term, "max_new_tokens": 1}
    changes |= {"rollout": 128, "batch_size": 128, "baseline": "mean", "schedule": "linear", "steps": 50}
    run = plaudit.train(examples.pleasing(VPG, talker, tmp_path, learning_rate=1e-2, max_grad_norm=0.0, **changes))
    reference, policy = probabilities(talker), probabilities(run.final)
    reward = torch.zeros(257, dtype=torch.float64)
    for letter, value in WORTH.items():
        reward[LETTERS[letter]] = value
    best, other = tilted(reference, reward), fixed_point_of_k3(reference, reward)
    assert float((other.sum(1) - 1).abs().max()) < 1e-9
    assert distance(best, other) > 0.15
    reached, missed = (other, best) if term == "k3" else (best, other)
    assert distance(policy, reached) < 0.08
    assert distance(policy, missed) > 0.15
    assert distance(policy, reference) > 0.3


def test_b21_a_budget_bounds_the_divergence_and_an_idle_one_costs_nothing(talker, tmp_path):
    changes = {"kl": 0.2, "kl_budget": 2.0, "steps": 56, "rollout": 24, "batch_size": 24, "learning_rate": 3e-3}
    bound = examples.pleasing(VPG, talker, tmp_path, **changes)
    lines = plaudit.train(bound).metrics()
    assert lines[0]["kl_coefficient"] == 0.2
    assert lines[1]["kl_coefficient"] == pytest.approx(0.2 - 0.05, abs=1e-3)  # no divergence yet
    assert max(line["kl"] for line in lines) > 5  # where the first weight would have led
    assert np.mean([line["kl"] for line in lines[-16:]]) == pytest.approx(2.0, abs=0.7)
    assert lines[-1]["kl_coefficient"] > 0.5
    wide = examples.pleasing(VPG, talker, tmp_path, kl=0.2, kl_budget=50.0, steps=3, output=str(tmp_path / "wide"))
    assert [line["kl_coefficient"] for line in plaudit.train(wide).metrics()] == pytest.approx(
        [0.2, 0.15, 0.1], abs=2e-3
    )


# ------------------------------------------------------------------------------------------- what each one learns from


def test_the_moving_baseline_is_that_of_the_seed(at, tmp_path):
    algorithm = built("vpg", at, tmp_path, kl=0.0, kl_target=0.0, reward_normalise=False)
    baseline = 0.0
    for _ in range(3):
        batch = algorithm.rollout()
        baseline = 0.9 * baseline + 0.1 * batch.scores.mean().item()  # before it is taken off
        assert algorithm.notes["baseline"] == pytest.approx(baseline, abs=1e-6)
        expected = (batch.scores - baseline)[:, None] * batch.actions
        torch.testing.assert_close(batch.advantages, expected, rtol=1e-5, atol=1e-6)
    assert algorithm.state()["baseline"] == pytest.approx(baseline)


@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_the_loss_of_vpg_is_the_sum_of_log_probabilities_times_the_gain(baseline, at, tmp_path):
    algorithm = built("vpg", at, tmp_path, kl=0.0, kl_target=0.0, baseline=baseline, batch_size=8)
    batch = next(algorithm.batches())
    gains = batch.scores - (batch.scores.mean() if baseline == "mean" else 0.0)
    logprobs = algorithm.policy(batch).logprobs
    expected = -(logprobs.sum(1) * gains).mean()
    _, figures = gradient(algorithm, batch)
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


def shares_of(kind, at, tmp_path, **changes):
    algorithm = built(kind, at, tmp_path, batch_size=8, **changes)
    batch = next(algorithm.batches())
    return algorithm, batch, batch.actions.sum(1, keepdim=True)


def test_b14_each_algorithm_weighs_tokens_as_its_paper_says(at, tmp_path):
    plain = {"kl": 0.0, "kl_target": 0.0}
    for kind in ("vpg", "rloo"):
        algorithm, batch, _ = shares_of(kind, at, tmp_path, **plain)
        assert torch.equal(algorithm.share(batch), batch.actions.float())
        assert algorithm.weight(batch) == batch.actions.any(1).sum()
    algorithm, batch, _ = shares_of("luspo", at, tmp_path)
    assert torch.equal(algorithm.share(batch), batch.actions.float())
    assert algorithm.weight(batch) == 8
    for kind in ("grpo", "gdpo", "gspo", "gmpo", "sapo"):
        algorithm, batch, lengths = shares_of(kind, at, tmp_path, **plain)
        assert algorithm.weight(batch) == 8
        torch.testing.assert_close(algorithm.share(batch), batch.actions / lengths)
    algorithm, batch, lengths = shares_of("dr_grpo", at, tmp_path, reject_best=0.0, **plain)
    assert algorithm.weight(batch) == 8
    torch.testing.assert_close(algorithm.share(batch), batch.actions / 6)  # max_new_tokens
    torch.testing.assert_close(algorithm.counted(batch), batch.actions / lengths)
    for kind in ("lite_ppo", "dapo", "cispo", "vespo", "reinforce_pp", "ppo"):
        algorithm, batch, _ = shares_of(kind, at, tmp_path)
        assert algorithm.weight(batch) == batch.actions.sum()
        assert torch.equal(algorithm.share(batch), batch.actions.float())


def test_kl_and_entropy_are_weighed_like_the_rest_of_the_loss(at, tmp_path):
    algorithm, batch, lengths = shares_of("grpo", at, tmp_path, kl=0.3, kl_target=0.0, entropy=0.2)
    with torch.no_grad():
        for parameter in algorithm.policy.learning().values():
            parameter += 0.05
    algorithm.unmoved = False
    output = algorithm.policy(batch, entropy=True)
    objective, _ = algorithm.objective(output, batch)
    total, divergence, spread = objective.item(), 0.0, 0.0
    for row, t in batch.actions.nonzero().tolist():
        apart = (batch.reference_logprobs[row, t] - output.logprobs[row, t]).item()
        divergence += (math.exp(apart) - 1 - apart) / lengths[row].item()
        spread += output.entropy[row, t].item() / lengths[row].item()
    _, figures = gradient(algorithm, batch)
    assert divergence > 0.01
    assert figures["kl_loss"] == pytest.approx(divergence / 8, rel=1e-4)
    assert figures["entropy"] == pytest.approx(spread / 8, rel=1e-4)
    assert figures["loss"] == pytest.approx((total + 0.3 * divergence - 0.2 * spread) / 8, rel=1e-4, abs=1e-6)


def test_reinforce_pp_pays_the_divergence_to_come_and_standardises_over_the_rollout(at, tmp_path):
    algorithm = built("reinforce_pp", at, tmp_path, baseline="none", kl=0.4, kl_budget=0.0, mask_truncated=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in algorithm.policy.learning().values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    algorithm.position = 4
    batch = algorithm.rollout()
    with algorithm.policy.as_reference(), torch.no_grad():
        reference = algorithm.policy(batch).logprobs
    to_go = {}
    for row in range(8):
        ahead = batch.scores[row].item()
        for t in reversed(batch.actions[row].nonzero()[:, 0].tolist()):
            ahead -= 0.4 * (batch.logprobs[row, t] - reference[row, t]).item()
            to_go[row, t] = ahead
    mean, spread = np.mean(list(to_go.values())), np.std(list(to_go.values()))
    for (row, t), value in to_go.items():
        assert batch.advantages[row, t].item() == pytest.approx((value - mean) / spread, abs=1e-3)
    assert not batch.advantages[~batch.actions].any()


FAMILY = ["grpo", "dr_grpo", "lite_ppo", "gdpo", "gmpo", "dapo", "gspo", "cispo", "luspo", "sapo", "vespo"]


@pytest.mark.parametrize("kind", ["rloo", *FAMILY, "reinforce_pp"])
def test_r16_equal_rewards_teach_exactly_nothing(kind, at, tmp_path):
    (tmp_path / "same.py").write_text("def same(completions, **columns):\n    return [0.1] * len(completions)\n")
    changes = {"rewards": f"{tmp_path / 'same.py'}:same", "kl": 0.0, "kl_target": 0.0, "kl_term": "reward"}
    changes |= {"reward_weights": ()} if kind == "gdpo" else {}
    changes |= {"missing_end_penalty": 0.0, "entropy": 0.0, "overlong": 0.0} | (
        {"kl_budget": 0.0} if kind == "reinforce_pp" else {}
    )
    algorithm = built(kind, at, tmp_path, **changes)
    batch = next(algorithm.batches())
    assert algorithm.notes["degenerate"] == 1
    assert batch.advantages.eq(0).all()
    grads, figures = gradient(algorithm, batch)
    assert grads.eq(0).all()
    assert all(math.isfinite(value) for value in figures.values())
    if kind == "dapo":
        assert not batch.actions.any()


def test_completions_left_out_of_the_loss_are_still_in_the_baseline(at, tmp_path):
    plain = {"kl": 0.0, "kl_target": 0.0, "reject_worst": 0.0}
    whole = built("rloo", at, tmp_path, **plain).rollout()
    ranked = whole.scores.argsort(stable=True)
    for changes, left_out in [
        ({"reject_worst": 0.25}, ranked[:2].tolist()),
        ({"reject_best": 0.5}, ranked[4:].tolist()),
        ({"reject_worst": 0.25, "reject_best": 0.25}, [*ranked[:2].tolist(), *ranked[6:].tolist()]),
        ({"mask_truncated": True}, whole.truncated.nonzero().flatten().tolist()),
    ]:
        algorithm = built("rloo", at, tmp_path, **{**plain, **changes})
        batch = algorithm.rollout()
        assert torch.equal(batch.tokens, whole.tokens)
        assert torch.equal(batch.advantages, whole.advantages)
        assert (~batch.actions.any(1)).nonzero().flatten().tolist() == sorted(left_out)
        kept = [row for row in range(8) if row not in left_out]
        assert torch.equal(batch.actions[kept], whole.actions[kept])
        assert algorithm.notes["rejected"] == pytest.approx(len(left_out) / 8)


def test_dapo_replaces_prompts_that_teach_nothing_and_drops_what_is_left(at, tmp_path):
    (tmp_path / "rare.py").write_text(
        "def rare(prompts, completions, **columns):\n"
        "    return [float(int(p.strip().strip('x')) % 3 == 0) * (i % 2) for i, p in enumerate(prompts)]\n"
    )
    changes = {"rewards": f"{tmp_path / 'rare.py'}:rare", "overlong": 0.0, "missing_end_penalty": 0.0}
    dropping = built("dapo", at, tmp_path, refills=0, **changes)
    batch = dropping.rollout()
    lively = (batch.index % 3 == 0).tolist()
    assert 0 < sum(lively) < 8
    assert batch.actions.any(1).tolist() == lively
    assert dropping.notes["degenerate"] == 1 - sum(lively) / 8
    assert dropping.asked == 4
    refilling = built("dapo", at, tmp_path, refills=20, **changes)
    full = refilling.rollout()
    assert (full.index % 3 == 0).all()  # every third prompt of the eleven teaches something
    assert full.actions.any(1).all()
    assert full.index[0::2].tolist() == full.index[1::2].tolist()
    assert full.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert refilling.asked > 4
    assert refilling.notes["degenerate"] == dropping.notes["degenerate"]  # of what was drawn first
    assert refilling.state()["asked"] == refilling.asked


def test_overlong_completions_earn_less(at, tmp_path):
    plain = built("grpo", at, tmp_path, reward_normalise=False, missing_end_penalty=0.0)
    paying = built(
        "grpo", at, tmp_path, reward_normalise=False, missing_end_penalty=0.0, overlong=0.5, overlong_penalty=2.0
    )
    before, after = plain.rollout(), paying.rollout()
    lengths = before.actions.sum(1).float()
    expected = before.scores + 2 * ((3 - lengths) / 3).clamp(-1, 0)  # the last three of six tokens
    torch.testing.assert_close(after.scores, expected)
    assert paying.notes["score"] == plain.notes["score"]


def test_several_rewards_are_logged_one_by_one(at, tmp_path):
    (tmp_path / "two.py").write_text(
        "def long(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
        "def some(completions, **columns):\n    return [2.0 if i % 2 else None for i in range(len(completions))]\n"
    )
    both = (f"{tmp_path / 'two.py'}:long", f"{tmp_path / 'two.py'}:some")
    algorithm = built("vpg", at, tmp_path, rewards=both, reward_weights=(1.0, 3.0))
    algorithm.rollout()
    assert algorithm.notes["reward/two.py:some"] == 2.0
    assert algorithm.notes["score"] == pytest.approx(algorithm.notes["reward/two.py:long"] + 3 * 2.0 / 2)


def test_a_rollout_is_given_up_when_the_policy_has_moved_too_far(at, tmp_path):
    steps = {}
    for target in (0.0, 1e-12):
        settings = examples.settings(
            "gspo", at, tmp_path / str(target), target_kl=target, batch_size=2, learning_rate=1e-2
        )
        steps[target] = [line["step"] for line in plaudit.train(settings).metrics() if "score" in line]
    assert steps == {0.0: [1], 1e-12: [1, 3, 5]}


@pytest.mark.parametrize("kind", ["rloo", *FAMILY])
def test_b11_b36_at_the_start_ratios_are_1_and_nothing_is_clipped(kind, at, tmp_path):
    algorithm = built(kind, at, tmp_path, temperature=0.7, kl=0.2)
    batch = next(algorithm.batches())
    algorithm.unmoved = False  # by what the rollout says of them, not because the first step takes them for 1
    _, figures = gradient(algorithm, batch)
    assert figures["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert figures.get("clip_fraction", 0) == 0
    assert figures["approx_kl"] == pytest.approx(0.0, abs=1e-8)
    assert algorithm.notes["sampler_gap"] < 1e-5
    assert abs(algorithm.notes["kl"]) < 1e-5


@pytest.mark.parametrize(("kl", "kl_term", "passes"), [(0.2, "k3", 1), (0.0, "reward", 1), (0.2, "reward", 3)])
def test_a_rollout_of_one_step_is_scored_again_only_where_that_is_needed(kl, kl_term, passes, at, tmp_path):
    settings = {"kl": kl, "kl_term": kl_term, "kl_target": 0.0, "rollout": 8, "batch_size": 8, "group": 4, "reuse": 1}
    algorithm = built("grpo", at, tmp_path, **settings)
    own = algorithm.over
    scored = []

    def counted(batch, function):
        scored.append(function is not algorithm.policy)  # the reference is asked through the policy itself
        return own(batch, function)

    algorithm.over = counted
    batches = algorithm.batches()
    for step in range(3):
        _, figures = gradient(algorithm, next(batches))
        assert figures["ratio"] == pytest.approx(1.0, abs=1e-6)
        assert figures["approx_kl"] == 0.0
        # Sampler and learner are told apart at each step, by one pass or another.
        gap = figures["sampler_gap"] if step and passes == 1 else algorithm.notes["sampler_gap"]
        assert 0 < gap < 1e-5
    assert sum(scored) == passes


def test_later_steps_of_a_rollout_compare_with_the_policy_that_sampled(at, tmp_path):
    settings = {"rollout": 8, "batch_size": 4, "group": 4, "reuse": 1, "kl": 0.0, "kl_target": 0.0}
    algorithm = built("grpo", at, tmp_path, **settings)
    batches = algorithm.batches()
    ratios = []
    for _ in range(2):
        batch = next(batches)
        with torch.no_grad():
            for parameter in algorithm.policy.learning().values():
                parameter.mul_(1.05)
        ratios.append(gradient(algorithm, batch)[1]["ratio"])
    assert ratios[0] == pytest.approx(1.0, abs=1e-6)
    assert ratios[1] != pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("vpg", {"kl_target": 1.0, "kl_budget": 1.0}, r"kl_target holds the divergence, kl_budget only bounds it"),
        ("vpg", {"kl": 0.0, "kl_target": 1.0}, r"kl_target: the weight adapts by factors, so it cannot begin at 0"),
        ("grpo", {"reject_worst": 0.5, "reject_best": 0.5}, r"reject_worst \(0.5\) and reject_best \(0.5\) leave no"),
        ("grpo", {"group": 1}, r"`group` is 1, but must be greater than or equal to 2"),
        ("rloo", {"reward_scale": True}, r"reward_normalise takes the mean off, reward_scale leaves it"),
        ("reinforce_pp", {"group": 1}, r"baseline: a group of one has no others to compare with"),
        ("ppo", {"dual_clip": 0.5}, r"dual_clip is 0.5: give more than 1, or 0"),
        ("vpg", {"kl_term": "k1"}, r"`kl_term` is 'k1', but must be"),
    ],
)
def test_what_does_not_go_together_is_refused(kind, changes, said, at, tmp_path):
    with pytest.raises(PlauditError, match=said):
        plaudit.train(examples.settings(kind, at, tmp_path / "run", **changes))
