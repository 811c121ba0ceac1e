"""What the tests of the commands share: tiny models, tiny data, and a command as a person would type it."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from doorway import PROMPTS

import tiny
from plaudit.cli import main


class Said(NamedTuple):
    """Exit status, standard output and standard error of a command."""

    code: int
    out: str
    err: str


@pytest.fixture
def plaudit(capsys, monkeypatch):
    """Runs a command in this process. The wide terminal keeps messages on one line, as a pipe would."""
    monkeypatch.setenv("COLUMNS", "1000")

    def run(*words) -> Said:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code or 0
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Every test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """`plain`, a language model without chat template, `chat`, another with, and `judge`, a reward model."""
    from transformers import AutoModelForSequenceClassification

    root = tmp_path_factory.mktemp("models")
    tiny.folder(root / "plain", seed=0, chat=False)
    tiny.folder(root / "chat", seed=1, chat=True)
    tiny.folder(root / "judge", seed=2, chat=False)
    scorer = AutoModelForSequenceClassification.from_pretrained(root / "judge", num_labels=1, pad_token_id=0)
    scorer.save_pretrained(root / "judge")
    return root


@pytest.fixture
def demonstrations(here):
    return tiny.lines(here / "demonstrations.jsonl", [{"prompt": p, "completion": f" {p[4:]}!"} for p in PROMPTS])


@pytest.fixture
def comparisons(here):
    rows = [{"prompt": p, "chosen": f" {p[4:]}!", "rejected": " no"} for p in PROMPTS]
    return tiny.lines(here / "comparisons.jsonl", rows)


@pytest.fixture
def prompts(here):
    return tiny.lines(here / "prompts.jsonl", [{"prompt": p, "id": i} for i, p in enumerate(PROMPTS)])
