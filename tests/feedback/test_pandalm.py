"""Agreement and strengths on PandaLM's test set (arXiv:2306.05087): 999 pairs of answers of five models, each judged by
three people. From its counts always, and from the data themselves where they lie beside the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from labelled import compared, item, label

from learning import pandalm
from plaudit.feedback import kappas
from plaudit.feedback.items import Answer
from plaudit.feedback.reliability import strengths

DATA = Path(__file__).parents[3] / "shared" / "data" / "pandalm"
TRIPLES = {"222": 426, "111": 368, "===": 85, "122": 36, "112": 33, "==1": 21, "==2": 13, "=22": 10, "=11": 7}
"""How many pairs three people judged so, in whatever order."""
WON = {
    ("bloom-7b", "cerebras-gpt-6.7B"): (177, 35, 88),
    ("bloom-7b", "llama-7b"): (84, 35, 214),
    ("bloom-7b", "opt-7b"): (131, 30, 106),
    ("bloom-7b", "pythia-6.9b"): (139, 36, 146),
    ("cerebras-gpt-6.7B", "llama-7b"): (74, 20, 236),
    ("cerebras-gpt-6.7B", "opt-7b"): (93, 29, 151),
    ("cerebras-gpt-6.7B", "pythia-6.9b"): (76, 37, 160),
    ("llama-7b", "opt-7b"): (211, 33, 74),
    ("llama-7b", "pythia-6.9b"): (171, 26, 85),
    ("opt-7b", "pythia-6.9b"): (99, 45, 156),
}
"""Verdicts for the first model, ties, and verdicts for the second."""


def test_b08_agreement_of_three_people_on_pandalm():
    triples = [triple for triple, count in TRIPLES.items() for _ in range(count)]
    assert len(triples) == 999
    labels = compared({str(person): "".join(triple[person] for triple in triples) for person in range(3)})
    found = kappas.figures(kappas.table(labels, "compare"), resamples=2)
    assert found["raw"]["value"] == pytest.approx(pandalm.AGREEMENT["raw"], abs=1e-3)
    assert found["fleiss"]["value"] == pytest.approx(pandalm.AGREEMENT["fleiss"], abs=1e-3)


def test_b08_strengths_of_five_models_on_pandalm():
    labels = [
        label(item(f"{models} {ranks} {number}", models=models), "ann", Answer(ranks))
        for models, counts in WON.items()
        for ranks, count in zip(((1, 2), (1, 1), (2, 1)), counts, strict=True)
        for number in range(count)
    ]
    assert len(labels) == 2997
    found = strengths(labels, 0, 2)["models"]
    assert {name: row["value"] for name, row in found.items()} == pytest.approx(pandalm.STRENGTHS, abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"PandaLM's test set is not there: put testset-v1.json into {DATA}")
def test_b08_pandalm_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pandalm.py", str(DATA)])
    assert pandalm.main() == 0
    assert "2997 labels of 3 people" in capsys.readouterr().out
