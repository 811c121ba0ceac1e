"""What each argument of TRL's trainers becomes in plaudit's settings, as tables.

One that is not given keeps plaudit's default, not TRL's; one without a counterpart is refused, unless it has the value
at which it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

from plaudit import machine
from plaudit.errors import PlauditError
from plaudit.settings.common import Training
from plaudit.settings.policy_gradient import OnPolicy


@dataclass(frozen=True)
class Only:
    """An argument that can be had at these values only, and what to do instead."""

    values: tuple[Any, ...]
    instead: str


Names = Mapping[str, str | Callable[[Any], dict[str, Any]] | Only]
"""What each argument becomes: a setting (or what `sized` makes settings of) or several; "" is understood, and changes
nothing here."""


def _tracked(names: Any) -> dict[str, Any]:
    named = [names] if isinstance(names, str) else list(names)
    if len(named) > 1 or not {"none", "tensorboard", "wandb", "trackio"}.issuperset(named):
        raise PlauditError(f"report_to: {names!r} is not one of none, tensorboard, wandb and trackio.")
    return {"track": named[0] if named else "none"}


def _scheduled(kind: Any) -> dict[str, Any]:
    return {"schedule": str(getattr(kind, "value", kind)).removesuffix("_with_warmup")}


def _saved(when: Any) -> dict[str, Any]:
    if when not in ("no", "steps"):
        raise PlauditError(f"save_strategy: {when!r} can't be had: give 'no', or 'steps' and save_steps.")
    return {"unsaved": True} if when == "no" else {}


def _penalised(kind: Any) -> dict[str, Any]:
    terms = {"kl": "reward", "abs": "reward_abs", "mse": "reward_mse", "full": "reward_full"}
    if kind not in terms:
        raise PlauditError(f"kl_penalty: {kind!r} is not one of {', '.join(terms)}.")
    return {"kl_term": terms[kind]}


_WHOLE = "the loss is that of the whole distribution, so all of it is sampled"
TRAINING: Names = {
    **dict.fromkeys(("run_name", "logging_dir", "disable_tqdm", "remove_unused_columns", "logging_first_step"), ""),
    **dict.fromkeys(("per_device_eval_batch_size", "gradient_checkpointing_kwargs", "dataset_num_proc"), ""),
    **{name: name for name in ("learning_rate", "weight_decay", "adam_beta2", "max_grad_norm", "seed")},
    "gradient_checkpointing": "gradient_checkpointing",
    "output_dir": "output",
    "num_train_epochs": "epochs",
    "max_steps": lambda steps: {"steps": max(steps, 0)},
    "per_device_train_batch_size": "rows",
    "gradient_accumulation_steps": "parts",
    "lr_scheduler_type": _scheduled,
    "warmup_ratio": "warmup",
    "warmup_steps": Only((0,), "give warmup_ratio"),
    "logging_steps": "log_every",
    "logging_strategy": Only(("steps",), "give logging_steps"),
    "save_steps": "save_every",
    "save_strategy": _saved,
    "save_total_limit": "keep",
    "eval_steps": "evaluate_every",
    "eval_strategy": Only(("no", "steps"), "give eval_steps"),
    "evaluation_strategy": Only(("no", "steps"), "give eval_steps"),
    "bf16": lambda on: {"precision": "bfloat16" if on else "float32"},
    "fp16": Only((False,), "give bf16"),
    "optim": Only(("adamw_torch", "adamw_torch_fused"), "the optimizer is AdamW"),
    "report_to": _tracked,
    "push_to_hub": Only((False,), "push the folder `trainer.run.final` when the run is done"),
}
LENGTH: Names = {
    "max_length": "max_tokens",
    "max_prompt_length": "",  # nothing is cut: what is longer than `max_length` is left out
    "disable_dropout": Only((True,), "dropout is off wherever answers are compared"),
}
SAMPLING: Names = {
    "temperature": "temperature",
    "top_p": Only((1.0,), _WHOLE),
    "top_k": Only((0, -1), _WHOLE),
    "min_p": Only((0.0,), _WHOLE),
    "repetition_penalty": Only((1.0,), _WHOLE),
    "log_completions": "",
    "use_vllm": "",
}
QUIET = ("vllm_", "hub_", "dataloader_", "ddp_", "tracker_kwargs")
"""How arguments begin that say where and how a library works, not what is learned."""


class Arguments:
    """Arguments of a trainer, by TRL's names, read as `values`: the settings that they come to."""

    names: ClassVar[Names] = {}

    def __init__(self, **given: Any) -> None:
        self.given, self.values = given, dict[str, Any]()
        for name, value in given.items():
            self._read(name, value)

    def _read(self, name: str, value: Any) -> None:
        names = {**TRAINING, **self.names}
        if name not in names:
            if name.startswith(QUIET):
                return
            near = get_close_matches(name, names, 1, cutoff=0)[0]
            raise PlauditError(f"{type(self).__name__}: {name!r} has no counterpart; the nearest that has is {near!r}.")
        into = names[name]
        if value is None:
            return
        if isinstance(into, Only):
            if value not in into.values:
                allowed = " or ".join(map(repr, into.values))
                raise PlauditError(
                    f"{type(self).__name__}: {name!r} is {value!r}, but can only be {allowed}: {into.instead}."
                )
        elif callable(into):
            self.values |= into(value)
        elif into:
            self.values[into] = value


class SFTConfig(Arguments):
    names: ClassVar[Names] = {
        **LENGTH,
        "max_seq_length": "max_tokens",
        "packing": "",  # rows lie side by side without padding as it is
        "dataset_text_field": Only(("text",), "rename the column to `text`"),
        "completion_only_loss": lambda only: {"learn": "completion" if only else "all"},
        "disable_dropout": lambda off: {"dropout": not off},
    }


class RewardConfig(Arguments):
    names: ClassVar[Names] = {
        **LENGTH,
        "center_rewards_coefficient": "centering",
        "disable_dropout": lambda off: {"dropout": not off},
    }


class DPOConfig(Arguments):
    names: ClassVar[Names] = {
        **LENGTH,
        "beta": "beta",
        "label_smoothing": "label_smoothing",
        "loss_type": "kind",
        "precompute_ref_log_probs": "precompute_reference",
    }


class CPOConfig(Arguments):
    names: ClassVar[Names] = {**DPOConfig.names, "cpo_alpha": "sft_weight", "simpo_gamma": "gamma", "alpha": "alpha"}


class ORPOConfig(Arguments):
    names: ClassVar[Names] = {**LENGTH, "beta": "beta"}


class KTOConfig(Arguments):
    names: ClassVar[Names] = {
        **ORPOConfig.names,
        "loss_type": "kind",
        "desirable_weight": "desirable_weight",
        "undesirable_weight": "undesirable_weight",
    }


class BCOConfig(Arguments):
    names: ClassVar[Names] = {
        **ORPOConfig.names,
        "prompt_sample_size": "prompt_sample_size",
        "min_density_ratio": "min_density_ratio",
        "max_density_ratio": "max_density_ratio",
    }


class GRPOConfig(Arguments):
    names: ClassVar[Names] = {
        **SAMPLING,
        "num_generations": "group",
        "max_prompt_length": lambda tokens: {"max_prompt_tokens": tokens, "long_prompts": "cut"},
        "max_completion_length": "max_new_tokens",
        "generation_batch_size": "rollout",
        "steps_per_generation": "passes",
        "num_iterations": "reuse",
        "beta": "kl",
        "epsilon": "epsilon",
        "epsilon_high": "clip_high",
        "loss_type": "kind",
        "scale_rewards": Only((True, "group"), "take loss_type='dr_grpo', or the verb lite_ppo"),
        "reward_weights": lambda weights: {"reward_weights": tuple(weights)},
        "mask_truncated_completions": "mask_truncated",
        "delta": "dual_clip",
        "sync_ref_model": "follows",
        "ref_model_sync_steps": "reference_every",
        "ref_model_mixup_alpha": "reference_share",
        "sapo_temperature_pos": "temperature_good",
        "sapo_temperature_neg": "temperature_bad",
    }


class PPOConfig(Arguments):
    """TRL's up to 0.11, and from 0.12 on."""

    names: ClassVar[Names] = {
        **SAMPLING,
        "batch_size": lambda rows: {"rollout": rows * machine.processes()[1]},
        "mini_batch_size": "rows",
        "steps": "episodes",
        "total_episodes": "episodes",
        "num_mini_batches": "minibatches",
        "ppo_epochs": "reuse",
        "num_ppo_epochs": "reuse",
        "init_kl_coef": "kl",
        "kl_coef": "kl",
        "adap_kl_ctrl": "adaptive",
        "target": "kl_target",
        "horizon": "kl_horizon",
        "kl_penalty": _penalised,
        "ratio_threshold": "ratio_threshold",
        "tracker_project_name": "track_project",
        "kl_estimator": Only(("k1",), "see `kl_term` of plaudit's PPO"),
        "gamma": "gamma",
        "lam": "lam",
        "cliprange": "clip",
        "cliprange_value": "value_clip",
        "vf_coef": "value_weight",
        "early_stopping": Only((False,), "see `target_kl` of plaudit's PPO"),
        "use_score_norm": "reward_normalise",
        "use_score_scaling": "reward_scale",
        "score_clip": "reward_clip",
        "whiten_rewards": "whiten_rewards",
        "response_length": "max_new_tokens",
        "missing_eos_penalty": "missing_end_penalty",
        "stop_token": Only(("eos",), "see `stop` of plaudit's PPO"),
        "log_with": _tracked,
        **dict.fromkeys(("exp_name", "task_name", "model_name", "query_dataset", "reward_model"), ""),
        **dict.fromkeys(("compare_steps", "optimize_device_cache", "optimize_cuda_cache", "target_kl"), ""),
        **dict.fromkeys(("num_sample_generations", "local_rollout_forward_batch_size"), ""),
    }


def sized(kind: type[Training], values: dict[str, Any]) -> dict[str, Any]:
    """TRL's counts, which are of one process and one pass, as plaudit's, which are of all."""
    made = dict(values)
    rows, parts, passes = (made.pop(name, None) for name in ("rows", "parts", "passes"))
    minibatches, episodes, adaptive = (made.pop(name, None) for name in ("minibatches", "episodes", "adaptive"))
    processes = machine.processes()[1]
    if made.pop("unsaved", False):
        made["save_every"] = 0
    if (epsilon := made.pop("epsilon", None)) is not None:
        made = {"clip_low": epsilon, "clip_high": epsilon} | made
    if made.pop("follows", False):
        made.setdefault("reference_every", 512)
    else:  # only with it do the others count
        made = {name: value for name, value in made.items() if name not in ("reference_every", "reference_share")}
    if rows or parts:
        made["batch_size"] = (rows or 8) * (parts or 1) * processes
    if not issubclass(kind, OnPolicy):
        return made
    if passes:
        made["rollout"] = (rows or 8) * passes * processes
    size = made.setdefault("rollout", made.get("batch_size", kind.rollout))
    made["batch_size"] = size // (minibatches or 1) if minibatches else made.get("batch_size", size)
    if episodes:
        updates = size // made["batch_size"] * made.get("reuse", getattr(kind, "reuse", 1))
        made["steps"] = math.ceil(episodes / size) * updates
    if adaptive is not None:
        made["kl_target"] = made.get("kl_target", 6.0) if adaptive else 0.0
    if made.get("reward_normalise"):  # which scales too
        made.pop("reward_scale", None)
    return made
