"""The quickstart, timed and judged: `python benchmarks/quickstart.py [--seeds 0 1 2] [--output FOLDER]`.

Prints one table row for each seed, with the cores that other processes used meanwhile. Needs `plaudit pull` to have
run, or an index to pull from; what is measured is everything after the installation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from plaudit.machine import Guard

STAGES = ("sft", "reward", "ppo", "evaluate")


def run(seed: int, output: Path) -> dict[str, float]:
    """One quickstart from nothing, and its figures."""
    shutil.rmtree(output, ignore_errors=True)
    overrides = [f"output={output}", *(f"{stage}.seed={seed}" for stage in STAGES)]
    with Guard() as guard:
        subprocess.run([sys.executable, "-m", "plaudit.cli", "run", "recipes/quickstart.yaml", *overrides], check=True)
    found = json.loads((output / "summary.json").read_text())
    sft, ppo = found["evaluate"]["sft"], found["evaluate"]["ppo"]
    stages = found["stages"]
    disk = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6
    return {
        "seed": seed,
        "minutes": guard.seconds / 60,
        "others' cores": guard.others,
        **{f"{stage} s": stages[stage]["seconds"] for stage in STAGES},
        "peak MB": max(stages[stage]["peak_memory_mb"] for stage in STAGES),
        "disk MB": disk,
        "nll before": found["sft"]["nll_before"],
        "nll after": found["sft"]["nll_after"],
        "RM accuracy": found["reward"]["accuracy"],
        "one rater": found["reward"]["accuracy_one_rater"],
        "ECE": found["reward"]["calibration_error"],
        "judge SFT": sft["judge"],
        "judge PPO": ppo["judge"],
        "positive SFT": sft["positive_share"],
        "positive PPO": ppo["positive_share"],
        "win rate": found["evaluate"]["win_rate"],
        "low": found["evaluate"]["win_rate_low"],
        "high": found["evaluate"]["win_rate_high"],
        "KL": ppo["kl"],
        "distinct-2 SFT": sft["distinct_2"],
        "distinct-2 PPO": ppo["distinct_2"],
        "perplexity SFT": sft["perplexity"],
        "perplexity PPO": ppo["perplexity"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-quickstart"))
    arguments = parser.parse_args()
    rows = [run(seed, arguments.output / f"seed-{seed}") for seed in arguments.seeds]
    print("| figure | " + " | ".join(f"seed {row['seed']}" for row in rows) + " |")
    print("|---|" + "---|" * len(rows))
    for name in list(rows[0])[1:]:
        print(
            f"| {name} | "
            + " | ".join(f"{row[name]:.3f}" if row[name] < 100 else f"{row[name]:.0f}" for row in rows)
            + " |"
        )


if __name__ == "__main__":
    main()
