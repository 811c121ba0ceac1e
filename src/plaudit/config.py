"""Settings: frozen dataclasses that are checked, read from YAML and flags, and written back.

A settings class is flat: `@dataclass(frozen=True, kw_only=True)`, each field annotated with what is allowed
(`Annotated[float, Gt(0)]`) and followed by a docstring, which is its help. Its verb is its attribute `verb`, or its
name in lower case.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from plaudit.errors import PlauditError
from plaudit.rows import named

if TYPE_CHECKING:
    import yaml
    from _typeshed import DataclassInstance
    from pydantic import TypeAdapter

    S = TypeVar("S", bound=DataclassInstance)


def check(settings: S) -> S:
    """The settings with every value validated and of its field's type (an integer becomes a float where one is due).

    Raises PlauditError naming the verb, the field, its value and what is allowed.
    """
    cls = type(settings)
    return _build(cls, {field.name: getattr(settings, field.name) for field in fields(cls)}, verb_of(cls))


def from_mapping(cls: type[S], mapping: Mapping[str, Any], where: str) -> S:
    """Settings from the content of a file named `where`; a key `verb` must be the verb of `cls`.

    Raises PlauditError for an unknown key (naming the nearest), a missing one, or a value that is not allowed.
    """
    values = _values(cls, mapping, where)
    missing = [name for name in _required(cls) if name not in values]
    if missing:
        raise PlauditError(f"{where}: `{missing[0]}` is required by `{verb_of(cls)}`, but not given.")
    return _build(cls, values, where)


def verb_of(cls: type) -> str:
    """The word on the command line that runs `cls`."""
    return str(getattr(cls, "verb", cls.__name__.lower()))


def _required(cls: type[DataclassInstance]) -> list[str]:
    return [field.name for field in fields(cls) if field.default is MISSING and field.default_factory is MISSING]


def _nearest(name: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    return get_close_matches(name, names, n=1, cutoff=0)[0]


def _of_others(name: str) -> str:
    """Which verbs have this setting, where one asks another for it."""
    from plaudit.settings import VERBS

    verbs = [verb for verb, cls in VERBS.items() if name in (field.name for field in fields(cls))]
    more = " and others" if len(verbs) > 3 else ""
    return f"that is a setting of {', '.join(verbs[:3])}{more}" if verbs else ""


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


@cache
def _adapter(cls: type, name: str) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(_hints(cls)[name])


def _values(cls: type[DataclassInstance], mapping: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries of a mapping, each validated by itself."""
    names = [field.name for field in fields(cls)]
    verb = mapping.get("verb", verb_of(cls))
    if verb != verb_of(cls):
        raise PlauditError(f"{where}: these are settings of `{verb}`, not of `{verb_of(cls)}`.")
    values = {name: value for name, value in mapping.items() if name != "verb"}
    for name in values:
        if name not in names:
            hint = _of_others(name) or f"the nearest is `{_nearest(name.replace('-', '_'), names)}`"
            raise PlauditError(f"{where}: `{verb}` has no setting {named([name])}; {hint}.")
    return {name: _validated(cls, name, value, where) for name, value in values.items()}


def _validated(cls: type[DataclassInstance], name: str, value: Any, where: str) -> Any:
    from pydantic import ValidationError

    try:
        if isinstance(value, bool) and not _mentions(_hints(cls)[name], value):
            raise PlauditError(f"{where}: `{name}` is {str(value).lower()}, but must not be true or false.")
        return _adapter(cls, name).validate_python(value)
    except ValidationError as error:
        problems = [problem["msg"].removeprefix("Input should be ") for problem in error.errors()]
        allowed = ", or ".join(dict.fromkeys(problem.removeprefix("Value error, ") for problem in problems))
        raise PlauditError(f"{where}: `{name}` is {value!r:.80}, but must be {allowed}.") from None


def _mentions(hint: Any, value: bool) -> bool:
    """Whether a hint has room for a boolean, which Python would also take for the numbers 0 and 1."""
    return hint is bool or hint is Any or hint is value or any(_mentions(part, value) for part in get_args(hint))


def _build(cls: type[S], values: Mapping[str, Any], where: str) -> S:
    checked = {name: _validated(cls, name, value, where) for name, value in values.items()}
    try:
        return cls(**checked)
    except ValueError as error:  # raised by the class for a combination that makes no sense
        raise PlauditError(f"{where}: {error}") from None


# ------------------------------------------------------------------------------------------------ YAML


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Numbers such as 1e-5 are floats, as in YAML 1.2.

    Raises PlauditError, naming the file and the line, for a file that can't be read or parsed, is not a mapping of
    names, or names something twice.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PlauditError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise PlauditError(f"{path}:{line}: not valid UTF-8 ({error.reason}).") from None
    content = _content(text, str(path))
    if not isinstance(content, dict):
        raise PlauditError(f"{path}: must hold settings, one `name: value` to a line.")
    odd = [key for key in content if not isinstance(key, str)]
    if odd:
        raise PlauditError(f"{path}: the key {odd[0]!r:.60} is not a name; put it in quotes if it is meant as one.")
    return content


def parse_value(text: str) -> Any:
    """One value as a settings file would hold it: `1e-5` is a number, `[a, b]` a list. Raises PlauditError."""
    try:
        return _content(text, "value")
    except PlauditError:
        raise PlauditError(f"{text!r} is no YAML value: put quotation marks around it.") from None


def _content(text: str, where: str) -> Any:
    import yaml

    try:
        return _loader()(text).get_single_data()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise PlauditError(f"{where}:{line}: not valid YAML ({error.reason}).") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise PlauditError(f"{where}:{mark.line + 1 if mark else 1}: not valid YAML ({error.problem}).") from None
    except RecursionError:
        raise PlauditError(f"{where}: nested too deeply.") from None


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


@cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe, with YAML 1.2's floats, and strict about names that come twice."""

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep=deep)
            # What PyYAML lets escape for a wrong value under a tag: `2025-02-30`, `!!bool maybe`, `!!timestamp x`.
            except (ValueError, LookupError, TypeError, AttributeError):
                kind = node.tag.rpartition(":")[2]
                problem = f"{node.value!r:.60} is no {kind}"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode) and key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                    problem = f"`{key.value}` is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(str(key.value))
            return super().construct_mapping(node, deep=deep)

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    return Loader


@cache
def _dumper() -> type[yaml.SafeDumper]:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Safe, without anchors, and quoting the texts that the loader would take for floats."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        # These three are line breaks to YAML 1.1, and PyYAML keeps them only in double quotes.
        style = '"' if set(text) & {"\x85", "\u2028", "\u2029"} else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent_text)
    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    return Dumper


def name_of(function: Callable[..., Any]) -> str:
    """What a function that was given from Python is called in a file: its module and its qualified name."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def plain(value: Any) -> Any:
    """`value` with mappings as dict, sequences as list, paths as text and functions as their names: what YAML gives
    back."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if callable(value):
        return name_of(value)
    return str(value) if isinstance(value, Path) else value


def to_mapping(settings: DataclassInstance) -> dict[str, Any]:
    """The settings as plain values, in the order of their fields."""
    return {field.name: plain(getattr(settings, field.name)) for field in fields(settings)}


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """YAML text that `read_yaml` turns back into `plain(mapping)`."""
    import yaml

    text: str = yaml.dump(plain(mapping), Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=1_000_000)
    return text


def to_yaml(settings: DataclassInstance) -> str:
    """YAML text of the settings, one line a field; `from_mapping` of it gives equal settings."""
    return dump_yaml(to_mapping(settings))


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line "name: old -> new" for each entry that differs, in the order of `old`, then of `new`."""
    names = list(dict.fromkeys([*old, *new]))

    def shown(side: Mapping[str, Any], name: str) -> str:
        return repr(side[name]) if name in side else "absent"

    changed = [name for name in names if name not in old or name not in new or plain(old[name]) != plain(new[name])]
    return [f"{name}: {shown(old, name)} -> {shown(new, name)}" for name in changed]


# ------------------------------------------------------------------------------------------------ flags


def from_arguments(cls: type[S], argv: Sequence[str], prog: str) -> S:
    """Settings from a command line: defaults, over them the file of `--config FILE`, over that the flags.

    `--learning-rate` and `--learning_rate` are one; a boolean is `--flag`, `--no-flag` or `--flag True`; values of a
    list may come one by one, under the singular of its name: `--policy a --policy b` is `--policies a b`. `--help`
    prints the fields of `cls` and exits with 0. Raises PlauditError for anything that is not understood or allowed.
    """
    words, config = _words(cls, argv, prog)
    words = _gathered(cls, words)
    given = {} if config is None else _values(cls, read_yaml(config), config)
    flags = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    missing = [name for name in _required(cls) if name not in given and name not in flags]
    if missing and not {"-h", "--help"} & set(words):
        flag = missing[0].replace("_", "-")
        raise PlauditError(f"{prog}: --{flag} is required; give the flag, or `{missing[0]}` in a --config file.")
    parsed = _parsed(cls, words, given, prog)
    return _build(cls, {field.name: getattr(parsed, field.name) for field in fields(cls)}, prog)


def _words(cls: type[DataclassInstance], argv: Sequence[str], prog: str) -> tuple[list[str], str | None]:
    """The arguments with booleans as bare flags and without `--config`, and the file that it names."""
    hints = _hints(cls)
    names = [field.name for field in fields(cls)]
    switches = {name for name in names if hints[name] is bool}
    known = {*names, "config", "help", *(f"no_{name}" for name in switches)}
    words: list[str] = []
    config = None
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            words.append(word)
            continue
        if name not in known and (several := _list_of(cls, name)):
            name, flag, word = several, f"--{several}", f"--{several}{equals}{value}"
        if name not in known:
            nearest = _nearest(name, [*names, "config"]).replace("_", "-")
            raise PlauditError(f"{prog}: there is no flag {flag}; {_of_others(name) or f'the nearest is --{nearest}'}.")
        if name in switches and (value or "".join(queue[:1])).lower() in ("true", "false"):
            on = (value or queue.pop(0)).lower() == "true"
            words.append(flag if on else f"--no-{name.replace('_', '-')}")
            continue
        following = value if equals else "".join(queue[:1])
        if name in {*names, "config"} - switches and not equals and (not queue or following.startswith("--")):
            raise PlauditError(f"{prog}: {flag} needs a value.")
        if name == "config":
            config = following
            del queue[: not equals]
        else:
            words.append(word)
    return words, config


def _gathered(cls: type[DataclassInstance], words: Sequence[str]) -> list[str]:
    """The arguments with a list that is given in parts, `--data a --data b`, as one: tyro would keep the last part."""
    groups: dict[str, list[str]] = {}
    current: list[str] = groups.setdefault("", [])
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            current.append(word)
        elif _is_list(_hints(cls).get(name)):
            current = groups.setdefault(name, [flag])
            current += [value] if equals else []
        else:
            current = groups.setdefault(f"{place} {name}", [word])
    return [word for group in groups.values() for word in group]


def _list_of(cls: type[DataclassInstance], one: str) -> str:
    """The list whose values come one by one, `--policy a --policy b` being `--policies a b`; "" if there is none."""
    names = (f"{one}s", f"{one.removesuffix('y')}ies")
    return next((name for name in names if _is_list(_hints(cls).get(name))), "")


def _is_list(hint: Any) -> bool:
    """Whether several values may follow the flag of a field with this hint."""
    return get_origin(hint) is tuple or any(get_origin(part) is tuple for part in get_args(hint))


def _parsed(cls: type[DataclassInstance], words: Sequence[str], given: Mapping[str, Any], prog: str) -> Any:
    """What tyro makes of the flags, with `given` for defaults."""
    import tyro

    about = tyro.conf.arg(metavar="FILE", help="A YAML file with any of these settings; flags win over it.")
    # Combinations are judged once all values are there, so the class' own checks are off while tyro fills it.
    form = make_dataclass(
        cls.__name__,
        [("config", Annotated[Path | None, about], None)],
        bases=(cls,),
        frozen=True,
        kw_only=True,
        namespace={"__doc__": cls.__doc__, "__post_init__": lambda self: None},
    )
    absent = {name: tyro.MISSING for name in _required(cls)}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(form, args=list(words), prog=prog, default=form(**(absent | dict(given))))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise PlauditError(f"{prog}: {_sentence(printed.getvalue())}; see {prog} --help.") from None


def _sentence(box: str) -> str:
    """The first paragraph of a message that tyro drew under a title (a box, or rules)."""
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line).strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    paragraphs = re.split("^[─-]+$", "\n".join(lines), flags=re.MULTILINE)
    first = next((" ".join(part.split()) for part in paragraphs if part.strip()), "not understood")
    return first.partition(" Got errors")[0].rstrip(". ")
