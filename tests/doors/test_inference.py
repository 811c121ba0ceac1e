"""Sampling and comparing, against what plain transformers gives on the same tokens."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from doorway import PROMPTS, times
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from plaudit import Evaluate, comparing, evaluate, hooks, statistics
from plaudit.encoding import asked_of
from plaudit.loading import load_policy
from plaudit.records import Prompt
from plaudit.sampler import Sampling
from plaudit.templates import Template
from plaudit.world import World

LENGTH = """
def length(prompts, completions, **columns):
    return [len(text) - 4.0 for text in completions]

def mood(prompts, completions, **columns):
    return [sum(map(ord, text)) % 7 - 3.0 for text in completions]

def word(prompts, completions, **columns):
    return [float(i) for i in columns["id"]]

def turns(prompts, completions, **columns):
    assert all(p[-1]["role"] == "user" and c[0]["role"] == "assistant" for p, c in zip(prompts, completions))
    return [float(len(p)) for p in prompts]
"""


@pytest.fixture(autouse=True)
def functions(here):
    (here / "r.py").write_text(LENGTH)


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def summed_by_hand(folder, batch, temperature):
    """The log-probability of each row's actions, from the logits of plain transformers, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    sums = []
    for tokens, length, actions in zip(batch.tokens, batch.lengths.tolist(), batch.actions, strict=True):
        with torch.no_grad():
            logits = model(tokens[None, :length]).logits[0] / temperature
        chosen = logits[:-1].log_softmax(1).gather(1, tokens[1:length, None])[:, 0]
        sums.append(float(chosen[actions[1:length]].sum()))
    return torch.tensor(sums, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------- comparing


def test_kl_and_perplexity_are_those_of_the_logits(models, prompts):
    temperature, folders = 0.8, {"one": str(models / "plain"), "other": str(models / "chat")}
    run = evaluate(
        Evaluate(
            policies=tuple(f"{name}={folder}" for name, folder in folders.items()), data=prompts, rewards="r.py:length",
            max_new_tokens=12, temperature=temperature, precision="float32", seed=3, rows=3,
        )
    )  # fmt: skip
    template = Template(AutoTokenizer.from_pretrained(folders["one"]))
    asked = asked_of([Prompt(p) for p in PROMPTS], template)
    limits = Sampling(max_new_tokens=12, temperature=temperature, stop_ids=(template.end,))
    for name, folder in folders.items():
        policy = load_policy(folder)
        batch, texts = comparing.answer(
            policy, asked, template, limits, World.start(), seed=3, rows=3, advance=lambda count: None
        )
        own, kept = (summed_by_hand(f, batch, temperature) for f in (folder, folders["one"]))
        found = run.summary[name]
        assert found["kl"] == pytest.approx(float((own - kept).mean()), abs=1e-4)
        assert found["perplexity"] == pytest.approx(math.exp(-kept.sum() / batch.actions.sum()), rel=1e-4)
        assert found["completion_tokens"] == pytest.approx(float(batch.actions.sum()) / 8)
        assert found["distinct_2"] == statistics.distinct_n(texts, 2)
        assert found["reward"] == pytest.approx(sum(len(text) - 4 for text in texts) / 8)
    assert run.summary["one"]["kl"] == 0.0
    assert run.summary["other"]["kl"] > 1


def test_a_policy_beside_itself_is_at_no_distance_and_on_a_par(here, models, prompts):
    twin = tiny.folder(here / "twin", seed=0, chat=False)
    run = evaluate(
        Evaluate(
            policies=(f"a={models / 'plain'}", f"b={twin}"), data=prompts, rewards="r.py:length", max_new_tokens=6,
        )
    )  # fmt: skip
    assert run.summary["a"]["kl"] == run.summary["b"]["kl"] == 0.0  # in whatever precision the machine has
    assert run.summary["win_rate"] == 0.5
    assert run.summary["win_rate_low"] <= 0.5 <= run.summary["win_rate_high"]
    assert run.summary["a"]["perplexity"] == run.summary["b"]["perplexity"]
    assert all(row["a"] == row["b"] for row in rows(run.folder / "samples.jsonl"))


def test_win_rate_and_shares_are_those_of_the_samples(plaudit, models, prompts):
    words = (
        "evaluate", "--policies", f"one={models / 'plain'}", f"other={models / 'chat'}", "--model", models / "judge",
        "--data", prompts, "--rewards", "r.py:word", "--judge", "r.py:mood", "--judge-positive", "1",
        "--max-new-tokens", "8", "--precision", "float32", "--prompts", "7", "--shown", "9",
    )  # fmt: skip
    said = plaudit(*words)
    assert (said.code, said.out) == (0, "runs/evaluate\n")
    summary = json.loads(Path("runs/evaluate/summary.json").read_text())
    sampled = rows("runs/evaluate/samples.jsonl")
    assert [row["prompt"] for row in sampled] == PROMPTS[:7]
    names = ["one", "one_judge", "one_reward", "other", "other_judge", "other_reward"]
    assert all(sorted(row) == sorted(["step", "prompt", *names]) for row in sampled)
    for name in ("one", "other"):
        judged = [row[f"{name}_judge"] for row in sampled]
        assert judged == [sum(map(ord, row[name])) % 7 - 3.0 for row in sampled]
        assert summary[name]["judge"] == pytest.approx(sum(judged) / 7)
        assert summary[name]["positive_share"] == pytest.approx(sum(value > 1 for value in judged) / 7)
        assert summary[name]["reward"] == sum(range(7)) / 7
        assert summary[name]["kl"] > 1  # neither is the reference
    leads = [row["other_judge"] - row["one_judge"] for row in sampled]
    won = sum(1.0 if lead > 0 else 0.5 if lead == 0 else 0.0 for lead in leads)
    assert won != 3.5  # or it would not matter who is compared with whom
    assert summary["win_rate"] == summary["other"]["win_rate"] == pytest.approx(won / 7)
    assert summary["prompts"] == 7
    assert [len(values) for values in summary["histograms"].values()] == [7, 7]

    before = times("runs/evaluate")
    assert plaudit(*words).code == 0
    assert times("runs/evaluate") == before


def test_conversations_are_asked_with_the_template_and_judged_as_conversations(here, models):
    asked = [[{"role": "user", "content": p}] for p in PROMPTS[:3]]
    data = tiny.lines(here / "chats.jsonl", [{"messages": chat} for chat in asked])
    run = evaluate(
        Evaluate(policies=(str(models / "chat"),), data=data, rewards="r.py:turns", max_new_tokens=4, shown=2)
    )
    assert [row["prompt"] for row in rows(run.folder / "samples.jsonl")] == asked[:2]
    assert run.summary["chat"]["reward"] == 1.0
    assert "win_rate" not in run.summary


def test_repeated_and_overlong_prompts_are_not_asked(plaudit, here, models):
    asked = ["say one", "say one", "say something rather long"]
    data = tiny.lines(here / "p.jsonl", [{"prompt": p} for p in asked])
    words = ("--policies", models / "plain", "--data", data, "--rewards", "count:a", "--max-new-tokens", 2)
    said = plaudit("evaluate", *words, "--max-prompt-tokens", 10)
    assert said.code == 0
    assert "1 of 2 prompts are longer than 10 tokens and left out.\n" in said.err
    assert json.loads(Path("runs/evaluate/summary.json").read_text())["prompts"] == 1


# ------------------------------------------------------------------------------------------------------ sampling


def sample(models, prompts, *words):
    return ("sample", "--model", models / "plain", "--data", prompts, "--precision", "float32", *words)


def test_samples_keep_their_columns_and_repeat_with_their_seed(plaudit, models, prompts):
    words = sample(models, prompts, "--n", 2, "--max-new-tokens", 5)
    said = plaudit(*words, "--output", "deep/a.jsonl")
    assert (said.code, said.out, said.err) == (0, "deep/a.jsonl\n", "")
    drawn = rows("deep/a.jsonl")
    assert [(row["prompt"], row["id"]) for row in drawn] == [(p, i) for i, p in enumerate(PROMPTS) for _ in range(2)]
    assert all(set(row) == {"id", "prompt", "completion", "truncated"} for row in drawn)
    assert len({row["completion"] for row in drawn}) > 8
    first = Path("deep/a.jsonl").read_bytes()
    assert plaudit(*words, "--output", "b.jsonl", "--rows", 5).code == 0
    assert Path("b.jsonl").read_bytes() == first  # however many are drawn side by side
    assert plaudit(*words, "--output", "c.jsonl", "--seed", 1).code == 0
    assert Path("c.jsonl").read_bytes() != first
    said = plaudit(*words, "--output", "deep/a.jsonl", "--seed", 1)
    assert said.code == 2
    assert Path("deep/a.jsonl").read_bytes() == first


def test_temperature_0_is_transformers_greedy_answer_and_limit_takes_the_first(plaudit, models, prompts):
    said = plaudit(*sample(models, prompts, "--temperature", 0, "--limit", 3, "--max-new-tokens", 9))
    assert said.out == "samples.jsonl\n"
    drawn = rows("samples.jsonl")
    assert [row["prompt"] for row in drawn] == PROMPTS[:3]
    model, tokenizer = (
        auto.from_pretrained(models / "plain") for auto in (AutoModelForCausalLM, AutoTokenizer)
    )  # fmt: skip
    for row in drawn:
        asked = tokenizer(row["prompt"], return_tensors="pt")
        whole = model.generate(**asked, max_new_tokens=9, do_sample=False, pad_token_id=0)[0]
        answer = whole[asked.input_ids.shape[1] :]
        assert row["completion"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert row["truncated"] == (answer[-1].item() != tokenizer.eos_token_id)


def test_overlong_prompts_are_counted_and_stop_strings_end_a_completion(plaudit, models, prompts):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models / "plain"), AutoTokenizer.from_pretrained(
        models / "plain"
    )  # fmt: skip
    asked = tokenizer("say one", return_tensors="pt")
    whole = model.generate(**asked, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
    said = plaudit(*sample(models, prompts, "--temperature", 0, "--max-prompt-tokens", 7, "--max-new-tokens", 6))
    assert said.code == 0
    assert "5 of 8 prompts are longer than 7 tokens and left out.\n" in said.err
    full = next(row["completion"] for row in rows("samples.jsonl") if row["prompt"] == "say one")
    assert full == tokenizer.decode(whole[7:], skip_special_tokens=True)
    ending = full[1]
    said = plaudit(
        *sample(models, prompts, "--temperature", 0, "--limit", 1, "--stop", ending, "--output", "s.jsonl")
    )  # fmt: skip
    assert said.code == 0
    (row,) = rows("s.jsonl")
    assert row["completion"] == full[: full.index(ending) + 1]
    assert row["truncated"] is False


def test_in_a_terminal_sampling_and_comparing_show_a_bar_with_a_rate(plaudit, models, prompts, monkeypatch):
    words = {
        "prompts": sample(models, prompts, "--max-new-tokens", 3, "--rows", 2),
        "completions": (
            "evaluate", "--policies", models / "plain", "--data", prompts, "--rewards", "count:a", "--rows", 2,
            "--max-new-tokens", 3,
        ),
    }  # fmt: skip
    for unit, command in words.items():
        terminal = Console(file=io.StringIO(), force_terminal=True, width=140)
        monkeypatch.setattr(hooks, "console", terminal)
        assert plaudit(*command).code == 0
        last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.file.getvalue()).strip().split("\r")[-1].strip()
        assert re.fullmatch(rf"{command[0]} ━+ 8/8 {unit} [\d.]+ a second 0:00:00", last), last


def test_in_the_terminal_each_line_is_answered_until_an_empty_one_or_the_end(plaudit, models, prompts, monkeypatch):
    greedy = ("--temperature", 0, "--max-new-tokens", 5)
    plaudit(*sample(models, prompts, *greedy, "--limit", 2))
    one, two = (row["completion"] for row in rows("samples.jsonl"))
    words = ("sample", "--model", models / "plain", "--precision", "float32", *greedy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("say one\nsay two\n\nsay three\n"))
    said = plaudit(*words)
    assert said.code == 0
    assert said.err == "Type a prompt; an empty line ends.\n"
    assert said.out.replace("prompt: ", "") == f"{one}\n{two}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'long ' * 60}\nsay two\n"))  # and then nothing more
    said = plaudit(*words)
    assert said.code == 0
    assert "the model's context is 256" in said.err
    assert said.out.replace("prompt: ", "") == f"{two}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("say one\n"))
    said = plaudit("sample", "--model", models / "chat", "--n", 2, *greedy)
    assert said.err == "Type a prompt; an empty line ends. The model is asked as an assistant.\n"
    answers = said.out.replace("prompt: ", "")
    assert answers[: len(answers) // 2] * 2 == answers
