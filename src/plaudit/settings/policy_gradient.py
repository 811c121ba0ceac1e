"""Settings of algorithms that sample, score and reinforce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from plaudit.settings.common import Count, CountOrNone, Following, NotNegative, Positive, Schedule, Share, Training
from plaudit.settings.rewards import ShapedRewards
from plaudit.settings.sampling import Asking, Sampling

Several = Annotated[int, Ge(2)]
Part = Annotated[float, Ge(0), Lt(1)]
Divergence = Literal["reward", "reward_abs", "reward_mse", "reward_full", "k2", "k3", "straight_through"]


@dataclass(frozen=True, kw_only=True)
class OnPolicy(Asking, Sampling, ShapedRewards, Training):
    """What every algorithm that learns from its own samples takes."""

    eval_limit: Count = 64
    """At most so many held-out prompts are completed at an evaluation."""
    batch_size: Count = 64
    """Completions that one optimizer step sees, over all processes."""
    schedule: Schedule = "constant"
    """What the learning rate does after the warm-up: see `sft`."""
    rollout: Count = 64
    """Completions that are sampled before the policy moves, over all processes."""
    group: Count = 1
    """Completions of each prompt."""
    missing_end_penalty: NotNegative = 0.0
    """Taken off the reward of completions that were cut at the limit."""
    overlong: Share = 0.0
    """Completions whose length falls into the last so large share of `max_new_tokens` lose reward, the more the longer
    they are (Yu et al. 2025, eq. 13); 0 for none."""
    overlong_penalty: NotNegative = 1.0
    """Reward that a completion as long as the limit loses to `overlong`."""
    shown: CountOrNone = 4
    """Completions of each rollout that `samples.jsonl` keeps, with their scores; 0 keeps all of them."""


@dataclass(frozen=True, kw_only=True)
class Held(Following, OnPolicy):
    """What every algorithm takes that samples and has a reference."""

    compare_samples: bool = False
    """Beside the few samples that are kept for reading, keep what the reference answers to their prompts and what that
    earns: a few more completions a rollout."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Held):
    """What every algorithm takes that follows the gradient of the expected reward."""

    kl: NotNegative = 0.05
    """Weight of the KL divergence from the reference, in reward per nat; where it is adaptive, its first value."""
    kl_term: Divergence = "reward"
    """Where the divergence counts: in the reward of the tokens that were sampled, as log pi - log ref (k1), as its
    absolute value, as half its square, or exactly, over the whole vocabulary; or in the loss, estimated by k2, by k3,
    or by k3 with the gradient of k2."""
    reference: str = ""
    """Model that the divergence is measured from; by default `model`, as it is in the beginning."""
    kl_target: NotNegative = 0.0
    """Adapt the weight so that this many nats per completion are held (Ziegler et al. 2019); 0 keeps it fixed."""
    kl_horizon: Count = 10000
    """Completions over which the weight adapts to `kl_target`."""
    kl_budget: NotNegative = 0.0
    """Raise the weight while the divergence is above this many nats per completion, and lower it, down to 0, while it
    is below; 0 keeps it fixed."""
    kl_rate: Positive = 0.05
    """How much the weight moves at a rollout at most, in reward per nat: by so much where the divergence is 0 or twice
    `kl_budget`, and in proportion between."""
    entropy: NotNegative = 0.0
    """Weight of the entropy bonus, in reward per nat; 0 for none."""
    mask_truncated: bool = False
    """Leave completions that were cut at the limit out of the loss."""
    reject_worst: Part = 0.0
    """Leave the so large share of each rollout's completions that was rewarded least out of the loss."""
    reject_best: Part = 0.0
    """Leave the so large share of each rollout's completions that was rewarded most out of the loss."""

    @property
    def penalised(self) -> bool:
        """Whether there is a KL term, and with it a reference."""
        return bool(self.kl or self.kl_target or self.kl_budget)


@dataclass(frozen=True, kw_only=True)
class Reusing(PolicyGradient):
    """What algorithms take that clip probability ratios, so that a rollout can be learned from more than once."""

    reuse: Count = 1
    """Epochs over each rollout."""
    target_kl: NotNegative = 0.0
    """Leave the rest of a rollout when the policy is so far from the one that sampled it, in nats a token; 0: never."""
    ratio_threshold: NotNegative = 0.0
    """Learn nothing from a batch whose mean probability ratio is above this; 0: from all."""


@dataclass(frozen=True, kw_only=True)
class PPO(Reusing):
    """Proximal policy optimisation with a value head and a KL penalty."""

    output: str = "runs/ppo"
    """Run folder."""
    batch_size: Count = 32
    """Completions that one optimizer step sees, over all processes."""
    reuse: Count = 2
    """Epochs over each rollout."""
    gamma: Share = 1.0
    """Discount."""
    lam: Share = 0.95
    """GAE's trade of bias against variance."""
    clip: Annotated[float, Gt(0), Le(1)] = 0.2
    """Probability ratios beyond 1 +- clip earn nothing."""
    dual_clip: NotNegative = 0.0
    """Where the advantage is negative, ratios beyond this lose no more (Ye et al. 2020 take 3); 0 for no such bound."""
    value_clip: NotNegative = 0.2
    """Values that move further than this in one rollout earn nothing; 0 lets them."""
    value_weight: NotNegative = 0.1
    """Weight of the value loss."""
    value_learning_rate: NotNegative = 0.0
    """Learning rate of the value head; 0 takes the policy's."""
    value_hidden: CountOrNone = 0
    """Hidden layer of the value head, with ReLU, so many times as wide as the model's states; 0 for none."""
    whiten_advantages: bool = True
    """Standardise advantages over the rollout."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation."""


@dataclass(frozen=True, kw_only=True)
class VPG(PolicyGradient):
    """Vanilla policy gradient, REINFORCE, with a choice of baselines."""

    output: str = "runs/vpg"
    """Run folder."""
    baseline: Literal["none", "mean", "ema"] = "ema"
    """Taken off every reward: nothing, the rollout's mean, or an exponential moving average of these means, which
    begins at 0 and takes a tenth of each new one."""


@dataclass(frozen=True, kw_only=True)
class Clipped(Reusing):
    """What algorithms without a value head take that clip probability ratios."""

    clip_low: Annotated[float, Gt(0), Le(1)] = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: Positive = 0.2
    """Ratios above 1 + clip_high are clipped."""


@dataclass(frozen=True, kw_only=True)
class RLOO(Clipped):
    """REINFORCE leave-one-out: the other completions of a prompt are the baseline."""

    output: str = "runs/rloo"
    """Run folder."""
    group: Several = 4
    """Completions of each prompt."""
    whiten_advantages: bool = False
    """Give advantages mean 0 and standard deviation 1 over the rollout."""


@dataclass(frozen=True, kw_only=True)
class ReinforcePP(Clipped):
    """REINFORCE++: rewards to go, normalised over the whole rollout, and the clipped objective of PPO."""

    verb: ClassVar[str] = "reinforce_pp"
    output: str = "runs/reinforce_pp"
    """Run folder."""
    baseline: Literal["none", "group"] = "none"
    """Taken off every reward: nothing, or the mean of the prompt's completions, of which `group` must then be 2 or
    more."""


@dataclass(frozen=True, kw_only=True)
class Grouped(Reusing):
    """What the GRPO family takes: a completion is as good as it is better than others of its prompt."""

    group: Several = 8
    """Completions of each prompt."""
    kl: NotNegative = 0.0
    """Weight of the KL divergence from the reference, in reward per nat; where it is adaptive, its first value."""
    kl_term: Divergence = "k3"
    """Where the divergence counts: see `ppo`."""


@dataclass(frozen=True, kw_only=True)
class GRPO(Grouped, Clipped):
    """Group relative policy optimisation: a completion is as good as it is better than others of its prompt."""

    output: str = "runs/grpo"
    """Run folder."""
    kl: NotNegative = 0.04
    """Weight of the KL divergence from the reference, in reward per nat; where it is adaptive, its first value."""
    dual_clip: NotNegative = 0.0
    """Where the advantage is negative, ratios beyond this lose no more, as by TRL's `delta`; 0 for no such bound."""


@dataclass(frozen=True, kw_only=True)
class LitePPO(GRPO):
    """GRPO by tokens, whose advantages are divided by the spread of the whole rollout's rewards, not each group's."""

    verb: ClassVar[str] = "lite_ppo"
    output: str = "runs/lite_ppo"
    """Run folder."""
    kl: NotNegative = 0.0
    """Weight of the KL divergence from the reference, in reward per nat; where it is adaptive, its first value."""


@dataclass(frozen=True, kw_only=True)
class GDPO(GRPO):
    """Group reward-decoupled normalisation: each of several rewards is put on one scale before they are added up."""

    output: str = "runs/gdpo"
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class GMPO(Grouped):
    """Geometric-mean policy optimisation: a completion has one ratio, the mean one of its clipped tokens."""

    output: str = "runs/gmpo"
    """Run folder."""
    clip_low: Positive = 0.4
    """Log-ratios of a token below -clip_low are clipped."""
    clip_high: Positive = 0.4
    """Log-ratios of a token above clip_high are clipped."""


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """GRPO done right: no division by the group's spread or by a completion's own length."""

    verb: ClassVar[str] = "dr_grpo"
    output: str = "runs/dr_grpo"
    """Run folder."""
    kl: NotNegative = 0.0
    """Weight of the KL divergence from the reference, in reward per nat; where it is adaptive, its first value."""


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """Decoupled clip and dynamic sampling: GRPO by tokens, without prompts that teach nothing."""

    output: str = "runs/dapo"
    """Run folder."""
    kl: NotNegative = 0.0
    """Weight of the KL divergence from the reference, in reward per nat; where it is adaptive, its first value."""
    clip_high: Positive = 0.28
    """Ratios above 1 + clip_high are clipped."""
    overlong: Share = 0.2
    """Completions whose length falls into the last so large share of `max_new_tokens` lose reward, the more the longer
    they are (Yu et al. 2025, eq. 13); 0 for none."""
    refills: CountOrNone = 2
    """How many times a rollout's prompts whose completions all earned the same are replaced by others; those that are
    left then are dropped."""


@dataclass(frozen=True, kw_only=True)
class GSPO(Grouped, Clipped):
    """Group sequence policy optimisation: the probability ratio is that of the whole completion."""

    output: str = "runs/gspo"
    """Run folder."""
    clip_low: Annotated[float, Gt(0), Le(1)] = 3e-4
    """Ratios below 1 - clip_low are clipped."""
    clip_high: Positive = 4e-4
    """Ratios above 1 + clip_high are clipped."""


@dataclass(frozen=True, kw_only=True)
class LUSPO(GSPO):
    """Length-unbiased sequence policy optimisation: GSPO in which a completion counts as much as it is long."""

    output: str = "runs/luspo"
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class SAPO(Grouped):
    """Soft adaptive policy optimisation: ratios are not clipped, but weighed down smoothly, the more the further."""

    output: str = "runs/sapo"
    """Run folder."""
    temperature_good: Positive = 1.0
    """How fast tokens of positive advantage lose their gradient as their ratio leaves 1."""
    temperature_bad: Positive = 1.05
    """The same for tokens of negative advantage."""


@dataclass(frozen=True, kw_only=True)
class VESPO(Grouped):
    """Variational sequence-level soft policy optimisation: each completion weighs w^k exp(-l w), w its ratio."""

    output: str = "runs/vespo"
    """Run folder."""
    power_good: NotNegative = 2.0
    """The power k, where the advantage is not negative: how fast weights fall as ratios fall below 1."""
    decay_good: Positive = 3.0
    """The decay l, where the advantage is not negative: how fast weights fall as ratios rise."""
    power_bad: NotNegative = 3.0
    """The power k, where the advantage is negative."""
    decay_bad: Positive = 2.0
    """The decay l, where the advantage is negative."""


@dataclass(frozen=True, kw_only=True)
class CISPO(Grouped, Clipped):
    """Clipped importance-sampling policy optimisation: ratios are clipped, but every token keeps its gradient."""

    output: str = "runs/cispo"
    """Run folder."""
    clip_low: Annotated[float, Gt(0), Le(1)] = 1.0
    """Ratios below 1 - clip_low are clipped; 1 leaves small ratios alone."""
    clip_high: Positive = 4.0
    """Ratios above 1 + clip_high are clipped."""
