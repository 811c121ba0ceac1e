"""Log-probabilities, masked statistics and the one shift."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plaudit.batch import collate
from plaudit.numerics import (
    at_actions,
    before_actions,
    likeliest,
    logprobs_of,
    masked_mean,
    masked_sum,
    standardise,
    token_logprobs,
)

WIDTH, VOCABULARY = 5, 11


def head(rows: int = 7, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


def full(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float | Tensor,
    scale: float,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    """All logits at once, from the definition."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = scale * logits
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
    chosen = probabilities[torch.arange(len(targets)), targets].log()
    return chosen, -(probabilities * probabilities.log()).sum(1)


# ----------------------------------------------------------------------------------------- log-probabilities: B33


TEMPERATURES = [1.0, 0.7, torch.tensor([0.5, 0.6, 0.7, 1.0, 1.3, 1.6, 2.0], dtype=torch.float64)]


@pytest.mark.parametrize("head_learns", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES, ids=["1", "0.7", "each"])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.6, None), (1.5, 2.0)])
def test_B33_chunks_are_the_whole_in_value_and_gradient(
    head_learns: bool, with_entropy: bool, temperature: float | Tensor, scale: float, cap: float | None
) -> None:
    hidden, weight, bias, targets = head()
    pull = torch.randn(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for chunked in (True, False):
        inputs = [t.clone() for t in (hidden, weight, bias)]
        learning = inputs if head_learns else inputs[:1]
        for tensor in learning:
            tensor.requires_grad_()
        if chunked:
            chosen, entropy = token_logprobs(
                inputs[0], inputs[1], targets, bias=inputs[2], temperature=temperature, scale=scale, soft_cap=cap,
                with_entropy=with_entropy, chunk=3,
            )  # fmt: skip
        else:
            chosen, entropy = full(*inputs, targets, temperature, scale, cap)
        total = (pull[0] * chosen).sum()
        if with_entropy:
            assert entropy is not None
            total = total + (pull[1] * entropy).sum()
            found.append([chosen, entropy, *torch.autograd.grad(total, learning)])
        else:
            found.append([chosen, *torch.autograd.grad(total, learning)])
    for ours, definition in zip(*found, strict=True):
        torch.testing.assert_close(ours, definition, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("head_learns", [False, True])
def test_B24_token_logprobs_pass_gradcheck(with_entropy: bool, head_learns: bool) -> None:
    hidden, weight, bias, targets = head()
    hidden.requires_grad_()
    weight.requires_grad_(head_learns)
    bias.requires_grad_(head_learns)

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = token_logprobs(
            hidden, weight, targets, bias=bias, temperature=0.8, scale=1.2, soft_cap=3.0,
            with_entropy=with_entropy, chunk=2,
        )  # fmt: skip
        return tuple(t for t in found if t is not None)

    assert torch.autograd.gradcheck(outputs, (hidden, weight, bias), atol=1e-6)


def test_B33_a_vocabulary_wider_than_the_cache_is_the_whole_too() -> None:
    # Several blocks to a chunk, and the last chunk is not full.
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(13, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(70_000, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 70_000, (13,), generator=generator)
    chosen, _ = token_logprobs(hidden, weight, targets, chunk=8)
    definition, _ = full(hidden, weight, None, targets, 1.0, 1.0, None)
    torch.testing.assert_close(chosen, definition, rtol=1e-10, atol=1e-12)
    (ours,) = torch.autograd.grad(chosen.sum(), hidden)
    torch.testing.assert_close(ours, torch.autograd.grad(definition.sum(), hidden)[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("head_learns", [False, True])
def test_B33_bfloat16_products_give_float32_results_near_the_truth(head_learns: bool) -> None:
    hidden, weight, _, targets = head(rows=64, seed=5)
    exact = hidden.bfloat16().double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    rounded = hidden.bfloat16().requires_grad_(), weight.float().requires_grad_(head_learns)
    chosen, entropy = token_logprobs(*rounded, targets, with_entropy=True, chunk=10)
    truth = full(*exact, None, targets, 1.0, 1.0, None)
    assert entropy is not None
    assert chosen.dtype == entropy.dtype == torch.float32
    # A logit of size 8 is rounded to steps of 1/32.
    torch.testing.assert_close(chosen.double(), truth[0], rtol=0, atol=0.05)
    torch.testing.assert_close(entropy.double(), truth[1], rtol=0, atol=0.05)
    learning = [t for t in rounded if t.requires_grad]
    gradients = torch.autograd.grad(chosen.sum(), learning)
    assert [g.dtype for g in gradients] == [t.dtype for t in learning]
    for ours, definition in zip(gradients, torch.autograd.grad(truth[0].sum(), exact), strict=False):
        assert (ours.double() - definition).norm() < 0.01 * definition.norm()


def test_B33_in_bfloat16_the_gradient_taken_along_is_the_one_computed_again() -> None:
    hidden, weight, _, targets = head(rows=64, dtype=torch.bfloat16)
    gradients = []
    for with_entropy in (False, True):
        leaf = hidden.clone().requires_grad_()
        chosen, _ = token_logprobs(leaf, weight, targets, with_entropy=with_entropy)
        gradients.append(torch.autograd.grad(chosen.sum(), leaf)[0].float())
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)


def test_B33_autocast_changes_neither_dtype_nor_value_nor_gradient() -> None:
    found = []
    for inside in (False, True):
        for dtype, head_learns in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            hidden, weight, _, targets = head(dtype=torch.float32)
            leaves = [hidden.to(dtype).requires_grad_(), weight.requires_grad_(head_learns)]
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                chosen, _ = token_logprobs(leaves[0], leaves[1], targets)
                gradients = torch.autograd.grad(chosen.sum(), leaves[: 1 + head_learns])
            assert chosen.dtype == torch.float32
            found.append([chosen, *gradients])
    for plain, autocast in zip(found[:4], found[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, autocast, strict=True))


def test_B33_a_bias_may_learn_alone() -> None:
    hidden, weight, bias, targets = head()
    hidden.requires_grad_()
    bias.requires_grad_()
    ours, _ = token_logprobs(hidden, weight, targets, bias=bias, temperature=0.7, chunk=3)
    definition, _ = full(hidden, weight, bias, targets, 0.7, 1.0, None)
    for found, expected in zip(
        *(torch.autograd.grad(t.square().sum(), [hidden, bias]) for t in (ours, definition)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_B33_beside_bfloat16_products_bias_and_sums_stay_in_float32() -> None:
    bias = torch.linspace(0, 0.01, VOCABULARY)
    chosen, _ = token_logprobs(
        torch.zeros(1, 2).bfloat16(), torch.zeros(VOCABULARY, 2), torch.tensor([VOCABULARY - 1]), bias=bias
    )
    assert chosen.item() == pytest.approx(bias.log_softmax(0)[-1].item(), abs=1e-6)

    hidden, weight, _, targets = head(rows=600)
    gradients = []
    for chunk in (600, 1):
        leaves = [weight.float().requires_grad_(), torch.zeros(VOCABULARY, requires_grad=True)]
        chosen, _ = token_logprobs(hidden.bfloat16(), leaves[0], targets, bias=leaves[1], chunk=chunk)
        gradients.append(torch.autograd.grad(chosen.sum(), leaves))
    for whole, added in zip(*gradients, strict=True):
        assert (whole - added).norm() < 0.002 * whole.norm()
        assert not torch.equal(added, added.bfloat16().float())


def test_B33_no_more_than_a_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    product = torch.mm

    def watched(*args: Tensor, **kwargs: Tensor) -> Tensor:
        result = product(*args, **kwargs)
        seen.append(result.numel())
        return result

    monkeypatch.setattr(torch, "mm", watched)
    hidden, weight, _, targets = head(rows=50)
    chosen, _ = token_logprobs(hidden.requires_grad_(), weight, targets, chunk=8)
    chosen.sum().backward()
    assert max(seen) == 8 * VOCABULARY
    assert len(seen) == 2 * 7, "a frozen head needs two products a chunk, and none in the backward pass"


@pytest.mark.parametrize("head_learns", [False, True])
def test_no_tokens_give_no_logprobs_and_no_gradient(head_learns: bool) -> None:
    hidden, weight, bias, targets = head(rows=0)
    leaves = [t.requires_grad_() for t in ((hidden, weight, bias) if head_learns else (hidden,))]
    chosen, entropy = token_logprobs(hidden, weight, targets, bias=bias, with_entropy=True)
    assert entropy is not None
    assert chosen.shape == entropy.shape == (0,)
    for leaf, gradient in zip(leaves, torch.autograd.grad(chosen.sum() + entropy.sum(), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_by_hand_two_tokens() -> None:
    # Logits log 1 and log 3: probabilities 1/4 and 3/4; at temperature 1/2, squares: 1/10 and 9/10.
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [math.log(3)]])
    chosen, entropy = token_logprobs(hidden, weight, torch.tensor([0, 1]), with_entropy=True)
    assert chosen.tolist() == pytest.approx([math.log(1 / 4), math.log(3 / 4)], rel=1e-6)
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([0.562335] * 2, rel=1e-5)
    cooled, _ = token_logprobs(hidden, weight, torch.tensor([0, 1]), temperature=0.5)
    assert cooled.exp().tolist() == pytest.approx([0.1, 0.9], rel=1e-6)


def test_huge_logits_neither_overflow_nor_vanish() -> None:
    hidden, weight = torch.tensor([[1.0]]).requires_grad_(), torch.tensor([[1e4], [-1e4]])
    chosen, entropy = token_logprobs(hidden, weight, torch.tensor([1]), with_entropy=True)
    assert entropy is not None
    assert (float(chosen.detach()), float(entropy.detach())) == (-2e4, 0.0)
    assert torch.autograd.grad(chosen.sum(), hidden)[0].item() == -2e4


def test_logprobs_of_is_the_definition_for_any_shape_and_takes_forbidden_tokens() -> None:
    hidden, weight, bias, targets = head(rows=6)
    temperature = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    logits = hidden @ weight.T + bias
    chosen, entropy = logprobs_of(logits.view(2, 3, -1), targets.view(2, 3), temperature.view(2, 3), True)
    expected = full(hidden, weight, bias, targets, temperature, 1.0, None)
    assert entropy is not None
    torch.testing.assert_close(chosen.flatten(), expected[0])
    torch.testing.assert_close(entropy.flatten(), expected[1])

    some = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    chosen, entropy = logprobs_of(some, torch.tensor([1]), with_entropy=True)
    assert entropy is not None
    assert entropy.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(chosen.sum() + entropy.sum(), some)[0].tolist() == [[-0.5, 0.5, 0.0]]
    assert logprobs_of(some.bfloat16(), torch.tensor([1]))[0].dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.3, 3.0), st.integers(0, 2**31))
def test_B28_a_row_alone_is_the_row_in_company(rows: int, chunk: int, temperature: float, seed: int) -> None:
    hidden, weight, bias, targets = head(rows, seed=seed)
    together, _ = token_logprobs(hidden, weight, targets, bias=bias, temperature=temperature, chunk=chunk)
    alone = [
        token_logprobs(hidden[i : i + 1], weight, targets[i : i + 1], bias=bias, temperature=temperature)[0]
        for i in range(rows)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 3.0), st.floats(-5, 5), st.integers(0, 2**31))
def test_probabilities_sum_to_one_and_ignore_a_common_shift(temperature: float, shift: float, seed: int) -> None:
    hidden, weight, bias, _ = head(1, seed=seed)
    every = torch.arange(VOCABULARY)
    repeated = hidden.expand(VOCABULARY, -1)
    logprobs, entropy = token_logprobs(
        repeated, weight, every, bias=bias + shift, temperature=temperature, with_entropy=True
    )
    assert entropy is not None
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert entropy[0].item() == pytest.approx(-(logprobs.exp() * logprobs).sum().item(), abs=1e-10)
    plain, _ = token_logprobs(repeated, weight, every, bias=bias, temperature=temperature)
    torch.testing.assert_close(logprobs, plain, rtol=0, atol=1e-10)


# -------------------------------------------------------------------------------------------------- the shift: B38


def test_B38_a_bigram_model_has_the_logprobs_written_in_its_table() -> None:
    # P(next | token) of a model that sees one token: its hidden state is the token's one-hot vector.
    table = torch.tensor(
        [[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]],
        dtype=torch.float64,
    )
    end = 3
    batch = collate([[0, 1], [2]], [[2, end], [0, 1, end]])
    states = torch.nn.functional.one_hot(batch.tokens, 4).double()
    chosen, _ = token_logprobs(before_actions(states, batch.actions), table.log().T, batch.tokens[batch.actions])
    found = at_actions(chosen, batch.actions).exp()
    # Row 1: P(2 | 1), P(end | 2). Row 2: P(0 | 2), P(1 | 0), P(end | 1). The prompt and padding: exp(0).
    expected = torch.tensor([[1, 1, 0.2, 0.25], [1, 0.25, 0.2, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_B38_values_are_read_one_column_before_and_put_back_at_the_action() -> None:
    stream = torch.arange(12.0).view(2, 6)
    actions = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 1]], dtype=torch.bool)
    before = before_actions(stream, actions)
    assert before.tolist() == [1, 3, 6, 10]
    assert at_actions(before, actions).tolist() == [[0, 0, 1, 0, 3, 0], [0, 6, 0, 0, 0, 10]]
    wide = before_actions(torch.stack([stream, -stream], 2), actions)
    assert wide.tolist() == [[1, -1], [3, -3], [6, -6], [10, -10]]


def test_at_actions_carries_gradients_back_to_each_value() -> None:
    actions = torch.tensor([[0, 1, 0], [0, 1, 1]], dtype=torch.bool)
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    weights = torch.tensor([[7.0, 10, 7], [7, 20, 30]])
    (gradient,) = torch.autograd.grad((at_actions(values, actions) * weights).sum(), values)
    assert gradient.tolist() == [10, 20, 30]
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert at_actions(before_actions(weights, nothing), nothing).tolist() == [[0, 0, 0], [0, 0, 0]]


# ----------------------------------------------------------------------------------------------- masked statistics


def test_masked_sum_and_mean_do_not_see_what_is_outside() -> None:
    x = torch.tensor([[1.0, torch.nan], [5.0, torch.inf]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, False]])
    assert masked_sum(x, mask).item() == 6
    assert masked_mean(x, mask).item() == 3
    assert torch.autograd.grad(masked_mean(x, mask), x)[0].tolist() == [[0.5, 0], [0.5, 0]]
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0


def test_B21_standardise_gives_the_published_fixture() -> None:
    x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    expected = torch.tensor([[0.0508, 0.4381, 0.8254], [1.2127, 1.6, 1.9873], [2.3746, 2.7619, 3.1492]])
    everything = torch.ones_like(x, dtype=torch.bool)
    torch.testing.assert_close(standardise(x, everything, shift_mean=False), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(standardise(x, everything), expected - 1.6, rtol=0, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-100, 100), st.booleans()), min_size=2, max_size=20))
def test_B21_standardise_is_the_two_pass_statistics_of_what_the_mask_shows(items: list[tuple[float, bool]]) -> None:
    mask = torch.tensor([there for _, there in items])
    x = torch.tensor([value if there else torch.nan for value, there in items], dtype=torch.float64)
    shown = [value for value, there in items if there]
    found = standardise(x, mask)
    assert found[~mask].eq(0).all()
    if shown:
        mean = math.fsum(shown) / len(shown)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in shown) / len(shown) + 1e-8)
        assert found[mask].tolist() == pytest.approx([(v - mean) / deviation for v in shown], abs=1e-6)


def test_B21_equal_values_standardise_to_zero() -> None:
    mask = torch.ones(4, dtype=torch.bool)
    for value, shift in itertools.product((0.0, 3.0), (True, False)):
        found = standardise(torch.full((4,), value), mask, shift_mean=shift)
        assert found.tolist() == [0.0 if shift else value] * 4


@pytest.mark.parametrize("chunk", [2, 1024])
def test_the_likeliest_tokens_are_those_of_all_logits(chunk):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(9, 4), torch.randn(5, 4), torch.randn(5) * 3
    targets = torch.randint(0, 5, (9,))
    for some in (bias, None):
        added = [0.0] * 5 if some is None else some.tolist()
        logits = [[float(state @ weight[j]) + added[j] for j in range(5)] for state in hidden]
        best = [row.index(max(row)) for row in logits]
        found = likeliest(hidden, weight, targets, some, chunk=chunk)
        assert found.tolist() == [i == j for i, j in zip(best, targets.tolist(), strict=True)]
        assert 0 < int(found.sum()) < 9
    assert likeliest(hidden[:0], weight, targets[:0]).shape == (0,)
