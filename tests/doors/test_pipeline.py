"""A file of stages: what it says, what it leaves behind, and that nothing is done twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from doorway import PROMPTS, times, weights

import tiny
from plaudit import PlauditError, pipeline, sources
from plaudit.cli import shipped
from plaudit.rewards import load_function
from plaudit.run import Run

SCORE = """
import os, pathlib, signal

calls = []


def score(prompts, completions, **columns):
    calls.append(len(completions))
    stop = pathlib.Path("stop")
    if len(calls) == 2 and stop.exists():
        stop.unlink()
        os.kill(os.getpid(), signal.SIGTERM)
    return [len(text.encode()) % 5 - 2.0 for text in completions]
"""


def write(path, stages, **more):
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({**more, "stages": stages}, sort_keys=False))
    return path


@pytest.fixture
def rated(here):
    """(training, held-out) snippets that three people rated."""
    rows = [
        {"prompt": p, "completion": f" {word}", "ratings": [mood, mood + 1, mood - (i % 2)]}
        for i, p in enumerate(PROMPTS)
        for word, mood in (("fine", 2), ("bad", -2), ("so so", 0))
    ]
    return tiny.lines(here / "train.jsonl", rows[:18]), tiny.lines(here / "heldout.jsonl", rows[18:])


@pytest.fixture
def short(here, models, prompts, demonstrations):
    """A file of two stages in a folder of its own, with its reward function beside it."""
    common = {"model": str(models / "plain"), "precision": "float32", "holdout": 0.0, "steps": 3}
    (here / "recipes").mkdir()
    (here / "recipes" / "score.py").write_text(SCORE)
    ppo = {"rewards": "score.py:score", "rollout": 4, "batch_size": 4, "reuse": 1, "max_new_tokens": 3}
    stages = {
        "sft": {**common, "data": demonstrations, "batch_size": 4},
        "ppo": {**common, "model": "{output}/sft/final", "data": prompts, **ppo},
    }
    return write(here / "recipes" / "short.yaml", stages, output="out")


# ----------------------------------------------------------------------------------------------------- running


def test_the_whole_loop_runs_once_and_reports_every_figure(plaudit, here, models, rated):
    data, held = rated
    (here / "recipes").mkdir()
    (here / "recipes" / "judge.py").write_text(SCORE)
    common = {"model": str(models / "plain"), "data": data, "precision": "float32", "steps": 2}
    stages = {
        "sft": {**common, "eval_data": held, "batch_size": 4},
        "reward": {**common, "eval_data": held, "batch_size": 9},
        "ppo": {
            **common, "model": "{output}/sft/final", "rewards": "{output}/reward/final", "rollout": 4,
            "batch_size": 4, "max_new_tokens": 4, "holdout": 0.0,
        },
        "evaluate": {
            "policies": ["sft={output}/sft/final", "ppo={output}/ppo/final"], "data": held, "judge": "judge.py:score",
            "rewards": "{output}/reward/final", "max_new_tokens": 4, "precision": "float32",
        },
    }  # fmt: skip
    file = write(here / "recipes" / "loop.yaml", stages)
    said = plaudit("run", file, "output=out")
    assert said.code == 0, said.err
    assert said.out.splitlines()[-1] == "out/report.html"
    assert Path("out/report.html").stat().st_size > 10_000
    told = [line for line in said.err.splitlines() if line[1] == "/"]
    assert told == ["1/4 sft", "2/4 reward", "3/4 ppo", "4/4 evaluate"]

    summary = json.loads(Path("out/summary.json").read_text())
    assert list(summary) == ["stages", "sft", "reward", "ppo", "evaluate"]
    for name in stages:
        cost = summary["stages"][name]
        assert set(cost) == {"seconds", "peak_memory_mb", "tokens_per_second"}
        assert all(isinstance(value, float) and value > 0 for value in cost.values())
        assert not {"seconds", "verb"} & set(summary[name])
    assert summary["sft"]["nll_after"] < summary["sft"]["nll_before"]
    assert set(summary["reward"]) >= {"accuracy", "accuracy_one_rater", "calibration_error"}
    assert 0 < summary["reward"]["accuracy_one_rater"] <= 1
    for name in ("sft", "ppo"):
        figures = {"reward", "judge", "positive_share", "kl", "distinct_2", "perplexity"}
        assert figures <= set(summary["evaluate"][name])
    assert summary["evaluate"]["sft"]["kl"] == 0.0  # the first policy is the reference
    assert summary["evaluate"]["prompts"] == 2  # of six held-out rows: a prompt is asked once
    low, rate, high = (summary["evaluate"][name] for name in ("win_rate_low", "win_rate", "win_rate_high"))
    assert 0 <= low <= rate <= high <= 1

    before = {name: times(f"out/{name}") for name in stages}
    text = Path("out/summary.json").read_text()
    said = plaudit("run", file, "output=out")
    assert (said.code, said.out) == (0, "out/report.html\n")
    assert said.err.count("already complete") == 3
    assert {name: times(f"out/{name}") for name in stages} == before
    assert Path("out/summary.json").read_text() == text


def test_an_interrupted_pipeline_goes_on_where_it_was(plaudit, here, short):
    assert plaudit("run", short, "output=straight").code == 0
    Path("stop").touch()
    said = plaudit("run", short)
    assert (said.code, said.out) == (143, ""), said.err
    assert "stopped at step 1, which is saved: the same command goes on from there." in said.err
    assert Path("out/sft/summary.json").exists()
    assert not Path("out/ppo/summary.json").exists()
    assert not Path("out/summary.json").exists()
    done = times("out/sft")
    said = plaudit("run", short)
    assert (said.code, said.out) == (0, "out/report.html\n")
    assert "ppo: goes on from step 1" in said.err
    assert times("out/sft") == done
    assert weights("out/ppo/final") == weights("straight/ppo/final")


def test_a_failing_stage_leaves_the_ones_before_it_done(plaudit, here, short):
    score = here / "recipes" / "score.py"
    score.write_text(SCORE.replace("return [", "return [0.0] + ["))
    said = plaudit("run", short)
    assert said.code == 2
    assert "score.py:score' returned 5 values for 4 completions." in said.err
    done = times("out/sft")
    score.write_text(SCORE)
    assert plaudit("run", short, "ppo.steps=1").code == 0
    assert times("out/sft") == done


def test_one_output_folder_takes_one_pipeline_at_a_time_and_no_other_run(plaudit, short):
    with Run.open("out", {"verb": "run"}):
        said = plaudit("run", short)
    assert said.code == 2
    assert said.err == "plaudit run: out is in use by another process; wait for it or choose another --output.\n"
    Run.open("other", {"verb": "sft"}).close()
    said = plaudit("run", short, "output=other")
    assert said.code == 2
    assert "other holds a run with other settings:\n  verb: 'sft' -> 'run'" in said.err
    assert not Path("out/sft").exists()
    assert not Path("other/sft").exists()


def test_a_sample_stage_and_a_pull_stage_are_not_done_twice_either(plaudit, here, models, prompts, monkeypatch):
    cache = here / "cache"
    cache.mkdir()
    shutil.copy(prompts, cache / "train.jsonl")
    (cache / "README.txt").write_text("theirs")
    monkeypatch.setattr(sources, "pull", lambda name, progress: models / "plain" if name == "a-model" else cache)
    sample = {"model": str(models / "plain"), "data": "{output}/data/train.jsonl", "max_new_tokens": 2, "limit": 3}
    stages = {
        "pull": {"names": ["a-model", "some-data"], "output": "{output}/data"},
        "drawn": {"verb": "sample", **sample, "output": "{output}/drawn.jsonl"},
    }
    file = write(here / "recipes" / "draw.yaml", stages)
    assert plaudit("run", file, "output=out").code == 0
    assert sorted(path.name for path in Path("out/data").iterdir()) == ["README.txt", "train.jsonl"]
    assert len(Path("out/drawn.jsonl").read_text().splitlines()) == 3
    Path("out/data/README.txt").write_text("mine")  # what a person changed is theirs
    before = times("out/data") | times("out/drawn.jsonl")
    assert plaudit("run", file, "output=out").code == 0
    assert times("out/data") | times("out/drawn.jsonl") == before
    assert Path("out/data/README.txt").read_text() == "mine"


# ----------------------------------------------------------------------------------------------------- reading


def test_overrides_are_yaml_and_win_over_the_file(short):
    words = ["output=elsewhere", "sft.steps=7", "sft.learning_rate=1e-3", "ppo.stop=[a, b]", "ppo.output='{output}/rl'"]
    output, stages = pipeline.read(short, words)
    assert output == Path("elsewhere")
    assert (stages["sft"].steps, stages["sft"].learning_rate, stages["sft"].output) == (7, 1e-3, "elsewhere/sft")
    assert (stages["ppo"].stop, stages["ppo"].output) == (("a", "b"), "elsewhere/rl")
    assert stages["ppo"].model == "elsewhere/sft/final"
    assert pipeline.read(short)[1]["sft"].steps == 3


def test_a_stage_may_have_a_name_of_its_own_and_the_output_that_of_the_file(here):
    stages = {
        "first": {"verb": "sft", "model": "m", "data": "d"},
        "sft": {"model": "{output}/first/final", "data": "d"},
    }
    output, built = pipeline.read(write(here / "recipes" / "twice.yaml", stages))
    assert output == Path("runs/twice")
    assert [(name, type(stage).__name__, stage.output) for name, stage in built.items()] == [
        ("first", "SFT", "runs/twice/first"),
        ("sft", "SFT", "runs/twice/sft"),
    ]
    assert built["sft"].model == "runs/twice/first/final"


def test_unknown_fields_in_overrides_are_named_with_the_nearest(short):
    with pytest.raises(PlauditError, match="stage 'sft': `sft` has no setting `step`; the nearest is `steps`"):
        pipeline.read(short, ["sft.step=3"])
    with pytest.raises(PlauditError, match="there is no stage 'pop'; the nearest is 'ppo', of sft, ppo"):
        pipeline.read(short, ["pop.step=3"])
    with pytest.raises(PlauditError, match="`steps` is 'many', but must be a valid integer"):
        pipeline.read(short, ["sft.steps=many"])


def test_a_function_s_file_is_looked_for_here_and_then_beside_the_pipeline(here, short):
    assert pipeline.read(short)[1]["ppo"].rewards == f"{here}/recipes/score.py:score"
    several = pipeline.read(short, ["ppo.rewards=[score.py:score, 'count:a', recipes/score.py:score, gone.py:score]"])
    assert several[1]["ppo"].rewards == (
        f"{here}/recipes/score.py:score", "count:a", "recipes/score.py:score", "gone.py:score",
    )  # fmt: skip
    (here / "score.py").touch()
    assert pipeline.read(short)[1]["ppo"].rewards == "score.py:score"


def test_the_shipped_quickstart_is_sound_wherever_it_is_started_from():
    output, stages = pipeline.read(shipped("quickstart.yaml"))
    assert output == Path("runs/quickstart")
    assert list(stages) == ["pull", "sft", "reward", "ppo", "evaluate"]
    assert stages["ppo"].model == "runs/quickstart/sft/final"
    assert stages["evaluate"].prompts >= 200
    judge = load_function(stages["evaluate"].judge)
    assert judge.__name__ == "vader"
    pipeline._look_ahead(stages, output)
