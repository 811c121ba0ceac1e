"""The same seed gives the same bits, another seed gives others (R18); two processes give what one gives (B30)."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import examples
import watched
from plaudit import config
from plaudit.trainer import Interrupted

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
def test_r7_b30_one_process_and_two_are_one_run(at, tmp_path):
    def settings(name):
        changes = {"dropout": False, "batch_size": 5, "steps": 6, "evaluate_every": 2, "save_every": 5}
        return examples.settings("sft", at, tmp_path / name, **changes)

    whole = watched.train(settings("one"))
    with pytest.raises(Interrupted):
        watched.train(settings("two"), signal_after=2)
    file = tmp_path / "sft.yaml"
    file.write_text(config.to_yaml(settings("two")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["plaudit.cli", "sft", "--config", str(file), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("goes on from step 2") == 1
    # Two processes trained the last four steps, and one can go on from what they saved.
    shutil.copytree(tmp_path / "two", tmp_path / "three", ignore=shutil.ignore_patterns("summary.json", "final"))
    rest = watched.train(settings("three"))
    assert rest.rows == {6: whole.rows[6]}
    expected, _ = watched.logged(tmp_path / "one")
    weights = load_file(tmp_path / "one" / "final" / "model.safetensors")
    for name in ("two", "three"):
        lines, _ = watched.logged(tmp_path / name)
        assert [line.keys() for line in lines] == [line.keys() for line in expected]
        for line, other in zip(lines, expected, strict=True):
            assert line == pytest.approx(other, rel=1e-5)
        found = load_file(tmp_path / name / "final" / "model.safetensors")
        for key, tensor in weights.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "two" / "summary.json").exists()
