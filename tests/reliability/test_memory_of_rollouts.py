"""Where memory runs out in sampling or in scoring, it is done again with less at once (S1-20)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny
from plaudit.errors import PlauditError
from plaudit.loading import load_reward_model, load_tokenizer
from plaudit.policy import Policy
from plaudit.rewards import LabelReward, ModelReward, Rewards
from plaudit.sampler import LocalSampler, Sampling

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]


def sampled(sampler):
    return sampler.sample(PROMPTS, Sampling(8, stop_ids=(256,)), 3, torch.Generator().manual_seed(4))


def held_to(sampler, rows, after=0, error=FULL):
    """Lets the sampler's model take so many rows, once it has been called so often; the rows of each call."""
    calls = []

    def look(module, args, kwargs):
        calls.append(len(kwargs["input_ids"] if "input_ids" in kwargs else kwargs["decoder_input_ids"]))
        if len(calls) > after and calls[-1] > rows:
            raise error

    sampler._shadow.module.register_forward_pre_hook(look, with_kwargs=True)
    return calls


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_s1_20_sampling_goes_on_with_fewer_rows_and_draws_the_same(kind, after):
    model = tiny.model(kind, initializer_range=0.3)
    whole = sampled(LocalSampler(model))
    sampler = LocalSampler(model)
    calls = held_to(sampler, 4, after)
    found = sampled(sampler)
    assert (found.completions, found.truncated) == (whole.completions, whole.truncated)
    for row, other in zip(found.logprobs, whole.logprobs, strict=True):
        np.testing.assert_allclose(row, other, atol=1e-4)
    assert max(calls) > 4 >= calls[-1]
    calls.clear()
    sampled(sampler)
    assert max(calls) <= 4  # it is not tried again


def test_s1_20_a_single_row_that_does_not_fit_is_told():
    sampler = LocalSampler(tiny.model())
    calls = held_to(sampler, 0)
    with pytest.raises(PlauditError, match=r"while one completion was sampled alone: lower max_new_tokens"):
        sampled(sampler)
    assert len(calls) == 4  # 12 rows, 6, 3, 1


def test_s1_20_another_mistake_in_sampling_is_not_taken_for_a_lack_of_memory():
    sampler = LocalSampler(tiny.model())
    calls = held_to(sampler, 0, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        sampled(sampler)
    assert len(calls) == 1


@pytest.fixture
def judge(tmp_path):
    name = tiny.folder(tmp_path / "judge", chat=False)
    tokenizer = load_tokenizer(name)
    return ModelReward(load_reward_model(name, tokenizer, learns=False), tokenizer, tokens_per_pass=4096)


def limited(monkeypatch, tokens):
    forward, calls = Policy.forward, []

    def looked(self, batch, **asked):
        calls.append(batch.tokens.numel())
        if calls[-1] > tokens:
            raise FULL
        return forward(self, batch, **asked)

    monkeypatch.setattr(Policy, "forward", looked)
    return calls


TEXTS = {"prompts": ["ab", "c", "a longer one", "d"], "completions": ["x", "yz", "so", "it goes"]}


def test_s1_20_a_reward_model_goes_on_with_fewer_tokens_and_scores_the_same(judge, monkeypatch):
    whole = judge(**TEXTS)
    assert len(set(whole)) == 4
    calls = limited(monkeypatch, 20)
    assert judge(**TEXTS) == pytest.approx(whole, abs=1e-5)
    assert max(calls) > 20 >= calls[-1]
    calls.clear()
    judge(**TEXTS)
    assert max(calls) <= 20


def test_s1_20_a_text_that_does_not_fit_alone_is_told(judge, monkeypatch):
    limited(monkeypatch, 13)
    with pytest.raises(PlauditError, match=r"the longest has 14 tokens and begins with 'a longer oneso'"):
        Rewards({"judge": judge})(**TEXTS, columns={})


def label_reward(tmp_path, rows):
    """A classifier's probability of a label; it reads at most so many texts at once. The sizes of its calls."""
    reward = LabelReward(tiny.classifier(tmp_path / "kind", ["kind", "cruel"]), "kind", torch.device("cpu"))
    reward.pipeline.tokenizer.pad_token = reward.pipeline.tokenizer.eos_token
    reward.rows, calls = 4, []

    def look(module, args, kwargs):
        calls.append(len(kwargs["input_ids"]))
        if calls[-1] > rows:
            raise FULL

    reward.pipeline.model.register_forward_pre_hook(look, with_kwargs=True)
    return reward, calls


def test_s1_20_a_classifier_goes_on_with_fewer_texts_and_says_the_same(tmp_path):
    whole = label_reward(tmp_path, 32)[0](**TEXTS)
    reward, calls = label_reward(tmp_path, 2)
    assert reward(**TEXTS) == pytest.approx(whole, abs=1e-6)
    assert calls == [4, 2, 2]
    calls.clear()
    reward(**TEXTS)
    assert calls == [2, 2]


def test_s1_20_a_text_that_a_classifier_has_no_room_for_is_told(tmp_path):
    with pytest.raises(PlauditError, match="memory ran out when a classifier read one text"):
        label_reward(tmp_path, 0)[0](**TEXTS)
