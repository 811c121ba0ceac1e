"""Layers as a learner runs them against transformers' own: numbers, gradients, what is kept for the backward pass."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from decoders import FUSED, OTHERS, made
from torch import Tensor

import tiny
from plaudit.backbone import checkpoint_layers, layers_of
from plaudit.batch import Batch, collate
from plaudit.layout import padded, side_by_side
from plaudit.loading import load_policy
from plaudit.policy import Policy

PROMPTS = [[72, 105, 32, 116], [72, 105, 32, 116], [65], [70, 71]]
BATCH = collate(PROMPTS, [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]], groups=[0, 0, 1, 2])


def learned(policy: Policy, batch: Batch = BATCH) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, and the gradients of a sum that weighs each of them differently."""
    found = policy(batch, logprobs=True).logprobs
    weights = torch.arange(1, found.numel() + 1, dtype=found.dtype).view(found.shape) / found.numel()
    return found.detach(), list(torch.autograd.grad((found * weights).sum(), list(policy.learning().values())))


def plainly(policy: Policy, batch: Batch = BATCH) -> tuple[Tensor, list[Tensor]]:
    """The same by padded rows, which transformers' own layers compute."""
    policy.layout = lambda rows: padded(rows, policy.width)
    try:
        return learned(policy, batch)
    finally:
        del policy.layout


def is_lean(policy: Policy) -> bool:
    return all("forward" in vars(layer) for layer in layers_of(policy.base))


def assert_same(found: tuple, expected: tuple, share: float) -> None:
    """share: by how much of the largest entry of its tensor each may be off."""
    for one, other in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        assert other.abs().max() > 0
        assert (one - other).abs().max() <= share * other.abs().max()


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", FUSED)
def test_B33_numbers_and_gradients_are_those_of_transformers(name, dtype, share):
    # In float64 transformers' own norms round to float32, and their gradients with them.
    policy = Policy(made(name, FUSED[name]).to(dtype))
    assert is_lean(policy)
    assert_same(learned(policy), plainly(policy), share)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone_and_right_all_the_same(name):
    windows = {"sliding_window": 7} if "sliding_window" in OTHERS[name] else {}  # just long enough for the rows
    policy = Policy(made(name, {**OTHERS[name], **windows}))
    assert not any("forward" in vars(layer) for layer in layers_of(policy.base))
    assert policy.beside(BATCH)
    assert_same(learned(policy), plainly(policy), 1e-4)


def test_a_norm_by_hand_and_its_gradient_in_steps():
    from plaudit.layers import _Normed

    hidden = torch.tensor([[3.0, 4.0]], requires_grad=True)
    weight = torch.tensor([2.0, 0.5], requires_grad=True)
    found = _Normed.apply(hidden, weight, 0.0, torch.float32)
    # The mean square is 12.5.
    torch.testing.assert_close(found, torch.tensor([[6.0, 2.0]]) / 12.5**0.5)
    (found * torch.tensor([1.0, -3.0])).sum().backward()

    def value(x: float, y: float, a: float = 2.0, b: float = 0.5) -> float:
        return (a * x - 3 * b * y) / ((x * x + y * y) / 2) ** 0.5

    step = 1e-5
    slopes = [
        (value(3 + step, 4) - value(3 - step, 4)) / (2 * step),
        (value(3, 4 + step) - value(3, 4 - step)) / (2 * step),
    ]
    torch.testing.assert_close(hidden.grad, torch.tensor([slopes]), atol=1e-5, rtol=0)
    torch.testing.assert_close(weight.grad, torch.tensor([3.0, -12.0]) / 12.5**0.5)


def test_a_gate_by_hand():
    from plaudit.layers import _Gated

    gate = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    up = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    found = _Gated.apply(gate, up)
    torch.testing.assert_close(found.detach(), gate.detach() * up.detach() / (1 + torch.exp(-gate.detach())))
    assert torch.autograd.gradcheck(_Gated.apply, (gate, up))
    # What it is for: the swish of real models is of a class of transformers' own.
    policy = Policy(made("Llama", FUSED["Llama"]))
    assert any(type(node).__name__ == "_GatedProductBackward" for node in nodes(policy(BATCH).logprobs.grad_fn))


def nodes(node: object) -> list[object]:
    """A graph's functions, from its end to its beginnings."""
    found, waiting = [], [node]
    while waiting:
        one = waiting.pop()
        if one is not None and one not in found:
            found.append(one)
            waiting += [following for following, _ in one.next_functions]
    return found


def test_turning_by_hand_and_back():
    from plaudit.layers import _Turned

    quarter = torch.tensor(torch.pi / 2, dtype=torch.float64)
    cos, sin = quarter.cos().expand(1, 1, 2), quarter.sin().expand(1, 1, 2)
    states = torch.tensor([[[1.0, 2.0]]], dtype=torch.float64, requires_grad=True)
    found = _Turned.apply(states, cos, sin, 2.0, torch.float64)
    torch.testing.assert_close(found, torch.tensor([[[-4.0, 2.0]], [[0.0, 0.0]]], dtype=torch.float64))
    (found * torch.tensor([3.0, 5.0])).sum().backward()
    torch.testing.assert_close(states.grad, torch.tensor([[[10.0, -6.0]]], dtype=torch.float64))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_under_autocast_they_are_as_near_to_float32_as_transformers_own(checkpointed):
    model = made("Llama", FUSED["Llama"])
    exact = plainly(Policy(copy.deepcopy(model)))
    policy = Policy(model)
    if checkpointed:
        checkpoint_layers(policy.backbone)
    with torch.autocast("cpu", torch.bfloat16):
        own, found = plainly(policy), learned(policy)
    apart = [sum(float((a - b).square().sum()) for a, b in zip(x[1], exact[1], strict=True)) for x in (own, found)]
    assert 0 < apart[1] < 1.5 * apart[0]
    assert (found[0] - exact[0]).abs().mean() < 1.5 * (own[0] - exact[0]).abs().mean()


def test_much_less_is_kept_than_transformers_own_layers_keep():
    config = {"hidden_size": 64, "intermediate_size": 170, "num_hidden_layers": 4}
    policy = Policy(made("Llama", config))
    few, many = (collate([[5]] * rows, [[6] * 40] * rows, range(rows)) for rows in (4, 12))

    def measured() -> int:
        """Bytes of 328 tokens more: weights and what is kept of them cancel out."""
        with torch.autocast("cpu", torch.bfloat16):
            return _kept(policy, many) - _kept(policy, few)

    lean = measured()
    for layer in layers_of(policy.base):
        del layer.forward
    assert 0 < lean < 0.6 * measured()


def _kept(policy: Policy, rows: Batch) -> int:
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = policy(rows).logprobs
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def test_adapters_count_as_peft_has_them(tmp_path):
    policy = load_policy(tiny.folder(tmp_path, "llama", initializer_range=0.3), lora_rank=4, lora_alpha=8.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.learning().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    assert is_lean(policy)
    assert any(isinstance(module, peft.tuners.lora.Linear) for module in policy.backbone.modules())
    found, expected = learned(policy), plainly(policy)
    assert_same(found, expected, 1e-4)
    with policy.as_reference(), torch.no_grad():
        without = policy(BATCH).logprobs
    assert (without - found[0]).abs().max() > 0.1  # the adapter has a say
    policy.layout = lambda rows: padded(rows, policy.width)
    with policy.as_reference(), torch.no_grad():
        torch.testing.assert_close(without, policy(BATCH).logprobs, atol=1e-4, rtol=0)


def test_a_copy_of_a_policy_runs_its_own_layers():
    policy = Policy(made("Llama", FUSED["Llama"]))
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert learned(policy)[0].abs().max() > 0.1
    uniform = -torch.log(torch.tensor(257.0))
    with torch.no_grad():
        found = copied(BATCH).logprobs[BATCH.actions]
    torch.testing.assert_close(found, uniform.expand_as(found))
    assert side_by_side(BATCH, 32).source.numel() == int(BATCH.lengths.sum()) - 4


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_product_is_both_to_the_bit_and_keeps_only_what_came_in(bias, learns):
    from plaudit.layers import _Gated, _GatedProduct, _Product

    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=bias).requires_grad_(learns)
    weights = linear.weight, linear.bias
    gate, up = (torch.randn(2, 7, 64).bfloat16().requires_grad_() for _ in range(2))
    pull, kept = torch.randn(2, 7, 48).bfloat16(), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = _GatedProduct.apply(gate, up, *weights)
    expected = _Product.apply(_Gated.apply(gate, up), *weights)
    assert torch.equal(found, expected)
    assert kept == [gate.data_ptr(), up.data_ptr(), linear.weight.data_ptr()]
    learning = [gate, up, *(parameter for parameter in linear.parameters() if learns)]
    gradients = (torch.autograd.grad(output, learning, pull) for output in (found, expected))
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        assert torch.equal(one, other)


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_autocasts_own_to_the_bit_and_keeps_no_copy_of_its_weights(bias):
    from plaudit.layers import _product

    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=bias)
    inputs = torch.randn(2, 7, 64).bfloat16()
    pull = torch.randn(2, 7, 48).bfloat16()

    def taken(function):
        given, kept = inputs.clone().requires_grad_(), []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            found = function(given)
        return found, torch.autograd.grad(found, [given, *linear.parameters()], pull), kept

    found, gradients, kept = taken(lambda given: _product(linear, given))
    expected, wanted, copied = taken(linear)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    for one, other in zip(gradients[:2], wanted[:2], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    for one, other in zip(gradients[2:], wanted[2:], strict=True):  # a sum, which autocast rounds to bfloat16
        torch.testing.assert_close(one, pull.float().sum((0, 1)))
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.01)
    own = linear.weight.data_ptr()
    assert all(tensor.data_ptr() == own for tensor in kept if tensor.numel() == linear.weight.numel())
    assert any(tensor.data_ptr() != own for tensor in copied if tensor.numel() == linear.weight.numel())
