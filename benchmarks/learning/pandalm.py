"""Agreement and model strengths on PandaLM's test set, beside what is known of it.

python benchmarks/learning/pandalm.py [../shared/data/pandalm]

The folder holds testset-v1.json (arXiv:2306.05087): 999 pairs of answers, each judged by three people. Exits with 1 if
a figure is off by more than a thousandth.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from plaudit.feedback.agreement import summary
from plaudit.feedback.gathering import gather

AGREEMENT = {"raw": 0.9199, "fleiss": 0.8642}
STRENGTHS = {
    "llama-7b": 0.6954,
    "pythia-6.9b": 0.0864,
    "bloom-7b": -0.0128,
    "opt-7b": -0.2143,
    "cerebras-gpt-6.7B": -0.5546,
}
TOLERANCE = 1e-3


def main() -> int:
    """Prints what was asked for and what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("../shared/data/pandalm"))
    labels = gather([parser.parse_args().folder / "testset-v1.json"])
    started = time.perf_counter()
    found = summary(labels)
    seconds = time.perf_counter() - started
    figures, models = found["kinds"]["compare"]["figures"], found["strengths"]["models"]
    rows = [(name, asked, figures[name]) for name, asked in AGREEMENT.items()]
    rows += [(name, asked, models[name]) for name, asked in STRENGTHS.items()]
    print("| figure | asked | found | 95 % interval |\n|---|---|---|---|")
    for name, asked, row in rows:
        print(f"| {name} | {asked:.4f} | {row['value']:.4f} | {row['low']:.4f} to {row['high']:.4f} |")
    print(f"\n{len(labels)} labels of {len(found['people'])} people, all figures in {seconds:.1f} s")
    return int(any(abs(row["value"] - asked) > TOLERANCE for _, asked, row in rows))


if __name__ == "__main__":
    sys.exit(main())
