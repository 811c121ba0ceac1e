"""Which number type, budget and layout `explain` announces, and that the run takes these."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from doorway import PROMPTS, QUICK

import tiny
from plaudit import budget, speed
from plaudit.policy import Policy

LENGTHS = [1, 2, 60, 3, 4, 5, 6, 7]


def table(said, title):
    """The rows of one of the tables, as lists of texts."""
    assert said.code == 0, said.err
    lines = said.out.partition(title)[2].splitlines()
    ends = next(i for i, line in enumerate(lines) if line.startswith("└"))
    rows = (re.split("[│┃]", line)[1:-1] for line in lines[:ends] if line.startswith("│"))
    return [[cell.strip() for cell in row] for row in rows]


@pytest.fixture
def computed(monkeypatch):
    """The size of every layout that a policy took."""
    sizes = []
    own = Policy.layout

    def layout(self, batch):
        found = own(self, batch)
        if torch.is_grad_enabled():
            sizes.append(found.source.numel())
        return found

    monkeypatch.setattr(Policy, "layout", layout)
    return sizes


@pytest.fixture
def data(here):
    """Pairs whose prompts are long enough to be shared, and answers of very different length."""
    rows = [
        {"prompt": f"{p} and then " * 3, "completion": " a" * n, "chosen": " a" * n, "rejected": " b"}
        for p, n in zip(PROMPTS, LENGTHS, strict=True)
    ]
    return tiny.lines(here / "d.jsonl", rows)


@pytest.mark.parametrize("verb", ["sft", "dpo", "reward"])
@pytest.mark.parametrize("tokens", [160, 4096])
def test_the_layout_is_the_run_s(plaudit, models, data, computed, verb, tokens):
    words = (verb, "--model", models / "plain", "--data", data, *QUICK, "--batch-size", 8, "--steps", 1)
    words = (*words, "--tokens-per-pass", tokens)
    said = plaudit("explain", *words)
    rows = {name: int(count.replace(",", "")) for name, count, _ in table(said, "Layout of the first batch")}
    taken = {name: int(passes) for name, _, passes in table(said, "Layout of the first batch")}
    assert list(rows) == ["padded", "packed", "prompt shared"][: 2 + (verb != "sft")]
    computed.clear()  # explaining has looked at layouts too
    assert plaudit(*words).code == 0
    assert len(computed) == sum(taken.values()) == int(re.search(r"tokens in (\d+) pass", said.out)[1])
    if tokens == 4096:
        expected = "packed" if verb == "sft" else "prompt shared"
        assert taken[expected] == 1
        assert rows[expected] == computed[0] < rows["padded"]
    lengths = [len(f"{p} and then " * 3) for p in PROMPTS]
    texts = [(n + 2 * more + 1, n + 3) for n, more in zip(lengths, LENGTHS, strict=True)]
    logical = sum(chosen + (rejected if verb != "sft" else 0) for chosen, rejected in texts)
    assert f"{16 if verb != 'sft' else 8} rows, {logical:,} tokens in" in said.out
    if tokens == 4096:
        assert rows["padded"] == max(chosen for chosen, _ in texts) * (16 if verb != "sft" else 8)


def test_rows_that_are_yet_to_be_sampled_run_to_the_limit(plaudit, models, prompts):
    words = ("ppo", "--model", models / "plain", "--data", prompts, *QUICK, "--rewards", "count:e", "--rollout", 8)
    said = plaudit("explain", *words, "--group", 4, "--batch-size", 8, "--max-new-tokens", 5, "--seed", 1)
    title = re.search(r"first batch: 8 rows, (\d+) tokens in 1 pass, if every completion runs to the limit", said.out)
    shared = next(row for row in table(said, "Layout of the first batch") if row[0] == "prompt shared")
    sizes = [len(p) for p in PROMPTS]
    pairs = {4 * (a + b) + 8 * 5: a + b + 8 * 5 for i, a in enumerate(sizes) for b in sizes[i + 1 :]}
    assert int(title[1]) in pairs
    # Each prompt once, and beside it its four completions; two such rows may differ in length.
    assert shared[2] == "1"
    assert pairs[int(title[1])] <= int(shared[1]) <= pairs[int(title[1])] + max(sizes) - min(sizes)


def test_an_encoder_decoder_computes_prompts_and_answers_apart(plaudit, here, demonstrations):
    model = tiny.folder(here / "t5", "t5", chat=False)
    said = plaudit("explain", "sft", "--model", model, "--data", demonstrations, *QUICK, "--batch-size", 8)
    longest = max(map(len, PROMPTS))  # what is learned repeats all but four bytes, and adds a space, a mark and the end
    assert table(said, "Layout of the first batch") == [["padded", str(8 * longest + 8 * (longest - 1)), "1"]]


def test_number_type_and_budget_are_those_of_the_run_and_both_say_why(plaudit, here, models, demonstrations):
    words = ("sft", "--model", models / "plain", "--data", demonstrations, "--steps", 1, "--batch-size", 2)
    said = plaudit("explain", *words)
    device, precision, tokens = table(said, "On this machine")
    assert device == ["device", "cpu", f"{speed.machine.processor()}, 1 thread"]
    measured = r"bfloat16 is \d+\.\d\d times as fast: \d+ against \d+ GFLOP/s, measured"
    assert re.match(measured if speed.has_bfloat16() else "this processor has no instructions", precision[2])
    assert tokens[:2] == ["tokens a pass", "4,096"]
    if budget.free_on(torch.device("cpu")) is not None:
        assert re.search(r"GB are free, .* GB beside the model; 50% of that holds [\d,]+ tokens of", tokens[2])
    assert plaudit(*words).code == 0
    kept = json.loads(Path("runs/sft/machine.json").read_text())
    assert kept == {"precision": precision[1], "tokens_per_pass": 4096}
    asked = plaudit("explain", *words, "--precision", "bfloat16", "--tokens-per-pass", 1000)
    rows = [["number type", "bfloat16", "as asked for"], ["tokens a pass", "1,000", "as asked for"]]
    assert table(asked, "On this machine")[1:] == rows


def test_a_run_that_has_begun_is_explained_as_it_goes_on(plaudit, models, demonstrations):
    words = ("sft", "--model", models / "plain", "--data", demonstrations, "--save-every", 1, "--steps", 2)
    assert plaudit(*words, "--batch-size", 2).code == 0
    kept = {"precision": "bfloat16", "tokens_per_pass": 768}
    Path("runs/sft/machine.json").write_text(json.dumps(kept))
    why = "as when this run began, so that it goes on alike"
    rows = [["number type", "bfloat16", why], ["tokens a pass", "768", why]]
    assert table(plaudit("explain", *words), "On this machine")[1:] == rows
