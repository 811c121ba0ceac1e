"""Encoder-decoder policies learn as the others do (S1-17)."""

from __future__ import annotations

import dataclasses
import math

import pytest
from transformers import AutoModelForSeq2SeqLM

import examples
import plaudit
import tiny
from plaudit import PPO, SFT, PlauditError
from plaudit.explain import explain

LEARNING = {"precision": "float32", "save_every": 0, "batch_size": 32, "tokens_per_pass": 1024}


def test_sft_learns_a_regular_language(tmp_path):
    settings = SFT(
        model=tiny.folder(tmp_path / "m", "t5"),
        data=tiny.lines(tmp_path / "data.jsonl", examples.alphabet(240)),
        output=str(tmp_path / "run"),
        holdout=0.2,
        steps=80,
        learning_rate=1e-2,
        **LEARNING,
    )
    run = plaudit.train(settings)
    floor = math.log(3) / 5
    assert run.summary["nll_before"] > 4
    assert run.summary["nll_after"] < 2.5 * floor
    model = AutoModelForSeq2SeqLM.from_pretrained(run.final)
    ids = tiny.tokenizer()("777 c", return_tensors="pt").input_ids
    said = tiny.tokenizer().decode(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=256)[0, 1:])
    assert said.startswith("def")
    with pytest.raises(PlauditError, match="learn: an encoder-decoder model reads prompts and writes completions"):
        plaudit.train(dataclasses.replace(settings, learn="all", output=str(tmp_path / "all")))


@pytest.mark.parametrize(("way", "goal"), [({"learning_rate": 2e-2}, 3), ({"learning_rate": 3e-2, "lora_rank": 4}, 1)])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_ppo_learns_to_say_what_is_rewarded(way, goal, tmp_path):
    settings = PPO(
        model=tiny.folder(tmp_path / "m", "t5"),
        data=tiny.lines(tmp_path / "prompts.jsonl", examples.openings(16)),
        rewards=f"{tmp_path / 'r.py'}:low",
        output=str(tmp_path / "run"),
        holdout=0.0,
        steps=24,
        rollout=64,
        reuse=2,
        max_new_tokens=5,
        kl=0.0,
        **{**LEARNING, "batch_size": 64, **way},
    )
    letters = "sum('a' <= letter <= 'z' for letter in text)"
    (tmp_path / "r.py").write_text(f"def low(completions, **rest):\n    return [{letters} for text in completions]\n")
    rows = [row for row in plaudit.train(settings).metrics() if "score" in row]
    assert rows[0]["sampler_gap"] < 1e-5
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert rows[0]["score"] < 0.6
    assert sum(row["score"] for row in rows[-3:]) / 3 > goal


def test_b36_with_a_reference_the_divergence_begins_at_nothing(at, tmp_path):
    algorithm = examples.built(examples.settings("ppo-encdec", at, tmp_path / "run", temperature=0.7))
    algorithm.rollout()
    assert algorithm.notes["sampler_gap"] < 1e-5
    assert abs(algorithm.notes["kl"]) < 1e-5
    assert algorithm.notes["value"] == 0.0


def test_explain_counts_both_stacks(at, capsys):
    explain(examples.settings("sft-encdec", at, at / "never"))
    total = sum(p.numel() for p in AutoModelForSeq2SeqLM.from_pretrained(at / "encdec").parameters())
    assert f"{total:,} weights, of which {total:,} learn" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo", "grpo", "online_dpo", "ilql"])
def test_other_algorithms_take_it_as_it_is(kind, at, tmp_path):
    changes = {"model": str(at / "encdec"), "steps": 2, "save_every": 0, "eval_data": None, "evaluate_every": 0}
    settings = examples.settings(kind, at, tmp_path / "run", **changes)
    first, last = plaudit.train(settings).metrics()
    assert math.isfinite(last["loss"])
    assert first["gradient_norm"] > 0
    if kind == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are one
    if kind == "grpo":
        assert first["sampler_gap"] < 1e-5
        assert first["ratio"] == pytest.approx(1, abs=1e-5)
