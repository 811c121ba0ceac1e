"""How many tokens find room at once, by numbers given by hand; and what a run takes, against a model that is there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tiny
from plaudit import DPO, PPO, SFT, BestOfN, PlauditError, Reward, budget
from plaudit.budget import Needs, free_on, needs_of, reason, token_bytes, tokens_that_fit
from plaudit.loading import load_policy, load_reward_model

# 100 weights take 400 bytes, 50 that learn 600 more, and 1,000 are copies: 2,000 bytes beside activations.
NEEDS = Needs(model=None, weights=100, learning=50, copies=1000, token=10)
ON_POLICY = {"data": "d", "rewards": "count:a"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("free", "kind", "tokens"),
    [
        (2000 + 2 * 10 * 1024, "cpu", 1024),  # half of the room holds 1,024 tokens exactly
        (2000 + 2 * 10 * 1024 - 1, "cpu", 768),  # one byte less, and it is the next multiple of 256
        (2000 + 2 * 10 * 1023, "cpu", 768),
        (2000 + 2 * 10 * 9000, "cpu", 4096),
        (2000 + 2 * 10 * 9000, "cuda", 8960),
        (10**12, "cuda", 65536),
        (2000, "cpu", 512),
        (0, "cpu", 512),
        (0, "cuda", 1024),
        (None, "cpu", 4096),
        (10**12, "mps", 4096),
    ],
)
def test_tokens_that_fit(free, kind, tokens):
    assert tokens_that_fit(free, NEEDS, kind) == tokens


def test_the_reason_names_the_numbers():
    said = "0.0 GB are free, 0.0 GB beside the model; 50% of that holds {} tokens of 1e-05 MB"
    assert reason(2000 + 2 * 10 * 1100, NEEDS, "cpu") == said.format("1,100")
    assert reason(10**6, NEEDS, "cpu").endswith("holds 49,900 tokens of 1e-05 MB, and more than 4,096 gain nothing")
    assert reason(1000, NEEDS, "cpu") == said.format("0") + ", and fewer than 512 take too long"
    assert reason(None, NEEDS, "cpu") == "this system does not say what is free"


def test_bytes_of_a_token():
    assert token_bytes(10, 30, 4, half=True, checkpointed=False) == 4 * (480 + 240)
    assert token_bytes(10, 30, 4, half=False, checkpointed=False) == 4 * (480 + 480)
    assert token_bytes(10, 30, 4, half=True, checkpointed=True) == 720 + 4 * 40


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    alone = free_on(torch.device("cpu"))
    if alone is None:
        pytest.skip("this system does not say what is free")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_on(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)
    assert free_on(torch.device("mps")) is None


HOW = [{}, {"train_layers": 1}, {"lora_rank": 3}]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_weights_are_those_of_the_model_that_is_loaded(tmp_path, kind, how):
    if kind == "t5" and "train_layers" in how:
        return
    model = tiny.folder(tmp_path, kind)
    policy = load_policy(model, **how)
    needs = needs_of(SFT(model=model, data="d", **how), "float32")
    assert needs.learning == sum(p.numel() for p in policy.learning().values())
    assert needs.weights == sum(p.numel() for name, p in policy.named_parameters() if "lora" not in name)


def test_a_reward_model_has_one_output_instead_of_a_vocabulary(folder):
    policy = load_reward_model(folder, tiny.tokenizer())
    needs = needs_of(Reward(model=folder, data="d"), "float32")
    added = 32  # loading may add a padding token, whose embedding is not in the config yet
    assert needs.weights == sum(p.numel() for p in policy.parameters()) - added
    assert needs.learning == needs.weights


def test_copies_are_what_each_way_of_training_holds(folder):
    def copies(settings, precision="float32"):
        return needs_of(settings, precision).copies

    sft = SFT(model=folder, data="d")
    whole = needs_of(sft, "float32").weights
    assert copies(sft) == 0
    assert copies(sft, "bfloat16") == 2 * whole
    dpo = DPO(model=folder, data="d")
    assert copies(dpo) == 4 * whole
    assert copies(dpo, "bfloat16") == 4 * whole
    assert copies(replace(dpo, precompute_reference=True)) == 0
    assert copies(replace(dpo, lora_rank=2)) == 0
    top = needs_of(replace(dpo, train_layers=1), "float32")
    assert top.copies == 4 * top.learning < 4 * whole
    assert copies(PPO(model=folder, **ON_POLICY)) == 8 * whole
    assert copies(BestOfN(model=folder, **ON_POLICY)) == 4 * whole


def test_only_layers_that_learn_keep_activations(folder):
    sft = SFT(model=folder, data="d")
    layer = 48 * 32 + 16 * 64
    assert needs_of(sft, "float32").token == 2 * layer
    assert needs_of(replace(sft, train_layers=1), "float32").token == layer
    assert needs_of(replace(sft, lora_rank=1), "float32").token == 2 * layer
    assert needs_of(sft, "float32").state == 16 * needs_of(sft, "float32").weights


def test_counting_takes_no_random_number_and_no_memory(folder):
    before = torch.get_rng_state()
    needs = needs_of(SFT(model=folder, data="d"), "float32")
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.device.type for p in needs.model.parameters()} == {"meta"}


def test_a_model_that_is_none_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(PlauditError, match=f"model: cannot load '{tmp_path}': "):
        needs_of(SFT(model=str(tmp_path), data="d"), "float32")


def test_one_gpu_for_several_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9000, 10000))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for processes, free in ((None, 9000), (2, 9000), (4, 4500)):
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert budget.free_on(torch.device("cuda")) == free
