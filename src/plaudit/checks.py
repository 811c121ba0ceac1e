"""What can be known to be wrong before anything heavy loads."""

from __future__ import annotations

import json
import re
import symtable
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaudit.errors import PlauditError
from plaudit.settings.common import Following, Training
from plaudit.settings.policy_gradient import OnPolicy, PolicyGradient, ReinforcePP
from plaudit.settings.scratch import SCRATCH

if TYPE_CHECKING:
    from plaudit.settings import Reward
    from plaudit.settings.rewards import RewardSource, SeveralSources

LINES = (".jsonl", ".jsonl.gz", ".json")
ACTION_HEADS = "ilql_heads.safetensors"
TEXT = ".txt"
TABLES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)


def names_of(data: str | Sequence[str] | None) -> list[str]:
    """The paths and names in a `data` setting: one, several, or several with commas between."""
    if data is None:
        return []
    parts = [data] if isinstance(data, str) else list(data)
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


def check_data(data: str | Sequence[str] | None) -> None:
    """Local paths exist and are not empty: told before anything heavy loads. Hub names pass.

    Raises PlauditError.
    """
    for name in names_of(data):
        path = Path(name).expanduser()
        # Not any dot: there are Hub data sets named like "tulu-2.5-preference-data".
        local = name.endswith((*LINES, TEXT, *TABLES)) or name.startswith((".", "/", "~")) or name.count("/") > 1
        if not path.exists() and local:
            raise PlauditError(f"data: there is no file {name!r}.")
        if path.is_file() and path.stat().st_size == 0:
            raise PlauditError(f"data: {name!r} is empty.")


def read_config(name: str) -> dict[str, Any]:
    """The config.json of a local model folder, after the checks that must come before anything heavy loads.

    Raises PlauditError for a folder that is no model, or whose config asks for code of its own.
    """
    folder = Path(name)
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
            raise PlauditError(f"model: there is no folder {name!r}.")
        return {}
    path = folder / "config.json"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else "a file"
        raise PlauditError(
            f"model: {name!r} has no config.json, so it is not a Hugging Face model folder (found: {found})."
        )
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise PlauditError(f"{path}: not valid JSON ({error}): save the model again.") from None
    if not isinstance(config, dict):
        raise PlauditError(f"{path}: must hold a JSON object, {{...}}: save the model again.")
    hostile = [key for key in _keys(config) if key.startswith("_attn_implementation") or key == "trust_remote_code"]
    if hostile:
        raise PlauditError(
            f"{path}: {hostile[0]!r} does not belong into a config.json and can run foreign code: remove it."
        )
    return config


def _keys(value: Any) -> Iterator[str]:
    """All keys, those of configs within the config too."""
    if isinstance(value, dict):
        yield from value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _keys(part)


def check_model(name: str) -> None:
    """The checks on a model folder that need nothing heavy: it exists, is a model, and brings a tokenizer.

    Raises PlauditError. Hub names pass: only the download can tell.
    """
    if name.startswith(SCRATCH):
        raise PlauditError(
            f"model: only `sft` and `reward` begin from scratch: train {name!r:.60} with one of them, and give its "
            "`final` folder here."
        )
    folder = Path(name)
    if read_config(name) and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise PlauditError(
            f"model: {name!r} has no tokenizer (none of {', '.join(_TOKENIZER_FILES[:3])} ...): "
            "save one into the folder with tokenizer.save_pretrained()."
        )


def has_action_heads(model: str) -> bool:
    """Whether beside a model lies what `plaudit ilql` learned of the worth of tokens."""
    return (Path(model) / ACTION_HEADS).is_file()


def check_guidance(models: Sequence[str]) -> None:
    """Raises PlauditError unless one of the models can be guided."""
    if not any(map(has_action_heads, models)):
        raise PlauditError(
            f"ilql_beta: {' and '.join(map(repr, models))} has no {ACTION_HEADS} to be guided by: "
            "take the final model of `plaudit ilql`, or leave ilql_beta out."
        )


ENSEMBLE_RULE = r"mean|minimum|mean-(\d+(?:\.\d+)?)std"
"""How the scores of an ensemble become one: `ensemble:RULE@FOLDER`."""


def listed(given: RewardSource | SeveralSources) -> list[RewardSource]:
    """One reward or several, as a list."""
    return [given] if isinstance(given, str) or callable(given) else list(given)


def check_rewards(specs: Sequence[RewardSource]) -> None:
    """The checks that need nothing heavy: files, functions and models are there. Raises PlauditError."""
    for spec in specs:
        if not isinstance(spec, str):
            continue
        kind, colon, rest = spec.partition(":")
        if spec.endswith(".py"):
            raise PlauditError(f"reward {spec!r}: name the function too, as in {spec + ':reward'!r}.")
        if not colon:
            check_model(spec)
        elif kind == "count":
            if not rest:
                raise PlauditError(f"reward {spec!r}: name what is to be counted, as in 'count:good'.")
        elif kind == "ensemble":
            _check_ensemble(spec, *rest.partition("@")[::2])
        elif kind == "label":
            label, _, model = rest.partition("@")
            if not (label and model):
                raise PlauditError(f"reward {spec!r}: name a label and a model, as in 'label:POSITIVE@MODEL'.")
            check_model(model)
        else:
            _check_function(spec)


def _check_ensemble(spec: str, rule: str, folder: str) -> None:
    if not (re.fullmatch(ENSEMBLE_RULE, rule) and folder):
        raise PlauditError(
            f"reward {spec!r}: write ensemble:mean@FOLDER, ensemble:minimum@FOLDER, or ensemble:mean-1std@FOLDER "
            "with any number of standard deviations."
        )
    for member in members_of(folder):
        check_model(member)


def members_of(folder: str) -> list[str]:
    """The finished models of an ensemble, in order. Raises PlauditError if there are none."""
    found = [path for path in Path(folder).glob("member-[0-9]*/final") if path.is_dir()]
    if not found:
        raise PlauditError(
            f"ensemble: {folder!r} holds no member-0/final: give the run folder of `plaudit reward` with `members`."
        )
    return [str(path) for path in sorted(found, key=lambda path: int(path.parent.name.partition("-")[2]))]


OBJECTIVES = {
    "comparison": ("bradley_terry",),
    "ranking": ("bradley_terry", "plackett_luce", "best_of"),
    "rating": ("bradley_terry", "regression", "binary"),
}
"""What reward models can be fitted to, by the kind of the data."""


def check_reward(settings: Reward, kind: str, ratings: Sequence[Sequence[float]]) -> None:
    """Raises PlauditError for settings of a reward model that do not fit the data, of this kind, or each other.

    ratings: what people gave, where the data are ratings.
    """
    objective = settings.objective
    if objective not in OBJECTIVES[kind]:
        others = [other for other, known in OBJECTIVES.items() if objective in known]
        raise PlauditError(
            f"objective: {objective} learns from {' and '.join(others)}s, but the data hold {kind}s, "
            f"which take {' or '.join(OBJECTIVES[kind])}."
        )
    if settings.noise and objective not in ("bradley_terry", "binary"):
        raise PlauditError(f"noise: {objective} knows no answers at random: leave `noise` at 0.")
    if settings.adaptive_weight_decay and not settings.weight_decay:
        raise PlauditError("adaptive_weight_decay: there is no weight_decay to begin with: set it, to 0.01 say.")
    odd = [one for given in ratings for one in given if not 0 <= one <= 1]
    if objective == "binary" and odd:
        raise PlauditError(
            f"objective: binary takes labels, or ratings from 0 (bad) to 1 (good), and one here is {odd[0]:g}: "
            "rescale them, or take regression."
        )


def check_rollout(rollout: int, batch_size: int, group: int, once: bool = False) -> None:
    """Raises PlauditError unless a rollout is whole batches of whole groups; one batch, where it is to be learned from
    at `once`."""
    if once and rollout != batch_size:
        raise PlauditError(
            f"batch_size ({batch_size}) must be rollout ({rollout}): nothing here corrects for a policy that has moved "
            "since it sampled."
        )
    if rollout % batch_size:
        raise PlauditError(f"batch_size ({batch_size}) must divide rollout ({rollout}).")
    if batch_size % group:
        raise PlauditError(f"group ({group}) must divide batch_size ({batch_size}), or a prompt's answers are torn.")


def check_learning_from_samples(settings: OnPolicy) -> None:
    """Raises PlauditError for settings of an algorithm that samples which exclude each other or leave nothing."""
    if settings.reward_normalise and settings.reward_scale:
        raise PlauditError("reward_normalise takes the mean off, reward_scale leaves it: choose one of them.")
    if settings.reward_moments == "first" and not (settings.reward_normalise or settings.reward_scale):
        raise PlauditError("reward_moments: nothing is divided by them: set reward_scale or reward_normalise.")
    if isinstance(settings, ReinforcePP) and settings.baseline == "group" and settings.group == 1:
        raise PlauditError("baseline: a group of one has no others to compare with: raise group, or take none.")
    dual_clip = getattr(settings, "dual_clip", 0.0)
    if 0 < dual_clip <= 1:
        raise PlauditError(f"dual_clip is {dual_clip:g}: give more than 1, or 0 for no such bound.")
    if not isinstance(settings, PolicyGradient):
        return
    if settings.compare_samples and not settings.penalised:
        raise PlauditError("compare_samples: without a KL term there is no reference to compare with: raise kl.")
    if settings.kl_target and settings.kl_budget:
        raise PlauditError("kl_target holds the divergence, kl_budget only bounds it: choose one of them.")
    if settings.kl_target and not settings.kl:
        raise PlauditError("kl_target: the weight adapts by factors, so it cannot begin at 0: raise kl.")
    if settings.reject_worst + settings.reject_best >= 1:
        raise PlauditError(
            f"reject_worst ({settings.reject_worst:g}) and reject_best ({settings.reject_best:g}) leave no completion "
            "to learn from: together they must be less than 1."
        )


def check_reference(reference: str, lora_rank: int) -> None:
    """Raises PlauditError for a reference that is no model, or that an adapter cannot have."""
    if reference and lora_rank:
        raise PlauditError(
            "reference: an adapter is held to the model that it was put on: leave reference out, or lora_rank."
        )
    if reference:
        check_model(reference)


def check_following(settings: Any) -> None:
    """Raises PlauditError where a reference is to move and there is none that could."""
    if not settings.reference_every:
        return
    if settings.lora_rank:
        why = "an adapter's reference is the model under it, which never moves: leave reference_every out, or lora_rank"
    elif getattr(settings, "precompute_reference", False):
        why = "what was computed before cannot follow: leave precompute_reference out"
    elif isinstance(settings, PolicyGradient) and not settings.penalised:
        why = "without a KL term there is no reference: raise kl"
    else:
        return
    raise PlauditError(f"reference_every: {why}.")


def check_unread(settings: Training) -> None:
    """Raises PlauditError for a setting that is not at its default and that nothing here is going to read."""
    readers = {"drop_every": ("step",), "drop_after": ("plateau",), "drop_factor": ("step", "plateau")}
    for name, schedules in readers.items():
        if getattr(settings, name) != getattr(Training, name) and settings.schedule not in schedules:
            raise PlauditError(
                f"{name}: the schedule {settings.schedule} does not look at it: set schedule to "
                f"{' or '.join(schedules)}, or leave {name} out."
            )
    if not isinstance(settings, Following) or settings.reference_every:
        return
    if settings.reference_share != Following.reference_share:
        raise PlauditError(
            "reference_share: the reference never moves, so nothing asks how far: set reference_every, or leave "
            "reference_share out."
        )


def check_processes(batch_size: int, processes: int) -> None:
    """Raises PlauditError unless every process has a row of each batch."""
    if batch_size < processes:
        raise PlauditError(f"batch_size ({batch_size}) leaves some of {processes} processes without a row: raise it.")


def _check_function(spec: str) -> None:
    """Looks for `file.py:name` without running the file, which may do or load anything."""
    place, _, name = spec.rpartition(":")
    if not place.endswith(".py"):
        if place == "__main__" or "<" in name:
            raise PlauditError(
                f"reward {spec!r} is a function within the Python program that gave it: go on from there, or put it "
                "into a file of its own and name it as in 'reward.py:name'."
            )
        if not _is_module(place):
            raise PlauditError(f"reward {spec!r}: there is no module {place!r}.")
        return
    path = Path(place)
    if not path.is_file():
        raise PlauditError(f"reward {spec!r}: there is no file {place!r}.")
    text = path.read_text("utf-8")
    try:
        symbols = symtable.symtable(text, place, "exec").get_symbols()
    except SyntaxError as error:
        raise PlauditError(f"{place}:{error.lineno}: not valid Python ({error.msg}).") from None
    known = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    if name not in known and "import *" not in text:
        functions = ", ".join(symbol.get_name() for symbol in symbols if symbol.is_namespace()) or "none"
        raise PlauditError(f"reward {spec!r}: {place} has no function {name!r} (it has: {functions}).")


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # of a package that isn't there, or no name at all
        return False
