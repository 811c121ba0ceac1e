"""`rm_train`, as the README of EasyRLHF writes it."""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import pytest
from doorway import PROMPTS

import tiny
from plaudit import config, hooks, rm_train
from plaudit.settings import Reward

README = [
    "--devices",
    "0,1,2,3",
    "--output_dir",
    "outputs/my-model",
    "--train_data",
    "data/helpful-base/train.jsonl,data/helpful-online/train.jsonl",
    "--valid_data",
    "data/helpful-base/test.jsonl,data/helpful-online/test.jsonl",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def settings_of(words: list[str]) -> Reward:
    arguments, *_ = rm_train.translated(words)
    assert arguments[0] == "reward"
    return config.from_arguments(Reward, arguments[1:], "plaudit reward")


def test_s3_06_both_spellings_are_one_command():
    written = settings_of(README)
    parsed = settings_of([word.replace("_data", "_file") for word in README])
    dashed = settings_of([word.replace("--train_data", "--train-data") for word in README])
    assert written == parsed == dashed
    assert written.data == README[5]
    assert written.eval_data == README[7]
    assert (written.output, written.model, written.track_project) == ("outputs/my-model", "gpt2-xl", "easy-rlhf")
    given = ["--train_file=a.jsonl", "--project_name=mine", "--model", "m", "--learning_rate", "1e-3", "--max-tokens=9"]
    more = settings_of(given)
    assert (more.data, more.track_project, more.model) == ("a.jsonl", "mine", "m")
    assert (more.learning_rate, more.max_tokens, more.output) == (1e-3, 9, "outputs/my-reward-model")
    assert settings_of([]).data.count("helpful-") == 3


def test_s3_06_several_devices_are_launched_without_a_shell(monkeypatch):
    ran = []
    monkeypatch.setattr(os, "execv", lambda *command: ran.append(command))
    hostile = "x; touch pwned $(id)"
    rm_train.main([*README, "--master_port", "50001", "--output_dir", hostile])
    ((program, words),) = ran
    assert program == sys.executable
    launched = words.index("plaudit.cli")
    assert words[1 : launched + 2] == [
        "-m", "accelerate.commands.launch", "--num_processes", "4", "--main_process_port", "50001",
        "-m", "plaudit.cli", "reward",
    ]  # fmt: skip
    assert words[words.index(hostile) - 1] == "--output"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_s3_05_s3_06_it_trains_on_zipped_files_as_they_are(here, models):
    asked = [(p, f"\n\nHuman: {p}\n\nAssistant:") for p in PROMPTS]
    rows = [{"chosen": f"{prompt} {p}!", "rejected": f"{prompt} no"} for p, prompt in asked]
    plain = Path(tiny.lines(here / "b.jsonl", rows[4:]))
    (here / "a.jsonl.gz").write_bytes(gzip.compress(Path(tiny.lines(here / "a.jsonl", rows[:4])).read_bytes()))
    words = ["--train_data", "a.jsonl.gz,b.jsonl", "--valid_data", plain.name, "--output_dir", "out", "--devices", "0"]
    more = ["--model", str(models / "plain"), "--batch_size", "4", "--save-every", "0"]
    assert rm_train.main([*words, *more]) == 0
    kept = config.read_yaml("out/config.yaml")
    assert (kept["track_project"], kept["verb"]) == ("easy-rlhf", "reward")
    assert (here / "out" / "final" / "config.json").exists()


def test_s3_06_a_settings_file_is_not_overruled_by_defaults(here):
    (here / "r.yaml").write_text("model: m\ndata: d.jsonl\noutput: o\n")
    found = settings_of(["--config", "r.yaml", "--project_name", "p"])
    assert (found.model, found.data, found.output, found.track_project) == ("m", "d.jsonl", "o", "p")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--devices", "0;id"], "rm_train: --devices is '0;id': give numbers with commas between, as in 0,1,2,3.\n"),
        (["--devices"], "rm_train: --devices is '': give numbers with commas between, as in 0,1,2,3.\n"),
        (["--master_port", "here"], "rm_train: --master_port is 'here': give a number.\n"),
        (["--train_fil", "a"], "plaudit reward: there is no flag --train_fil; the nearest is --train-fraction.\n"),
        (["--model", "m"], "plaudit reward: data: there is no file 'data/helpful-base/train.jsonl'.\n"),
    ],
)
def test_mistakes_are_one_sentence(here, capsys, words, sentence):
    assert rm_train.main(words) == 2
    assert capsys.readouterr().err == sentence


def test_help_is_short(capsys):
    assert rm_train.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: rm_train [--devices 0,1]")


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_s3_07_the_tracker_hears_of_the_project(kind, here, monkeypatch):
    heard = []

    class Library:
        @staticmethod
        def init(**about):
            heard.append(about)

    monkeypatch.setitem(sys.modules, kind, Library)
    hooks.Tracker(kind, here / "my-run", "mine").close()
    assert (heard[0]["project"], heard[0]["name"]) == ("mine", "my-run")
