"""A share of the training rows, and prompts that are long enough or cut short."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from doorway import PROMPTS
from hypothesis import given
from hypothesis import strategies as st

import examples
import tiny
from plaudit import GRPO, RLOO, SFT, Evaluate, PlauditError, Reward, Sample, config, evaluate, recipes, sample
from plaudit.algorithms.on_policy import Asked
from plaudit.data import fraction, long_enough
from plaudit.encoding import shortened
from plaudit.records import Prompt
from plaudit.templates import Template

# --------------------------------------------------------------------------------------------------- train_fraction


@given(st.integers(1, 60), st.floats(0.05, 1), st.floats(0.05, 1), st.integers(0, 9))
def test_s1_06_a_smaller_share_is_part_of_a_larger_one_in_the_same_order(count, one, other, seed):
    small, large = sorted((one, other))
    items = list(range(count))
    if int(small * count + 1e-9) == 0:
        with pytest.raises(PlauditError, match=r"train_fraction: .* of .* rows is none: raise it"):
            fraction(items, small, seed)
        return
    chosen, more = fraction(items, small, seed), fraction(items, large, seed)
    assert len(chosen) == pytest.approx(small * count, abs=1)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(more)
    assert fraction(items, 1.0, seed) == items


def test_s1_06_the_share_is_drawn_by_the_seed_and_what_is_held_out_stays(here):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(100)]
    model, data = tiny.folder(here / "m"), tiny.lines(here / "d.jsonl", rows)

    def loaded(**changes):
        return recipes.prepare(Reward(model=model, data=data, holdout=0.2, **changes))[1]

    whole, tenth, again, other = loaded(), *(loaded(train_fraction=0.1, seed=seed) for seed in (0, 0, 1))
    assert len(tenth.training) == len(whole.training) // 10
    assert tenth.training == again.training != other.training
    assert all(record in whole.training for record in tenth.training)
    assert tenth.held == other.held == whole.held
    assert tenth.notes == [f"{len(tenth.training)} of {len(whole.training)} rows are learned from (train_fraction)."]
    assert whole.notes == []


def test_s1_06_half_of_the_rows_twice_is_not_all_of_them_once(here):
    """`epochs` counts times the data, and the data are what `train_fraction` leaves."""
    rows = [{"prompt": f"p{i}", "completion": "a"} for i in range(40)]
    given = {"model": tiny.folder(here / "m"), "data": tiny.lines(here / "d.jsonl", rows), "holdout": 0.0}
    algorithm = examples.built(SFT(**given, train_fraction=0.5, epochs=2, batch_size=4))
    assert (len(algorithm.data), algorithm.steps) == (20, 10)
    seen = Counter(i for step in range(10) for i in algorithm.order[step])
    assert set(seen.values()) == {2}


# ----------------------------------------------------------------------------------------------------- the prompts


def texts(count: int) -> list[dict[str, str]]:
    return [{"query": f"{i:03d} " + "x" * (i % 50)} for i in range(count)]


def test_s1_12_prompts_are_cut_to_2_to_7_tokens_each_as_often_and_read_as_their_text(here):
    settings = GRPO(
        model=tiny.folder(here / "m"), data=tiny.lines(here / "d.jsonl", texts(900)), rewards="count:x", holdout=0.0,
        prompt_tokens=(2, 7), min_prompt_characters=14, max_prompt_tokens=7,
    )  # fmt: skip
    algorithm = examples.built(settings)
    lengths = Counter(len(asked) for asked in algorithm.data)
    assert sorted(lengths) == [2, 3, 4, 5, 6, 7]
    expected = len(algorithm.data) / 6
    assert all(abs(found - expected) < 5 * expected**0.5 for found in lengths.values())
    assert len(algorithm.data) == 900 * 40 // 50
    assert all(asked.record.prompt == tiny.tokenizer().decode(asked.ids) for asked in algorithm.data)
    assert {asked.record.prompt[:2] for asked in algorithm.data[:9]} == {"01"}
    again = examples.built(settings)
    assert [asked.ids for asked in again.data] == [asked.ids for asked in algorithm.data]


def test_s1_12_more_than_so_many_characters():
    prompts = [Prompt("x" * 200), Prompt("x" * 201), Prompt([{"role": "user", "content": "x" * 201}])]
    kept, notes = long_enough(prompts, 201, "data")
    assert kept == prompts[1:]
    assert notes == ["1 of 3 prompts have fewer than 201 characters and are left out."]
    assert long_enough(prompts, 0, "data") == (prompts, [])
    with pytest.raises(PlauditError, match="eval_data: every prompt has fewer than 202 characters: lower min_prompt"):
        long_enough(prompts, 202, "eval_data")


def test_what_opens_a_text_is_no_part_of_the_count_and_short_prompts_stay():
    begins = Template(tiny.tokenizer(chat=False, begins=True))
    settings = RLOO(model="m", data="d", rewards="count:a", prompt_tokens=(3, 3))
    asked = [Asked(Prompt(text, {"id": 1}), begins.prompt(text)) for text in ("abcdef", "ab", "abc")]
    cut = shortened(settings, asked, begins)
    assert [item.record.prompt for item in cut] == ["abc", "ab", "abc"]
    assert [item.ids for item in cut] == [begins.prompt(text) for text in ("abc", "ab", "abc")]
    assert cut[0].record.columns == {"id": 1}
    assert shortened(RLOO(model="m", data="d", rewards="count:a"), asked, begins) is asked


def test_samples_and_comparisons_cut_alike(here, models):
    data = tiny.lines(here / "d.jsonl", texts(12))
    given = {"data": data, "min_prompt_characters": 8, "prompt_tokens": (2, 5), "max_new_tokens": 2, "seed": 4}
    path = sample(Sample(model=str(models / "plain"), **given))
    asked = [json.loads(line)["prompt"] for line in Path(path).read_text().splitlines()]
    assert [text[:2] for text in asked] == ["00"] * 6 + ["01"] * 2
    assert all(2 <= len(text) <= 5 for text in asked)
    run = evaluate(Evaluate(policies=(str(models / "plain"),), rewards="count:x", **given))
    shown = [json.loads(line)["prompt"] for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert shown == asked


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["7", "2"], r"`prompt_tokens` is \[7, 2\]: give the smaller number first\."),
        (["3"], r"`prompt_tokens` is \[3\]: give two numbers of tokens, as in \[2, 7\]\."),
        (["0", "3"], r"`prompt_tokens` is \[0, 3\]: give two numbers of tokens"),
    ],
)
def test_what_makes_no_sense_is_told(words, sentence):
    with pytest.raises(PlauditError, match=sentence):
        config.from_arguments(Sample, ["--model", "m", "--prompt-tokens", *words], "plaudit sample")


def test_a_conversation_is_not_cut(here, models):
    rows = [{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS]
    data = tiny.lines(here / "d.jsonl", rows)
    with pytest.raises(PlauditError, match=r"prompt_tokens: the prompt at .*d\.jsonl:1 is a conversation"):
        sample(Sample(model=str(models / "chat"), data=data, prompt_tokens=(2, 7)))
