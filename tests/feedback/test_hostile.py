"""Texts that mean harm (R27), in what errors say and in what is exported; what the pages do is in `test_page`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hostile import TEXTS
from live import pair, site, tasks

from plaudit import config
from plaudit.errors import PlauditError
from plaudit.feedback.candidates import read_items
from plaudit.feedback.exchange import export, take_in
from plaudit.feedback.forms import item_from_json, label_from_json
from plaudit.feedback.gathering import gather
from plaudit.feedback.importing import read_labels
from plaudit.feedback.items import Answer, Candidate, Item, Label, read_answer
from plaudit.feedback.store import Store
from plaudit.records import Comparison, load
from plaudit.settings.feedback import Export, Import, Loop

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
TWO = {"prompt": "p", "completions": ["a", "b"]}


# ------------------------------------------------------------------------------------------------ errors


def line(row: Mapping[str, Any]) -> Path:
    path = Path("rows.jsonl")
    path.write_text(json.dumps(row))
    return path


REFUSING: dict[str, Callable[[str], object]] = {
    "gold": lambda text: read_items(line({**TWO, "gold": text})),
    "a column to ask": lambda text: read_items(line({text: 1})),
    "a column to import": lambda text: read_labels(line({text: 1})),
    "a column to train on": lambda text: load(line({text: 1}), Comparison),
    "preference": lambda text: read_labels(line({**PAIR, "preference": text}), "ann"),
    "ranking": lambda text: read_labels(line({**TWO, "ranking": text}), "ann"),
    "rating": lambda text: read_labels(line({"prompt": "p", "completion": "a", "rating": text}), "ann"),
    "annotator": lambda text: gather([line({"response1": "a", "response2": "b", "annotator1": text})]),
    "kind": lambda text: item_from_json({"kind": text, "prompt": "p", "candidates": []}, "here"),
    "a field of an item": lambda text: item_from_json({text: 1}, "here"),
    "a field of a label": lambda text: label_from_json({text: 1}, "here"),
    "a field of an answer": lambda text: read_answer("compare", 2, {text: 1}),
    "strength": lambda text: read_answer("compare", 2, {"choice": "left", "strength": text}),
    "a setting": lambda text: config.from_mapping(Loop, {text: 1}, "loop.yaml"),
    "a value of a setting": lambda text: config.from_mapping(
        Loop, {"model": "m", "prompts": "p", "schedule": text}, "l"
    ),
}


@pytest.mark.parametrize("place", REFUSING)
def test_r27_an_error_is_one_short_line_whatever_it_tells_of(place, tmp_path, monkeypatch):
    """No line break that forges another message, nothing that steers a terminal, no megabyte."""
    monkeypatch.chdir(tmp_path)
    for text in TEXTS:
        with pytest.raises(PlauditError) as told:
            REFUSING[place](text)
        assert str(told.value).isprintable()
        assert len(str(told.value)) < 300


def test_r27_what_the_server_refuses_it_tells_as_json_of_one_short_line(tmp_path):
    with site(tmp_path / "labels.db") as study:
        study.add(pair(0))
        ann = study.person("ann")
        (task,) = tasks(ann)
        given = {"assignment": task["assignment"], "key": "k", "ms": 1, "answer": {"choice": "left"}}
        for text in (text for text in TEXTS if len(text) < 1000):
            for body in (
                {**given, "answer": {text: 1}},
                {**given, "answer": {"choice": "left", "strength": text}},
                {**given, "assignment": text},
            ):
                reply = ann.post("/api/answer", json=body)
                assert 400 <= reply.status_code < 500
                assert reply.headers["content-type"] == "application/json"
                assert reply.headers["x-content-type-options"] == "nosniff"
                assert reply.json()["error"].isprintable()
                assert len(reply.json()["error"]) < 300
        assert study.labels() == []


# ------------------------------------------------------------------------------------------------ export


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A store in which every text is a prompt, an answer, a source, a note, a rewrite and, if it can be, a name."""
    path = tmp_path_factory.mktemp("hostile") / "study.db"
    labels = []
    for number, text in enumerate(TEXTS):
        name = " ".join(text.split())[:80]
        item = Item("compare", text, (Candidate(text, {"model": text[:99]}), Candidate(f"{text}?")))
        answer = Answer((1, 2), note=text[:9000], rewrite=f"{text[:9000]}!")
        who = name if name.isprintable() else f"person {number}"
        labels.append(Label(f"label {number}", item, who, answer, (1, 0), 1.0, 2.0, 1000))
    with Store.open(path) as store:
        assert store.take(labels) == ["new"] * 60
    return path, labels


def written(study, output: Path, kind: str) -> list[dict[str, Any]]:
    export(Export(data=str(study[0]), output=str(output), kind=kind))
    return [json.loads(row) for row in output.read_text("utf-8").split("\n")[:-1]]


def test_r27_every_text_is_exported_as_it_is(study, tmp_path):
    pairs = written(study, tmp_path / "pairs.jsonl", "comparisons")
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs] == [(t, t, f"{t}?") for t in TEXTS]
    assert [(one.prompt, one.chosen) for one in load(tmp_path / "pairs.jsonl", Comparison).records] == [
        (text, text) for text in TEXTS
    ]
    better = written(study, tmp_path / "better.jsonl", "demonstrations")
    assert [(row["prompt"], row["completion"]) for row in better] == [(text, f"{text[:9000]}!") for text in TEXTS]
    everything = written(study, tmp_path / "labels.jsonl", "labels")
    assert [row["answer"]["note"] for row in everything] == [text[:9000] for text in TEXTS]
    take_in(Import(data=str(tmp_path / "labels.jsonl"), output=str(tmp_path / "again.db")))
    with Store.read(tmp_path / "again.db") as store:
        assert store.labels() == study[1]


def test_r27_r28_a_table_holds_every_text_in_a_cell_of_its_own(study, tmp_path):
    export(Export(data=str(study[0]), output=str(tmp_path / "labels.csv"), kind="labels"))
    before = csv.field_size_limit(2_000_000)
    try:
        with (tmp_path / "labels.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    finally:
        csv.field_size_limit(before)
    assert len(rows) == 60
    for row, text in zip(rows, TEXTS, strict=True):
        mark = "'" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else ""
        assert (row["prompt"], row["candidate A"], row["note"]) == (mark + text, mark + text, mark + text[:9000])
    assert sum(row["prompt"].startswith("'=") for row in rows) == 1
