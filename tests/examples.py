"""A little language, judgements of it, and a small run of every kind that learns from them."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import tiny
from plaudit import (
    CISPO,
    DAPO,
    GDPO,
    GMPO,
    GRPO,
    GSPO,
    ILQL,
    LUSPO,
    PPO,
    RLOO,
    SAPO,
    SFT,
    VESPO,
    VPG,
    BestOfN,
    DrGRPO,
    LitePPO,
    OnlineDPO,
    OnlineIPO,
    ReinforcePP,
    Reward,
    recipes,
)
from plaudit.families import family_of
from plaudit.settings import FAMILIES
from plaudit.settings.policy_gradient import PolicyGradient

LETTERS = "abcdefgh"
PREFERENCES = FAMILIES["Direct preference"]
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


JUDGED = {"plackett_luce": "rankings", "best_of": "rankings", "regression": "ratings", "binary": "labels"}
"""The data of each objective that is no Bradley-Terry."""


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
        elif kind == "labels":
            rows.append({"prompt": prompt, "completion": some[0], "label": likes[0] > 0})
        else:
            best, worst = likes.index(max(likes)), likes.index(min(likes))
            if likes[best] > likes[worst]:
                rows.append({"prompt": prompt, "chosen": some[best], "rejected": some[worst]})
    return rows


def play(count: int, seed: int = 0) -> str:
    """Speeches of a little play: what each person says is theirs alone."""
    draw = random.Random(seed)
    said = {"HERO": "Where hath he gone", "DON JOHN": "I will not say", "LEONATO": "Peace, my good lord"}
    lines = [(name, said[name], draw.choice("!.?")) for name in draw.choices(list(said), k=count)]
    return "".join(f"{name}:\n{words}{mark}\n\n" for name, words, mark in lines)


def openings(count: int) -> list[dict[str, str]]:
    """Prompts of different lengths."""
    return [{"prompt": f"{'x' * (i % 4)}{i} "} for i in range(count)]


def place(folder: Path) -> Path:
    """A folder with two models and with data for every verb."""
    quiet = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    tiny.folder(folder / "dropping", "gpt2", **quiet)
    tiny.folder(folder / "model", "llama")
    tiny.folder(folder / "encdec", "t5", dropout_rate=0.2)
    tiny.lines(folder / "demonstrations.jsonl", alphabet(15))
    tiny.encoder(folder / "encoder", hidden_dropout_prob=0.2)
    for kind in ("comparisons", "rankings", "ratings", "labels"):
        tiny.lines(folder / f"{kind}.jsonl", judgements(kind, 14))
    tiny.lines(folder / "prompts.jsonl", openings(11))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


# What learns from its own samples, each with other parts of what they share in use.
BUDGET = {"kl_target": 0.0, "kl_budget": 0.1, "kl_rate": 0.1}
OFTEN = {"stop": tuple("?! ETAOINSHRDLUCMFWYPVBetaoinshrdlucmfwypvb")}  # about half of the completions end then
SAMPLED: dict[str, tuple[Any, dict[str, Any]]] = {
    "vpg": (VPG, {"batch_size": 8}),
    "rloo": (RLOO, {"reject_worst": 0.25}),
    "reinforce_pp": (ReinforcePP, {"baseline": "group", "entropy": 0.01, "mask_truncated": True, **OFTEN, **BUDGET}),
    "grpo": (GRPO, {"entropy": 0.01, "gradient_checkpointing": True}),
    "dr_grpo": (DrGRPO, {"kl_term": "k2", "reject_best": 0.2, "reward_normalise": False, "reward_scale": True}),
    "lite_ppo": (LitePPO, {"dual_clip": 1.5}),
    "gdpo": (GDPO, {"reward_weights": (1.0, 0.5)}),
    "dapo": (DAPO, {"kl": 0.0, "kl_target": 0.0, "overlong": 0.5}),
    "gspo": (GSPO, {"kl_term": "reward", "train_layers": 1}),
    "cispo": (CISPO, {"kl_term": "straight_through", "clip_high": 0.1}),
    "gmpo": (GMPO, {"kl_term": "reward"}),
    "luspo": (LUSPO, {"kl": 0.0, "kl_target": 0.0}),
    "sapo": (SAPO, {"temperature_bad": 2.0}),
    "vespo": (VESPO, {"kl_term": "k2"}),
    "online_dpo": (OnlineDPO, {"label_smoothing": 0.1}),
    "online_ipo": (OnlineIPO, {}),
    "best_of_n": (BestOfN, {"rollout": 16, "batch_size": 8}),
}


# What learns from preferences, where a setting is in use that the others leave alone.
PREFERRED: dict[str, dict[str, Any]] = {
    "robust_dpo": {"precompute_reference": True},
    "hinge": {"lora_rank": 2},
    "exo": {"precompute_reference": True, "train_layers": 1},
    "bco": {"match_prompts": True},
    "f_dpo": {"divergence": "alpha", "alpha": 0.7},
    "ld_dpo": {"alpha": 0.3},
    "simpo": {"gradient_checkpointing": True},
}
ENCDEC = ("sft-encdec", "ppo-encdec", "dpo-encdec", "kto-encdec", "grpo-encdec", "ilql-encdec")


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
    if kind in ENCDEC:
        return settings(kind.removesuffix("-encdec"), at, output, **{"model": str(at / "encdec"), **changes})
    if kind == "sft":
        data = {"data": str(at / "demonstrations.jsonl"), "eval_data": str(at / "demonstrations.jsonl")}
        return SFT(**{**common, **taught, **data, "epochs": 2.4, "evaluate_every": 2, **changes})
    if kind in ("comparisons", "rankings", "ratings", *JUDGED):
        file = str(at / f"{JUDGED.get(kind, kind)}.jsonl")
        data = {"data": file, "eval_data": file, **({"objective": kind} if kind in JUDGED else {})}
        if kind == "regression":
            data |= {"bootstrap": True, "adaptive_weight_decay": True}
        elif kind == "binary":
            data["model"] = str(at / "encoder")
        return Reward(**{**common, **taught, **data, "steps": 5, "evaluate_every": 2, **changes})
    if kind in PREFERENCES:
        file = str(at / ("labels.jsonl" if kind in ("bco", "apo_zero_unpaired") else "comparisons.jsonl"))
        data = {"data": file, "eval_data": file}
        told = kind in (
            "dpo",
            "wpo",
            "aot",
            "bco_pair",
            "kto",
            "bco",
            "rrhf",
        )  # others are dpo by another formula
        every = 2 if told else 0
        given = {"model": str(at / "dropping"), "batch_size": 4, "steps": 5, **data}
        given |= {"evaluate_every": every, "tokens_per_pass": 96}
        return PREFERENCES[kind](**{**common, **given, **PREFERRED.get(kind, {}), **changes})
    if kind == "ilql":
        data = {"data": str(at / "ratings.jsonl"), "eval_data": str(at / "ratings.jsonl"), "model": str(at / "model")}
        return ILQL(**{**common, "batch_size": 4, "steps": 5, "polyak": 0.3, "awac_beta": 0.5, **data, **changes})
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
    if kind in SAMPLED:
        algorithm, own = SAMPLED[kind]
        if "reward_weights" in own:
            own = {**own, "rewards": (sampled["rewards"], "count:a")}
        fewer = {"steps": 5, "eval_data": None, "evaluate_every": 0}
        known = {field.name for field in dataclasses.fields(algorithm)}
        given = {name: value for name, value in {**common, **sampled, **fewer}.items() if name in known}
        return algorithm(**{**given, **own, **changes})
    ways: dict[str, dict[str, Any]] = {"ppo": {}, "ppo-top": {"train_layers": 1}, "ppo-adapter": {"lora_rank": 2}}
    ways["ppo-top"] |= {"dual_clip": 1.3, "whiten_rewards": True}
    return PPO(**{**common, **sampled, **ways[kind], **changes})


def pleasing(kind: type, talker: Path, folder: Path, **changes: Any) -> Any:
    """Settings of a run that starts from the talker and learns to say as many a as it can."""
    given = {
        "model": str(talker),
        "data": tiny.lines(folder / "prompts.jsonl", [{"prompt": f"{i} "} for i in range(100)]),
        "output": str(folder / "run"),
        "rewards": "count:a",
        "holdout": 0.0,
        "max_new_tokens": 8,
        "rollout": 64,
        "batch_size": 64,
        "learning_rate": 5e-3,
        "steps": 30,
        "precision": "float32",
        "save_every": 0,
    }
    if issubclass(kind, PolicyGradient):
        given["kl"] = 0.0
    return kind(**{**given, **changes})


def built(settings: Any) -> Any:
    """The algorithm of these settings, before any training."""
    settings, loaded = recipes.prepare(settings)
    world = recipes.start_world(settings)
    template = recipes.template_of(settings)
    loaded = recipes.encode(settings, template, loaded)
    return family_of(settings).build(settings, world, template, loaded.training, loaded.held)


KINDS = ("sft", "comparisons", "rankings", "ratings", *JUDGED, "ppo", "ppo-top", "ppo-adapter", *SAMPLED, *PREFERENCES)
KINDS += ("ilql", *ENCDEC)
