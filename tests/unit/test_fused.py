"""Fused layers against the layers they stand for, and that nothing else is taken for one."""

from __future__ import annotations

import copy

import numpy as np
import peft
import pytest
import torch
from decoders import FUSED, OTHERS, made
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tiny
from plaudit import fused
from plaudit.decoding import Shadow
from plaudit.fused import FusedLayer, attend, rotate
from plaudit.sampler import LocalSampler, Sampling

PROMPTS = [[72, 105, 32, 116, 104, 101, 114, 101], [65], [70, 71, 72]]


def count(shadow: Shadow) -> int:
    return sum(isinstance(module, FusedLayer) for module in shadow.module.modules())


def assert_learners(found, model, atol: float) -> None:
    """The sampled log-probabilities are those of one pass without a cache."""
    for i, (completion, logprobs) in enumerate(zip(found.completions, found.logprobs, strict=True)):
        prompt = PROMPTS[i // 3]
        with torch.no_grad():
            scores = model(torch.tensor([[*prompt, *completion]])).logits[0].double().log_softmax(1)
        chosen = scores[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]
        np.testing.assert_allclose(logprobs, chosen, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_are_the_models_own(name, dtype):
    model = made(name, FUSED[name]).to(dtype)
    assert count(Shadow(model)) == 2
    found = LocalSampler(model, rows=4).sample(PROMPTS, Sampling(12), 3, torch.Generator().manual_seed(0))
    assert_learners(found, model, 1e-4 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone(name):
    model = made(name, OTHERS[name])
    assert count(Shadow(model)) == 0
    found = LocalSampler(model, rows=4).sample(PROMPTS, Sampling(12), 3, torch.Generator().manual_seed(0))
    assert_learners(found, model, 1e-4)


def test_a_layer_that_is_watched_is_left_alone():
    model = tiny.model("llama")
    model(torch.tensor([[1, 2]]), output_hidden_states=True)  # leaves transformers' own hooks behind
    assert count(Shadow(model)) == 2
    seen = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    shadow = Shadow(model)
    assert count(shadow) == 1
    shadow.module(torch.tensor([[1, 2]]))
    assert seen == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("large", [0, 10**9])
@pytest.mark.parametrize("added", [False, True])
def test_single_queries_attend_alike_on_both_ways(large, dtype, added, monkeypatch):
    monkeypatch.setattr(fused, "LARGE", large)
    torch.manual_seed(0)
    queries, keys, values = (
        torch.randn(3, heads, length, 8, dtype=dtype) for heads, length in ((6, 1), (2, 9), (2, 9))
    )
    seen = torch.arange(9) >= torch.tensor([0, 4, 8])[:, None]
    mask = torch.zeros(3, 9, dtype=dtype).masked_fill(~seen, -torch.inf) if added else seen
    found = attend(queries, keys, values, mask[:, None, None], 0.7)
    k, v = (x.double().repeat_interleave(3, 1) for x in (keys, values))
    scores = (queries.double() @ k.mT * 0.7).masked_fill(~seen[:, None, None], -torch.inf)
    expected = (scores.softmax(-1) @ v).flatten(1)[:, None]
    torch.testing.assert_close(
        found.double(), expected, atol={torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype], rtol=0
    )


def test_rotation_is_transformers_own():
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    angles = torch.randn(2, 5, 4).repeat(1, 1, 2)
    expected = torch.cat(apply_rotary_pos_emb(queries, keys, angles.cos(), angles.sin()), 1)
    found = rotate(torch.cat([queries, keys], 1), angles.cos(), angles.sin())
    torch.testing.assert_close(found, expected)


def test_only_changed_layers_are_made_again():
    model = tiny.model("llama")
    shadow = Shadow(model)
    before = dict(shadow._made)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1
    shadow.refresh()
    changed = [key for key, was in before.items() if shadow._made[key] is not was]
    mlp = model.model.layers[1].mlp
    assert changed == [("matrix", id(mlp.gate_proj.weight), id(mlp.up_proj.weight))]


# peft asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_need_not_be_merged(kind, changes):
    base = tiny.model(kind, initializer_range=0.3)
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}[kind]
    torch.manual_seed(1)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, fan_in_fan_out=kind == "gpt2", **changes
    )
    model = peft.get_peft_model(copy.deepcopy(base), lora).eval()
    before = copy.deepcopy(model.state_dict())
    sampler = LocalSampler(model)
    if kind == "llama":
        assert count(sampler._shadow) == (0 if changes else 2)
    generator = torch.Generator().manual_seed(0)
    assert_learners(sampler.sample(PROMPTS, Sampling(8), 3, generator), model, 1e-4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    sampler.refresh()
    assert_learners(sampler.sample(PROMPTS, Sampling(8), 3, generator), model, 1e-4)
    with model.disable_adapter():
        sampler.refresh()
        assert_learners(sampler.sample(PROMPTS, Sampling(8), 3, generator), base, 1e-4)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items() if "lora_B" not in name)
