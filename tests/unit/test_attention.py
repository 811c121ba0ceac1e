"""Attention by blocks against the plain definition: pair by pair, in double precision and in eight bits of mantissa."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plaudit import attention
from plaudit.attention import Blocks, Piece, Plan, attend

PLANS = {
    "rows": [Piece(0, 5), Piece(5, 6), Piece(6, 13)],
    "answers": [Piece(0, 4), Piece(4, 6, 0, 4), Piece(6, 9, 0, 4), Piece(9, 11), Piece(11, 12, 9, 11)],
    "long rows": [Piece(0, 300), Piece(300, 303)],
    "long prompt": [Piece(0, 200), Piece(200, 340, 0, 200), Piece(340, 341, 0, 200), Piece(341, 480)],
    "padded in one block": [Piece(0, 20), Piece(20, 39), Piece(39, 58), Piece(58, 76)],
    "padded answers": [Piece(0, 30), Piece(30, 49, 0, 30), Piece(49, 66, 0, 30), Piece(66, 84, 0, 29)],
    "exactly a block": [Piece(0, 128), Piece(128, 256, 0, 128)],
}
HEADS = [(4, 4), (6, 2), (3, 1)]


def seen(pieces: list[Piece]) -> Tensor:
    """(N, N) True where a query sees a key, pair by pair."""
    found = torch.zeros(pieces[-1].stop, pieces[-1].stop, dtype=torch.bool)
    for piece in pieces:
        for query in range(piece.start, piece.stop):
            found[query, piece.above : piece.below] = True
            found[query, piece.start : query + 1] = True
    return found


def streams(count: int, heads: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(heads, 8), (groups, 8), (groups, 5)]
    made = [torch.randn(1, count, h, width, generator=generator, dtype=torch.float64) for h, width in shapes]
    return [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in made]


def plainly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    each = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(each, 1).mT * scaling
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(each, 1)).transpose(1, 2)


def with_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return [output, *torch.autograd.grad((output.double() * pull).sum(), inputs)]


@pytest.mark.parametrize("scores", [1, attention.SCORES])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", PLANS)
def test_B32_outputs_and_gradients_are_those_of_the_pairs_that_see_each_other(monkeypatch, name, heads, scores):
    monkeypatch.setattr(attention, "SCORES", scores)  # one stretch at a time, and as many as there are
    pieces = PLANS[name]
    inputs = streams(pieces[-1].stop, *heads)
    blocks = Blocks.of(Plan.of(pieces, pieces[-1].stop), torch.device("cpu"))
    found, weights = attend(None, *inputs, blocks, scaling=0.7)
    assert weights is None
    expected = plainly(*inputs, seen(pieces), 0.7)
    for one, other in zip(with_gradients(found, inputs), with_gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_the_scale_is_that_of_the_width_unless_it_is_given():
    pieces = PLANS["answers"]
    inputs = streams(12, 6, 2)
    blocks = Blocks.of(Plan.of(pieces, 12), torch.device("cpu"))
    torch.testing.assert_close(attend(None, *inputs, blocks)[0], plainly(*inputs, seen(pieces), 8**-0.5))


def test_under_autocast_products_are_of_bfloat16_and_as_good_as_their_inputs():
    pieces = PLANS["long prompt"]
    inputs = streams(pieces[-1].stop, 6, 2, torch.float32)
    blocks = Blocks.of(Plan.of(pieces, pieces[-1].stop), torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attend(None, *inputs, blocks)
    assert found.dtype == torch.bfloat16
    expected = plainly(*inputs, seen(pieces), 8**-0.5)
    for one, other in zip(with_gradients(found, inputs), with_gradients(expected, inputs), strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


def test_scores_in_the_hundreds_are_told_apart_under_autocast():
    # As in models whose keys have large biases; bfloat16 is off by a whole nat there.
    pieces = PLANS["answers"]
    query, key, value = (tensor.detach() for tensor in streams(12, 6, 2, torch.float32))
    query, key = (torch.cat([x, torch.full_like(x[..., :1], 20.0)], -1).bfloat16() for x in (query, key))
    blocks = Blocks.of(Plan.of(pieces, 12), torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attend(None, query, key, value, blocks, scaling=1.0)
    expected = plainly(query.double(), key.double(), value.double(), seen(pieces), 1.0)
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("lost", ["bias", "future"])
def test_nothing_that_is_not_seen_has_any_say(lost):
    # Infinities there would spoil every sum that they entered.
    pieces = PLANS["long prompt"]
    inputs = [tensor.detach().clone() for tensor in streams(pieces[-1].stop, 3, 1)]
    blocks = Blocks.of(Plan.of(pieces, pieces[-1].stop), torch.device("cpu"))
    before, _ = attend(None, *inputs, blocks)
    changed, kept = (slice(200, 340), [0, 199, 340, 341, 479]) if lost == "bias" else (slice(470, 480), [469, 341, 0])
    for tensor in inputs:
        tensor[:, :, changed] = 1e3
    after, _ = attend(None, *inputs, blocks)
    assert torch.equal(before[0, kept], after[0, kept])


def test_without_a_plan_it_is_plain_attention():
    query, key, value = (tensor.detach() for tensor in streams(7, 4, 4))
    module = torch.nn.Module()
    found, _ = attend(module, query, key, value, None)
    torch.testing.assert_close(found, plainly(query, key, value, torch.ones(7, 7).tril().bool(), 8**-0.5))


def test_a_model_that_attends_in_another_way_gives_no_number_at_all():
    blocks = Blocks.of(Plan.of([Piece(0, 3)], 3), torch.device("cpu"))
    assert (torch.ones(1, 1, 3, 3) + blocks).isnan().all()


def test_few_queries_are_padded_to_the_length_of_many_only_where_that_is_cheap():
    def products(pieces: list[Piece]) -> int:
        plan = Plan.of(pieces, pieces[-1].stop)
        return sum(block.queries.size * block.keys.shape[1] for block in plan.blocks)

    alike = [Piece(0, 60), Piece(60, 118), Piece(118, 180)]
    assert products(alike) == 3 * 62 * 62
    assert len(Plan.of(alike, 180).blocks) == 1
    apart = [Piece(0, 100), Piece(100, 110)]
    assert products(apart) == 100 * 100 + 10 * 10
