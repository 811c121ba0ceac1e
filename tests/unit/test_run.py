"""The run folder: one owner, one configuration, logs that survive a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plaudit import run as module
from plaudit.config import read_yaml
from plaudit.errors import PlauditError
from plaudit.run import Run, read_lines, write_atomically

SETTINGS = {"model": "m", "steps": 10, "learning_rate": 1e-5, "data": ("a", "b"), "output": Path("x"), "verb": "dpo"}


@pytest.fixture
def run(tmp_path):
    with Run.open(tmp_path / "deep" / "run", SETTINGS) as run:
        yield run


# ------------------------------------------------------------------------------------------------ configuration


def test_a_new_run_writes_its_configuration_verb_first(run):
    text = (run.folder / "config.yaml").read_text("utf-8")
    assert text.splitlines()[:2] == ["verb: dpo", "model: m"]
    expected = {**SETTINGS, "data": ["a", "b"], "output": "x"}
    assert read_yaml(run.folder / "config.yaml") == expected
    assert (run.checkpoints, run.final) == (run.folder / "checkpoints", run.folder / "final")
    assert run.report == run.folder / "report.html"


def test_the_same_settings_resume(tmp_path):
    Run.open(tmp_path, SETTINGS).close()
    before = (tmp_path / "config.yaml").stat().st_mtime_ns
    with Run.open(str(tmp_path), SETTINGS | {"data": ["a", "b"]}) as run:
        run.finish({"a": 1})
    with Run.open(tmp_path, SETTINGS) as run:
        assert run.finished
    assert (tmp_path / "config.yaml").stat().st_mtime_ns == before


def test_other_settings_are_refused_and_listed(tmp_path):
    Run.open(tmp_path, SETTINGS).close()
    other = {**SETTINGS, "learning_rate": 2e-5, "steps": 20, "seed": 1}
    with pytest.raises(PlauditError) as caught:
        Run.open(tmp_path, other, free=("steps",))
    said = str(caught.value)
    assert said.splitlines()[0] == f"{tmp_path} holds a run with other settings:"
    assert "\n  learning_rate: 1e-05 -> 2e-05\n  seed: absent -> 1\n" in said
    assert "steps" not in said
    assert "another --output" in said
    assert read_yaml(tmp_path / "config.yaml")["steps"] == 10
    Run.open(tmp_path, SETTINGS).close()  # the refusal let go of the folder


def test_free_settings_may_change_and_leave_what_was_found(tmp_path):
    with Run.open(tmp_path, SETTINGS) as run:
        run.finish({"loss": 1.5})
    with Run.open(tmp_path, SETTINGS | {"steps": 20}, free=["steps"]) as run:
        assert run.summary == {"loss": 1.5}
    assert read_yaml(tmp_path / "config.yaml")["steps"] == 20


# ------------------------------------------------------------------------------------------------ one owner


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    code = f"""
import sys
from plaudit.run import Run
run = Run.open({str(tmp_path)!r}, {{"verb": "dpo"}})
print("held", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PlauditError, match=rf"^{tmp_path} is in use by another process"):
            Run.open(tmp_path, {"verb": "dpo"})
        holder.kill()
    Run.open(tmp_path, {"verb": "dpo"}).close()


def test_closing_twice_closes_no_stranger(tmp_path):
    run = Run.open(tmp_path, SETTINGS)
    run.close()
    stranger = os.open(tmp_path / "config.yaml", os.O_RDONLY)
    run.close()
    os.close(stranger)  # raises if `run` closed it


def test_a_refused_second_opening_leaves_no_file_open(tmp_path):
    with Run.open(tmp_path, SETTINGS):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(PlauditError, match="in use"):
            Run.open(tmp_path, SETTINGS)
        assert os.listdir("/proc/self/fd") == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(PlauditError, match=rf"^{folder} cannot be written \(.*choose another --output"):
            Run.open(folder, SETTINGS)


# ------------------------------------------------------------------------------------------------ logs


def test_metrics_are_json_lines(run):
    run.log(1, {"loss": 0.5, "tokens": 12})
    run.log(2, {"loss": float("nan"), "norm": float("inf")})
    lines = ['{"step": 1, "loss": 0.5, "tokens": 12}', '{"step": 2, "loss": null, "norm": null}']
    assert (run.folder / "metrics.jsonl").read_text("utf-8").splitlines() == lines
    assert run.metrics() == [json.loads(line) for line in lines]


def test_samples_are_one_line_each(run):
    assert read_lines(run.folder / "samples.jsonl") == []
    run.samples(3, [{"prompt": "é\n", "scores": [1.0, float("nan")]}, {"prompt": {"a": (float("-inf"),)}}])
    run.samples(4, [])
    assert read_lines(run.folder / "samples.jsonl") == [
        {"step": 3, "prompt": "é\n", "scores": [1.0, None]},
        {"step": 3, "prompt": {"a": [None]}},
    ]
    assert "é" in (run.folder / "samples.jsonl").read_text("utf-8")


def test_rewind_forgets_what_came_later(run):
    run.rewind(0)
    assert not (run.folder / "metrics.jsonl").exists()
    for step in (1, 2, 3):
        run.log(step, {"loss": step / 2})
        run.samples(step, [{"text": "x"}, {"text": "y"}])
    run.rewind(2)
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert [row["step"] for row in read_lines(run.folder / "samples.jsonl")] == [1, 1, 2, 2]
    run.log(3, {"loss": 7.0})
    assert run.metrics()[-1] == {"step": 3, "loss": 7.0}
    run.rewind(-1)
    assert run.metrics() == []


@pytest.mark.parametrize("cut", range(1, 26))
def test_a_line_cut_by_a_kill_is_forgotten_wherever_it_was_cut(tmp_path, cut):
    with Run.open(tmp_path, SETTINGS) as run:
        run.log(1, {"loss": 0.5})
        run.log(2, {"loss": 0.25})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    length = len(whole.splitlines(keepends=True)[1])
    assert length == 26
    path.write_bytes(whole[: len(whole) - length + cut])
    intact = cut == length - 1  # only the line feed is lost: the row can be read, and is kept
    assert len(read_lines(path)) == (2 if intact else 1)
    with Run.open(tmp_path, SETTINGS) as run:
        run.log(3, {"loss": 0.125})
        assert [row["step"] for row in run.metrics()] == ([1, 2, 3] if intact else [1, 3])


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "x"}', "\0\0"])
def test_a_broken_line_elsewhere_is_named(run, line):
    path = run.folder / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(PlauditError, match=rf"^{path}:2: "):
        run.metrics()


# ------------------------------------------------------------------------------------------------ the end


def test_finish_writes_a_summary(run):
    assert not run.finished
    with pytest.raises(PlauditError, match="not finished"):
        _ = run.summary
    run.finish({"accuracy": 0.75, "loss": float("nan")})
    assert run.finished
    assert run.summary == {"accuracy": 0.75, "loss": None}
    run.finish({"accuracy": 1})
    assert run.summary == {"accuracy": 1}


def test_write_atomically_flushes_file_then_renames_then_flushes_folder(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def seen(descriptor):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    monkeypatch.setattr(module.os, "fsync", seen)
    monkeypatch.setattr(Path, "replace", lambda old, new: (events.append(("rename", new.name)), replace(old, new)))
    write_atomically(tmp_path / "new" / "a.txt", "é")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "é".encode()
    temporary = f".a.txt.{os.getpid()}.tmp"
    assert events == [("fsync", temporary), ("rename", "a.txt"), ("fsync", "new")]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    write_atomically(tmp_path / "a", b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((module.os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]
