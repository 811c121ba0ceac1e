"""References that follow the policy, what they say beside it, and how far the two are apart."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import examples
import plaudit
import tiny
import watched
from plaudit import PlauditError
from plaudit.advantages import kl_abs, kl_k2, kl_shaped_rewards
from plaudit.algorithms.vocabulary import exact_divergence
from plaudit.batch import collate
from plaudit.hooks import Progressing
from plaudit.loading import load_policy
from plaudit.rewards import Rewards
from plaudit.trainer import Interrupted
from plaudit.world import World

BATCH = collate([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]])


def moved(policy, seed=3):
    """The policy a little elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.learning().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.mark.parametrize("train_layers", [0, 1])
def test_s2_06_the_reference_moves_by_its_share(at, train_layers):
    policy = load_policy(str(at / "model"), train_layers=train_layers)
    policy.keep_reference()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    moved(policy)
    after = {name: p.detach().clone() for name, p in policy.named_parameters()}
    policy.move_reference(0.6)
    expected = load_policy(str(at / "model"), train_layers=train_layers)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(0.4 * before[name] + 0.6 * after[name])
        with policy.as_reference():
            found = policy(BATCH).logprobs
        torch.testing.assert_close(found, expected(BATCH).logprobs, rtol=0, atol=1e-5)
        assert (found - policy(BATCH).logprobs).abs().max() > 1e-2
        policy.move_reference(1.0)
        with policy.as_reference():
            torch.testing.assert_close(policy(BATCH).logprobs, policy(BATCH).logprobs, rtol=0, atol=0)
    assert all(torch.equal(p, after[name]) for name, p in policy.named_parameters())


def test_s2_06_a_reference_that_moves_by_little_moves_under_autocast_too(at, tmp_path):
    changes = {"reference_every": 1, "reference_share": 0.01, "precision": "bfloat16"}
    algorithm = examples.built(examples.settings("dpo", at, tmp_path / "run", **changes))
    parameter = next(p for p in algorithm.policy.reference.parameters() if p.dim() > 1)
    before = parameter.detach().clone()
    moved(algorithm.policy)
    for step in range(1, 101):
        algorithm.after_step(step)
    own = dict(algorithm.policy.named_parameters())
    there = [p for p in own.values() if p.shape == parameter.shape and (p - before).abs().max() > 0]
    assert any(torch.allclose(parameter, torch.lerp(before, p, 1 - 0.99**100), atol=1e-5) for p in there)


@pytest.mark.parametrize("kind", ["grpo", "ppo-top", "online_dpo", "dpo", "kto"])
def test_s2_06_a_reference_that_moved_survives_a_break(kind, at, tmp_path):
    changes = {"reference_every": 2, "reference_share": 0.5}
    whole = watched.train(examples.settings(kind, at, tmp_path / "whole", **changes))
    still = watched.train(examples.settings(kind, at, tmp_path / "still"))
    assert watched.final(tmp_path / "whole") != watched.final(tmp_path / "still")
    assert still.rows[1] == whole.rows[1]
    with pytest.raises(Interrupted):
        watched.train(examples.settings(kind, at, tmp_path / "run", **changes), signal_after=3)
    rest = watched.train(examples.settings(kind, at, tmp_path / "run", **changes))
    assert rest.digests == {step: digest for step, digest in whole.digests.items() if step > 3}
    assert watched.final(tmp_path / "run") == watched.final(tmp_path / "whole")


def test_s2_06_held_out_pairs_are_held_against_the_reference_as_it_is(at, tmp_path):
    changes = {"reference_every": 2, "reference_share": 1.0, "evaluate_every": 1, "learning_rate": 1e-2}
    run = plaudit.train(examples.settings("dpo", at, tmp_path / "run", **changes))
    margins = {line["step"]: line["heldout_margin"] for line in run.metrics()}
    assert [step for step, margin in margins.items() if abs(margin) < 1e-6] == [0, 2, 4]
    assert min(abs(margins[step]) for step in (1, 3, 5)) > 1e-4


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("ppo", {"lora_rank": 2}, "an adapter's reference is the model under it"),
        ("exo", {}, "what was computed before cannot follow: leave precompute_reference out"),
        ("ppo", {"kl": 0.0, "kl_target": 0.0}, "without a KL term there is no reference: raise kl"),
    ],
)
def test_s2_06_a_reference_that_cannot_move_is_refused(kind, changes, sentence, at, tmp_path):
    with pytest.raises(PlauditError, match=f"reference_every: {sentence}"):
        plaudit.train(examples.settings(kind, at, tmp_path / "run", reference_every=1, **changes))


def test_s4_19_target_heads_follow_every_so_many_steps(at, tmp_path):
    algorithm = examples.built(examples.settings("ilql", at, tmp_path / "run", polyak=1.0, target_every=3))
    heads = algorithm.policy.heads
    found = []
    for step in range(1, 7):
        with torch.no_grad():
            heads.q[0].out.bias.fill_(float(step))
        algorithm.after_step(step)
        found.append(float(heads.target[0].out.bias[0]))
    assert found == [0, 0, 3, 3, 3, 6]


def test_s4_17_moments_of_the_first_rollout_stay(at, tmp_path):
    first, second = torch.tensor([1.0, 3.0]), torch.tensor([10.0, 30.0])
    given = {"sources": {}, "scale": True}
    running, fixed = Rewards(**given), Rewards(**given, moments="first")
    for rewards in (running, fixed):
        assert rewards.shaped(first, first).tolist() == [1, 3]  # its standard deviation is 1
    assert fixed.shaped(second, second).tolist() == [10, 30]
    assert running.shaped(second, second).tolist() == pytest.approx((second / math.sqrt(131.5)).tolist())
    centred = Rewards({}, normalise=True, moments="first")
    assert centred.shaped(first, first).tolist() == [-1, 1]
    assert centred.shaped(second, second).tolist() == [8, 28]
    with pytest.raises(PlauditError, match="reward_moments: nothing is divided by them"):
        plaudit.train(examples.settings("ppo", at, tmp_path, reward_moments="first", reward_normalise=False))


# ------------------------------------------------------------------------------------------------------- divergence


def test_s1_15_s4_21_penalties_in_the_reward_by_hand():
    actions = torch.tensor([[False, True, True]])
    own, kept = torch.tensor([[0.0, -1.0, -4.0]]), torch.tensor([[0.0, -3.0, -1.0]])
    scores = torch.tensor([10.0])
    shaped = kl_shaped_rewards(scores, own, kept, actions, 0.5, kl_abs(own, kept))
    assert shaped.tolist() == [[0, -1, 8.5]]  # |2| and |-3|
    shaped = kl_shaped_rewards(scores, own, kept, actions, 0.5, kl_k2(own, kept))
    assert shaped.tolist() == [[0, -1, 7.75]]  # 2 and 4.5


@pytest.mark.parametrize("changes", [{}, {"train_layers": 1}, {"lora_rank": 2}])
def test_s1_15_the_exact_divergence_is_the_sum_over_the_vocabulary(changes, at, monkeypatch):
    monkeypatch.setattr("plaudit.algorithms.vocabulary._ROWS", 2)
    policy, world = load_policy(str(at / "model"), **changes), World.start(device="cpu")
    policy.temperature = 0.7
    policy.keep_reference()

    def states():
        own = policy(BATCH, logprobs=False, origins=True).origins
        with policy.as_reference():
            return own, policy(BATCH, logprobs=False, origins=True).origins

    with torch.no_grad():
        assert exact_divergence(policy, world, *states(), BATCH.actions).abs().max() < 1e-6
        moved(policy)
        found = exact_divergence(policy, world, *states(), BATCH.actions)
        slow = torch.zeros_like(found)
        for row, column in BATCH.actions.nonzero().tolist():
            ids = BATCH.tokens[row : row + 1, :column]
            own = (policy.backbone(ids).logits[0, -1] / 0.7).softmax(0)
            with policy.as_reference():
                kept = (policy.backbone(ids).logits[0, -1] / 0.7).softmax(0)
            slow[row, column] = sum(p * math.log(p / q) for p, q in zip(own.tolist(), kept.tolist(), strict=True))
    torch.testing.assert_close(found, slow, rtol=1e-4, atol=1e-6)
    assert slow[BATCH.actions].min() > 1e-5


@pytest.mark.parametrize("term", ["reward_abs", "reward_mse", "reward_full"])
def test_s1_11_s1_15_each_kind_of_penalty_shapes_a_run(term, at, tmp_path):
    changes = {"steps": 5, "eval_data": None, "evaluate_every": 0, "learning_rate": 1e-2}
    plain = plaudit.train(examples.settings("ppo", at, tmp_path / "plain", **changes))
    run = plaudit.train(examples.settings("ppo", at, tmp_path / "run", kl_term=term, **changes))
    lines = run.metrics()
    assert watched.final(run.folder) != watched.final(plain.folder)
    assert next(line["return"] for line in lines if "return" in line) == pytest.approx(
        plain.metrics()[0]["return"], abs=1e-5
    )
    exact = [line["kl_exact"] for line in lines if "kl_exact" in line]
    assert len(exact) == (2 if term == "reward_full" else 0)
    if exact:
        assert exact[0] == pytest.approx(0, abs=1e-5)
        assert exact[1] > 1e-3


# ----------------------------------------------------------------------------------------------------- what is logged


@pytest.mark.parametrize("changes", [{}, {"train_layers": 1}, {"lora_rank": 2}])
def test_s1_13_samples_stand_beside_what_the_reference_says(changes, at, tmp_path):
    given = {"steps": 5, "eval_data": None, "evaluate_every": 0, "learning_rate": 3e-2, **changes}
    plain = plaudit.train(examples.settings("ppo", at, tmp_path / "plain", **given))
    run = plaudit.train(examples.settings("ppo", at, tmp_path / "run", compare_samples=True, **given))
    assert watched.final(run.folder) == watched.final(plain.folder)
    assert watched.logged(run.folder)[0] == watched.logged(plain.folder)[0]
    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1] * 4 + [5] * 4
    for row, without in zip(rows, watched.logged(plain.folder)[1], strict=True):
        assert {name: row[name] for name in without} == without
        earned = len(set(row["reference"])) / 4 - 0.1 * len(row["prompt"])
        assert row["reference_score"] == pytest.approx(earned, abs=1e-4)
    # An untrained model in the place of the one that learned says the same: the reference is what it began as.
    algorithm = examples.built(examples.settings("ppo", at, tmp_path / "again", compare_samples=True, **given))
    algorithm.position = 4
    places = {prompt.record.prompt: prompt for prompt in algorithm.data}
    asked = [places[row["prompt"]] for row in rows[4:]]
    assert [said["reference"] for said in algorithm.of_reference(asked)] == [row["reference"] for row in rows[4:]]


def test_s1_18_the_entropy_is_logged_without_a_bonus(tmp_path):
    model = tiny.model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "flat")
    tiny.tokenizer().save_pretrained(tmp_path / "flat")
    data = tiny.lines(tmp_path / "prompts.jsonl", examples.openings(8))
    given = {
        "model": str(tmp_path / "flat"),
        "data": data,
        "rewards": "count:a",
        "precision": "float32",
        "holdout": 0.0,
    }
    given |= {"steps": 1, "rollout": 8, "batch_size": 8, "max_new_tokens": 4, "output": str(tmp_path / "run")}
    assert plaudit.train(plaudit.VPG(**given)).metrics()[-1]["entropy"] == pytest.approx(math.log(257), rel=1e-5)


def test_s1_18_a_divergence_far_below_zero_is_told_of(capsys):
    def told(kl):
        world = SimpleNamespace(is_main=True)
        trainer = SimpleNamespace(world=world, figures={"kl": kl}, messages=[], steps=9, step=3, tokens=1, seconds=1.0)
        hook = Progressing("ppo")
        hook.begin(trainer)
        hook.after_step(trainer)
        hook.end(trainer)
        return capsys.readouterr().err

    assert "step 3: kl is estimated at -1.5, and no divergence is negative" in told(-1.5)
    assert "negative" not in told(-0.5)
