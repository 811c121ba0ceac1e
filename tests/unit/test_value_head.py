"""A value head with a hidden layer, as ARENA's exercise has it: Linear(d, 4d), ReLU, Linear(4d, 1) (S4-21)."""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn import functional

import tiny
from plaudit.batch import collate
from plaudit.errors import PlauditError
from plaudit.loading import load_policy, load_tokenizer, save_pretrained

BATCH = collate([[1, 2, 3], [9]], [[4, 5, 6], [8, 8, 8, 256]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def policy(model):
    """Whose head is no longer new."""
    policy = load_policy(model, value_head=True, value_hidden=4)
    torch.nn.init.normal_(policy.value.out.weight, generator=torch.Generator().manual_seed(0))
    return policy


def test_s4_21_a_head_with_a_hidden_layer_begins_at_nothing(model):
    policy = load_policy(model, value_head=True, value_hidden=4)
    shapes = {name: tuple(p.shape) for name, p in policy.learning().items() if name.startswith("value.")}
    expected = {"value.into.weight": (128, 32), "value.into.bias": (128,)}
    assert shapes == expected | {"value.out.weight": (1, 128), "value.out.bias": (1,)}
    values = policy(BATCH, values=True).values
    assert values.shape == BATCH.tokens.shape
    assert values.eq(0).all()


def test_s4_21_a_value_is_what_the_two_layers_make_of_the_state_before_the_action(policy):
    found = policy(BATCH, values=True).values
    ids = BATCH.tokens[0, :6]
    states = policy.backbone(ids[None], output_hidden_states=True).hidden_states[-1][0]
    head = policy.value
    inner = functional.relu(states @ head.into.weight.T + head.into.bias)
    expected = (inner @ head.out.weight.T + head.out.bias)[:, 0]
    assert expected[2:5].abs().min() > 1e-3
    torch.testing.assert_close(found[0, 3:6], expected[2:5], rtol=1e-4, atol=1e-5)
    assert found[~BATCH.actions].eq(0).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert policy(BATCH, values=True).values.dtype == torch.float32


def test_s4_21_it_is_saved_and_taken_up_again(model, policy, tmp_path):
    expected = policy(BATCH, values=True).values
    save_pretrained(policy, load_tokenizer(model), tmp_path)
    again = load_policy(str(tmp_path), value_head=True, value_hidden=4)
    torch.testing.assert_close(again(BATCH, values=True).values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("made", "asked"), [(4, 0), (4, 2), (0, 4)])
def test_s4_21_a_head_of_another_shape_is_told_of(made, asked, model, tmp_path):
    save_pretrained(load_policy(model, value_head=True, value_hidden=made), load_tokenizer(model), tmp_path)
    told = f"value_hidden is {asked}, but the value head that lies in '{tmp_path}' was made with {made}: set"
    with pytest.raises(PlauditError, match=re.escape(told)):
        load_policy(str(tmp_path), value_head=True, value_hidden=asked)
