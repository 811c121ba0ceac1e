"""One job through three doors: flags, a YAML file, Python. Same weights, in folders that need no plaudit to open."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from doorway import PROMPTS, by_all_doors, weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import plaudit as package
from plaudit import PPO, SFT, PlauditError, Reward, train

REWARD = """
def reward(prompts, completions, id, **columns):
    return [len(text) % 3 + i / 8 for text, i in zip(completions, id)]
"""


def test_ppo_gives_the_same_bits_by_flags_by_yaml_and_from_python(plaudit, here, models, prompts):
    (here / "reward.py").write_text(REWARD)
    folders = by_all_doors(
        plaudit, here, PPO, model=str(models / "plain"), data=prompts, rewards=["reward.py:reward", "count:e"],
        reward_weights=[1.0, 0.5], rollout=8, batch_size=4, steps=4, max_new_tokens=6,
    )  # fmt: skip
    first, *others = map(weights, folders)
    assert set(first) == {"model.safetensors", "value_head.safetensors"}
    assert all(other == first for other in others)
    assert first["model.safetensors"] != weights(models / "plain")["model.safetensors"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders[0]), AutoTokenizer.from_pretrained(folders[0])
    asked = tokenizer(PROMPTS[0], return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert answer.shape == (1, asked.input_ids.shape[1] + 5)


def test_sft_gives_the_same_bits_through_every_door(plaudit, here, models, demonstrations):
    folders = by_all_doors(plaudit, here, SFT, model=str(models / "plain"), data=demonstrations, steps=4, batch_size=4)
    first, *others = map(weights, folders)
    assert all(other == first for other in others)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (models / "plain", folders[0]))
    ids = AutoTokenizer.from_pretrained(folders[0])("say one one!", return_tensors="pt").input_ids
    with torch.no_grad():
        assert after(ids, labels=ids).loss < before(ids, labels=ids).loss - 0.1


def test_reward_gives_the_same_bits_and_a_classifier_that_prefers_what_was_chosen(plaudit, here, models, comparisons):
    folders = by_all_doors(plaudit, here, Reward, model=str(models / "plain"), data=comparisons, steps=6, batch_size=8)
    first, *others = map(weights, folders)
    assert all(other == first for other in others)
    model = AutoModelForSequenceClassification.from_pretrained(folders[0])
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    with torch.no_grad():
        scores = [model(**tokenizer(PROMPTS[1] + text, return_tensors="pt")).logits.item() for text in (" two!", " no")]
    assert scores[0] > scores[1]


def test_a_reward_model_rewards_a_policy_of_another_kind(plaudit, models, prompts):
    said = plaudit(
        "ppo", "--model", models / "chat", "--data", prompts, "--rewards", models / "judge", "--rollout", 8,
        "--batch-size", 8, "--steps", 2, "--max-new-tokens", 4, "--holdout", 0, "--precision", "float32",
    )  # fmt: skip
    assert (said.code, said.out) == (0, "runs/ppo\n"), said.err


def test_python_validates_as_the_command_does(models):
    with pytest.raises(PlauditError, match="`kl` is -1"):
        train(PPO(model=str(models / "plain"), data="x.jsonl", rewards="count:a", kl=-1))


def test_the_doors_of_people_open_from_the_package_without_torch():
    code = (
        "import sys; from plaudit import Agreement, Annotate, Compare, Export, Import, Label, Loop;"
        "from plaudit import agreement, annotate, export, label, take_in;"
        "assert 'torch' not in sys.modules; from plaudit import compare, loop;"
        "assert all(map(callable, (agreement, annotate, compare, export, label, loop, take_in)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_shows_what_it_promises_and_nothing_else():
    assert all(getattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = package.trian
