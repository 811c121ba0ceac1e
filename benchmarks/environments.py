"""Environments with a release of TRL, to compare with: each is made once and kept in the cache."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from plaudit.sources import cache_folder

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def environment(version: str) -> Path:
    """The Python of an environment with this TRL and the torch that everything here is tested with."""
    folder = cache_folder() / "parity" / f"trl-{version}"
    python, ready = folder / "bin" / "python", folder / "ready"
    torch_pin = re.search(r"^torch==\S+", CONSTRAINTS.read_text(), re.MULTILINE)
    assert torch_pin is not None
    # torch first and by itself: where a CPU build of the pinned release is at hand, no CUDA packages are fetched.
    wanted = [[torch_pin[0]], [f"trl=={version}", "peft", "scikit-learn", "joblib"]]
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    if not ready.exists() or ready.read_text() != str(wanted):
        install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
        for names in wanted:
            subprocess.run([*install, *names], check=True)
        ready.write_text(str(wanted))
    return python
