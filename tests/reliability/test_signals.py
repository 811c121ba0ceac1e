"""SIGINT and SIGTERM, whenever they come, leave a checkpoint of the last finished step and a way to go on (R12, R3)."""

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import examples
import watched
from plaudit import PlauditError, checkpoint, config, hooks, policy
from plaudit.algorithms.base import Algorithm
from plaudit.algorithms.ppo import ProximalPolicyOptimisation
from plaudit.algorithms.sft import SupervisedFineTuning
from plaudit.rewards import Rewards
from plaudit.sampler import LocalSampler
from plaudit.trainer import Interrupted, Trainer
from plaudit.world import World

SLOW_RUN = Path(__file__).parents[1] / "processes" / "slow_run.py"


def at_call(patch, owner, name, call, *numbers, after=False):
    """Sends this process the signals at the `call`-th call of a function, before it does anything, or after."""
    function, calls = getattr(owner, name), []

    def send(signals):
        for number in signals:
            signal.raise_signal(number)

    def signalling(*args, **kwargs):
        calls.append(1)
        now = numbers if len(calls) == call else ()
        if not after:
            send(now)
        result = function(*args, **kwargs)
        if after:
            send(now)
        return result

    patch.setattr(owner, name, signalling)


# kind, where, which call, after it or before, the signals, the step that is then the last finished one. In `ppo`, four
# steps learn from one rollout.
PHASES = {
    "sampling the first rollout": ("ppo", LocalSampler, "sample", 1, False, (signal.SIGINT,), 0),
    "sampling a later rollout": ("ppo", LocalSampler, "sample", 2, True, (signal.SIGTERM,), 4),
    "rewarding": ("ppo", Rewards, "each", 2, False, (signal.SIGINT,), 4),
    "asking the reference": ("ppo", Algorithm, "over", 4, False, (signal.SIGTERM,), 4),
    "a loss": ("ppo", ProximalPolicyOptimisation, "loss", 5, False, (signal.SIGTERM,), None),
    "between two micro-batches": ("sft", SupervisedFineTuning, "loss", 3, True, (signal.SIGINT,), None),
    "the update": ("ppo", Trainer, "_update", 3, False, (signal.SIGINT,), 3),
    "after the update": ("ppo", ProximalPolicyOptimisation, "after_step", 4, True, (signal.SIGTERM,), 4),
    "between two steps": ("ppo", World, "stop_requested", 2, True, (signal.SIGTERM,), 2),
    "the first evaluation": ("sft", SupervisedFineTuning, "evaluate", 1, False, (signal.SIGTERM,), 0),
    "an evaluation": ("sft", SupervisedFineTuning, "evaluate", 2, False, (signal.SIGTERM,), 2),
    "an evaluation, when it is done": ("sft", SupervisedFineTuning, "evaluate", 2, True, (signal.SIGTERM,), 2),
    "a log line": ("sft", hooks.Logging, "after_step", 3, False, (signal.SIGINT,), 3),
    "a save": ("ppo", checkpoint, "_write_tensors", 3, True, (signal.SIGTERM,), 3),
    "a save, twice": ("sft", checkpoint, "_write_tensors", 3, False, (signal.SIGINT, signal.SIGTERM), 3),
    "the save after a signal": ("sft", checkpoint, "_write", 1, False, (signal.SIGINT, signal.SIGINT), 1),
}


def unheld(kind):
    """Without evaluations, policies sample and reward for rollouts alone, whose calls can then be counted."""
    return {"eval_data": None, "evaluate_every": 0} if kind == "ppo" else {}


@pytest.fixture(scope="module")
def wholes(at, tmp_path_factory):
    """Runs that nothing interrupted, by kind."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        return {
            kind: (
                watched.train(examples.settings(kind, at, folder / kind, save_every=1, **unheld(kind))),
                folder / kind,
            )
            for kind in ("sft", "ppo")
        }


@pytest.mark.parametrize("phase", PHASES)
def test_r12_a_signal_in_any_phase_half_does_nothing(phase, at, wholes, tmp_path):
    kind, owner, name, call, after, numbers, done = PHASES[phase]
    whole, folder = wholes[kind]
    settings = examples.settings(kind, at, tmp_path / "run", **unheld(kind))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, owner, name, call, *numbers, after=after)
        with pytest.raises(Interrupted) as stopped:
            watched.train(settings)
    assert stopped.value.code in [128 + number for number in numbers]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved, skipped = checkpoint.latest(tmp_path / "run" / "checkpoints")
    step = int(saved.name.removeprefix("step-"))
    assert skipped == []
    assert str(stopped.value) == f"stopped at step {step}, which is saved: the same command goes on from there."
    if done is not None:
        assert step == done
    rest = watched.train(settings)
    # What was left of an evaluation is made up for before the next step.
    first = step if phase.startswith("an evaluation") else step + 1
    assert rest.digests == {number: value for number, value in whole.digests.items() if number >= first}
    assert watched.logged(tmp_path / "run") == watched.logged(folder)
    assert watched.final(tmp_path / "run") == watched.final(folder)


def test_r12_a_signal_while_the_reference_stands_in_saves_the_policy(at, wholes, tmp_path, monkeypatch):
    calls = []

    @contextmanager
    def torn(owner, modules):
        kept = {name: getattr(owner, name) for name in modules}
        for name, module in modules.items():
            setattr(owner, name, module)
        yield
        calls.append(1)
        if len(calls) == 2:  # the worst moment: nothing puts the policy's own modules back
            signal.raise_signal(signal.SIGTERM)
        for name, module in kept.items():
            setattr(owner, name, module)

    whole, _ = wholes["ppo"]
    settings = examples.settings("ppo", at, tmp_path / "run", **unheld("ppo"))
    with monkeypatch.context() as patch:
        patch.setattr(policy, "replaced", torn)
        with pytest.raises(Interrupted, match="stopped at step 4"):
            watched.train(settings)
    rest = watched.train(settings)
    assert rest.digests == {step: value for step, value in whole.digests.items() if step > 4}


def test_r12_rewards_that_catch_every_exception_do_not_swallow_a_signal(at, tmp_path):
    (tmp_path / "careful.py").write_text(
        "import pathlib\nimport signal\n"
        "def careful(prompts, completions, **columns):\n"
        "    try:\n"
        "        if not pathlib.Path(__file__ + '.calm').exists():\n"
        "            signal.raise_signal(signal.SIGTERM)\n"
        "        return [float(len(text)) for text in completions]\n"
        "    except Exception:\n"
        "        return [0.0 for text in completions]\n"
    )
    settings = examples.settings(
        "ppo", at, tmp_path / "run", rewards=f"{tmp_path / 'careful.py'}:careful", steps=2, **unheld("ppo")
    )
    with pytest.raises(Interrupted, match="stopped at step 0"):
        watched.train(settings)
    (tmp_path / "careful.py.calm").write_text("from now on")
    watched.train(settings)
    assert watched.logged(tmp_path / "run")[0][0]["score"] > 0


@pytest.mark.parametrize("save_every", [0, 1])
def test_r12_a_signal_while_the_finished_model_is_written_waits_for_it(save_every, at, wholes, tmp_path):
    _, folder = wholes["sft"]
    settings = examples.settings("sft", at, tmp_path / "run", save_every=save_every)
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, PreTrainedModel, "save_pretrained", 1, signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped at step 9"):
            watched.train(settings)
    assert watched.final(tmp_path / "run") == watched.final(folder)
    assert (tmp_path / "run" / "summary.json").exists()


def test_r12_a_run_in_another_thread_trains_without_signals(at, wholes, tmp_path):
    whole, _ = wholes["sft"]
    with ThreadPoolExecutor(1) as threads:
        seen = threads.submit(watched.train, examples.settings("sft", at, tmp_path / "run")).result()
    assert seen.digests == whole.digests


@pytest.mark.parametrize("way", ["a signal", "a mistake", "the end"])
def test_whatever_ends_a_run_the_hooks_are_told(way, at, tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(hooks.Progressing, "end", lambda hook, trainer: ended.append("bar"))
    monkeypatch.setattr(hooks.Tracker, "close", lambda tracker: ended.append("tracker"))
    settings = examples.settings("sft", at, tmp_path / "run", steps=2)
    if way == "the end":
        watched.train(settings)
    elif way == "a signal":
        with pytest.raises(Interrupted):
            watched.train(settings, signal_after=1)
    else:
        monkeypatch.setattr(SupervisedFineTuning, "loss", lambda *_: (torch.tensor(torch.nan, requires_grad=True), {}))
        with pytest.raises(PlauditError):
            watched.train(settings)
    assert ended == ["tracker", "bar"]


@pytest.mark.slow
@pytest.mark.timeout(600)  # five processes start, on what may be a busy machine
def test_r3_r12_a_process_stopped_and_killed_again_and_again(at, tmp_path):
    changes = {"steps": 40, "rollout": 4, **unheld("ppo")}
    whole = watched.train(examples.settings("ppo", at, tmp_path / "whole", **changes))
    settings = examples.settings("ppo", at, tmp_path / "run", **changes)
    file = tmp_path / "ppo.yaml"
    file.write_text(config.to_yaml(settings))
    draw = random.Random(3)

    def broken_off(number, what, count):
        """Sends the signal soon after the process has said `what` so often; its exit status and what it told."""
        command = [sys.executable, "-W", "ignore", SLOW_RUN, "ppo", "--config", file]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                count -= line == f"{what}\n"
                if not count:
                    break
            time.sleep(0.01 if number != signal.SIGKILL else draw.uniform(0, 0.3))
            process.send_signal(number)
            _, told = process.communicate(timeout=300)
        return process.returncode, told

    steps = [0]
    for number, what, count in [
        (signal.SIGTERM, "rollout", 2),
        (signal.SIGKILL, "step", 1),
        (signal.SIGINT, "step", 5),
        (signal.SIGKILL, "rollout", 1),
        (signal.SIGKILL, "step", 2),
    ]:
        status, told = broken_off(number, what, count)
        saved, skipped = checkpoint.latest(tmp_path / "run" / "checkpoints")
        assert skipped == []
        steps.append(int(saved.name.removeprefix("step-")))
        if number == signal.SIGKILL:
            assert status == -signal.SIGKILL
        else:
            assert status == 128 + number, told
            assert told.splitlines()[-1] == (
                f"plaudit ppo: stopped at step {steps[-1]}, which is saved: the same command goes on from there."
            )
        assert not list((tmp_path / "run").glob("summary*"))
    assert steps == sorted(steps)
    assert steps[1] == 2 * 1
    assert steps[3] >= steps[2] + 4
    assert steps[-1] < 40
    rest = watched.train(settings)
    assert rest.digests == {step: value for step, value in whole.digests.items() if step > steps[-1]}
    assert watched.logged(tmp_path / "run") == watched.logged(tmp_path / "whole")
    assert watched.final(tmp_path / "run") == watched.final(tmp_path / "whole")
