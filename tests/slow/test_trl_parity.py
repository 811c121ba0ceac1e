"""Losses and gradients are those of TRL to 1e-6: each release in an environment of its own, made once and kept."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plaudit import preferences
from plaudit import settings as verbs
from plaudit.advantages import AdaptiveKL, gae, kl_shaped_rewards
from plaudit.algorithms import policy_gradient, preference, unpaired
from plaudit.algorithms.ppo import ProximalPolicyOptimisation
from plaudit.batch import Batch, collate
from plaudit.losses import bradley_terry
from plaudit.numerics import standardise
from plaudit.policy import Output
from plaudit.sources import cache_folder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LOSSES = Path(__file__).with_name("trl_losses.py")
LENGTHS = [3, 1, 5, 2, 4, 6, 2, 2]
PROMPT = 2
LIMIT = 7


def environment(version: str) -> Path:
    """The Python of an environment with this TRL and the torch that everything here is tested with."""
    folder = cache_folder() / "parity" / f"trl-{version}"
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        pinned = (ROOT / "constraints.txt").read_text()
        torch_pin = re.search(r"^torch==\S+", pinned, re.MULTILINE)
        assert torch_pin is not None
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
        # torch first and by itself: where a CPU build of the pinned release is at hand, no CUDA packages are fetched.
        for wanted in ([torch_pin[0]], [f"trl=={version}", "scikit-learn", "joblib"]):
            subprocess.run([*install, *wanted], check=True)
        ready.touch()
    return python


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
        {"type": "robust"},
    ),
    "ipo": (preference.AveragedIdentityPreference, verbs.AveragedIPO(beta=0.3, **COMMON), {}),
    "hinge": (preference.HingePreference, verbs.Hinge(beta=0.3, **COMMON), {}),
    "exo_pair": (preference.EfficientExact, verbs.EXO(beta=0.3, label_smoothing=0.2, **COMMON), {}),
    "nca_pair": (preference.NoiseContrastive, verbs.NCA(beta=0.3, **COMMON), {}),
    "sppo_hard": (preference.SelfPlayPreference, verbs.SPPO(beta=0.3, **COMMON), {}),
    "aot": (preference.OptimalTransport, verbs.AOT(beta=0.3, label_smoothing=0.1, **COMMON), {}),
    "apo_zero": (preference.AnchoredZero, verbs.APOZero(beta=0.3, **COMMON), {}),
    "apo_down": (preference.AnchoredDown, verbs.APODown(beta=0.3, **COMMON), {}),
    "discopop": (preference.DiscoveredPreference, verbs.DiscoPOP(beta=0.3, **COMMON), {}),
}
ROLLOUTS: dict[str, tuple[type, Any, dict[str, Any]]] = {
    "grpo": (
        policy_gradient.GroupRelativePolicyOptimisation,
        verbs.GRPO(rewards="", kl=0.07, clip_high=0.3, **COMMON),
        {"kl": 0.07, "low": 0.2, "high": 0.3},
    ),
    "dr_grpo": (
        policy_gradient.GroupRelativeDoneRight,
        verbs.DrGRPO(rewards="", max_new_tokens=LIMIT, **COMMON),
        {"low": 0.2, "high": 0.2},
    ),
    "dapo": (policy_gradient.DynamicSampling, verbs.DAPO(rewards="", **COMMON), {"low": 0.2, "high": 0.28}),
    "bnpo": (policy_gradient.DynamicSampling, verbs.DAPO(rewards="", **COMMON), {"low": 0.2, "high": 0.28}),
    "gspo": (
        policy_gradient.GroupSequencePolicyOptimisation,
        verbs.GSPO(rewards="", clip_low=0.05, clip_high=0.06, **COMMON),
        {"type": "grpo", "level": "sequence", "low": 0.05, "high": 0.06},
    ),
    # TRL's bound of CISPO is the ratio itself.
    "cispo": (
        policy_gradient.ClippedWeights,
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


def asked_pairs() -> dict[str, Any]:
    """Pairs in TRL's order: all chosen answers, then all rejected ones."""
    numbers, batch = Numbers(1), batch_of(LENGTHS)
    shape = (len(batch), batch.tokens.shape[1] - 1)
    losses = {}
    for name, (_, settings, options) in PAIRS.items():
        smoothing = getattr(settings, "label_smoothing", 0.0)
        losses[name] = {"type": options.get("type", name), "beta": settings.beta, "label_smoothing": smoothing}
    return {
        "tokens": batch.tokens.tolist(),
        "mask": batch.actions.tolist(),
        "logprobs": numbers.logprobs(*shape).tolist(),
        "reference": numbers.logprobs(*shape).tolist(),
        "losses": losses,
    }


def asked_without_reference() -> dict[str, Any]:
    numbers = Numbers(2)
    return {
        "chosen": numbers.logprobs(6).tolist(),
        "rejected": numbers.logprobs(6).tolist(),
        "losses": {
            "cpo": {"type": "sigmoid", "beta": 0.4, "label_smoothing": 0.1},
            "simpo": {"type": "simpo", "beta": 2.0, "gamma": 0.7, "label_smoothing": 0.1},
            "orpo": {"type": "orpo", "beta": 0.4},
        },
    }


def asked_answers() -> dict[str, Any]:
    numbers, pairs = Numbers(3), asked_pairs()
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


@pytest.fixture(scope="module")
def recent(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(asked, answered) of TRL 1.16.0."""
    numbers = Numbers(5)
    asked = {
        "pairs": asked_pairs(),
        "without_reference": asked_without_reference(),
        "rewards": {"scores": numbers.normal(8).tolist(), "margin": numbers.normal(4).abs().tolist()},
        "answers": asked_answers(),
        "rollouts": asked_rollouts(),
    }
    return asked, answered("1.16.0", asked, tmp_path_factory.mktemp("recent"))


def widened(stream: list[Any], columns: int) -> Tensor:
    """A stream of TRL's, which begins later than ours, with zeros before it."""
    found = torch.tensor(stream, dtype=torch.float64)
    return torch.cat([found.new_zeros(len(found), columns - found.shape[1]), found], 1)


# ------------------------------------------------------------------------------------------------------- 1.16.0


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, recent: Any) -> None:
    asked, answer = recent[0]["pairs"], recent[1]["pairs"][name]
    cls, settings, _ = PAIRS[name]
    count = len(LENGTHS) // 2
    # Ours stand side by side, TRL's in two halves.
    order = torch.tensor([half * count + i for i in range(count) for half in (0, 1)])
    batch = batch_of([LENGTHS[i] for i in order.tolist()], pairs=True)
    columns = batch.tokens.shape[1]
    logprobs = widened(asked["logprobs"], columns)[order].requires_grad_()
    filled = {"reference_logprobs": widened(asked["reference"], columns)[order], "targets": torch.ones(len(batch))}
    batch = Batch(**{**batch.tensors(), **filled})
    own = algorithm(cls, settings)
    loss = own.objective(logprobs, batch)[0] / own.weight(batch)
    loss.backward()
    same(loss.item(), answer["loss"])
    assert logprobs.grad is not None
    same(logprobs.grad[:, 1:], torch.tensor(answer["gradients"][0])[order])


def test_pairs_without_a_reference(recent: Any) -> None:
    asked, answers = recent[0]["without_reference"], recent[1]["without_reference"]

    def of(name: str, chosen: Tensor, rejected: Tensor) -> Tensor:
        if name == "cpo":
            return preferences.cpo(chosen, rejected, 0.4, label_smoothing=0.1)[0]
        if name == "simpo":
            return preferences.simpo(chosen, rejected, 2.0, 0.7, label_smoothing=0.1)[0]
        return preferences.orpo(chosen, rejected, 0.4)[0] + chosen.sum()  # without the imitation of the chosen

    for name in asked["losses"]:
        sides = [torch.tensor(asked[side], dtype=torch.float64, requires_grad=True) for side in ("chosen", "rejected")]
        loss = of(name, *sides) / len(sides[0])
        loss.backward()
        same(loss.item(), answers[name]["loss"])
        for side, gradient in zip(sides, answers[name]["gradients"], strict=True):
            assert side.grad is not None
            same(side.grad, gradient)


def test_reward(recent: Any) -> None:
    asked, answers = recent[0]["rewards"], recent[1]["rewards"]
    margins = torch.tensor(asked["margin"], dtype=torch.float64)
    for name, margin in (("reward", 0.0), ("reward with margins", margins)):
        scores = torch.tensor(asked["scores"], dtype=torch.float64, requires_grad=True)
        loss = bradley_terry(scores[:4], scores[4:], margin=margin)[0] / 4
        loss.backward()
        same(loss.item(), answers[name]["loss"])
        assert scores.grad is not None
        same(scores.grad, answers[name]["gradients"][0])


def test_kto(recent: Any) -> None:
    asked, answer = recent[0]["answers"], recent[1]["answers"]["kto"]
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
    own = algorithm(unpaired.KahnemanTversky, verbs.KTO(beta=0.3, undesirable_weight=1.3, **COMMON))
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
