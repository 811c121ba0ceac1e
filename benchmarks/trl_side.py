"""TRL's side of `against_trl.py`, run by the Python of its own environment: `python trl_side.py WORK.json`.

TRL in its best setting for a CPU: gradient checkpointing off, fused AdamW, no logging, evaluation or saving, no worker
processes. Weights that learn are float32 under bfloat16 autocast, which is the work that plaudit does: float32 master
weights. (bfloat16 weights would be faster and lose small updates.) Weights that never learn, those under adapters and
those of references and reward models that TRL lets one pass, are bfloat16, as the model is on disk.
Prints one line of JSON at the end.
"""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from pleasing import vowels
from process import Marks
from works import Work

WORK = Work.read(Path(sys.argv[1]))
MARKS = Marks()
TOKENS: list[int] = []
COMPLETIONS: list[float] = []
FROZEN = getattr(torch, WORK.precision)


class Watching(TrainerCallback):  # type: ignore[misc]
    """Marks the end of each step."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        MARKS.step()


def arguments(cls: type, **more: Any) -> Any:
    """The configuration of a trainer, with what all of them share."""
    work = WORK
    shared: dict[str, Any] = {
        "output_dir": work.output,
        "max_steps": work.steps + 1,
        "per_device_train_batch_size": work.micro,
        "gradient_accumulation_steps": work.batch // work.micro,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "linear" if work.falls else "constant",
        "warmup_steps": math.ceil(0.1 * (work.steps + 1)) if work.falls else 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": work.precision == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_strategy": "steps" if work.keep else "no",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "seed": work.seed,
    }
    return cls(**(shared | more))


def rows() -> Dataset:
    return Dataset.from_list([json.loads(line) for line in Path(WORK.data).read_text().splitlines()])


def tokenizer(name: str, side: str) -> Any:
    """Padding is a token of its own, as plaudit's reward models have it: here, others cannot be told from the end."""
    made = AutoTokenizer.from_pretrained(name, padding_side=side)
    if made.pad_token_id == made.eos_token_id:
        made.pad_token = made.unk_token
    return made


def frozen(cls: Any, name: str) -> Any:
    """A model that never learns."""
    return cls.from_pretrained(name, dtype=FROZEN).requires_grad_(False).eval()


def common() -> dict[str, Any]:
    """What trainers of the data take besides their settings."""
    adapter = {"peft_config": LoraConfig(r=WORK.lora, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")}
    return {"model": WORK.model, "train_dataset": rows(), "callbacks": [Watching()], **(adapter if WORK.lora else {})}


def loading() -> dict[str, Any]:
    return {"model_init_kwargs": {"dtype": WORK.precision if WORK.lora else "float32"}}


def from_data(config: type, trainer: Any, refers: bool = False, **more: Any) -> Any:
    """A trainer whose batches are rows of the data, in their order."""
    reference = {"ref_model": frozen(AutoModelForCausalLM, WORK.model)} if refers and not WORK.lora else {}
    settings = arguments(config, train_sampling_strategy="sequential", **loading(), **more)
    made = trainer(args=settings, **common(), **reference)
    computed = made.compute_loss

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        masks = ("attention_mask", "chosen_attention_mask", "rejected_attention_mask")
        TOKENS.append(sum(int(inputs[name].sum()) for name in masks if name in inputs))
        return computed(model, inputs, *args, **kwargs)

    made.compute_loss = counted
    return made


def paired(config: type, trainer: type, **more: Any) -> Any:
    """A trainer of pairs without a reference, whose tokenizer has to be given."""
    return from_data(
        config, partial(trainer, processing_class=tokenizer(WORK.model, "left")), max_length=WORK.max_tokens, **more
    )


def sft() -> Any:
    from trl import SFTConfig, SFTTrainer

    return from_data(SFTConfig, SFTTrainer, max_length=WORK.max_tokens, shuffle_dataset=False)


def reward() -> Any:
    from trl import RewardConfig, RewardTrainer

    return from_data(RewardConfig, RewardTrainer, max_length=WORK.max_tokens)


def dpo() -> Any:
    from trl import DPOConfig, DPOTrainer

    return from_data(DPOConfig, DPOTrainer, refers=True, max_length=WORK.max_tokens, beta=0.1)


def ipo() -> Any:
    from trl import DPOConfig, DPOTrainer

    more = {"max_length": WORK.max_tokens, "loss_type": "ipo", "beta": 1.0}
    return from_data(DPOConfig, DPOTrainer, refers=True, **more)


def orpo() -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return paired(ORPOConfig, ORPOTrainer, beta=0.1)


def simpo() -> Any:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return paired(CPOConfig, CPOTrainer, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=1.0, beta=2.0)


def kto() -> Any:
    from trl import KTOConfig, KTOTrainer

    return from_data(KTOConfig, KTOTrainer, refers=True, max_length=WORK.max_tokens, beta=0.1)


def grpo() -> Any:
    from trl import GRPOConfig, GRPOTrainer

    settings = arguments(
        GRPOConfig,
        **loading(),
        num_generations=WORK.group,
        max_completion_length=WORK.new_tokens,
        temperature=1.0,
        beta=0.04,
        loss_type="grpo",
        shuffle_dataset=False,
    )
    made = GRPOTrainer(args=settings, reward_funcs=[vowels], **common())
    scored = made._generate_and_score_completions

    def counted(inputs: Any) -> Any:
        found = scored(inputs)
        said = int(found["completion_mask"].sum())
        TOKENS.append(said + int(found["prompt_mask"].sum()))
        COMPLETIONS.append(said / len(found["completion_mask"]))
        return found

    made._generate_and_score_completions = counted
    made._generate = MARKS.timed(made._generate)
    return made


def ppo() -> Any:
    from transformers import DataCollatorWithPadding
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    words = tokenizer(WORK.rewards, "left")
    policy = AutoModelForCausalLM.from_pretrained(WORK.model, dtype=torch.float32)
    policy.generation_config.pad_token_id = words.pad_token_id
    value = AutoModelForSequenceClassification.from_pretrained(WORK.rewards, num_labels=1, dtype=torch.float32)
    settings = arguments(
        PPOConfig,
        per_device_train_batch_size=WORK.rollout,
        gradient_accumulation_steps=1,
        total_episodes=WORK.rollout * (WORK.steps + 1),
        num_ppo_epochs=WORK.epochs,
        num_mini_batches=WORK.rollout // WORK.batch,
        local_rollout_forward_batch_size=WORK.micro,
        response_length=WORK.new_tokens,
        stop_token="eos",
        temperature=1.0,
        kl_coef=0.05,
        num_sample_generations=0,
    )
    asked = Dataset.from_list([{"input_ids": words(row["prompt"]).input_ids} for row in rows()])
    drawn = MARKS.timed(ppo_trainer.batch_generation)

    def counted(model: Any, queries: Any, size: int, padding: int, config: Any) -> Any:
        found, logits = drawn(model, queries, size, padding, config)
        said = found[:, queries.shape[1] :]
        lengths = ((said == words.eos_token_id).cumsum(1).roll(1, 1).index_fill(1, torch.tensor([0]), 0) == 0).sum()
        TOKENS.append(int((queries != padding).sum() + lengths))
        COMPLETIONS.append(int(lengths) / len(said))
        return found, logits

    ppo_trainer.batch_generation = counted
    return PPOTrainer(
        args=settings,
        processing_class=words,
        model=policy,
        ref_model=frozen(AutoModelForCausalLM, WORK.model),
        reward_model=frozen(AutoModelForSequenceClassification, WORK.rewards),
        value_model=value,
        train_dataset=asked,
        eval_dataset=asked.select(range(1)),
        data_collator=DataCollatorWithPadding(words),
        callbacks=[Watching()],
    )


def main() -> None:
    kinds = (sft, reward, dpo, ipo, orpo, simpo, kto, grpo, ppo)
    trainer = next(kind for kind in kinds if kind.__name__ == WORK.kind)()
    trainer.train()
    if WORK.keep:
        trainer.save_model(f"{WORK.output}/final")
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        print(json.dumps({"losses": losses, "tokens": TOKENS}))
        return
    passes = len(TOKENS) // (WORK.steps + 1)
    tokens = [sum(TOKENS[i : i + passes]) for i in range(0, len(TOKENS), passes)]
    print(json.dumps(MARKS.report() | {"tokens": tokens[1:], "completion_tokens": COMPLETIONS[1:]}))


if __name__ == "__main__":
    main()
