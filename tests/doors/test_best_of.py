"""`plaudit sample --best-of`: only the best completion of each prompt is written, with its score."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

REWARDS = """
def long(completions, **columns):
    return [float(len(set(text))) for text in completions]


def named(completions, name, **columns):
    return [100.0 if n == "b" else 0.0 for n in name]
"""


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_only_the_best_of_each_prompt_is_written(plaudit, here, models, prompts):
    (here / "r.py").write_text(REWARDS)
    rows = [{"prompt": row["prompt"], "name": "ab"[i % 2]} for i, row in enumerate(read(prompts))]
    Path("named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        "sample",
        "--model",
        models / "plain",
        "--data",
        "named.jsonl",
        "--n",
        4,
        "--max-new-tokens",
        6,
        "--rows",
        12,
    )
    assert plaudit(*words, "--output", "all.jsonl").code == 0
    assert plaudit(*words, "--output", "best.jsonl", "--best-of", "r.py:long", "r.py:named").code == 0
    everything, best = read("all.jsonl"), read("best.jsonl")
    assert len(everything) == 4 * len(best) == 4 * len(rows)
    assert all("score" not in row for row in everything)
    for i, (row, kept) in enumerate(zip(rows, best, strict=True)):
        assert (kept["prompt"], kept["name"]) == (row["prompt"], row["name"])
        group = everything[4 * i : 4 * i + 4]
        worth = [len(set(one["completion"])) for one in group]
        assert kept["score"] == max(worth) + 100 * (i % 2)
        assert len(set(kept["completion"])) == max(worth)
        assert {**kept, "score": 0} in [{**one, "score": 0} for one in group]
    assert len({row["score"] for row in best}) > 2


def test_in_the_terminal_too(plaudit, here, models, monkeypatch):
    (here / "r.py").write_text(REWARDS)
    words = ("sample", "--model", models / "plain", "--n", 3, "--max-new-tokens", 6)
    found = {}
    for more in ((), ("--best-of", "r.py:long")):  # the same seed, so the same three completions
        monkeypatch.setattr(sys, "stdin", io.StringIO("say one\n\n"))
        said = plaudit(*words, *more)
        assert said.code == 0
        found[more] = said.out.removeprefix("prompt: ").removesuffix("\nprompt: ")
    best = found["--best-of", "r.py:long"]
    assert best in found[()]
    assert 0 < len(best) < len(found[()])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--n", 4, "--best-of", "r.py:short"), "reward 'r.py:short': r.py has no function 'short'"),
        (
            ("--best-of", "count:a"),
            "best_of: there is one completion of each prompt and nothing to choose from: raise n.",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(words, said, plaudit, here, models, prompts):
    (here / "r.py").write_text(REWARDS)
    found = plaudit("sample", "--model", models / "plain", "--data", prompts, "--output", "none.jsonl", *words)
    assert found.code == 2
    assert said in found.err
    assert not Path("none.jsonl").exists()
