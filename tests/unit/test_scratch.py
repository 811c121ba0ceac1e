"""Models that are described instead of named: how they are written, and what is made of them."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import examples
from plaudit import SFT, PlauditError, config, scratch
from plaudit.records import Demonstration
from plaudit.settings.scratch import Scratch, described, in_one_line

LINE = "scratch:gpt2:layers=2,width=32,heads=2,context=64,tokenizer=bpe,vocabulary=300"
MAPPING = {
    "scratch": "gpt2",
    "layers": 2,
    "width": 32,
    "heads": 2,
    "context": 64,
    "tokenizer": "bpe",
    "vocabulary": 300,
}
PLAY = [Demonstration("", examples.play(40))]


# ------------------------------------------------------------------------------------------------- how it is written


def test_one_line_a_mapping_and_flags_are_one_description(tmp_path):
    assert described(LINE) == Scratch(**MAPPING)
    assert in_one_line(MAPPING) == in_one_line(LINE) == LINE
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump({"data": "d.txt", "model": MAPPING}))
    written = config.from_arguments(SFT, ["--config", str(file)], "sft")
    flags = config.from_arguments(
        SFT, ["--data", "d.txt", "--model", LINE.replace("layers=2,", " layers = 2 ,")], "sft"
    )
    assert written == flags == config.check(SFT(data="d.txt", model=MAPPING))
    assert written.model == LINE
    assert config.from_mapping(SFT, config.to_mapping(written), "again") == written


def test_what_is_left_out_has_a_default_and_other_names_are_left_alone():
    assert described("scratch:llama") == Scratch(scratch="llama")
    assert described("scratch:llama:width=64,") == Scratch(scratch="llama", width=64)
    assert in_one_line("scratch:llama").startswith("scratch:llama:layers=4,width=128,")
    for name in ("my-model", "hub/scratch", "./scratch:x"):
        assert described(name) is None
        assert in_one_line(name) == name


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("scratch:llama:widht=64", r"model: `scratch` has no setting `widht`; the nearest is `width`\."),
        ({"scratch": "gpt2", "layer": 3}, r"model: `scratch` has no setting `layer`; the nearest is `layers`\."),
        ("scratch:lama", r"model: `scratch` is 'lama', but must be 'llama' or 'gpt2'\."),
        ("scratch:llama:layers=none", r"model: `layers` is 'none', but must be a valid integer"),
        ("scratch:llama:layers=0", r"model: `layers` is '0', but must be greater than or equal to 1\."),
        ("scratch:llama:64", r"model: '64' in 'scratch:llama:64' is no name=value: write 'scratch:llama:layers=4"),
        ("scratch:llama:width=8,width=16", r"model: 'width=16' in .* is given twice"),
        ({"layers": 3}, r"model: {'layers': 3} names no architecture: write .*{scratch: llama, layers: 4"),
        ("scratch:gpt2:width=32,heads=3", r"model: `heads` \(3\) must divide `width` \(32\)\."),
        (
            "scratch:llama:width=12,heads=4",
            r"model: `heads` \(4\) must divide `width` \(12\), into parts of even width",
        ),
        ("scratch:gpt2:tokenizer=bpe,vocabulary=99", r"model: `vocabulary` is 99, but must be at least 257"),
        ("scratch:gpt2:tokenizer=words", r"model: `tokenizer` is 'words', but must be 'characters' or 'bpe'\."),
    ],
)
def test_a_wrong_description_is_one_sentence(model, sentence):
    with pytest.raises(PlauditError, match=sentence) as told:
        config.check(SFT(model=model, data="d.txt"))
    assert "\n" not in str(told.value)


# ----------------------------------------------------------------------------------------------------- the tokenizer


def made(tmp_path, line: str, records=PLAY, seed: int = 0):
    """(model, tokenizer) as plain transformers opens them."""
    tmp_path.mkdir(exist_ok=True)
    scratch.make(described(line), records, seed, tmp_path)
    folder = tmp_path / "initial"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_character_is_a_token_and_every_text_comes_back(tmp_path):
    text = "Où est-il ?\r\n\tÀ l’ouest, <là> .\n\n🎭"
    model, tokenizer = made(tmp_path, "scratch:llama:width=16,heads=2,context=32", [Demonstration("", text)])
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(set(text)) + 2 == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    assert tokenizer("q").input_ids == [tokenizer.unk_token_id] == [1]
    assert tokenizer("a<|end|>").input_ids[-1] == 0
    assert tokenizer.decode(tokenizer("so").input_ids, skip_special_tokens=True) == "so"


def test_a_small_vocabulary_keeps_the_commonest_characters(tmp_path):
    _, tokenizer = made(tmp_path, "scratch:llama:vocabulary=5", [Demonstration("aab", "bccdddd")])
    assert sorted(tokenizer.get_vocab()) == ["<|end|>", "<|unknown|>", "a", "b", "d"]  # of three twos, the first two
    assert tokenizer("abcd").input_ids == [2, 3, 1, 4]


def test_byte_pairs_are_learned_from_the_data_and_can_write_anything(tmp_path):
    _, tokenizer = made(tmp_path, LINE)
    assert len(tokenizer) == 300
    play = PLAY[0].completion
    assert len(tokenizer(play).input_ids) < len(play) / 2
    assert {token for token in tokenizer.get_vocab() if len(token) > 3} >= {"LEON", "Ġgood"}
    for text in (play, "Où? 🎭\r\n\t x  "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_conversations_give_their_words():
    turns = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    assert list(scratch.texts_of([Demonstration("x", "y"), Demonstration(turns[:1], turns[1:])])) == [
        "x",
        "y",
        "ab",
        "c",
    ]


# --------------------------------------------------------------------------------------------------------- the model


def test_the_model_has_the_shape_that_was_asked_for(tmp_path):
    line = "layers=3,width=24,heads=2,context=40"
    for kind, inner in (("llama", 64), ("gpt2", 96)):
        model, _ = made(tmp_path / kind, f"scratch:{kind}:{line}")
        shape = model.config
        assert shape.model_type == kind
        assert (shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads) == (3, 24, 2)
        assert shape.max_position_embeddings == 40
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        widths = {max(p.shape) for name, p in model.named_parameters() if "mlp" in name and p.dim() == 2}
        assert widths == {inner}


def test_the_same_seed_gives_the_same_bytes_and_leaves_other_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        made(folder, LINE, seed=seed)
    assert torch.equal(torch.rand(3), expected)
    files = [{path.name: path.read_bytes() for path in (folder / "initial").iterdir()} for folder in folders]
    assert files[0] == files[1]
    assert files[0]["model.safetensors"] != files[2]["model.safetensors"]
    assert files[0]["tokenizer.json"] == files[2]["tokenizer.json"]


def test_nothing_that_stands_there_is_replaced(tmp_path):
    made(tmp_path, LINE, seed=1)
    first = (tmp_path / "initial" / "model.safetensors").read_bytes()
    made(tmp_path, LINE, seed=1)  # the same again: a run that was broken off before its first step
    with pytest.raises(PlauditError, match="initial holds something else than what these settings and data make"):
        made(tmp_path, LINE, seed=2)
    (tmp_path / "checkpoints").mkdir()
    made(tmp_path, LINE, seed=2)  # a run that has begun keeps its model
    assert (tmp_path / "initial" / "model.safetensors").read_bytes() == first
    (tmp_path / "mine" / "initial").mkdir(parents=True)
    (tmp_path / "mine" / "initial" / "thesis.txt").write_text("three years of work")
    with pytest.raises(PlauditError, match="holds something else"):
        made(tmp_path / "mine", LINE, seed=1)
    assert [path.name for path in (tmp_path / "mine" / "initial").iterdir()] == ["thesis.txt"]
    shutil.rmtree(tmp_path / "mine")
    assert {path.name for path in tmp_path.iterdir()} == {"initial", "checkpoints"}
