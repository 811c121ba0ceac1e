"""Policies before the same prompts: reward, judge, win rate, divergence, diversity, fluency."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plaudit import statistics
from plaudit.algorithms.on_policy import Asked
from plaudit.batch import Batch, collate
from plaudit.checks import has_action_heads
from plaudit.loading import encodes, load_policy, load_tokenizer
from plaudit.policy import Policy
from plaudit.sampler import LocalSampler, Sampling
from plaudit.templates import Template
from plaudit.world import World


@dataclass
class Said:
    """What one policy said to each prompt, and what was thought of it. logprobs and reference are the sums of its
    tokens' log-probabilities, under itself and under the reference, in nats."""

    texts: list[str]
    tokens: list[int]
    reward: Tensor
    judge: Tensor
    logprobs: Tensor
    reference: Tensor

    def figures(self, positive: float) -> dict[str, float]:
        """Means over prompts; KL is the mean of log pi - log reference over the policy's own completions."""
        return {
            "reward": float(self.reward.mean()),
            "judge": float(self.judge.mean()),
            "positive_share": float((self.judge > positive).float().mean()),
            "kl": float((self.logprobs - self.reference).mean()),
            "distinct_2": statistics.distinct_n(self.texts, 2),
            "perplexity": math.exp(float(-self.reference.sum() / max(sum(self.tokens), 1))),
            "completion_tokens": sum(self.tokens) / len(self.tokens),
        }


def load(model: str, world: World, temperature: float, guidance: float = 0.0) -> tuple[Policy, Template]:
    """A policy as it is to be sampled from; `guidance` matters to those that can be guided. Raises PlauditError."""
    heads = guidance > 0 and has_action_heads(model)
    policy = load_policy(model, precision=world.precision, action_heads=heads, learns=False).to(world.device)
    policy.temperature = temperature
    policy.guidance = guidance if heads else 0.0
    return policy, Template(load_tokenizer(model), encodes(model))


def total_logprobs(policy: Policy, batch: Batch, world: World, tokens: int) -> Tensor:
    """(B,) the log-probability of each row's actions, in nats."""
    totals = torch.zeros(len(batch), dtype=torch.float64)
    with torch.no_grad(), world.autocast():
        for part, places in policy.parts(batch, tokens):
            output = policy(part.to(world.device)).logprobs
            totals[places.cpu()] = output.sum(1).double().cpu()
    return totals


def answer(
    policy: Policy,
    asked: Sequence[Asked],
    template: Template,
    sampling: Sampling,
    world: World,
    *,
    seed: int,
    rows: int,
    advance: Callable[[int], None],
) -> tuple[Batch, list[str]]:
    """One completion for each prompt, `rows` at a time, as a batch and as texts."""
    sampler = LocalSampler(policy.backbone, template.decode, dtype=world.sampling_dtype, guide=policy.guide)
    generator = torch.Generator().manual_seed(seed)
    completions: list[list[int]] = []
    for start in range(0, len(asked), rows):
        part = asked[start : start + rows]
        completions += sampler.sample([a.ids for a in part], sampling, 1, generator).completions
        advance(len(part))
    batch = collate([a.ids for a in asked], completions)
    return batch, [template.decode(ids) for ids in completions]


def compare(named: dict[str, Said], positive: float) -> dict[str, Any]:
    """The figures of each policy, and how often each beats the first by the judge."""
    result: dict[str, Any] = {name: answers.figures(positive) for name, answers in named.items()}
    first, *others = named.values()
    for name, answers in zip(list(named)[1:], others, strict=True):
        wins = statistics.win_rate(answers.judge.numpy(), first.judge.numpy())
        found = {"win_rate": wins.rate, "win_rate_low": wins.low, "win_rate_high": wins.high, "p_value": wins.p_value}
        result[name] |= found
        result |= found
    result["prompts"] = len(first.texts)
    return result
