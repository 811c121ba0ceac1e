"""Settings of the whole suite."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The same examples every time, and no verdict on a machine that happens to be busy.
settings.register_profile("plaudit", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("plaudit")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny matrices are slower on several threads, and bits depend on how many there are."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _frozen() -> None:
    """What the libraries made while they were loaded stays to the end: no collection of garbage need look at it, and
    every stage of a run ends with one."""
    import gc

    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from plaudit import inference, recipes  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """What plaudit remembers of this machine stays out of the user's cache. Slow tests find what was pulled there."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("PLAUDIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
