"""How a model is described that does not exist yet: its shape, and the tokenizer that is made for it from the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from plaudit import config
from plaudit.errors import PlauditError
from plaudit.settings.common import Count

SCRATCH = "scratch:"
_FORM = "'scratch:llama:layers=4,width=128', or in YAML {scratch: llama, layers: 4, width: 128}"


@dataclass(frozen=True, kw_only=True)
class Scratch:
    """A language model with random weights. Its one-line form is `scratch:llama:layers=4,width=128`."""

    scratch: Literal["llama", "gpt2"]
    """The architecture."""
    layers: Count = 4
    """Layers."""
    width: Count = 128
    """Dimensions of a token's state."""
    heads: Count = 4
    """Attention heads of each layer; they divide the width among them."""
    context: Count = 256
    """Tokens that the model can read at once."""
    tokenizer: Literal["characters", "bpe"] = "characters"
    """One token for each character, or byte pairs that are learned from the data."""
    vocabulary: Annotated[int, Ge(3)] = 1000
    """At most so many tokens: the commonest characters, or what the byte pairs come to."""

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.scratch == "llama" and self.width // self.heads % 2):
            even = ", into parts of even width, which its rotary positions need" * (self.scratch == "llama")
            raise ValueError(f"`heads` ({self.heads}) must divide `width` ({self.width}){even}.")
        if self.tokenizer == "bpe" and self.vocabulary < 257:
            raise ValueError(
                f"`vocabulary` is {self.vocabulary}, but must be at least 257: the 256 bytes and the end token."
            )


def described(model: str) -> Scratch | None:
    """What a `model` setting describes, or None where it names a model that exists. Raises PlauditError."""
    if not model.startswith(SCRATCH):
        return None
    architecture, _, shape = model.removeprefix(SCRATCH).partition(":")
    values: dict[str, Any] = {"scratch": architecture.strip()}
    for part in filter(None, shape.split(",")):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals or name in values:
            problem = "given twice" if name in values else "no name=value"
            raise PlauditError(f"model: {part.strip()!r} in {model!r} is {problem}: write {_FORM}.")
        values[name] = value
    return config.from_mapping(Scratch, values, "model")


def in_one_line(model: Any) -> Any:
    """A mapping that describes a model, or its one-line form -> the one-line form with every value in it, so that the
    same model is always written the same; anything else as it is. Raises PlauditError."""
    if isinstance(model, Mapping):
        if "scratch" not in model:
            raise PlauditError(f"model: {dict(model)!r:.80} names no architecture: write {_FORM}.")
        asked: Scratch | None = config.from_mapping(Scratch, model, "model")
    else:
        asked = described(model) if isinstance(model, str) else None
    if asked is None:
        return model
    values = config.to_mapping(asked)
    return f"{SCRATCH}{values.pop('scratch')}:" + ",".join(f"{name}={value}" for name, value in values.items())


class Describable:
    """Marks a `model` setting that may describe a model instead of naming one."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(in_one_line, handler(source))
