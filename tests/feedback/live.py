"""A real label server in a thread, over a store that the tests may look into."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx

from plaudit.feedback import serving
from plaudit.feedback.forms import item_to_json
from plaudit.feedback.items import Candidate, Item, Label
from plaudit.feedback.store import Store


def pair(number: int, left: object = None, right: object = None, prompt: object = None) -> Item:
    """A pair whose models have names that nobody who answers should ever see."""
    texts = left or f"left {number}", right or f"right {number}"
    sources = {"model": "secret-sft", "step": 1}, {"model": "secret-ppo", "step": 2}
    candidates = tuple(Candidate(text, source) for text, source in zip(texts, sources, strict=True))
    return Item("compare", prompt or f"prompt {number}", candidates)


def ranking(number: int, count: int) -> Item:
    return Item(
        "rank", f"rank {number}", tuple(Candidate(f"reply {n}", {"model": f"secret-{n}"}) for n in range(count))
    )


def rating(number: int) -> Item:
    return Item("rate", f"rate {number}", (Candidate("only reply", {"model": "secret-sft"}),))


class Site:
    """What tests do to a server, by HTTP."""

    def __init__(self, links: serving.Links, path: Path, stack: ExitStack) -> None:
        self.links, self.path, self.stack = links, path, stack
        self.manager = self.client(links.manager_token)

    def client(self, token: str | None = None, **more: object) -> httpx.Client:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return self.stack.enter_context(
            httpx.Client(base_url=self.links.url, headers=headers, timeout=20, verify=False, **more)
        )

    def token(self, name: str) -> str:
        return self.manager.post("/api/people", json={"name": name}).json()["token"]

    def person(self, name: str) -> httpx.Client:
        return self.client(self.token(name))

    def add(self, *items: Item, priority: int = 0) -> int:
        body = {"items": [item_to_json(item) for item in items], "priority": priority}
        reply = self.manager.post("/api/items", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()["added"]

    def labels(self) -> list[Label]:
        with Store.read(self.path) as store:
            return store.labels()


class Fresh(Site):
    """A server that several tests share, as one of them sees it: nothing is left to ask but what it adds itself."""

    number = 0

    def __init__(self, shared: Site) -> None:
        Fresh.number += 1
        self.links, self.path, self.stack, self.manager = shared.links, shared.path, shared.stack, shared.manager
        with Store.read(self.path) as store:
            self.before = store.position

    def add(self, *items: Item, priority: int = 0) -> int:
        """The same items again would be no new ones, so their sources differ."""
        return super().add(*map(self.mine, items), priority=priority)

    def mine(self, item: Item) -> Item:
        sources = ({**one.source, "test": self.number} for one in item.candidates)
        told = (replace(one, source=source) for one, source in zip(item.candidates, sources, strict=True))
        return replace(item, candidates=tuple(told))

    def token(self, name: str) -> str:
        return super().token(f"{name} {self.number}")

    def labels(self) -> list[Label]:
        with Store.read(self.path) as store:
            return store.labels(after=self.before)

    def drain(self) -> None:
        """What is open and held by nobody is answered."""
        drain = self.person("drain")
        while open_ := tasks(drain, 20):
            for task in open_:
                assert answer(drain, task, {"choice": "cant"}, f"{task['assignment']} drained").status_code in (
                    200,
                    400,
                )
                if task["kind"] == "rate":
                    answer(drain, task, {"rating": 1}, f"{task['assignment']} rated")


@contextmanager
def fresh(shared: Site):
    """`shared` for one test."""
    found = Fresh(shared)
    yield found
    found.drain()


@contextmanager
def site(path: Path, **options: object):
    """A server over the store at `path`, for as long as the block lasts."""
    stop, up, failed = threading.Event(), threading.Event(), []
    found: list[serving.Links] = []

    def ready(links: serving.Links) -> None:
        found.append(links)
        up.set()

    def run() -> None:
        try:
            serving.serve(serving.Options(store=str(path), **options), ready, stop)
        except BaseException as error:
            failed.append(error)
            up.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert up.wait(20)
        if failed:
            raise failed[0]
        with ExitStack() as stack:
            yield Site(found[0], path, stack)
    finally:
        stop.set()
        thread.join(20)


def answer(person: httpx.Client, task: dict, given: dict, key: str, ms: int = 1000) -> httpx.Response:
    return person.post("/api/answer", json={"assignment": task["assignment"], "key": key, "ms": ms, "answer": given})


def tasks(person: httpx.Client, count: int = 1) -> list[dict]:
    return person.get(f"/api/next?count={count}").json()["tasks"]
