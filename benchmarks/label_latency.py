"""How long a person waits: for the first page, and for each answer while 16 others answer too.

python benchmarks/label_latency.py
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx

from plaudit.feedback import serving
from plaudit.feedback.forms import item_to_json
from plaudit.feedback.items import Candidate, Item

CLIENTS = 16
ANSWERS = 60
PAUSES = {"after half a second, ten times as fast as people": 0.5, "as soon as it may": 0.0}
TEXT = "A reply of about three hundred characters, as people are asked to judge. " * 4


def started(folder: Path) -> float:
    """Seconds from starting Python to the first page, with everything compiled as it is after an installation."""
    seconds = []
    for number in range(4):
        start = time.perf_counter()
        with serving.start(folder / f"start{number}.db") as served:
            assert httpx.get(served.join_url).status_code == 200
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def answering(url: str, token: str, pause: float, answers: int) -> tuple[list[float], list[float]]:
    """Seconds of each question and of each answer of one program, which thinks for `pause` seconds on average."""
    asked, answered = [], []
    # httpx would need more of the processor than the server does, and both share it here.
    connection = HTTPConnection(url.removeprefix("http://"))
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}

    def call(method: str, path: str, body: str | None, times: list[float]) -> Any:
        start = time.perf_counter()
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        text = reply.read()
        times.append(time.perf_counter() - start)
        assert reply.status == 200, text
        return json.loads(text)

    chance = random.Random(token)
    for number in range(answers):
        time.sleep(chance.uniform(0, 2 * pause))
        (task,) = call("GET", "/api/next?count=1", None, asked)["tasks"]
        body = {
            "assignment": task["assignment"],
            "key": f"{token} {pause} {number}",
            "ms": 1,
            "answer": {"choice": "left"},
        }
        call("POST", "/api/answer", json.dumps(body), answered)
    connection.close()
    return asked, answered


def main() -> None:
    """Prints milliseconds: the median and the 95th percentile."""
    subprocess.run([sys.executable, "-c", "import plaudit.feedback.serving"], check=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"first page after {1000 * started(folder):.0f} ms")
        with serving.start(folder / "labels.db") as served:
            headers = {"authorization": f"Bearer {served.manager_token}"}
            with httpx.Client(base_url=served.url, headers=headers, timeout=60) as manager:
                pair = (Candidate(TEXT + "a"), Candidate(TEXT + "b"))
                count = 2 * CLIENTS * ANSWERS
                items = [item_to_json(Item("compare", f"{number} {TEXT}", pair)) for number in range(count)]
                manager.post("/api/items", json={"items": items})
                names = [f"person {number}" for number in range(CLIENTS)]
                tokens = [manager.post("/api/people", json={"name": name}).json()["token"] for name in names]
            for how, pause in PAUSES.items():
                start = time.perf_counter()
                answers = ANSWERS if not pause else ANSWERS // 3
                one = partial(answering, served.url, pause=pause, answers=answers)
                with ThreadPoolExecutor(CLIENTS) as pool:
                    times = list(pool.map(one, tokens))
                rate = CLIENTS * answers / (time.perf_counter() - start)
                print(f"{CLIENTS} programs, each {how}: {rate:.0f} answers a second")
                for what, place in (("question", 0), ("answer", 1)):
                    cuts = quantiles([1000 * second for each in times for second in each[place]], n=20)
                    print(f"  {what}: median {cuts[9]:.1f} ms, 95th percentile {cuts[18]:.1f} ms")


if __name__ == "__main__":
    main()
