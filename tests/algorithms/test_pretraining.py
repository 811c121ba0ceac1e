"""Language models from nothing but a text: `sft` from scratch on whole texts, and what can be built on it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import examples
import plaudit
import tiny
import watched
from plaudit import SFT, VPG, PlauditError, config, recipes
from plaudit.cli import main, shipped
from plaudit.explain import explain
from plaudit.templates import Encoded, Template
from plaudit.trainer import Interrupted
from watched import Killed

SMALL = "scratch:llama:layers=2,width=32,heads=2,context=48"


def pretraining(folder, **changes) -> SFT:
    """A run on a little play, written into `folder` if it is not there yet."""
    file = folder / "play.txt"
    if not file.exists():
        file.write_text(examples.play(200))
    shape = {"model": SMALL, "batch_size": 16, "precision": "float32", "save_every": 0, "holdout": 0.1}
    return SFT(**{"data": str(file), "output": str(folder / "run"), "learning_rate": 1e-2, **shape, **changes})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    return plaudit.train(pretraining(folder, steps=80))


def test_s0_28_a_model_from_scratch_learns_a_text(pretrained):
    rows = [row for row in pretrained.metrics() if "heldout_nll" in row]
    characters = Counter(examples.play(200))
    vocabulary = len(characters) + 2
    assert rows[0]["heldout_nll"] == pytest.approx(math.log(vocabulary), abs=0.1)  # it knows nothing
    assert rows[0]["heldout_accuracy"] < 0.2
    # Who speaks next, one of three, and how it ends, one of three, is all that cannot be known of a speech.
    speech = sum(characters.values()) / 200
    floor = 2 * math.log(3) / speech
    assert 0.5 * floor < rows[-1]["heldout_nll"] < 4 * floor
    assert rows[-1]["heldout_accuracy"] > 0.85
    assert pretrained.summary["nll_after"] == rows[-1]["heldout_nll"]


def test_its_folder_is_a_plain_one(pretrained):
    model = AutoModelForCausalLM.from_pretrained(pretrained.final)
    tokenizer = AutoTokenizer.from_pretrained(pretrained.final)
    ids = tokenizer("LEONATO:\nPe", return_tensors="pt")
    said = tokenizer.decode(model.generate(**ids, max_new_tokens=17, do_sample=False, pad_token_id=0)[0])
    assert said == "LEONATO:\nPeace, my good lord"
    assert (pretrained.folder / "initial" / "model.safetensors").exists()


STARTS = [json.loads(line)["prompt"] for line in shipped("starts.jsonl").read_text().splitlines()]
CEILING = 20 + 2 / 13  # twenty new letters, and two of thirteen starts hold an h


def hacking(pretrained, folder, **changes) -> VPG:
    """The seed's policy gradient: the starts, twenty new letters, and the count of one of them as the reward."""
    data = tiny.lines(folder / "starts.jsonl", [{"prompt": text} for text in STARTS])
    given = {
        "model": str(pretrained.final),
        "data": data,
        "eval_data": data,
        "rewards": "count:h",
        "group": 2,
        "kl": 0.0,
    }
    given |= {"precision": "float32", "rollout": 26, "batch_size": 26, "max_new_tokens": 20, "learning_rate": 3e-3}
    return VPG(**{**given, "output": str(folder / "vpg"), "save_every": 0, **changes})


def test_s0_7_a_policy_gradient_hacks_a_count_and_kl_holds_it_back(pretrained, tmp_path):
    assert (len(STARTS), sum("h" in text for text in STARTS), hacking(pretrained, tmp_path).baseline) == (13, 2, "ema")
    free = plaudit.train(hacking(pretrained, tmp_path, steps=40, evaluate_every=10)).metrics()
    held_out = [row["heldout_score"] for row in free if "heldout_score" in row]
    assert held_out[0] < 2
    assert held_out[-1] > 19
    assert max(held_out) <= CEILING + 1e-6
    assert max(row["score"] for row in free if "score" in row) <= CEILING + 1e-6
    held = plaudit.train(hacking(pretrained, tmp_path, steps=30, kl=1.0, output=str(tmp_path / "held"))).metrics()
    assert max(row[name] for row in held for name in ("score", "heldout_score") if name in row) < 6


# ------------------------------------------------------------------------------------------------------------ windows


@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_each_token_is_learned_once_and_after_what_precedes_it(count, size, data):
    overlap = data.draw(st.integers(1, size - 1))
    text = Encoded([0], list(range(1, count + 1)), [True] * count)
    pieces = text.windows(size, overlap)
    assert all(len(piece) <= size for piece in pieces)
    learned = [token for piece in pieces for token in piece.completion]
    assert learned == list(range(1, count + 1))
    for number, piece in enumerate(pieces):
        assert piece.actions == [True] * len(piece.completion)
        ids = piece.prompt + piece.completion
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert len(piece.prompt) == (overlap if number else 1)


def test_what_is_no_action_in_a_text_is_none_in_its_windows():
    text = Encoded([0], [1, 2, 3, 4], [True, False, False, True])
    assert [piece.actions for piece in text.windows(3, 1)] == [[True, False], [False, True]]


def test_long_texts_are_cut_and_long_answers_left_out(tmp_path):
    rows = [
        {"text": "a" * 20},
        {"text": "b" * 5},
        {"prompt": "q" * 9, "completion": "c" * 9},
        {"prompt": "q", "completion": "d"},
    ]
    data = tiny.lines(tmp_path / "d.jsonl", rows)
    settings = SFT(model=tiny.folder(tmp_path / "m"), data=data, holdout=0.0, max_tokens=8, overlap=3)
    algorithm = examples.built(settings)
    tokenizer = tiny.tokenizer()
    texts = [(tokenizer.decode(row.prompt), tokenizer.decode(row.completion)) for row in algorithm.data]
    end = tiny.END
    cut = [(end, "a" * 7), ("aaa", "a" * 5), ("aaa", "a" * 5), ("aaa", f"aaa{end}")]
    assert texts == [*cut, (end, f"bbbbb{end}"), ("q", f"d{end}")]
    everything = examples.built(dataclasses.replace(settings, learn="all"))
    learned = sum(sum(row.actions) for row in everything.data)
    assert learned == 21 + 6 + 18 + 2  # of a prompt, all but the first token


def test_learning_all_is_the_likelihood_of_whole_texts(tmp_path):
    rows = [
        {"prompt": "one ", "completion": "two"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    ]
    folder = tiny.folder(tmp_path / "m")
    for row in rows:
        settings = SFT(model=folder, data=tiny.lines(tmp_path / "d.jsonl", [row]), holdout=0.0, learn="all")
        algorithm = examples.built(settings)
        template = Template(tiny.tokenizer())
        encoded = template.encode(row.get("prompt", ""), row.get("completion", row.get("messages")))
        ids = torch.tensor(encoded.prompt + encoded.completion)
        logprobs = AutoModelForCausalLM.from_pretrained(folder)(ids[None]).logits[0].log_softmax(-1)
        total = -sum(logprobs[i - 1, ids[i]] for i in range(1, len(ids)))
        loss, _ = algorithm.loss(algorithm.collate([0]))
        torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)


def test_the_end_of_a_text_is_held_out_and_its_characters_are_not_looked_at(tmp_path):
    (tmp_path / "t.txt").write_text("ab" * 90 + "xy" * 30)
    settings = pretraining(tmp_path, data=str(tmp_path / "t.txt"), holdout=0.25, eval_limit=1)
    settings, loaded = recipes.prepare(settings)
    assert settings.max_tokens == 48  # what the model can read
    settings = recipes.begun(settings, loaded, tmp_path)
    template = recipes.template_of(settings)
    assert len(template.tokenizer) == 4
    encoded = recipes.encode(settings, template, loaded)
    assert [template.decode(row.completion) for row in encoded.training] == [
        "ab" * 23 + "a",
        "ba" * 23 + "b",
        "ab" * 23 + "a",
        "ba" * 19 + "b",
    ]
    assert [row.completion for row in encoded.held] == [[1] * 47]  # unknown, and the first window alone
    assert encoded.notes == []


def test_texts_without_prompts_are_held_out_one_by_one(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(60)]
    settings = SFT(model=tiny.folder(tmp_path / "m"), data=tiny.lines(tmp_path / "d.jsonl", rows), holdout=0.3)
    algorithm = examples.built(settings)
    assert 8 < len(algorithm.held) < 28
    assert len(algorithm.held) + len(algorithm.data) == 60


# ----------------------------------------------------------------------------------------------------- going on, doors


def test_r1_a_run_from_scratch_goes_on_bit_by_bit_also_before_its_first_checkpoint(tmp_path):
    common = {"steps": 4, "save_every": 3, "batch_size": 4}
    whole = watched.train(pretraining(tmp_path, **common, output=str(tmp_path / "whole")))
    with pytest.raises(Killed):
        watched.train(pretraining(tmp_path, **common), kill_after=2)
    assert not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(Interrupted):
        watched.train(pretraining(tmp_path, **common), signal_after=3)
    made = (tmp_path / "run" / "initial" / "model.safetensors").stat().st_mtime_ns
    rest = watched.train(pretraining(tmp_path, **common))
    assert rest.digests == {4: whole.digests[4]}
    assert watched.final(tmp_path / "run") == watched.final(tmp_path / "whole")
    assert (tmp_path / "run" / "initial" / "model.safetensors").stat().st_mtime_ns == made
    with pytest.raises(PlauditError, match=r"model: '?scratch:llama:layers=2.* -> '?scratch:llama:layers=1"):
        plaudit.train(pretraining(tmp_path, **common, model=SMALL.replace("layers=2", "layers=1")))


def test_explain_shows_a_model_that_does_not_exist_yet_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    explain(pretraining(tmp_path, output="run"))
    shown = capsys.readouterr().out
    assert "weights, of which" in shown
    assert "⟦" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"play.txt"}


def test_what_makes_no_sense_is_told(tmp_path):
    (tmp_path / "play.txt").write_text("Peace.")
    with pytest.raises(PlauditError, match=r"overlap \(64\) must be less than the model's context \(48\)\."):
        recipes.prepare(pretraining(tmp_path, overlap=64))
    with pytest.raises(ValueError, match=r"`overlap` \(9\) must be less than `max_tokens` \(9\)"):
        pretraining(tmp_path, overlap=9, max_tokens=9)
    with pytest.raises(PlauditError, match="model: only `sft` and `reward` begin from scratch: train 'scratch:llama'"):
        recipes.prepare(VPG(model="scratch:llama", data=str(tmp_path / "play.txt"), rewards="count:h"))


def test_the_recipe_runs_from_flags_and_leaves_a_policy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text(examples.play(60))
    few = ["sft.steps=3", "vpg.steps=2", "sft.device=cpu", "vpg.max_new_tokens=4", "sft.save_every=0"]
    small = "sft.model={scratch: gpt2, layers: 1, width: 16, heads: 2, context: 64, tokenizer: bpe, vocabulary: 260}"
    assert main(["run", str(shipped("shakespeare.yaml")), "output=out", small, *few]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.endswith("out/report.html\n")
    model = AutoModelForCausalLM.from_pretrained("out/vpg/final")
    assert (model.config.model_type, model.config.vocab_size) == ("gpt2", 260)
    assert config.read_yaml("out/sft/config.yaml")["max_tokens"] == 64
    assert main(["sft", "--model", "scratch:gpt2:widht=3", "--data", "input.txt"]) == 2
    assert capsys.readouterr().err == "plaudit sft: model: `scratch` has no setting `widht`; the nearest is `width`.\n"
