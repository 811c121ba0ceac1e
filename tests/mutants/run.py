"""The mutation gate: each seeded fault of `faults.py`, in a copy of the source, against the tests of its file.

python tests/mutants/run.py [NAME ...]

Prints what was killed and what survived; exit status 1 if fewer than 95 % were killed, 2 if a fault cannot be judged.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from faults import FAULTS, TESTS, Fault

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "plaudit"
ASKED = 0.95
LIMIT = 900
"""Seconds; a fault that makes its tests run for longer is noticed too."""


@dataclass(frozen=True)
class Verdict:
    """What became of a fault: killed, survived or broken (its tests could not be run), and the test that noticed."""

    fault: Fault
    outcome: str
    by: str
    seconds: float


def planted(fault: Fault, source: Path = SOURCE) -> str:
    """The text of the file with the fault in it. Raises ValueError if it does not apply exactly once."""
    text = (source / fault.file).read_text("utf-8")
    found = text.count(fault.old)
    if found != 1:
        raise ValueError(
            f"{fault.name}: {fault.file} holds its text {found} times, not once: bring the fault up to date"
        )
    return text.replace(fault.old, fault.new)


def judge(fault: Fault) -> Verdict:
    """Runs the tests of the fault's file until one fails."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder) / "plaudit"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / fault.file).write_text(planted(fault), "utf-8")
        code, output = tested(Path(folder), TESTS[fault.file])
    outcome = {0: "survived", 1: "killed", 124: "killed"}.get(code, "broken")
    failed = [
        line.removeprefix("FAILED ").split(" - ")[0] for line in output.splitlines() if line.startswith("FAILED ")
    ]
    by = failed[0] if failed else ("it ran too long" if code == 124 else "")
    if outcome == "broken":
        by = (output.strip().splitlines() or ["no output"])[-1]
    return Verdict(fault, outcome, by, time.perf_counter() - start)


def tested(source: Path, files: Sequence[str]) -> tuple[int, str]:
    """(exit status, output) of these tests with `plaudit` taken from `source`."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-rf"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(source),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    try:
        done = subprocess.run(
            [*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return 124, ""
    return done.returncode, done.stdout + done.stderr


def unharmed(files: Sequence[str]) -> None:
    """Exits unless the tests pass on a copy without a fault, and do import the copy: else a kill says nothing."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        shutil.copytree(SOURCE, Path(folder) / "plaudit", ignore=shutil.ignore_patterns("__pycache__"))
        asked = [sys.executable, "-c", "import plaudit; print(plaudit.__file__)"]
        environment = {**os.environ, "PYTHONPATH": folder}
        place = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout.strip()
        if not place.startswith(folder):
            sys.exit(f"the copies are not what is tested, but {place}")
        code, output = tested(Path(folder), files)
    if code != 0:
        print(output)
        sys.exit("the tests fail without any fault: mend them first")


def main(names: Sequence[str]) -> int:
    """Judges all faults, or those named, two at a time."""
    faults = [fault for fault in FAULTS if not names or fault.name in names]
    for fault in faults:
        planted(fault)
    unharmed(sorted({test for fault in faults for test in TESTS[fault.file]}))
    verdicts = []
    with ThreadPoolExecutor(2) as pool:
        for verdict in pool.map(judge, faults):
            verdicts.append(verdict)
            print(f"{verdict.outcome:<9} {verdict.fault.file:<32} {verdict.fault.name}", flush=True)
    return report(verdicts)


def report(verdicts: Sequence[Verdict]) -> int:
    """Prints the table, and returns the exit status."""
    width = max(len(verdict.fault.name) for verdict in verdicts)
    print(f"\n{'fault':<{width}} | {'file':<32} | outcome  | seconds | by")
    for verdict in verdicts:
        fault = verdict.fault
        print(
            f"{fault.name:<{width}} | {fault.file:<32} | {verdict.outcome:<8} | {verdict.seconds:>7.0f} | {verdict.by}"
        )
    outcomes = [verdict.outcome for verdict in verdicts]
    rate = outcomes.count("killed") / len(outcomes)
    print(f"\n{outcomes.count('killed')} of {len(outcomes)} faults killed: {rate:.1%}")
    for outcome in ("survived", "broken"):
        names = [verdict.fault.name for verdict in verdicts if verdict.outcome == outcome]
        if names:
            print(f"{outcome}: {', '.join(names)}")
    return 2 if "broken" in outcomes else int(rate < ASKED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
