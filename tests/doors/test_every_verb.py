"""Every verb that trains, through every door with the same bits; and the help of every verb, field by field."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import pytest
from doorway import PROMPTS, by_all_doors, weights

import tiny
from plaudit.settings import FAMILIES, VERBS
from plaudit.settings.common import Training

TRAINING = {verb: cls for verb, cls in VERBS.items() if issubclass(cls, Training)}
SAMPLING = {**FAMILIES["Policy gradient"], **FAMILIES["Online preference and search"]}
SMALL = {"steps": 2, "batch_size": 4, "save_every": 0, "weight_decay": 0.01}
REWARD = """
def reward(prompts, completions, **columns):
    return [len(text) + ord(text[0]) / 64 if text else 0.0 for text in completions]
"""


def not_the_defaults(cls):
    """Every number and every switch that the verb has of its own, each other than it is by default."""
    own = {field.name: field.default for field in fields(cls) if field.name in inspect.get_annotations(cls)}
    numbers = {name: value / 2 or 0.25 for name, value in own.items() if isinstance(value, float)}
    switches = {name: not value for name, value in own.items() if isinstance(value, bool)}
    found = numbers | switches | {"dual_clip": 3.0, "learning_rate": 1e-3, "divergence": "alpha"}
    return {name: value for name, value in found.items() if name in own}


def data_of(verb, here):
    """The settings that say what this verb learns from."""
    if verb in SAMPLING:
        (here / "reward.py").write_text(REWARD)
        rows = [{"prompt": prompt} for prompt in PROMPTS]
        own = {"rewards": ["reward.py:reward", "count:e"], "rollout": 4, "group": 2, "max_new_tokens": 4}
    else:
        answers = [{"prompt": p, "good": f" {p[4:]}!", "bad": " no", "rating": float(len(p))} for p in PROMPTS]
        names = {"sft": {"good": "completion"}, "ilql": {"good": "completion", "rating": "rating"}}
        taken = {"prompt": "prompt", **names.get(verb, {"good": "chosen", "bad": "rejected"})}
        rows = [{name: row[theirs] for theirs, name in taken.items()} for row in answers]
        own = {}
    return {"data": tiny.lines(here / "data.jsonl", rows), **own}


@pytest.mark.parametrize("verb", TRAINING)
def test_the_same_bits_by_flags_by_yaml_and_from_python(plaudit, here, models, verb):
    cls, model = TRAINING[verb], str(models / "plain")
    settings = {**SMALL, **not_the_defaults(cls), **data_of(verb, here)}
    first, *others = map(weights, by_all_doors(plaudit, here, cls, model=model, **settings))
    assert first["model.safetensors"] != weights(model)["model.safetensors"]
    assert all(other == first for other in others)


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_the_verb_s_own_fields_and_no_others(plaudit, verb):
    said = plaudit(verb, "--help")
    assert (said.code, said.err) == (0, "")
    shown = re.findall(r"^\W (?:-h, )?--([a-z0-9-]+)", said.out, re.MULTILINE)
    own = [field.name.replace("_", "-") for field in fields(VERBS[verb])]
    assert sorted(shown) == sorted([*own, "config", "help"])
