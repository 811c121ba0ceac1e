"""Writes docs/settings.md: every setting of every verb, from the dataclasses themselves.

python docs/make_settings.py
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from plaudit.settings import VERBS
from plaudit.settings.feedback import Loop

PAGE = Path(__file__).with_name("settings.md")
OPENING = """\
# Settings

Every setting of every verb, with its default. `plaudit VERB --help` prints the same.
On the command line `learning_rate` is `--learning-rate`; in YAML and in Python it is `learning_rate`.
[How settings come together](configuration.md) says which value wins.

This page is written by `docs/make_settings.py`; a test fails when it is out of date.
"""
WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "nothing"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def kind(hint: Any) -> str:
    """What a field takes, in words."""
    if get_origin(hint) is Annotated:
        inner, *rules = get_args(hint)
        named = [(sign, getattr(rule, name, None)) for rule in rules for name, sign in BOUNDS.items()]
        bounds = [f"{sign} {bound:g}" for sign, bound in named if bound is not None]
        return f"{kind(inner)} {' and '.join(bounds)}".strip()
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(kind, get_args(hint)))
    if get_origin(hint) is Mapping:
        return "section"
    if get_origin(hint) is tuple:
        return f"list of {kind(get_args(hint)[0])}s"
    return WORDS[hint]


def sentences(cls: type) -> dict[str, str]:
    """The docstring under each field, those of a subclass winning."""
    found = {}
    for owner in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(owner)).body[0].body
        for field, after in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                found[field.target.id] = " ".join(after.value.value.split())
    return found


def section(verb: str, cls: type) -> str:
    """One verb's heading and table: what is required, then its own fields, then those that it shares."""
    hints, said = get_type_hints(cls, include_extras=True), sentences(cls)
    rows = ["| setting | takes | default | meaning |", "|---|---|---|---|"]
    order = sorted(fields(cls), key=lambda field: (field.default is not MISSING, field.name not in cls.__annotations__))
    for field in order:
        optional = field.default if field.default_factory is MISSING else field.default_factory()
        default = "required" if optional is MISSING else f"`{shown(optional)}`"
        rows.append(f"| `{field.name}` | {kind(hints[field.name])} | {default} | {said[field.name]} |")
    return f"\n## {verb}\n\n{inspect.getdoc(cls)}\n\n" + "\n".join(rows) + "\n"


def shown(default: Any) -> str:
    """A default as YAML would have it."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return "[]" if default == () else str(default) or '""'


def page() -> str:
    """The whole page."""
    return OPENING + "".join(section(verb, cls) for verb, cls in {**VERBS, "loop": Loop}.items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
