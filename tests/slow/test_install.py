"""What pip makes of the repository's address."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_s0_01_pip_installs_the_committed_state_from_a_git_address(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    address = f"git+file://{ROOT}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), address]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "plaudit" / "py.typed").is_file()
    here = {path.name for path in (ROOT / "recipes").iterdir() if path.is_file()}
    assert {path.name for path in (tmp_path / "plaudit" / "shipped").iterdir() if path.is_file()} == here
    assert {path.name for path in (tmp_path / "bin").iterdir()} >= {"plaudit", "rm_train"}
    for words in (["-m", "plaudit.cli", "--version"], ["-m", "plaudit.rm_train", "--help"]):
        told = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
