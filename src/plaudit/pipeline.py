"""A file of stages, run one after the other; what is done is not done again."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plaudit import config, sources
from plaudit.errors import PlauditError
from plaudit.run import Run
from plaudit.settings import VERBS, Evaluate, Pull, Sample

_COST = ("seconds", "peak_memory_mb", "tokens_per_second")


def read(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """(output folder, settings of each stage by name) of a pipeline file, checked before anything runs.

    A stage's name is its verb, unless it has a `verb` of its own. `{output}` in any text stands for the output
    folder. `overrides` are `output=FOLDER` and `stage.field=value`, values written as in YAML. Raises PlauditError.
    """
    file = config.read_yaml(path)
    unknown = sorted(set(file) - {"output", "stages"})
    if unknown or not isinstance(file.get("stages"), dict):
        raise PlauditError(
            f"{path}: a pipeline has `output` and `stages`" + (f", not {unknown[0]!r}." if unknown else ".")
        )
    stages = {name: dict(values or {}) for name, values in file["stages"].items()}
    for override in overrides:
        _override(file, stages, override)
    output = str(file.get("output") or f"runs/{Path(path).stem}")
    built = {}
    for name, values in stages.items():
        verb = values.pop("verb", name)
        if verb not in VERBS:
            raise PlauditError(f"{path}: stage {name!r}: there is no verb {verb!r}; there are {', '.join(VERBS)}.")
        values.setdefault("output", f"{output}/{name}")
        filled = {key: _filled(value, output) for key, value in values.items()}
        built[name] = config.from_mapping(VERBS[verb], filled, f"{path}: stage {name!r}")
    return Path(output), built


def _override(file: dict[str, Any], stages: dict[str, dict[str, Any]], override: str) -> None:
    name, found, text = override.partition("=")
    if not found:
        raise PlauditError(f"{override!r} is no override: write output=FOLDER or stage.field=value.")
    value = config.parse_value(text)
    if name == "output":
        file["output"] = value
        return
    stage, _, field = name.partition(".")
    if stage not in stages:
        raise PlauditError(f"override {override!r}: there is no stage {stage!r}; there are {', '.join(stages)}.")
    stages[stage][field] = value


def _filled(value: Any, output: str) -> Any:
    if isinstance(value, str):
        return value.replace("{output}", output)
    if isinstance(value, list):
        return [_filled(item, output) for item in value]
    return value


def run(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Runs every stage that is not done and returns the path of the report. Raises PlauditError, Interrupted."""
    from plaudit import report
    from plaudit.hooks import tell

    output, stages = read(path, overrides)
    output.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"stages": {}}
    for number, (name, settings) in enumerate(stages.items(), 1):
        tell(f"[bold]{number}/{len(stages)} {name}[/]")
        done = _stage(settings)
        summary["stages"][name] = {key: done[key] for key in _COST if key in done}
        summary[name] = {key: value for key, value in done.items() if key not in (*_COST, "verb")}
        gc.collect()
    with Run.open(output, {"verb": "run", "stages": list(stages)}, ("stages",)) as whole:
        whole.finish(summary)
    return report.write(output)


def _stage(settings: Any) -> Mapping[str, Any]:
    """Runs one stage and returns its summary."""
    if isinstance(settings, Pull):
        return pull(settings)
    if isinstance(settings, Sample):
        return {"path": _sampled(settings)}
    if isinstance(settings, Evaluate):
        from plaudit.inference import evaluate

        return evaluate(settings).summary
    from plaudit.recipes import train

    return train(settings).summary


def _sampled(settings: Sample) -> str:
    from plaudit.inference import sample

    return settings.output if Path(settings.output).exists() else str(sample(settings))


def pull(settings: Pull) -> dict[str, Any]:
    """Fetches what is named into the cache, and data sets into `output` too."""
    started = time.perf_counter()
    for name in settings.names:
        place = sources.pull(name)
        if settings.output and not (place / "config.json").exists():
            shutil.copytree(place, settings.output, dirs_exist_ok=True)
    return {"seconds": time.perf_counter() - started}
