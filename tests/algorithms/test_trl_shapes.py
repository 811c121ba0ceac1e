"""Programs written for TRL: the seeds' snippets as they stand, with local models and rows for the Hub's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import examples
import tiny
import watched
from plaudit import PlauditError
from plaudit.config import verb_of
from plaudit.trl_shapes import (
    AutoModelForCausalLMWithValueHead,
    BCOTrainer,
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOTrainer,
    ORPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

# peft still asks transformers by an older name whether gradients are checkpointed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PPO_SNIPPET = """
from transformers import AutoTokenizer, AutoModelForCausalLM
from trl import PPOTrainer, PPOConfig, AutoModelForCausalLMWithValueHead

# Load base model
model_name = "meta-llama/Llama-3-8b-instruct"
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLMWithValueHead.from_pretrained(model_name)

# PPO config
config = PPOConfig(
    learning_rate=1.41e-5,
    log_with="tensorboard",
    batch_size=16,
)

# Define dataset
from datasets import load_dataset
dataset = load_dataset("Anthropic/hh-rlhf", split="train")

# Reward model (can be trained separately)
from transformers import AutoModelForSequenceClassification
reward_model = AutoModelForSequenceClassification.from_pretrained("OpenAssistant/reward-model-deberta-v3-large")

# PPO Trainer
ppo_trainer = PPOTrainer(
    model=model,
    tokenizer=tokenizer,
    config=config,
    dataset=dataset,
    reward_model=reward_model,
)

ppo_trainer.train()
"""
GRPO_SNIPPET = """
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

# Load dataset
dataset = load_dataset("trl-lib/tldr", split="train")

# Define the reward function
def reward_len(completions, **kwargs):
    return [-abs(20 - len(completion)) for completion in completions]

# Define training arguments
training_args = GRPOConfig(
    output_dir="Qwen2-0.5B-GRPO",
    logging_steps=1,
    use_vllm=True,
    vllm_mode="colocate",
    vllm_tensor_parallel_size=1,
    vllm_gpu_memory_utilization=0.3,
    max_prompt_length=512,
    max_completion_length=1024,
    max_steps=2,
    num_generations=4,
    num_train_epochs=1,
    per_device_train_batch_size=4,
    push_to_hub=False,
    report_to=None
)

# Create and run the trainer
trainer = GRPOTrainer(
    model="Qwen/Qwen2-0.5B-Instruct",
    reward_funcs=reward_len,
    args=training_args,
    train_dataset=dataset,
)

trainer.train()
"""
DPO_SNIPPET = """
from trl import DPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer

model_name = "meta-llama/Llama-3-8b"
model = AutoModelForCausalLM.from_pretrained(model_name)
tokenizer = AutoTokenizer.from_pretrained(model_name)

# Dataset: prompt, chosen, rejected
dataset = load_dataset("Anthropic/hh-rlhf")

trainer = DPOTrainer(
    model=model,
    tokenizer=tokenizer,
    beta=0.1,  # RL temperature
    train_dataset=dataset["train"],
)
trainer.train()
"""
HH = [
    {
        "chosen": f"\n\nHuman: Is it {i}?\n\nAssistant: Yes.",
        "rejected": f"\n\nHuman: Is it {i}?\n\nAssistant: No idea.",
    }
    for i in range(32)
]
TLDR = [{"prompt": f"POST {i} TL;DR:", "completion": " short"} for i in range(6)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, and a Hub of two data sets."""
    monkeypatch.chdir(tmp_path)
    hub = {"Anthropic/hh-rlhf": HH, "trl-lib/tldr": TLDR}

    def load_dataset(name: str, split: str | None = None) -> Any:
        rows = datasets.Dataset.from_list(hub[name])
        return rows if split == "train" else datasets.DatasetDict(train=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return tmp_path


@pytest.fixture
def scorer(tmp_path):
    """A reward model with a tokenizer of its own, as the Hub has them: an encoder."""
    folder = tiny.encoder(tmp_path / "scorer", "deberta", seed=3, max_position_embeddings=512)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    return folder


def ran(snippet: str, **models: Any) -> dict[str, Any]:
    """What a snippet leaves behind, with plaudit's trainers for TRL's and these models for those of the Hub."""
    for name, folder in models.items():
        known = {"llama": "meta-llama/Llama-3-8b-instruct", "qwen": "Qwen/Qwen2-0.5B-Instruct",
                 "base": "meta-llama/Llama-3-8b", "scorer": "OpenAssistant/reward-model-deberta-v3-large"}  # fmt: skip
        assert f'"{known[name]}"' in snippet
        snippet = snippet.replace(f'"{known[name]}"', repr(str(folder)))
    space: dict[str, Any] = {"__name__": "snippet", "load_dataset": datasets.load_dataset}
    exec(snippet.replace("from trl import", "from plaudit.trl_shapes import"), space)
    return space


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_s2_04_the_ppo_snippet_runs_as_it_stands(at, here, scorer):
    run = ran(PPO_SNIPPET, llama=at / "model", scorer=scorer)["ppo_trainer"].run
    rows = run.metrics()
    # 32 prompts are two rollouts of 16, each learned from twice, as plaudit's PPO does.
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in samples} <= {row["chosen"].removesuffix(" Yes.") for row in HH}
    # The reward model reads what was said as text, by its own tokenizer.
    model, words = (
        AutoModelForSequenceClassification.from_pretrained(scorer).eval(),
        AutoTokenizer.from_pretrained(scorer),
    )
    for row in samples:
        with torch.no_grad():
            ids = words(row["prompt"] + row["completion"], return_tensors="pt")
            assert row["score"] == pytest.approx(float(model(**ids).logits), abs=0.02)  # in bfloat16, perhaps
    assert max(row["score"] for row in samples) - min(row["score"] for row in samples) > 0.1
    logged = watched.scalars(run.folder / "tensorboard")
    assert logged[("score", 1)] == pytest.approx(rows[0]["score"])
    policy = AutoModelForCausalLM.from_pretrained(run.final)
    before = AutoModelForCausalLM.from_pretrained(at / "model")
    assert not torch.equal(policy.lm_head.weight, before.lm_head.weight)
    kept = [path.name.partition("-")[0] for path in sorted(Path("runs/ppo/given").glob("*-*"))]
    assert kept == ["data", "model", "reward"]
    # The same program finds the run complete: the same weights and rows have the same names.
    assert ran(PPO_SNIPPET, llama=at / "model", scorer=scorer)["ppo_trainer"].run.summary == run.summary


def test_s2_05_the_grpo_snippet_runs_as_it_stands(talker, here, capsys):
    folder = shutil.copytree(talker, here / "model")
    read = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**read, "max_position_embeddings": 2048}))
    run = ran(GRPO_SNIPPET, qwen=folder)["trainer"].run
    assert run.folder == Path("Qwen2-0.5B-GRPO")
    assert [row["step"] for row in run.metrics()] == [1, 2]
    samples = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert [row["score"] for row in samples] == [-abs(20 - len(row["completion"])) for row in samples]
    assert len({row["prompt"] for row in samples[:4]}) == 1
    assert "completions are sampled in the training process itself" in capsys.readouterr().err


def test_s2_07_the_dpo_snippet_runs_as_it_stands(at, here):
    run = ran(DPO_SNIPPET, base=at / "model")["trainer"].run
    assert run.metrics()[-1]["step"] == 1


def test_s2_05_grpo_learns_the_length_that_a_function_likes(talker, here):
    def reward_len(completions, **kwargs):
        return [-abs(20 - len(completion)) for completion in completions]

    trainer = GRPOTrainer(
        model=str(talker),
        reward_funcs=[reward_len],
        args=GRPOConfig(
            output_dir="run", max_steps=12, max_completion_length=24, learning_rate=5e-3, num_generations=8,
            per_device_train_batch_size=16, gradient_accumulation_steps=4, bf16=False, beta=0.0, save_strategy="no",
        ),
        train_dataset=[{"prompt": f"{i} "} for i in range(100)],
    )  # fmt: skip
    rows = trainer.train().metrics()
    assert rows[0]["score"] < -12
    assert max(row["score"] for row in rows[-3:]) > rows[0]["score"] + 4
    trainer.save_model("copy")
    assert AutoModelForCausalLM.from_pretrained("copy").num_parameters() > 0


# ------------------------------------------------------------------------------------------- what arguments become

PAIRS = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
SHAPES: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (SFTTrainer, {"args": SFTConfig(max_seq_length=9, packing=True, num_train_epochs=3, eval_strategy="no")},
     {"max_tokens": 9, "epochs": 3, "holdout": 0.0}),
    (SFTTrainer, {"args": SFTConfig(completion_only_loss=False, lr_scheduler_type="cosine", warmup_ratio=0.1)},
     {"learn": "all", "schedule": "cosine", "warmup": 0.1}),
    (RewardTrainer, {"args": RewardConfig(center_rewards_coefficient=0.01, max_length=512, report_to="wandb")},
     {"centering": 0.01, "max_tokens": 512, "track": "wandb"}),
    (DPOTrainer, {"beta": 0.3, "args": DPOConfig(label_smoothing=0.1, max_steps=-1, save_total_limit=2)},
     {"verb": "dpo", "beta": 0.3, "label_smoothing": 0.1, "steps": 0, "keep": 2}),
    (DPOTrainer, {"loss_type": "ipo", "eval_dataset": PAIRS, "ref_model": None},
     {"verb": "ipo_avg", "holdout": 0.05, "eval_data": PAIRS}),
    (CPOTrainer, {"args": CPOConfig(cpo_alpha=0.5, bf16=True)},
     {"verb": "cpo", "sft_weight": 0.5, "precision": "bfloat16"}),
    (CPOTrainer, {"args": CPOConfig(loss_type="simpo", simpo_gamma=0.5)}, {"verb": "simpo", "gamma": 0.5}),
    (ORPOTrainer, {"beta": 0.2, "gradient_accumulation_steps": 3}, {"beta": 0.2, "batch_size": 24}),
    (KTOTrainer, {"desirable_weight": 2.0, "per_device_train_batch_size": 5},
     {"desirable_weight": 2.0, "batch_size": 5}),
    (BCOTrainer, {"max_density_ratio": 7.0}, {"max_density_ratio": 7.0}),
    (GRPOTrainer, {"reward_funcs": [len, "count:a"], "loss_type": "dr_grpo", "epsilon": 0.1, "epsilon_high": 0.3,
                   "num_iterations": 2, "per_device_train_batch_size": 4, "steps_per_generation": 3,
                   "reward_weights": [1.0, 2.0], "optimizers": (None, None), "data_collator": None},
     {"verb": "dr_grpo", "rewards": [len, "count:a"], "clip_low": 0.1, "clip_high": 0.3, "reuse": 2, "batch_size": 4,
      "rollout": 12, "reward_weights": (1.0, 2.0)}),
    (DPOTrainer, {"loss_type": ["sigmoid_norm"]}, {"verb": "dpo_norm"}),
    (DPOTrainer, {"loss_type": "aot_unpaired"}, {"verb": "aot_unpaired"}),
    (DPOTrainer, {"loss_type": "bco_pair"}, {"verb": "bco_pair"}),
    (CPOTrainer, {"loss_type": "alphapo", "alpha": 0.5}, {"verb": "alphapo", "alpha": 0.5}),
    (CPOTrainer, {"loss_type": "hinge", "cpo_alpha": 0.5}, {"verb": "slic", "sft_weight": 0.5}),
    (CPOTrainer, {"loss_type": "ipo"}, {"verb": "cpo_ipo"}),
    (KTOTrainer, {"loss_type": "apo_zero_unpaired", "undesirable_weight": 2.0},
     {"verb": "apo_zero_unpaired", "undesirable_weight": 2.0}),
    (GRPOTrainer, {"reward_funcs": len, "delta": 4.0, "max_prompt_length": 9, "sync_ref_model": True,
                   "ref_model_mixup_alpha": 0.5, "beta": 0.1},
     {"dual_clip": 4.0, "max_prompt_tokens": 9, "long_prompts": "cut", "reference_every": 512, "reference_share": 0.5}),
    (GRPOTrainer, {"reward_funcs": len, "loss_type": "sapo", "sapo_temperature_neg": 2.0, "ref_model_sync_steps": 3},
     {"verb": "sapo", "temperature_bad": 2.0, "reference_every": 0}),
    (GRPOTrainer, {"reward_funcs": len, "loss_type": "vespo"}, {"verb": "vespo"}),
    (GRPOTrainer, {"reward_funcs": len, "loss_type": "luspo"}, {"verb": "luspo"}),
    (GRPOTrainer, {"reward_funcs": len, "loss_type": "cispo"}, {"verb": "cispo"}),
    (GRPOTrainer, {"reward_funcs": len, "loss_type": "dapo"}, {"verb": "dapo"}),
    (PPOTrainer, {"reward_model": "judge", "kl_penalty": "abs", "ratio_threshold": 10.0, "tracker_project_name": "trl"},
     {"rewards": ["judge"], "kl_term": "reward_abs", "ratio_threshold": 10.0, "track_project": "trl"}),
    (PPOTrainer, {"reward_model": "judge", "config": PPOConfig(
        batch_size=32, mini_batch_size=4, gradient_accumulation_steps=2, ppo_epochs=3, steps=100, init_kl_coef=0.2,
        adap_kl_ctrl=True, horizon=50, cliprange=0.1, vf_coef=0.5, use_score_norm=True, use_score_scaling=True)},
     {"rollout": 32, "batch_size": 8, "reuse": 3, "steps": 48, "kl": 0.2, "kl_target": 6.0, "kl_horizon": 50,
      "clip": 0.1, "value_weight": 0.5, "reward_normalise": True, "reward_scale": False, "rewards": ["judge"]}),
    (PPOTrainer, {"reward_model": "judge", "value_model": object(), "ref_model": "other", "args": PPOConfig(
        per_device_train_batch_size=4, gradient_accumulation_steps=4, num_mini_batches=2, num_ppo_epochs=4,
        total_episodes=33, kl_coef=0.05, response_length=53, missing_eos_penalty=1.0, adap_kl_ctrl=False)},
     {"rollout": 16, "batch_size": 8, "reuse": 4, "steps": 24, "kl_target": 0.0, "max_new_tokens": 53,
      "missing_end_penalty": 1.0, "reference": "other"}),
]  # fmt: skip


@pytest.mark.parametrize(("trainer", "given", "becomes"), SHAPES, ids=lambda part: getattr(part, "__name__", ""))
def test_s2_03_arguments_become_settings(trainer, given, becomes):
    settings = trainer(model="m", train_dataset=PAIRS, **given).settings()
    assert (settings.model, settings.data) == ("m", PAIRS)
    verb = becomes.get("verb", trainer.__name__.removesuffix("Trainer").lower())
    assert verb_of(type(settings)) == verb
    assert {name: getattr(settings, name) for name in becomes if name != "verb"} == {
        name: value for name, value in becomes.items() if name != "verb"
    }


def test_s2_05_no_argument_depends_on_the_order_in_which_they_are_given():
    for given in ({"epsilon": 0.2, "epsilon_high": 0.28}, {"epsilon_high": 0.28, "epsilon": 0.2}):
        settings = GRPOTrainer(model="m", train_dataset=PAIRS, reward_funcs=len, **given).settings()
        assert (settings.clip_low, settings.clip_high) == (0.2, 0.28)
    for given in ({"save_strategy": "no", "save_steps": 9}, {"save_steps": 9, "save_strategy": "no"}):
        assert DPOTrainer(model="m", train_dataset=PAIRS, **given).settings().save_every == 0


def test_s2_04_the_processes_are_counted_where_trl_counts_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    ppo = PPOTrainer(model="m", reward_model="r", dataset=PAIRS, config=PPOConfig(batch_size=16)).settings()
    assert (ppo.rollout, ppo.batch_size) == (64, 64)
    grpo = GRPOTrainer(model="m", reward_funcs="r", train_dataset=PAIRS, per_device_train_batch_size=2).settings()
    assert (grpo.rollout, grpo.batch_size) == (8, 8)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: GRPOConfig(top_p=0.9), r"^GRPOConfig: 'top_p' is 0.9, but can only be 1.0: the loss is that of"),
        (lambda: GRPOConfig(push_to_hub=True), r"'push_to_hub' is True, but can only be False: push the folder"),
        (lambda: GRPOConfig(num_generation=4), r"'num_generation' has no counterpart; the nearest that has is 'num_"),
        (lambda: SFTConfig(model_init_kwargs={"revision": "b"}), r"'model_init_kwargs' has no counterpart; the"),
        (lambda: SFTConfig(save_strategy="epoch"), r"^save_strategy: 'epoch' can't be had: give 'no', or 'steps' and"),
        (lambda: SFTConfig(report_to=["wandb", "mlflow"]), r"^report_to: \['wandb', 'mlflow'\] is not one of none"),
        (lambda: DPOTrainer("m", loss_type=["sigmoid", "sft"]), r"^loss_type: sigmoid, sft is not one of sigmoid, rob"),
        (lambda: PPOConfig(kl_penalty="tv"), r"^kl_penalty: 'tv' is not one of kl, abs, mse, full"),
        (lambda: DPOTrainer("m", loss_type="sigmoid2"), r"^loss_type: sigmoid2 is not one of sigmoid, robust"),
        (lambda: DPOTrainer("m", loss_type="hinge", label_smoothing=0.1), r"`hinge` has no setting 'label_smoothing'"),
        (lambda: DPOTrainer("m", args=GRPOConfig()), r"^args: GRPOConfig is not plaudit.trl_shapes.DPOConfig"),
        (lambda: SFTTrainer("m", callbacks=[object()]), r"^callbacks: SFTTrainer has no use for it here: leave it out"),
        (lambda: DPOTrainer("m", ref_model="other", train_dataset=PAIRS).settings(), r"^ref_model: the reference is"),
        (lambda: SFTTrainer("m", train_dataset=None).train(), r"sft: `data` is None, but must be a valid string"),
    ],
)  # fmt: skip
def test_s2_03_what_has_no_counterpart_is_refused_in_one_sentence(made, message):
    with pytest.raises(PlauditError, match=message) as caught:
        made()
    assert "\n" not in str(caught.value)


def test_s2_04_objects_are_kept_by_what_they_weigh(at, here):
    from peft import LoraConfig, get_peft_model

    model, words = AutoModelForCausalLM.from_pretrained(at / "model"), AutoTokenizer.from_pretrained(at / "model")
    adapter = LoraConfig(r=3, lora_alpha=5)
    trainer = SFTTrainer(model, SFTConfig(output_dir="run"), train_dataset=PAIRS, peft_config=adapter)
    first = trainer.settings()
    assert (first.lora_rank, first.lora_alpha) == (3, 5.0)
    assert trainer.settings().model == first.model
    assert torch.equal(AutoModelForCausalLM.from_pretrained(first.model).lm_head.weight, model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert trainer.settings().model != first.model
    assert SFTTrainer(str(at / "model"), tokenizer=words, train_dataset=PAIRS).settings().model == str(at / "model")
    # What an earlier run of PPO left beside the weights comes along.
    shutil.copytree(at / "model", here / "tuned")
    (here / "tuned" / "value_head.safetensors").write_bytes(b"a value head")
    tuned = SFTTrainer(AutoModelForCausalLMWithValueHead.from_pretrained("tuned"), train_dataset=PAIRS).settings()
    assert Path(tuned.model, "value_head.safetensors").read_bytes() == b"a value head"
    words.add_tokens(["another"])
    with pytest.raises(PlauditError, match="processing_class: it is not the tokenizer of"):
        SFTTrainer(str(at / "model"), tokenizer=words, train_dataset=PAIRS).settings()
    with pytest.raises(PlauditError, match="model: an adapter is on it: give the model without, and peft_config"):
        SFTTrainer(get_peft_model(model, adapter), train_dataset=PAIRS).settings()


@pytest.mark.parametrize(
    ("trainer", "rows"),
    [
        (SFTTrainer, [{"text": word, "label": 1} for word in examples.words(8)]),
        (RewardTrainer, examples.judgements("comparisons", 12)),
        (CPOTrainer, examples.judgements("comparisons", 12)),
        (KTOTrainer, examples.judgements("labels", 8)),
    ],
)
def test_s2_01_s2_02_s2_03_the_other_trainers_train(trainer, rows, at, here):
    run = trainer(str(at / "model"), train_dataset=datasets.Dataset.from_list(rows), max_steps=1).train()
    assert run.metrics()[-1]["step"] == 1
    assert run.finished
