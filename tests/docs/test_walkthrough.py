"""The script with cells, run as it stands but for its size."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import examples

SCRIPT = Path(__file__).parents[2] / "docs" / "walkthrough.py"


def cells() -> list[str]:
    text = SCRIPT.read_text("utf-8")
    return [cell for cell in re.split(r"^# %%(?! \[markdown\]).*\n", text, flags=re.MULTILINE)[1:] if cell.strip()]


def test_s0_03_the_walkthrough_runs_cell_by_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text(examples.play(60))
    space: dict[str, object] = {"__name__": "walkthrough"}
    found = cells()
    assert len(found) == 7
    for cell in found:
        small = re.sub(r"steps=\d+", "steps=2", cell).replace("layers=3,width=96", "layers=1,width=16")
        small = small.replace("layers=2,width=64", "layers=1,width=16").replace("max_new_tokens=20", "max_new_tokens=4")
        exec(compile(small, SCRIPT.name, "exec"), space)
    said = capsys.readouterr().out
    assert "correlation with the counts:" in said
    assert "win rate" in said
    assert said.count("'completion'") == 5


def test_s0_03_every_cell_can_be_read_by_itself():
    for cell in cells():
        ast.parse(cell)
