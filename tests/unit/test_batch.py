"""The one tensor record: rows, groups, splits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit.batch import Batch, collate

LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6)), min_size=1, max_size=12)
SIZES = st.lists(st.integers(1, 4), min_size=12, max_size=12)


def rows_of(lengths: list[tuple[int, int]], sizes: list[int]) -> Batch:
    """Rows with these prompt and completion lengths, in groups of these sizes; every real token is unique."""
    prompts, completions, start = [], [], 1
    for prompt, completion in lengths:
        prompts.append(list(range(start, start + prompt)))
        completions.append(list(range(start + prompt, start + prompt + completion)))
        start += prompt + completion
    groups = [group for group, size in enumerate(sizes) for _ in range(size)][: len(lengths)]
    batch = collate(prompts, completions, groups)
    rows, columns = batch.tokens.shape
    return replace(
        batch,
        logprobs=batch.tokens * -0.5,
        trunk=torch.stack([batch.tokens, -batch.tokens], 2).float(),
        scores=torch.arange(rows) * 1.0,
        targets=torch.arange(rows * columns).view(rows, columns) * 1.0,
        index=torch.arange(rows),
    )


def texts(batch: Batch) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(batch.tokens, batch.attention, strict=True)]


def aligned(batch: Batch, whole: Batch) -> bool:
    """Whether every field of every row says of the row what it said in the whole."""
    fields, said = batch.tensors(), whole.tensors()
    index, real, width = fields["index"], batch.attention, batch.tokens.shape[1]
    return (
        texts(batch) == [texts(whole)[i] for i in index.tolist()]
        and torch.equal(batch.actions, whole.actions[index][:, :width])
        and torch.equal(fields["logprobs"][real], batch.tokens[real] * -0.5)
        and torch.equal(fields["trunk"][..., 1][real], -batch.tokens[real].float())
        and torch.equal(fields["scores"], index * 1.0)
        and torch.equal(fields["targets"], said["targets"][index])
    )


def test_collate_by_hand() -> None:
    batch = collate([[7, 8], [5]], [[9], [6, 4, 3]], groups=[3, 3])
    assert batch.tokens.tolist() == [[7, 8, 9, 0], [5, 6, 4, 3]]
    assert batch.attention.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.actions.int().tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    assert batch.groups.tolist() == [3, 3]
    assert batch.lengths.tolist() == [3, 4]
    assert set(batch.tensors()) == {"tokens", "attention", "actions", "groups"}


def test_collate_learns_only_the_flagged_tokens_and_never_the_first_column() -> None:
    batch = collate([[1], []], [[2, 3, 4], [5, 6]], actions=[[True, False, True], [True, True]])
    assert batch.actions.int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    assert batch.groups.tolist() == [0, 1]


def test_collate_refuses_prompts_and_completions_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="zip"):
        collate([[1], [2]], [[3]])


def test_B27_padding_is_known_by_length_and_not_by_token() -> None:
    batch = collate([[0, 0], [0]], [[0, 0], [0]])
    assert batch.attention.sum(1).tolist() == [4, 2]
    assert batch.actions.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]


def test_rows_come_in_the_order_asked_for_and_are_cut_to_their_longest() -> None:
    whole = rows_of([(1, 1), (2, 4), (1, 2)], [1, 1, 1])
    some = whole.rows(torch.tensor([2, 0]))
    assert some.tokens.shape == (2, 3)
    assert some.index is not None
    assert some.index.tolist() == [2, 0]
    assert some.trunk is not None
    assert some.trunk.shape == (2, 3, 2)
    assert aligned(some, whole)
    assert len(whole.rows(torch.tensor([], dtype=torch.int64))) == 0


def test_targets_are_never_cut_even_when_they_are_as_wide_as_the_rows() -> None:
    whole = rows_of([(1, 1), (2, 4)], [1, 1])
    assert whole.targets is not None
    assert whole.targets.shape == whole.tokens.shape
    short = whole.rows(torch.tensor([0]))
    assert short.tokens.shape == (1, 2)
    assert torch.equal(short.targets, whole.targets[:1])


def test_blocks_are_the_runs_of_equal_groups() -> None:
    batch = collate([[1]] * 5, [[2]] * 5, groups=[4, 4, 1, 9, 9])
    assert [block.tolist() for block in batch.blocks()] == [[0, 1], [2], [3, 4]]
    assert batch.rows(torch.tensor([], dtype=torch.int64)).blocks() == []


def test_to_moves_every_field() -> None:
    moved = rows_of([(1, 2)], [1]).to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}


@settings(max_examples=60, deadline=None)
@given(LENGTHS, SIZES, st.integers(1, 40))
def test_B29_a_split_holds_every_row_once_and_whole_groups_within_the_budget(
    lengths: list[tuple[int, int]], sizes: list[int], budget: int
) -> None:
    whole = rows_of(lengths, sizes)
    parts = list(whole.parts(budget))
    assert sorted(i for _, places in parts for i in places.tolist()) == list(range(len(whole)))
    widths = [part.tokens.shape[1] for part, _ in parts]
    assert widths == sorted(widths, reverse=True), "the longest part comes first"
    for part, places in parts:
        assert torch.equal(part.index, places)
        assert aligned(part, whole)
        for group in part.groups.unique():
            assert (part.groups == group).sum() == (whole.groups == group).sum(), "a group was divided"
        assert part.tokens.numel() <= budget or len(part.blocks()) == 1
        assert part.tokens.shape[1] == int(part.lengths.max())
    for (part, _), (following, _) in itertools.pairwise(parts):
        extra = following.blocks()[0]
        assert (len(part) + len(extra)) * part.tokens.shape[1] > budget, "a part was closed too early"


def test_a_part_may_be_exactly_full() -> None:
    batch = collate([[1]] * 5, [[2, 3, 4]] * 5)
    assert [len(part) for part, _ in batch.parts(20)] == [5]
    assert [len(part) for part, _ in batch.parts(19)] == [4, 1]
    assert [len(part) for part, _ in batch.parts(8)] == [2, 2, 1]
    assert [len(part) for part, _ in batch.parts(7)] == [1, 1, 1, 1, 1]
    assert [len(part) for part, _ in batch.parts(1)] == [1, 1, 1, 1, 1]


@settings(max_examples=30, deadline=None)
@given(LENGTHS, SIZES, st.integers(0, 2**31))
def test_a_shuffle_moves_groups_and_not_the_rows_inside_them(
    lengths: list[tuple[int, int]], sizes: list[int], seed: int
) -> None:
    whole = rows_of(lengths, sizes)
    shuffled = whole.shuffled(torch.Generator().manual_seed(seed))
    again = whole.shuffled(torch.Generator().manual_seed(seed))
    assert torch.equal(shuffled.index, again.index)
    assert aligned(shuffled, whole)
    before = sorted(block.tolist() for block in whole.blocks())
    after = sorted(shuffled.index[block].tolist() for block in shuffled.blocks())
    assert before == after


def test_a_shuffle_shuffles() -> None:
    batch = replace(collate([[1]] * 50, [[2]] * 50), index=torch.arange(50))
    orders = {tuple(batch.shuffled(torch.Generator().manual_seed(s)).index.tolist()) for s in range(5)}
    assert len(orders) == 5


def test_parts_by_what_is_computed_for_each_group() -> None:
    whole = rows_of([(1, 1), (2, 4), (1, 2), (1, 3)], [1, 1, 1, 1])  # longest first: 6, 4, 3, 2 tokens
    for budget, expected in ((15, [4]), (14, [1, 3]), (9, [1, 3]), (8, [1, 2, 1]), (1, [1, 1, 1, 1])):
        assert [len(part) for part, _ in whole.parts(budget, [2, 6, 3, 4])] == expected
