"""What a policy learns from rated texts alone: samples guided by Q - V against SFT's, on the task of the quickstart.

python benchmarks/learning/ilql.py [--betas 1 2 4 8 16] [--steps 200] [--seed 0] [--base runs/quickstart]

Trains Q and V on the human ratings of the quickstart's movie reviews, from its SFT model, and samples continuations of
held-out openings at each strength; the independent judge is VADER's rules. Prints a table. The quickstart must have
been run before.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import plaudit

JUDGE = f"{Path(__file__).parents[2] / 'recipes' / 'judge.py'}:vader"
COLUMNS = ["judge", "win_rate", "win_rate_low", "win_rate_high", "reward", "kl", "distinct_2", "perplexity"]


def learned(asked: argparse.Namespace) -> str:
    """The folder of the policy with its heads."""
    settings = plaudit.ILQL(
        model=str(asked.base / "sft" / "final"),
        data=str(asked.base / "data" / "train.jsonl"),
        output=str(asked.output / f"ilql-{asked.seed}-{asked.steps}"),
        steps=asked.steps,
        seed=asked.seed,
        batch_size=32,
        learning_rate=1e-4,
        train_layers=4,
        expectile=0.8,
        polyak=0.05,
        save_every=0,
        eval_limit=256,
    )
    return str(plaudit.train(settings).final)


def compared(asked: argparse.Namespace, guided: str, beta: float) -> dict[str, dict[str, float]]:
    """Figures of SFT's samples and of those at one strength."""
    settings = plaudit.Evaluate(
        policies=(f"sft={asked.base / 'sft' / 'final'}", f"ilql={guided}"),
        data=str(asked.base / "data" / "heldout.jsonl"),
        rewards=str(asked.base / "reward" / "final"),
        judge=JUDGE,
        output=str(asked.output / f"evaluate-{asked.seed}-{asked.steps}-{beta:g}"),
        ilql_beta=beta,
        prompts=240,
        max_new_tokens=32,
        temperature=0.8,
        seed=asked.seed,
    )
    found: dict[str, dict[str, float]] = plaudit.evaluate(settings).summary
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--betas", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0, 16.0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--output", type=Path, default=Path("runs/learning-ilql"))
    asked = parser.parse_args()
    guided = learned(asked)
    rows = {}
    for beta in asked.betas:
        found = compared(asked, guided, beta)
        rows["sft"] = found["sft"]
        rows[f"beta {beta:g}"] = found["ilql"]
    print(f"| samples | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[c]:.3g}' if c in row else '' for c in COLUMNS)} |")


if __name__ == "__main__":
    main()
