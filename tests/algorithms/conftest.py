"""One folder of models and data for all runs here."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import examples
import plaudit
import tiny
from plaudit import SFT


@pytest.fixture(scope="session")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return examples.place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Flushing protects from power cuts, which don't happen here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says random letters a to h, all about as often, and ends after four to nine."""
    folder = tmp_path_factory.mktemp("talker")
    said = [{"prompt": f"{i} ", "completion": word} for i, word in enumerate(examples.words(400))]
    settings = SFT(
        model=tiny.folder(folder / "model"),
        data=tiny.lines(folder / "words.jsonl", said),
        output=str(folder / "run"),
        precision="float32",
        steps=50,
        batch_size=32,
        learning_rate=1e-2,
        save_every=0,
    )
    return plaudit.train(settings).final
