"""Files of every kind become records; every step's rows are known from the seed alone."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit.data import Order, columns_of, hold_out, hold_out_end, key_of, load, within
from plaudit.errors import PlauditError
from plaudit.records import Demonstration, Prompt

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]
EXPECTED = [Demonstration(f"p{i}", f"c{i}") for i in range(5)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def text_of(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows=ROWS) -> str:
    """The rows, in the form that the name of the file says."""
    table = datasets.Dataset.from_list(rows)
    if path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(text_of(rows).encode()))
    elif path.suffix == ".jsonl":
        path.write_text(text_of(rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        table.to_parquet(str(path))
    elif path.suffix == ".csv":
        table.to_csv(str(path))
    else:
        table.save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.parquet", "d.csv", "saved"])
def test_every_form_gives_the_same_records(tmp_path, name):
    data = write(tmp_path / name)
    loaded = load(data, Demonstration)
    assert [(r.prompt, r.completion) for r in loaded.records] == [(r.prompt, r.completion) for r in EXPECTED]
    assert loaded.dropped == {}
    assert columns_of(data) == {"prompt", "completion"}


def test_a_folder_of_files_and_its_splits(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS[:3])
    write(folder / "test.jsonl", ROWS[3:])
    assert len(load(str(folder), Demonstration).records) == 3
    assert [r.prompt for r in load(str(folder), Demonstration, "test").records] == ["p3", "p4"]
    assert [r.prompt for r in load(str(folder), Demonstration, "train[:1]").records] == ["p0"]
    with pytest.raises(PlauditError, match=r"data: cannot read .*\(split 'dev'\)"):
        load(str(folder), Demonstration, "dev")


def test_a_saved_dictionary_of_splits(tmp_path):
    halves = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS[:2]), heldout=datasets.Dataset.from_list(ROWS[2:])
    )
    halves.save_to_disk(str(tmp_path / "both"))
    assert [r.prompt for r in load(str(tmp_path / "both"), Demonstration, "heldout").records] == ["p2", "p3", "p4"]
    with pytest.raises(PlauditError, match="cannot read"):
        load(str(tmp_path / "both"), Demonstration, "dev")


def test_a_file_of_plain_text_is_one_text(tmp_path):
    path = tmp_path / "play.txt"
    path.write_bytes("\ufeffone\r\ntwo\n".encode())
    assert columns_of(str(path)) == {"text"}
    assert load(str(path), Demonstration).records == [Demonstration("", "one\ntwo\n")]
    path.write_bytes(b"caf\xe9")
    with pytest.raises(PlauditError, match=r"data: '.*play.txt' is not UTF-8 \(byte 3: "):
        load(str(path), Demonstration)
    with pytest.raises(PlauditError, match=r"data: cannot read .*none.txt': No such file or directory\."):
        load(str(tmp_path / "none.txt"), Demonstration)


@pytest.mark.parametrize(
    ("share", "parts"), [(0.25, ("abcdef", "gh")), (0.0, ("abcdefgh", "")), (1.0, ("", "abcdefgh"))]
)
def test_of_a_single_text_the_end_is_held_out(share, parts):
    text = Demonstration("", "abcdefgh", {"id": 1})
    found = hold_out_end(text, share)
    assert [[part.completion for part in side] for side in found] == [[part] if part else [] for part in parts]
    assert all(part.columns == {"id": 1} for side in found for part in side)


def test_several_with_commas_between_or_as_a_list(tmp_path):
    one, two = write(tmp_path / "a.jsonl", ROWS[:2]), write(tmp_path / "b.parquet", ROWS[2:])
    for data in (f"{one},{two}", f" {one} , {two} ", [one, two], (f"{one},", two)):
        assert [r.prompt for r in load(data, Prompt).records] == ["p0", "p1", "p2", "p3", "p4"]


def test_a_file_of_no_known_kind(tmp_path):
    path = tmp_path / "data.xlsx"
    path.write_text("x")
    with pytest.raises(PlauditError, match=r"data\.xlsx' is of no kind that can be read: \.jsonl, .*\.parquet"):
        load(str(path), Prompt)


@pytest.mark.parametrize("name", ["d.parquet", "d.jsonl", "d.json", "d.jsonl.gz"])
def test_a_broken_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"PAR1 no, it is not")
    with pytest.raises(PlauditError) as caught:
        load(str(path), Prompt)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_leads_nowhere(tmp_path):
    with pytest.raises(PlauditError, match="cannot read 'nobody/nothing'"):
        load("nobody/nothing", Prompt)


def test_the_row_of_a_table_is_named(tmp_path):
    data = write(tmp_path / "d.parquet", [{"prompt": "p", "completion": "c"}, {"prompt": 3, "completion": "c"}][:1] * 2)
    assert len(load(data, Demonstration).records) == 2
    data = write(tmp_path / "e.parquet", [{"prompt": 1, "completion": "c"}])
    with pytest.raises(PlauditError, match=r"e\.parquet\[0\]: `prompt` must be text"):
        load(data, Demonstration)


def test_no_rows_at_all(tmp_path):
    datasets.Dataset.from_dict({"prompt": []}).save_to_disk(str(tmp_path / "none"))
    (tmp_path / "none.csv").write_text("prompt,completion\n")
    for name in ("none", "none.csv"):
        with pytest.raises(PlauditError, match=f"cannot read .*{name}"):
            columns_of(str(tmp_path / name))
    with pytest.raises(PlauditError, match="has no rows"):
        columns_of("")


# ------------------------------------------------------------------------------------------------------- held out


def test_prompts_are_on_one_side_only_and_always_on_the_same():
    items = [(f"prompt {i % 200}", i) for i in range(1000)]
    training, held = hold_out(items, 0.2, lambda item: item[0])
    assert {p for p, _ in training}.isdisjoint({p for p, _ in held})
    assert sorted(training + held, key=lambda item: item[1]) == items
    assert 100 < len(held) < 300
    assert [i for _, i in training] == sorted(i for _, i in training)
    fewer, still = hold_out(items[::-3], 0.2, lambda item: item[0])
    assert {p for p, _ in still} <= {p for p, _ in held}
    assert {p for p, _ in fewer} <= {p for p, _ in training}


def test_a_larger_share_holds_out_more_of_the_same():
    items = [f"p{i}" for i in range(500)]
    sides = [set(hold_out(items, share, str)[1]) for share in (0, 0.1, 0.3, 1)]
    assert sides[0] == set()
    assert sides[0] < sides[1] < sides[2] < sides[3] == set(items)


def test_of_few_prompts_at_least_one_is_held_out_and_never_all():
    """By chance alone, nothing of 8 would be held out in 43 % of all cases at a tenth."""
    for start in range(0, 400, 8):
        prompts = [f"prompt {start + i}" for i in range(8)] * 2
        for share in (0.001, 0.1, 0.999):
            training, held = hold_out(prompts, share, str)
            assert set(training).isdisjoint(held)
            assert len(training) % 2 == len(held) % 2 == 0
            assert len(training) >= 2 <= len(held)
        # Those nearest to the other side, so that more prompts change as little as can be.
        assert set(hold_out(prompts, 0.001, str)[1]) == {min(prompts, key=key_of)}
        assert set(hold_out(prompts, 0.999, str)[0]) == {max(prompts, key=key_of)}
    assert hold_out(["p", "p"], 0.999, str) == (["p", "p"], [])
    assert hold_out(["p", "q"], 1, str) == ([], ["p", "q"])
    assert hold_out(["p", "q"], 0, str) == (["p", "q"], [])


def test_conversations_are_known_by_what_they_say():
    turn = {"role": "user", "content": "Hi"}
    assert key_of([turn]) == key_of([dict(reversed(turn.items()))])
    assert key_of([turn]) != key_of("Hi") != key_of("hi")
    assert key_of("Hi") == "3639efcd08abb273b1619e82e78c29a7df02c1051b1820e99fc395dcaa3326b8"  # in every process


# ---------------------------------------------------------------------------------------------------------- order


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 9), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_each_index_once_in_each_epoch(count, batch, seed, epochs):
    order = Order(count, batch, seed)
    steps = -(-count * epochs // batch)
    handed = [i for step in range(steps) for i in order[step]]
    assert all(len(order[step]) == batch for step in range(steps))
    for epoch in range(epochs):
        assert sorted(handed[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_another_order_in_every_epoch_and_for_every_seed():
    order = Order(50, 50, 0)
    assert order[0] != order[1] != list(range(50))
    assert order[0] != Order(50, 50, 1)[0]


def test_any_step_is_known_without_those_before_it():
    order = Order(7, 3, 5)
    steps = [order[step] for step in range(12)]
    assert [Order(7, 3, 5)[step] for step in reversed(range(12))] == steps[::-1]
    assert order[2] == steps[2]


def test_steps_that_see_the_data_so_many_times():
    assert [Order(100, 32, 0).steps(epochs) for epochs in (1, 2, 0.5, 0.001)] == [3, 6, 2, 1]


# --------------------------------------------------------------------------------------------------------- lengths


def test_what_is_too_long_is_left_out_and_told():
    kept, notes = within(["a", "bbb", "cc", "dddd"], len, 2, "prompt")
    assert kept == ["a", "cc"]
    assert notes == ["2 of 4 prompts are longer than 2 tokens and left out."]
    assert within(["a"], len, 2, "prompt") == (["a"], [])


def test_nothing_short_enough():
    with pytest.raises(PlauditError, match="every prompt is longer than 2 tokens"):
        within(["aaa", "bbbb"], len, 2, "prompt")
