"""Layouts, looked at place by place: what each token sees, what is computed twice, and what it all costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from plaudit.attention import Blocks, Plan
from plaudit.batch import Batch, collate
from plaudit.layout import Layout, arrange, computed, padded, shared, side_by_side

WIDTH = 32
LAYOUTS = [padded, arrange, shared, side_by_side]

FAMILY = st.tuples(
    st.lists(st.integers(1, 3), min_size=1, max_size=7),  # a prompt
    st.lists(st.lists(st.integers(1, 3), max_size=6), min_size=1, max_size=5),  # its completions
)
FAMILIES = st.lists(FAMILY, min_size=1, max_size=5)


def batch_of(families: list, acting: bool = True) -> Batch:
    """Each family a group: its prompt with each of its completions."""
    prompts = [prompt for prompt, completions in families for _ in completions]
    answers = [completion for _, completions in families for completion in completions]
    groups = [i for i, (_, completions) in enumerate(families) for _ in completions]
    batch = collate(prompts, answers, groups)
    return batch if acting else replace(batch, actions=torch.zeros_like(batch.actions))


def used(layout: Layout, batch: Batch) -> int:
    """How many places hold a token that some row reads."""
    return len(layout.where[batch.attention].unique())


def columns_of(batch: Batch) -> torch.Tensor:
    """(B, T) the column of each token."""
    return torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape)


def seen(layout: Layout, batch: Batch, place: int) -> list[tuple[int, int]]:
    """The (position, token) pairs that the token at this place attends to, in order of position."""
    r, column = divmod(place, layout.source.shape[1])
    if isinstance(layout.mask, Blocks):
        visible = visible_of(layout.mask.plan, column)
    else:
        visible = torch.arange(layout.source.shape[1]) <= column if layout.mask is None else layout.mask[r, 0, column]
    tokens = batch.tokens.flatten()[layout.source[r, visible]]
    return sorted(zip(layout.positions[r, visible].tolist(), tokens.tolist(), strict=True))


def visible_of(plan: Plan, place: int) -> torch.Tensor:
    """(N,) which tokens the one at this place sees, read off the plan's own blocks."""
    found = torch.zeros(plan.count, dtype=torch.bool)
    for block in plan.blocks:
        for queries, keys, padding in zip(block.queries, block.keys, block.padding, strict=True):
            for behind, query in enumerate(queries[::-1]):
                if query == place:
                    assert not found.any()  # each query stands in one block
                    found[torch.from_numpy(keys[padding : len(keys) - behind])] = True
    return found


@pytest.mark.parametrize("lay", LAYOUTS)
@given(FAMILIES, st.booleans())
@example([([1], [[], [1], [1, 1]])], True)  # a row that is another's beginning
@example([([2, 2], [[3], [3], [3]])], False)  # one group of identical rows, without actions
@settings(max_examples=60, deadline=None)
def test_B32_each_token_sees_its_own_past_and_nothing_else(lay, families, acting):
    batch = batch_of(families, acting)
    layout = lay(batch, WIDTH)
    for row, length in enumerate(batch.lengths.tolist()):
        for t in range(length):
            place = int(layout.where[row, t])
            assert seen(layout, batch, place) == list(enumerate(batch.tokens[row, : t + 1].tolist()))


@pytest.mark.parametrize("lay", LAYOUTS)
@given(FAMILIES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_spread_and_collect_are_there_and_back(lay, families, acting):
    batch = batch_of(families, acting)
    layout = lay(batch, WIDTH)
    stream = torch.stack([batch.tokens, columns_of(batch)], 2)
    back = layout.collect(layout.spread(stream))
    assert torch.equal(back[batch.attention], stream[batch.attention])
    assert torch.equal(layout.collect(layout.positions)[batch.attention], stream[..., 1][batch.attention])


@given(FAMILIES)
@settings(max_examples=60, deadline=None)
def test_no_place_is_blind_or_the_softmax_would_be_zero_over_zero(families):
    layout = shared(batch_of(families), WIDTH)
    assert layout.mask is not None
    assert layout.mask.any(-1).all()
    assert not layout.mask.triu(1).any()


@given(FAMILIES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_arrange_never_costs_more_than_padded_and_shares_no_less_than_it_says(families, acting):
    batch = batch_of(families, acting)
    chosen, plain, all_shared = (lay(batch, WIDTH) for lay in (arrange, padded, shared))
    assert chosen.cost <= plain.cost
    assert chosen.cost <= all_shared.cost
    assert used(all_shared, batch) <= used(chosen, batch) <= used(plain, batch) == int(batch.attention.sum())


@given(st.integers(2, 5), st.lists(st.integers(1, 3), min_size=2, max_size=7))
@settings(max_examples=30, deadline=None)
def test_a_prompt_is_computed_once_for_all_its_completions(size, prompt):
    answers = [[10 + i] * (1 + i) for i in range(size)]
    batch = batch_of([(prompt, answers)])
    assert used(shared(batch, WIDTH), batch) == len(prompt) + sum(map(len, answers))
    assert used(padded(batch, WIDTH), batch) == size * len(prompt) + sum(map(len, answers))


def test_a_group_by_hand():
    batch = collate([[7, 8], [7, 8]], [[1], [2, 3]], groups=[0, 0])
    layout = shared(batch, WIDTH)
    assert layout.source.tolist() == [[0, 1, 2, 6, 7]]
    assert layout.where.tolist() == [[0, 1, 2, 0], [0, 1, 3, 4]]
    assert layout.positions.tolist() == [[0, 1, 2, 2, 3]]
    assert layout.mask is not None
    assert layout.mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_rows_of_different_groups_stand_side_by_side():
    batch = collate([[1, 2, 3, 4], [5], [6]], [[9], [9], [9, 9]])
    layout = shared(batch, WIDTH)
    assert batch.tokens.flatten()[layout.source].tolist() == [[1, 2, 3, 4, 9], [6, 9, 9, 5, 9]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1]]


@pytest.mark.parametrize(
    ("prompts", "completions", "prefix"),
    [
        ([[1, 2], [1, 2]], [[3], [3]], 2),  # never the completions, even if they are the same
        ([[1, 2], [1, 5]], [[3], [3]], 1),  # prompts that part
        ([[1], [1]], [[3], [4]], 1),
        ([[2], [1]], [[3], [3]], 0),
        ([[1, 2], [1, 2, 2]], [[2, 4], [4]], 2),  # the shorter prompt limits: its first action is its own
        ([[1, 2, 3], [1, 2, 3]], [[], []], 2),  # rows without actions keep their last token
        ([[1, 2], [1, 2, 3]], [[], []], 1),
        ([[1], [1, 2]], [[], []], 0),
    ],
)
def test_how_much_of_a_group_is_shared(prompts, completions, prefix):
    batch = collate(prompts, completions, groups=[0, 0])
    assert int(batch.attention.sum()) - used(shared(batch, WIDTH), batch) == prefix


def test_what_stands_in_the_padding_changes_no_layout_B27():
    batch = collate([[1, 1], [1, 1]], [[2], [3, 4, 5, 6]], groups=[0, 0])
    noisy = replace(batch, tokens=batch.tokens.masked_fill(~batch.attention, 1))
    for lay in LAYOUTS:
        one, other = lay(batch, WIDTH), lay(noisy, WIDTH)
        assert torch.equal(one.source, other.source)
        assert torch.equal(one.where, other.where)


def test_the_cost_is_counted_by_hand():
    batch = collate([[1] * 10] * 4, [[2, i] for i in range(4)], groups=[0] * 4)
    # In units of 4 * width: 6 * width a token for the matrices; L for each of L attention rows, half where causal.
    assert padded(batch, WIDTH).cost == 4 * 12 * (6 * WIDTH + 12 / 2)
    assert shared(batch, WIDTH).cost == 18 * (6 * WIDTH + 18)
    assert arrange(batch, WIDTH).cost == shared(batch, WIDTH).cost


def test_arrange_leaves_long_completions_apart_where_attention_would_cost_more_than_the_prompt_saves():
    batch = collate([[1]] * 4, [[2] * 400] * 4, groups=[0] * 4)
    assert arrange(batch, 8).mask is None
    assert arrange(batch, 8).cost < shared(batch, 8).cost


def test_arrange_may_share_within_halves_of_a_group():
    batch = collate([[1] * 300] * 8, [[2] * 100] * 8, groups=[0] * 8)
    layout = arrange(batch, 64)
    assert tuple(layout.source.shape) == (2, 700)
    assert used(layout, batch) == 1400


def test_a_group_of_one_and_rows_of_one_token():
    batch = collate([[1], [2]], [[], []], groups=[4, 7])
    for lay in LAYOUTS:
        layout = lay(batch, WIDTH)
        assert batch.tokens.flatten()[layout.source.flatten()[layout.where[:, 0]]].tolist() == [1, 2]


@given(FAMILIES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_side_by_side_nothing_is_padding_and_each_group_costs_what_is_counted(families, acting):
    batch = batch_of(families, acting)
    layout = side_by_side(batch, WIDTH)
    assert layout.source.shape == (1, used(layout, batch))
    assert layout.source.numel() == sum(computed(batch))
    groups = batch.groups.unique().tolist()
    assert computed(batch) == [sum(computed(batch.rows((batch.groups == group).nonzero()[:, 0]))) for group in groups]
