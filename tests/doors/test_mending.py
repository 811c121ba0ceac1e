"""After a mistake that only the run itself can tell of, the corrected command goes ahead and nothing done is lost."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from doorway import PROMPTS, QUICK

import tiny
from plaudit import checkpoint
from plaudit.algorithms.sft import SupervisedFineTuning

PPO = ("--rollout", 4, "--batch-size", 4, "--steps", 3, "--max-new-tokens", 4, "--reuse", 1, "--rewards", "r.py:score")


def test_settings_are_not_kept_before_the_first_step_even_if_something_was_evaluated(plaudit, here, models, prompts):
    source = here / "r.py"
    source.write_text("def score(prompts, completions, **columns):\n    return [0.0]\n")
    held = tiny.lines(here / "h.jsonl", [{"prompt": "say"}])
    words = ("ppo", "--model", models / "plain", *QUICK, *PPO, "--data", prompts, "--eval-data", held)
    assert plaudit(*words).code == 2
    assert len(Path("runs/ppo/metrics.jsonl").read_text().splitlines()) == 1
    source.write_text("def score(prompts, completions, **columns):\n    return [1.0 for _ in prompts]\n")
    assert plaudit(*words, "--learning-rate", 1e-3).code == 0
    lines = [json.loads(line) for line in Path("runs/ppo/metrics.jsonl").read_text().splitlines()]
    assert [line["heldout_score"] for line in lines if line["step"] == 0] == [1.0]


def test_an_exit_inside_a_reward_costs_no_step_and_names_the_row_of_the_data(plaudit, here, models):
    rows = [{"prompt": p * (30 if i < 3 else 1), "id": i} for i, p in enumerate(PROMPTS)]
    data, source = tiny.lines(here / "d.jsonl", rows), here / "r.py"
    fine = "calls = []\ndef score(prompts, completions, id):\n    calls.append(1)\n    return [0.5] * len(id)\n"
    source.write_text(
        f"import sys\n{fine}".replace("    return", "    if len(calls) > 2: [sys.exit() for i in id]\n    return")
    )
    words = ("ppo", "--model", models / "plain", *QUICK, *PPO, "--group", 4, "--save-every", 0, "--data", data)
    words += ("--max-prompt-tokens", 20)
    said = plaudit(*words)
    assert said.code == 2
    told, saved = said.err.splitlines()[-2:]
    where = told.removeprefix(f"plaudit ppo: reward 'r.py:score' failed: SystemExit ({source}:5), at the prompt at ")
    line = int(where.removeprefix(f"{here}/d.jsonl:").removesuffix("."))
    assert saved == "Step 2 is saved: once that is mended, the same command goes on from there."
    assert checkpoint.latest(Path("runs/ppo/checkpoints"))[0].name == "step-000002"
    # The first three are too long, which moves the numbers of those that are asked, not of the lines that they are in.
    asked = [row["prompt"] for row in map(json.loads, Path("runs/ppo/samples.jsonl").read_text().splitlines())]
    source.write_text(fine)
    assert plaudit(*words).code == 0
    after = [row["prompt"] for row in map(json.loads, Path("runs/ppo/samples.jsonl").read_text().splitlines())]
    assert after[len(asked)] == rows[line - 1]["prompt"]


def test_a_loss_that_is_not_finite_at_the_first_step_leaves_the_settings_free(
    plaudit, models, demonstrations, monkeypatch
):
    words = ("sft", "--model", models / "plain", "--steps", 1, "--batch-size", 2, *QUICK, "--data", demonstrations)
    with monkeypatch.context() as patch:
        patch.setattr(SupervisedFineTuning, "loss", lambda *_: (torch.tensor(torch.nan, requires_grad=True), {}))
        said = plaudit(*words)
    assert "Lower the learning rate" in said.err
    assert plaudit(*words, "--learning-rate", 1e-6).code == 0


def test_held_out_answers_of_one_kind_will_do_for_kto(plaudit, here, models):
    rows = [{"prompt": p, "completion": "x", "label": i % 2 == 0} for i, p in enumerate(PROMPTS)]
    data, held = tiny.lines(here / "d.jsonl", rows), tiny.lines(here / "h.jsonl", rows[::2])
    words = ("kto", "--model", models / "plain", "--steps", 1, "--batch-size", 4, *QUICK, "--data")
    said = plaudit(*words, held, "--eval-data", data, "--output", "other")
    assert said.err.startswith("plaudit kto: data: all answers are good, so there is nothing to tell apart")
    assert plaudit(*words, data, "--eval-data", held).code == 0
