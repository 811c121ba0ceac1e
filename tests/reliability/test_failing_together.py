"""What fails in one process of several fails in all of them, so that none waits and what was done is saved."""

import os
import subprocess
import sys

import pytest

import examples
from plaudit import checkpoint, config


@pytest.mark.timeout(600)  # two processes start, on what may be a busy machine
def test_r3_a_reward_that_fails_in_one_process_costs_no_step(at, tmp_path):
    reward = tmp_path / "r.py"
    reward.write_text(
        "import os\n"
        "calls = []\n"
        "def score(prompts, completions, **columns):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) > 2: raise ValueError('enough')\n"
        "    return [0.5 + len(text) for text in completions]\n"
    )
    changes = {"steps": 8, "save_every": 0, "reuse": 1, "eval_data": None, "evaluate_every": 0}
    settings = examples.settings("ppo", at, tmp_path / "run", rewards=f"{reward}:score", **changes)
    file = tmp_path / "ppo.yaml"
    file.write_text(config.to_yaml(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["plaudit.cli", "ppo", "--config", str(file), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode
    # Rank 0, whose own scores were fine, tells of it too.
    said = (
        f"plaudit ppo: reward '{reward}:score' failed: ValueError: enough ({reward}:5), at the prompt at {at}/prompts"
    )
    assert said in done.stderr, done.stderr[-4000:]
    assert "Step 4 is saved: once that is mended, the same command goes on from there." in done.stderr
    path, skipped = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert (path.name, skipped) == ("step-000004", [])
    ranks = checkpoint.unpack(*checkpoint.load(path))["ranks"]
    assert [rank["step"] for rank in ranks] == [4, 4]
