"""People for tests: they answer over HTTP as a page would, by a rule of their own."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plaudit.feedback import secret

Rule = Callable[[str, list[str]], dict[str, Any]]
"""The prompt and the answers in the order shown -> what is sent."""


def call(url: str, token: str, body: Any = None) -> Any:
    """The JSON that the server answers."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, headers), timeout=60) as reply:
        return json.load(reply)


def longest(prompt: str, answers: list[str]) -> dict[str, Any]:
    """Prefers the answer with more characters, and cannot compare those that are equally long."""
    first, second = map(len, answers)
    return {"choice": "cant" if first == second else "left" if first > second else "right"}


def former(prompt: str, answers: list[str]) -> dict[str, Any]:
    """Prefers what comes first in the alphabet of computers."""
    return {"choice": "left" if answers[0] < answers[1] else "right"}


@contextmanager
def answering(
    store: Path, name: str = "anna", rule: Rule = longest, most: int = 10**9, after: Path | None = None
) -> Iterator[list[str]]:
    """Somebody who waits for the server of this store, and for the file `after` if one is named, and then answers up to
    `most` questions; gives the ids of what they answered. Once the server is gone they wait for the next one."""
    done: list[str] = []
    over = threading.Event()
    person = threading.Thread(target=_answer, args=(store, name, rule, most, after or store, done, over), daemon=True)
    person.start()
    try:
        yield done
    finally:
        over.set()
        person.join()


def _answer(store: Path, name: str, rule: Rule, most: int, after: Path, done: list[str], over: threading.Event) -> None:
    token = ""
    while len(done) < most and not over.is_set():
        time.sleep(0.02)
        if not (secret.path_of(store).exists() and after.exists()):
            continue
        known = secret.load(store)
        url = f"http://127.0.0.1:{known.port}"
        try:
            # Who is named has a token already; others are let in.
            token = token or known.people.get(name) or call(f"{url}/api/people", known.manager, {"name": name})["token"]
            for task in call(f"{url}/api/next?count=1", token)["tasks"]:
                if len(done) < most:
                    answer = {"answer": rule(task["prompt"], task["answers"]), "ms": 5, "key": uuid.uuid4().hex}
                    call(f"{url}/api/answer", token, {"assignment": task["assignment"], **answer})
                    done.append(task["assignment"])
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            continue
