"""The GRPO family: a completion is as good as it is better than the others of its prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plaudit.advantages import decoupled, degenerate, group_centred, group_standardised
from plaudit.algorithms.base import Stats
from plaudit.algorithms.on_policy import Completion
from plaudit.algorithms.policy_gradient import BySequence, ReusingAlgorithm, bounds, everywhere
from plaudit.batch import Batch
from plaudit.data import Order
from plaudit.losses import clipped_surrogate, geometric_surrogate, sequence_surrogate
from plaudit.policy import Output
from plaudit.settings.policy_gradient import DAPO, GDPO, GMPO, GRPO, GSPO, Grouped


class GroupRelative(ReusingAlgorithm):
    """Advantages within each group, over its spread. What the GRPO family shares."""

    settings: Grouped

    def credit(self, batch: Batch, rewards: Tensor) -> Tensor:
        return everywhere(group_standardised(rewards.sum(1), self.settings.group), batch)


class ClippedGroupRelative(GroupRelative):
    """With the clipped objective of PPO."""

    settings: GRPO

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        return clipped_surrogate(
            output.logprobs,
            batch.logprobs,
            batch.advantages,
            batch.actions,
            bounds(self.settings),
            dual_clip=self.settings.dual_clip,
            share=self.share(batch),
            counted=self.counted(batch),
        )


class GroupRelativePolicyOptimisation(BySequence, ClippedGroupRelative):
    """GRPO (Shao et al. 2024, arXiv:2402.03300), eq. 3: the mean over completions of their tokens' means."""


class LiteClipped(ClippedGroupRelative):
    """Lite PPO (Liu et al. 2025, arXiv:2508.08221): the mean over tokens, and the spread of the whole rollout."""

    def credit(self, batch: Batch, rewards: Tensor) -> Tensor:
        return everywhere(group_centred(self.standardised(rewards.sum(1)), self.settings.group), batch)


class GroupRewardDecoupled(GroupRelativePolicyOptimisation):
    """GDPO (Liu et al. 2026, arXiv:2601.05242): each reward is standardised in its group, and their sum over all."""

    settings: GDPO

    def worth(self, each: Tensor, raw: Tensor) -> Tensor:
        return decoupled(each, torch.tensor(self.rewards.weights), self.settings.group)

    def credit(self, batch: Batch, rewards: Tensor) -> Tensor:
        return everywhere(self.standardised(rewards.sum(1)), batch)


class GeometricMean(BySequence, GroupRelative):
    """GMPO (Zhao et al. 2025, arXiv:2507.20673), eq. 4: a completion's ratio is the mean one of its clipped tokens."""

    settings: GMPO

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        return geometric_surrogate(
            output.logprobs, batch.logprobs, batch.advantages, batch.actions, bounds(self.settings)
        )


class GroupRelativeDoneRight(GroupRelativePolicyOptimisation):
    """Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): no spread to divide by, and one constant length for all."""

    def credit(self, batch: Batch, rewards: Tensor) -> Tensor:
        return everywhere(group_centred(rewards.sum(1), self.settings.group), batch)

    def share(self, batch: Batch) -> Tensor:
        return batch.actions / self.settings.max_new_tokens


class GroupSequencePolicyOptimisation(BySequence, GroupRelative):
    """GSPO (Zheng et al. 2025, arXiv:2507.18071), eq. 5: a completion has one ratio, the mean one of its tokens."""

    settings: GSPO

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        clip = bounds(self.settings)
        return sequence_surrogate(output.logprobs, batch.logprobs, batch.advantages, batch.actions, clip, mean=True)


class LengthUnbiased(GroupSequencePolicyOptimisation):
    """LUSPO (arXiv:2602.05261): GSPO in which each completion counts as many times as it has tokens."""

    def share(self, batch: Batch) -> Tensor:
        return batch.actions.float()

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        given = output.logprobs, batch.logprobs, batch.advantages, batch.actions, bounds(self.settings)
        return sequence_surrogate(*given, mean=True, share=self.share(batch).sum(1))


class DynamicSampling(ClippedGroupRelative):
    """DAPO (Yu et al. 2025, arXiv:2503.14476), eq. 8: the mean over tokens, of prompts that teach something."""

    settings: DAPO

    def __init__(self, settings: DAPO, *args: Any) -> None:
        super().__init__(settings, *args)
        self.stream = Order(len(self.data), 1, settings.seed)
        self.asked = 0  # prompts taken from the stream so far

    def prompts(self) -> list[int]:
        return self.following(self.settings.rollout // self.settings.group)

    def following(self, count: int) -> list[int]:
        """The next prompts of the stream."""
        self.asked += count
        return [self.stream[place][0] for place in range(self.asked - count, self.asked)]

    def sample(self, indices: list[int]) -> list[Completion]:
        drawn, group = self.draw(indices), self.settings.group
        for _ in range(self.settings.refills):
            idle = self.alike(drawn).nonzero().flatten().tolist()
            most = max(self.world.gather([len(idle)]))
            if not most:
                break
            more = self.draw(self.following(most * self.world.size), noted=False)
            lively = (~self.alike(more)).nonzero().flatten().tolist()
            for old, new in zip(idle, lively, strict=False):  # whichever ends first
                drawn[old * group : (old + 1) * group] = more[new * group : (new + 1) * group]
        return drawn

    def alike(self, drawn: list[Completion]) -> Tensor:
        """(prompts,) True where all completions earned the same."""
        return degenerate(torch.tensor([c.score for c in drawn]), self.settings.group)

    def kept(self, batch: Batch) -> Batch:
        assert batch.scores is not None
        alike = degenerate(batch.scores, self.settings.group).repeat_interleave(self.settings.group)
        return super().kept(replace(batch, actions=batch.actions & ~alike[:, None]))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "asked": self.asked}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.asked = state["asked"]
