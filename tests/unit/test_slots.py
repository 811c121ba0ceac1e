"""Slots that are filled again: the same rows as in one large batch, in fewer steps and bounded memory."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import pytest
import torch

import tiny
from plaudit import slots
from plaudit.decoding import SlabLayer
from plaudit.sampler import LocalSampler, Sampled, Sampling
from plaudit.slots import Slots

END = 256
STOPS = tuple(range(0, END, 6))
PROMPTS = [[72, 105, 32, 116, 104, 101, 114, 101], [65], [70, 71, 72], [72, 105, 32], [65], [9, 8, 7, 6, 5, 4, 3]]
KINDS = ["llama", "gpt2"]


@lru_cache
def learner(kind: str, dtype: torch.dtype = torch.float64):
    """A model whose next tokens are far from uniform."""
    return tiny.model(kind, initializer_range=0.3).to(dtype)


def decode(ids: list[int]) -> str:
    return bytes(i for i in ids if i < END).decode("latin-1")


def sample(model, prompts, sampling, n, seed=0, **options) -> Sampled:
    return LocalSampler(model, decode, **options).sample(prompts, sampling, n, torch.Generator().manual_seed(seed))


def assert_same(found: Sampled, expected: Sampled, atol: float = 1e-9) -> None:
    assert found.completions == expected.completions
    assert found.truncated == expected.truncated
    for row, other in zip(found.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(row, other, atol=atol)


class Waves(Slots):
    """Slots that are never filled again."""

    def __init__(self, *args):
        super().__init__(*args)
        self.refills = False


@pytest.fixture
def calls(monkeypatch):
    """(rows, tokens) of each pass through the model."""
    shapes = []
    forward = Slots._forward

    def noted(self, tokens, *args):
        shapes.append(tuple(tokens.shape))
        return forward(self, tokens, *args)

    monkeypatch.setattr(Slots, "_forward", noted)
    return shapes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "refill", "room"), [(1, 0.125, 4), (4, 0.0, 4), (4, 1.0, 128), (7, 0.3, 4)])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_refilled_slots_say_what_one_large_batch_says(kind, rows, refill, room, temperature, monkeypatch):
    monkeypatch.setattr(SlabLayer, "room", room)
    sampling = Sampling(14, temperature, stop_ids=STOPS, min_new_tokens=3)
    whole = sample(learner(kind), PROMPTS, sampling, 4)
    assert len({len(row) for row in whole.completions}) > (3 if temperature else 1)
    assert_same(sample(learner(kind), PROMPTS, sampling, 4, rows=rows, refill=refill), whole)


def test_refilled_slots_say_the_same_in_float32():
    sampling = Sampling(14, 0.8, stop_ids=STOPS)
    model = learner("llama", torch.float32)
    assert_same(sample(model, PROMPTS, sampling, 6, rows=5), sample(model, PROMPTS, sampling, 6), atol=1e-4)


def test_stop_strings_end_rows_of_any_age():
    free = sample(learner("gpt2"), PROMPTS, Sampling(12), 3).completions
    texts = tuple(decode(row)[k : k + 2] for row, k in zip(free, [1, 3, 5, 7], strict=False))
    sampling = Sampling(12, stop_strings=texts, min_new_tokens=4)
    whole = sample(learner("gpt2"), PROMPTS, sampling, 3)
    lengths = [len(row) for row in whole.completions]
    assert min(lengths) < 12 == max(lengths)
    assert_same(sample(learner("gpt2"), PROMPTS, sampling, 3, rows=4), whole)


def test_a_straggler_holds_nobody_up(calls, monkeypatch):
    sampling = Sampling(24, stop_ids=STOPS)
    refilled = sample(learner("llama"), PROMPTS, sampling, 6, rows=4, refill=0.25)
    steps = [rows for rows, tokens in calls if tokens == 1 and rows > 1]
    calls.clear()
    monkeypatch.setattr("plaudit.sampler.Slots", Waves)
    assert_same(sample(learner("llama"), PROMPTS, sampling, 6, rows=4, compact=0.0), refilled)
    waves = [rows for rows, tokens in calls if tokens == 1 and rows > 1]
    assert sum(steps) < 0.8 * sum(waves)
    assert len(steps) < len(waves)
    # A slot is never empty for long: nearly every row-step gives a token that is kept.
    assert sum(steps) < 1.2 * sum(map(len, refilled.completions))


@pytest.mark.parametrize("budget", [1, 10, 4096])
def test_a_prompt_is_computed_once_however_its_rows_are_split(budget, calls, monkeypatch):
    monkeypatch.setattr(slots, "PREFILLED", budget)
    # Every distinct prompt has at least two tokens, so a pass of several tokens is a prefill.
    prompts = [p if len(p) > 1 else [*p, 66] for p in PROMPTS]
    sampling = Sampling(6, stop_ids=STOPS)
    found = sample(learner("llama"), prompts, sampling, 5, rows=3)
    prefills = [shape for shape in calls if shape[1] > 1]
    assert sum(rows for rows, _ in prefills) == len({tuple(p) for p in prompts})
    assert all(rows == 1 or rows * width <= budget for rows, width in prefills)
    calls.clear()
    assert_same(sample(learner("llama"), prompts, sampling, 5), found)
    assert sum(rows for rows, width in calls if width > 1) == 5


def test_slabs_do_not_grow_with_the_stream(monkeypatch):
    monkeypatch.setattr(SlabLayer, "room", 4)
    widths, update = [], SlabLayer.update

    def noted(self, keys, values, *args):
        seen = update(self, keys, values, *args)
        widths.append((self.keys.shape[2], seen[0].shape[2]))
        return seen

    monkeypatch.setattr(SlabLayer, "update", noted)
    found = sample(learner("llama"), PROMPTS, Sampling(10, stop_ids=STOPS), 12, rows=5)
    assert sum(map(len, found.completions)) > 5 * (8 + 10)  # columns, if none were let go
    longest = 8 + 10 - 1
    assert max(seen for _, seen in widths) <= longest
    assert max(kept for kept, _ in widths) <= 2 * longest + 4


def test_empty_slots_stay_within_the_positions_there_are():
    model = tiny.model("gpt2", initializer_range=0.3, n_positions=16).double()
    sampling = Sampling(9, stop_ids=STOPS)
    lazy = sample(model, PROMPTS, sampling, 5, rows=6, refill=1.0, compact=0.0)
    assert_same(lazy, sample(model, PROMPTS, sampling, 5))
    assert any(lazy.truncated)


def test_keys_of_the_row_before_are_hidden():
    """Not only small in effect: whatever is in the columns that a row does not see changes nothing."""
    model = learner("llama")
    made = Slots(model, 64)
    made.start([(1, 2, 3, 4, 5, 6)] * 2)
    made.step(torch.tensor([7, 8]))
    for layer in made.cache.layers:
        layer.keys[1], layer.values[1] = 1e4, -1e4
    logits = made.place(torch.tensor([1]), [(9, 10)])
    with torch.no_grad():
        found = made.step(torch.tensor([9, 11]))
        torch.testing.assert_close(logits, model(torch.tensor([[9, 10]])).logits[:, -1], atol=1e-9, rtol=0)
        torch.testing.assert_close(found[1:], model(torch.tensor([[9, 10, 11]])).logits[:, -1], atol=1e-9, rtol=0)
        rest = model(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 9]])).logits[:, -1]
    torch.testing.assert_close(found[:1], rest, atol=1e-9, rtol=0)


def test_a_longer_prompt_finds_room_before_the_first_column():
    model = learner("llama")
    made = Slots(model, 64)
    made.start([(1, 2), (3,)])
    long = tuple(range(20, 32))
    made.place(torch.tensor([1]), [long])
    with torch.no_grad():
        found = made.step(torch.tensor([5, 6]))
        for row, ids in zip(found, ([1, 2, 5], [*long, 6]), strict=True):
            torch.testing.assert_close(row, model(torch.tensor([ids])).logits[0, -1], atol=1e-9, rtol=0)


def test_a_guide_leaves_no_hook_on_the_learner():
    model = copy.deepcopy(learner("gpt2"))
    sampler = LocalSampler(model, guide=lambda states: states.new_zeros(len(states), 257))
    sampler.sample(PROMPTS, Sampling(3), 2, torch.Generator().manual_seed(0))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
