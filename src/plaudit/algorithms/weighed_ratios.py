"""The GRPO family where ratios are not clipped as in PPO: behind a smooth gate, or as mere weights."""

from __future__ import annotations

from torch import Tensor

from plaudit.algorithms.base import Stats
from plaudit.algorithms.group_relative import GroupRelative
from plaudit.algorithms.policy_gradient import BySequence, bounds
from plaudit.batch import Batch
from plaudit.losses import clipped_weight, gamma_weight, soft_gate
from plaudit.policy import Output
from plaudit.settings.policy_gradient import CISPO, SAPO, VESPO


class SoftAdaptive(BySequence, GroupRelative):
    """SAPO (Qwen 2025, arXiv:2511.20347), eq. 5: the mean over completions of their tokens' means, behind a gate."""

    settings: SAPO

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        given = output.logprobs, batch.logprobs, batch.advantages, batch.actions
        temperatures = self.settings.temperature_good, self.settings.temperature_bad
        return soft_gate(*given, temperatures, self.share(batch), self.counted(batch))


class VariationalSequence(GroupRelative):
    """VESPO (arXiv:2602.10693): the mean over tokens, each weighed by the ratio of its completion."""

    settings: VESPO

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        own, given = self.settings, (output.logprobs, batch.logprobs, batch.advantages, batch.actions)
        return gamma_weight(*given, (own.power_good, own.decay_good), (own.power_bad, own.decay_bad))


class ClippedWeights(GroupRelative):
    """CISPO (MiniMax 2025, arXiv:2506.13585), eq. 4: the mean over tokens, none of which loses its gradient."""

    settings: CISPO

    def objective(self, output: Output, batch: Batch) -> tuple[Tensor, Stats]:
        return clipped_weight(output.logprobs, batch.logprobs, batch.advantages, batch.actions, bounds(self.settings))
