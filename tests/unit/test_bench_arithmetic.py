"""The arithmetic behind `plaudit bench`: operations, bounds, the guard, by numbers that can be worked out by hand."""

from __future__ import annotations

import pytest

import tiny
from plaudit.bench import Shape, best_time, decoding_bound, shape_of, training_operations

# 2 layers with 1,000 numbers in their matrices together, heads of 10 numbers in all, a vocabulary of 20 by 5.
SHAPE = Shape(matrices=1000, head=100, layers=2, attention=10, cached=8, vocabulary=20, context=64)
COLUMNS = 9  # a token attends to 5 on average, itself included; 8 of 9 are learned
BODY = 2 * 1000 + 2 * 4 * 10 * 5  # 2,400
HEAD = 2 * 100 * 8 / 9


def test_operations_of_training_everything():
    assert training_operations(SHAPE, COLUMNS) == pytest.approx(3 * (BODY + HEAD))


def test_adapters_spare_the_gradients_of_the_matrices():
    # Back through matrices 2,000, through attention 2 x 400, through the head once; 7 numbers of adapters, both ways.
    expected = BODY + HEAD + 2000 + 800 + HEAD + 6 * 7
    assert training_operations(SHAPE, COLUMNS, adapters=7) == pytest.approx(expected)


def test_the_last_layers_spare_the_others_way_back_and_the_head_s_gradient():
    assert training_operations(SHAPE, COLUMNS, layers=1) == pytest.approx(BODY + HEAD + BODY + HEAD)
    assert training_operations(SHAPE, COLUMNS, layers=2) == pytest.approx(3 * BODY + 2 * HEAD)


def test_few_rows_are_bound_by_memory_and_many_by_operations():
    # A step of n rows reads 2 (1,100 + 8 * 10 n) bytes and does n (2,000 + 800 + 200) operations.
    limits = {"context": 10, "width": 2, "matrix": 1e6, "memory": 1e6}
    assert decoding_bound(SHAPE, 1, **{**limits, "matrix": 1e9}) == pytest.approx(1e6 / (2 * 1180))
    assert decoding_bound(SHAPE, 4, **{**limits, "matrix": 1e9}) == pytest.approx(4 * 1e6 / (2 * 1420))
    assert decoding_bound(SHAPE, 4, **{**limits, "memory": 1e9}) == pytest.approx(1e6 / 3000)
    assert decoding_bound(SHAPE, 64, **{**limits, "memory": 1e9}) == pytest.approx(1e6 / 3000)
    twice = decoding_bound(SHAPE, 1, **{**limits, "matrix": 1e9, "width": 4})
    assert twice == pytest.approx(1e6 / (4 * 1180))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_shape_of_a_model(kind):
    shape = shape_of(tiny.model(kind))
    # Llama's: q and o 32 x 32, k and v 32 x 16, three matrices 32 x 64. GPT-2's: 32 x 96, 32 x 32, 2 of 32 x 128.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 if kind == "llama" else 32 * 96 + 32 * 32 + 2 * 32 * 128
    pairs = 2 * 8 if kind == "llama" else 32
    assert shape == Shape(2 * layer, 257 * 32, 2, 32, 2 * 2 * pairs, 257, 256)


def test_the_best_of_two_calls_at_least(monkeypatch):
    ticks = iter([0.0, 1.0, 4.0, 4.0, 6.0, 6.5])  # begins; first call 1 to 4; second 4 to 6; too late for a third
    monkeypatch.setattr("plaudit.bench.time.perf_counter", lambda: next(ticks))
    calls = []
    assert best_time(lambda: calls.append(1), 0.001) == 2.0
    assert len(calls) == 2
