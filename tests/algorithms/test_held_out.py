"""Held-out figures by the values of a column, and how far preferred texts lead."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import examples
import plaudit
import tiny
from plaudit import PlauditError, Reward
from plaudit.algorithms.reward import of_pairs
from plaudit.data import load
from plaudit.records import Demonstration
from plaudit.report import write

LANGUAGES = ("de", "en", "de", "fr", "en", "de")


def spoken(rows):
    return [{**row, "language": LANGUAGES[i % len(LANGUAGES)]} for i, row in enumerate(rows)]


def test_s3_15_held_out_figures_of_sft_by_language(at, tmp_path):
    data = tiny.lines(tmp_path / "data.jsonl", spoken(examples.alphabet(15)))
    changes = {"data": data, "eval_data": data, "epochs": 0.6, "evaluate_every": 0, "dropout": False}
    run = plaudit.train(examples.settings("sft", at, tmp_path / "run", eval_by="language", **changes))
    last = run.metrics()[-1]
    # Each language alone, by the same model, in a run of its own that changes nothing.
    records = load(data, Demonstration).records
    total = tokens = 0.0
    for language in sorted(set(LANGUAGES)):
        rows = [row for row in spoken(examples.alphabet(15)) if row["language"] == language]
        alone = tiny.lines(tmp_path / f"{language}.jsonl", rows)
        settings = examples.settings("sft", at, tmp_path / language, **{**changes, "model": str(run.final)})
        first = plaudit.train(settings.__class__(**{**vars(settings), "eval_data": alone})).metrics()[0]
        for name in ("heldout_nll", "heldout_accuracy"):
            assert last[f"{name}/{language}"] == pytest.approx(first[name], abs=1e-5)
        count = sum(len(record.completion) + 1 for record in records if record.columns["language"] == language)
        total, tokens = total + last[f"heldout_nll/{language}"] * count, tokens + count
    assert last["heldout_nll"] == pytest.approx(total / tokens, abs=1e-5)
    assert len({round(last[f"heldout_nll/{language}"], 6) for language in LANGUAGES}) == 3


@pytest.mark.parametrize("kind", ["comparisons", "rankings", "ratings"])
def test_s3_15_held_out_figures_of_a_reward_model_by_language(kind, at, tmp_path):
    data = tiny.lines(tmp_path / "data.jsonl", spoken(examples.judgements(kind, 14)))
    changes = {"data": data, "eval_data": data, "steps": 2, "evaluate_every": 0, "eval_by": "language"}
    run = plaudit.train(examples.settings(kind, at, tmp_path / "run", **changes))
    last = run.metrics()[-1]
    named = {name.partition("/")[2] for name in last if name.startswith("heldout_accuracy/")}
    assert named == {"de", "en", "fr"}
    assert run.summary["accuracy"] == last["heldout_accuracy"]  # of all, not of the last language
    if kind == "comparisons":
        counts = {language: 0 for language in named}
        for row in spoken(examples.judgements(kind, 14)):
            counts[row["language"]] += 1
        mean = sum(counts[language] * last[f"heldout_accuracy/{language}"] for language in named)
        assert last["heldout_accuracy"] == pytest.approx(mean / sum(counts.values()))


def test_s3_15_a_column_that_no_row_has_is_refused(at, tmp_path):
    settings = examples.settings("sft", at, tmp_path / "run", eval_by="lang")
    with pytest.raises(PlauditError, match="eval_by: no held-out row has a column 'lang': they have no other columns"):
        plaudit.train(settings)


def test_s3_13_margins_by_hand():
    # The lead of the first, and how far people prefer it: right by 2, wrong by 1, a tie, wrong by 3 (the second leads).
    found = of_pairs(torch.tensor([2.0, 1.0, 5.0, 3.0]), torch.tensor([1.0, 0.0, 0.5, 0.2]))["margins"]
    assert sum(row["count"] for row in found) == 3
    assert (found[0]["from"], found[-1]["to"]) == pytest.approx((-3, 2), abs=1e-5)
    assert next(row["count"] for row in found if row["from"] <= -1 <= row["to"]) == 1
    assert all(one["to"] == after["from"] for one, after in pairwise(found))
    surest = of_pairs(torch.tensor([99.0, -99.0]), torch.tensor([1.0, 1.0]))["margins"]
    assert (surest[0]["from"], surest[-1]["to"]) == pytest.approx((-16.1, 16.1), abs=0.1)


def test_s3_13_the_report_draws_the_margins(at, tmp_path):
    file = str(at / "comparisons.jsonl")
    changes = {"model": str(at / "model"), "steps": 1, "holdout": 0.0, "batch_size": 4, "precision": "float32"}
    run = plaudit.train(Reward(data=file, eval_data=file, output=str(tmp_path / "run"), **changes))
    rows = run.summary["margins"]
    assert sum(row["count"] for row in rows) == len(examples.judgements("comparisons", 14))
    wrong = sum(row["count"] for row in rows if row["to"] <= 0)
    page = write(run.folder).read_text()
    assert "lead of the text that people prefer; pairs" in page
    assert f"{wrong} of {sum(row['count'] for row in rows)}" in page
    assert np.isclose(run.summary["accuracy"], 1 - wrong / sum(row["count"] for row in rows), atol=0.1)


def test_s2_06_long_prompts_are_cut_from_the_left_or_left_out(at, tmp_path):
    data = tiny.lines(tmp_path / "long.jsonl", [{"prompt": "0123456789abc"[: 4 + 3 * i]} for i in range(4)])
    given = {"data": data, "eval_data": data, "max_prompt_tokens": 8}
    kept = examples.built(examples.settings("ppo", at, tmp_path / "a", **given))
    cut = examples.built(examples.settings("ppo", at, tmp_path / "b", long_prompts="cut", **given))
    tokenizer = tiny.tokenizer()
    assert [tokenizer.decode(one.ids) for one in kept.data] == ["0123", "0123456"]
    assert [tokenizer.decode(one.ids) for one in cut.data] == ["0123", "0123456", "23456789", "56789abc"]
    assert [tokenizer.decode(one.ids) for one in cut.held] == [tokenizer.decode(one.ids) for one in cut.data]
    assert cut.data[3].record.prompt == "0123456789abc"  # which is what rewards see


def test_s2_06_sample_cuts_long_prompts_too(at, tmp_path):
    data = tiny.lines(tmp_path / "long.jsonl", [{"prompt": "a"}, {"prompt": "0123456789abc"}])
    given = {"model": str(at / "model"), "data": data, "max_prompt_tokens": 5, "max_new_tokens": 3, "temperature": 0}
    plaudit.sample(plaudit.Sample(**given, output=str(tmp_path / "cut.jsonl"), long_prompts="cut"))
    alone = {**given, "data": tiny.lines(tmp_path / "short.jsonl", [{"prompt": "a"}, {"prompt": "89abc"}])}
    plaudit.sample(plaudit.Sample(**alone, output=str(tmp_path / "short.jsonl.out")))
    said = [read(tmp_path / name) for name in ("cut.jsonl", "short.jsonl.out")]
    assert [row["completion"] for row in said[0]] == [row["completion"] for row in said[1]]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
