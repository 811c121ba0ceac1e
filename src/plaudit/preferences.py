"""Losses of learning from preferences without a reward model, as pure functions of one number for each answer. Each
returns a SUM over its units and statistics that are sums over the same units, detached, as those in `losses` do.

Where a loss has a reference, `chosen` and `rejected` are (P,) log-ratios, log pi(answer) - log pi_ref(answer), of P
pairs, summed over the tokens of an answer unless said otherwise. `preference` p, one number or (P,), is the share of
people who prefer `chosen`: 1 as a rule, 1/2 for a tie. Where a loss takes it, the loss is what is expected of a person
drawn at random, or the paper's own soft form.

The statistics of pairs: chosen_reward and rejected_reward, the implicit rewards beta * log-ratio of the side that
people preferred and of the other (of a tie, both their mean); margin, by how much the preferred side leads; accuracy,
whether it does (1/2 where either knows no difference).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Stats = dict[str, Tensor]
Preferred = float | Tensor


# -------------------------------------------------------------------------------------- pairs, beside a reference


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    preference: Preferred = 1.0,
    label_smoothing: float = 0.0,
    weight: float | Tensor = 1.0,
) -> tuple[Tensor, Stats]:
    """-w [t log sigmoid(beta h) + (1 - t) log sigmoid(-beta h)] of every pair, h = chosen - rejected.

    t = p (1 - e) + (1 - p) e for a share e = label_smoothing of answers that are the wrong way round. Rafailov et al.
    2023 (arXiv:2305.18290), eq. 7; e > 0 is the conservative DPO of Mitchell 2023, "A note on DPO with noisy
    preferences & relationship to IPO". The optimum for preferences by Bradley-Terry is pi_ref exp(r / beta) / Z.
    weight w, one number or (P,), to which nothing flows: 1, or as in Zhou et al. 2024 (WPO, arXiv:2406.11827), eq. 2.
    """
    loss = _kept(weight) * logistic(beta * (chosen - rejected), smoothed(preference, label_smoothing))
    return loss.sum(), pair_figures(beta * chosen, beta * rejected, preference)


def divergence_slope(ratios: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """f'(u) of the divergence E_ref[f(u)], u = pi / pi_ref, up to a constant: what takes the place of log u in `dpo`.

    ratios: log u. jensen_shannon: log(2 u / (1 + u)); forward_kl: 1 - 1 / u; alpha: (1 - u^-alpha) / alpha, which is
    log u for alpha -> 0, the reverse KL, and the forward KL for 1. Wang et al. 2023 (f-DPO, arXiv:2309.16240), table 1.
    """
    if divergence == "jensen_shannon":
        return math.log(2) + logsigmoid(ratios)
    alpha = 1.0 if divergence == "forward_kl" else alpha
    # Far below the reference no float would hold it: from e^20 on it goes on straight.
    fall = -alpha * ratios
    straight = math.expm1(20) + math.exp(20) * (fall - 20)
    return -torch.where(fall > 20, straight, torch.expm1(fall.clamp(max=20))) / alpha


def robust_dpo(
    chosen: Tensor, rejected: Tensor, beta: float, preference: Preferred = 1.0, label_smoothing: float = 0.0
) -> tuple[Tensor, Stats]:
    """[(1 - e) l(h) - e l(-h)] / (1 - 2 e) with l(h) = -log sigmoid(beta h), of every pair, e = label_smoothing.

    Where a share e < 1/2 of the answers was flipped, its expectation is the loss of DPO on the unflipped ones.
    Chowdhury et al. 2024 (arXiv:2403.00409), section 3.
    """
    unflipped = (preference - label_smoothing) / (1 - 2 * label_smoothing)
    loss = logistic(beta * (chosen - rejected), unflipped)
    return loss.sum(), pair_figures(beta * chosen, beta * rejected, preference)


def ipo(chosen: Tensor, rejected: Tensor, beta: float, preference: Preferred = 1.0) -> tuple[Tensor, Stats]:
    """p (h - 1 / (2 beta))^2 + (1 - p) (h + 1 / (2 beta))^2 of every pair, h = chosen - rejected.

    Azar et al. 2023 (arXiv:2310.12036), eq. 17, whose tau is beta; the optimum is h = (2 p - 1) / (2 beta). On sums
    over tokens this is the paper's formula; on averages over the tokens of each answer, TRL's.
    """
    lead, goal = chosen - rejected, 1 / (2 * beta)
    loss = preference * (lead - goal).square() + (1 - preference) * (lead + goal).square()
    return loss.sum(), pair_figures(beta * chosen, beta * rejected, preference)


def hinge(chosen: Tensor, rejected: Tensor, beta: float, preference: Preferred = 1.0) -> tuple[Tensor, Stats]:
    """p max(0, 1 - beta h) + (1 - p) max(0, 1 + beta h) of every pair, h = chosen - rejected.

    Zhao et al. 2023 (SLiC-HF, arXiv:2305.10425), on log-ratios as in Liu et al. 2023 (RSO, arXiv:2309.06657).
    """
    lead = beta * (chosen - rejected)
    loss = preference * torch.relu(1 - lead) + (1 - preference) * torch.relu(1 + lead)
    return loss.sum(), pair_figures(beta * chosen, beta * rejected, preference)


def exo(
    chosen: Tensor, rejected: Tensor, beta: float, preference: Preferred = 1.0, label_smoothing: float = 1e-3
) -> tuple[Tensor, Stats]:
    """KL((q, 1 - q) || (t, 1 - t)) of every pair: q = sigmoid(beta h), t as in `dpo`, e = label_smoothing > 0.

    Ji et al. 2024 (EXO, arXiv:2402.00856), eq. 16: the divergence in the direction opposite to that of DPO.
    """
    lead = beta * (chosen - rejected)
    # Not as one minus the other, of which little would be left where one is nearly 1.
    target, rest = (_log(smoothed(share, label_smoothing)) for share in (preference, 1 - preference))
    won = torch.sigmoid(lead) * (logsigmoid(lead) - target)
    lost = torch.sigmoid(-lead) * (logsigmoid(-lead) - rest)
    return (won + lost).sum(), pair_figures(beta * chosen, beta * rejected, preference)


def nca(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, Stats]:
    """-log sigmoid(c) - [log sigmoid(-c) + log sigmoid(-r)] / 2 of every pair, c and r the rewards beta * log-ratio.

    Chen et al. 2024 (NCA, arXiv:2402.05369), for two answers of which people chose one.
    """
    good, bad = beta * chosen, beta * rejected
    loss = -logsigmoid(good) - 0.5 * (logsigmoid(-good) + logsigmoid(-bad))
    return loss.sum(), pair_figures(good, bad)


def sppo(chosen: Tensor, rejected: Tensor, beta: float, preference: Preferred = 1.0) -> tuple[Tensor, Stats]:
    """(chosen - (p - 1/2) / beta)^2 + (rejected - (1/2 - p) / beta)^2 of every pair.

    Wu et al. 2024 (SPPO, arXiv:2405.00675), eq. 4.7, whose eta is 1 / beta; p = 1 is the hard form.
    """
    goal = (preference - 0.5) / beta
    loss = (chosen - goal).square() + (rejected + goal).square()
    return loss.sum(), pair_figures(beta * chosen, beta * rejected, preference)


def aot(margins: Tensor, reference: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """(P,) the loss of dpo at the lead of each margin over the reference margin of its own rank.

    margins, reference (P,): log pi(chosen) - log pi(rejected) of the policy and of the reference. Both are sorted, and
    the k-th of one meets the k-th of the other, so the loss of a pair depends on all pairs. Melnyk et al. 2024 (AOT,
    arXiv:2406.05882), the paired form.
    """
    ordered, order = margins.sort()
    losses = logistic(beta * (ordered - reference.sort().values), 1 - label_smoothing)
    return torch.zeros_like(losses).scatter(0, order, losses)


def aot_unpaired(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """(P,) the loss of dpo at the lead of each chosen answer over the rejected answer of its own rank.

    chosen, rejected (P,) log-ratios. Both are sorted, and the k-th of one meets the k-th of the other, whichever
    prompts they answer. Melnyk et al. 2024 (AOT, arXiv:2406.05882), the unpaired form.
    """
    ordered, order = chosen.sort()
    losses = logistic(beta * (ordered - rejected.sort().values), 1 - label_smoothing)
    return torch.zeros_like(losses).scatter(0, order, losses)


def bco_pair(chosen: Tensor, rejected: Tensor, beta: float, baseline: float | Tensor) -> tuple[Tensor, Stats]:
    """-log sigmoid(c - d) - log sigmoid(d - r) of every pair, c and r the rewards beta * log-ratio: `bco` of both.

    baseline d, one number or (P,): the running mean of all rewards, to which nothing flows. Jung et al. 2024 (BCO,
    arXiv:2404.04656), with the reward shift.
    """
    good, bad, middle = beta * chosen, beta * rejected, _kept(baseline)
    return -(logsigmoid(good - middle) + logsigmoid(middle - bad)).sum(), pair_figures(good, bad)


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, Stats]:
    """1 - sigmoid(c) + sigmoid(r) of every pair, c and r the rewards beta * log-ratio: chosen answers rise, rejected
    ones fall. D'Oosterlinck et al. 2024 (APO, arXiv:2408.06266), eq. 7."""
    good, bad = beta * chosen, beta * rejected
    return (torch.sigmoid(-good) + torch.sigmoid(bad)).sum(), pair_figures(good, bad)


def apo_down(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, Stats]:
    """sigmoid(c) + 1 - sigmoid(c - r) of every pair, c and r the rewards beta * log-ratio: both fall, rejected answers
    further. D'Oosterlinck et al. 2024 (APO, arXiv:2408.06266), eq. 8."""
    good, bad = beta * chosen, beta * rejected
    return (torch.sigmoid(good) + torch.sigmoid(bad - good)).sum(), pair_figures(good, bad)


def discopop(chosen: Tensor, rejected: Tensor, beta: float, tau: float = 0.05) -> tuple[Tensor, Stats]:
    """(1 - m) * -log sigmoid(x) + m exp(-x) of every pair, x = beta h and m = sigmoid(x / tau).

    Lu et al. 2024 (DiscoPOP, arXiv:2406.08414), eq. 5.
    """
    lead = beta * (chosen - rejected)
    mixture = torch.sigmoid(lead / tau)
    # exp(-x) m as one exponential: far behind, the first factor is infinite and the second 0.
    loss = -logsigmoid(lead) * (1 - mixture) + torch.exp(logsigmoid(lead / tau) - lead)
    return loss.sum(), pair_figures(beta * chosen, beta * rejected)


# ------------------------------------------------------------------------------------- answers without a reference


def cpo(
    chosen: Tensor, rejected: Tensor, beta: float, preference: Preferred = 1.0, label_smoothing: float = 0.0
) -> tuple[Tensor, Stats]:
    """The loss of `dpo` on log pi itself, summed over tokens: what is left of it under a uniform reference.

    Xu et al. 2024 (CPO, arXiv:2401.08417), eq. 3; imitation of the chosen answer is added where it is trained.
    """
    return dpo(chosen, rejected, beta, preference, label_smoothing)


def simpo(
    chosen: Tensor, rejected: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Stats]:
    """-[(1 - e) log sigmoid(x) + e log sigmoid(-x)] of every pair, x = beta h - gamma, e = label_smoothing.

    h = chosen - rejected, of log pi averaged over the tokens of each answer. Meng et al. 2024 (SimPO,
    arXiv:2405.14734), eq. 6, where e is 0.
    """
    loss = logistic(beta * (chosen - rejected) - gamma, 1 - label_smoothing)
    return loss.sum(), pair_figures(beta * chosen, beta * rejected)


def alphapo(
    chosen: Tensor, rejected: Tensor, beta: float, gamma: float, alpha: float, label_smoothing: float = 0.0
) -> tuple[Tensor, Stats]:
    """The loss of `simpo` on (1 - P^-alpha) / alpha in the place of log P, whose limit it is for alpha = 0.

    chosen, rejected: log P, that is log pi averaged over the tokens of each answer; alpha is not 0. Gupta et al. 2025
    (AlphaPO, arXiv:2501.03884).
    """
    good, bad = (-torch.expm1(-alpha * side) / alpha for side in (chosen, rejected))
    return simpo(good, bad, beta, gamma, label_smoothing)


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> tuple[Tensor, Stats]:
    """-chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)) of every pair, odds = P / (1 - P).

    chosen, rejected: log pi averaged over the tokens of each answer, log P < 0. Hong et al. 2024 (ORPO,
    arXiv:2403.07691), eqs. 4 to 7.
    """
    log_odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    loss = -chosen - beta * logsigmoid(log_odds)
    return loss.sum(), pair_figures(beta * chosen, beta * rejected)


def rrhf(averages: Tensor, totals: Tensor, ranks: Tensor, groups: Tensor, rank_weight: float) -> tuple[Tensor, Stats]:
    """w * sum of max(0, a_j - a_i) over all i ranked above j, minus the log-probability of the best answer, of every
    group, w = rank_weight. The unit is a group.

    averages, totals (B,): log pi of each answer, averaged and summed over its tokens. ranks (B,): 1 the best. groups
    (B,): which answers belong to one prompt. Best answers that tie share the imitation. Yuan et al. 2023 (RRHF,
    arXiv:2304.05302), eqs. 1 to 4.

    Statistics: accuracy and margin over the ordered pairs of each group.
    """
    same = groups[:, None] == groups[None, :]
    above = same & (ranks[:, None] < ranks[None, :])
    lead = averages[:, None] - averages[None, :]
    wrong = torch.where(above, torch.relu(-lead), torch.zeros_like(lead)).sum()
    best = ~above.any(0)
    share = best / (same & best[None, :]).sum(1).to(lead.dtype)
    loss = rank_weight * wrong - (share * totals).sum()
    with torch.autocast(lead.device.type, enabled=False):  # counts, which bfloat16 would round
        part = above / (same.to(lead.dtype) @ above.sum(1).to(lead.dtype)).clamp(min=1)[:, None]
    right = (1 + torch.sign(lead.detach())) / 2
    return loss, {"accuracy": (part * right).sum(), "margin": (part * lead.detach()).sum()}


# ------------------------------------------------------------------------------------------------- single answers


def kto(
    ratios: Tensor,
    desirable: Tensor,
    baseline: float | Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Stats]:
    """w (1 - sigmoid(+-beta (ratio - z))) of every answer, + and - for good and bad ones. The unit is an answer.

    ratios (B,) log-ratios; desirable (B,) bool; baseline z, one number or (B,): the estimate of KL(pi || pi_ref), no
    less than 0, to which nothing flows; w one of the two weights. Ethayarajh et al. 2024 (KTO, arXiv:2402.01306),
    eq. 7.

    Statistics: accuracy (the ratio lies on its side of z; 1/2 where it is z), margin (beta times how far).
    """
    weight = torch.where(desirable, ratios.new_tensor(desirable_weight), ratios.new_tensor(undesirable_weight))
    lead = beta * _sides(desirable, ratios) * (ratios - _kept(baseline))
    return (weight * torch.sigmoid(-lead)).sum(), _single_figures(lead)


def bco(
    ratios: Tensor, desirable: Tensor, baseline: float | Tensor, beta: float, weight: float | Tensor = 1.0
) -> tuple[Tensor, Stats]:
    """-w log sigmoid(+-(beta ratio - d)) of every answer, + and - for good and bad ones. The unit is an answer.

    ratios (B,) log-ratios; desirable (B,) bool; baseline d, one number or (B,): the running mean of all rewards; weight
    w, one number or (B,): see `density_ratios`. Nothing flows to either. Jung et al. 2024 (BCO, arXiv:2404.04656),
    with the reward shift.

    Statistics: as of `kto`, against d.
    """
    lead = _sides(desirable, ratios) * (beta * ratios - _kept(baseline))
    return -(_kept(weight) * logsigmoid(lead)).sum(), _single_figures(lead)


def density_ratios(good: Tensor, bad: Tensor, asked: Tensor, low: float, high: float) -> Tensor:
    """(M,) clip(P / (1 - P), low, high), P the chance that a prompt is one of a good answer, by logistic regression.

    good (G, d), bad (N, d): embeddings of prompts of either kind, to fit to; asked (M, d): those to weigh. Both kinds
    count the same in the fit however many they are; its coefficients, not its constant, are held by a penalty of half
    their squared norm. The underlying distribution matching of Jung et al. 2024 (BCO, arXiv:2404.04656).
    """
    from scipy.optimize import minimize

    points = torch.cat([good, bad]).double().cpu().numpy()
    labels = np.r_[np.ones(len(good)), np.zeros(len(bad))]
    share = np.where(labels == 1, len(labels) / (2 * len(good)), len(labels) / (2 * len(bad)))

    def cost(w: np.ndarray) -> tuple[float, np.ndarray]:
        lead = points @ w[:-1] + w[-1]
        error = share * (1 / (1 + np.exp(-np.clip(lead, -500, 500))) - labels)
        value = float(share @ (np.logaddexp(0, lead) - labels * lead)) + 0.5 * float(w[:-1] @ w[:-1])
        return value, np.r_[points.T @ error + w[:-1], error.sum()]

    found = minimize(cost, np.zeros(points.shape[1] + 1), jac=True, method="L-BFGS-B", options={"ftol": 1e-14})
    lead = asked.double().cpu() @ torch.from_numpy(found.x[:-1]) + found.x[-1]
    ratios: Tensor = lead.exp().clamp(low, high)
    return ratios.to(asked)


# ------------------------------------------------------------------------------------------------------- in common


def logistic(lead: Tensor, target: Preferred) -> Tensor:
    """-[t log sigmoid(lead) + (1 - t) log sigmoid(-lead)], of the shape of lead."""
    return -(target * logsigmoid(lead) + (1 - target) * logsigmoid(-lead))


def smoothed(preference: Preferred, label_smoothing: float) -> Preferred:
    """The preference that is seen where a share `label_smoothing` of answers is the wrong way round."""
    return preference * (1 - label_smoothing) + (1 - preference) * label_smoothing


def pair_figures(chosen: Tensor, rejected: Tensor, preference: Preferred = 1.0) -> Stats:
    """The statistics of pairs, from the rewards (P,) of both sides."""
    chosen, rejected = chosen.detach(), rejected.detach()
    lead = chosen - rejected
    side = torch.sign(torch.as_tensor(preference, dtype=lead.dtype, device=lead.device).expand_as(lead) - 0.5)
    half, middle = lead * side / 2, (chosen + rejected) / 2
    return {
        "accuracy": ((1 + torch.sign(lead) * side) / 2).sum(),
        "margin": (lead * side).sum(),
        "chosen_reward": (middle + half).sum(),
        "rejected_reward": (middle - half).sum(),
    }


def _single_figures(lead: Tensor) -> Stats:
    lead = lead.detach()
    return {"accuracy": ((1 + torch.sign(lead)) / 2).sum(), "margin": lead.sum()}


def _sides(desirable: Tensor, like: Tensor) -> Tensor:
    return torch.where(desirable, 1.0, -1.0).to(like.dtype)


def _kept(value: float | Tensor) -> float | Tensor:
    return value.detach() if isinstance(value, Tensor) else value


def _log(value: float | Tensor) -> float | Tensor:
    return torch.log(value) if isinstance(value, Tensor) else math.log(value)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends; a probability of 1 counts as the largest number below it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    # The branch that is not taken must be finite too, or its gradient is 0 * inf.
    close, far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-torch.exp(far)))
