"""Proximal policy optimisation: it reaches known optima, and what it learns from is what the papers say."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import examples
import plaudit
import tiny
from plaudit import PPO, PlauditError
from plaudit.algorithms import base
from plaudit.algorithms.ppo import ProximalPolicyOptimisation
from plaudit.sampler import LocalSampler
from plaudit.trainer import Trainer

LETTERS = {letter: tiny.tokenizer()(letter).input_ids[0] for letter in examples.LETTERS}


def learning(talker, tmp_path, **changes):
    """Settings of a run that starts from the talker."""
    given = {
        "model": str(talker),
        "data": tiny.lines(tmp_path / "prompts.jsonl", [{"prompt": f"{i} "} for i in range(100)]),
        "output": str(tmp_path / "run"),
        "rewards": "count:a",
        "holdout": 0.0,
        "max_new_tokens": 8,
        "rollout": 64,
        "batch_size": 32,
        "learning_rate": 5e-3,
        "steps": 48,
        "precision": "float32",
        "save_every": 0,
    }
    return PPO(**{**given, **changes})


# ------------------------------------------------------------------------------------------------------- learning


def test_it_learns_to_please_a_count_and_kl_holds_it_back(talker, tmp_path):
    free = plaudit.train(learning(talker, tmp_path, kl=0.0))
    held = plaudit.train(learning(talker, tmp_path, kl=2.0, output=str(tmp_path / "held")))
    assert free.metrics()[0]["score"] < 1
    assert free.summary["score"] > 5  # of 8
    assert held.metrics()[0]["score"] < 1
    assert held.summary["score"] < 2
    assert 0 < held.summary["kl"] < 2


def test_b1_b2_it_reaches_the_optimum_under_a_kl_penalty(talker, tmp_path):
    worth = {"a": 1.5, "b": 0.75, "c": -0.75}
    (tmp_path / "rewards.py").write_text(
        f"def worth(prompts, completions, **columns):\n    return [{worth}.get(text, 0.0) for text in completions]\n"
    )
    beta = 0.5
    changes = {"rewards": f"{tmp_path / 'rewards.py'}:worth", "kl": beta, "max_new_tokens": 1, "steps": 60}
    changes |= {"rollout": 128, "batch_size": 128, "reuse": 1, "whiten_advantages": False, "schedule": "linear"}
    changes |= {"learning_rate": 1e-2, "value_learning_rate": 5e-2, "max_grad_norm": 0.0, "value_clip": 100.0}
    run = plaudit.train(learning(talker, tmp_path, **changes))
    tokenizer = tiny.tokenizer()
    ids = [tokenizer(f"{i} ", return_tensors="pt").input_ids for i in range(10, 30)]
    with torch.no_grad():
        reference, policy = (
            torch.cat([AutoModelForCausalLM.from_pretrained(folder)(i).logits[:, -1] for i in ids]).double().softmax(1)
            for folder in (talker, run.final)
        )
    reward = torch.zeros(257, dtype=torch.float64)
    for letter, value in worth.items():
        reward[LETTERS[letter]] = value

    def optimum(scale):
        tilted = reference * (reward / scale).exp()
        return tilted / tilted.sum(1, keepdim=True)

    def distance(other):
        return float((policy - other).abs().sum(1).mean() / 2)

    assert distance(optimum(beta)) < 0.03
    assert distance(optimum(2 * beta)) > 0.2
    assert distance(optimum(beta / 2)) > 0.2
    assert distance(reference) > 0.4
    # What an optimal policy earns, divergence taken off, is beta log Z.
    partition = float((beta * (reference * (reward / beta).exp()).sum(1).log()).mean())
    last = np.mean([line["return"] for line in run.metrics()[-10:]])
    assert last == pytest.approx(partition, abs=0.04)


def test_an_adaptive_weight_holds_the_divergence(talker, tmp_path):
    run = plaudit.train(learning(talker, tmp_path, kl=0.2, kl_target=2.0, kl_horizon=64, steps=100))
    lines = [line for line in run.metrics() if "kl" in line]
    divergences = [line["kl"] for line in lines]
    assert max(divergences) > 4  # where the first weight would have led
    assert np.mean(divergences[-8:]) == pytest.approx(2.0, abs=0.8)
    assert lines[0]["kl_coefficient"] == 0.2
    # No divergence yet is as far from the target as can be, which counts as a fifth.
    assert lines[1]["kl_coefficient"] == pytest.approx(0.2 * 0.8)
    assert lines[-1]["kl_coefficient"] > 0.3


# ----------------------------------------------------------------------------------------------- the first update


@pytest.fixture
def algorithm(at, tmp_path):
    return examples.built(examples.settings("ppo", at, tmp_path / "run"))


def moved(algorithm, scale=0.05):
    """The policy some updates later: every weight another, the value head too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in algorithm.policy.learning().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    algorithm.position = 4


def gradient(algorithm, batch):
    trainer = Trainer(None, algorithm.world, algorithm.settings)
    algorithm.policy.zero_grad()
    trainer._gradients(algorithm, batch)
    grads = {name: p.grad for name, p in algorithm.policy.learning().items() if p.grad is not None}
    return grads, trainer.figures


@pytest.mark.parametrize("kind", ["ppo", "ppo-top", "ppo-adapter"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_b11_the_first_update_is_plain_policy_gradient(kind, at, tmp_path):
    algorithm = examples.built(examples.settings(kind, at, tmp_path / "run", value_weight=0.0))
    batch = next(algorithm.batches())
    grads, figures = gradient(algorithm, batch)
    assert figures["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert figures["clip_fraction"] == figures["value_clip_fraction"] == 0.0
    assert figures["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    algorithm.policy.zero_grad()
    logprobs = algorithm.policy(batch).logprobs
    (-(logprobs * batch.advantages * batch.actions).sum() / batch.actions.sum()).backward()
    plain = {name: p.grad for name, p in algorithm.policy.learning().items() if p.grad is not None}
    assert max(float(grad.abs().max()) for grad in plain.values()) > 1e-3
    for name, grad in plain.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["ppo", "ppo-top", "ppo-adapter"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_b36_at_the_start_sampler_policy_and_reference_are_one(kind, at, tmp_path):
    algorithm = examples.built(examples.settings(kind, at, tmp_path / "run", temperature=0.7))
    algorithm.rollout()
    assert algorithm.notes["sampler_gap"] < 1e-5
    assert abs(algorithm.notes["kl"]) < 1e-5
    assert algorithm.notes["value"] == 0.0


def test_what_frozen_layers_make_of_a_rollout_is_kept_where_there_is_room(at, tmp_path, monkeypatch):
    found = {}
    for name, kept in {"kept": base.KEPT, "dropped": 0}.items():
        monkeypatch.setattr(base, "KEPT", kept)
        algorithm = examples.built(examples.settings("ppo", at, tmp_path, train_layers=1))
        batch = next(algorithm.batches())
        assert (batch.trunk is not None) == (name == "kept")
        found[name] = [batch.advantages, algorithm.loss(batch)[0].detach()]
    torch.testing.assert_close(found["kept"], found["dropped"], rtol=1e-4, atol=1e-5)


def test_a_sampler_that_disagrees_stops_the_run(at, tmp_path, monkeypatch):
    sample = LocalSampler.sample

    def biased(sampler, *args):
        drawn = sample(sampler, *args)
        return dataclasses.replace(drawn, logprobs=[[value - 0.01 for value in row] for row in drawn.logprobs])

    monkeypatch.setattr(LocalSampler, "sample", biased)
    with pytest.raises(PlauditError, match=r"the sampler and the learner disagree by 0.01 nats a token"):
        plaudit.train(examples.settings("ppo", at, tmp_path / "run", eval_data=None))


def test_b11_ratios_start_at_1_even_where_the_sampler_rounds_otherwise(algorithm, monkeypatch):
    sample = algorithm.sampler.sample

    def rounded(*args):
        drawn = sample(*args)
        return dataclasses.replace(drawn, logprobs=[[value - 5e-4 for value in row] for row in drawn.logprobs])

    monkeypatch.setattr(algorithm.sampler, "sample", rounded)
    batch = next(algorithm.batches())
    algorithm.unmoved = False  # by what the rollout says of them, not because the first step takes them for 1
    _, figures = gradient(algorithm, batch)
    assert figures["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert algorithm.notes["sampler_gap"] == pytest.approx(5e-4, rel=0.05)


def test_a_reference_that_disagrees_stops_the_run(algorithm):
    with torch.no_grad():
        next(algorithm.policy._reference[0].parameters()).mul_(1.1)
    with pytest.raises(PlauditError, match=r"the policy and its reference disagree by \S+ nats before"):
        algorithm.rollout()


def test_later_the_policy_may_leave_its_reference(algorithm):
    moved(algorithm)
    algorithm.rollout()
    assert abs(algorithm.notes["kl"]) > 0.01


# ------------------------------------------------------------------------------------------------------ a rollout


def test_rewards_values_and_advantages_against_transformers_and_loops(at, tmp_path):
    changes = {"gamma": 0.9, "lam": 0.8, "whiten_advantages": False, "reward_normalise": False, "kl_target": 0.0}
    algorithm = examples.built(examples.settings("ppo", at, tmp_path / "run", **changes))
    reference = copy.deepcopy(algorithm.policy.backbone)
    moved(algorithm, 0.02)
    batch = algorithm.rollout()
    values, returns, divergences = [], [], []
    for row in range(len(batch)):
        ids = batch.tokens[row, : batch.lengths[row]]
        places = batch.actions[row].nonzero()[:, 0].tolist()
        assert places == list(range(places[0], len(ids)))  # all that follows the prompt, and nothing else
        with torch.no_grad():
            output = algorithm.policy.backbone(ids[None], output_hidden_states=True)
            own, kept = output.logits[0].log_softmax(1), reference(ids[None]).logits[0].log_softmax(1)
            value = algorithm.policy.value(output.hidden_states[-1][0])[:, 0]
        text = algorithm.template.decode(ids[places[0] :].tolist())
        score = len(set(text)) / 4 - 0.1 * (len(ids) - len(places)) - 0.3 * batch.truncated[row].item()
        assert batch.scores[row].item() == pytest.approx(score, abs=1e-6)
        apart = [float(own[t - 1, ids[t]] - kept[t - 1, ids[t]]) for t in places]
        divergences.append(sum(apart))
        earned = [-0.2 * d for d in apart]
        earned[-1] += score
        expected = [float(value[t - 1]) for t in places]
        deltas = [r + 0.9 * after - now for r, now, after in zip(earned, expected, [*expected[1:], 0.0], strict=True)]
        for k, t in enumerate(places):
            advantage = sum((0.9 * 0.8) ** n * delta for n, delta in enumerate(deltas[k:]))
            assert batch.logprobs[row, t].item() == pytest.approx(float(own[t - 1, ids[t]]), abs=1e-4)
            assert batch.values[row, t].item() == pytest.approx(expected[k], abs=1e-4)
            assert batch.advantages[row, t].item() == pytest.approx(advantage, abs=1e-3)
            assert batch.returns[row, t].item() == pytest.approx(advantage + expected[k], abs=1e-3)
            values.append(expected[k])
            returns.append(advantage + expected[k])
    assert len({*batch.truncated.tolist()}) == 2  # both kinds were seen
    assert algorithm.notes["kl"] == pytest.approx(np.mean(divergences), abs=1e-4)
    assert algorithm.notes["value"] == pytest.approx(np.mean(values), abs=1e-4)
    assert algorithm.notes["return"] == pytest.approx(np.mean(returns), abs=1e-3)
    assert algorithm.notes["truncated"] == batch.truncated.float().mean().item()
    assert algorithm.notes["completion_tokens"] == len(values) / 8


def test_whitened_advantages_have_mean_0_and_variance_1(algorithm):
    batch = algorithm.rollout()
    chosen = batch.advantages[batch.actions].double()
    assert abs(float(chosen.mean())) < 1e-5
    assert float(chosen.var(correction=0)) == pytest.approx(1, abs=1e-4)
    assert not batch.advantages[~batch.actions].any()


def test_scores_are_normalised_for_learning_and_shown_as_they_are(at, tmp_path):
    raw = examples.built(examples.settings("ppo", at, tmp_path / "a", reward_normalise=False, missing_end_penalty=0.0))
    shaped = examples.built(examples.settings("ppo", at, tmp_path / "b", missing_end_penalty=0.0, reward_clip=1.0))
    plain, standard = raw.rollout().scores, shaped.rollout().scores
    expected = ((plain - plain.mean()) / plain.std(correction=0)).clamp(-1, 1)
    torch.testing.assert_close(standard, expected, rtol=1e-5, atol=1e-5)
    assert raw.notes["score"] == shaped.notes["score"] == pytest.approx(plain.mean().item())


def test_every_epoch_over_a_rollout_uses_each_completion_once(algorithm):
    batches = algorithm.batches()
    for rollout in range(2):
        minibatches = [next(batches) for _ in range(4)]
        whole = algorithm.current

        def names(batch):
            return [
                (i, tuple(row[a].tolist()))
                for i, row, a in zip(batch.index.tolist(), batch.tokens, batch.actions, strict=True)
            ]

        first, second = (names(a) + names(b) for a, b in (minibatches[:2], minibatches[2:]))
        assert sorted(first) == sorted(second) == sorted(names(whole))
        assert first != second  # in another order
        assert [len(batch) for batch in minibatches] == [4, 4, 4, 4]
        assert algorithm.position == 4 * (rollout + 1)
        for batch in minibatches:  # the completions of a prompt stand side by side
            assert batch.index[0::2].tolist() == batch.index[1::2].tolist()
            assert batch.groups[0::2].tolist() == batch.groups[1::2].tolist()


def test_a_rollout_is_given_up_when_the_policy_has_moved_too_far(at, tmp_path):
    def rollouts(name, target):
        changes = {"target_kl": target, "steps": 9, "learning_rate": 1e-2, "batch_size": 2}
        settings = examples.settings("ppo", at, tmp_path / name, **changes)
        return [line["step"] for line in plaudit.train(settings).metrics() if "score" in line]

    assert rollouts("never", 0.0) == rollouts("far", 100.0) == [1, 9]
    # After the first update the ratio is no longer 1, so the second step sees that, and is the last of its rollout.
    assert rollouts("at once", 1e-12) == [1, 3, 5, 7, 9]


def test_rewards_see_the_columns_of_their_prompt(at, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def right(prompts, completions, answer, **columns):\n"
        "    assert all(p == 'say ' + a for p, a in zip(prompts, answer, strict=True))\n"
        "    return [float(len(a)) for a in answer]\n"
    )
    data = tiny.lines(tmp_path / "data.jsonl", [{"prompt": "say " + "x" * n, "answer": "x" * n} for n in range(1, 9)])
    rewards = {"rewards": f"{tmp_path / 'rewards.py'}:right", "data": data, "reward_normalise": False}
    algorithm = examples.built(examples.settings("ppo", at, tmp_path / "run", missing_end_penalty=0.0, **rewards))
    batch = algorithm.rollout()
    assert batch.scores.tolist() == [i + 1.0 for i in batch.index.tolist()]


def test_conversations_are_asked_and_answered_as_such(at, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "def polite(prompts, completions, **columns):\n"
        "    assert all(p[-1]['role'] == 'user' for p in prompts)\n"
        "    assert all(c[0]['role'] == 'assistant' for c in completions)\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    data = tiny.lines(tmp_path / "data.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}] * 4)
    rewards = {"rewards": f"{tmp_path / 'rewards.py'}:polite", "data": data, "eval_data": None}
    algorithm = examples.built(examples.settings("ppo", at, tmp_path / "run", **rewards))
    batch = algorithm.rollout()
    start = tiny.tokenizer().decode(batch.tokens[0][: int(batch.actions[0].int().argmax())])
    assert start == f"<user>hi{tiny.END}\n<assistant>"


# ------------------------------------------------------------------------------------------------- state and bounds


def test_the_state_carries_a_rollout_in_use_and_all_that_runs_on(algorithm, at, tmp_path):
    batches = algorithm.batches()
    next(batches)
    state = algorithm.state()
    assert state["position"] == 1
    assert state["rollout"].keys() == algorithm.current.tensors().keys() >= {"tokens", "logprobs", "values", "returns"}
    assert state["moments"][0] == 8
    assert state["coefficient"] == pytest.approx(0.2 * (1 - 0.2 * 8 / 50))
    other = examples.built(examples.settings("ppo", at, tmp_path / "other"))
    other.restore(state)
    again = other.batches()
    for _ in range(3):
        expected, found = next(batches).tensors(), next(again).tensors()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert algorithm.state()["rollout"] == {}  # used up
    assert torch.equal(next(batches).tokens, next(again).tokens)  # and the generator went along
    other.world = dataclasses.replace(other.world, size=2)
    with pytest.raises(PlauditError, match=r"saved by 1 processes, .* go on with as many, not 2"):
        other.restore(state)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout": 10}, r"batch_size \(4\) must divide rollout \(10\)"),
        ({"group": 3, "rollout": 12}, r"group \(3\) must divide batch_size \(4\)"),
    ],
)
def test_rollouts_are_whole_batches_of_whole_groups(changes, said, at, tmp_path):
    with pytest.raises(PlauditError, match=said):
        plaudit.train(examples.settings("ppo", at, tmp_path / "run", **changes))


def test_several_processes_share_whole_groups(at, tmp_path):
    algorithm = examples.built(examples.settings("ppo", at, tmp_path / "run"))
    parts = (algorithm.policy, algorithm.template, algorithm.sampler, algorithm.rewards, algorithm.data, [])
    world = dataclasses.replace(algorithm.world, size=3)
    with pytest.raises(PlauditError, match=r"must be multiples of group x processes \(2 x 3\)"):
        ProximalPolicyOptimisation(algorithm.settings, world, *parts)


def test_b25_nothing_flows_to_the_reference_or_to_what_was_sampled(algorithm):
    batch = next(algorithm.batches())
    gradient(algorithm, batch)
    assert not any(tensor.requires_grad for tensor in batch.tensors().values())
    kept = algorithm.policy._reference[0]
    assert all(p.grad is None and not p.requires_grad for p in kept.parameters())
    assert not {id(p) for p in kept.parameters()} & {id(p) for p in algorithm.policy.parameters()}
    assert all(p.grad is not None for p in algorithm.policy.learning().values())
    before = [p.clone() for p in kept.parameters()]
    moved(algorithm)
    assert all(torch.equal(p, q) for p, q in zip(before, kept.parameters(), strict=True))


def test_without_a_kl_term_no_reference_is_kept(at, tmp_path):
    algorithm = examples.built(examples.settings("ppo", at, tmp_path / "run", kl=0.0, kl_target=0.0))
    assert algorithm.policy._reference == []
    algorithm.rollout()
    assert "kl" not in algorithm.notes  # which nobody has measured
