"""The README's part on people, from its text alone: two policies, a person at the keyboard, a reward model, a loop."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from plaudit.feedback.items import Answer
from plaudit.feedback.store import Store

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="the page is read with playwright: pip install it")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CHROMIUM, reason="the page is read in Chromium, and there is no `chromium` here"),
]
README = (ROOT / "README.md").read_text("utf-8")
SECTION = README.partition("## People in the loop\n")[2].partition("\n## ")[0]
COMMANDS = [line for block in re.findall(r"^```bash\n(.*?)^```$", SECTION, re.M | re.S) for line in block.splitlines()]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
ANSWERS = 20


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """What the README speaks of, tiny; its files are written as they stand there."""
    tiny.folder(tmp_path / "my-model")
    for seed, verb in enumerate(("sft", "ppo"), 1):
        tiny.folder(tmp_path / "runs" / verb / "final", seed=seed)
    tiny.lines(tmp_path / "prompts.jsonl", [{"prompt": f"Question {i}: how is it?"} for i in range(24)])
    for text, name in re.findall(r"^```\w+\n(# ([\w-]+\.(?:yaml|py))\n.*?)^```$", README, re.M | re.S):
        (tmp_path / name).write_text(text)
    return tmp_path


def command(line: str) -> list[str]:
    words = shlex.split(line)
    assert words[0] == "plaudit"
    return [sys.executable, "-u", "-m", "plaudit.cli", *words[1:]]


def run(here: Path, line: str) -> str:
    done = subprocess.run(command(line), cwd=here, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def told(process: subprocess.Popen[str]) -> Iterator[str]:
    """What the server says until people can come."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line
        if "Ctrl+C" in line:
            return
    pytest.fail("the server ended before it told its links")


def by_keyboard(link: str) -> tuple[list[str], str]:
    """Answers from the link on, with keys alone; the keys pressed and everything that was seen and sent meanwhile."""
    pressed: list[str] = []
    seen = ""

    def heard(reply: Any) -> None:
        nonlocal seen
        seen += reply.url + (reply.text() if "/api/" in reply.url else "")

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.on("response", heard)
        page.goto(link)
        page.keyboard.type("Ann")
        page.keyboard.press("Enter")
        while len(pressed) < ANSWERS:
            number = len(pressed)
            sync_api.expect(page.locator("#pace")).to_contain_text(f"{number} of 24")
            # A key that is pressed before the next question is there answers nothing.
            sync_api.expect(page.locator("#task")).to_be_visible()
            # A person reads: the longer answer is liked, but for one that is called equal and one that is let be.
            left, right = page.locator("#answers .text").all_inner_texts()
            key = {5: "ArrowUp", 9: "ArrowDown"}.get(number, "ArrowLeft" if len(left) > len(right) else "ArrowRight")
            page.keyboard.press(key)
            if number == 7:  # a slip, taken back
                sync_api.expect(page.locator("#pace")).to_contain_text("8 of 24")
                page.keyboard.press("u")
                sync_api.expect(page.locator("#pace")).to_contain_text("7 of 24")
                page.keyboard.press(key)
            pressed.append(key)
            seen += page.inner_text("body")
        sync_api.expect(page.locator("#pace")).to_contain_text(f"{ANSWERS} of 24")
        browser.close()
    return pressed, seen


def test_two_policies_are_judged_by_keyboard_learned_from_and_improved_on(here: Path) -> None:
    label, agreement, export, reward, loop = COMMANDS
    with subprocess.Popen(command(label), cwd=here, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as server:
        try:
            said = "".join(told(server))
            link = re.findall(r"http://127\.0\.0\.1:\d+/join/\S+", said)[0]
            assert said.startswith("24 questions in labels.db.")
            pressed, seen = by_keyboard(link)
        finally:
            server.send_signal(signal.SIGINT)
            rest, _ = server.communicate(timeout=20)
    assert server.returncode == 0
    assert f"Stopped. {ANSWERS} answers in labels.db" in rest
    # Nobody who answered could have seen who said what.
    assert "how is it?" in seen
    assert not re.search(r"runs/|sft|ppo|model", seen)
    ranks = {"ArrowLeft": (1, 2), "ArrowRight": (2, 1), "ArrowUp": (1, 1), "ArrowDown": None}
    with Store.read(here / "labels.db") as store:
        labels = store.labels()
    assert [label.answer.reordered(label.order) for label in labels] == [Answer(ranks[key]) for key in pressed]
    assert {(label.person, *(one.source["model"] for one in label.item.candidates)) for label in labels} == {
        ("Ann", "runs/sft/final", "runs/ppo/final")
    }

    page = here / run(here, agreement).splitlines()[-1]
    assert "Ann" in page.read_text("utf-8")
    assert run(here, export)
    taste = lines(here / "taste.jsonl")
    # What could not be compared teaches nothing; what is equal is half of each.
    assert len(taste) == ANSWERS - 1
    assert sum(row.get("preference", 1) == 0.5 for row in taste) == 1
    run(here, reward)
    assert json.loads((here / "runs" / "taste" / "summary.json").read_text())["steps"] > 0

    run(here, loop)
    summary = json.loads((here / "runs" / "loop" / "summary.json").read_text())
    assert (summary["rounds"], summary["labels"]) == (3, 60)
    assert [row["labels"] for row in lines(here / "runs" / "loop" / "metrics.jsonl")] == [15, 37, 60]
    assert "3 of 3 rounds are done, with 60 answers." in (here / "runs" / "loop" / "loop.html").read_text("utf-8")
