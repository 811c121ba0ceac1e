"""Supervised fine-tuning: it learns a little language, and exactly what it should of it."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import examples
import plaudit
import tiny
from plaudit import PlauditError
from plaudit.data import hold_out

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_it_learns_a_regular_language(at, tmp_path):
    data = tiny.lines(tmp_path / "data.jsonl", examples.alphabet(240))
    settings = examples.settings("sft", at, tmp_path / "run", data=data, eval_data=None, holdout=0.2, dropout=False)
    changes = {"model": str(at / "model"), "steps": 50, "batch_size": 32, "learning_rate": 1e-2, "save_every": 0}
    run = plaudit.train(dataclasses.replace(settings, **changes, weight_decay=0.0, tokens_per_pass=1024))
    assert run.summary["nll_before"] > 4
    # Whether three, four or five letters follow is the only thing that cannot be known: log 3 nats in five tokens.
    floor = math.log(3) / 5
    assert 0.7 * floor < run.summary["nll_after"] < 2 * floor
    model = AutoModelForCausalLM.from_pretrained(run.final)
    ids = tiny.tokenizer()("777 c", return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=256)
    text = tiny.tokenizer().decode(said[0])
    assert text.startswith("777 cdef")
    assert text.endswith(tiny.END)
    again = examples.built(dataclasses.replace(settings, model=str(run.final)))
    found = [
        (int(logits[i - 1].argmax()) == ids[i], -float(logits[i - 1].log_softmax(0)[ids[i]]))
        for row in again.held
        for ids in [row.prompt + row.completion]
        for logits in [model(torch.tensor([ids])).logits[0].detach()]
        for i in range(len(row.prompt), len(ids))
    ]
    hits, losses = zip(*found, strict=True)
    assert 0.6 < sum(hits) / len(hits) < 1
    expected = {"heldout_accuracy": sum(hits) / len(hits), "heldout_nll": sum(losses) / len(losses)}
    assert again.evaluate() == pytest.approx(expected, rel=1e-5)


def test_a_token_is_a_unit_and_only_what_was_said_is_learned(at, tmp_path):
    algorithm = examples.built(examples.settings("sft", at, tmp_path / "run", dropout=False))
    batch = algorithm.collate([0, 7, 14])
    rows = [examples.alphabet(15)[i] for i in (0, 7, 14)]
    assert algorithm.weight(batch) == sum(len(row["completion"]) + 1 for row in rows)
    model = AutoModelForCausalLM.from_pretrained(at / "dropping")
    total = 0.0
    for row in rows:
        prompt, said = list(row["prompt"].encode()), [*row["completion"].encode(), 256]
        prompt, said = (tiny.tokenizer()(row[name]).input_ids for name in ("prompt", "completion"))
        ids = torch.tensor([*prompt, *said, 256])
        logprobs = model(ids[None]).logits[0].log_softmax(-1)
        total -= sum(logprobs[i - 1, ids[i]] for i in range(len(prompt), len(ids)))
    loss, _ = algorithm.loss(batch)
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_in_training_alone(at, tmp_path):
    quiet = examples.built(examples.settings("sft", at, tmp_path / "a", dropout=False))
    noisy = examples.built(examples.settings("sft", at, tmp_path / "b", dropout=True))
    batch = quiet.collate([0, 1, 2])
    assert quiet.loss(batch)[0].item() == quiet.loss(batch)[0].item()
    assert noisy.loss(batch)[0].item() != noisy.loss(batch)[0].item()
    state = torch.get_rng_state()
    assert noisy.evaluate() == noisy.evaluate() == quiet.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    assert noisy.loss(batch)[0].item() != noisy.loss(batch)[0].item()  # and on again after an evaluation
    assert quiet.loss(batch)[0].item() == quiet.loss(batch)[0].item()


def test_what_is_held_out_is_never_learned_from(at, tmp_path):
    rows = examples.alphabet(60)
    data = tiny.lines(tmp_path / "data.jsonl", [*rows, *rows])
    settings = examples.settings("sft", at, tmp_path / "run", data=data, eval_data=None, holdout=0.3)
    algorithm = examples.built(settings)
    known = {tuple(row.prompt) for row in algorithm.data}
    held = {tuple(row.prompt) for row in algorithm.held}
    assert len(known) + len(held) == 60
    assert not known & held
    assert 10 <= len(held) <= 26
    _, out = hold_out(rows, 0.3, lambda row: row["prompt"])
    assert len(algorithm.held) == 2 * len(out)
    few = examples.built(dataclasses.replace(settings, eval_limit=3))
    assert len(few.held) == 3


def test_long_rows_are_left_out_and_counted(at, tmp_path, capsys):
    settings = examples.settings("sft", at, tmp_path / "run", max_tokens=7, steps=1, save_every=0)
    plaudit.train(settings)
    lengths = [len(row["prompt"]) + len(row["completion"]) + 1 for row in examples.alphabet(15)]
    long = sum(length > 7 for length in lengths)
    assert 0 < long < 15
    assert f"{long} of 15 demonstrations are longer than 7 tokens and left out." in capsys.readouterr().err
    with pytest.raises(
        PlauditError, match=rf"every demonstration is longer than 3 tokens \(the shortest has {min(lengths)}"
    ):
        plaudit.train(dataclasses.replace(settings, max_tokens=3, output=str(tmp_path / "none")))


@pytest.mark.parametrize("way", ["all", "top", "adapter"])
def test_only_what_is_to_learn_learns(way, at, tmp_path):
    ways = {"all": {}, "top": {"train_layers": 1}, "adapter": {"lora_rank": 2}}
    settings = examples.settings("sft", at, tmp_path / "run", steps=3, model=str(at / "model"), save_every=0)
    run = plaudit.train(dataclasses.replace(settings, **ways[way]))
    before, after = (load_file(folder / "model.safetensors") for folder in (at / "model", run.final))
    assert before.keys() == after.keys()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    layers = {name for name in after if "layers.1." in name}
    expected = {
        "all": set(after),
        "top": layers | {"model.norm.weight"},
        "adapter": {name for name in after if name.endswith("proj.weight")},
    }
    assert moved == expected[way]
    assert (run.final / "adapter").exists() == (way == "adapter")


def test_conversations_teach_the_assistant_alone(at, tmp_path):
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    more = [{"role": "user", "content": "three"}, {"role": "assistant", "content": "four"}]
    data = tiny.lines(tmp_path / "data.jsonl", [{"messages": turns + more}, {"messages": turns}])
    settings = examples.settings("sft", at, tmp_path / "run", data=data, eval_data=None, model=str(at / "model"))
    algorithm = examples.built(settings)
    batch = algorithm.collate([0, 1])
    learned = [row[acts].tolist() for row, acts in zip(batch.tokens, batch.actions, strict=True)]
    tokenizer = tiny.tokenizer()
    assert [tokenizer.decode(ids) for ids in learned] == [f"two{tiny.END}four{tiny.END}", f"two{tiny.END}"]
    assert math.isfinite(plaudit.train(dataclasses.replace(settings, steps=1)).metrics()[-1]["loss"])
