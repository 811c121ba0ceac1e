"""One folder of models and data for all runs here."""

import os
from pathlib import Path

import pytest

import examples


@pytest.fixture(scope="session")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return examples.place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing protects from power cuts, which don't happen here; tests/unit/test_checkpoint.py watches over it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
