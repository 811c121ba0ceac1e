"""Losses and gradients are those of TRL to 1e-6: each release in an environment of its own, made once and kept.

What is compared runs through the algorithms themselves wherever TRL's counterpart is one method; only the numbers
that a model would give are made up. Where the two define something differently, a test states the difference as an
identity: TRL adds 1e-4 to the spread of a group, whitens by the unbiased variance, leaves the reward shift out of BCO
for pairs, and averages the imitation in CPO and ORPO over all tokens instead of answer by answer, in ORPO over those
of the prompts too. The last two agree for chosen answers of one length, in ORPO after prompts of one token.

Only plaudit has, so that nothing can be compared:

- `vpg`, `reinforce_pp`, `rrhf`, `ilql`, `best_of_n`, and `ipo`, which is the paper's: TRL's IPO is `ipo_avg`;
- rewards from rankings, ratings and labels; assumed noise; ensembles; normalised scores;
- ties, and answers that only some people preferred: TRL's pairs are certain, and of two equal rewards in online DPO it
  takes the first for the better, where plaudit learns nothing;
- the KL term as k2, straight through, or held to a budget; rejected completions; DAPO's refills.

Only TRL has: other divergences under losses than the logistic one, the choice of tokens by entropy, and corrections for
another engine's samples in GRPO; A*-PO; triples of answers; distillation.

Both have, and it is not compared: the loss of `sft`, which TRL leaves to the model; bonuses for entropy, which TRL
takes from logits that these tests do not have; and KTO's mismatched answers, which either side draws in its own way:
the divergence that they give is handed to both.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from environments import environment
from plaudit import preferences
from plaudit import settings as verbs
from plaudit.advantages import AdaptiveKL, gae, kl_shaped_rewards, leave_one_out
from plaudit.algorithms import (
    direct,
    group_relative,
    online,
    policy_gradient,
    preference,
    reward,
    transport,
    unpaired,
    weighed_ratios,
)
from plaudit.algorithms.ppo import ProximalPolicyOptimisation
from plaudit.batch import Batch, collate
from plaudit.numerics import standardise
from plaudit.policy import Output
from plaudit.world import World

pytestmark = pytest.mark.slow
LOSSES = Path(__file__).with_name("trl_losses.py")
LENGTHS = [3, 1, 5, 2, 4, 6, 2, 2]
PROMPT = 2
LIMIT = 7


def answered(version: str, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What TRL makes of these numbers."""
    (folder / "asked.json").write_text(json.dumps(asked))
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(environment(version)), str(LOSSES), str(folder / "asked.json"), str(folder / "answer.json")]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
    assert answer["version"] == version
    return answer


def same(found: Tensor | list[float] | float, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=1e-6, atol=1e-7
    )


class Numbers:
    """Seeded random numbers in float64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def logprobs(self, *shape: int) -> Tensor:
        return -2 * torch.rand(*shape, generator=self.generator, dtype=torch.float64) - 0.05


def batch_of(lengths: list[int], pairs: bool = False) -> Batch:
    """Rows of these many actions after a prompt; `pairs`: every two are a group."""
    groups = [i // 2 for i in range(len(lengths))] if pairs else None
    return collate([[5] * PROMPT] * len(lengths), [[6] * n for n in lengths], groups)


def algorithm(cls: type, settings: Any, **parts: Any) -> Any:
    """An algorithm without a model or data: what it says of numbers is all that is asked."""
    made = cls.__new__(cls)
    vars(made).update(settings=settings, moved=[], notes={}, **parts)
    return made


COMMON = {"model": "", "data": ""}
PAIRS: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "sigmoid": (preference.DirectPreference, verbs.DPO(beta=0.3, **COMMON), {}),
    "sigmoid smoothed": (
        preference.RobustDirectPreference,
        verbs.RobustDPO(beta=0.3, label_smoothing=0.2, **COMMON),
        {"types": ["robust"]},
    ),
    "ipo": (preference.AveragedIdentityPreference, verbs.AveragedIPO(beta=0.3, **COMMON), {}),
    "hinge": (preference.HingePreference, verbs.Hinge(beta=0.3, **COMMON), {}),
    "exo_pair": (preference.EfficientExact, verbs.EXO(beta=0.3, label_smoothing=0.2, **COMMON), {}),
    "nca_pair": (preference.NoiseContrastive, verbs.NCA(beta=0.3, **COMMON), {}),
    "sppo_hard": (preference.SelfPlayPreference, verbs.SPPO(beta=0.3, **COMMON), {}),
    "sigmoid_norm": (preference.NormalisedDirectPreference, verbs.NormalisedDPO(beta=0.3, **COMMON), {}),
    "bco_pair": (unpaired.PairedBinaryClassifier, verbs.PairedBCO(beta=0.3, **COMMON), {}),
    "aot_unpaired": (
        transport.UnpairedOptimalTransport,
        verbs.UnpairedAOT(beta=0.3, label_smoothing=0.1, **COMMON),
        {},
    ),
    "aot": (transport.OptimalTransport, verbs.AOT(beta=0.3, label_smoothing=0.1, **COMMON), {}),
    "apo_zero": (preference.AnchoredZero, verbs.APOZero(beta=0.3, **COMMON), {}),
    "apo_down": (preference.AnchoredDown, verbs.APODown(beta=0.3, **COMMON), {}),
    "Jensen-Shannon": (
        direct.DivergencePreference,
        verbs.DivergenceDPO(beta=0.3, **COMMON),
        {"types": ["sigmoid"], "f_divergence_type": "js_divergence"},
    ),
    "forward KL": (
        direct.DivergencePreference,
        verbs.DivergenceDPO(beta=0.3, divergence="forward_kl", **COMMON),
        {"types": ["sigmoid"], "f_divergence_type": "forward_kl"},
    ),
    # TRL's coefficient is 1 - alpha of the paper.
    "alpha divergence": (
        direct.DivergencePreference,
        verbs.DivergenceDPO(beta=0.3, divergence="alpha", alpha=0.7, **COMMON),
        {"types": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
    "less fond of length": (
        direct.LengthDesensitised,
        verbs.LengthDesensitisedDPO(beta=0.3, alpha=0.4, **COMMON),
        {"types": ["sigmoid"], "ld_alpha": 0.4},
    ),
    "weighed by the policy": (
        direct.WeightedPreference,
        verbs.WPO(beta=0.3, **COMMON),
        {"types": ["sigmoid"], "use_weighting": True},
    ),
    "a mixture": (
        direct.MixedPreference,
        verbs.MPO(beta=0.3, dpo_weight=0.7, bco_weight=0.3, sft_weight=0.0, **COMMON),
        {"types": ["sigmoid", "bco_pair"], "weights": [0.7, 0.3]},
    ),
    "imitation": (
        direct.MixedPreference,
        verbs.MPO(beta=0.3, dpo_weight=0.0, bco_weight=0.0, sft_weight=1.5, **COMMON),
        {"types": ["sft"], "weights": [1.5]},
    ),
    "discopop": (preference.DiscoveredPreference, verbs.DiscoPOP(beta=0.3, tau=0.05, **COMMON), {}),
}
UNEVEN = [name for name in PAIRS if name != "imitation"]
# Those without a reference: also the length of the prompts, and of the answers, first all that were chosen.
EVEN = [4, 4, 4, 4, 1, 5, 2, 6]
ALONE: dict[str, tuple[type, Any, dict[str, Any], int, list[int]]] = {
    "cpo": (
        preference.ContrastivePreference,
        verbs.CPO(beta=0.4, label_smoothing=0.1, sft_weight=0, **COMMON),
        {"loss_type": "sigmoid", "beta": 0.4, "label_smoothing": 0.1, "cpo_alpha": 0.0, "alpha": 0.0},
        PROMPT,
        LENGTHS,
    ),
    "cpo with imitation": (
        preference.ContrastivePreference,
        verbs.CPO(beta=0.4, sft_weight=0.7, **COMMON),
        {"loss_type": "sigmoid", "beta": 0.4, "label_smoothing": 0.0, "cpo_alpha": 0.7, "alpha": 0.0},
        PROMPT,
        EVEN,
    ),
    "hinge": (
        preference.SequenceLikelihood,
        verbs.SLiC(beta=0.4, sft_weight=0.7, **COMMON),
        {"loss_type": "hinge", "beta": 0.4, "label_smoothing": 0.0, "cpo_alpha": 0.7, "alpha": 0.0},
        PROMPT,
        EVEN,
    ),
    "ipo": (
        preference.ReferenceFreeIdentity,
        verbs.ReferenceFreeIPO(beta=0.4, sft_weight=0.7, **COMMON),
        {"loss_type": "ipo", "beta": 0.4, "label_smoothing": 0.0, "cpo_alpha": 0.7, "alpha": 0.0},
        PROMPT,
        EVEN,
    ),
    "simpo": (
        preference.SimplePreference,
        verbs.SimPO(beta=2, gamma=0.7, label_smoothing=0.1, **COMMON),
        {
            "loss_type": "simpo",
            "beta": 2.0,
            "simpo_gamma": 0.7,
            "label_smoothing": 0.1,
            "cpo_alpha": 0.0,
            "alpha": 0.0,
        },
        PROMPT,
        LENGTHS,
    ),
    "alphapo": (
        preference.ShapedPreference,
        verbs.AlphaPO(beta=2, gamma=0.7, alpha=0.25, label_smoothing=0.1, **COMMON),
        {
            "loss_type": "simpo",
            "beta": 2.0,
            "simpo_gamma": 0.7,
            "label_smoothing": 0.1,
            "cpo_alpha": 0.0,
            "alpha": 0.25,
        },
        PROMPT,
        LENGTHS,
    ),
    "orpo": (preference.OddsRatio, verbs.ORPO(beta=0.4, **COMMON), {"loss_type": "orpo", "beta": 0.4}, 1, EVEN),
}
ONLINE: dict[str, tuple[type, Any]] = {
    "sigmoid": (online.OnlineDirectPreference, verbs.OnlineDPO(rewards="", beta=0.3, **COMMON)),
    "ipo": (online.OnlineIdentityPreference, verbs.OnlineIPO(rewards="", beta=0.3, **COMMON)),
}
VOCABULARY = 11
GROUP = 4
CREDIT: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "grpo": (
        group_relative.GroupRelativePolicyOptimisation,
        verbs.GRPO(rewards="", group=GROUP, **COMMON),
        {"scale": "group"},
    ),
    "dr_grpo": (
        group_relative.GroupRelativeDoneRight,
        verbs.DrGRPO(rewards="", group=GROUP, **COMMON),
        {"scale": "none"},
    ),
    "lite_ppo": (group_relative.LiteClipped, verbs.LitePPO(rewards="", group=GROUP, **COMMON), {"scale": "batch"}),
    "rloo": (policy_gradient.LeaveOneOut, verbs.RLOO(rewards="", group=GROUP, kl=0.2, **COMMON), {"kl": 0.2}),
    "gdpo": (
        group_relative.GroupRewardDecoupled,
        verbs.GDPO(rewards="", group=GROUP, **COMMON),
        {"scale": "none", "weights": [1.0, 0.4]},
    ),
    "rloo whitened": (
        policy_gradient.LeaveOneOut,
        verbs.RLOO(rewards="", group=GROUP, kl=0.2, whiten_advantages=True, **COMMON),
        {"kl": 0.2, "whitened": True},
    ),
}
REWARDS: dict[str, dict[str, Any]] = {
    "plain": {"margin": False, "centering": None},
    "margins": {"margin": True, "centering": None},
    "centring": {"margin": True, "centering": 0.3},
}
ROLLOUTS: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "grpo": (
        group_relative.GroupRelativePolicyOptimisation,
        verbs.GRPO(rewards="", kl=0.07, clip_high=0.3, **COMMON),
        {"kl": 0.07, "low": 0.2, "high": 0.3},
    ),
    "dr_grpo": (
        group_relative.GroupRelativeDoneRight,
        verbs.DrGRPO(rewards="", max_new_tokens=LIMIT, **COMMON),
        {"low": 0.2, "high": 0.2},
    ),
    "dapo": (group_relative.DynamicSampling, verbs.DAPO(rewards="", **COMMON), {"low": 0.2, "high": 0.28}),
    "bnpo": (group_relative.DynamicSampling, verbs.DAPO(rewards="", **COMMON), {"low": 0.2, "high": 0.28}),
    "gspo": (
        group_relative.GroupSequencePolicyOptimisation,
        verbs.GSPO(rewards="", clip_low=0.05, clip_high=0.06, **COMMON),
        {"type": "grpo", "level": "sequence", "low": 0.05, "high": 0.06},
    ),
    "grpo with a second bound": (
        group_relative.GroupRelativePolicyOptimisation,
        verbs.GRPO(rewards="", kl=0.0, dual_clip=1.25, **COMMON),
        {"type": "grpo", "low": 0.2, "high": 0.2, "delta": 1.25},
    ),
    "gmpo": (
        group_relative.GeometricMean,
        verbs.GMPO(rewards="", clip_low=0.1, clip_high=0.15, kl=0.07, **COMMON),
        {"low": 0.1, "high": 0.15, "kl": 0.07},
    ),
    "luspo": (
        group_relative.LengthUnbiased,
        verbs.LUSPO(rewards="", clip_low=0.05, clip_high=0.06, kl=0.07, **COMMON),
        {"level": "sequence", "low": 0.05, "high": 0.06, "kl": 0.07},
    ),
    "sapo": (
        weighed_ratios.SoftAdaptive,
        verbs.SAPO(rewards="", kl=0.07, temperature_bad=1.5, **COMMON),
        {"kl": 0.07, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.5},
    ),
    "vespo": (
        weighed_ratios.VariationalSequence,
        verbs.VESPO(rewards="", **COMMON),
        {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0},
    ),
    # TRL's bound of CISPO is the ratio itself.
    "cispo": (
        weighed_ratios.ClippedWeights,
        verbs.CISPO(rewards="", clip_high=0.25, **COMMON),
        {"low": 0.0, "high": 1.25},
    ),
    "rloo": (
        policy_gradient.LeaveOneOut,
        verbs.RLOO(rewards="", clip_high=0.3, **COMMON),
        {"low": 0.2, "high": 0.3},
    ),
}


# ------------------------------------------------------------------------------------------------ what is asked


def asked_pairs(lengths: list[int], names: list[str]) -> dict[str, Any]:
    """Pairs in TRL's order: all chosen answers, then all rejected ones."""
    numbers, batch = Numbers(1), batch_of(lengths)
    shape = (len(batch), batch.tokens.shape[1] - 1)
    losses = {}
    for name in names:
        _, settings, options = PAIRS[name]
        smoothing = getattr(settings, "label_smoothing", 0.0)
        losses[name] = {"types": [name], "beta": settings.beta, "label_smoothing": smoothing, **options}
    return {
        "tokens": batch.tokens.tolist(),
        "mask": batch.actions.tolist(),
        "logprobs": numbers.logprobs(*shape).tolist(),
        "reference": numbers.logprobs(*shape).tolist(),
        "squares": numbers.logprobs(*shape).tolist(),  # log sum p^2 over the vocabulary, at each action
        "losses": losses,
    }


def texts(lengths: list[int], prompt: int, pairs: bool = False) -> Batch:
    """As `batch_of`, after prompts of `prompt` tokens, and of different tokens."""
    groups = [i // 2 for i in range(len(lengths))] if pairs else None
    said = [[(3 * n + k) % VOCABULARY for k in range(n)] for n in lengths]
    return collate([[5] * prompt] * len(lengths), said, groups)


def asked_without_reference() -> dict[str, Any]:
    numbers, asked = Numbers(2), {}
    for name, (_, _, options, prompt, lengths) in ALONE.items():
        batch = texts(lengths, prompt)
        asked[name] = {
            "tokens": batch.tokens.tolist(),
            "attention": batch.attention.long().tolist(),
            "mask": batch.actions.tolist(),
            "logits": numbers.normal(*batch.tokens.shape, VOCABULARY).tolist(),
            "options": options,
        }
    return asked


def asked_answers() -> dict[str, Any]:
    numbers, pairs = Numbers(3), asked_pairs(LENGTHS, [])
    return {
        **{name: pairs[name] for name in ("tokens", "mask", "logprobs", "reference")},
        "desirable": [True, False, False, True, True, False, True, True],
        "kl_policy": numbers.logprobs(8).tolist(),
        "kl_reference": (numbers.logprobs(8) - 0.5).tolist(),
        "beta": 0.3,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.3,
    }


def asked_rollouts() -> dict[str, Any]:
    numbers, batch = Numbers(4), batch_of(LENGTHS)
    shape = (len(batch), batch.tokens.shape[1] - PROMPT)
    own = numbers.logprobs(*shape)
    return {
        "mask": batch.actions[:, PROMPT:].tolist(),
        "logprobs": own.tolist(),
        "old": (own + 0.25 * numbers.normal(*shape)).tolist(),
        "reference": (own + 0.4 * numbers.normal(*shape)).tolist(),
        "advantages": numbers.normal(len(batch)).tolist(),
        "limit": LIMIT,
        "losses": {name: {"type": name, **options} for name, (_, _, options) in ROLLOUTS.items()},
    }


def asked_credit() -> dict[str, Any]:
    """Three groups, in one of which all are equal."""
    numbers, batch = Numbers(7), batch_of(LENGTHS + LENGTHS[:4])
    shape = (len(batch), batch.tokens.shape[1] - PROMPT)
    scores = numbers.normal(len(batch))
    scores[GROUP : 2 * GROUP] = 0.75
    return {
        "scores": scores.tolist(),
        "others": numbers.normal(len(batch)).tolist(),
        "large": 1e6,  # of several rewards, so that what TRL adds to the spread of each is nothing
        "mask": batch.actions[:, PROMPT:].tolist(),
        "old": numbers.logprobs(*shape).tolist(),
        "reference": numbers.logprobs(*shape).tolist(),
        "group": GROUP,
        "cases": {name: options for name, (_, _, options) in CREDIT.items()},
    }


def asked_online() -> dict[str, Any]:
    numbers, batch = Numbers(8), batch_of(LENGTHS)
    shape = (len(batch), batch.tokens.shape[1] - PROMPT)
    return {
        "scores": numbers.normal(len(batch)).tolist(),
        "mask": batch.actions[:, PROMPT:].tolist(),
        "logprobs": numbers.logprobs(*shape).tolist(),
        "reference": numbers.logprobs(*shape).tolist(),
        "beta": 0.3,
    }


@pytest.fixture(scope="module")
def recent(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(asked, answered) of TRL 1.16.0."""
    numbers = Numbers(5)
    asked = {
        "pairs": asked_pairs(LENGTHS, UNEVEN),
        "even_pairs": asked_pairs(EVEN, ["imitation"]),
        "without_reference": asked_without_reference(),
        "rewards": {
            "scores": numbers.normal(8).tolist(),
            "margin": numbers.normal(4).abs().tolist(),
            "losses": REWARDS,
        },
        "answers": asked_answers(),
        "rollouts": asked_rollouts(),
        "credit": asked_credit(),
        "online": asked_online(),
    }
    return asked, answered("1.16.0", asked, tmp_path_factory.mktemp("recent"))


def side_by_side(count: int) -> Tensor:
    """Where our rows, of which two are a pair, stand among TRL's, which are in two halves of `count`."""
    return torch.tensor([half * count + i for i in range(count) for half in (0, 1)])


def widened(stream: list[Any], columns: int) -> Tensor:
    """A stream of TRL's, which begins later than ours, with zeros before it."""
    found = torch.tensor(stream, dtype=torch.float64)
    return torch.cat([found.new_zeros(len(found), columns - found.shape[1]), found], 1)


# ------------------------------------------------------------------------------------------------------- 1.16.0


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, recent: Any) -> None:
    kind, lengths = ("pairs", LENGTHS) if name in UNEVEN else ("even_pairs", EVEN)
    asked, answer = recent[0][kind], recent[1][kind][name]
    cls, settings, _ = PAIRS[name]
    order = side_by_side(len(lengths) // 2)
    batch = batch_of([lengths[i] for i in order.tolist()], pairs=True)
    columns = batch.tokens.shape[1]
    logprobs = widened(asked["logprobs"], columns)[order].requires_grad_()
    filled = {"reference_logprobs": widened(asked["reference"], columns)[order], "targets": torch.ones(len(batch))}
    filled["targets"][1::2] = 0.0
    filled["baselines"] = torch.zeros(len(batch))  # where `bco_pair` has the shift that TRL leaves out
    batch = Batch(**{**batch.tensors(), **filled})
    own = algorithm(cls, settings)
    if name == "weighed by the policy":
        close = logprobs.detach() - widened(asked["squares"], columns)[order]
        batch = Batch(**{**batch.tensors(), "weights": own.averages(close, batch).exp()})
    loss = own.objective(logprobs, batch)[0] / own.weight(batch)
    loss.backward()
    same(loss.item(), answer["loss"])
    assert logprobs.grad is not None
    same(logprobs.grad[:, 1:], torch.tensor(answer["gradients"][0])[order])


@pytest.mark.parametrize("name", ALONE)
def test_pairs_without_a_reference(name: str, recent: Any) -> None:
    asked, answer = recent[0]["without_reference"][name], recent[1]["without_reference"][name]
    cls, settings, _, prompt, lengths = ALONE[name]
    order = side_by_side(len(lengths) // 2)
    batch = texts([lengths[i] for i in order.tolist()], prompt, pairs=True)
    logits = torch.tensor(asked["logits"], dtype=torch.float64)[order].requires_grad_()
    said = logits[:, :-1].log_softmax(-1).gather(2, batch.tokens[:, 1:, None]).squeeze(2)
    logprobs = torch.nn.functional.pad(said, (1, 0))
    batch = Batch(**{**batch.tensors(), "targets": torch.tensor([1.0, 0.0]).repeat(len(batch) // 2)})
    own = algorithm(cls, settings)
    loss = own.objective(logprobs, batch)[0] / own.weight(batch)
    loss.backward()
    same(loss.item(), answer["loss"])
    assert logits.grad is not None
    same(logits.grad, torch.tensor(answer["gradients"][0])[order])


@pytest.mark.parametrize("name", REWARDS)
def test_reward(name: str, recent: Any) -> None:
    asked, answer = recent[0]["rewards"], recent[1]["rewards"][name]
    options, count = REWARDS[name], len(asked["margin"])
    order = side_by_side(count)
    batch = batch_of([1] * 2 * count, pairs=True)
    scores = torch.tensor(asked["scores"], dtype=torch.float64)[order].requires_grad_()
    margins = torch.tensor(asked["margin"], dtype=torch.float64) * options["margin"]
    targets = torch.stack([torch.tensor([1.0, 0.0]).repeat(count), torch.stack([margins, -margins], 1).flatten()], 1)
    batch = Batch(**{**batch.tensors(), "targets": targets})
    own = algorithm(reward.FromComparisons, verbs.Reward(centering=options["centering"] or 0.0, **COMMON))
    loss = own.judge(batch, scores)[0] / own.weight(batch)
    loss.backward()
    same(loss.item(), answer["loss"])
    assert scores.grad is not None
    same(scores.grad, torch.tensor(answer["gradients"][0])[order])


ANSWERS: dict[str, tuple[type, Any]] = {
    "kto": (unpaired.KahnemanTversky, verbs.KTO(beta=0.3, undesirable_weight=1.3, **COMMON)),
    "apo_zero_unpaired": (
        unpaired.UnpairedAnchoredZero,
        verbs.UnpairedAPOZero(beta=0.3, undesirable_weight=1.3, **COMMON),
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_single_answers(name: str, recent: Any) -> None:
    asked, answer = recent[0]["answers"], recent[1]["answers"][name]
    batch = batch_of(LENGTHS)
    columns = batch.tokens.shape[1]
    kl = torch.tensor(asked["kl_policy"]).double().mean() - torch.tensor(asked["kl_reference"]).double().mean()
    assert kl > 0
    logprobs = widened(asked["logprobs"], columns).requires_grad_()
    filled = {
        "reference_logprobs": widened(asked["reference"], columns),
        "targets": torch.tensor(asked["desirable"]).double(),
        "baselines": kl.expand(len(batch)),
    }
    batch = Batch(**{**batch.tensors(), **filled})
    own = algorithm(*ANSWERS[name])
    loss = own.objective(logprobs, batch)[0] / own.weight(batch)
    loss.backward()
    same(loss.item(), answer["loss"])
    assert logprobs.grad is not None
    same(logprobs.grad[:, 1:], answer["gradients"][0])


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollouts(name: str, recent: Any) -> None:
    asked, answer = recent[0]["rollouts"], recent[1]["rollouts"][name]
    cls, settings, _ = ROLLOUTS[name]
    batch = batch_of(LENGTHS)
    columns = batch.tokens.shape[1]
    logprobs = widened(asked["logprobs"], columns).requires_grad_()
    advantages = torch.tensor(asked["advantages"], dtype=torch.float64)[:, None].expand(len(batch), columns)
    filled = {"logprobs": widened(asked["old"], columns), "advantages": advantages}
    if settings.kl and settings.kl_term != "reward":
        filled["reference_logprobs"] = widened(asked["reference"], columns)
    batch = Batch(**{**batch.tensors(), **filled})
    output = Output(logprobs=torch.where(batch.actions, logprobs, 0.0))
    own = algorithm(cls, settings, controller=AdaptiveKL(settings.kl), model=lambda *_, **__: output)
    loss = own.loss(batch)[0] / own.weight(batch)
    loss.backward()
    same(loss.item(), answer["loss"])
    assert logprobs.grad is not None
    same(logprobs.grad[:, PROMPT:], answer["gradients"][0])


@pytest.mark.parametrize("name", CREDIT)
def test_advantages_within_a_group(name: str, recent: Any) -> None:
    asked, expected = recent[0]["credit"], torch.tensor(recent[1]["credit"][name], dtype=torch.float64)
    cls, settings, options = CREDIT[name]
    batch = batch_of(LENGTHS + LENGTHS[:4])
    scores = torch.tensor(asked["scores"], dtype=torch.float64)
    old, reference = (widened(asked[stream], batch.tokens.shape[1]) for stream in ("old", "reference"))
    own = algorithm(cls, settings, world=World(torch.device("cpu")))
    if weights := options.get("weights"):
        own.rewards = Namespace(weights=weights)
        scores = own.worth(torch.stack([scores, torch.tensor(asked["others"])]).double() * asked["large"], scores)
    rewards = kl_shaped_rewards(scores, old, reference, batch.actions, options.get("kl", 0.0))
    found = own.credit(batch, rewards)
    if options.get("scale") == "group":  # TRL adds 1e-4 to the spread
        spread = scores.view(-1, GROUP).std(1).repeat_interleave(GROUP)
        found = found * (spread / (spread + 1e-4))[:, None]
    elif options.get("scale") == "batch" or options.get("whitened") or weights:  # and here also takes the unbiased one
        gains = leave_one_out(rewards.sum(1), GROUP) if options.get("whitened") else scores
        found = found * gains.std(correction=0) / (gains.std() + 1e-4)
    same(found, expected[:, None] * batch.actions)


@pytest.mark.parametrize("name", ONLINE)
def test_online(name: str, recent: Any) -> None:
    asked, answer = recent[0]["online"], recent[1]["online"][name]
    order = side_by_side(len(LENGTHS) // 2)
    batch = batch_of([LENGTHS[i] for i in order.tolist()])
    columns = batch.tokens.shape[1]
    logprobs = widened(asked["logprobs"], columns)[order].requires_grad_()
    worst, best = online.extremes(torch.tensor(asked["scores"])[order], 2)
    rows = torch.stack([best, worst], 1).flatten()
    batch = Batch(**{**batch.tensors(), "reference_logprobs": widened(asked["reference"], columns)[order]}).rows(rows)
    output = Output(logprobs=torch.where(batch.actions, logprobs[rows], 0.0))
    own = algorithm(*ONLINE[name], model=lambda *_, **__: output)
    loss = own.loss(batch)[0] / own.weight(batch)
    loss.backward()
    same(loss.item(), answer["loss"])
    assert logprobs.grad is not None
    same(logprobs.grad[:, PROMPT:], torch.tensor(answer["gradients"][0])[order])


# ------------------------------------------------------------------------------------------------------- 1.12.0


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(asked, answered) of TRL 1.12.0, the last with PPO and BCO."""
    numbers, batch = Numbers(6), batch_of(LENGTHS)
    shape = (len(batch), batch.tokens.shape[1] - PROMPT)
    old = numbers.logprobs(*shape)
    values = numbers.normal(*shape)
    proximal = {
        "old": old,
        "new": old + 0.25 * numbers.normal(*shape),
        "reference": old + 0.3 * numbers.normal(*shape),
        "values": values,
        "new_values": values + 0.3 * numbers.normal(*shape),
        "returns": values + numbers.normal(*shape),
        "advantages": numbers.normal(*shape),
        "scores": numbers.normal(len(batch)),
        "whole_padding": torch.zeros(shape, dtype=torch.bool),
        "padding": ~batch.actions[:, PROMPT:],
    }
    options = {
        "kl_estimator": "k1",
        "kl_coef": 0.15,
        "whiten_rewards": False,
        "gamma": 0.95,
        "lam": 0.9,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.3,
    }
    classifier = {
        "beta": 0.3,
        "batches": {
            name: {"chosen": numbers.normal(5).tolist(), "rejected": numbers.normal(3).tolist()}
            for name in ("first", "second")
        },
        "good": (numbers.normal(12, 3) + 0.4).tolist(),
        "bad": numbers.normal(7, 3).tolist(),
        "low": 0.5,
        "high": 10.0,
    }
    asked = {
        "proximal": {"args": options, **{name: tensor.tolist() for name, tensor in proximal.items()}},
        "classifier": classifier,
    }
    return asked, answered("1.12.0", asked, tmp_path_factory.mktemp("former"))


def test_ppo_rewards_advantages_and_returns(former: Any) -> None:
    asked, answer = former[0]["proximal"], former[1]["proximal"]["gae"]
    # TRL pays a shorter row's score one column late; where all rows are of one length, there is no such column.
    rows, length = len(asked["old"]), len(asked["old"][0])
    actions = batch_of([length] * rows).actions
    old, reference, values = (widened(asked[name], PROMPT + length) for name in ("old", "reference", "values"))
    scores = torch.tensor(asked["scores"], dtype=torch.float64)
    rewards = kl_shaped_rewards(scores, old, reference, actions, 0.15)
    advantages, returns = gae(rewards, values, actions, 0.95, 0.9)
    same(rewards[:, PROMPT:], answer["rewards"])
    same(returns[:, PROMPT:], answer["returns"])
    # TRL whitens by the unbiased variance, plaudit by the biased one, as Ziegler et al. did.
    count = actions.sum().item()
    whitened = standardise(advantages, actions) * math.sqrt((count - 1) / count)
    same(whitened[:, PROMPT:], answer["advantages"])


def test_ppo_loss(former: Any) -> None:
    asked, answer = former[0]["proximal"], former[1]["proximal"]["ppo"]
    batch = batch_of(LENGTHS)
    columns = batch.tokens.shape[1]
    new, values = (widened(asked[name], columns).requires_grad_() for name in ("new", "new_values"))
    given = {"logprobs": "old", "values": "values", "returns": "returns", "advantages": "advantages"}
    batch = Batch(**{**batch.tensors(), **{ours: widened(asked[theirs], columns) for ours, theirs in given.items()}})
    own = algorithm(ProximalPolicyOptimisation, verbs.PPO(rewards="", value_weight=0.3, **COMMON))
    loss = own.objective(Output(logprobs=new, values=values), batch)[0] / own.weight(batch)
    loss.backward()
    same(loss.item(), answer["loss"])
    for stream, gradient in zip((new, values), answer["gradients"], strict=True):
        assert stream.grad is not None
        same(stream.grad[:, PROMPT:], gradient)


def test_bco(former: Any) -> None:
    asked, answers = former[0]["classifier"], former[1]["classifier"]
    rewards: list[Tensor] = []
    for name, given in asked["batches"].items():
        sides = [torch.tensor(given[side], dtype=torch.float64, requires_grad=True) for side in ("chosen", "rejected")]
        ratios = torch.cat(sides)
        rewards.append(0.3 * ratios.detach())
        desirable = torch.arange(len(ratios)) < len(sides[0])
        baseline = torch.cat(rewards).mean()  # of all answers so far
        loss = preferences.bco(ratios, desirable, baseline, 0.3)[0] / len(ratios)
        loss.backward()
        same(loss.item(), answers[name]["loss"])
        for side, gradient in zip(sides, answers[name]["gradients"], strict=True):
            assert side.grad is not None
            same(side.grad, gradient)
    good, bad = (torch.tensor(asked[name], dtype=torch.float64) for name in ("good", "bad"))
    weights = preferences.density_ratios(good, bad, bad, 0.5, 10.0)
    torch.testing.assert_close(weights, torch.tensor(answers["matched prompts"]["weights"]).double(), rtol=1e-4, atol=0)
