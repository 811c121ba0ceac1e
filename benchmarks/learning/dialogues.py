"""What plaudit and TRL learn from the same judged dialogues: reward models, and policies taught by preferences.

python benchmarks/learning/dialogues.py [--works reward dpo ipo kto orpo simpo] [--sides plaudit TRL] [--seeds 0]
                                        [--steps 50] [--max-tokens 256] [--data ../shared/data]

Both begin as SmolLM2-135M-Instruct and see the same pairs of hh-rlhf's two test files in the same order, as often, in
the same number type, with the same optimizer: nine tenths of the prompts teach, the others are held out, by the seed.
Both sides' models are then read by the same lines here.

accuracy   of held-out pairs: by the score (reward); by the log-ratio to the model before (dpo, ipo, kto); by the mean
           log-probability of a token (orpo, simpo); with Wilson's interval of 95 %
apart      mean absolute difference of the two sides' losses, over the steps
longer     accuracy of the rule that people prefer the longer answer, in characters, ties half

What is done is kept in runs/learning-dialogues and not done again. Prints a table and draws `dialogues.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from against_trl import SIDES, turn
from plaudit import statistics
from plaudit.data import Order, hold_out
from plaudit.sources import pull
from texts import Lengths, dialogues, write
from works import Work

RATES = {"reward": 2e-5, "dpo": 5e-6, "ipo": 5e-6, "kto": 5e-6, "orpo": 8e-6, "simpo": 5e-6}
OUTPUT = Path("runs/learning-dialogues")


def split(data: Path, model: str, seed: int, limit: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pairs to learn from and pairs that are held out, none of the same prompt on both sides."""
    from plaudit.loading import load_tokenizer

    lengths = Lengths(load_tokenizer(model))
    kept = [pair for pair in dialogues(data, seed) if lengths.within(pair, limit)]
    return hold_out(kept, 0.1, lambda pair: pair["prompt"])


def rows_of(kind: str, pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """What this kind learns from: pairs, or for KTO the answers one by one."""
    if kind != "kto":
        return list(pairs)
    sides = (("chosen", True), ("rejected", False))
    return [{"prompt": p["prompt"], "completion": p[name], "label": good} for p in pairs for name, good in sides]


def works(kind: str, seed: int, pairs: list[dict[str, str]], model: str, asked: argparse.Namespace) -> dict[str, Work]:
    """The same work for each side; plaudit orders the rows by its seed, and TRL is given them in that order."""
    rows = rows_of(kind, pairs)
    batch = 16 if kind == "kto" else 8
    order = Order(len(rows), batch, seed)
    given = {"plaudit": rows, "TRL": [rows[i] for step in range(asked.steps) for i in order[step]]}
    micro = batch if kind == "kto" else 2
    shared = Work(
        kind,
        batch,
        asked.max_tokens,
        RATES[kind],
        micro,
        steps=asked.steps - 1,
        seed=seed,
        falls=True,
        keep=True,
        model=model,
    )
    found = {}
    for side in asked.sides:
        folder = OUTPUT / f"{kind}-{seed}-{asked.steps}-{side}"
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "rows.jsonl", given[side])
        found[side] = replace(shared, data=str(folder / "rows.jsonl"), output=str(folder / "run"))
        found[side].write(folder / "work.json")
    return found


# ------------------------------------------------------------------------------------------------ what was learned


def scores(folder: str, pairs: list[dict[str, str]], ends: bool) -> list[list[float]]:
    """[chosen, rejected] by a reward model. One that `ends` its texts itself is given them without an end."""
    from plaudit.loading import load_reward_model, load_tokenizer
    from plaudit.rewards import ModelReward

    tokenizer = load_tokenizer(folder)
    judge = ModelReward(load_reward_model(folder, tokenizer, precision="bfloat16", learns=False), tokenizer)
    end = "" if ends else tokenizer.eos_token
    prompts = [pair["prompt"] for pair in pairs]
    return [judge(prompts, [pair[name] + end for pair in pairs]) for name in ("chosen", "rejected")]


def logprobs(folder: str, pairs: list[dict[str, str]]) -> list[Any]:
    """[chosen, rejected]: (total log-probability in nats, tokens) of each answer, its end included."""
    import torch

    from plaudit.batch import collate
    from plaudit.comparing import total_logprobs
    from plaudit.loading import load_policy, load_tokenizer
    from plaudit.templates import Template
    from plaudit.world import World

    world = World(torch.device("cpu"), "bfloat16")
    policy, template = load_policy(folder, precision="bfloat16", learns=False), Template(load_tokenizer(folder))
    found = []
    for name in ("chosen", "rejected"):
        texts = [template.encode(pair["prompt"], pair[name]) for pair in pairs]
        batch = collate([text.prompt for text in texts], [text.completion for text in texts])
        found.append((total_logprobs(policy, batch, world, 4096), batch.actions.sum(1).to(torch.float64)))
    return found


def right(work: Work, side: str, pairs: list[dict[str, str]], before: list[Any]) -> list[float]:
    """1 for each pair whose better answer the model prefers, 0.5 where it has no preference."""
    folder = f"{work.output}/final"
    if work.kind == "reward":
        chosen, rejected = scores(folder, pairs, side == "plaudit")
        gaps = [a - b for a, b in zip(chosen, rejected, strict=True)]
    else:
        sums, counts = zip(*logprobs(folder, pairs), strict=True)
        if work.kind in ("orpo", "simpo"):
            values = [total / count for total, count in zip(sums, counts, strict=True)]
        else:
            values = [total - start for total, (start, _) in zip(sums, before, strict=True)]
        gaps = (values[0] - values[1]).tolist()
    return [float(gap > 0) + 0.5 * (gap == 0) for gap in gaps]


def longer(pairs: list[dict[str, str]]) -> list[float]:
    gaps = [len(pair["chosen"]) - len(pair["rejected"]) for pair in pairs]
    return [float(gap > 0) + 0.5 * (gap == 0) for gap in gaps]


def measured(work: Work, side: str, held: list[dict[str, str]], before: list[Any]) -> dict[str, Any]:
    """What this side reports and what its model knows; read again where it is on disk."""
    path = Path(work.output).with_name("found.json")
    if not path.exists():
        found = turn(side, work, tuned=False)
        found["right"] = right(work, side, held, before)
        path.write_text(json.dumps(found))
    found = json.loads(path.read_text())
    print(f"{work.kind} {work.seed}: {side} {mean(found['right']):.3f}", file=sys.stderr, flush=True)
    return found


# ------------------------------------------------------------------------------------------------------------ shown


def line(kind: str, seed: int, held: list[dict[str, str]], found: dict[str, dict[str, Any]]) -> str:
    """A row of the table."""
    cells = [f"{kind} {seed}", str(len(held))]
    for side in SIDES:
        if side in found:
            given = found[side]["right"]
            low, high = statistics.wilson(sum(given), len(given))
            cells += [f"{mean(given):.3f} [{low:.3f}, {high:.3f}]", f"{sum(found[side]['tokens']) / 1e3:.1f}"]
        else:
            cells += ["", ""]
    both = [found[side]["losses"] for side in SIDES if side in found]
    apart = f"{mean(abs(a - b) for a, b in zip(*both, strict=True)):.4f}" if len(both) == 2 else ""
    return "| " + " | ".join([*cells, apart, f"{mean(longer(held)):.3f}"]) + " |"


def draw(curves: dict[tuple[str, int], dict[str, list[float]]], path: Path) -> None:
    """The losses of both sides, a panel for each kind, of the first seed."""
    from matplotlib.figure import Figure

    first = {kind: sides for (kind, seed), sides in reversed(curves.items())}
    kinds = list(first)[::-1]
    figure = Figure(figsize=(10, 2.8 * -(-len(kinds) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(kinds) // 3), min(3, len(kinds)), squeeze=False).ravel()
    for axes, kind in zip_longest(panels, kinds):
        if kind is None:
            axes.set_visible(False)
            continue
        for (side, losses), style in zip(first[kind].items(), ("-", "--"), strict=False):
            axes.plot(range(1, len(losses) + 1), losses, style, label=side, linewidth=1.4)
        axes.set_title(kind)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    asked = parser.parse_args()
    model = str(pull("smollm2-135m-instruct"))
    lines, curves = [], {}
    for seed in asked.seeds:
        pairs, held = split(asked.data, model, seed, asked.max_tokens)
        before = logprobs(model, held) if set(asked.works) - {"reward", "orpo", "simpo"} else []
        for kind in asked.works:
            sides = works(kind, seed, pairs, model, asked)
            found = {side: measured(work, side, held, before) for side, work in sides.items()}
            lines.append(line(kind, seed, held, found))
            curves[kind, seed] = {side: one["losses"] for side, one in found.items()}
    print(f"{asked.steps} steps; pairs of at most {asked.max_tokens} tokens.\n")
    print("| work, seed | held out | plaudit | its tokens, k | TRL | its tokens, k | apart | longer |")
    print("|---|---|---|---|---|---|---|---|")
    print(*lines, sep="\n")
    draw(curves, OUTPUT / "dialogues.png")


if __name__ == "__main__":
    main()
