"""What is told before anything heavy loads: one sentence each, and no heavy import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from plaudit.checks import (
    check_data,
    check_model,
    check_processes,
    check_rewards,
    check_rollout,
    names_of,
    read_config,
)
from plaudit.errors import PlauditError


def folder(path: Path, config: object = None, *files: str) -> str:
    path.mkdir(exist_ok=True)
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (path / "config.json").write_text(text)
    for file in files:
        (path / file).write_text("{}")
    return str(path)


def told(call, *arguments) -> str:
    with pytest.raises(PlauditError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.rstrip().endswith((".", ")", "()."))
    return message


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "~/nowhere", "runs/sft/final"])
def test_a_missing_model_folder(name):
    assert told(check_model, name) == f"model: there is no folder {name!r}."


def test_a_folder_without_config_says_what_it_has(tmp_path):
    name = folder(tmp_path / "m", None, "weights.bin", "notes.txt")
    assert "has no config.json" in told(check_model, name)
    assert "notes.txt, weights.bin" in told(check_model, name)


def test_a_file_is_no_model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("x")
    assert "has no config.json" in told(check_model, str(path))


@pytest.mark.parametrize("text", ["{not json", "[1, 2]", "\x00"])
def test_a_broken_config(tmp_path, text):
    name = folder(tmp_path / "m", text, "tokenizer.json")
    assert "config.json: " in told(check_model, name)


def test_a_folder_without_tokenizer(tmp_path):
    name = folder(tmp_path / "m", {"model_type": "llama"}, "model.safetensors")
    message = told(check_model, name)
    assert "has no tokenizer" in message
    assert "tokenizer.save_pretrained()" in message


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt"])
def test_any_kind_of_tokenizer_will_do(tmp_path, file):
    check_model(folder(tmp_path / "m", {"model_type": "llama"}, file))


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "_attn_implementation", "trust_remote_code"])
def test_a_config_that_asks_for_foreign_code_is_refused(tmp_path, key):
    name = folder(tmp_path / "m", {"model_type": "llama", key: "someone/kernel"}, "tokenizer.json")
    for check in (read_config, check_model):
        assert repr(key) in told(check, name)


def test_the_same_key_deeper_down_is_refused_too(tmp_path):
    config = {"model_type": "gemma3", "text_config": {"layers": [{"_attn_implementation_internal": "x/y"}]}}
    assert "_attn_implementation_internal" in told(check_model, folder(tmp_path / "m", config, "tokenizer.json"))


def test_hub_names_pass():
    for name in ("gpt2", "meta-llama/Llama-3.1-8B"):
        assert read_config(name) == {}
        check_model(name)


def test_the_config_is_returned(tmp_path):
    assert read_config(folder(tmp_path / "m", {"model_type": "llama"})) == {"model_type": "llama"}


def test_names_of_data():
    assert names_of(None) == []
    assert names_of("a.jsonl") == ["a.jsonl"]
    assert names_of("a.jsonl, b.parquet,,") == ["a.jsonl", "b.parquet"]
    assert names_of(("a.jsonl,b.csv", "org/set")) == ["a.jsonl", "b.csv", "org/set"]


@pytest.mark.parametrize("name", ["no.jsonl", "no.jsonl.gz", "no.json", "no.csv", "no.parquet", "./no", "/no", "a/b/c"])
def test_a_missing_data_file(name):
    assert told(check_data, ["org/set", name]) == f"data: there is no file {name!r}."


def test_an_empty_data_file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.touch()
    assert told(check_data, str(path)) == f"data: {str(path)!r} is empty."


def test_data_that_is_there_and_hub_data_pass(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("{}\n")
    check_data(None)
    check_data([str(path), str(tmp_path), "imdb", "Anthropic/hh-rlhf"])
    check_data("allenai/tulu-2.5-preference-data, Magpie-Align/Magpie-Pro-DPO-100K-v0.1")


def test_rewards_that_are_there(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("raise SystemExit\nfrom math import sqrt\nasync def one(): pass\ndef two(): pass\nthree = two\n")
    check_rewards([f"{path}:{name}" for name in ("one", "two", "three", "sqrt")])
    check_rewards(
        ["math:sqrt", "json.decoder:x", "count:good", "count::", "org/reward-model", "label:POSITIVE@org/model"]
    )
    path.write_text("from os.path import *\n")
    check_rewards([f"{path}:join"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("count:", "name what is to be counted"),
        ("label:POSITIVE", "name a label and a model"),
        ("label:@org/model", "name a label and a model"),
        ("label:POSITIVE@./nowhere", "there is no folder './nowhere'"),
        ("./nowhere", "there is no folder './nowhere'"),
        ("mine.py", "name the function too, as in 'mine.py:reward'"),
        ("no/mine.py:reward", "there is no file 'no/mine.py'"),
        ("no_such_module_here:reward", "there is no module 'no_such_module_here'"),
        ("no_such.module.here:reward", "there is no module 'no_such.module.here'"),
        ("math.sqrt:reward", "there is no module 'math.sqrt'"),
    ],
)
def test_rewards_that_are_not(spec, message):
    assert message in told(check_rewards, [spec])


def test_functions_that_are_not(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import os\ndef other(): return reward\n")
    assert "has no function 'reward' (it has: other)" in told(check_rewards, [f"{path}:reward"])
    path.write_text("def reward(:\n")
    assert f"{path}:1: not valid Python" in told(check_rewards, [f"{path}:reward"])


def test_a_rollout_is_whole_batches_of_whole_groups():
    check_rollout(64, 16, 4)
    assert "batch_size (16) must divide rollout (24)" in told(check_rollout, 24, 16, 4)
    assert "group (3) must divide batch_size (16)" in told(check_rollout, 32, 16, 3)
    assert "batch_size (16) must be rollout (32): nothing here corrects" in told(check_rollout, 32, 16, 4, True)


def test_every_process_has_a_row():
    check_processes(2, 2)
    assert "batch_size (1) leaves some of 2 processes without a row" in told(check_processes, 1, 2)


def test_nothing_heavy_is_loaded_to_find_out(tmp_path):
    names = [
        folder(tmp_path / "none"),
        folder(tmp_path / "untold", {"model_type": "llama"}),
        folder(tmp_path / "hostile", {"_attn_implementation_internal": "x/y"}, "tokenizer.json"),
        str(tmp_path / "missing"),
    ]
    code = (
        "import sys\n"
        "from plaudit.checks import check_data, check_model\n"
        "from plaudit.errors import PlauditError\n"
        "for check, names in ((check_model, sys.argv[1:]), (check_data, ['./no.jsonl'])):\n"
        "    for name in names:\n"
        "        try: check(name)\n"
        "        except PlauditError as error: print(str(error))\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
