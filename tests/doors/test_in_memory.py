"""Rows and reward functions that a Python program holds in memory."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from doorway import PROMPTS, SHARED, weights

import tiny
import watched
from plaudit import (
    GRPO,
    ILQL,
    PPO,
    SFT,
    Evaluate,
    PlauditError,
    Reward,
    checks,
    config,
    evaluate,
    memory,
    recipes,
    train,
)
from plaudit.trainer import Interrupted

ROWS = [{"prompt": prompt, "id": number} for number, prompt in enumerate(PROMPTS)]
QUICKLY = {**SHARED, "rollout": 8, "batch_size": 8, "group": 2, "steps": 2, "max_new_tokens": 6}
IN_A_FILE = """
def reward(prompts, completions, id, **columns):
    return [None if i == 7 else len(text) % 3 + i / 8 for text, i in zip(completions, id)]


def zero(prompts, **columns):
    return [0.0] * len(prompts)
"""


@pytest.fixture
def module(here, monkeypatch):
    """The functions of a module that can be imported."""
    (here / "my_rewards.py").write_text(IN_A_FILE)
    monkeypatch.syspath_prepend(str(here))
    import my_rewards

    yield my_rewards
    del sys.modules["my_rewards"]


def kept(folder: str | Path) -> dict:
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())


@pytest.mark.parametrize("given", [list, tuple, Dataset.from_list, iter])
def test_s2_05_rows_in_memory_become_a_file_that_holds_them(given, here):
    settings = recipes.in_files(SFT(model="m", data=given(ROWS), eval_data="other.jsonl", output="run"))
    assert Path(settings.data).parent == Path("run/given")
    assert [json.loads(line) for line in Path(settings.data).read_text().splitlines()] == ROWS
    assert settings.eval_data == "other.jsonl"
    assert recipes.in_files(settings) is settings
    other = recipes.in_files(SFT(model="m", data=ROWS[1:], eval_data=ROWS, output="run"))
    assert other.data != settings.data
    assert Path(other.eval_data).read_bytes() == Path(settings.data).read_bytes()


def test_s2_05_a_run_from_memory_is_the_run_from_files_bit_by_bit(models, module, prompts, here):
    settings = GRPO(model=str(models / "plain"), data=prompts, rewards=("my_rewards.py:reward", "my_rewards.py:zero"),
                    reward_weights=(0.5, 2.0), output="files", **QUICKLY)  # fmt: skip
    by_files = train(settings)
    in_memory = replace(settings, data=ROWS, rewards=[module.reward, module.zero], output="memory")
    from_memory = train(in_memory)
    assert weights(from_memory.final) == weights(by_files.final)
    assert weights(from_memory.final) != weights(models / "plain")
    assert kept("memory")["rewards"] == ["my_rewards:reward", "my_rewards:zero"]
    assert from_memory.metrics()[0]["reward/my_rewards:zero"] == 0
    assert kept("memory")["data"] == str(*Path("memory").glob("given/data-*.jsonl"))
    # The folder may be called otherwise, and lie elsewhere.
    assert train(replace(in_memory, output=str(here / "memory"))).summary == from_memory.summary
    # The same again is that run, and what the run folder says is enough to have it again.
    assert train(in_memory).summary == from_memory.summary
    named = config.from_mapping(GRPO, {**kept("memory"), "output": "again"}, "memory/config.yaml")
    assert weights(train(named).final) == weights(by_files.final)


def test_s4_10_a_broken_off_run_goes_on_with_the_same_rows_and_functions_only(models, plaudit):
    def vowels(completions, **columns):
        return [sum(map(text.count, "aeiou")) for text in completions]

    def other(completions, **columns):
        return [0.0 for _ in completions]

    settings = PPO(model=str(models / "plain"), data=ROWS, rewards=vowels, output="run", **{**QUICKLY, "steps": 3})
    whole = train(replace(settings, output="whole"))
    with pytest.raises(Interrupted):
        watched.train(settings, signal_after=1)
    with pytest.raises(PlauditError, match=r"(?s)other settings:\n  rewards: '.*>.vowels' -> '.*>.other'"):
        train(replace(settings, rewards=other))
    with pytest.raises(PlauditError, match=r"(?s)other settings:\n  data: 'given.data-.*jsonl' -> 'given.data"):
        train(replace(settings, data=ROWS[:-1]))
    said = plaudit("ppo", "--config", "run/config.yaml")
    assert said.code == 2
    assert "vowels' is a function within the Python program that gave it: go on from there, or put it" in said.err
    assert weights(train(settings).final) == weights(whole.final)


def test_s2_05_functions_are_called_by_module_and_qualified_name():
    class Likes:
        def __call__(self, prompts, **columns):
            return [1.0] * len(prompts)

        def method(self, **columns): ...

    place = f"{__name__}:{test_s2_05_functions_are_called_by_module_and_qualified_name.__qualname__}.<locals>.Likes"
    assert config.name_of(Likes()) == place
    assert config.name_of(Likes().method) == f"{place}.method"
    assert config.name_of(json.dumps) == "json:dumps"
    checks.check_rewards(["json:dumps", Likes()])
    with pytest.raises(PlauditError, match="reward '__main__:liked' is a function within the Python program"):
        checks.check_rewards(["__main__:liked"])


def test_s2_05_two_functions_of_one_name_need_two(models):
    likes = [lambda prompts, **columns: [0.0] * len(prompts) for _ in range(2)]
    with pytest.raises(PlauditError, match="<lambda>' is named twice: name it once, with a weight, and give"):
        train(GRPO(model=str(models / "plain"), data=ROWS, rewards=likes, **QUICKLY))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": Dataset.from_list(ROWS)}, r"^data: row 0 is str: give dicts in a list, one split of a data set, or"),
        ([*ROWS, "file.jsonl"], r"^data: row 8 is str: give dicts"),
        ([{"prompt": b"bytes"}], r"^data: row 0 cannot be kept as JSON \(Object of type bytes is not"),
        ([{"prompt": "\ud800"}], r"^data: row 0 cannot be kept as JSON \(.*surrogates"),
        (Dataset.from_list([]), r"^data: there are no rows in what was given\.$"),
        (7, r"sft: `data` is 7, but must be a valid string"),
    ],
)
def test_s2_05_rows_that_are_none(rows, message, here):
    with pytest.raises(PlauditError, match=message):
        train(SFT(model="m", data=rows, output="run"))
    assert not Path("run").exists()


def test_s2_05_of_several_processes_the_first_writes_and_says_where(here, monkeypatch):
    settings = SFT(model="m", data=ROWS, output="run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    heard = []

    class Second:
        def share(self, paths):
            heard.append(paths)
            return {"data": "run/what-the-first-wrote.jsonl"}

    monkeypatch.setattr(recipes, "start_world", lambda settings: Second())
    monkeypatch.setenv("RANK", "1")
    assert recipes.in_files(settings).data == "run/what-the-first-wrote.jsonl"
    assert not Path("run").exists()
    monkeypatch.setenv("RANK", "0")
    recipes.in_files(settings)
    assert heard[1] == heard[0]
    assert Path(heard[0]["data"]).exists()


def test_s2_05_rows_where_nothing_can_be_written(here):
    Path("taken").write_text("")
    with pytest.raises(PlauditError, match=r"^taken cannot be written \(.*\); choose another output"):
        train(SFT(model="m", data=ROWS, output="taken"))
    content = memory.rows_of(SFT(model="m", data=ROWS))["data"]
    path = memory.path_of("run", "data", content)
    memory.write(path, content)
    Path(path).write_bytes(b"touched")
    memory.write(path, content)
    assert Path(path).read_bytes() == b"touched"


def test_s4_12_policies_are_compared_on_rows_and_by_functions_too(models, here):
    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    policies = (f"one={models / 'plain'}", f"two={models / 'chat'}")
    run = evaluate(Evaluate(policies=policies, data=ROWS, rewards=length, judge=length, max_new_tokens=4))
    assert run.summary["two"]["judge"] == run.summary["two"]["reward"]
    assert kept(run.folder)["judge"] == config.name_of(length)


def test_s4_12_the_best_of_several_by_a_function(models, plaudit, prompts):
    from plaudit import Sample, sample

    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    path = sample(Sample(model=str(models / "plain"), data=prompts, n=3, best_of=(length,), max_new_tokens=4))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["score"] for row in rows] == [len(row["completion"]) for row in rows]


def test_s4_19_offline_from_samples_and_what_they_earned(models, here):
    samples, earned = [f"say {i} " + "a" * (i % 4) for i in range(8)], [float(i % 4) for i in range(8)]
    rows = [{"text": text, "rating": rating} for text, rating in zip(samples, earned, strict=True)]
    settings = ILQL(model=str(models / "plain"), data=rows, output="memory", batch_size=4, steps=2, **SHARED)
    from_memory = train(settings)
    from_file = train(replace(settings, data=tiny.lines(here / "rated.jsonl", rows), output="file"))
    assert weights(from_memory.final) == weights(from_file.final)
    assert "ilql_heads.safetensors" in weights(from_file.final)


def test_s2_02_an_ensemble_of_rows_in_memory(models, here):
    rows = [{"prompt": p, "chosen": " yes", "rejected": " no"} for p in PROMPTS]
    whole = Reward(model=str(models / "plain"), data=rows, output="whole", members=2, batch_size=8, steps=1, **SHARED)
    run = train(whole)
    assert run.summary["members"] == 2
    assert kept("whole/member-1")["data"] == kept("whole")["data"] == str(*Path("whole").glob("given/data-*.jsonl"))
