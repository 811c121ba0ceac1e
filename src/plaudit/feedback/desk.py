"""Asking from a program: questions go to the label server over HTTP, and answers are read from its store."""

from __future__ import annotations

import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from plaudit.errors import PlauditError
from plaudit.feedback import serving
from plaudit.feedback.following import Following
from plaudit.feedback.forms import item_from_json, item_to_json
from plaudit.feedback.items import Item, Label
from plaudit.feedback.schema import lock_of
from plaudit.feedback.store import Store
from plaudit.records import rows
from plaudit.run import write_atomically

AT_ONCE = 100
"""Questions in one request."""
GRACE = 10.0
"""Seconds that a server may take to end."""
PAUSE = 0.1
"""Seconds between two looks at the store."""


class Desk:
    """A store and the server that people answer at. Use `Desk.open`.

    join    the link that anybody may join with; empty where people are named
    people  the links of those who are
    url     where programs on this machine reach the server
    """

    def __init__(self, served: serving.Served, store: Store) -> None:
        self.join, self.people, self.url = served.join_url, served.people, served.url
        self._served, self._following = served, Following(store)
        # What is on this machine is not asked for through a proxy.
        self._opener = build_opener(ProxyHandler({}))

    @classmethod
    @contextmanager
    def open(cls, path: Path, **options: Any) -> Iterator[Desk]:
        """The desk over the store at `path`, made if need be, with options of `serving.Options`; its server ends with
        the block. Raises PlauditError."""
        _left(path)
        with serving.start(path, **options) as served, Store.read(path) as store:
            yield cls(served, store)

    def tell(self, say: Callable[[str], None]) -> None:
        """Says where people go, and where their answers can be looked through."""
        links = self.people or {"people": self.join}
        for name, link in {**links, "review": self._served.review_url}.items():
            say(f"{name}: {link}")

    def post(self, place: str, body: Any) -> Any:
        """What the server answers to the manager. Raises PlauditError with its sentence."""
        headers = {"Authorization": f"Bearer {self._served.manager_token}", "Content-Type": "application/json"}
        request = Request(f"{self.url}{place}", json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=60) as reply:
                return json.load(reply)
        except HTTPError as error:
            with error:
                said = json.load(error).get("error", error.reason)
            raise PlauditError(f"the label server refused {place}: {said}") from None
        except OSError as error:  # a reply that breaks off or never comes is no URLError
            reason = getattr(error, "reason", error)
            sentence = f"the label server does not answer ({reason}); the same command starts it again."
            raise PlauditError(sentence) from None

    def ask(self, items: Sequence[Item], priority: int = 0) -> None:
        """Puts questions before people; those that are there already are not asked again."""
        for start in range(0, len(items), AT_ONCE):
            part = [item_to_json(item) for item in items[start : start + AT_ONCE]]
            self.post("/api/items", {"items": part, "priority": priority})

    def labels(self, items: Sequence[Item]) -> list[Label]:
        """The answers to these questions, in the order of the questions and then of the names, whoever came first:
        the same answers are the same list. Repeats are left out."""
        places = {item.id: place for place, item in enumerate(items)}
        found = [label for label in self._following.labels() if label.item.id in places and not label.repeat]
        return sorted(found, key=lambda label: (places[label.item.id], label.person))

    def wait(
        self, items: Sequence[Item], needed: int, told: Callable[[int], None], check: Callable[[], None] = lambda: None
    ) -> list[Label]:
        """The answers to these questions, once there are so many; `told` hears how many there are, and `check` may
        raise what makes waiting useless. Raises PlauditError if the server ends meanwhile."""
        seen = ""
        while True:
            if (version := self._following.version) != seen:
                seen, labels = version, self.labels(items)
                told(len(labels))
                if len(labels) >= needed:
                    return labels
            check()
            if self._served.process.poll() is not None:
                raise PlauditError("the label server ended; the same command starts it again.")
            time.sleep(PAUSE)


def _left(path: Path) -> None:
    """Waits for a server to end that has just lost its program: it gives the store up within moments."""
    lock, until = lock_of(path), time.monotonic() + GRACE
    while lock.exists() and time.monotonic() < until:
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)


def keep(path: Path, items: Sequence[Item]) -> None:
    """Writes questions as JSON lines, all of them or none."""
    lines = [json.dumps(item_to_json(item), ensure_ascii=False) for item in items]
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def kept(path: Path) -> list[Item]:
    """The questions that `keep` wrote, in their order; [] if it has not. Raises PlauditError for anything else."""
    return [item_from_json(value, where) for where, value in rows(path)] if path.exists() else []


def share_of(count: int, share: float) -> int:
    """The least whole number that is `share` of `count`, floating-point dust aside."""
    return math.ceil(count * share - 1e-9)
