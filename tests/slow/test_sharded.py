"""Two processes that share the weights of one model (FSDP2 over gloo) come to what processes come to that hold it all,
though one of them always has fewer passes to make than the other."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).parents[1] / "processes" / "sharded.py"
LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TINY = "--tokens-per-pass 64 --device cpu --precision float32 --learning-rate 1e-2 --batch-size 6 --steps 4"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of so different lengths that processes cut theirs into different numbers of parts."""
    at = tmp_path_factory.mktemp("sharded")
    tiny.folder(at / "model")
    draw = random.Random(0)

    def said() -> str:
        return "".join(draw.choices("abcdefgh", k=draw.choice([2, 3, 30, 40])))

    rows = [{"prompt": f"{i} a", "completion": said(), "chosen": said(), "rejected": said()} for i in range(24)]
    tiny.lines(at / "texts.jsonl", [{name: row[name] for name in ("prompt", "completion")} for row in rows])
    tiny.lines(at / "pairs.jsonl", [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    (at / "rewards.py").write_text(
        "def variety(completions, **others):\n    return [len(set(text)) / 4 for text in completions]\n"
    )
    return at


def run(place: Path, name: str, words: str, kind: str = "sharded") -> Path:
    """The run folder of `plaudit WORDS`: by two processes that share a model, by two that hold it all, or by one."""
    (place / f"{name}-passes").mkdir(exist_ok=True)
    starts = {
        "sharded": [*LAUNCHER, str(SCRIPT), f"{name}-passes"],
        "two": [*LAUNCHER, "-m", "plaudit.cli"],
        "one": ["-m", "plaudit.cli"],
    }
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *starts[kind], *f"{words} {TINY} --model model --output {name}".split()]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return place / name


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_same(sharded: Path, other: Path, uneven: bool = True) -> None:
    """The same figures at every step and the same weights, up to rounding, in as many passes on both processes, of
    which some were made for the other's sake only, where these are `uneven`."""
    theirs, rows = (lines(folder / "metrics.jsonl") for folder in (other, sharded))
    assert len(rows) == len(theirs) > 4
    for mine, plain in zip(rows, theirs, strict=True):
        assert set(mine) == set(plain)
        for name in set(plain) - {"time/seconds", "sampler_gap"}:
            assert mine[name] == pytest.approx(plain[name], rel=2e-4, abs=1e-5), name
    weights = final(other)
    assert set(final(sharded)) == set(weights)
    for name, weight in final(sharded).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=2e-5)
    config = (folder.joinpath("final", "config.json").read_text() for folder in (sharded, other))
    assert next(config) == next(config)
    noted = sharded.with_name(f"{sharded.name}-passes")
    ranks = [lines(noted / f"rank-{rank}.json") for rank in (0, 1)]
    assert [passes for passes, _ in ranks[0]] == [passes for passes, _ in ranks[1]]
    assert sum(repeats for rank in ranks for _, repeats in rank) > 0 or not uneven


def test_sft_shared_by_two_processes_is_that_of_one_and_goes_on_from_its_checkpoint_in_both(place):
    words = "sft --data texts.jsonl --holdout 0.2 --save-every 2"
    whole = run(place, "sft", words)
    assert_same(whole, run(place, "sft-alone", words, "one"))
    for kind in ("sharded", "one"):
        again = shutil.copytree(whole, place / f"again-{kind}")
        shutil.rmtree(again / "final")
        (again / "summary.json").unlink()
        assert [path.name for path in (again / "checkpoints").iterdir()] == ["step-000002"]
        run(place, again.name, words, kind)
        for name, weight in final(whole).items():
            exact = {} if kind == "one" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(final(again)[name], weight, **({"rtol": 1e-3, "atol": 2e-5} | exact))


@pytest.mark.parametrize("kind", ["ppo", "grpo --group 3 --lora-rank 2"])
def test_policy_gradients_sample_from_a_shared_model_as_from_a_whole_one(place, kind):
    words = f"{kind} --data texts.jsonl --rewards rewards.py:variety --rollout 12 --max-new-tokens 40 --holdout 0.2"
    name = kind.split()[0]
    assert_same(run(place, name, words), run(place, f"{name}-whole", words, "two"), uneven=kind == "ppo")


@pytest.mark.parametrize("way", ["--lora-rank 2", "--train-layers 1", "--reference-every 1 --reference-share 0.5"])
def test_references_of_a_shared_model_say_what_those_of_a_whole_one_say(place, way):
    words = f"dpo --data pairs.jsonl --holdout 0.2 {way}"
    name = "dpo" + way.split()[0]
    assert_same(run(place, name, words), run(place, f"{name}-alone", words, "one"))


def test_the_exact_divergence_and_ilql_are_refused_before_anything_hangs(place):
    sampled = "--data texts.jsonl --rewards rewards.py:variety --rollout 12 --max-new-tokens 4"
    for words, told in (
        (f"grpo --group 3 {sampled} --kl-term reward_full", "kl_term"),
        ("ilql --data rated.jsonl", "ilql"),
    ):
        tiny.lines(place / "rated.jsonl", [{"prompt": "a", "completion": "b", "ratings": [i % 3]} for i in range(12)])
        with pytest.raises(AssertionError, match=f"{told}: .* spread over processes"):
            run(place, f"refused-{told}", words)
