"""ILQL: the tabular optimum, what its data become, and that it learns."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

import examples
import plaudit
import tiny
from plaudit import ILQL, SFT, PlauditError, Sample
from plaudit.algorithms.ilql import ImplicitLanguageQLearning, Logged, normalised
from plaudit.families import family_of
from plaudit.heads import ActionHeads
from plaudit.loading import load_tokenizer
from plaudit.numerics import before_actions
from plaudit.policy import Output, _spread
from plaudit.records import Rating
from plaudit.templates import Template
from plaudit.world import World

# ------------------------------------------------------------------------------------------------- tabular optimum

LENGTH, VOCABULARY = 3, 3
GAMMA, TAU = 0.9, 0.8
PREFIXES = [prefix for k in range(LENGTH) for prefix in product(range(VOCABULARY), repeat=k)]
"""The states of the chain: what was written so far."""


class Table(nn.Module):
    """A policy with one row of numbers for each prefix: the heads themselves, over states that are one-hot."""

    frozen = 0

    def __init__(self) -> None:
        super().__init__()
        width = len(PREFIXES)
        self.logits = nn.Parameter(torch.zeros(width, VOCABULARY))
        self.heads = ActionHeads(width, VOCABULARY)
        for head in (*self.heads.q, *self.heads.target, self.heads.v):
            head.into.requires_grad_(False).bias.zero_()
            head.into.weight.zero_()[:width].fill_diagonal_(1)
            head.out.bias.requires_grad_(False)

    def states(self, batch):
        """(N, S) one-hot: the prefix before each action; column 0 is the prompt."""
        number = {prefix: i for i, prefix in enumerate(PREFIXES)}
        places = [
            [number[tuple(row[1 : t + 1])] if t < LENGTH else 0 for t in range(LENGTH + 1)]
            for row in batch.tokens.tolist()
        ]
        return torch.eye(len(PREFIXES)).double()[before_actions(torch.tensor(places), batch.actions)]

    def forward(self, batch, worth=False):
        states, tokens = self.states(batch), batch.tokens[batch.actions]
        chosen = (states @ self.logits).log_softmax(1).gather(1, tokens[:, None])[:, 0]
        found = {"logprobs": chosen, **self.heads(states, tokens)._asdict()}
        return Output(**{name: _spread(each, batch.actions) for name, each in found.items()})


def texts():
    """Logged texts that are not all alike often, and what each of their tokens earned."""
    draw = torch.Generator().manual_seed(3)
    worth = torch.randn(len(PREFIXES), VOCABULARY, generator=draw, dtype=torch.float64)
    number = {prefix: i for i, prefix in enumerate(PREFIXES)}
    items = []
    for i, text in enumerate(product(range(VOCABULARY), repeat=LENGTH)):
        earned = [float(worth[number[text[:t]], text[t]]) for t in range(LENGTH)]
        items += [Logged([7], list(text), [True] * LENGTH, rewards=earned)] * (1 + i * i % 4)
    return items, worth


def iterated(items, worth):
    """Expectile value iteration from the end of the texts: (Q, V, pi_b) by prefix, in plain Python."""
    q, v, behaviour = {}, {}, {}
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        k, i = len(prefix), PREFIXES.index(prefix)
        counts = [sum(tuple(item.completion[: k + 1]) == (*prefix, a) for item in items) for a in range(VOCABULARY)]
        q[prefix] = [float(worth[i, a]) + GAMMA * v.get((*prefix, a), 0.0) for a in range(VOCABULARY)]
        behaviour[prefix] = [count / sum(counts) for count in counts]
        low, high = min(q[prefix]), max(q[prefix])
        for _ in range(80):
            level = (low + high) / 2
            pull = sum(
                p * (TAU if x > level else 1 - TAU) * (x - level)
                for p, x in zip(behaviour[prefix], q[prefix], strict=True)
            )
            low, high = (level, high) if pull > 0 else (low, level)
        v[prefix] = low
    return q, v, behaviour


def test_b20_the_tabular_optimum_is_expectile_value_iteration_and_the_tilted_policy():
    items, worth = texts()
    settings = ILQL(model="", data="", gamma=GAMMA, expectile=TAU, polyak=1.0, cql=0.0, batch_size=len(items))
    policy = Table().double()
    algorithm = ImplicitLanguageQLearning(settings, World(torch.device("cpu")), policy, items, [])
    batch = next(algorithm.batches())
    batch = replace(batch, rewards=torch.zeros(batch.tokens.shape, dtype=torch.float64))
    for row, item in enumerate(items[i] for i in batch.index.tolist()):
        batch.rewards[row, 1:] = torch.tensor(item.rewards, dtype=torch.float64)
    learning = [policy.logits, policy.heads.v.out.weight, *(head.out.weight for head in policy.heads.q)]
    # How often each number is pulled at: dividing by it makes plain gradient descent quick.
    states = policy.states(batch)
    pairs = torch.zeros(len(PREFIXES), VOCABULARY).double()
    pairs.index_put_((states.argmax(1), batch.tokens[batch.actions]), torch.ones(len(states)).double(), accumulate=True)
    often = {1: pairs.sum(1), VOCABULARY: pairs.t()}
    for step in range(250):
        loss, _ = algorithm.loss(batch)
        loss.backward()
        with torch.no_grad():
            policy.logits -= policy.logits.grad / pairs.sum(1)[:, None]
            for weight in learning[1:]:
                rate = often[weight.shape[0]].clamp(min=1)
                weight[:, : len(PREFIXES)] -= 0.5 * weight.grad[:, : len(PREFIXES)] / rate
        policy.zero_grad()
        algorithm.after_step(step)
    q, v, behaviour = iterated(items, worth)
    with torch.no_grad():
        everywhere = torch.eye(len(PREFIXES)).double()
        for head in (*policy.heads.q, *policy.heads.target):
            assert head(everywhere).tolist() == [pytest.approx(q[prefix], abs=1e-5) for prefix in PREFIXES]
        assert policy.heads.v(everywhere)[:, 0].tolist() == pytest.approx([v[prefix] for prefix in PREFIXES], abs=1e-5)
        guided = (policy.logits + 2.0 * policy.heads.advantages(everywhere)).softmax(1)
    for prefix, found in zip(PREFIXES, guided.tolist(), strict=True):
        tilted = [p * math.exp(2.0 * (x - v[prefix])) for p, x in zip(behaviour[prefix], q[prefix], strict=True)]
        assert found == pytest.approx([t / sum(tilted) for t in tilted], abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ data


def test_rewards_stand_where_they_were_earned(tmp_path):
    template = Template(load_tokenizer(tiny.folder(tmp_path)))
    settings = ILQL(model="", data="")

    def encoded(**columns):
        return family_of(settings).encode([Rating("ab", "cde", (2.0, 5.0), columns)], template)[0]

    assert encoded().rewards == [0, 0, 0, 3.5]  # at the end token, the mean
    assert encoded(token_rewards=[1, 0, -2]).rewards == [1, 0, -2, 0]
    assert encoded(token_rewards=[1, 0, -2, 4]).rewards == [1, 0, -2, 4]
    for wrong in ([1, 2], [1, 2, 3, 4, 5]):
        with pytest.raises(
            PlauditError, match=r"`token_rewards` holds \d numbers for 'cde', which .* 3 tokens and its"
        ):
            encoded(token_rewards=wrong)
    turns = [{"role": "user", "content": "a"}]
    talk = [Rating(turns, [{"role": "assistant", "content": "bc"}], (1.0,), {"token_rewards": [5, 6]})]
    item = family_of(settings).encode(talk, template)[0]
    assert [r for r, acting in zip(item.rewards, item.actions, strict=True) if acting] == [5, 6, 0]


def test_returns_get_mean_0_and_spread_1_whichever_tokens_earned_them():
    items = [
        Logged([1], [2, 3], [True, True], rewards=[1.0, 4.0]),
        Logged([1], [2, 3, 4], [True, True, False], rewards=[0.0, 1.0, 0.0]),
    ]
    held = [Logged([1], [2], [True], rewards=[3.0])]
    training, others = normalised(items, held)
    assert [item.rewards for item in training] == [[0.5, 2.0 - 1.5], [0.0, 0.5 - 1.5, 0.0]]  # mean 3, spread 2
    assert others[0].rewards == [0.0]
    with pytest.raises(PlauditError, match=r"data: every text earned 1, so none is better than another"):
        normalised(items[1:], [])


def test_the_loss_begins_where_zero_heads_put_it(at, tmp_path):
    settings = examples.settings("ilql", at, tmp_path / "run", cql=0.3, awac=2.0, gamma=0.9)
    algorithm = examples.built(settings)
    batch = next(algorithm.batches())
    loss, stats = algorithm.loss(batch)
    count, earned = batch.actions.sum().item(), batch.rewards[batch.actions]
    nll = -algorithm.policy(batch).logprobs.sum().item()
    assert stats["td_loss"].item() == pytest.approx(2 * earned.square().sum().item(), rel=1e-5)
    assert stats["value_loss"].item() == 0
    assert stats["cql_loss"].item() == pytest.approx(2 * count * math.log(257), rel=1e-5)
    assert stats["nll"].item() == pytest.approx(nll, rel=1e-5)
    expected = stats["td_loss"].item() + 0.3 * stats["cql_loss"].item() + 2.0 * nll
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    # Every text's last action, its end token, is the one that earned something.
    assert ((batch.rewards != 0).sum(1) <= 1).all()
    last = (batch.actions * torch.arange(batch.actions.shape[1])).amax(1)
    assert torch.equal(batch.rewards.gather(1, last[:, None])[:, 0], batch.rewards.sum(1))


def test_target_heads_move_by_polyaks_share_and_are_in_the_state(at, tmp_path):
    algorithm = examples.built(examples.settings("ilql", at, tmp_path / "run", polyak=0.25))
    heads = algorithm.policy.heads
    with torch.no_grad():
        heads.q[1].out.bias.fill_(4.0)
    algorithm.after_step(1)
    assert heads.target[1].out.bias.tolist() == [1.0] * 257
    kept = {name: tensor.clone() for name, tensor in algorithm.state()["target"].items()}
    algorithm.after_step(2)
    assert heads.target[1].out.bias.tolist() == [1.75] * 257
    algorithm.restore({"position": 3, "target": kept})
    assert heads.target[1].out.bias.tolist() == [1.0] * 257
    assert not any(name.startswith("heads.target") for name in algorithm.policy.learning())


# -------------------------------------------------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """Random words, which somebody who likes the letter a has rated, and a model that has learned to write such."""
    folder = tmp_path_factory.mktemp("rated")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcde", k=draw.randint(2, 4))) for _ in range(320)]
    texts = [{"prompt": f"{i % 7} ", "completion": word} for i, word in enumerate(words)]
    tiny.lines(folder / "ratings.jsonl", [{**row, "rating": row["completion"].count("a")} for row in texts])
    each = [[float(letter == "a") for letter in row["completion"]] for row in texts]
    tiny.lines(folder / "tokens.jsonl", [{**row, "token_rewards": r} for row, r in zip(texts, each, strict=True)])
    tiny.lines(folder / "prompts.jsonl", [{"prompt": f"{i % 7} "} for i in range(96)])
    return folder


COMMON = {"precision": "float32", "save_every": 0, "holdout": 0.0, "learning_rate": 5e-3, "warmup": 0.0}


def liked(folder, model, name, beta):
    """The mean number of letters a in sampled words."""
    output = folder / f"{name}.jsonl"
    where = {"data": str(folder / "prompts.jsonl"), "output": str(output), "precision": "float32"}
    plaudit.sample(Sample(model=model, max_new_tokens=6, ilql_beta=beta, rows=96, **where))
    words = [json.loads(line)["completion"] for line in output.read_text().splitlines()]
    return sum(word.count("a") for word in words) / len(words)


@pytest.mark.parametrize("data", ["ratings", "tokens"])
def test_guided_samples_earn_more_than_those_of_imitation(data, rated):
    folder = rated / data
    settings = {"data": str(rated / f"{data}.jsonl"), "batch_size": 32, "steps": 70, **COMMON}
    model = tiny.folder(folder / "model")
    (folder / "prompts.jsonl").write_text((rated / "prompts.jsonl").read_text())
    tuned = {"value_learning_rate": 1e-2, "polyak": 0.3, "cql": 0.01, "gamma": 0.99}
    run = plaudit.train(ILQL(model=model, output=str(folder / "ilql"), **settings, **tuned))
    rows = run.metrics()
    assert rows[-1]["td_loss"] < 0.6 * rows[0]["td_loss"]
    plain = liked(folder, str(run.final), "plain", 0.0)
    guided = liked(folder, str(run.final), "guided", 4.0)
    if data == "ratings":
        imitating = plaudit.train(SFT(model=model, output=str(folder / "sft"), **settings))
        assert liked(folder, str(imitating.final), "sft", 0.0) == pytest.approx(plain, abs=0.4)
    assert guided > 2 * plain
