"""The seeded faults of the mutation gate still fit the source, and each has tests to notice it."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "mutants"


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


faults, run = loaded("faults"), loaded("run")


def test_b40_there_are_enough_faults_and_their_names_differ():
    assert len(faults.FAULTS) >= 40
    assert [name for name, count in Counter(fault.name for fault in faults.FAULTS).items() if count > 1] == []


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.name)
def test_b40_every_fault_applies_exactly_once_and_is_still_python(fault):
    compile(run.planted(fault), fault.file, "exec")
    assert fault.old != fault.new


def test_b40_every_file_with_faults_has_tests_that_exist():
    for file in {fault.file for fault in faults.FAULTS}:
        assert faults.TESTS[file]
        for test in faults.TESTS[file]:
            assert (run.ROOT / test.partition("::")[0]).exists(), test


def test_a_fault_that_no_longer_applies_is_told_of(tmp_path):
    (tmp_path / "losses.py").write_text("x = 1\nx = 1\n")
    for old in ("x = 1", "x = 2"):
        with pytest.raises(ValueError, match=r"gone: losses\.py holds its text \d times, not once"):
            run.planted(faults.Fault("gone", "losses.py", old, "x = 3"), tmp_path)


def test_too_few_kills_fail_the_gate(capsys):
    fault = faults.FAULTS[0]
    verdicts = [run.Verdict(fault, outcome, "", 0.0) for outcome in ["killed"] * 19 + ["survived"]]
    assert run.report(verdicts) == 0
    assert run.report(verdicts + verdicts[-1:]) == 1
    assert run.report([*verdicts, run.Verdict(fault, "broken", "", 0.0)]) == 2
    assert "19 of 20 faults killed: 95.0%" in capsys.readouterr().out
