"""`plaudit label`: what is asked, and what the terminal is told."""

import json
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import tiny
from plaudit import PlauditError, config, labelling
from plaudit.feedback import serving
from plaudit.feedback.store import Store
from plaudit.settings.feedback import Label

RUN = (
    "import sys; from plaudit import config, labelling; from plaudit.settings.feedback import Label;"
    "labelling.label(config.from_arguments(Label, sys.argv[1:], 'plaudit label'));"
    "assert 'torch' not in sys.modules"
)


def started(folder, *words):
    """The verb in a process of its own, once its links are told."""
    process = subprocess.Popen([sys.executable, "-u", "-c", RUN, *words], stdout=subprocess.PIPE, text=True, cwd=folder)
    said = ""
    while "Ctrl+C" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    return process, said


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def served(monkeypatch):
    """The door without the server: what it would be told."""
    told = []
    monkeypatch.setattr(serving, "serve", lambda options, ready: told.append(options) or 0)
    return told


def test_from_the_terminal_to_an_answer_and_on_again(tmp_path):
    written(
        tmp_path / "c.jsonl", {"prompt": "p", "completions": ["a", "b"]}, {"prompt": "q", "completions": ["c", "d"]}
    )
    words = ["--data", "c.jsonl", "--people", "Ann", "Bob", "--title", "Tea", "--ratings", "0", "1"]
    process, said = started(tmp_path, *words)
    assert said.startswith("2 questions in labels.db.")
    links = re.findall(r"http://127\.0\.0\.1:\d+/join/\S+", said)
    assert len(set(links)) == 3
    with httpx.Client(follow_redirects=True, verify=False) as client:
        base = links[0].rpartition("/join/")[0]
        assert client.get(links[0]).status_code == 200
        study = client.get(f"{base}/api/study").json()
        assert (study["person"], study["title"], study["ratings"]) == ("Ann", "Tea", [0, 1])
        task = client.get(f"{base}/api/next").json()["tasks"][0]
        body = {"assignment": task["assignment"], "key": "k", "ms": 5, "answer": {"choice": "left"}}
        assert client.post(f"{base}/api/answer", json=body, headers={"x-csrf-token": study["csrf"]}).json()["ok"]
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(10) == 0
    process.stdout.close()
    assert "Stopped. 1 answer in labels.db" in rest
    again, said = started(tmp_path, *words)
    assert re.findall(r"http://127\.0\.0\.1:\d+/join/\S+", said) == links
    again.send_signal(signal.SIGTERM)
    assert "1 answer in" in again.stdout.read()
    assert again.wait(10) == 0
    again.stdout.close()


def test_the_browser_is_opened_without_telling_the_machine_the_token(tmp_path, monkeypatch):
    opened = []

    def serve(options, ready):
        ready(serving.Links("http://127.0.0.1:1", "http://127.0.0.1:1/join/secret-token", {}, "", ""))
        page = Path(opened[0].removeprefix("file://"))
        assert "url=http://127.0.0.1:1/join/secret-token" in page.read_text()
        assert stat.S_IMODE(page.stat().st_mode) == 0o600
        return 0

    monkeypatch.setattr(serving, "serve", serve)
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    data = written(tmp_path / "c.jsonl", {"prompt": "p", "completions": ["a", "b"]})
    labelling.label(Label(data=data, store=str(tmp_path / "s.db"), browser=True))
    assert "secret" not in opened[0]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".db", ".jsonl", ".lock"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({}, "data: give what is to be judged"),
        ({"data": "c.jsonl", "policies": ("x",), "prompts": "p.jsonl"}, "not both"),
        ({"policies": ("x",)}, "go together"),
        ({"prompts": "p.jsonl"}, "go together"),
        ({"policies": ("x", "y", "z"), "prompts": "p.jsonl", "kind": "compare"}, "3 are sampled to each prompt"),
        ({"data": "c.jsonl", "ratings": (7, 1)}, "ratings"),
        ({"data": "c.jsonl", "ratings": (0, 10)}, "ratings"),
        ({"data": "c.jsonl", "gold_share": 0.6, "repeat_share": 0.6}, "more than 1"),
        ({"data": "c.jsonl", "host": "0.0.0.0"}, "token_file"),
        ({"data": "none.jsonl"}, "none.jsonl"),
        ({"policies": ("x",), "prompts": "none.jsonl"}, "there is no file 'none.jsonl'"),
        ({"data": "c.jsonl", "overlap": 0}, "overlap"),
        ({"data": "c.jsonl", "port": 70000}, "port"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_told_and_leaves_no_store(tmp_path, monkeypatch, served, more, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlauditError, match=re.escape(told)):
        labelling.label(config.from_mapping(Label, more, "label"))
    assert not (tmp_path / "labels.db").exists()
    assert served == []


def test_the_kind_the_limit_and_the_store_are_as_asked(tmp_path, served):
    data = written(tmp_path / "c.jsonl", *({"prompt": f"p{n}", "completions": ["a", "b"]} for n in range(5)))
    store = str(tmp_path / "new" / "s.db")
    labelling.label(Label(data=data, store=store, limit=2, kind="rate"))
    labelling.label(Label(data=data, store=store, limit=3, kind="rank"))
    labelling.label(Label(store=store, overlap=3, lease=9, strength=True))
    with Store.read(store) as found:
        assert [item.kind for item in found.items()] == ["rate"] * 2 + ["rank"] * 3
    assert (served[-1].overlap, served[-1].lease, served[-1].strength) == (3, 9, True)


def test_b01_policies_may_be_named_one_by_one():
    words = ["--policy", "runs/sft/final", "--policy", "runs/ppo/final", "--prompts", "prompts.jsonl"]
    settings = config.from_arguments(Label, words, "plaudit label")
    assert (settings.policies, settings.prompts) == (("runs/sft/final", "runs/ppo/final"), "prompts.jsonl")
    together = ["--policies", "runs/sft/final", "runs/ppo/final", "--prompts", "prompts.jsonl"]
    assert config.from_arguments(Label, together, "plaudit label") == settings
    with pytest.raises(PlauditError, match=r"--policies needs a value"):
        config.from_arguments(Label, ["--policy"], "plaudit label")


def test_policies_are_sampled_once_and_their_answers_are_asked_about_blind(tmp_path, served):
    for seed, name in enumerate(("sft", "ppo")):
        tiny.folder(tmp_path / name, seed=seed, chat=False)
    prompts = written(tmp_path / "p.jsonl", *({"prompt": f"say {word}"} for word in ("one", "two", "two", "three")))
    settings = Label(
        policies=(str(tmp_path / "sft"), str(tmp_path / "ppo")), prompts=prompts, store=str(tmp_path / "s.db"),
        max_new_tokens=5, device="cpu", precision="float32",
    )  # fmt: skip
    labelling.label(settings)
    with Store.read(settings.store) as found:
        items, position = found.items(), found.version
    assert [item.prompt for item in items] == ["say one", "say two", "say three"]
    assert {item.kind for item in items} == {"compare"}
    assert {one.source["model"] for one in items[0].candidates} == set(settings.policies)
    labelling.label(settings)
    with Store.read(settings.store) as found:
        assert (found.items(), found.version.rpartition(".")[0]) == (items, position.rpartition(".")[0])
