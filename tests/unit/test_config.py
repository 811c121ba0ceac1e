"""Settings: values checked, YAML and flags read, mistakes named."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from annotated_types import Ge, Gt, Le
from hypothesis import example, given
from hypothesis import strategies as st

from plaudit.config import (
    check,
    difference,
    dump_yaml,
    from_arguments,
    from_mapping,
    parse_value,
    plain,
    read_yaml,
    to_mapping,
    to_yaml,
    verb_of,
)
from plaudit.errors import PlauditError


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What several verbs take."""

    model: str
    """The model to start from."""
    data: str | tuple[str, ...]
    """Files of comparisons."""


@dataclass(frozen=True, kw_only=True)
class Tune(Shared):
    """Tunes a model."""

    learning_rate: Annotated[float, Gt(0)] = 1e-5
    """Peak learning rate."""
    steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps."""
    warmup: Annotated[float, Ge(0), Le(1)] = 0.05
    """Share of the steps that warm up."""
    schedule: Literal["constant", "linear"] = "linear"
    """Shape of the learning rate."""
    weights: tuple[float, ...] = ()
    """One weight a source."""
    shuffle: bool = True
    """Shuffle the rows."""
    dry_run: bool = False
    """Load nothing."""
    output: Path = Path("runs/tune")
    """Run folder."""
    anything: Any = None
    """Not looked into."""
    reserve: Annotated[int, Ge(0)] = 0
    """Steps after the warm-up."""

    def __post_init__(self) -> None:
        if self.reserve and self.warmup == 0:
            raise ValueError("`reserve` counts from the warm-up, but `warmup` is 0.")


@dataclass(frozen=True, kw_only=True)
class Named:
    """Has a verb of its own."""

    verb: ClassVar[str] = "best-of-n"
    n: int = 4
    """Samples."""


BASE = {"model": "m", "data": "d.jsonl"}


def tune(**values) -> Tune:
    return Tune(**(BASE | values))


def arguments(*words: str) -> Tune:
    return from_arguments(Tune, words, "plaudit tune")


GIVEN = ("--model", "m", "--data", "d.jsonl")


# ------------------------------------------------------------------------------------------------ values


def test_values_come_out_with_the_type_of_their_field():
    checked = check(tune(learning_rate=1, weights=[1, 2.5], output="runs/x", data=["a", "b"], anything=True))
    assert checked == tune(learning_rate=1.0, weights=(1.0, 2.5), output=Path("runs/x"), data=("a", "b"), anything=True)
    assert isinstance(checked.learning_rate, float)
    assert type(checked) is Tune
    assert check(tune(steps=None)).steps is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"learning_rate": -1}, "tune: `learning_rate` is -1, but must be greater than 0."),
        ({"learning_rate": float("nan")}, "tune: `learning_rate` is nan, but must be greater than 0."),
        ({"learning_rate": "fast"}, "tune: `learning_rate` is 'fast', but must be a valid number"),
        ({"learning_rate": None}, "tune: `learning_rate` is None, but must be a valid number."),
        ({"learning_rate": True}, "tune: `learning_rate` is true, but must not be true or false."),
        ({"steps": False}, "tune: `steps` is false, but must not be true or false."),
        ({"steps": 0}, "tune: `steps` is 0, but must be greater than or equal to 1."),
        ({"steps": 1.5}, "tune: `steps` is 1.5, but must be a valid integer"),
        ({"warmup": 1.1}, "tune: `warmup` is 1.1, but must be less than or equal to 1."),
        ({"schedule": "cosine"}, "tune: `schedule` is 'cosine', but must be 'constant' or 'linear'."),
        ({"model": 3}, "tune: `model` is 3, but must be a valid string."),
        ({"data": 3}, "tune: `data` is 3, but must be a valid string, or a valid tuple."),
        ({"shuffle": "perhaps"}, "tune: `shuffle` is 'perhaps', but must be a valid boolean"),
        ({"weights": [1, "x"]}, "tune: `weights` is [1, 'x'], but must be a valid number"),
        ({"model": ["x" * 999]}, "tune: `model` is ['xxx"),
        ({"reserve": 1, "warmup": 0}, "tune: `reserve` counts from the warm-up, but `warmup` is 0."),
    ],
)
def test_a_value_that_is_not_allowed_is_named(values, said):
    settings = object.__new__(Tune)
    for name, value in (to_mapping(tune()) | values).items():
        object.__setattr__(settings, name, value)
    with pytest.raises(PlauditError) as caught:
        check(settings)
    assert str(caught.value).startswith(said)
    assert len(str(caught.value)) < 200
    with pytest.raises(PlauditError) as caught:
        from_mapping(Tune, BASE | values, "tune.yaml")
    assert str(caught.value).startswith(said.replace("tune:", "tune.yaml:"))


def test_the_verb_of_a_class():
    assert (verb_of(Tune), verb_of(Named)) == ("tune", "best-of-n")


# ------------------------------------------------------------------------------------------------ mappings


def test_a_mapping_becomes_settings():
    assert from_mapping(Tune, BASE | {"learning_rate": 1}, "f") == tune(learning_rate=1.0)
    assert from_mapping(Tune, BASE | {"verb": "tune"}, "f") == tune()
    assert from_mapping(Named, {"verb": "best-of-n"}, "f") == Named(n=4)


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"learning_rat": 1}, "f.yaml: `tune` has no setting `learning_rat`; the nearest is `learning_rate`."),
        ({"learning-rate": 1}, "the nearest is `learning_rate`."),
        ({"zzz": 1}, "f.yaml: `tune` has no setting `zzz`; the nearest is `"),
        ({"model": "m"}, "f.yaml: `data` is required by `tune`, but not given."),
        (BASE | {"verb": "dpo"}, "f.yaml: these are settings of `dpo`, not of `tune`."),
    ],
)
def test_a_wrong_mapping_is_refused(mapping, said):
    with pytest.raises(PlauditError) as caught:
        from_mapping(Tune, mapping, "f.yaml")
    assert said in str(caught.value)


def test_differences():
    old = {"verb": "tune", "data": ["a"], "steps": 3, "gone": None}
    new = {"verb": "tune", "data": ("a",), "steps": 4, "output": Path("x")}
    lines = ["steps: 3 -> 4", "gone: None -> absent", "output: absent -> PosixPath('x')"]
    assert difference(old, new) == lines
    assert difference(old, old) == []


# ------------------------------------------------------------------------------------------------ YAML


def yaml_of(folder: Path, content: str | bytes) -> dict[str, Any]:
    path = folder / "f.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_yaml(path)


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.e-5", "+1e-5", "1.0e-05", ".1e-4", "0.00001"])
def test_numbers_with_exponents_are_floats(tmp_path, number):
    assert yaml_of(tmp_path, f"a: {number}\nb: [-{number.lstrip('+')}]") == {"a": 1e-5, "b": [-1e-5]}


def test_other_scalars_are_what_they_look_like(tmp_path):
    content = "a: 3\nb: 'x'\nc: true\nd: null\ne: '1e-5'\nf: 1e\ng: e5\nh: [x, 1.5]\n\ufeffi: é"
    assert yaml_of(tmp_path, "\ufeff" + content.replace("\ufeff", "")) == {
        "a": 3,
        "b": "x",
        "c": True,
        "d": None,
        "e": "1e-5",
        "f": "1e",
        "g": "e5",
        "h": ["x", 1.5],
        "i": "é",
    }


def test_merge_keys_are_no_duplicates(tmp_path):
    content = "a: &a {x: 1, y: 2}\nb: &b {z: 3}\nc:\n  <<: *a\n  <<: *b\n  x: 5\n"
    assert yaml_of(tmp_path, content)["c"] == {"x": 5, "y": 2, "z": 3}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: not valid YAML (`a` is given twice)"),
        ("a: 1\nb: {c: 1, c: 2}\n", ":2: not valid YAML (`c` is given twice)"),
        ("a: 1\n  b: 2\n", ":2: not valid YAML (mapping values are not allowed here)"),
        ("a: 1\nb: [\n", ":3: not valid YAML ("),
        ("a: 1\nb: *c\n", ":2: not valid YAML (found undefined alias"),
        ("a: 1\n\tb: 2\n", ":2: not valid YAML (found character"),
        ("a: 1\nb: \x07\n", ":2: not valid YAML (special characters are not allowed)"),
        (b"a: 1\nb: \xff\n", ":2: not valid UTF-8 (invalid start byte)"),
        ("a: 1\nb: 2025-02-30\n", ":2: not valid YAML ('2025-02-30' is no timestamp)"),
        ("a: 1\nb: !!bool maybe\n", ":2: not valid YAML ('maybe' is no bool)"),
        ("b: !!timestamp x\n", ":1: not valid YAML ('x' is no timestamp)"),
        ("b: !!python/object/apply:os.system [ls]\n", ":1: not valid YAML (could not determine a constructor"),
        ("? [a]\n: 1\n", ":1: not valid YAML ("),
        ("", ": must hold settings, one `name: value` to a line."),
        ("- a\n", ": must hold settings"),
        ("text", ": must hold settings"),
        ("on: 1\n", ": the key True is not a name"),
        ("[" * 1_000, ": nested too deeply"),
        ("a: 1\n--- \nb: 2\n", ":2: not valid YAML (but found another document)"),
    ],
)
def test_wrong_yaml_is_named_with_its_line(tmp_path, content, said):
    with pytest.raises(PlauditError) as caught:
        yaml_of(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'f.yaml'}{said}")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("3", 3), ("x", "x"), ("", None), ("[a, 2]", ["a", 2]), ("true", True), ("{output}/sft", ...)],
)
def test_a_value_is_read_as_in_a_file(text, value):
    if value is ...:
        with pytest.raises(PlauditError, match=r"^'\{output\}/sft' is no YAML value: put quotation"):
            parse_value(text)
    else:
        assert repr(parse_value(text)) == repr(value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PlauditError, match=r"none\.yaml: cannot be read \(No such file"):
        read_yaml(tmp_path / "none.yaml")


PIECES = [
    "a",
    "b",
    ":",
    " ",
    "\n",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "'",
    '"',
    "&a",
    "*a",
    "!!int ",
    "!!set ",
    "!!omap ",
    "<<: ",
]
PIECES += [
    "? ",
    "| ",
    "1e5",
    "2025-13-01",
    "!!binary ",
    "!!float ",
    "=",
    "%",
    "@",
    "\t",
    "#",
    "~",
    "0x",
    "1:99:",
    "!!map ",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@example("a: !!float ''")
@example("!!map x")
@example("a: !!set b")
def test_any_text_gives_a_mapping_or_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(content)
    try:
        assert isinstance(read_yaml(path), dict)
    except PlauditError as error:
        sentence = str(error)
        assert sentence.startswith(str(path))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("a1e-+.: \n'\"#é\x85\u2028😀~", max_size=6)
)
SCALARS |= st.sampled_from(["1e-5", "1E5", "1.e+5", "yes", "null", "2025-01-01", "0x1", "1_000", "<<", "=", "1:30", ""])


@given(st.dictionaries(st.text("ab", min_size=1, max_size=3), SCALARS | st.lists(SCALARS, max_size=3), min_size=1))
def test_yaml_gives_back_what_was_written(tmp_path_factory, mapping):
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(dump_yaml(mapping), "utf-8")
    assert repr(read_yaml(path)) == repr(mapping)


def test_settings_go_to_yaml_and_back(tmp_path):
    settings = check(tune(data=["a", "b"], learning_rate=1e-7, model="1e-5", output="é/x", weights=(0.5,)))
    text = to_yaml(settings)
    lines = ["model: '1e-5'", "data:", "- a", "- b", "learning_rate: 1.0e-07", "steps: null"]
    assert text.splitlines()[: len(lines)] == lines
    assert "output: é/x" in text
    (tmp_path / "f.yaml").write_text(text, "utf-8")
    assert from_mapping(Tune, read_yaml(tmp_path / "f.yaml"), "f") == settings


def test_values_shared_by_two_fields_are_written_twice():
    shared = ["a"]
    assert dump_yaml({"a": shared, "b": shared}) == "a:\n- a\nb:\n- a\n"
    assert plain({"a": (Path("x"), {"b": (1,)})}) == {"a": ["x", {"b": [1]}]}


# ------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ((), {}),
        (("--learning-rate", "3e-4"), {"learning_rate": 3e-4}),
        (("--learning_rate", "3e-4"), {"learning_rate": 3e-4}),
        (("--learning_rate=3e-4",), {"learning_rate": 3e-4}),
        (("--learning-rate", "1", "--learning-rate", "2"), {"learning_rate": 2.0}),
        (("--steps", "7"), {"steps": 7}),
        (("--steps", "None"), {}),
        (("--weights", "1", "2.5"), {"weights": (1.0, 2.5)}),
        (("--no-shuffle",), {"shuffle": False}),
        (("--no_shuffle",), {"shuffle": False}),
        (("--shuffle", "False"), {"shuffle": False}),
        (("--shuffle=false",), {"shuffle": False}),
        (("--shuffle", "--dry-run"), {"dry_run": True}),
        (("--dry_run", "true", "--steps", "2"), {"dry_run": True, "steps": 2}),
        (("--dry-run=True",), {"dry_run": True}),
        (("--dry_run", "false"), {}),
        (("--output", "o"), {"output": Path("o")}),
        (("--model=-x",), {"model": "-x"}),
    ],
)
def test_flags(words, values):
    assert arguments(*GIVEN, *words) == tune(**values)


def test_several_files_are_one_flag():
    assert arguments("--data", "a", "b", "--model", "m").data == ("a", "b")


@pytest.mark.parametrize(
    "words",
    [
        ("--data", "a", "--data", "b", "c"),
        ("--data=a", "--steps", "3", "--data", "b", "c", "--dry-run"),
        ("--data", "a", "b", "--no-shuffle", "--data=c"),
    ],
)
def test_a_list_may_be_given_in_parts(words):
    assert arguments("--model", "m", *words).data == ("a", "b", "c")
    assert arguments(*GIVEN, "--weights", "1", "--weights", "2.5").weights == (1.0, 2.5)
    assert arguments(*GIVEN, "--weight", "1", "--weight=2.5", "--weights", "3").weights == (1.0, 2.5, 3.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--learning-rat", "1"), "there is no flag --learning-rat; the nearest is --learning-rate."),
        (("--lerning_rate=1",), "there is no flag --lerning_rate; the nearest is --learning-rate."),
        (("--no-model",), "there is no flag --no-model; the nearest is --model."),
        (("--confg", "x"), "the nearest is --config."),
        (("--learning-rate", "fast"), "Error parsing --learning-rate: could not convert string to float: 'fast'; see"),
        (("--learning-rate", "-1"), "`learning_rate` is -1.0, but must be greater than 0."),
        (("--learning-rate",), "plaudit tune: --learning-rate needs a value."),
        (("--steps", "x"), "Error parsing --steps: "),
        (("--schedule", "cosine"), "invalid choice 'cosine' for argument '--schedule'"),
        (("--dry-run", "perhaps"), "Unrecognized options: perhaps; see plaudit tune --help."),
        (("--warmup", "0", "--reserve", "3"), "`reserve` counts from the warm-up, but `warmup` is 0."),
        (("--data", "--steps", "1"), "--data needs a value."),
        (("--weights",), "--weights needs a value."),
        (("--config",), "--config needs a value."),
        (("--config=", "--steps", "1"), "cannot be read (Is a directory)"),
        (("--config", "--steps", "1"), "--config needs a value."),
    ],
)
def test_wrong_flags_are_refused_in_a_sentence(words, said, capsys):
    with pytest.raises(PlauditError) as caught:
        arguments(*GIVEN, *words)
    assert said in str(caught.value)
    assert capsys.readouterr() == ("", "")


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("kind", [io.TextIOWrapper, Terminal])
def test_the_sentence_is_the_same_on_every_terminal(kind, encoding, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", kind(io.BytesIO(), encoding=encoding))
    with pytest.raises(PlauditError) as caught:
        arguments(*GIVEN, "--warmup", "fast")
    said = "plaudit tune: Error parsing --warmup: could not convert string to float: 'fast'; see plaudit tune --help."
    assert str(caught.value) == said


def test_a_missing_flag_is_named():
    with pytest.raises(PlauditError, match=r"plaudit tune: --data is required; give the flag, or `data` in a --config"):
        arguments("--model", "m")


def test_defaults_below_file_below_flags(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("verb: tune\nmodel: from-file\ndata: [a, b]\nlearning_rate: 1e-3\nshuffle: no\nsteps: 5\n")
    config = ("--config", str(path))
    values = {"model": "from-file", "data": ("a", "b"), "learning_rate": 1e-3, "shuffle": False, "steps": 5}
    assert arguments(*config) == tune(**values)
    flags = ("--shuffle", "--steps", "None", "--learning-rate=2", "--data", "c")
    over = {"shuffle": True, "steps": None, "learning_rate": 2.0, "data": "c"}
    assert arguments(*flags, *config).model == "from-file"
    mixed = arguments(f"--config={path}", *flags)
    assert to_mapping(mixed) | {"data": "c"} == to_mapping(tune(**(values | over)))


def test_a_combination_is_judged_after_file_and_flags_are_joined(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("reserve: 3\nwarmup: 0\n")
    assert arguments("--config", str(path), *GIVEN, "--warmup", "0.5").reserve == 3
    with pytest.raises(PlauditError, match="counts from the warm-up"):
        arguments("--config", str(path), *GIVEN)


def test_mistakes_in_the_file_name_the_file(tmp_path):
    path = tmp_path / "f.yaml"
    for content, said in [("steps: 0", "`steps` is 0"), ("stps: 3", "nearest is `steps`"), ("- a", "must hold")]:
        path.write_text(content)
        with pytest.raises(PlauditError) as caught:
            arguments(*GIVEN, "--steps", "3", "--config", str(path))
        assert str(caught.value).startswith(f"{path}: ")
        assert said in str(caught.value)


def test_help_shows_each_field_with_its_docstring_and_default(tmp_path, capsys):
    (tmp_path / "f.yaml").write_text("steps: 77\n")
    with pytest.raises(SystemExit) as stop:
        arguments("--help", "--config", str(tmp_path / "f.yaml"))
    shown, errors = capsys.readouterr()
    text = " ".join(re.sub("[│|]", " ", shown).split())
    assert (stop.value.code or 0, errors) == (0, "")
    assert "usage: plaudit tune" in text
    assert "Tunes a model." in text
    assert "--model STR The model to start from. (required)" in text
    assert "--learning-rate FLOAT Peak learning rate. (default: 1e-05)" in text
    assert "Optimizer steps. (default: 77)" in text
    assert "--shuffle, --no-shuffle Shuffle the rows. (default: True)" in text
    assert "--config FILE A YAML file" in text
    flags = {word.strip(",") for word in text.split() if re.match("--[a-z]", word)}
    expected = {"--" + name.replace("_", "-") for name in to_mapping(tune())}
    assert flags == expected | {"--help", "--config", "--no-shuffle", "--no-dry-run"}


def test_importing_the_plain_modules_loads_nothing_heavy():
    heavy = ("torch", "numpy", "transformers", "pydantic", "tyro", "yaml")
    code = f"import sys, plaudit.records, plaudit.config, plaudit.run; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
