"""Settings of learning from preferences without a reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from plaudit.settings.common import Count, Following, NotNegative, Positive, Share, Training

Smoothing = Annotated[float, Ge(0), Lt(0.5)]


@dataclass(frozen=True, kw_only=True)
class Preference(Training):
    """What every algorithm takes that learns from preferences themselves."""

    soft: ClassVar[bool] = False  # whether the loss has a use for ties, and for how many people preferred an answer
    max_tokens: Count = 1024
    """Answers that are longer, prompt included, are left out and counted, with those they were compared with."""
    learning_rate: Positive = 1e-6
    """Peak learning rate of AdamW."""
    warmup: Share = 0.1
    """Share of the steps over which the learning rate rises."""


@dataclass(frozen=True, kw_only=True)
class Referenced(Following, Preference):
    """What every algorithm takes that stays near the policy it began as."""

    beta: Positive = 0.1
    """How much straying from the reference costs: the smaller, the further the policy goes."""


@dataclass(frozen=True, kw_only=True)
class Precomputable(Referenced):
    """What every algorithm takes whose reference answers the same questions in every epoch."""

    precompute_reference: bool = False
    """Compute the reference's log-probabilities once, keep them in the cache by model and data, and hold no reference
    in memory."""


@dataclass(frozen=True, kw_only=True)
class DPO(Precomputable):
    """Direct preference optimisation: the policy is its own reward model."""

    soft: ClassVar[bool] = True
    output: str = "runs/dpo"
    """Run folder."""
    label_smoothing: Smoothing = 0.0
    """Share of answers assumed to be the wrong way round (conservative DPO)."""


@dataclass(frozen=True, kw_only=True)
class RobustDPO(Precomputable):
    """DPO whose loss is right on average although a known share of the answers is the wrong way round."""

    verb: ClassVar[str] = "robust_dpo"
    soft: ClassVar[bool] = True
    output: str = "runs/robust_dpo"
    """Run folder."""
    label_smoothing: Smoothing = 0.1
    """Share of answers that are the wrong way round."""


@dataclass(frozen=True, kw_only=True)
class NormalisedDPO(DPO):
    """DPO on log-ratios averaged over the tokens of each answer, so that long answers weigh no more than short ones."""

    verb: ClassVar[str] = "dpo_norm"
    output: str = "runs/dpo_norm"
    """Run folder."""
    beta: Positive = 5.0
    """How much straying from the reference costs, in a token's log-ratio."""


@dataclass(frozen=True, kw_only=True)
class DivergenceDPO(DPO):
    """DPO that is held to the reference by another divergence than the reverse KL."""

    verb: ClassVar[str] = "f_dpo"
    output: str = "runs/f_dpo"
    """Run folder."""
    divergence: Literal["jensen_shannon", "forward_kl", "alpha"] = "jensen_shannon"
    """The divergence; `alpha` lies between the reverse KL, which is `dpo`, and the forward KL."""
    alpha: Annotated[float, Gt(0), Le(1)] = 0.5
    """Of `alpha`: near 0 the reverse KL, at 1 the forward KL."""

    def __post_init__(self) -> None:
        if self.divergence != "alpha" and self.alpha != 0.5:
            raise ValueError(f"alpha: only the divergence `alpha` reads it, and this is `{self.divergence}`.")


@dataclass(frozen=True, kw_only=True)
class LengthDesensitisedDPO(DPO):
    """DPO in which what a longer answer says beyond the length of the shorter one counts less."""

    verb: ClassVar[str] = "ld_dpo"
    output: str = "runs/ld_dpo"
    """Run folder."""
    alpha: Annotated[float, Ge(0), Le(1)] = 0.5
    """Weight of tokens beyond the length that both answers have: at 1 this is `dpo`, at 0 they do not count."""


@dataclass(frozen=True, kw_only=True)
class WPO(DPO):
    """Weighted preference optimisation: DPO in which a pair counts as much as the policy itself would answer so."""

    output: str = "runs/wpo"
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class IPO(Precomputable):
    """Identity preference optimisation: a squared loss that stops at a margin, so that sure answers do not run away."""

    soft: ClassVar[bool] = True
    output: str = "runs/ipo"
    """Run folder."""
    beta: Positive = 0.1
    """The paper's tau: where all people agree, the margin that is aimed at is 1 / (2 beta) nats a pair."""


@dataclass(frozen=True, kw_only=True)
class AveragedIPO(IPO):
    """IPO with log-probabilities averaged over the tokens of each answer, as TRL has it."""

    verb: ClassVar[str] = "ipo_avg"
    output: str = "runs/ipo_avg"
    """Run folder."""
    beta: Positive = 1.0
    """The paper's tau: where all people agree, the margin that is aimed at is 1 / (2 beta) nats a token."""


@dataclass(frozen=True, kw_only=True)
class Hinge(Precomputable):
    """The hinge loss of SLiC and RSO: pairs that lead by enough teach nothing more."""

    soft: ClassVar[bool] = True
    output: str = "runs/hinge"
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class EXO(Precomputable):
    """Efficient exact optimisation: the reverse KL divergence from what people prefer, over the two answers."""

    soft: ClassVar[bool] = True
    output: str = "runs/exo"
    """Run folder."""
    label_smoothing: Annotated[float, Gt(0), Lt(0.5)] = 1e-3
    """How often the rejected answer would be preferred; the divergence needs it above 0."""


@dataclass(frozen=True, kw_only=True)
class NCA(Precomputable):
    """Noise contrastive alignment: raises the chosen answer by itself, instead of only above the rejected one."""

    output: str = "runs/nca"
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class SPPO(Precomputable):
    """Self-play preference optimisation: each answer's log-ratio is drawn to how often people prefer it."""

    soft: ClassVar[bool] = True
    output: str = "runs/sppo"
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class AOT(Precomputable):
    """Alignment via optimal transport: compares the margins of a batch as distributions, by sorting them."""

    output: str = "runs/aot"
    """Run folder."""
    label_smoothing: Smoothing = 0.0
    """Share of answers assumed to be the wrong way round."""


@dataclass(frozen=True, kw_only=True)
class UnpairedAOT(AOT):
    """AOT that compares chosen answers with rejected ones as distributions, whichever prompts they answer."""

    verb: ClassVar[str] = "aot_unpaired"
    output: str = "runs/aot_unpaired"
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class PairedBCO(Precomputable):
    """Binary classifier optimisation of pairs: the implicit reward tells the chosen answer from the rejected one."""

    verb: ClassVar[str] = "bco_pair"
    output: str = "runs/bco_pair"
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class MPO(PairedBCO):
    """Mixed preference optimisation: DPO, BCO of pairs and imitation of the chosen answer, in one loss."""

    verb: ClassVar[str] = "mpo"
    output: str = "runs/mpo"
    """Run folder."""
    dpo_weight: NotNegative = 0.8
    """Weight of the loss of `dpo`."""
    bco_weight: NotNegative = 0.2
    """Weight of the loss of `bco_pair`."""
    sft_weight: NotNegative = 1.0
    """Weight of imitating the chosen answer, in nats a token."""


@dataclass(frozen=True, kw_only=True)
class APOZero(Precomputable):
    """Anchored preference optimisation, up and down: for chosen answers better than the model's own."""

    verb: ClassVar[str] = "apo_zero"
    output: str = "runs/apo_zero"
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class APODown(Precomputable):
    """Anchored preference optimisation, downwards: for chosen answers worse than the model's own."""

    verb: ClassVar[str] = "apo_down"
    output: str = "runs/apo_down"
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class DiscoPOP(Precomputable):
    """The loss that a language model discovered: logistic and exponential, mixed by how far a pair leads."""

    output: str = "runs/discopop"
    """Run folder."""
    tau: Positive = 0.2
    """Temperature of the mixture."""


@dataclass(frozen=True, kw_only=True)
class RRHF(Preference):
    """Rank responses to align: answers are put in people's order, and the best is imitated."""

    output: str = "runs/rrhf"
    """Run folder."""
    learning_rate: Positive = 2e-5
    """Peak learning rate of AdamW."""
    rank_weight: Positive = 1.0
    """Weight of the ranking loss beside the imitation of the best answer."""


@dataclass(frozen=True, kw_only=True)
class Imitating(Preference):
    """What algorithms take that have no reference, and imitate the chosen answer beside what they learn of pairs."""

    soft: ClassVar[bool] = True
    beta: Positive = 0.1
    """Scale of the log-probabilities that are compared."""
    sft_weight: NotNegative = 1.0
    """Weight of imitating the chosen answer, in nats a token."""


@dataclass(frozen=True, kw_only=True)
class CPO(Imitating):
    """Contrastive preference optimisation: DPO without a reference, and imitation of the chosen answer."""

    output: str = "runs/cpo"
    """Run folder."""
    label_smoothing: Smoothing = 0.0
    """Share of answers assumed to be the wrong way round."""


@dataclass(frozen=True, kw_only=True)
class SLiC(Imitating):
    """Sequence likelihood calibration: the hinge loss without a reference, and imitation of the chosen answer."""

    output: str = "runs/slic"
    """Run folder."""
    beta: Positive = 0.1
    """The chosen answer is to lead by 1 / beta nats."""


@dataclass(frozen=True, kw_only=True)
class ReferenceFreeIPO(Imitating):
    """IPO without a reference, on averages over the tokens of each answer, and imitation of the chosen answer."""

    verb: ClassVar[str] = "cpo_ipo"
    output: str = "runs/cpo_ipo"
    """Run folder."""
    beta: Positive = 1.0
    """IPO's tau: where all people agree, the margin that is aimed at is 1 / (2 beta) nats a token."""


@dataclass(frozen=True, kw_only=True)
class SimPO(Preference):
    """Simple preference optimisation: average log-probabilities, a margin to reach, no reference."""

    output: str = "runs/simpo"
    """Run folder."""
    beta: Positive = 2.0
    """Scale of the average log-probabilities that are compared."""
    gamma: NotNegative = 1.0
    """By how much the chosen answer's reward is to lead."""
    label_smoothing: Smoothing = 0.0
    """Share of answers assumed to be the wrong way round."""


@dataclass(frozen=True, kw_only=True)
class AlphaPO(SimPO):
    """SimPO whose reward is a power of the probability instead of its logarithm."""

    output: str = "runs/alphapo"
    """Run folder."""
    alpha: float = 0.25
    """Shape of the reward: above 0, it grows more slowly the likelier an answer is; near 0, as in SimPO; not 0."""

    def __post_init__(self) -> None:
        if self.alpha == 0:
            raise ValueError("alpha must not be 0: that is `simpo`.")


@dataclass(frozen=True, kw_only=True)
class ORPO(Preference):
    """Odds ratio preference optimisation: imitation of the chosen answer and better odds than the rejected one's."""

    output: str = "runs/orpo"
    """Run folder."""
    learning_rate: Positive = 8e-6
    """Peak learning rate of AdamW."""
    beta: Positive = 0.1
    """Weight of the odds ratio beside the imitation; the paper's lambda."""


@dataclass(frozen=True, kw_only=True)
class KTO(Referenced):
    """Kahneman-Tversky optimisation: learns from single answers that people found good or bad."""

    output: str = "runs/kto"
    """Run folder."""
    batch_size: Annotated[int, Ge(2)] = 64
    """Answers that one optimizer step sees, over all processes; the KL estimate needs at least two."""
    desirable_weight: Positive = 1.0
    """Weight of good answers."""
    undesirable_weight: Positive = 1.0
    """Weight of bad answers."""


@dataclass(frozen=True, kw_only=True)
class UnpairedAPOZero(Precomputable):
    """APO-zero of single answers that people found good or bad: good ones rise, bad ones fall."""

    verb: ClassVar[str] = "apo_zero_unpaired"
    output: str = "runs/apo_zero_unpaired"
    """Run folder."""
    desirable_weight: Positive = 1.0
    """Weight of good answers."""
    undesirable_weight: Positive = 1.0
    """Weight of bad answers."""


@dataclass(frozen=True, kw_only=True)
class BCO(Precomputable):
    """Binary classifier optimisation: the implicit reward tells good answers from bad ones."""

    output: str = "runs/bco"
    """Run folder."""
    match_prompts: bool = False
    """Weigh bad answers by how much their prompts look like those of good ones (underlying distribution matching)."""
    prompt_sample_size: Count = 1024
    """Prompts of each kind that the classifier of prompts is fitted to."""
    min_density_ratio: Positive = 0.5
    """Weights are not smaller than this."""
    max_density_ratio: Positive = 10.0
    """Weights are not larger than this."""

    def __post_init__(self) -> None:
        if self.min_density_ratio > self.max_density_ratio:
            raise ValueError(
                f"min_density_ratio ({self.min_density_ratio}) must not exceed max_density_ratio "
                f"({self.max_density_ratio})."
            )
