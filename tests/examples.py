"""A little language, judgements of it, and a small run of every kind that learns from them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import tiny
from plaudit import PPO, SFT, Reward, recipes
from plaudit.families import family_of

LETTERS = "abcdefgh"
REWARDS = """
def variety(prompts, completions, **columns):
    return [len(set(text)) / 4 - 0.1 * len(prompt) for prompt, text in zip(prompts, completions, strict=True)]
"""


def alphabet(count: int) -> list[dict[str, str]]:
    """After a letter come the five that follow it in the alphabet, which begins again after its last."""
    rows = []
    for i in range(count):
        start = (i * 5) % len(LETTERS)
        following = "".join(LETTERS[(start + k) % len(LETTERS)] for k in range(1, 6))
        rows.append({"prompt": f"{i} {LETTERS[start]}", "completion": following[: 3 + i % 3]})
    return rows


def words(count: int, seed: int = 0) -> list[str]:
    """Random letters, of random lengths."""
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=draw.randint(4, 9))) for _ in range(count)]


def judgements(kind: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """What somebody says who likes the letter a and nothing else."""
    draw = random.Random(seed + 1)
    texts = words(count * 6, seed)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        some = texts[6 * i : 6 * i + 6]
        likes = [text.count("a") for text in some]
        prompt = f"{i}:"
        if kind == "rankings":
            size = draw.randint(3, 5)
            order = sorted(set(likes[:size]), reverse=True)
            names = [[chr(65 + k) for k in range(size) if likes[k] == like] for like in order]
            ranking = " > ".join(" = ".join(tier) for tier in names)
            rows.append({"prompt": prompt, "completions": some[:size], "ranking": ranking})
        elif kind == "ratings":
            ratings = [likes[0] + draw.choice((0, 0, 0, 1)) for _ in range(draw.randint(2, 4))]
            rows.append({"prompt": prompt, "completion": some[0], "ratings": ratings})
        else:
            best, worst = likes.index(max(likes)), likes.index(min(likes))
            if likes[best] > likes[worst]:
                rows.append({"prompt": prompt, "chosen": some[best], "rejected": some[worst]})
    return rows


def openings(count: int) -> list[dict[str, str]]:
    """Prompts of different lengths."""
    return [{"prompt": f"{'x' * (i % 4)}{i} "} for i in range(count)]


def place(folder: Path) -> Path:
    """A folder with two models and with data for every verb."""
    quiet = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    tiny.folder(folder / "dropping", "gpt2", **quiet)
    tiny.folder(folder / "model", "llama")
    tiny.lines(folder / "demonstrations.jsonl", alphabet(15))
    for kind in ("comparisons", "rankings", "ratings"):
        tiny.lines(folder / f"{kind}.jsonl", judgements(kind, 14))
    tiny.lines(folder / "prompts.jsonl", openings(11))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def settings(kind: str, at: Path, output: Path, **changes: Any) -> Any:
    """A run of a few steps with every part in use that has a state. `at` is a `place`."""
    common = {
        "output": str(output),
        "precision": "float32",
        "tokens_per_pass": 48,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "save_every": 1,
        "holdout": 0.0,
    }
    taught = {"model": str(at / "dropping"), "dropout": True, "batch_size": 4, "schedule": "cosine", "warmup": 0.3}
    if kind == "sft":
        data = {"data": str(at / "demonstrations.jsonl"), "eval_data": str(at / "demonstrations.jsonl")}
        return SFT(**{**common, **taught, **data, "epochs": 2.4, "evaluate_every": 2, **changes})
    if kind in ("comparisons", "rankings", "ratings"):
        data = {"data": str(at / f"{kind}.jsonl"), "eval_data": str(at / f"{kind}.jsonl")}
        return Reward(**{**common, **taught, **data, "steps": 5, "evaluate_every": 2, **changes})
    sampled = {
        "model": str(at / "model"),
        "data": str(at / "prompts.jsonl"),
        "eval_data": str(at / "prompts.jsonl"),
        "evaluate_every": 3,
        "rewards": f"{at / 'rewards.py'}:variety",
        "reward_normalise": True,
        "rollout": 8,
        "group": 2,
        "batch_size": 4,
        "reuse": 2,
        "steps": 9,
        "max_new_tokens": 6,
        "stop": ("q", "?"),
        "missing_end_penalty": 0.3,
        "kl": 0.2,
        "kl_target": 0.5,
        "kl_horizon": 50,
        "tokens_per_pass": 96,
    }
    ways = {"ppo": {}, "ppo-top": {"train_layers": 1}, "ppo-adapter": {"lora_rank": 2}}
    return PPO(**{**common, **sampled, **ways[kind], **changes})


def built(settings: Any) -> Any:
    """The algorithm of these settings, before any training."""
    settings, loaded = recipes.prepare(settings)
    world = recipes.start_world(settings)
    template = recipes.template_of(settings)
    loaded = recipes.encode(settings, template, loaded)
    return family_of(settings).build(settings, world, template, loaded.training, loaded.held)


KINDS = ("sft", "comparisons", "rankings", "ratings", "ppo", "ppo-top", "ppo-adapter")
