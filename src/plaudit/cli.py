"""The verbs. This module stays light: `plaudit --help` answers before anything of the machinery is loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from plaudit.errors import PlauditError

_VERBS = """\
  pull        fetch a public model or data set, pinned by its SHA-256
  sft         learn to continue prompts as demonstrations do
  reward      a reward model from comparisons, rankings or ratings
  ppo         a policy that learns to please a reward, near a reference
  sample      completions of prompts, to a file or in the terminal
  evaluate    policies side by side: reward, judge, win rate, KL, diversity
  explain     what a run would do: batches, memory, one example with its mask
  run         a file of stages; what is done is not done again
  quickstart  the whole loop on a small model and real human ratings
  report      one HTML page of a run or a pipeline
"""
_HELP = f"""\
usage: plaudit VERB [--config FILE] [--field value ...]

plaudit teaches language models from what people prefer.

{_VERBS}
`plaudit VERB --help` shows that verb's settings. Settings come from defaults, then the YAML file, then flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit status 0; 2 for what the user can put right, said in one sentence; 130 or 143 after a
    signal, once the last finished step is saved."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if arguments[0] == "--version":
        from plaudit import __version__

        print(f"plaudit {__version__}")
        return 0
    _be_quiet()
    try:
        _run(arguments[0], arguments[1:])
    except PlauditError as error:
        print(f"plaudit {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("plaudit: stopped; nothing that was saved is lost.", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ != "Interrupted":  # its module loads torch, which has not happened if it isn't there
            raise
        print(f"plaudit {arguments[0]}: {error}", file=sys.stderr)
        return int(getattr(error, "code", 1))
    return 0


def _be_quiet() -> None:
    """Other libraries' chatter and telemetry stay out of the terminal unless they were asked for."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    }.items():
        os.environ.setdefault(name, value)


def _run(verb: str, words: list[str]) -> None:
    if verb in ("run", "quickstart", "report"):
        _file_verb(verb, words)
        return
    from plaudit import config
    from plaudit.settings import VERBS

    explaining = verb == "explain"
    if explaining:
        verb, words = (words[0], words[1:]) if words else ("", [])
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, [*VERBS, "run", "report", "quickstart", "explain"], 1)
        hint = f"; did you mean {near[0]!r}?" if near else " (plaudit --help lists the verbs)."
        raise PlauditError(f"there is no verb {verb!r}{hint}")
    settings = config.from_arguments(VERBS[verb], words, f"plaudit {'explain ' if explaining else ''}{verb}")
    if explaining:
        from plaudit.explain import explain

        explain(settings)
    elif verb == "pull":
        from plaudit import pipeline

        pipeline.pull(settings)
    elif verb in ("sample", "evaluate"):
        from plaudit import inference

        result = getattr(inference, verb)(settings)
        print(result if verb == "sample" else result.folder) if result else None
    else:
        from plaudit.recipes import train

        print(train(settings).folder)


def _file_verb(verb: str, words: list[str]) -> None:
    if any(word in ("-h", "--help") for word in words):
        print(
            {
                "run": "usage: plaudit run FILE [output=FOLDER] [stage.field=value ...]",
                "quickstart": "usage: plaudit quickstart [output=FOLDER] [stage.field=value ...]",
                "report": "usage: plaudit report FOLDER",
            }[verb]
        )
        return
    if verb == "report":
        if len(words) != 1:
            raise PlauditError("give one run folder: plaudit report FOLDER")
        from plaudit import report

        print(report.write(Path(words[0])))
        return
    from plaudit import pipeline

    if verb == "run" and not words:
        raise PlauditError("give a pipeline file: plaudit run FILE")
    file, overrides = (words[0], words[1:]) if verb == "run" else (shipped("quickstart.yaml"), words)
    print(pipeline.run(file, overrides))


def shipped(name: str) -> Path:
    """A recipe that comes with plaudit: beside the package when installed, in the checkout otherwise."""
    here = Path(__file__).parent
    installed = here / "shipped" / name
    return installed if installed.exists() else here.parents[1] / "recipes" / name


if __name__ == "__main__":
    sys.exit(main())
