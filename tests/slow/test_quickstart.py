"""The main job on the real model and the real ratings: minutes, not seconds."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
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


# The same stages on the same model and data, cut short.
SHORT = [
    *("sft.steps=6", "sft.eval_limit=32", "sft.save_every=2"),
    *("reward.steps=6", "reward.eval_limit=40", "reward.save_every=2"),
    *("ppo.steps=8", "ppo.rollout=32", "ppo.batch_size=16", "ppo.save_every=1"),
    "evaluate.prompts=32",
]


def hashes(folder: Path) -> dict[str, str]:
    """What each stage left, without what a clock measured."""
    files = [folder / stage / "final" / "model.safetensors" for stage in ("sft", "reward", "ppo")]
    files += [folder / "evaluate" / "samples.jsonl", folder / "ppo" / "samples.jsonl"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def logged(folder: Path, stage: str) -> int:
    """How many steps of a stage are in its log."""
    file = folder / stage / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


@pytest.mark.slow
def test_r3_a_quickstart_killed_in_every_stage_ends_with_the_same_bits(tmp_path: Path) -> None:
    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "plaudit.cli", "run", "recipes/quickstart.yaml", f"output={tmp_path / name}"]
        return subprocess.Popen([*command, *SHORT], cwd=ROOT, stdout=subprocess.DEVNULL)

    whole = start("whole")
    assert whole.wait() == 0
    killed = tmp_path / "killed"
    moments = {
        "sft, before the first save": lambda _: logged(killed, "sft") >= 2,
        "sft": lambda _: logged(killed, "sft") >= 4,
        "reward": lambda _: logged(killed, "reward") >= 4,
        "ppo, inside a rollout's steps": lambda _: logged(killed, "ppo") >= 4,
        "ppo, writing a checkpoint": lambda id: bool(list((killed / "ppo" / "checkpoints").glob(f".step-*.tmp-{id}"))),
        "evaluate": lambda _: (killed / "evaluate" / "config.yaml").exists(),
    }
    for moment, reached in moments.items():
        process = start("killed")
        while not reached(process.pid):
            assert process.poll() is None, f"it ended before this moment: {moment}"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start("killed").wait() == 0
    assert hashes(killed) == hashes(tmp_path / "whole")
