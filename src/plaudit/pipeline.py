"""A file of stages, run one after the other; what is done is not done again."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from plaudit import checks, config, machine, sources
from plaudit.errors import PlauditError
from plaudit.run import Run, write_atomically
from plaudit.settings import SFT, VERBS, Bench, Evaluate, Pull, Reward, Sample
from plaudit.settings.scratch import described

_COST = ("seconds", "peak_memory_mb", "tokens_per_second")


def read(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """(output folder, settings of each stage by name) of a pipeline file, checked before anything runs.

    A stage's name is its verb, unless it has a `verb` of its own. `{output}` in any text stands for the output
    folder, and data and the files of reward functions are looked for beside `path` where the current directory has
    none.
    `overrides` are `output=FOLDER` and `stage.field=value`, values written as in YAML. Raises PlauditError.
    """
    file = config.read_yaml(path)
    for key in file:
        if key not in ("output", "stages"):
            raise PlauditError(f"{path}: a pipeline has `output` and `stages`, not `{key}`.")
    stages = _stages(path, file.get("stages"))
    for override in overrides:
        _override(file, stages, override)
    output = str(file.get("output") or f"runs/{Path(path).stem}")
    built: dict[str, Any] = {}
    for name, values in stages.items():
        verb, where = str(values.pop("verb", name)), f"{path}: stage {name!r}"
        if verb not in VERBS:
            raise PlauditError(f"{where}: there is no verb {verb!r}{_instead(verb, VERBS)}")
        values.setdefault("output", f"{output}/{name}")
        filled = {key: _filled(value, output) for key, value in values.items()}
        for key in filled.keys() & {"rewards", "judge", "data", "eval_data"}:
            filled[key] = beside(filled[key], Path(path).parent)
        built[name] = config.from_mapping(VERBS[verb], filled, where)
    return Path(output), built


def _stages(path: str | Path, stages: Any) -> dict[str, dict[str, Any]]:
    form = "give `stages`, each a name with its settings below it"
    if not isinstance(stages, dict) or not stages:
        raise PlauditError(f"{path}: there are no stages: {form}.")
    for name, values in stages.items():
        if not isinstance(values, dict | None):
            raise PlauditError(f"{path}: stage {name!r} is {values!r:.60}: {form}.")
    return {str(name): dict(values or {}) for name, values in stages.items()}


def _override(file: dict[str, Any], stages: dict[str, dict[str, Any]], override: str) -> None:
    name, found, text = override.partition("=")
    stage, _, field = name.partition(".")
    if not found or not (field or name == "output"):
        form = f"output=FOLDER or stage.field=value, a stage being {' or '.join(stages)}"
        raise PlauditError(f"{override!r} is no override: write {form}.")
    value = config.parse_value(text)
    if name == "output":
        file["output"] = value
    elif stage in stages:
        stages[stage][field] = value
    else:
        raise PlauditError(f"override {override!r}: there is no stage {stage!r}{_instead(stage, stages)}")


def _instead(name: str, known: Collection[str]) -> str:
    nearest = get_close_matches(name, known, 1, 0.0)[0]
    return f"; the nearest is {nearest!r}, of {', '.join(known)}."


def _filled(value: Any, output: str) -> Any:
    if isinstance(value, str):
        return value.replace("{output}", output)
    if isinstance(value, list):
        return [_filled(item, output) for item in value]
    return value


def beside(spec: Any, folder: Path) -> Any:
    """`file.py:name`, or a file of data, as found from here or, failing that, from `folder`."""
    if isinstance(spec, list):
        return [beside(item, folder) for item in spec]
    place = str(spec).rpartition(":")[0] or str(spec)
    known = place.endswith((".py", *checks.LINES, checks.TEXT, *checks.TABLES))
    moved = known and not Path(place).exists() and (folder / place).exists()
    return str(folder / spec) if moved else spec


def run(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Runs every stage that is not done and returns the path of the report. Raises PlauditError, Interrupted."""
    output, stages = read(path, overrides)
    _look_ahead(stages, output)
    from plaudit import report
    from plaudit.hooks import tell

    summary: dict[str, Any] = {"stages": {}}
    with Run.open(output, {"verb": "run", "stages": list(stages)}, ("stages",)) as whole:
        for number, (name, settings) in enumerate(stages.items(), 1):
            tell(f"{number}/{len(stages)} {name}")
            done = _stage(settings)
            summary["stages"][name] = {key: done[key] for key in _COST if key in done}
            summary[name] = {key: value for key, value in done.items() if key not in (*_COST, "verb")}
            machine.release()
        whole.finish(summary)
    return report.write(output)


def _look_ahead(stages: Mapping[str, Any], output: Path) -> None:
    """Whatever no stage makes has to be there before the first one runs. Raises PlauditError."""
    made = [str(output), *(stage.output for stage in stages.values() if stage.output)]

    def given(stage: Any, field: str) -> list[str]:
        value = getattr(stage, field, None) or ()
        names = [value] if isinstance(value, str) else value
        return [name for name in names if not any(place in name for place in made)]

    for name, stage in stages.items():
        try:
            checks.check_data(given(stage, "data") + given(stage, "eval_data"))
            checks.check_rewards(given(stage, "rewards") + given(stage, "judge"))
            for model in given(stage, "policies"):
                checks.check_model(model.partition("=")[2] or model)
            for model in given(stage, "model"):
                if not (isinstance(stage, SFT | Reward) and described(model)):
                    checks.check_model(model)
        except PlauditError as error:
            raise PlauditError(f"stage {name!r}: {error}") from None


def _stage(settings: Any) -> Mapping[str, Any]:
    """Runs one stage and returns its summary."""
    if isinstance(settings, Pull):
        started = time.perf_counter()
        pull(settings)
        return {"seconds": time.perf_counter() - started}
    if isinstance(settings, Sample):
        return {"path": _sampled(settings)}
    if isinstance(settings, Bench):
        from plaudit.bench import bench

        return bench(settings)
    if isinstance(settings, Evaluate):
        from plaudit.inference import evaluate

        return evaluate(settings).summary
    from plaudit.recipes import train

    return train(settings).summary


def _sampled(settings: Sample) -> str:
    from plaudit.inference import sample

    return settings.output if Path(settings.output).exists() else str(sample(settings))


def pull(settings: Pull) -> list[Path]:
    """Fetches what is named into the cache and returns its folders; the files of data sets are copied into `output`
    too, where none of that name is there yet."""
    folders = [sources.pull(name, progress=lambda said: print(said, file=sys.stderr)) for name in settings.names]
    for folder in folders:
        if settings.output and not (folder / "config.json").exists():
            for file in sorted(folder.iterdir()):
                copy = Path(settings.output, file.name)
                if not copy.exists():
                    write_atomically(copy, file.read_bytes())
    return folders
