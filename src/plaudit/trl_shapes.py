"""TRL's trainers, by the names and arguments that its users know, over plaudit's own settings.

    from plaudit.trl_shapes import GRPOConfig, GRPOTrainer

    GRPOTrainer(model="my-model", reward_funcs=brevity, args=GRPOConfig(max_steps=2), train_dataset=rows).train()

What each argument becomes stands in `trl_arguments`. One that is not given keeps plaudit's default, not TRL's.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from plaudit import config, machine
from plaudit import settings as known
from plaudit.errors import PlauditError
from plaudit.run import GIVEN, check_own
from plaudit.settings.common import Machine, Training
from plaudit.settings.policy_gradient import OnPolicy
from plaudit.trl_arguments import (
    Arguments,
    BCOConfig,
    CPOConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ORPOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    sized,
)

if TYPE_CHECKING:
    from plaudit.run import Run


TOLD = {
    "use_vllm": "use_vllm: completions are sampled in the training process itself, from the weights that learn.",
    "value_model": "value_model: a head on the policy stands for it.",
}


class AutoModelForCausalLMWithValueHead:
    """Any causal model: PPO puts the value head on it, or takes the one that an earlier run left beside it."""

    @staticmethod
    def from_pretrained(name: str, **options: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(name, **options)


# ---------------------------------------------------------------------------------------------------- trainers


class Trainer:
    """What TRL's trainers share. `train` returns the run, which `run` is afterwards.

    kinds      plaudit's settings by TRL's `loss_type`; the first where none is given
    arguments  the class of `args`, whose arguments the trainer takes too
    """

    kinds: ClassVar[Mapping[str, type[Training]]]
    arguments: ClassVar[type[Arguments]]
    run: Run

    def __init__(self, model: Any, args: Arguments | None = None, **given: Any) -> None:
        args = given.pop("config", args) or self.arguments()
        if not isinstance(args, self.arguments):
            raise PlauditError(f"args: {type(args).__name__} is not plaudit.trl_shapes.{self.arguments.__name__}.")
        self.model = model
        self.data = _either(given, "train_dataset", "dataset")
        self.held = given.pop("eval_dataset", None)
        self.tokenizer = _either(given, "processing_class", "tokenizer")
        self.rewards = _either(given, "reward_funcs", "reward_model", "reward_models")
        self.reference, adapter = given.pop("ref_model", None), given.pop("peft_config", None)
        self.told = [said for name, said in TOLD.items() if given.get(name, args.given.get(name))]
        given.pop("value_model", None)
        for name in ("data_collator", "callbacks", "compute_metrics", "optimizers", "formatting_func"):
            if any(part is not None for part in _listed(given.pop(name, None))):
                raise PlauditError(f"{name}: {type(self).__name__} has no use for it here: leave it out.")
        self.values = type(args)(**{**args.given, **given}).values
        if adapter is not None:
            self.values |= {"lora_rank": adapter.r, "lora_alpha": float(adapter.lora_alpha)}
        self.kind = self._kind()
        self.values = sized(self.kind, self.values)
        odd = [name for name in self.values if name not in {field.name for field in fields(self.kind)}]
        if odd:
            raise PlauditError(f"{type(args).__name__}: `{config.verb_of(self.kind)}` has no setting {odd[0]!r}.")

    def _kind(self) -> type[Training]:
        asked = _listed(self.values.pop("kind", next(iter(self.kinds))))
        if len(asked) != 1 or asked[0] not in self.kinds:
            raise PlauditError(f"loss_type: {', '.join(map(str, asked))} is not one of {', '.join(self.kinds)}.")
        return self.kinds[asked[0]]

    def train(self) -> Run:
        """Trains, or goes on, as `plaudit.train` does. Models that were given as objects are kept in the run folder."""
        from plaudit.hooks import tell
        from plaudit.recipes import train

        for sentence in self.told:
            tell(sentence)
        self.run = train(self.settings())
        return self.run

    def settings(self) -> Training:
        """What `plaudit.train` is given; writes the models that were given as objects."""
        folder = Path(self.values.get("output", self.kind.output))
        values = {**self.values, "data": self.data, "model": _kept(self.model, self.tokenizer, folder, "model")}
        values |= {"holdout": 0.0} if self.held is None else {"eval_data": self.held}
        if issubclass(self.kind, OnPolicy):
            values["rewards"] = [_kept(reward, None, folder, "reward") for reward in _listed(self.rewards)]
        if self.reference is not None and not _same(self.reference, self.model):
            if not issubclass(self.kind, OnPolicy):
                raise PlauditError("ref_model: the reference is `model` as it begins: leave ref_model out.")
            values["reference"] = _kept(self.reference, self.tokenizer, folder, "reference")
        return self.kind(**values)

    def save_model(self, output_dir: str) -> None:
        """A copy of the trained model's folder."""
        shutil.copytree(self.run.final, output_dir, dirs_exist_ok=True)


class SFTTrainer(Trainer):
    kinds, arguments = {"sft": known.SFT}, SFTConfig


class RewardTrainer(Trainer):
    kinds, arguments = {"reward": known.Reward}, RewardConfig


class DPOTrainer(Trainer):
    arguments = DPOConfig
    kinds: ClassVar[Mapping[str, type[Training]]] = {
        "sigmoid": known.DPO,
        "robust": known.RobustDPO,
        "sigmoid_norm": known.NormalisedDPO,
        "ipo": known.AveragedIPO,
        "hinge": known.Hinge,
        "exo_pair": known.EXO,
        "nca_pair": known.NCA,
        "sppo_hard": known.SPPO,
        "aot": known.AOT,
        "aot_unpaired": known.UnpairedAOT,
        "bco_pair": known.PairedBCO,
        "apo_zero": known.APOZero,
        "apo_down": known.APODown,
        "discopop": known.DiscoPOP,
    }


class CPOTrainer(Trainer):
    arguments = CPOConfig
    kinds: ClassVar[Mapping[str, type[Training]]] = {
        "sigmoid": known.CPO,
        "hinge": known.SLiC,
        "ipo": known.ReferenceFreeIPO,
        "simpo": known.SimPO,
        "alphapo": known.AlphaPO,
    }


class ORPOTrainer(Trainer):
    kinds, arguments = {"orpo": known.ORPO}, ORPOConfig


class KTOTrainer(Trainer):
    kinds, arguments = {"kto": known.KTO, "apo_zero_unpaired": known.UnpairedAPOZero}, KTOConfig


class BCOTrainer(Trainer):
    kinds, arguments = {"bco": known.BCO}, BCOConfig


class GRPOTrainer(Trainer):
    arguments = GRPOConfig
    kinds: ClassVar[Mapping[str, type[Training]]] = {
        "grpo": known.GRPO,
        "dr_grpo": known.DrGRPO,
        "dapo": known.DAPO,
        "cispo": known.CISPO,
        "luspo": known.LUSPO,
        "sapo": known.SAPO,
        "vespo": known.VESPO,
    }


class PPOTrainer(Trainer):
    kinds, arguments = {"ppo": known.PPO}, PPOConfig


def _either(given: dict[str, Any], *names: str) -> Any:
    """The argument that has several names, taken out of those that were given."""
    found = [given.pop(name) for name in names if name in given]
    return found[0] if found else None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


# ------------------------------------------------------------------------------------------------- models as objects


def _same(one: Any, other: Any) -> bool:
    """Whether two models, names or objects, are one."""
    if hasattr(one, "save_pretrained") and hasattr(other, "save_pretrained"):
        return one is other or _digest(one) == _digest(other)
    return _origin(one) == _origin(other)


def _origin(model: Any) -> str:
    return model if isinstance(model, str) else str(model.name_or_path)


def _kept(model: Any, tokenizer: Any, folder: Path, name: str) -> Any:
    """A model object -> the folder in the run folder that keeps it, named by its weights, so that a run goes on with
    the same only; a name or a function as it is. Raises PlauditError."""
    if not hasattr(model, "save_pretrained"):
        _check_same(model, tokenizer)
        return model
    if hasattr(model, "merge_and_unload"):
        raise PlauditError(f"{name}: an adapter is on it: give the model without, and peft_config.")
    from plaudit.loading import load_tokenizer
    from plaudit.recipes import start_world

    path = folder / GIVEN / f"{name}-{_digest(model)[:16]}"
    rank, size = machine.processes()
    if rank == 0 and not path.exists():
        check_own(folder)
        being_written = path.with_name(f".{path.name}")
        model.save_pretrained(being_written)
        (tokenizer or load_tokenizer(_origin(model))).save_pretrained(being_written)
        head = Path(_origin(model), "value_head.safetensors")
        if head.is_file():
            shutil.copy(head, being_written)
        being_written.rename(path)
    if size > 1:
        start_world(Machine()).barrier()
    return str(path)


def _check_same(model: Any, tokenizer: Any) -> None:
    """Raises PlauditError for a tokenizer that is not the named model's own, which is the one that will be used."""
    if tokenizer is None:
        return
    from plaudit.loading import load_tokenizer

    own = load_tokenizer(model)
    if (own.get_vocab(), own.chat_template) != (tokenizer.get_vocab(), tokenizer.chat_template):
        raise PlauditError(
            f"processing_class: it is not the tokenizer of {model!r}: save both into one folder and name that."
        )


def _digest(model: Any) -> str:
    """SHA-256 of the weights."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
