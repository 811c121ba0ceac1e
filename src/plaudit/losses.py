"""Losses as pure functions of tensors. Each returns a SUM over its units and statistics that are sums over the same
units, detached; the trainer divides all of them once by the number of units."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from plaudit.numerics import masked_sum

Stats = dict[str, Tensor]


def nll(logprobs: Tensor, actions: Tensor) -> tuple[Tensor, Stats]:
    """-log pi of every action: logprobs (B, T), actions (B, T) bool. The unit is a token."""
    return -masked_sum(logprobs, actions), {}


# ---------------------------------------------------------------------------------------------- what people preferred


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    preference: float | Tensor = 1.0,
    margin: float | Tensor = 0.0,
    noise: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """-[p log P(d - m) + (1 - p) log P(-d - m)] of every pair, where d = chosen - rejected. The unit is a pair, or
    `weight` (P,) of one.

    chosen, rejected (P,) scores. preference p, one number or (P,): 1 where the first was preferred, 1/2 for a tie,
    between them where people differed. margin m >= 0, one number or (P,): by how much either side must lead to
    earn its share, so swapping the two and p with 1 - p changes nothing. P(x) = (1 - noise) sigmoid(x) + noise / 2:
    people who answer at random with probability `noise` (Christiano et al. 2017, arXiv:1706.03741, section 2.2.3,
    take 0.1). Bradley & Terry 1952; soft labels as in Christiano et al., eq. 1; margins as in Touvron et al. 2023
    (arXiv:2307.09288), eq. 2.

    Statistics: accuracy (the side that people preferred leads; 1/2 where either knows no difference), margin (by how
    much it leads; 0 for ties).
    """
    lead = chosen - rejected
    preferred = torch.as_tensor(preference, dtype=lead.dtype, device=lead.device).expand_as(lead)
    share = torch.ones_like(lead) if weight is None else weight.to(lead.dtype)
    won, lost = _log_preferred(lead - margin, noise), _log_preferred(-lead - margin, noise)
    loss = -(share * (preferred * won + (1 - preferred) * lost)).sum()
    return loss, _agreement(lead, preferred, share)


def all_pairs(scores: Tensor, preference: Tensor, weight: Tensor, noise: float = 0.0) -> tuple[Tensor, Stats]:
    """`bradley_terry` over all pairs i < j of K scores: scores (K,), preference (K, K), weight (K, K).

    preference[i, j] says how far i is preferred to j; weight[i, j] is 0 for what was not compared. Only what lies
    above the diagonal is read, and a preference only where its weight is not 0. The unit is a weight. Ouyang et al.
    2022 (arXiv:2203.02155), eq. 1, where all pairs of a prompt share one unit: weight 1 / (k choose 2).
    """
    lead = scores[:, None] - scores[None, :]
    share = weight.to(lead.dtype).triu(1)
    preferred = torch.where(share != 0, preference.to(lead.dtype), torch.zeros_like(lead))
    # The log-probability that j beats i stands at (j, i): one matrix serves both sides of every pair.
    sides = share * preferred + (share * (1 - preferred)).t()
    return -(sides * _log_preferred(lead, noise)).sum(), _agreement(lead, preferred, share)


def plackett_luce(scores: Tensor, ranks: Tensor, mask: Tensor) -> tuple[Tensor, Stats]:
    """-log probability of whole rankings, of G groups of at most K: scores, ranks, mask (G, K). The unit is a group.

    ranks: smaller is better; mask: True for what was ranked. Items are drawn best first, each with a probability
    proportional to exp(score) among those not yet drawn (Plackett 1975; Luce 1959). Items of one rank are treated
    as Breslow 1974 treats ties: each is drawn from all that are not better than it, so for tied items this is an
    approximation, and for strict orders it is exact.

    Statistics: accuracy (the item with the highest score has the best rank).
    """
    among = mask[:, None, :] & (ranks[:, None, :] >= ranks[:, :, None])
    partition = torch.where(among, scores[:, None, :], -torch.inf).logsumexp(2)
    first = scores.detach().masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)
    worse_first = (mask & (ranks < ranks.gather(1, first))).any(1)
    accuracy = (mask.any(1) & ~worse_first).sum().to(scores.dtype)
    return masked_sum(partition - scores, mask), {"accuracy": accuracy}


def best_of(scores: Tensor, best: Tensor, mask: Tensor) -> tuple[Tensor, Stats]:
    """-log of the chance that one of the best is picked, of G groups of at most K: scores, best, mask (G, K). The unit
    is a group.

    best: True for what people chose; mask: True for what they chose from. An item is picked with a probability
    proportional to exp(score): Ziegler et al. 2019 (arXiv:1909.08593), eq. 1, where one of K is the best. Several that
    share first place count as one another's equals, and a group in which all do costs nothing.

    Statistics: accuracy (the item with the highest score is among the best).
    """
    everything = torch.where(mask, scores, -torch.inf).logsumexp(1)
    chosen = torch.where(mask & best, scores, -torch.inf).logsumexp(1)
    some = (mask & best).any(1)
    first = scores.detach().masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)
    accuracy = ((mask & best).gather(1, first).squeeze(1)).sum().to(scores.dtype)
    return masked_sum(everything - chosen, some), {"accuracy": accuracy}


def squared_error(scores: Tensor, targets: Tensor) -> tuple[Tensor, Stats]:
    """(score - target)^2 of every text: scores, targets (B,). The unit is a text."""
    return (scores - targets.to(scores.dtype)).square().sum(), {}


def _log_preferred(lead: Tensor, noise: float) -> Tensor:
    if noise == 0:
        return logsigmoid(lead)
    return torch.log((1 - noise) * torch.sigmoid(lead) + noise / 2)


def _agreement(lead: Tensor, preferred: Tensor, share: Tensor) -> Stats:
    lead, side = lead.detach(), torch.sign(preferred - 0.5)
    right = (1 + torch.sign(lead) * side) / 2
    return {"accuracy": (share * right).sum(), "margin": (share * lead * side).sum()}


# -------------------------------------------------------------------------------------------------- policy gradients


def reinforce(
    logprobs: Tensor, advantages: Tensor, actions: Tensor, share: Tensor | None = None
) -> tuple[Tensor, Stats]:
    """-A log pi of every action. All tensors (B, T); nothing flows to advantages. The unit is a token, or `share`
    (B, T) of one. Williams 1992, REINFORCE."""
    gain = torch.where(actions, advantages.detach().to(logprobs.dtype), torch.zeros_like(logprobs))
    return -_weighed(torch.where(actions, logprobs, torch.zeros_like(logprobs)) * gain, share), {}


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    actions: Tensor,
    clip: float | tuple[float, float],
    *,
    dual_clip: float = 0.0,
    share: Tensor | None = None,
    counted: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) of every action, ratio = pi / pi_old. The unit is a token, or
    `share` (B, T) of one.

    All tensors (B, T); clip is `low` and `high`, or one number for both. Nothing flows to old_logprobs or advantages.
    Schulman et al. 2017 (arXiv:1707.06347), eq. 7. With `dual_clip` c > 1 an action of negative advantage loses at most
    c * |A|: Ye et al. 2020 (arXiv:1912.09729), dual-clip PPO.

    Statistics, in which an action counts as `counted` (B, T) says, by default as its share: ratio, clip_fraction
    (actions that the clip leaves without a gradient), approx_kl (k3 of KL(pi_old || pi), see `advantages.kl_k3`).
    """
    log_ratio, gain = _moved(logprobs, old_logprobs, advantages, actions)
    ratio = log_ratio.exp()
    return _clipped(ratio, gain, log_ratio, actions, clip, dual_clip, share, counted)


def sequence_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    actions: Tensor,
    clip: float | tuple[float, float],
    *,
    mean: bool,
    share: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """`clipped_surrogate` of whole sequences. The unit is a sequence, or `share` (B,) of one; rows without actions are
    none.

    logprobs, old_logprobs (B, T), advantages (B, T) equal within a row. The ratio of a sequence is the product of its
    tokens' ratios, or with `mean` their geometric mean: Zheng et al. 2025 (arXiv:2507.18071), eq. 7.

    Statistics: ratio and clip_fraction of sequences, approx_kl as the mean over a sequence's tokens.
    """
    log_ratio, gain = _moved(logprobs, old_logprobs, advantages, actions)
    lengths = actions.sum(1).clamp(min=1)
    whole = log_ratio.sum(1) / lengths if mean else log_ratio.sum(1)
    # A long sequence can move by more than a float holds; behind a clip, infinity times 0 would still be NaN.
    whole = whole.clamp(-20, 20)
    some = actions.any(1)
    counted = some.to(whole.dtype)
    loss, stats = _clipped(whole.exp(), gain.sum(1) / lengths, whole, some, clip, share=share, counted=counted)
    near = log_ratio.detach()
    return loss, stats | {"approx_kl": ((torch.expm1(near) - near).sum(1) / lengths).sum()}


def geometric_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, actions: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Stats]:
    """-A * exp(mean of the clipped log-ratios of its tokens) of every sequence. The unit is a sequence; rows without
    actions are none.

    logprobs, old_logprobs (B, T), advantages (B, T) equal within a row. A token's log-ratio is cut at -low where A < 0
    and at `high` where A > 0, on the side where going on would pay. Zhao et al. 2025 (GMPO, arXiv:2507.20673), eq. 4.

    Statistics: ratio of sequences; clip_fraction (tokens without a gradient) and approx_kl, as means over a sequence's
    tokens.
    """
    low, high = clip
    log_ratio, gain = _moved(logprobs, old_logprobs, advantages, actions)
    lengths = actions.sum(1).clamp(min=1)
    held = torch.where(gain > 0, log_ratio.clamp(max=high), log_ratio.clamp(min=-low))
    ratio = (held.sum(1) / lengths).clamp(-20, 20).exp()
    near = log_ratio.detach()
    stats = {
        "ratio": (ratio.detach() * actions.any(1)).sum(),
        "clip_fraction": ((held != log_ratio).sum(1) / lengths).sum(),
        "approx_kl": ((torch.expm1(near) - near).sum(1) / lengths).sum(),
    }
    return -(ratio * gain.sum(1) / lengths).sum(), stats


def clipped_weight(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    actions: Tensor,
    clip: float | tuple[float, float],
) -> tuple[Tensor, Stats]:
    """-clip(ratio, 1 - low, 1 + high) * A * log pi of every action, the clipped ratio being a mere weight: no action
    loses its gradient. All tensors (B, T). The unit is a token. MiniMax 2025 (arXiv:2506.13585), eq. 4 and 5.

    Statistics: ratio, clip_fraction (actions whose weight is clipped), approx_kl.
    """
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    log_ratio, gain = _moved(logprobs, old_logprobs, advantages, actions)
    ratio = log_ratio.detach().exp()
    weight = ratio.clamp(1 - low, 1 + high)
    chosen = torch.where(actions, logprobs, torch.zeros_like(logprobs))
    stats = {
        "ratio": masked_sum(ratio, actions),
        "clip_fraction": ((weight != ratio) & actions).sum().to(logprobs.dtype),
        "approx_kl": (torch.expm1(log_ratio.detach()) - log_ratio.detach()).sum(),
    }
    return -(weight * gain * chosen).sum(), stats


def soft_gate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    actions: Tensor,
    temperatures: tuple[float, float],
    share: Tensor,
    counted: Tensor,
) -> tuple[Tensor, Stats]:
    """-(4 / t) sigmoid(t (ratio - 1)) * A of every action, t the first of `temperatures` where A > 0, else the second.
    All tensors (B, T); the unit is `share` of an action. The slope to log pi is A where the ratio is 1, and fades on
    either side of it. Qwen 2025 (SAPO, arXiv:2511.20347), eq. 5 to 7.

    Statistics, in which an action counts as `counted` says: ratio, approx_kl.
    """
    log_ratio, gain = _moved(logprobs, old_logprobs, advantages, actions)
    ratio = log_ratio.exp()
    temperature = _by_side(gain > 0, *temperatures, like=ratio)
    gate = 4 / temperature * torch.sigmoid(temperature * (ratio - 1))
    near = log_ratio.detach()
    stats = {"ratio": (near.exp() * counted).sum(), "approx_kl": ((torch.expm1(near) - near) * counted).sum()}
    return -(gate * gain * share).sum(), stats


def gamma_weight(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    actions: Tensor,
    good: tuple[float, float],
    bad: tuple[float, float],
) -> tuple[Tensor, Stats]:
    """-w^k exp(l - l w) * A * log pi of every action, w the ratio of its whole sequence, through which nothing flows,
    and (k, l) = `good` where A >= 0, else `bad`. All (B, T); advantages equal within a row. The unit is a token.

    The weight is 1 where w is, and vanishes at either end. VESPO 2026 (arXiv:2602.10693).

    Statistics: ratio (of an action's sequence), approx_kl.
    """
    log_ratio, gain = _moved(logprobs, old_logprobs, advantages, actions)
    near = log_ratio.detach()
    # Beyond these bounds either weight is 0 to all intents; within them none of its parts is infinite.
    whole = near.sum(1, keepdim=True).clamp(-20, 20)
    power, decay = (_by_side(gain >= 0, *both, like=gain) for both in zip(good, bad, strict=True))
    weight = torch.exp(decay + power * whole - decay * whole.exp())
    chosen = torch.where(actions, logprobs, torch.zeros_like(logprobs))
    stats = {"ratio": (whole.exp() * actions).sum(), "approx_kl": (torch.expm1(near) - near).sum()}
    return -(weight * gain * chosen).sum(), stats


def _by_side(good: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    return torch.where(good, like.new_tensor(one), like.new_tensor(other))


def _moved(logprobs: Tensor, old: Tensor, advantages: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) log ratios and advantages, both 0 outside actions."""
    nothing = torch.zeros_like(logprobs)
    log_ratio = torch.where(actions, logprobs - old.detach(), nothing)
    return log_ratio, torch.where(actions, advantages.detach().to(logprobs.dtype), nothing)


def _clipped(
    ratio: Tensor,
    gain: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    clip: float | tuple[float, float],
    dual_clip: float = 0.0,
    share: Tensor | None = None,
    counted: Tensor | None = None,
) -> tuple[Tensor, Stats]:
    """The clipped objective of anything that has a ratio: tokens or sequences."""
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    counted = share if counted is None else counted
    free = ratio * gain
    bound = torch.minimum(free, ratio.clamp(1 - low, 1 + high) * gain)
    if dual_clip:
        bound = torch.where(gain < 0, torch.maximum(bound, dual_clip * gain), bound)
    near = log_ratio.detach()
    stats = {
        "ratio": _weighed(torch.where(mask, ratio.detach(), torch.zeros_like(near)), counted),
        "clip_fraction": _weighed((bound != free).to(near.dtype), counted),
        "approx_kl": _weighed(torch.expm1(near) - near, counted),
    }
    return -_weighed(bound, share), stats


def _weighed(values: Tensor, share: Tensor | None) -> Tensor:
    return (values if share is None else values * share).sum()


def clipped_value(
    values: Tensor, old_values: Tensor, returns: Tensor, actions: Tensor, clip: float
) -> tuple[Tensor, Stats]:
    """max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2) / 2 of every action. The unit is a token.

    All tensors (B, T). Nothing flows to old_values or returns. The value clipping of Schulman et al.'s code, see
    Huang et al. 2022, "The 37 implementation details of PPO", detail 9.

    Statistics: value_clip_fraction (actions that the clip leaves without a gradient).
    """
    old, target = old_values.detach(), returns.detach()
    nothing = torch.zeros_like(values)
    free = torch.where(actions, values - target, nothing).square()
    held = torch.where(actions, old + (values - old).clamp(-clip, clip) - target, nothing).square()
    return 0.5 * torch.maximum(free, held).sum(), {"value_clip_fraction": (held > free).sum().to(values.dtype)}
