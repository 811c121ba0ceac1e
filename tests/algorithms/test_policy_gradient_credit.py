"""What each policy gradient gives an action for what its completion earned, and how much it counts, by hand."""

import pytest
import torch

from plaudit import settings as verbs
from plaudit.algorithms import group_relative as grouped
from plaudit.algorithms import policy_gradient as known
from plaudit.batch import collate

COMMON = {"model": "", "data": "", "rewards": "", "group": 2}
EARNED = [1.0, 4.0, 2.0, 2.0]  # two prompts, two completions each


def of(cls, settings):
    """(credit, share) of the actions of four completions, of 1, 2, 1 and 3 tokens, row by row."""
    batch = collate([[5]] * 4, [[6] * n for n in (1, 2, 1, 3)], [0, 0, 1, 1])
    algorithm = cls.__new__(cls)
    algorithm.settings = settings
    rewards = torch.zeros(batch.tokens.shape).scatter(1, batch.lengths[:, None] - 1, torch.tensor(EARNED)[:, None])
    credit, share = algorithm.credit(batch, rewards), algorithm.share(batch)
    assert credit[~batch.actions].abs().sum() == share[~batch.actions].abs().sum() == 0
    return [[found[row][batch.actions[row]].tolist() for row in range(4)] for found in (credit, share)]


@pytest.mark.parametrize(
    ("cls", "settings", "gain", "part"),
    [
        (known.LeaveOneOut, verbs.RLOO(**COMMON), 3.0, [1.0, 1.0, 1.0]),
        (grouped.GroupRelativePolicyOptimisation, verbs.GRPO(**COMMON), 0.5**0.5, [1.0, 1 / 2, 1 / 3]),
        (grouped.GroupRelativeDoneRight, verbs.DrGRPO(**COMMON, max_new_tokens=8), 1.5, [1 / 8, 1 / 8, 1 / 8]),
        (grouped.DynamicSampling, verbs.DAPO(**COMMON), 0.5**0.5, [1.0, 1.0, 1.0]),
    ],
    ids=["rloo", "grpo", "dr_grpo", "dapo"],
)
def test_b13_b14_credit_and_share_by_hand(cls, settings, gain, part):
    credit, share = of(cls, settings)
    one, two, three = part
    assert credit == [pytest.approx(row) for row in ([-gain], [gain] * 2, [0.0], [0.0] * 3)]
    assert share == [pytest.approx(row) for row in ([one], [two] * 2, [one], [three] * 3)]
