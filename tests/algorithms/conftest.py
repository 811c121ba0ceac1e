"""One folder of models and data for all runs here."""

from pathlib import Path

import examples
import pytest


@pytest.fixture(scope="session")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return examples.place(tmp_path_factory.mktemp("place"))
