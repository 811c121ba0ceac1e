"""DPO by another divergence, by length, by weight and in a mixture: what each makes of its settings, by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from one_token import OneToken

import examples
from plaudit import settings as verbs
from plaudit.algorithms import direct
from plaudit.algorithms.preference import Answers, DirectPreference, ReferenceFreeIdentity, SequenceLikelihood
from plaudit.algorithms.unpaired import UnpairedAnchoredZero
from plaudit.batch import collate
from plaudit.preferences import divergence_slope
from plaudit.templates import Encoded
from plaudit.world import World

COMMON = {"model": "", "data": ""}


def told(cls, settings, **streams):
    """(loss, statistics) of a pair whose chosen answer has one token and whose rejected one has three: log-ratios 0.2,
    and -0.2, -0.4, -0.6 one after the other."""
    batch = collate([[5], [5]], [[6], [6, 7, 8]], [0, 0])
    logprobs = torch.tensor([[9.0, -0.5, 9.0, 9.0], [9.0, -1.0, -2.0, -3.0]], dtype=torch.float64)
    kept = torch.tensor([[9.0, -0.7, 9.0, 9.0], [9.0, -0.8, -1.6, -2.4]], dtype=torch.float64)
    batch = dataclasses.replace(batch, reference_logprobs=kept, **{"targets": torch.tensor([1.0, 0.0]), **streams})
    algorithm = cls.__new__(cls)
    algorithm.settings = settings
    loss, stats = algorithm.objective(logprobs, batch)
    return loss.item(), {name: value.item() for name, value in stats.items()}


def cost(lead):
    return math.log(1 + math.exp(-lead))


@pytest.mark.parametrize(
    ("divergence", "alpha", "slope"),
    [
        ("jensen_shannon", 0.5, lambda u: math.log(2 * u / (1 + u))),
        ("forward_kl", 0.5, lambda u: 1 - 1 / u),
        ("alpha", 0.7, lambda u: (1 - u**-0.7) / 0.7),
    ],
)
def test_f_dpo_compares_by_the_slope_of_its_divergence(divergence, alpha, slope):
    settings = verbs.DivergenceDPO(**COMMON, beta=0.5, divergence=divergence, alpha=alpha)
    loss, stats = told(direct.DivergencePreference, settings)
    lead = 0.5 * (slope(math.exp(0.2)) - slope(math.exp(-1.2)))
    assert loss == pytest.approx(cost(lead), rel=1e-6)
    assert stats["margin"] == pytest.approx(lead)


def test_alpha_lies_between_the_reverse_and_the_forward_kl_and_no_ratio_is_too_small():
    ratios = torch.tensor([-1.2, 0.0, 0.7], dtype=torch.float64)
    torch.testing.assert_close(divergence_slope(ratios, "alpha", 1e-8), ratios, rtol=1e-6, atol=1e-8)
    assert torch.equal(divergence_slope(ratios, "alpha", 1.0), divergence_slope(ratios, "forward_kl"))
    far = torch.tensor([-5000.0], requires_grad=True)
    for name in ("forward_kl", "jensen_shannon"):
        found = divergence_slope(far, name)
        assert torch.isfinite(found).all()
        slope = torch.autograd.grad(found.sum(), far)[0]
        assert torch.isfinite(slope).all()
        assert slope > 0  # it can come back
    bound = torch.tensor([-20.0 - 1e-9, -20.0 + 1e-9], dtype=torch.float64)
    below, above = divergence_slope(bound, "forward_kl")
    assert below.item() == pytest.approx(above.item(), rel=1e-8)
    with pytest.raises(ValueError, match=r"^alpha: only the divergence `alpha` reads it, and this is `forward_kl`\.$"):
        verbs.DivergenceDPO(**COMMON, divergence="forward_kl", alpha=0.2)


@pytest.mark.parametrize("divergence", ["jensen_shannon", "forward_kl"])
def test_b6_f_dpo_on_exact_preferences_reaches_the_optimum_of_its_divergence(divergence):
    """There f'(pi / ref) = reward / beta + c for all answers (Wang et al. 2023, theorem 1): what the rewards differ by
    is what the slopes differ by."""
    generator = torch.Generator().manual_seed(0)
    logits, rewards = 0.5 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    policy, one = OneToken(logits), [Encoded([0], [i], [True]) for i in range(4)]
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    data = [Answers([one[i], one[j]], [1.0, 0.0]) for i, j in pairs]
    settings = verbs.DivergenceDPO(**COMMON, beta=2.0, divergence=divergence, batch_size=len(pairs))
    algorithm = direct.DivergencePreference(settings, World(torch.device("cpu")), policy, data, [])
    batch = next(algorithm.batches())
    first, second = batch.tokens[0::2, 1], batch.tokens[1::2, 1]
    chance = torch.sigmoid(rewards[first] - rewards[second])
    batch = dataclasses.replace(batch, targets=torch.stack([chance, 1 - chance], 1).flatten())
    for _ in range(60):
        (slope,) = torch.autograd.grad(algorithm.loss(batch)[0], policy.logits, create_graph=True)
        bend = torch.stack([torch.autograd.grad(each, policy.logits, retain_graph=True)[0] for each in slope])
        with torch.no_grad():
            policy.logits -= torch.linalg.pinv(bend, rtol=1e-10) @ slope
    ratios = policy.logits.detach().log_softmax(0) - policy.kept.log_softmax(0)
    found = 2.0 * divergence_slope(ratios, divergence)
    torch.testing.assert_close(found - found[0], rewards - rewards[0], rtol=1e-6, atol=1e-8)
    assert (ratios - ratios[0] - (rewards - rewards[0]) / 2).abs().max() > 1e-3  # which is where dpo goes


def test_ld_dpo_weighs_what_only_the_longer_answer_has():
    for alpha, rejected in ((0.25, -0.2 - 0.25 * 1.0), (0.0, -0.2), (1.0, -1.2)):
        loss, stats = told(direct.LengthDesensitised, verbs.LengthDesensitisedDPO(**COMMON, beta=0.5, alpha=alpha))
        assert loss == pytest.approx(cost(0.5 * (0.2 - rejected)), rel=1e-6)
        assert stats["rejected_reward"] == pytest.approx(0.5 * rejected)


def test_wpo_weighs_a_pair_by_both_of_its_answers():
    weights = torch.tensor([0.5, 0.6], dtype=torch.float64)
    loss, stats = told(direct.WeightedPreference, verbs.WPO(**COMMON, beta=0.5), weights=weights)
    assert loss == pytest.approx(0.3 * cost(0.5 * 1.4), rel=1e-6)
    assert stats["margin"] == pytest.approx(0.5 * 1.4)


def test_wpo_asks_how_much_the_policy_itself_would_answer_so(at, tmp_path):
    """By the whole distribution, slowly: exp(mean of log p(token) - log sum p^2); and nothing flows through it."""
    given = examples.settings("wpo", at, tmp_path / "run", model=str(at / "model"), tokens_per_pass=4096)
    algorithm = examples.built(given)
    batch = next(algorithm.batches())
    output = algorithm.policy(batch, origins=True)
    found = algorithm.likeness(output, batch)
    logits = algorithm.policy.backbone(batch.tokens, attention_mask=batch.attention.long()).logits[:, :-1]
    chances = torch.log_softmax(logits.double(), -1)
    said = chances.gather(2, batch.tokens[:, 1:, None]).squeeze(2) - (2 * chances).logsumexp(2)
    actions = batch.actions[:, 1:]
    expected = ((said * actions).sum(1) / actions.sum(1)).exp()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert not found.requires_grad
    assert (found - 1).abs().max() > 1e-3
    pairs = len(batch) // 2
    plain = DirectPreference.objective(algorithm, output.logprobs, batch)[0].item()
    assert plain == pytest.approx(pairs * math.log(2), rel=1e-5)  # it is its reference
    whole = algorithm.loss(batch)[0].item()
    assert whole == pytest.approx(math.log(2) * (found[0::2] * found[1::2]).sum().item(), rel=1e-5)
    held = algorithm.heldout()
    assert held.weights.shape == (len(held),)
    assert (held.weights > 0).all()


def test_mpo_is_the_weighted_sum_of_its_parts():
    settings = verbs.MPO(**COMMON, beta=0.5, dpo_weight=0.7, bco_weight=0.4, sft_weight=3.0)
    baselines = torch.full((2,), 0.05, dtype=torch.float64)
    loss, stats = told(direct.MixedPreference, settings, baselines=baselines)
    quality = cost(0.5 * 0.2 - 0.05) + cost(0.05 + 0.5 * 1.2)
    assert loss == pytest.approx(0.7 * cost(0.5 * 1.4) + 0.4 * quality + 3.0 * 0.5, rel=1e-6)
    assert stats["chosen_nll"] == pytest.approx(0.5)
    assert stats["margin"] == pytest.approx(0.5 * 1.4)


def test_s2_10_mpo_imitates_what_most_people_preferred_however_many_they_were():
    settings = verbs.MPO(**COMMON, dpo_weight=0.0, bco_weight=0.0, sft_weight=1.0)
    torn = {"targets": torch.tensor([0.6, 0.4]), "baselines": torch.zeros(2)}
    assert told(direct.MixedPreference, settings, **torn)[0] == pytest.approx(0.5)


def test_without_a_reference_slic_reads_sums_and_cpo_ipo_averages_and_both_imitate():
    loss, stats = told(SequenceLikelihood, verbs.SLiC(**COMMON, beta=0.1, sft_weight=2.0))
    assert loss == pytest.approx(1 - 0.1 * (-0.5 + 6) + 2.0 * 0.5, rel=1e-6)
    assert stats["chosen_nll"] == pytest.approx(0.5)
    assert told(SequenceLikelihood, verbs.SLiC(**COMMON, beta=0.2, sft_weight=0.0))[0] == 0.0  # it leads by enough
    loss, _ = told(ReferenceFreeIdentity, verbs.ReferenceFreeIPO(**COMMON, beta=0.25, sft_weight=2.0))
    assert loss == pytest.approx((-0.5 + 2.0 - 2) ** 2 + 2.0 * 0.5, rel=1e-6)


def test_apo_zero_unpaired_judges_each_answer_against_its_reference():
    batch = collate([[5], [5]], [[6], [6, 7]], [0, 1])
    logprobs = torch.tensor([[9.0, -0.5, 9.0], [9.0, -1.0, -2.0]], dtype=torch.float64)
    kept = torch.tensor([[9.0, -0.7, 9.0], [9.0, -0.8, -1.6]], dtype=torch.float64)
    batch = dataclasses.replace(batch, reference_logprobs=kept, targets=torch.tensor([1.0, 0.0]))
    algorithm = UnpairedAnchoredZero.__new__(UnpairedAnchoredZero)
    algorithm.settings = verbs.UnpairedAPOZero(**COMMON, beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    loss, stats = algorithm.objective(logprobs, batch)
    good, bad = 1 / (1 + math.exp(-0.5 * 0.2)), 1 / (1 + math.exp(0.5 * 0.6))
    assert loss.item() == pytest.approx(2.0 * (1 - good) + 3.0 * bad, rel=1e-6)
    assert stats["accuracy"] == 2
    assert stats["margin"].item() == pytest.approx(0.5 * (0.2 + 0.6))
