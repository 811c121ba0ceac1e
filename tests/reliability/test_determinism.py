"""The same seed gives the same bits, another seed gives others (R18); two processes give what one gives (B30)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import examples
import watched
from plaudit import config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("kind", ["sft", "comparisons", "ppo", "ppo-adapter"])
def test_r18_a_seed_decides_every_bit(kind, at, tmp_path):
    steps = {"steps": 3, "save_every": 0}
    first, second = (watched.train(examples.settings(kind, at, tmp_path / name, **steps)) for name in "ab")
    other = watched.train(examples.settings(kind, at, tmp_path / "c", seed=1, **steps))
    assert (first.digests, first.rows, first.tokens) == (second.digests, second.rows, second.tokens)
    assert watched.logged(tmp_path / "a") == watched.logged(tmp_path / "b")
    assert watched.final(tmp_path / "a") == watched.final(tmp_path / "b")
    assert not set(first.digests.values()) & set(other.digests.values())
    assert first.rows != other.rows
    assert watched.final(tmp_path / "a") != watched.final(tmp_path / "c")


def test_r18_the_seed_reaches_rewards_that_draw_at_random(at, tmp_path):
    (tmp_path / "jitter.py").write_text(
        "import random\nimport numpy\nimport torch\n"
        "def jitter(prompts, completions, **columns):\n"
        "    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in prompts]\n"
    )
    # Evaluations draw too, and one that comes between a save and the next step is not done again.
    rewards = {"rewards": f"{tmp_path / 'jitter.py'}:jitter", "steps": 9, "save_every": 2, "evaluate_every": 2}
    first, second = (watched.train(examples.settings("ppo", at, tmp_path / name, **rewards)) for name in "ab")
    assert first.digests == second.digests
    assert watched.logged(tmp_path / "a") == watched.logged(tmp_path / "b")
    with pytest.raises(watched.Killed):
        watched.train(examples.settings("ppo", at, tmp_path / "killed", **rewards), kill_after=5)
    rest = watched.train(examples.settings("ppo", at, tmp_path / "killed", **rewards))
    assert rest.digests == {step: value for step, value in first.digests.items() if step > 4}


@pytest.mark.timeout(600)  # two processes start, on what may be a busy machine
def test_b30_two_processes_learn_what_one_learns(at, tmp_path):
    settings = examples.settings(
        "sft", at, tmp_path / "one", dropout=False, batch_size=5, steps=4, evaluate_every=2, save_every=3
    )
    watched.train(settings)
    file = tmp_path / "sft.yaml"
    file.write_text(config.to_yaml(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["plaudit.cli", "sft", "--config", str(file), "--output", str(tmp_path / "two"), "--device", "cpu"]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one, two = (watched.logged(tmp_path / name)[0] for name in ("one", "two"))
    assert [row.keys() for row in one] == [row.keys() for row in two]
    for row, other in zip(one, two, strict=True):
        assert other == pytest.approx(row, rel=1e-5)
    weights = [load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-5)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["steps"] == 4
    assert [path.name for path in (Path(tmp_path) / "two" / "checkpoints").iterdir()] == ["step-000003"]
