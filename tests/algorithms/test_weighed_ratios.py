"""LUSPO, SAPO, VESPO and the second bound of GRPO: what each class makes of its settings, by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from plaudit import settings as verbs
from plaudit.algorithms import group_relative, policy_gradient, weighed_ratios
from plaudit.batch import collate
from plaudit.policy import Output

COMMON = {"model": "", "data": "", "rewards": ""}


def told(cls, settings):
    """The loss, in all, of a good completion of ratios 2 and 1 and a bad one of ratio 2, of advantages 3 and -1."""
    batch = collate([[5], [5]], [[6, 6], [6]], [0, 1])
    ratios = torch.tensor([[9, 2.0, 1.0], [9, 2.0, 9]], dtype=torch.float64)
    gains = torch.tensor([[3.0] * 3, [-1.0] * 3], dtype=torch.float64)
    batch = dataclasses.replace(batch, logprobs=torch.full_like(ratios, -1.0), advantages=gains)
    own = cls.__new__(cls)
    own.settings = settings
    loss, _ = own.objective(Output(logprobs=ratios.log() - 1), batch)
    return loss.item()


def gate(ratio, temperature):
    return 4 / temperature / (1 + math.exp(-temperature * (ratio - 1)))


def test_s2_06_luspo_counts_a_completion_as_it_is_long():
    wide = {"clip_low": 0.9, "clip_high": 9.0}
    ratio = math.sqrt(2)
    assert told(group_relative.GroupSequencePolicyOptimisation, verbs.GSPO(**COMMON, **wide)) == pytest.approx(
        -3 * ratio + 2
    )
    assert told(group_relative.LengthUnbiased, verbs.LUSPO(**COMMON, **wide)) == pytest.approx(-2 * 3 * ratio + 2)


def test_s2_06_sapo_has_a_temperature_for_good_and_one_for_bad():
    found = told(weighed_ratios.SoftAdaptive, verbs.SAPO(**COMMON, temperature_good=0.5, temperature_bad=2.0))
    assert found == pytest.approx(-3 * (gate(2, 0.5) + gate(1, 0.5)) / 2 + gate(2, 2.0), rel=1e-6)


def test_s2_06_vespo_has_a_power_and_a_decay_for_good_and_for_bad():
    settings = verbs.VESPO(**COMMON, power_good=1.0, decay_good=0.5, power_bad=2.0, decay_bad=1.5)
    good, bad = 2 * math.exp(0.5 - 0.5 * 2), 4 * math.exp(1.5 - 1.5 * 2)
    likely, less = math.log(2) - 1, -1
    found = told(weighed_ratios.VariationalSequence, settings)
    assert found == pytest.approx(-3 * good * (likely + less) + bad * likely, rel=1e-6)


@pytest.mark.parametrize(
    ("cls", "settings", "share"),
    [
        (group_relative.GroupRelativePolicyOptimisation, verbs.GRPO, (1 / 2, 1.0)),
        (group_relative.GroupRelativeDoneRight, verbs.DrGRPO, (1 / 4, 1 / 4)),
        (group_relative.DynamicSampling, verbs.DAPO, (1.0, 1.0)),
    ],
    ids=["grpo", "dr_grpo", "dapo"],
)
def test_s2_06_a_second_bound_is_the_most_that_a_bad_token_loses(cls, settings, share):
    given = {**COMMON, "max_new_tokens": 4, "clip_high": 0.2}
    good, bad = share
    free = -3 * (1.2 + 1) * good + 2 * bad
    assert told(cls, settings(**given)) == pytest.approx(free, rel=1e-6)
    assert told(cls, settings(**given, dual_clip=1.5)) == pytest.approx(free - 0.5 * bad, rel=1e-6)


def test_s2_06_a_second_bound_is_the_two_sided_clip():
    """TRL's `delta` bounds the ratio before the smaller of clipped and free is taken: the same, above the clip."""
    for ratio in (0.1, 0.9, 1.1, 1.5, 4.0):
        for gain in (-1.0, 1.0):
            first = torch.tensor([[0.0, math.log(ratio)]], dtype=torch.float64)
            found, _ = policy_gradient.clipped_surrogate(
                first, 0 * first, 0 * first + gain, torch.tensor([[False, True]]), (0.2, 0.3), dual_clip=1.4
            )
            theirs = -min(min(ratio, 1.4) * gain, min(max(ratio, 0.8), 1.3) * gain)
            assert found.item() == pytest.approx(theirs, rel=1e-12)
