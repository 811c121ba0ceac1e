"""What the preference algorithms read of each answer, by hand: sums where lengths differ, averages, imitation."""

import dataclasses
import math

import pytest
import torch

from plaudit import settings as verbs
from plaudit.algorithms import preference, transport
from plaudit.batch import collate

COMMON = {"model": "", "data": ""}


def told(cls, settings):
    """(loss, statistics) of a pair whose chosen answer has one token and whose rejected one has three."""
    batch = collate([[5], [5]], [[6], [6, 7, 8]], [0, 0])
    logprobs = torch.tensor([[9.0, -0.5, 9.0, 9.0], [9.0, -1.0, -2.0, -3.0]], dtype=torch.float64)
    kept = torch.tensor([[9.0, -0.7, 9.0, 9.0], [9.0, -0.8, -1.6, -2.4]], dtype=torch.float64)
    batch = dataclasses.replace(batch, reference_logprobs=kept, targets=torch.tensor([1.0, 0.0]))
    algorithm = cls.__new__(cls)
    algorithm.settings = settings
    assert algorithm.weight(batch).item() == 1
    loss, stats = algorithm.objective(logprobs, batch)
    return loss.item(), {name: value.item() for name, value in stats.items()}


def test_ipo_reads_sums_or_averages():
    # log-ratios: 0.2 for the chosen, -1.2 for the rejected, or -0.4 on average
    loss, _ = told(preference.IdentityPreference, verbs.IPO(beta=0.25, **COMMON))
    assert loss == pytest.approx((0.2 + 1.2 - 2) ** 2)
    loss, _ = told(preference.AveragedIdentityPreference, verbs.AveragedIPO(beta=0.25, **COMMON))
    assert loss == pytest.approx((0.2 + 0.4 - 2) ** 2)


def test_s2_08_normalised_dpo_reads_averages():
    loss, stats = told(preference.NormalisedDirectPreference, verbs.NormalisedDPO(beta=2.0, **COMMON))
    assert loss == pytest.approx(math.log(1 + math.exp(-2.0 * (0.2 + 0.4))), rel=1e-6)
    assert stats["margin"] == pytest.approx(2.0 * 0.6)


def test_s2_08_unpaired_aot_reads_log_ratios_and_alphapo_averages():
    loss, _ = told(transport.UnpairedOptimalTransport, verbs.UnpairedAOT(beta=0.5, **COMMON))
    assert loss == pytest.approx(math.log(1 + math.exp(-0.5 * (0.2 + 1.2))), rel=1e-6)
    loss, _ = told(preference.ShapedPreference, verbs.AlphaPO(beta=2.0, gamma=1.0, alpha=0.5, **COMMON))
    lead = 2.0 * 2 * (math.exp(1.0) - math.exp(0.25)) - 1.0  # of averages of -0.5 and -2
    assert loss == pytest.approx(math.log(1 + math.exp(-lead)), rel=1e-6)
    with pytest.raises(ValueError, match=r"^alpha must not be 0: that is `simpo`\.$"):
        verbs.AlphaPO(alpha=0.0, **COMMON)


def test_s2_08_what_meets_in_aot_are_margins_and_in_unpaired_aot_log_ratios():
    # Log-ratios 1 and 2 of the chosen, -0.5 and -1 of the rejected; margins 1 and 3, the reference's -0.5 and 0.
    own = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    kept = torch.tensor([[0.0, 0.5], [1.0, 1.0]], dtype=torch.float64)

    def met(cls, settings):
        algorithm = cls.__new__(cls)
        algorithm.settings = settings
        return algorithm.compared(own, kept).sum().item()

    def expected(*leads):
        return sum(math.log(1 + math.exp(-0.5 * lead)) for lead in leads)

    unpaired = met(transport.UnpairedOptimalTransport, verbs.UnpairedAOT(beta=0.5, **COMMON))
    assert unpaired == pytest.approx(expected(1.0 + 1.0, 2.0 + 0.5))
    assert met(transport.OptimalTransport, verbs.AOT(beta=0.5, **COMMON)) == pytest.approx(expected(1.0 + 0.5, 3.0))


def test_cpo_reads_sums_and_imitates_the_chosen():
    loss, stats = told(preference.ContrastivePreference, verbs.CPO(beta=0.4, sft_weight=3.0, **COMMON))
    pair = torch.nn.functional.softplus(torch.tensor(-0.4 * (-0.5 + 6))).item()
    assert loss == pytest.approx(pair + 3.0 * 0.5, rel=1e-6)
    assert stats["chosen_nll"] == pytest.approx(0.5)


def test_simpo_and_orpo_read_averages():
    loss, _ = told(preference.SimplePreference, verbs.SimPO(beta=2.0, gamma=1.0, **COMMON))
    assert loss == pytest.approx(torch.nn.functional.softplus(torch.tensor(-(2.0 * 1.5 - 1.0))).item(), rel=1e-6)
    loss, _ = told(preference.OddsRatio, verbs.ORPO(beta=0.3, **COMMON))
    chosen, rejected = torch.tensor([-0.5, -2.0], dtype=torch.float64).exp()
    odds = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    assert loss == pytest.approx(0.5 - 0.3 * torch.sigmoid(odds.log()).log().item())
