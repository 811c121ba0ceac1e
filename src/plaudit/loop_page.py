"""`loop.html`: where a loop stands, as one page that is written anew while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plaudit import report
from plaudit.config import read_yaml
from plaudit.outcome import Stage
from plaudit.plots import curves
from plaudit.records import Comparison, load
from plaudit.run import read_lines, write_atomically
from plaudit.wording import flat, number, percent

PAGE = "loop.html"
AGAIN = 10
"""Seconds after which the page is written anew, and loaded again by browsers that show it."""
SHOWN = 6
"""Answers that the page shows."""
CURVES = ("score", "kl")
"""What it draws of the policy."""


def write(folder: Path, doing: str = "") -> Path:
    """Writes the page of the loop in `folder` and returns its path; `doing` says what is going on, if anything is."""
    settings = read_yaml(folder / "config.yaml")
    rounds = read_lines(folder / "metrics.jsonl")
    steps = _steps(folder)
    last = rounds[-1] if rounds else {}
    done = f"{len(rounds)} of {settings['rounds']} rounds are done, with {number(last.get('labels', 0))} answers."
    page = report.render(
        refresh=AGAIN if doing else 0,
        title=folder.resolve().name,
        headline=f"{doing}; {done}" if doing else done,
        cards=_cards(settings, last, steps),
        costs=[],
        outcomes=[_rounds(rounds, folder)] if rounds else [],
        stages=[
            {
                "name": "loop",
                "title": "The policy, step by step",
                "facts": {},
                "figures": curves(Stage("loop", metrics=steps)),
                "settings": flat(settings),
                "samples": [],
            }
        ],
    )
    write_atomically(folder / PAGE, page)
    return folder / PAGE


@contextmanager
def kept(folder: Path, doing: Callable[[], str]) -> Iterator[None]:
    """Writes the page now, and every few seconds while the block runs; `doing` says what is going on."""
    write(folder, doing())
    ended = threading.Event()

    def again() -> None:
        while not ended.wait(AGAIN):
            write(folder, doing())

    writer = threading.Thread(target=again, daemon=True)
    writer.start()
    try:
        yield
    finally:
        ended.set()
        writer.join()


def _steps(folder: Path) -> list[dict[str, Any]]:
    """The metrics of all rounds' policies, one after the other, steps counted on."""
    rows: list[dict[str, Any]] = []
    for policy in sorted(folder.glob("round-*/policy/metrics.jsonl")):
        before = rows[-1]["step"] if rows else 0
        own = [row for row in read_lines(policy) if row["step"]]
        rows += [{"step": before + row["step"], **{k: row[k] for k in CURVES if k in row}} for row in own]
    return rows


def _cards(settings: dict[str, Any], last: dict[str, Any], steps: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    now = {name: next((row[name] for row in reversed(steps) if name in row), None) for name in CURVES}
    agreement = last.get("agreement")
    return [
        ("labels", number(last.get("labels", 0)), f"of {settings['labels']}"),
        ("agreement", percent(agreement), "held-out answers that the reward model foresees"),
        ("reward", number(now["score"], 2), "of the last rollout, by the newest reward model"),
        ("KL", number(now["kl"], 2), "nats a completion, from the reference"),
    ]


def _rounds(rounds: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """A row for each round that is done, curves over them, and some of the answers that the last one learned from."""
    columns = list(dict.fromkeys(name for row in rounds for name in row if name != "step"))
    over = [{"step": row["step"], **{k: row[k] for k in ("labels", "agreement") if k in row}} for row in rounds]
    samples = _answers(folder / f"round-{rounds[-1]['step']:03d}" / "labels.jsonl")
    return {
        "title": "Round by round",
        "models": {f"round {row['step']}": row for row in rounds},
        "columns": columns,
        "moves": {},
        "win": None,
        "interval": "",
        "figures": curves(Stage("rounds", metrics=over)),
        "samples": samples,
        "shown": f"The last {len(samples)} answers",
    }


def _answers(labels: Path) -> list[list[dict[str, Any]]]:
    """What was preferred to what, side by side."""
    records = load(labels, Comparison).records[-SHOWN:]
    titles = {True: ("as good", "as good"), False: ("preferred", "to this")}
    return [
        [
            {"title": title, "prompt": record.prompt, "text": text, "scores": {}}
            for title, text in zip(titles[record.preference == 0.5], (record.chosen, record.rejected), strict=True)
        ]
        for record in records
    ]
