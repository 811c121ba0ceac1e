"""`rm_train`: the command with which EasyRLHF trains reward models, as its README writes it, for `plaudit reward`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from plaudit import cli
from plaudit.errors import PlauditError

RENAMED = {
    "train_file": "data",
    "train_data": "data",
    "valid_file": "eval-data",
    "valid_data": "eval-data",
    "output_dir": "output",
    "project_name": "track-project",
}
"""Its flags, in both of its spellings, and what they are called here."""

_HELPFUL = [f"data/helpful-{kind}" for kind in ("base", "online", "rejection-sampled")]
DEFAULTS = {
    "model": "gpt2-xl",
    "data": ",".join(f"{folder}/train.jsonl" for folder in _HELPFUL),
    "eval-data": ",".join(f"{folder}/test.jsonl" for folder in _HELPFUL),
    "output": "outputs/my-reward-model",
    "track-project": "easy-rlhf",
}
"""What holds where neither a flag nor a `--config` file is given."""

_USAGE = """\
usage: rm_train [--devices 0,1] [--master_port 50000] [--project_name NAME] [--output_dir FOLDER]
                [--train_file FILES] [--valid_file FILES] [--any-setting-of-plaudit-reward value ...]

FILES are .jsonl or .jsonl.gz, with commas between; --train_data and --valid_data are the same.
`plaudit reward --help` shows what else may be set."""


def main(argv: Sequence[str] | None = None) -> int:
    """Trains on one device in this process; for several, becomes accelerate's launcher. The exit status of `plaudit
    reward`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(words):
        print(_USAGE)
        return 0
    try:
        arguments, devices, port = translated(words)
    except PlauditError as error:
        print(f"rm_train: {error}", file=sys.stderr)
        return 2
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    if "," not in devices:
        return cli.main(arguments)
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(devices.count(",") + 1)]
    port_of = ["--main_process_port", port]
    # A list, and no shell: whatever stands in a value reaches `plaudit` as that value.
    os.execv(sys.executable, [sys.executable, *launcher, *port_of, "-m", "plaudit.cli", *arguments])


def translated(words: Sequence[str]) -> tuple[list[str], str, str]:
    """(the words after `plaudit`, devices, port). Raises PlauditError for devices or a port that are none."""
    own = {"devices": "0", "master_port": "50000"}
    arguments, given, queue = ["reward"], set(), list(words)
    while queue:
        word = queue.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
        if name in own:
            own[name] = value if equals else "".join(queue[:1])
            del queue[: not equals]
            continue
        given.add(RENAMED.get(name, name.replace("_", "-")))
        arguments.append(f"--{RENAMED[name]}{equals}{value}" if name in RENAMED else word)
    if not re.fullmatch(r"\d+(,\d+)*", own["devices"]):
        raise PlauditError(f"--devices is {own['devices']!r}: give numbers with commas between, as in 0,1,2,3.")
    if not own["master_port"].isdecimal():
        raise PlauditError(f"--master_port is {own['master_port']!r}: give a number.")
    if "config" not in given:
        arguments += [word for name, value in DEFAULTS.items() if name not in given for word in (f"--{name}", value)]
    return arguments, own["devices"], own["master_port"]


if __name__ == "__main__":
    sys.exit(main())
