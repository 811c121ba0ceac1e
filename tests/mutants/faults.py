"""Seeded faults, each a small and likely mistake, and the tests that ought to notice those of each file."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """`old`, which stands once in `file` (below src/plaudit), becomes `new`."""

    name: str
    file: str
    old: str
    new: str


UNIT, RUNS = "tests/unit/", "tests/algorithms/"
TESTS: dict[str, tuple[str, ...]] = {
    "losses.py": (UNIT + "test_losses.py", UNIT + "test_policy_losses.py"),
    "advantages.py": (UNIT + "test_advantages.py", UNIT + "test_group_advantages.py"),
    "numerics.py": (UNIT + "test_numerics.py",),
    "batch.py": (UNIT + "test_batch.py",),
    "policy.py": (UNIT + "test_policy.py", UNIT + "test_heads.py"),
    "preferences.py": (UNIT + "test_preferences.py",),
    "offline_losses.py": (UNIT + "test_offline_losses.py",),
    "heads.py": (UNIT + "test_heads.py",),
    "decoding.py": (UNIT + "test_sampler.py",),
    "trainer.py": (UNIT + "test_trainer.py", RUNS + "test_invariances.py", RUNS + "test_sft.py"),
    "rewards.py": (UNIT + "test_rewards.py",),
    "pairing.py": (UNIT + "test_pairing.py",),
    "reference.py": (RUNS + "test_preference.py",),
    "algorithms/sft.py": (RUNS + "test_sft.py",),
    "algorithms/online.py": (RUNS + "test_online.py",),
    "algorithms/ilql.py": (RUNS + "test_ilql.py",),
    "algorithms/on_policy.py": (RUNS + "test_ppo.py",),
    "algorithms/policy_gradient.py": (
        RUNS + "test_tabular.py",
        RUNS + "test_policy_gradient_credit.py",
        RUNS + "test_policy_gradient.py",
    ),
    "algorithms/ppo.py": (RUNS + "test_ppo.py",),
    "algorithms/preference.py": (RUNS + "test_preference_objectives.py", RUNS + "test_preference.py"),
    "algorithms/reward.py": (RUNS + "test_reward.py",),
    "algorithms/unpaired.py": (RUNS + "test_preference.py",),
    "algorithms/reward_objectives.py": (RUNS + "test_reward_objectives.py",),
    "seq2seq.py": (UNIT + "test_seq2seq.py",),
    "attention.py": (UNIT + "test_attention.py",),
    "layers.py": (UNIT + "test_layers.py",),
    "layout.py": (UNIT + "test_layout.py",),
    "fused.py": (UNIT + "test_fused.py",),
    "slots.py": (UNIT + "test_slots.py", UNIT + "test_sampler.py"),
}

FAULTS = [
    # ------------------------------------------------------------------------------------------------------- losses
    Fault(
        "nll rewards unlikely tokens",
        "losses.py",
        "return -masked_sum(logprobs, actions), {}",
        "return masked_sum(logprobs, actions), {}",
    ),
    Fault(
        "preferred answers swapped",
        "losses.py",
        "lead = chosen - rejected\n    preferred",
        "lead = rejected - chosen\n    preferred",
    ),
    Fault(
        "margin added to the lead",
        "losses.py",
        "_log_preferred(lead - margin, noise)",
        "_log_preferred(lead + margin, noise)",
    ),
    Fault(
        "margin on one side only",
        "losses.py",
        "_log_preferred(-lead - margin, noise)",
        "_log_preferred(-lead + margin, noise)",
    ),
    Fault("noise counted twice", "losses.py", "torch.sigmoid(lead) + noise / 2)", "torch.sigmoid(lead) + noise)"),
    Fault(
        "soft labels ignored",
        "losses.py",
        "(share * (preferred * won + (1 - preferred) * lost)).sum()",
        "(share * won).sum()",
    ),
    Fault(
        "a mean of pairs for their sum",
        "losses.py",
        "loss = -(share * (preferred * won + (1 - preferred) * lost)).sum()",
        "loss = -(share * (preferred * won + (1 - preferred) * lost)).mean()",
    ),
    Fault(
        "the lower triangle of pairs too",
        "losses.py",
        "share = weight.to(lead.dtype).triu(1)",
        "share = weight.to(lead.dtype)",
    ),
    Fault(
        "drawn from those that are better",
        "losses.py",
        "(ranks[:, None, :] >= ranks[:, :, None])",
        "(ranks[:, None, :] <= ranks[:, :, None])",
    ),
    Fault(
        "clip bounds swapped",
        "losses.py",
        "bound = torch.minimum(free, ratio.clamp(1 - low, 1 + high) * gain)",
        "bound = torch.minimum(free, ratio.clamp(1 - high, 1 + low) * gain)",
    ),
    Fault("the better of clipped and free", "losses.py", "bound = torch.minimum(free,", "bound = torch.maximum(free,"),
    Fault(
        "ratio upside down",
        "losses.py",
        "log_ratio = torch.where(actions, logprobs - old.detach(), nothing)",
        "log_ratio = torch.where(actions, old.detach() - logprobs, nothing)",
    ),
    Fault(
        "the old policy learns too",
        "losses.py",
        "torch.where(actions, logprobs - old.detach(), nothing)",
        "torch.where(actions, logprobs - old, nothing)",
    ),
    Fault(
        "advantages learn too",
        "losses.py",
        "return log_ratio, torch.where(actions, advantages.detach().to(",
        "return log_ratio, torch.where(actions, advantages.to(",
    ),
    Fault("dual clip for good actions", "losses.py", "bound = torch.where(gain < 0,", "bound = torch.where(gain > 0,"),
    Fault(
        "sequence ratio without its root",
        "losses.py",
        "whole = log_ratio.sum(1) / lengths if mean else",
        "whole = log_ratio.sum(1) if mean else",
    ),
    Fault(
        "a clipped weight that learns",
        "losses.py",
        "ratio = log_ratio.detach().exp()\n    weight",
        "ratio = log_ratio.exp()\n    weight",
    ),
    Fault(
        "the smaller value loss",
        "losses.py",
        "0.5 * torch.maximum(free, held).sum()",
        "0.5 * torch.minimum(free, held).sum()",
    ),
    Fault(
        "value clip around the return",
        "losses.py",
        "held = torch.where(actions, old + (values - old)",
        "held = torch.where(actions, target + (values - old)",
    ),
    # --------------------------------------------------------------------------------------------------- advantages
    Fault(
        "k1 the wrong way round",
        "advantages.py",
        "return logprobs - reference.detach()",
        "return reference.detach() - logprobs",
    ),
    Fault(
        "the reference learns", "advantages.py", "return logprobs - reference.detach()", "return logprobs - reference"
    ),
    Fault(
        "k2 without its half",
        "advantages.py",
        "return 0.5 * kl_k1(logprobs, reference).square()",
        "return kl_k1(logprobs, reference).square()",
    ),
    Fault(
        "k3 of the other direction",
        "advantages.py",
        "ratio = -kl_k1(logprobs, reference)",
        "ratio = kl_k1(logprobs, reference)",
    ),
    Fault(
        "KL control without a limit",
        "advantages.py",
        "error = min(max(kl / self.target - 1, -0.2), 0.2)",
        "error = kl / self.target - 1",
    ),
    Fault(
        "KL control the wrong way",
        "advantages.py",
        "self.coefficient * (1 + error * n / self.horizon)",
        "self.coefficient * (1 - error * n / self.horizon)",
    ),
    Fault(
        "KL paid for, not fined",
        "advantages.py",
        "torch.where(actions, -penalty, torch.zeros_like(penalty))",
        "torch.where(actions, penalty, torch.zeros_like(penalty))",
    ),
    Fault(
        "the score at the first action",
        "advantages.py",
        "rewards.scatter_add(1, last_action(actions)[:, None]",
        "rewards.scatter_add(1, actions.int().argmax(1)[:, None]",
    ),
    Fault(
        "no bootstrap from the next value",
        "advantages.py",
        "rewards[:, t] + gamma * next_value - values[:, t]",
        "rewards[:, t] - values[:, t]",
    ),
    Fault("gamma left out of the trace", "advantages.py", "+ gamma * lam * next_advantage", "+ lam * next_advantage"),
    Fault(
        "observations count in the trace",
        "advantages.py",
        "next_advantage = torch.where(acts, advantage, next_advantage)",
        "next_advantage = advantage",
    ),
    Fault(
        "returns without values",
        "advantages.py",
        "torch.where(actions, advantages + values, advantages)",
        "torch.where(actions, advantages, advantages)",
    ),
    Fault("variance without the gap of means", "advantages.py", " + gap * gap * self.count * new / count", ""),
    Fault(
        "the biased spread of a group",
        "advantages.py",
        "(centred.square().sum(1, keepdim=True) / max(group - 1, 1)).sqrt()",
        "(centred.square().sum(1, keepdim=True) / group).sqrt()",
    ),
    Fault("the variance for the spread", "advantages.py", "/ max(group - 1, 1)).sqrt()", "/ max(group - 1, 1))"),
    Fault(
        "one leaves itself in",
        "advantages.py",
        "group_centred(rewards, group) * (group / max(group - 1, 1))",
        "group_centred(rewards, group)",
    ),
    # ----------------------------------------------------------------------------------------------------- numerics
    Fault("the shift is forgotten", "numerics.py", "return stream[:, :-1][actions[:, 1:]]", "return stream[actions]"),
    Fault(
        "the shift goes the wrong way",
        "numerics.py",
        "return stream[:, :-1][actions[:, 1:]]",
        "return stream[:, 1:][actions[:, :-1]]",
    ),
    Fault(
        "a mean over the padding",
        "numerics.py",
        "summed(mask.sum()).clamp(min=1)",
        "summed(torch.ones_like(mask).sum()).clamp(min=1)",
    ),
    Fault(
        "standardised by the variance",
        "numerics.py",
        "scaled = (x - mean) * torch.rsqrt(variance + eps)",
        "scaled = (x - mean) / (variance + eps)",
    ),
    Fault(
        "the mean stays always",
        "numerics.py",
        "scaled if shift_mean else scaled + mean",
        "scaled + mean if shift_mean else scaled",
    ),
    Fault(
        "temperature multiplies",
        "numerics.py",
        "torch.log_softmax(logits.to(_wide(logits)) / divisor, -1)",
        "torch.log_softmax(logits.to(_wide(logits)) * divisor, -1)",
    ),
    Fault(
        "entropy below zero",
        "numerics.py",
        "return chosen, -(everything.exp() * finite).sum(-1)",
        "return chosen, (everything.exp() * finite).sum(-1)",
    ),
    Fault("no slope of the cap", "numerics.py", "weights if slope is None else weights.mul_(slope)", "weights"),
    Fault(
        "gradient without temperature",
        "numerics.py",
        "return self.scale / (torch.ones_like(like) * self.temperature)",
        "return self.scale * torch.ones_like(like)",
    ),
    # ---------------------------------------------------------------------------------------- batches, policy, trainer
    Fault(
        "the first completion token forgotten",
        "batch.py",
        "acting[i, start : len(row)] = torch.tensor(flags, dtype=torch.bool)",
        "acting[i, start : len(row)] = torch.tensor(flags, dtype=torch.bool)\n        acting[i, start] = False",
    ),
    Fault("the prompt is learned", "batch.py", "start = len(prompts[i])", "start = 0"),
    Fault(
        "groups are torn",
        "batch.py",
        "blocks = self.blocks()\n        lengths = self.lengths",
        "blocks = list(torch.arange(len(self)).split(1))\n        lengths = self.lengths",
    ),
    Fault(
        "values of the wrong column",
        "policy.py",
        "_scalar(self.value, hidden[before])",
        "_scalar(self.value, hidden[before + 1])",
    ),
    Fault("guidance away from the good", "policy.py", "full + self.guide(states)", "full - self.guide(states)"),
    Fault(
        "each micro-batch a mean of its own",
        "trainer.py",
        "self.world.backward(loss / total)",
        "self.world.backward(loss / algorithm.weight(part))",
    ),
    Fault(
        "a draw that favours the next token",
        "decoding.py",
        "block = (cumulated <= target).sum(1, keepdim=True)",
        "block = (cumulated < target).sum(1, keepdim=True).clamp(max=cumulated.shape[1] - 2)",
    ),
    # -------------------------------------------------------------------------------------------------- preferences
    Fault(
        "DPO swaps its labels",
        "preferences.py",
        "loss = logistic(beta * (chosen - rejected), smoothed(preference, label_smoothing))",
        "loss = logistic(beta * (rejected - chosen), smoothed(preference, label_smoothing))",
    ),
    Fault(
        "label smoothing only half",
        "preferences.py",
        "preference * (1 - label_smoothing) + (1 - preference) * label_smoothing",
        "preference * (1 - label_smoothing)",
    ),
    Fault(
        "robust DPO not rescaled",
        "preferences.py",
        "(preference - label_smoothing) / (1 - 2 * label_smoothing)",
        "preference - label_smoothing",
    ),
    Fault(
        "IPO's goal without its half",
        "preferences.py",
        "goal = chosen - rejected, 1 / (2 * beta)",
        "goal = chosen - rejected, 1 / beta",
    ),
    Fault(
        "hinge without its margin",
        "preferences.py",
        "preference * torch.relu(1 - lead)",
        "preference * torch.relu(-lead)",
    ),
    Fault(
        "EXO in DPO's direction",
        "preferences.py",
        "won = torch.sigmoid(lead) * (logsigmoid(lead) - target)",
        "won = target.exp() * (target - logsigmoid(lead))",
    ),
    Fault(
        "NCA forgets the rejected",
        "preferences.py",
        "0.5 * (logsigmoid(-good) + logsigmoid(-bad))",
        "0.5 * logsigmoid(-good)",
    ),
    Fault(
        "SPPO pushes both up",
        "preferences.py",
        "(chosen - goal).square() + (rejected + goal).square()",
        "(chosen - goal).square() + (rejected - goal).square()",
    ),
    Fault("AOT without sorting the reference", "preferences.py", "reference.sort().values", "reference"),
    Fault(
        "APO-zero lets the rejected rise",
        "preferences.py",
        "(torch.sigmoid(-good) + torch.sigmoid(bad)).sum()",
        "(torch.sigmoid(-good) + torch.sigmoid(-bad)).sum()",
    ),
    Fault(
        "DiscoPOP mixes the wrong way",
        "preferences.py",
        "mixture = torch.sigmoid(lead / tau)",
        "mixture = torch.sigmoid(-lead / tau)",
    ),
    Fault(
        "SimPO's margin helps",
        "preferences.py",
        "beta * (chosen - rejected) - gamma",
        "beta * (chosen - rejected) + gamma",
    ),
    Fault(
        "ORPO of probabilities, not odds",
        "preferences.py",
        "(chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))",
        "chosen - rejected",
    ),
    Fault(
        "KTO's baseline learns",
        "preferences.py",
        "(ratios - _kept(baseline))\n    return (weight",
        "(ratios - baseline)\n    return (weight",
    ),
    Fault(
        "KTO's weights swapped",
        "preferences.py",
        "torch.where(desirable, ratios.new_tensor(desirable_weight), ratios.new_tensor(undesirable_weight))",
        "torch.where(desirable, ratios.new_tensor(undesirable_weight), ratios.new_tensor(desirable_weight))",
    ),
    Fault(
        "BCO scales its baseline too",
        "preferences.py",
        "(beta * ratios - _kept(baseline))",
        "(beta * (ratios - _kept(baseline)))",
    ),
    Fault(
        "RRHF ranks upside down",
        "preferences.py",
        "(ranks[:, None] < ranks[None, :])",
        "(ranks[:, None] > ranks[None, :])",
    ),
    # ---------------------------------------------------------------------------------------------------- offline RL
    Fault(
        "the next value crosses rows",
        "offline_losses.py",
        "torch.where(row[1:] == row[:-1], chosen[1:], torch.zeros_like(chosen[1:]))",
        "chosen[1:]",
    ),
    Fault(
        "the expectile of the other side",
        "offline_losses.py",
        "torch.full_like(error, 1 - tau), torch.full_like(error, tau)",
        "torch.full_like(error, tau), torch.full_like(error, 1 - tau)",
    ),
    Fault(
        "gamma on the reward",
        "offline_losses.py",
        "rewards.detach().to(q.dtype) + gamma * following",
        "gamma * rewards.detach().to(q.dtype) + following",
    ),
    Fault(
        "targets of V learn",
        "offline_losses.py",
        "torch.where(actions, targets.detach() - values,",
        "torch.where(actions, targets - values,",
    ),
    Fault(
        "advantages of imitation learn",
        "offline_losses.py",
        "advantages.detach().to(logprobs.dtype)",
        "advantages.to(logprobs.dtype)",
    ),
    Fault("no cut of advantage weights", "offline_losses.py", ".exp().clamp(max=LARGEST_WEIGHT)", ".exp()"),
    Fault(
        "the higher of two heads", "heads.py", "target_q=torch.minimum(*targets)", "target_q=torch.maximum(*targets)"
    ),
    Fault("Polyak's share the wrong way", "heads.py", "target.lerp_(source, share)", "target.lerp_(source, 1 - share)"),
    Fault(
        "decoding by the heads that learn",
        "heads.py",
        "for head in self.target)) - self.v(states)",
        "for head in self.q)) - self.v(states)",
    ),
    Fault(
        "targets stay where they are", "algorithms/ilql.py", "self.policy.heads.follow(self.settings.polyak)", "pass"
    ),
    Fault(
        "V learns from itself",
        "algorithms/ilql.py",
        "expectile(found.values, found.target_q, actions",
        "expectile(found.values, found.values, actions",
    ),
    Fault("returns are not centred", "algorithms/ilql.py", "rewards[last] -= mean / spread", "rewards[last] -= mean"),
    # ---------------------------------------------------------------------------------------------------- algorithms
    Fault(
        "PPO whitens nothing",
        "algorithms/ppo.py",
        "if settings.whiten_advantages:",
        "if not settings.whiten_advantages:",
    ),
    Fault(
        "values are not regressed",
        "algorithms/ppo.py",
        "return policy + settings.value_weight * value, stats",
        "return policy, stats",
    ),
    Fault(
        "rankings weigh by their pairs",
        "algorithms/reward.py",
        "return better, weight / pairs.clamp(min=1)[:, None]",
        "return better, weight",
    ),
    Fault(
        "raters' ties count for the first",
        "algorithms/reward.py",
        "below = met.cumsum(1) - met / 2",
        "below = met.cumsum(1)",
    ),
    Fault(
        "KL in the loss counted by tokens",
        "algorithms/policy_gradient.py",
        "self.controller.coefficient * (share * apart).sum()",
        "self.controller.coefficient * apart.sum()",
    ),
    Fault(
        "entropy is punished",
        "algorithms/policy_gradient.py",
        "loss = loss - self.settings.entropy * (share * output.entropy).sum()",
        "loss = loss + self.settings.entropy * (share * output.entropy).sum()",
    ),
    Fault(
        "KL in reward and loss",
        "algorithms/policy_gradient.py",
        "shaping = weight if in_reward else 0.0",
        "shaping = weight",
    ),
    Fault(
        "the moving baseline forgets too fast",
        "algorithms/policy_gradient.py",
        "self.baseline = 0.9 * self.baseline + 0.1 * mean",
        "self.baseline = 0.1 * self.baseline + 0.9 * mean",
    ),
    Fault(
        "RLOO by GRPO's advantages",
        "algorithms/policy_gradient.py",
        "everywhere(leave_one_out(rewards.sum(1), self.settings.group), batch)",
        "everywhere(group_standardised(rewards.sum(1), self.settings.group), batch)",
    ),
    Fault(
        "Dr. GRPO divides by its own lengths",
        "algorithms/policy_gradient.py",
        "return batch.actions / self.settings.max_new_tokens",
        "return batch.actions / batch.actions.sum(1, keepdim=True).clamp(min=1)",
    ),
    Fault(
        "truncated completions alone are learned",
        "algorithms/policy_gradient.py",
        "kept &= ~batch.truncated",
        "kept &= batch.truncated",
    ),
    Fault(
        "DAPO keeps what teaches nothing",
        "algorithms/policy_gradient.py",
        "actions=batch.actions & ~alike[:, None]",
        "actions=batch.actions",
    ),
    Fault(
        "preferences without a reference",
        "algorithms/preference.py",
        "return self.totals(logprobs, batch) - kept",
        "return self.totals(logprobs, batch)",
    ),
    Fault(
        "IPO's averages are sums",
        "algorithms/preference.py",
        "return self.ratios(logprobs, batch) / batch.actions.sum(1).clamp(min=1)",
        "return self.ratios(logprobs, batch)",
    ),
    Fault(
        "CPO imitates the rejected",
        "algorithms/preference.py",
        "imitation = -self.averages(logprobs, batch)[0::2].sum()",
        "imitation = -self.averages(logprobs, batch)[1::2].sum()",
    ),
    Fault(
        "KTO's baseline may be negative",
        "algorithms/unpaired.py",
        'self.notes["kl"] = max(kl, 0.0)',
        'self.notes["kl"] = kl',
    ),
    Fault(
        "BCO's mean forgets its past",
        "algorithms/unpaired.py",
        "self.mean += (total - count * self.mean) / self.seen",
        "self.mean = total / count",
    ),
    Fault(
        "the score of good and bad swapped",
        "algorithms/reward_objectives.py",
        "bradley_terry(scores, nothing, good,",
        "bradley_terry(nothing, scores, good,",
    ),
    # ------------------------------------------------------------------------------------- samples, rewards, data
    Fault(
        "the best and the worst swapped",
        "algorithms/online.py",
        "worst, best = extremes(batch.scores, self.settings.group)\n        rows",
        "best, worst = extremes(batch.scores, self.settings.group)\n        rows",
    ),
    Fault(
        "ties are pairs",
        "algorithms/online.py",
        "replace(pairs, actions=pairs.actions & ~alike[:, None])",
        "replace(pairs, actions=pairs.actions)",
    ),
    Fault(
        "the worst of n imitated",
        "algorithms/online.py",
        "_, best = extremes(batch.scores, self.settings.group)",
        "best, _ = extremes(batch.scores, self.settings.group)",
    ),
    Fault(
        "rewards summed without weights",
        "rewards.py",
        "(torch.tensor(self.weights)[:, None] * each.nan_to_num(0.0)).sum(0)",
        "each.nan_to_num(0.0).sum(0)",
    ),
    Fault(
        "clipped before it is normalised",
        "rewards.py",
        "if self.normalise or self.scale:\n            if self.running",
        "raw = raw.clamp(-self.clip, self.clip) if self.clip else raw\n"
        "        if self.normalise or self.scale:\n            if self.running",
    ),
    Fault(
        "the moments of one process alone",
        "rewards.py",
        "self.moments = self.moments.updated(everywhere)",
        "self.moments = self.moments.updated(raw)",
    ),
    Fault(
        "turned without its preference",
        "pairing.py",
        "chosen=pair.rejected, rejected=pair.chosen, preference=1 - pair.preference)",
        "chosen=pair.rejected, rejected=pair.chosen)",
    ),
    Fault("undecided people find it bad", "pairing.py", "strict=True) if mean != 0.5]", "strict=True)]"),
    Fault("rankings without a winner are kept", "pairing.py", "if len(set(ranking.ranks)) > 1]", "]"),
    Fault(
        "held-out loss of one row after the other",
        "algorithms/sft.py",
        'return {"nll": float(total / count)',
        'return {"nll": float(total / len(batch))',
    ),
    Fault("a row is a unit", "algorithms/sft.py", "return batch.actions.sum()", "return batch.actions.any(1).sum()"),
    Fault(
        "demonstrations forget who said what",
        "algorithms/sft.py",
        ", actions=[e.actions for e in chosen])",
        ")",
    ),
    Fault(
        "a cache that does not look at the weights",
        "reference.py",
        "whole.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())",
        "pass",
    ),
    Fault(
        "a cache that does not look at the answers",
        "reference.py",
        "rows = [[row.prompt, row.completion, [int(acting) for acting in row.actions]] for row in item]",
        "rows = [[row.prompt] for row in item]",
    ),
    Fault(
        "kept log-probabilities cut at the wrong places",
        "reference.py",
        'torch.split(kept["logprobs"], kept["lengths"].tolist())',
        'torch.split(kept["logprobs"], kept["lengths"].flip(0).tolist())',
    ),
    # --------------------------------------------------------------------------------- attention, layers and layouts
    Fault(
        "a query does not see itself",
        "attention.py",
        "future = place > place[-1] - np.arange(queries)[::-1, None]",
        "future = place >= place[-1] - np.arange(queries)[::-1, None]",
    ),
    Fault(
        "padded keys are seen",
        "attention.py",
        "unseen = future[None] | (place < padding[:, None, None]) if padding.any() else future[None]",
        "unseen = future[None]",
    ),
    Fault(
        "an answer does not see its prompt",
        "attention.py",
        "np.r_[piece.above : piece.below, piece.start : stop]",
        "np.r_[piece.start : stop]",
    ),
    Fault(
        "outputs in another order",
        "attention.py",
        "inverse[q.reshape(-1)] = np.arange(rows.start, rows.stop)",
        "inverse[q.reshape(-1)[::-1]] = np.arange(rows.start, rows.stop)",
    ),
    Fault(
        "a softmax without its sum in the backward pass",
        "attention.py",
        "torch._softmax_backward_data(torch.bmm(pull, v.mT), attention, -1, attention.dtype)",
        "torch.bmm(pull, v.mT).mul_(attention)",
    ),
    Fault(
        "a prompt hears of the last answer only",
        "attention.py",
        "into_keys.index_add_(",
        "into_keys.index_copy_(",
    ),
    Fault(
        "turned on instead of back",
        "layers.py",
        "turned[..., half:].addcmul_(pull[..., :half], sin[..., :half], value=-1)",
        "turned[..., half:].addcmul_(pull[..., :half], sin[..., :half])",
    ),
    Fault(
        "a norm whose size has a gradient",
        "layers.py",
        "pull.addcmul_(normed, along_state, value=-1)",
        "pull.addcmul_(normed, along_state, value=-0.5)",
    ),
    Fault(
        "a gate that forgets what it gates",
        "layers.py",
        "silu_backward(gradient * up, gate)",
        "silu_backward(gradient, gate)",
    ),
    Fault("adapters without their scale", "layers.py", "alpha=module.scaling[name]", "alpha=1.0"),
    Fault(
        "queries without their scale",
        "layers.py",
        "_Turned.apply(queries, cos, sin, attention.scaling,",
        "_Turned.apply(queries, cos, sin, 1.0,",
    ),
    Fault(
        "answers beside their prompt, not below it",
        "layout.py",
        "pieces.append(Piece(count, stop, above, above + prefix))",
        "pieces.append(Piece(count, stop))",
    ),
    Fault(
        "prompts counted for each answer",
        "layout.py",
        "prefix + sum(lengths[row] - prefix for row in rows)",
        "sum(lengths[row] for row in rows)",
    ),
    Fault(
        "decoding turns the wrong way",
        "fused.py",
        "addcmul_(states[..., half:], sin[..., :half], value=-1)",
        "addcmul_(states[..., half:], sin[..., :half])",
    ),
    Fault(
        "positions that begin at one",
        "slots.py",
        "positions = (self.end - self.starts).clamp",
        "positions = (self.end - self.starts + 1).clamp",
    ),
]
