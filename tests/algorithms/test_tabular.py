"""Policy gradients on a bandit whose optima are known: the real classes over a table of logits, without a sampler.

What a class expects of an advantage is what it makes of a reward. With the divergence in the loss, beside it, the
policy goes to the optimum not of the rewards but of those: Dr. GRPO, for one, makes (G - 1) / G of each reward, because
a completion is a part of the mean that it is compared with, and so weighs the divergence more than its setting says.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from one_token import OneToken

from plaudit import CISPO, DAPO, GMPO, GRPO, GSPO, LUSPO, PPO, RLOO, SAPO, VESPO, VPG, DrGRPO, LitePPO, ReinforcePP
from plaudit.algorithms.group_relative import (
    DynamicSampling,
    GeometricMean,
    GroupRelativeDoneRight,
    GroupRelativePolicyOptimisation,
    GroupSequencePolicyOptimisation,
    LengthUnbiased,
    LiteClipped,
)
from plaudit.algorithms.policy_gradient import LeaveOneOut, ReinforcePlusPlus, VanillaPolicyGradient
from plaudit.algorithms.ppo import ProximalPolicyOptimisation
from plaudit.algorithms.weighed_ratios import ClippedWeights, SoftAdaptive, VariationalSequence
from plaudit.batch import Batch
from plaudit.world import World

ARMS, GROUP, BETA = 6, 4, 0.5
ROWS, STEPS = 2048, 240
GIVEN = {"model": "m", "data": "d", "rewards": "count:a", "kl": BETA, "tokens_per_pass": 10**9, "max_new_tokens": 1}
KINDS = {
    "vpg": (VanillaPolicyGradient, VPG),
    "rloo": (LeaveOneOut, RLOO),
    "dr_grpo": (GroupRelativeDoneRight, DrGRPO),
    "lite_ppo": (LiteClipped, LitePPO),
    "grpo": (GroupRelativePolicyOptimisation, GRPO),
    "reinforce_pp": (ReinforcePlusPlus, ReinforcePP),
    "ppo": (ProximalPolicyOptimisation, PPO),
}
AS_GRPO = {
    "gspo": (GroupSequencePolicyOptimisation, GSPO),
    "luspo": (LengthUnbiased, LUSPO),
    "gmpo": (GeometricMean, GMPO),
    "cispo": (ClippedWeights, CISPO),
    "sapo": (SoftAdaptive, SAPO),
    "vespo": (VariationalSequence, VESPO),
    "dapo": (DynamicSampling, DAPO),
}
TERMS = ("reward", "k2", "k3", "straight_through")
REFERENCE = np.array([0.2, 0.1, 0.05, 0.06, 0.53, 0.06])
REWARDS = np.array([0.7, 0.2, 1.7, -0.6, 0.5, -0.4])
TWO_VALUED = np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])


class Tabular(OneToken):
    """A policy over answers of one token, by one logit each. `share`: how many times each row counts in gradients."""

    share = None

    def __init__(self):
        super().__init__(torch.tensor(REFERENCE).log())

    def forward(self, batch, values=False, **asked):
        output = super().forward(batch)
        if values and self.value is not None:
            output = output._replace(values=self.value * batch.actions.double())
        if self.share is not None and output.logprobs.requires_grad:
            output.logprobs.register_hook(lambda gradient: gradient * self.share[:, None])
        return output


class Valued(Tabular):
    """With a value of the one state there is; a baseline, so that any number will do."""

    value = 0.3


def built(verb, term, rows, **changes):
    """The algorithm over a fresh table."""
    kind, settings = (KINDS | AS_GRPO)[verb]
    given = settings(**{**GIVEN, "kl_term": term, "rollout": rows, "batch_size": rows, "group": GROUP, **changes})
    world = World(torch.device("cpu"))
    policy = Valued() if verb == "ppo" else Tabular()
    return kind(given, world, policy, None, None, None, [None] * rows, [])


def asked(arms, logprobs, rewards):
    """A rollout in which these arms (N,) were pulled, after a prompt of one token."""
    tokens = torch.stack([torch.zeros_like(arms), arms], 1)
    actions = torch.tensor([[False, True]]).expand(len(arms), 2).clone()
    attention = torch.ones_like(actions)
    found = torch.stack([torch.zeros_like(logprobs), logprobs], 1)
    groups = torch.zeros_like(arms)  # one block, which nothing cuts; whose advantages go together, `group` says
    return Batch(tokens, attention, actions, groups, logprobs=found, scores=torch.tensor(rewards)[arms])


def slope(algorithm, arms, rewards):
    """The gradient of the loss per unit, of one rollout."""
    policy = algorithm.policy
    logprobs = policy.logits.detach().log_softmax(0)
    batch = algorithm.advantages(asked(arms, logprobs[arms], rewards))
    loss, _ = algorithm.loss(batch)
    (found,) = torch.autograd.grad(loss / algorithm.weight(batch), policy.logits)
    algorithm.position += 1
    return found


# ------------------------------------------------------------------------------------------------------------ oracles


def tilted(worth, beta=BETA):
    """ref exp(r / beta) / Z: the optimum under KL(pi || ref)."""
    weighed = REFERENCE * np.exp(worth / beta)
    return weighed / weighed.sum()


def fixed_point_of_k3(worth, beta=BETA):
    """beta ref / (lambda - r), lambda by bisection: the optimum under KL(ref || pi)."""
    low, high = worth.max(), worth.max() + beta
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (beta * REFERENCE / (middle - worth)).sum() > 1 else (low, middle)
    return beta * REFERENCE / (high - worth)


def as_they_are(policy, rewards):
    return rewards


def with_itself_in_the_mean(policy, rewards):
    """A completion is a part of the mean that it is compared with."""
    return rewards * (GROUP - 1) / GROUP


def over_the_spread_of_a_group(policy, rewards):
    """Two rewards, 0 and 1: the expected advantage of either, over how many of the others in the group earn 1."""
    assert set(rewards) == {0.0, 1.0}
    share, others, worth = policy[rewards == 1].sum(), GROUP - 1, np.zeros(2)
    for ones in range(GROUP):
        chance = math.comb(others, ones) * share**ones * (1 - share) ** (others - ones)
        for own in (0, 1):
            group = np.array([own] + [1] * ones + [0] * (others - ones), float)
            spread = group.std(ddof=1)
            worth[own] += chance * ((own - group.mean()) / spread if spread else 0.0)
    return worth[rewards.astype(int)]


def over_the_spread_of_all(policy, rewards):
    mean = policy @ rewards
    return rewards / np.sqrt(policy @ (rewards - mean) ** 2)


def over_the_spread_of_all_and_with_itself(policy, rewards):
    return with_itself_in_the_mean(policy, over_the_spread_of_all(policy, rewards))


MAKES = {
    "vpg": as_they_are,
    "rloo": as_they_are,
    "dr_grpo": with_itself_in_the_mean,
    "lite_ppo": over_the_spread_of_all_and_with_itself,
    "grpo": over_the_spread_of_a_group,
    "reinforce_pp": over_the_spread_of_all,
    "ppo": over_the_spread_of_all,  # whose advantages are whitened, whatever the value head takes off all of them
}


def settled(optimum, makes, rewards, beta):
    """The policy that is the optimum of the rewards as the class makes them where it is: one that stays."""
    policy = REFERENCE
    for _ in range(200):
        policy = 0.8 * policy + 0.2 * optimum(makes(policy, rewards), beta)
    assert np.abs(policy - optimum(makes(policy, rewards), beta)).max() < 1e-9
    return policy


def distance(one, other):
    return float(np.abs(one - other).sum() / 2)


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("term", TERMS)
def test_b1_b3_the_expected_gradient_leads_to_the_optimum_of_its_term(term):
    algorithm = built("vpg", term, ARMS, baseline="none", group=1)
    policy, arms = algorithm.policy, torch.arange(ARMS)
    for _ in range(700 if term == "k3" else 80):
        chances = policy.logits.detach().softmax(0)
        policy.share = ARMS * chances
        policy.logits.data -= 0.8 * slope(algorithm, arms, REWARDS) / chances  # the natural gradient of a table
    found = policy.logits.detach().softmax(0).numpy()
    best, other = tilted(REWARDS), fixed_point_of_k3(REWARDS)
    assert distance(best, other) > 0.1
    assert distance(found, other if term == "k3" else best) < 1e-9
    value = found @ REWARDS - BETA * (found @ np.log(found / REFERENCE))
    most = BETA * math.log(REFERENCE @ np.exp(REWARDS / BETA))
    assert (value == pytest.approx(most, abs=1e-12)) == (term != "k3")
    assert value <= most + 1e-12


@pytest.mark.parametrize("term", TERMS[:3])
@pytest.mark.parametrize("verb", KINDS)
def test_b2_b3_sampled_gradients_lead_to_the_fixed_point_of_class_and_term(verb, term):
    rewards, beta, makes = REWARDS, BETA, MAKES[verb]
    if term == "reward":  # where all earn the same, divergence taken off, no advantage is left, whatever divides it
        makes = as_they_are
    elif verb == "grpo":
        rewards, beta = TWO_VALUED, 1.0
    elif verb in ("reinforce_pp", "ppo", "lite_ppo"):
        beta = 1.35 if verb == "lite_ppo" else 1.8
    algorithm = built(verb, term, ROWS, kl=beta)
    policy, average = algorithm.policy, torch.zeros(ARMS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        chances = policy.logits.detach().softmax(0)
        average += chances * (step >= STEPS // 2) / (STEPS - STEPS // 2)
        arms = torch.multinomial(chances, ROWS, replacement=True, generator=generator)
        rate = 0.5 * (1 - step / STEPS)
        policy.logits.data -= rate * slope(algorithm, arms, rewards) / chances.clamp(min=0.05)
    best, other = settled(tilted, makes, rewards, beta), settled(fixed_point_of_k3, makes, rewards, beta)
    reached, missed = (other, best) if term == "k3" else (best, other)
    assert distance(average.numpy(), reached) < 0.01
    assert distance(average.numpy(), missed) > 0.1


@pytest.mark.parametrize("verb", AS_GRPO)
def test_b1_b3_where_answers_are_one_token_long_the_successors_of_grpo_have_its_gradient(verb):
    """So they have its fixed points, to which B2 leads it. They differ from it in what a ratio other than 1 does, for
    which there is no closed form, and in how tokens of longer answers are weighed, of which a bandit has none.

    DAPO leaves out the groups in which all earned the same, and their divergence with them. Where the divergence is a
    part of the reward, and no two arms are worth the same, nothing is left out that would have taught anything, and
    only the units are fewer. Where it stands in the loss, it is that of the arms in mixed groups alone, which no
    optimum of a divergence from the reference describes.
    """
    generator = torch.Generator().manual_seed(3)
    for term in TERMS if verb != "dapo" else TERMS[:1]:
        ours, theirs = built(verb, term, 64, kl=BETA), built("grpo", term, 64, kl=BETA)
        logits = torch.randn(ARMS, generator=generator, dtype=torch.float64)
        arms = torch.multinomial(logits.softmax(0), 64, replacement=True, generator=generator)
        arms[:GROUP] = 2
        for algorithm in (ours, theirs):
            algorithm.policy.logits.data, algorithm.position = logits.clone(), 1  # no longer the reference
        found, expected = slope(ours, arms, REWARDS), slope(theirs, arms, REWARDS)
        alike = (arms.view(-1, GROUP) == arms.view(-1, GROUP)[:, :1]).all(1).sum().item()
        units = (64 - GROUP * alike) / 64 if verb == "dapo" else 1.0
        assert alike > 0
        torch.testing.assert_close(found * units, expected, rtol=1e-5, atol=1e-7)
