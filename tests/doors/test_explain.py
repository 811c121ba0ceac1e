"""What `explain` announces is what the run then does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from doorway import PROMPTS, QUICK

import tiny
from plaudit.loading import load_policy


def announced(said, pattern):
    assert said.code == 0, said.err
    found = re.search(pattern, said.out)
    assert found, said.out
    return [number.replace(",", "") for number in found.groups()]


def happened(plaudit, *words):
    said = plaudit(*words)
    assert said.code == 0, said.err
    return json.loads(Path(said.out.strip(), "summary.json").read_text())["steps"]


@pytest.fixture
def data(here):
    """Eight rows of every kind in one file; two are long."""
    rows = [
        {"prompt": p, "completion": " a", "chosen": " a" + "!" * 20 * (i < 2), "rejected": " b"}
        for i, p in enumerate(PROMPTS)
    ]
    for row in rows[:2]:
        row["completion"] = row["chosen"]
    return tiny.lines(here / "d.jsonl", rows)


STEPS = [
    ("sft", ("--max-tokens", 20, "--batch-size", 4, "--epochs", 1.5), 6, 2),
    ("sft", ("--max-tokens", 99, "--batch-size", 3, "--steps", 4), 8, 4),
    ("reward", ("--max-tokens", 20, "--batch-size", 2, "--epochs", 1), 6, 3),
]


@pytest.mark.parametrize(("verb", "words", "rows", "steps"), STEPS)
def test_rows_and_steps_are_those_of_the_run(plaudit, models, data, verb, words, rows, steps):
    words = (verb, "--model", models / "plain", "--data", data, *QUICK, *words)
    said = plaudit("explain", *words)
    told = announced(said, r"(\d+) rows to learn from; (\d+) steps of (\d+): each row is seen (\S+) times\.")
    size = int(words[words.index("--batch-size") + 1])
    assert told == [str(rows), str(steps), str(size), f"{steps * size / rows:.2f}"]
    assert ("2 of 8" in said.out) == (rows == 6)
    assert not Path("runs").exists()  # explaining leaves nothing behind
    assert happened(plaudit, *words) == steps


@pytest.mark.parametrize(("words", "steps"), [(("--epochs", 2), 16), (("--steps", 3), 3)])
def test_rollouts_and_steps_are_those_of_the_run(plaudit, models, prompts, words, steps):
    words = (
        "ppo", "--model", models / "plain", "--data", prompts, *QUICK, "--rewards", "count:e", "--rollout", 8,
        "--group", 2, "--batch-size", 4, "--reuse", 2, "--max-new-tokens", 2, *words,
    )  # fmt: skip
    said = plaudit("explain", *words)
    assert announced(said, r"(\d+) prompts; a rollout is (\d+) completions of (\d+) prompts") == ["8", "8", "4"]
    assert announced(said, r"learned from in (\d+) steps of (\d+) completions") == ["4", "4"]
    told = announced(said, r"\n(\d+) steps: each prompt is asked (\S+) times")
    assert told == [str(steps), f"{steps / 4 * 4 / 8:.2f}"]
    assert happened(plaudit, *words) == steps


@pytest.mark.parametrize(
    ("kind", "words"),
    [("plain", ()), ("plain", ("--train-layers", 1)), ("plain", ("--lora-rank", 3)), ("chat", ("--lora-rank", 1))],
)
def test_weights_and_their_memory_are_counted_exactly(plaudit, models, demonstrations, kind, words):
    options = {words[0].removeprefix("--").replace("-", "_"): words[1]} if words else {}
    policy = load_policy(str(models / kind), **options)
    learning = sum(p.numel() for p in policy.learning().values())
    total = sum(p.numel() for name, p in policy.named_parameters() if "lora" not in name)
    said = plaudit("explain", "sft", "--model", models / kind, "--data", demonstrations, *QUICK, *words)
    told = announced(said, r"([\d,]+) weights, of which ([\d,]+) learn; computing in (\w+)\.")
    assert told == [str(total), str(learning), "float32"]
    assert announced(said, r"About (\S+) GB of weights") == [f"{(total * 4 + learning * 12) / 1e9:.2f}"]


def shown(said):
    assert said.code == 0, said.err
    return said.out.rpartition("between ⟦ and ⟧:\n")[2]


def test_the_example_shows_what_is_learned_and_what_is_not(plaudit, here, models, demonstrations, comparisons, prompts):
    plain = ("--model", models / "plain", *QUICK)
    assert shown(plaudit("explain", "sft", *plain, "--data", demonstrations)) == "say one⟦ one!<|end|>⟧\n"
    assert shown(plaudit("explain", "reward", *plain, "--data", comparisons)) == "say one one!<|end|>\n"
    assert shown(plaudit("explain", "ppo", *plain, "--data", prompts, "--rewards", "count:e")) == "say one\n"
    turns = [("user", "hi"), ("assistant", "yes?"), ("user", "bye"), ("assistant", "so long")]
    chat = tiny.lines(here / "chat.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    said = plaudit("explain", "sft", "--model", models / "chat", *QUICK, "--data", chat)
    assert shown(said) == (
        "<user>hi<|end|>\\n<assistant>⟦yes?<|end|>⟧\\n<user>bye<|end|>\\n<assistant>⟦so long<|end|>⟧\\n\n"
    )


def test_settings_are_listed_for_every_verb_and_mistakes_are_the_run_s(plaudit, models, demonstrations, prompts):
    said = plaudit("explain", "sample", "--model", models / "plain", "--n", 3)
    assert said.code == 0
    assert re.search(r"\n│ n +│ 3 +│\n", said.out)
    words = ("--model", models / "plain", "--data", prompts, "--rewards", "count:e", "--batch-size", 7)
    assert plaudit("explain", "ppo", *words).err == "plaudit explain: batch_size (7) must divide rollout (64).\n"
    words = ("--model", models / "plain", "--data", demonstrations, *QUICK, "--max-tokens", 3)
    assert plaudit("explain", "sft", *words).err == (
        "plaudit explain: every demonstration is longer than 3 tokens (the shortest has 13): raise the limit.\n"
    )
