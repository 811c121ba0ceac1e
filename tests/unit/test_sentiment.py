"""Rewards from classifiers of sentiment: one label of two or of three, and neither of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny
from plaudit.rewards import load_rewards

PROMPTS = ["I want to eat", "I want your", "This day is", "In my opinion"]
SAID = [" your puppy", " puppy", " horrible", ""]


def probabilities(folder: str) -> torch.Tensor:
    """(texts, labels), by transformers alone."""
    model, words = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [words(prompt + said, return_tensors="pt") for prompt, said in zip(PROMPTS, SAID, strict=True)]
    with torch.no_grad():
        return torch.cat([model(**row).logits.softmax(-1) for row in rows])


def neutral(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The function of the documentation's exercise."""
    page = Path(__file__).parents[2] / "docs" / "rewards.md"
    found = re.search(r"```python\n(# neutral\.py\n.*?)```", page.read_text("utf-8"), re.DOTALL)
    assert found is not None
    (folder / "neutral.py").write_text(found[1])
    monkeypatch.chdir(folder)
    return load_rewards("neutral.py:neutral")


def test_s4_14_neutral_is_where_neither_label_is_likelier(tmp_path, monkeypatch):
    likely = probabilities(tiny.classifier(tmp_path / "sentiment", ("NEGATIVE", "POSITIVE"), seed=5))
    found = neutral(tmp_path, monkeypatch)(PROMPTS, SAID, {})
    torch.testing.assert_close(found, 1 - (likely[:, 1] - likely[:, 0]).abs(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found, 2 * likely.amin(1), atol=1e-5, rtol=0)
    assert float(found.max() - found.min()) > 0.01


@pytest.mark.parametrize("place", [0, 1, 2])
def test_s4_08_s4_13_s4_15_one_label_of_three(tmp_path, place):
    labels = ("positive", "negative", "neutral")
    folder = tiny.classifier(tmp_path / "finance", labels, seed=6)
    found = load_rewards(f"label:{labels[place]}@{folder}")(PROMPTS, SAID, {})
    torch.testing.assert_close(found, probabilities(folder)[:, place], atol=1e-5, rtol=0)
