"""The verbs. This module stays light: `plaudit --help` answers before anything of the machinery is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from plaudit.errors import PlauditError

_OTHERS = {
    "loop": "Rounds of asking people, fitting a reward model and improving the policy.",
    "run": "A file of stages; what is done is not done again.",
    "quickstart": "The whole loop on a small model and real human ratings.",
    "explain": "What a run would do: batches, memory, one example with its mask.",
    "report": "One HTML page of a run or a pipeline.",
}
_USAGES = {
    "loop": "usage: plaudit loop FILE [field=value ...]",
    "run": "usage: plaudit run FILE [output=FOLDER] [stage.field=value ...]",
    "quickstart": "usage: plaudit quickstart [output=FOLDER] [stage.field=value ...]",
    "report": "usage: plaudit report FOLDER",
    "explain": "usage: plaudit explain VERB [--config FILE] [--field value ...]",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit status 0; 2 for what the user can put right, said in one sentence; 130 or 143 after a
    signal, once the last finished step is saved."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from plaudit import __version__

        print(f"plaudit {__version__}")
        return 0
    _be_quiet()
    try:
        with _flushed():
            _run(arguments[0], arguments[1:])
    except PlauditError as error:
        said = str(error).removeprefix(f"{arguments[0]}: ")
        print(said if said.startswith("plaudit ") else f"plaudit {arguments[0]}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("plaudit: stopped; nothing that was saved is lost.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseException as error:
        if type(error).__name__ != "Interrupted":  # its module loads torch, which has not happened if it isn't there
            raise
        print(f"plaudit {arguments[0]}: {error}", file=sys.stderr)
        return int(getattr(error, "code", 1))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # One of several processes: all is written, and at the interpreter's own end gloo's threads may abort it
        # (pytorch/pytorch#179291), which would tell the launcher of a failure that was none.
        sys.stderr.flush()
        os._exit(0)
    return 0


def _help() -> str:
    """All verbs, family by family, each with the first sentence of its settings."""
    from plaudit.settings import FAMILIES

    families = {name: {verb: str(cls.__doc__) for verb, cls in verbs.items()} for name, verbs in FAMILIES.items()}
    lines = [
        "usage: plaudit VERB [--config FILE] [--field value ...]",
        "",
        "plaudit teaches language models from what people prefer.",
    ]
    for name, verbs in {**families, "Whole runs": _OTHERS}.items():
        first = {verb: " ".join(said.split(".")[0].split()) for verb, said in verbs.items()}
        lines += ["", f"{name}:", *(f"  {verb:<13} {said}" for verb, said in first.items())]
    lines += ["", "`plaudit VERB --help` shows the settings of a verb: defaults, then the YAML file, then flags."]
    return "\n".join(lines)


@contextmanager
def _flushed() -> Iterator[None]:
    """That the reader of the output has gone should show here, not while Python shuts down."""
    try:
        yield
    finally:
        sys.stdout.flush()


def _be_quiet() -> None:
    """Other libraries' chatter and telemetry stay out of the terminal unless they were asked for."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TQDM_DISABLE": "1",
    }.items():
        os.environ.setdefault(name, value)


def _run(verb: str, words: list[str]) -> None:
    from plaudit.settings import FAMILIES

    if verb in _USAGES and words[:1] in (["-h"], ["--help"]):
        print(_USAGES[verb])
    elif verb == "explain":
        if not words:
            raise PlauditError("give the verb that is to be explained: plaudit explain VERB")
        from plaudit.explain import explain

        explain(_settings(words[0], words[1:], "plaudit explain"))
    elif verb in _USAGES:
        _file_verb(verb, words)
    else:
        settings = _settings(verb, _named(verb, words), "plaudit")
        if verb in FAMILIES["People"]:
            _with_people(verb, settings)
        else:
            _do(verb, settings)


def _named(verb: str, words: list[str]) -> list[str]:
    """`pull NAME ...` and `compare A B` need no flags for what comes first."""
    first = list(takewhile(lambda word: not word.startswith("-"), words))
    if verb == "pull" and first:
        return ["--names", *words]
    if verb == "compare" and len(first) == 2:
        return ["--a", first[0], "--b", first[1], *words[2:]]
    return words


def _settings(verb: str, words: list[str], prog: str) -> Any:
    from plaudit import config
    from plaudit.settings import VERBS

    if verb not in VERBS:
        from difflib import get_close_matches

        others = [] if prog.endswith("explain") else [*_USAGES, "--help", "--version"]
        near = get_close_matches(verb, [*VERBS, *others], 1)
        hint = f"did you mean {near[0]!r}?" if near else "`plaudit --help` lists them all."
        raise PlauditError(f"there is no verb {verb!r}{' to explain' * (not others)}; {hint}")
    return config.from_arguments(VERBS[verb], words, f"{prog} {verb}")


def _do(verb: str, settings: Any) -> None:
    if verb == "pull":
        from plaudit import pipeline

        print(*pipeline.pull(settings), sep="\n")
    elif verb == "sample":
        from plaudit.inference import sample

        if path := sample(settings):
            print(path)
    elif verb == "evaluate":
        from plaudit.inference import evaluate

        print(evaluate(settings).folder)
    elif verb == "bench":
        from plaudit.bench import bench

        bench(settings)
    else:
        from plaudit.recipes import train

        print(train(settings).folder)


def _with_people(verb: str, settings: Any) -> None:
    """The verbs of asking people, which load no torch unless a policy or a reward model has to answer."""
    if verb == "label":
        from plaudit.labelling import label

        label(settings)
    elif verb == "compare":
        from plaudit.versus import compare

        print(compare(settings).folder)
    elif verb in ("agreement", "annotate"):
        from plaudit import people

        found = people.agreement(settings) if verb == "agreement" else sum(people.annotate(settings))
        print(found if verb == "agreement" else f"{found} answers")
    else:
        from plaudit.feedback import exchange

        print(exchange.export(settings) if verb == "export" else exchange.take_in(settings))


def _file_verb(verb: str, words: list[str]) -> None:
    if verb == "report":
        if len(words) != 1:
            raise PlauditError("give one run folder: plaudit report FOLDER")
        from plaudit import report

        print(report.write(Path(words[0])))
        return
    from plaudit import pipeline

    if verb in ("run", "loop") and not words:
        raise PlauditError(f"give a file: plaudit {verb} FILE")
    if verb == "loop":
        from plaudit import looping

        print(looping.run(words[0], words[1:]))
        return
    file, overrides = (words[0], words[1:]) if verb == "run" else (shipped("quickstart.yaml"), words)
    print(pipeline.run(file, overrides))


def shipped(name: str) -> Path:
    """A recipe that comes with plaudit: beside the package when installed, in the checkout otherwise."""
    here = Path(__file__).parent
    installed = here / "shipped" / name
    return installed if installed.exists() else here.parents[1] / "recipes" / name


if __name__ == "__main__":
    sys.exit(main())
