"""Reward models that begin with random weights; the recipe in which one learns to count and a policy to please it."""

from __future__ import annotations

import json
import runpy
import sys

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import examples
import plaudit
import tiny
import watched
from plaudit import VPG, PlauditError, Reward, recipes, scratch
from plaudit.cli import main, shipped
from plaudit.explain import explain
from plaudit.records import Comparison, Ranking, Rating, load, write
from plaudit.rewards import load_rewards

SHAPE = "scratch:gpt2:layers=1,width=32,heads=2,context=64"
counts = runpy.run_path(str(shipped("token_counts.py")))


def counting(folder, **changes) -> Reward:
    """A run that learns how often an h occurs in pieces of a little play."""
    if not (folder / "train.jsonl").exists():
        training, held = counts["make"](examples.play(100), "h", (8, 16, 32), (0,), 0.2)
        write(folder / "train.jsonl", training)
        write(folder / "heldout.jsonl", held)
    data = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "heldout.jsonl"), "objective": "regression"}
    given = {"learning_rate": 5e-3, "batch_size": 64, "precision": "float32", "save_every": 0, "warmup": 0.1}
    return Reward(**{"model": SHAPE, "output": str(folder / "run"), **data, **given, **changes})


@pytest.fixture(scope="module")
def counter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("counter")
    return plaudit.train(counting(folder, steps=60)), load(folder / "heldout.jsonl", Rating).records


def test_s0_10_s0_12_a_transformer_from_nothing_learns_to_count_by_squared_error(counter):
    run, held = counter
    truth = [record.ratings[0] for record in held]
    assert run.summary["mse"] < 0.1 * np.var(truth)
    assert run.summary["pearson"] > 0.95
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    model = AutoModelForSequenceClassification.from_pretrained(run.final)
    assert (model.config.model_type, model.config.num_labels) == ("gpt2", 1)
    texts = [record.completion for record in held[:5]]
    plain = [float(model(**tokenizer(text, return_tensors="pt")).logits.detach()) for text in texts]
    scores = load_rewards(str(run.final))([""] * 5, texts, {}).tolist()
    assert scores == pytest.approx(plain, abs=1e-4)


def test_s0_11_s0_23_the_model_and_the_count_reward_one_policy_gradient(counter, tmp_path):
    """Both kinds of reward in one trainer: whole batches of completions are scored, and the figures nearly agree."""
    run, _ = counter
    policy = plaudit.train(
        plaudit.SFT(
            model="scratch:llama:layers=1,width=16,heads=2,context=48", data=counting(run.folder.parent).data,
            output=str(tmp_path / "sft"), steps=10, learning_rate=1e-2, save_every=0, precision="float32",
        )
    )  # fmt: skip
    starts = [json.loads(line) for line in shipped("starts.jsonl").read_text().splitlines()]
    settings = VPG(
        model=str(policy.final), data=tiny.lines(tmp_path / "starts.jsonl", starts), holdout=0.0, kl=0.0,
        rewards=(str(run.final), "count:h"), reward_weights=(1.0, 0.0), rollout=52, batch_size=52, group=4,
        max_new_tokens=12, steps=8, learning_rate=2e-2, output=str(tmp_path / "vpg"), save_every=0,
    )  # fmt: skip
    rows = plaudit.train(settings).metrics()
    learned, counted = ([row[f"reward/{name}"] for row in rows] for name in ("final", "count:h"))
    assert [row["score"] for row in rows] == pytest.approx(learned)
    assert counted[-1] > 2 * counted[0]
    assert np.corrcoef(learned, counted)[0, 1] > 0.8


def test_s0_13_pieces_counted_by_hand():
    text = "  hah\n\n the end \n"
    assert counts["lines_of"](text) == ["hah\n", "the end\n"]
    lines = ["abcde", "fgh\n"]
    assert counts["pieces"](lines, [4], [0]) == ["abcd", "efgh", "\n"]
    assert counts["pieces"](lines, [4, 6], [1]) == ["abcd", "defg", "gh\n", "abcdef", "fgh\n"]
    assert counts["pieces"](lines, [], [0]) == lines
    assert counts["pieces"](["ab"], [8], [3]) == ["ab"]
    rated = counts["rated"](["hah\n", "h" * 120, "x"], "h")
    assert [record.ratings for record in rated] == [(2.0,), (100.0,), (0.0,)]
    with pytest.raises(ValueError, match="an overlap of 4 leaves pieces of 4 nothing new"):
        counts["pieces"](lines, [4], [4])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        counts["pieces"](lines, [4, 8, 16], [0, 0])


def test_s0_14_nothing_held_out_is_in_a_training_piece_of_any_size():
    lines = [f"line {i:03d} of this book" for i in range(200)]
    training, held = counts["make"]("\n".join(lines), "o", (8, 64), (0, 8), 0.1)
    first = "".join(f"{line}\n" for line in lines[:180])
    last = "".join(f"{line}\n" for line in lines[180:])
    assert all(record.completion in first for record in training)
    assert all(record.completion in last for record in held)
    assert {len(record.completion) for record in held[:30]} >= {8, 64}  # sizes are mixed
    numbers = {record.completion[5:8] for record in training if record.completion.startswith("line ")}
    assert not numbers & {f"{i:03d}" for i in range(180, 200)}


def test_every_text_of_a_judgement_makes_the_tokenizer():
    records = [Comparison("a", "b", "c"), Ranking("d", ("e", "f"), (1, 2)), Rating("", "g", (1.0,))]
    assert "".join(scratch.texts_of(records)) == "abcdefg"


def test_r1_a_reward_model_from_scratch_goes_on_bit_by_bit(tmp_path):
    whole = watched.train(counting(tmp_path, steps=4, save_every=2, output=str(tmp_path / "whole")))
    with pytest.raises(watched.Killed):
        watched.train(counting(tmp_path, steps=4, save_every=2), kill_after=3)
    rest = watched.train(counting(tmp_path, steps=4, save_every=2))
    assert rest.digests[4] == whole.digests[4]
    assert watched.final(tmp_path / "run") == watched.final(tmp_path / "whole")


def test_members_have_weights_of_their_own_and_rows_fit_the_context(tmp_path, capsys):
    run = plaudit.train(counting(tmp_path, steps=1, members=2))
    first, second = ((run.folder / f"member-{i}" / "initial" / "model.safetensors").read_bytes() for i in (0, 1))
    assert first != second
    settings, _ = recipes.prepare(counting(tmp_path, model=SHAPE.replace("context=64", "context=20")))
    assert settings.max_tokens == 20
    explain(counting(tmp_path, output=str(tmp_path / "new")))
    assert "weights, of which" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
    with pytest.raises(PlauditError, match="only `sft` and `reward` begin from scratch"):
        recipes.prepare(VPG(model=SHAPE, data=str(tmp_path / "train.jsonl"), rewards="count:h"))


def test_s0_14_the_recipe_runs_from_a_text_to_a_judged_policy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text(examples.play(60))
    monkeypatch.setattr(sys, "argv", ["token_counts.py", "input.txt", "--sizes", "8", "16", "--overlaps", "0"])
    counts["main"]()
    assert "counts/heldout.jsonl" in capsys.readouterr().out
    few = ["reward.steps=2", "sft.steps=2", "vpg.steps=1", "vpg.max_new_tokens=4", "evaluate.max_new_tokens=4"]
    small = "model={scratch: gpt2, layers: 1, width: 16, heads: 2, context: 64}"
    words = [f"reward.{small}", f"sft.{small}", *few]
    assert main(["run", str(shipped("shakespeare_reward.yaml")), "output=out", *words]) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"mse", "pearson"} <= summary["reward"].keys()
    assert {"sft", "vpg", "win_rate"} <= summary["evaluate"].keys()
