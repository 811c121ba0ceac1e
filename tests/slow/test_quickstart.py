"""The main job on the real model and the real ratings: minutes, not seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quickstart_makes_the_model_better_by_a_judge_it_never_saw(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "plaudit.cli", "run", "recipes/quickstart.yaml", f"output={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = Path(result.stdout.splitlines()[-1])
    assert report.is_file()
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["sft"]["nll_after"] < found["sft"]["nll_before"] - 0.3
    assert found["reward"]["accuracy"] > 0.85
    assert found["reward"]["calibration_error"] < 0.05
    evaluate = found["evaluate"]
    assert evaluate["ppo"]["judge"] - evaluate["sft"]["judge"] > 0.2
    assert evaluate["win_rate_low"] > 0.6
    assert evaluate["ppo"]["distinct_2"] > 0.8 * evaluate["sft"]["distinct_2"]
    assert evaluate["sft"]["kl"] == 0
