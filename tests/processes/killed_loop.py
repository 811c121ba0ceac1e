"""Runs the loop in the present folder again and again, each time in a process of its own that kills itself at the
moment it is told to; the last one ends by itself. Prints as JSON how each of them ended.

Arguments: the moments in their order, each as `name:count`, the count-th time that it comes in that process.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import plaudit.algorithms.reward_objectives
import plaudit.asking
import plaudit.people  # noqa: F401
from plaudit import comparing, families, loop_page, loop_plan, looping, machine, recipes
from plaudit.feedback import annotator, desk
from plaudit.looping import Looping
from plaudit.trainer import Trainer

MOMENTS: dict[str, tuple[Any, str]] = {
    "sampling": (comparing, "answer"),
    "asking": (desk.Desk, "ask"),
    "posting": (desk.Desk, "post"),
    "answering": (annotator.Annotator, "_answer"),
    "writing": (Looping, "_write"),
    "step": (Trainer, "_after_step"),
    "between": (recipes, "begun"),
    "telling": (Looping, "_figures"),
    "ending": (Looping, "_finish"),
}


def die(owner: Any, name: str, count: int) -> None:
    function: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, deadly)


def one(moment: str) -> int:
    """How the process ended: its status, or minus the signal."""
    child = os.fork()
    if child == 0:
        if moment:
            name, _, count = moment.partition(":")
            die(*MOMENTS[name], int(count))
        looping.run("loop.yaml")
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


torch.set_num_threads(1)
desk.AT_ONCE = 5
machine.release = lambda: None  # a process that ends soon needs no memory back
loop_page.kept = lambda folder, doing: nullcontext()  # the page is drawn from what is compared here
loop_page.write = lambda folder, doing="": folder
os.fsync = lambda descriptor: None  # a kill loses nothing that was written; only a power cut would
# What children need is loaded once.
families.on_policy_classes()
loop_plan.read("loop.yaml")

print(json.dumps([one(moment) for moment in [*sys.argv[1:], ""]]))
