"""Run by the Python of an environment with TRL: its losses, and their gradients, on the numbers of a file.

python trl_losses.py INPUT.json OUTPUT.json

TRL's losses are methods of trainers, so stand-ins for the trainers call them: they hold the settings and nothing else.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import torch
import trl

GATHERED = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    process_index=0,
    use_distributed=False,
    is_main_process=True,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction="sum": x,
    sync_gradients=True,
)


def trainer(**settings):
    """Stands for a trainer in evaluation, where no loss is divided by the steps of accumulation."""
    common = {
        "accelerator": GATHERED,
        "model": SimpleNamespace(training=False),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "aux_loss_enabled": False,
    }
    return SimpleNamespace(**{**common, **settings})


def tensors(group):
    """A group of the input as float64, int64 and bool tensors."""
    found = {name: torch.tensor(value) for name, value in group.items() if isinstance(value, list)}
    return {name: t.double() if t.is_floating_point() else t for name, t in found.items()}


def judged(loss, *learning):
    """A loss and its gradients."""
    gradients = torch.autograd.grad(loss, learning)
    return {"loss": loss.item(), "gradients": [gradient.tolist() for gradient in gradients]}


def said(logprobs, squares=None):
    """What TRL's fused head gives, as far as a loss reads it."""
    nothing = torch.zeros_like(logprobs)
    parts = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool(), "log_sum_sq_probs": squares}
    return SimpleNamespace(log_probs=logprobs, **parts)


# --------------------------------------------------------------------------------------------------- 1.16.0: pairs


def pairs(given):
    """The DPO family: rows are the chosen answers, then the rejected ones."""
    from trl import DPOTrainer

    data, found = tensors(given), {}
    model = torch.nn.Identity().eval()
    model.is_gradient_checkpointing = False
    reference, squares = (data[stream] * data["mask"][:, 1:] for stream in ("reference", "squares"))
    inputs = {
        "input_ids": data["tokens"],
        "attention_mask": torch.ones_like(data["tokens"]),
        "completion_mask": data["mask"].long(),
    }
    for name, options in given["losses"].items():
        logprobs = data["logprobs"].clone().requires_grad_()
        own = trainer(
            model=model,
            ref_model=lambda **_: said(reference),
            precompute_ref_logps=False,
            loss_types=options["types"],
            loss_weights=options.get("weights", [1.0]),
            args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
            **{
                "ld_alpha": None,
                "f_divergence_type": "reverse_kl",
                "use_weighting": False,
                **{name: value for name, value in options.items() if name not in ("types", "weights")},
            },
        )
        masked = logprobs * data["mask"][:, 1:]
        # TRL rounds what an alpha divergence makes of ratios to float32.
        compute = _in_float64(DPOTrainer._compute_loss)
        loss = compute(own, lambda masked=masked, **_: said(masked, squares), inputs, False)
        found[name] = judged(loss, logprobs)
    return found


def without_reference(given):
    """CPO, SimPO and ORPO, from logits to the loss of a batch: rows are the chosen answers, then the rejected ones."""
    return {name: _without_reference(case) for name, case in given.items()}


def _without_reference(given):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    data, options = tensors(given), given["options"]
    labels = torch.where(data["mask"], data["tokens"], -100)
    count = len(labels) // 2
    batch = {
        f"{side}_{name}": stream[rows]
        for side, rows in (("chosen", slice(count)), ("rejected", slice(count, None)))
        for name, stream in {"input_ids": data["tokens"], "attention_mask": data["attention"], "labels": labels}.items()
    }
    own = trainer(is_encoder_decoder=False, pad_token_id=0, padding_value=0, **options)
    owner = ORPOTrainer if options["loss_type"] == "orpo" else CPOTrainer
    own.concatenated_inputs, own.get_batch_logps = owner.concatenated_inputs, owner.get_batch_logps
    own.concatenated_forward = partial(owner.concatenated_forward, own)
    if owner is ORPOTrainer:  # TRL rounds to float32 here; in float64 its own lines are as exact as ours
        own.odds_ratio_loss = partial(_in_float64(owner.odds_ratio_loss), own)
    else:
        own.cpo_loss = partial(owner.cpo_loss, own)
    logits = data["logits"].clone().requires_grad_()
    output = SimpleNamespace(logits=logits)
    return judged(owner.get_batch_loss_metrics(own, lambda *_, **__: output, batch)[0], logits)


def _in_float64(method):
    """The method, compiled from its source with float64 in the place of float32."""
    source = textwrap.dedent(inspect.getsource(method)).replace(".float()", ".double()").replace("float32:", "float64:")
    space = dict(sys.modules[method.__module__].__dict__)
    exec(source, space)
    return space[method.__name__]


def rewards(given):
    """Bradley-Terry, with margins, and with scores that are drawn to zero."""
    from trl import RewardTrainer

    data, found = tensors(given), {}
    for name, options in given["losses"].items():
        scores = data["scores"].clone().requires_grad_()
        margin = {"margin": data["margin"]} if options["margin"] else {}
        inputs = {"attention_mask": torch.ones(len(scores), 1), **margin}
        own = trainer(args=SimpleNamespace(center_rewards_coefficient=options["centering"]))
        output = SimpleNamespace(logits=scores[:, None])
        found[name] = judged(RewardTrainer.compute_loss(own, lambda output=output, **_: output, inputs), scores)
    return found


def answers(given):
    """KTO of single answers, with a KL estimated from mismatched ones."""
    from trl import KTOTrainer

    data = tensors(given)
    inputs = {
        "input_ids": data["tokens"],
        "attention_mask": torch.ones_like(data["tokens"]),
        "completion_mask": data["mask"].long(),
        "label": data["desirable"],
        "ref_logps": (data["reference"] * data["mask"][:, 1:]).sum(1),
        "ref_KL_logps": data["kl_reference"],
    }
    found = {}
    for kind in ("kto", "apo_zero_unpaired"):
        logprobs = data["logprobs"].clone().requires_grad_()
        own = trainer(
            _compute_kl_logps=lambda model, batch: data["kl_policy"],
            precompute_ref_logps=True,
            calculate_KL=kind == "kto",
            loss_type=kind,
            beta=given["beta"],
            desirable_weight=given["desirable_weight"],
            undesirable_weight=given["undesirable_weight"],
        )
        output = said(logprobs * data["mask"][:, 1:])
        loss = KTOTrainer._compute_loss(own, lambda output=output, **_: output, inputs, False)
        found[kind] = judged(loss, logprobs)
    return found


# ------------------------------------------------------------------------------------------------ 1.16.0: rollouts


def rollouts(given):
    """The GRPO family and RLOO: columns are those of the completions."""
    from trl import GRPOTrainer, RLOOTrainer
    from trl.experimental.gmpo import GMPOTrainer

    data, found = tensors(given), {}
    mask = data["mask"].long()
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": data["advantages"],
        "old_per_token_logps": data["old"],
        "old_logps": (data["old"] * mask).sum(1),
        "ref_per_token_logps": data["reference"],
        "num_items_in_batch": mask.sum(),
    }
    for name, options in given["losses"].items():
        logprobs = data["logprobs"].clone().requires_grad_()
        own = trainer(
            _get_per_token_logps_and_entropies=lambda *_, logprobs=logprobs, **__: (
                logprobs,
                torch.zeros_like(logprobs),
                None,
            ),
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=options.get("level", "token"),
            loss_type=options["type"],
            beta=options.get("kl", 0.0),
            epsilon_low=options.get("low"),
            epsilon_high=options.get("high"),
            use_vllm=False,
            current_gradient_accumulation_steps=1,
            max_completion_length=given["limit"],
            _entropy_bonus_enabled=False,
            get_gamma_weights=GRPOTrainer.get_gamma_weights,
            args=SimpleNamespace(
                **{"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1, **options}
            ),
        )
        owner = {"rloo": RLOOTrainer, "gmpo": GMPOTrainer}.get(options["type"], GRPOTrainer)
        found[name] = judged(owner._compute_loss(own, None, inputs), logprobs)
    return found


def credit(given):
    """Advantages of GRPO and RLOO, which TRL works out inside one long method each: the lines of it that do."""
    from trl.trainer import grpo_trainer, rloo_trainer

    data, found = tensors(given), {}
    mask = data["mask"].long()
    both = given["large"] * torch.stack([data["scores"], data["others"]], 1)
    for name, options in given["cases"].items():
        owner = rloo_trainer if name.startswith("rloo") else grpo_trainer
        weights = options.get("weights")
        own = trainer(
            reward_weights=torch.tensor(weights or [1.0], dtype=torch.float64),
            multi_objective_aggregation="normalize_then_sum" if weights else "sum_then_normalize",
            reward_clip_range=None,
            reward_funcs=weights or [None],
            normalize_advantages=options.get("whitened", False),
            scale_rewards=options.get("scale", "none"),
            beta=options.get("kl", 0.0),
        )
        space = dict(vars(owner)) | {
            "self": own,
            "rewards_per_func": both if weights else data["scores"][:, None],
            "num_generations": given["group"],
            "device": torch.device("cpu"),
            "old_per_token_logps": data["old"],
            "ref_per_token_logps": data["reference"],
            "completion_mask": mask,
            "gather": lambda x: x,
        }
        method = (owner.RLOOTrainer if owner is rloo_trainer else owner.GRPOTrainer)._generate_and_score_completions
        source = inspect.getsource(method)
        _run(source, "unscorable_mask = torch.isnan(", "# Slice to keep only the local part", space)
        found[name] = space["advantages"].tolist()
    return found


def online(given):
    """Online DPO, inside one long method too: rows are each prompt's first completion, then each one's second."""
    from trl.experimental.online_dpo import online_dpo_trainer

    data = tensors(given)
    source, found = inspect.getsource(online_dpo_trainer.OnlineDPOTrainer.training_step), {}
    for kind in ("sigmoid", "ipo"):
        logprobs = data["logprobs"].clone().requires_grad_()
        space = dict(vars(online_dpo_trainer)) | {
            "self": trainer(beta=given["beta"], args=SimpleNamespace(loss_type=kind)),
            "rewards": data["scores"],
            "batch_size": len(logprobs) // 2,
            "device": torch.device("cpu"),
            "logprobs": logprobs,
            "ref_logprobs": data["reference"],
            "completion_mask": data["mask"].long(),
        }
        _run(source, "# Split rewards into chosen/rejected pairs", "# Log everything", space)
        found[kind] = judged(space["loss"], logprobs)
    return found


# ---------------------------------------------------------------------------------------------------- 1.12.0


def classifier(given):
    """BCO: two batches, since its baseline is a running mean; and the weights by which prompts are matched."""
    from sklearn.linear_model import LogisticRegression
    from trl.experimental.bco import BCOTrainer
    from trl.experimental.bco.bco_trainer import RunningMoments

    own = trainer(running=RunningMoments(GATHERED), beta=given["beta"], match_underlying_distribution=False)
    found = {}
    for name, batch in given["batches"].items():
        data = tensors(batch)
        chosen, rejected = (data[side].clone().requires_grad_() for side in ("chosen", "rejected"))
        losses = BCOTrainer.bco_loss(own, chosen, rejected, *map(torch.zeros_like, (chosen, rejected)), None, None)[0]
        found[name] = judged(losses.mean(), chosen, rejected)
    data = tensors(given)
    good, bad = data["good"].numpy(), data["bad"].numpy()
    labels = [1] * len(good) + [0] * len(bad)
    # As TRL fits it, but to the end.
    fitted = LogisticRegression(class_weight="balanced", tol=1e-10, max_iter=10_000).fit([*good, *bad], labels)
    own._get_chosen_prob = lambda embeddings: torch.from_numpy(fitted.predict_proba(embeddings.numpy())[:, 1])
    own.args = SimpleNamespace(min_density_ratio=given["low"], max_density_ratio=given["high"])
    found["matched prompts"] = {"weights": BCOTrainer._get_udm_weight(own, data["bad"]).tolist()}
    return found


def proximal(given):
    """PPO, whose numbers TRL works out inside one long method: the lines of it that do, run on their own."""
    from trl.experimental.ppo import ppo_trainer

    data = tensors(given)
    space = dict(vars(ppo_trainer))
    whole, ragged = data["whole_padding"], data["padding"]
    count = torch.full((len(whole),), whole.shape[1] - 1)
    space |= {
        "args": SimpleNamespace(**given["args"]),
        "logprobs": data["old"],
        "ref_logprobs": data["reference"],
        "values": data["values"].clone(),
        "scores": data["scores"],
        "responses": data["old"],
        "padding_mask": whole,
        "padding_mask_p1": whole,
        "sequence_lengths": count,
        "sequence_lengths_p1": count + 1,
    }
    source = inspect.getsource(ppo_trainer.PPOTrainer.train)
    _run(source, "# 4. compute rewards", "empty_cache()", space)
    found = {"gae": {name: space[name].tolist() for name in ("rewards", "advantages", "returns")}}
    new, values = data["new"].clone().requires_grad_(), data["new_values"].clone().requires_grad_()
    space |= {
        "new_logprobs": new,
        "mb_logprobs": data["old"],
        "mb_advantage": data["advantages"],
        "mb_return": data["returns"],
        "mb_values": data["values"],
        "vpred": values,
        "padding_mask": ragged,
        "padding_mask_p1": ragged,
        "micro_batch_inds": slice(None),
    }
    _run(source, "vpredclipped = torch.clamp(", "accelerator.backward(loss)", space)
    found["ppo"] = judged(space["loss"], new, values)
    return found


def _run(source, first, last, space):
    """Executes the lines of `source` from that which begins with `first` to that before `last`."""
    lines = source.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(lines) if i > start and line.strip().startswith(last))
    exec(textwrap.dedent("\n".join(lines[start:end])), space)


WHAT = {
    "pairs": pairs,
    "even_pairs": pairs,
    "without_reference": without_reference,
    "rewards": rewards,
    "answers": answers,
    "rollouts": rollouts,
    "credit": credit,
    "online": online,
    "classifier": classifier,
    "proximal": proximal,
}

if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        asked = json.load(file)
    result = {"version": trl.__version__, **{name: WHAT[name](given) for name, given in asked.items()}}
    with open(sys.argv[2], "w") as file:
        json.dump(result, file)
