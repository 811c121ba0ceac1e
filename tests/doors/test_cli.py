"""The command line: help, versions, exit codes, what goes to which stream, progress."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from doorway import QUICK

from plaudit import __version__, sources
from plaudit.cli import shipped
from plaudit.settings import FAMILIES, VERBS

NAMES = {verb: {field.name.replace("_", "-") for field in fields(cls)} for verb, cls in VERBS.items()}


def test_help_lists_every_verb_under_its_own_family(plaudit):
    _, *blocks = plaudit("--help").out.split("\n\n")
    listed = {}
    for block in blocks:
        title, *lines = block.splitlines()
        listed[title] = [line.split()[0] for line in lines]
    for family, verbs in FAMILIES.items():
        assert listed[f"{family}:"] == list(verbs)
    assert listed["Whole runs:"] == ["loop", "run", "quickstart", "explain", "report"]
    found = [verb for verbs in listed.values() for verb in verbs]
    assert len(found) == len(set(found)) == len(VERBS) + 5


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_help_names_every_verb(plaudit, words):
    said = plaudit(*words)
    assert (said.code, said.err) == (0, "")
    assert all(f"\n  {verb} " in said.out for verb in [*VERBS, "explain", "loop", "run", "quickstart", "report"])


def test_the_version_is_the_project_s(plaudit):
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert plaudit("--version").out == f"plaudit {__version__}\n"
    assert f'version = "{__version__}"' in project


def test_help_of_each_verb_shows_its_own_fields_and_loads_nothing_heavy():
    code = (
        "import contextlib, io, json, sys\nfrom plaudit.cli import main\nfound = {}\n"
        f"for verb in {list(VERBS)!r}:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n"
        "        found[verb] = [main([verb, '--help']), '']\n"
        "    found[verb] = out.getvalue()\n"
        "print(json.dumps([found, sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, heavy = json.loads(done.stdout)
    assert heavy == []
    for verb, help_text in found.items():
        shown = set(re.findall(r"--([a-z][a-z0-9-]*)", help_text))
        assert f"usage: plaudit {verb}" in help_text
        assert NAMES[verb] <= shown, verb
        strangers = set.union(*NAMES.values()) - NAMES[verb]
        assert not {name for name in strangers if re.search(rf"│ --{name}[ ,]", help_text)}, verb


def test_help_of_a_verb_exits_with_0(plaudit):
    said = plaudit("reward", "--help")
    assert said.code == 0
    assert "--centering" in said.out
    assert "--kl" not in said.out


@pytest.mark.parametrize("verb", ["run", "quickstart", "report", "explain"])
def test_help_of_verbs_without_settings_is_their_usage(plaudit, verb):
    said = plaudit(verb, "--help")
    assert said.code == 0
    assert said.out.startswith(f"usage: plaudit {verb}")


def test_help_may_be_cut_short_by_its_reader():
    command = f"{sys.executable} -m plaudit.cli ppo --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: plaudit ppo")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sfft"], "plaudit sfft: there is no verb 'sfft'; did you mean 'sft'?\n"),
        (["quikstart"], "plaudit quikstart: there is no verb 'quikstart'; did you mean 'quickstart'?\n"),
        (["--versoin"], "plaudit --versoin: there is no verb '--versoin'; did you mean '--version'?\n"),
        (
            ["xyzzy"],
            "plaudit xyzzy: there is no verb 'xyzzy'; `plaudit --help` lists them all.\n",
        ),
        (["explain"], "plaudit explain: give the verb that is to be explained: plaudit explain VERB\n"),
        (["explain", "samle"], "plaudit explain: there is no verb 'samle' to explain; did you mean 'sample'?\n"),
        (["run"], "plaudit run: give a file: plaudit run FILE\n"),
        (["report", "a", "b"], "plaudit report: give one run folder: plaudit report FOLDER\n"),
        (["sft"], "plaudit sft: --model is required; give the flag, or `model` in a --config file.\n"),
        (
            ["explain", "sft"],
            "plaudit explain sft: --model is required; give the flag, or `model` in a --config file.\n",
        ),
        (
            ["pull", "movies"],
            "plaudit pull: there is no source 'movies'; there are smollm2-135m-instruct, movie-reviews.\n",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(plaudit, words, sentence):
    assert plaudit(*words) == (2, "", sentence)


def test_signals_have_their_exit_codes_and_bugs_their_tracebacks(plaudit, monkeypatch):
    from plaudit import recipes
    from plaudit.trainer import Interrupted

    words = ("sft", "--model", "m", "--data", "d.jsonl")

    def train(settings):
        raise problem

    monkeypatch.setattr(recipes, "train", train)
    problem = Interrupted(15, 7)
    assert plaudit(*words) == (143, "", f"plaudit sft: {problem}\n")
    assert "step 7" in str(problem)
    problem = KeyboardInterrupt()
    assert plaudit(*words).code == 130
    problem = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        plaudit(*words)


def test_pull_prints_where_things_are(plaudit, here, monkeypatch):
    made = here / "cache" / "movie-reviews"
    made.mkdir(parents=True)
    asked = []
    monkeypatch.setattr(sources, "pull", lambda name, progress: asked.append(name) or progress("building") or made)
    assert plaudit("pull", "movie-reviews") == (0, f"{made}\n", "building\n")
    assert plaudit("pull", "--names", "movie-reviews", "movie-reviews").out == f"{made}\n{made}\n"
    assert asked == ["movie-reviews"] * 3


def test_shipped_recipes_are_found_in_a_checkout_and_when_installed(tmp_path, monkeypatch):
    assert shipped("quickstart.yaml") == Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    installed = tmp_path / "site-packages" / "plaudit"
    (installed / "shipped").mkdir(parents=True)
    (installed / "shipped" / "quickstart.yaml").touch()
    monkeypatch.setattr("plaudit.cli.__file__", str(installed / "cli.py"))
    assert shipped("quickstart.yaml") == installed / "shipped" / "quickstart.yaml"


# ----------------------------------------------------------------------------------------------------- progress


def test_without_a_terminal_progress_is_plain_lines_beside_the_result(plaudit, models, demonstrations):
    said = plaudit(
        "sft", "--model", models / "plain", "--data", demonstrations, "--steps", 20, "--batch-size", 2, *QUICK
    )
    assert (said.code, said.out) == (0, "runs/sft\n")
    lines = said.err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/20" for step in range(2, 21, 2)]
    assert all(re.fullmatch(r"sft \d+/20  [\d,]+ tokens/s  \d+ s left  loss \S+", line) for line in lines)
    assert lines[-1].split()[4:7] == ["0", "s", "left"]
    again = plaudit("sft", "--config", "runs/sft/config.yaml")
    assert again == (0, "runs/sft\n", "runs/sft: already complete.\n")


@pytest.mark.slow
def test_in_a_terminal_progress_is_a_bar_with_rate_and_time_left(here, models, demonstrations):
    command = [
        sys.executable, "-m", "plaudit.cli", "sft", "--model", models / "plain", "--data", demonstrations,
        "--steps", "30", "--batch-size", "8", "--threads", "1", *QUICK,
    ]  # fmt: skip
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "140"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(map(str, command), stdout=subprocess.PIPE, stderr=theirs, env=environment, cwd=here)
    os.close(theirs)
    shown = b""
    while part := read(ours):
        shown += part
    assert process.communicate()[0] == b"runs/sft\n"
    assert process.returncode == 0, shown
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    frames = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert re.fullmatch(r"sft ━+ 30/30 steps [\d,]+ tokens/s 0:00:00 loss \S+", frames[-1]), frames[-1]
    assert len(frames) > 1  # the bar moved


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that nobody writes to it any more
        return b""
