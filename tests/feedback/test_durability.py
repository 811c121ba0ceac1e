"""No acknowledged answer is lost or doubled: killed servers (R25), and many people at once (R26)."""

import itertools
import random
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live import answer, pair, site

from plaudit.feedback import serving
from plaudit.feedback.forms import item_to_json
from plaudit.feedback.store import Store


class Writer:
    """A person's program that answers on and on, and keeps what was acknowledged."""

    def __init__(self, url, name, token):
        self.name, self.acknowledged, self.refused = name, [], []
        self.client = httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=5, trust_env=False, verify=False
        )

    def ask(self, method, path, **more):
        """Asks until there is an answer, whatever happens to the server meanwhile: the same request, the same key."""
        while not self.stop.is_set():
            try:
                return self.client.request(method, path, **more)
            except httpx.TransportError:
                time.sleep(0.02)
        return None

    def run(self, stop):
        self.stop = stop
        for number in itertools.count():
            reply = self.ask("GET", "/api/next")
            if reply is None or stop.is_set():
                break
            for task in reply.json()["tasks"]:
                note = f"{self.name} {number}"
                body = {
                    "assignment": task["assignment"],
                    "key": note,
                    "ms": 1,
                    "answer": {"choice": "left", "note": note},
                }
                reply = self.ask("POST", "/api/answer", json=body)
                if reply is not None and reply.status_code == 200:
                    self.acknowledged.append(note)
                elif reply is not None:
                    self.refused.append((reply.status_code, reply.text))
        self.client.close()


def killed_server(folder, kills, seed):
    """SIGKILL at random moments under eight writers; the checks are those of R25."""
    chance = random.Random(seed)
    path = folder / "labels.db"
    served = serving.start(path)
    headers = {"authorization": f"Bearer {served.manager_token}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=30, verify=False) as manager:
        items = [item_to_json(pair(number)) for number in range(200 * kills)]
        assert manager.post("/api/items", json={"items": items}).json() == {"added": len(items)}
        tokens = {name: manager.post("/api/people", json={"name": name}).json()["token"] for name in "abcdefgh"}
    writers = [Writer(served.url, name, token) for name, token in tokens.items()]
    stop = threading.Event()
    with ThreadPoolExecutor(len(writers)) as pool:
        running = [pool.submit(writer.run, stop) for writer in writers]
        try:
            for kill in range(kills):
                until = time.monotonic() + 30
                while sum(len(writer.acknowledged) for writer in writers) < 8 * (kill + 1):
                    assert time.monotonic() < until, "nothing is acknowledged any more"
                    time.sleep(0.005)
                time.sleep(chance.uniform(0, 0.1))  # in the middle of whatever is being done
                served.process.kill()
                served.stop()
                served = serving.start(path)
            time.sleep(0.2)
        finally:
            stop.set()
            for one in running:
                one.result(30)
            served.stop()
    with Store.read(path) as store:
        labels = store.labels()
    kept = Counter(label.answer.note for label in labels)
    acknowledged = [note for writer in writers for note in writer.acknowledged]
    assert [refused for writer in writers for refused in writer.refused] == []
    assert len(acknowledged) >= 8 * kills
    assert [note for note in acknowledged if kept[note] != 1] == []
    assert max(kept.values()) == 1
    assert len(kept) - len(acknowledged) <= len(writers)  # those that were in flight at the very end
    assert len({label.item.id for label in labels}) == len(labels)
    return path


def whole(path):
    """The file is sound, and its journal is what a lost cable cannot hurt."""
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        assert db.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
    db.close()
    with Store.open(path) as store:
        assert store._db.execute("PRAGMA synchronous").fetchall() == [(2,)]


def test_nothing_acknowledged_is_lost_or_doubled_when_the_server_is_killed(tmp_path):
    whole(killed_server(tmp_path, 4, 0))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_kills(tmp_path):
    whole(killed_server(tmp_path, 100, 1))


def crowd(study, people, items, overlap):
    """Everybody answers until nothing is left: with double clicks, a second tab, reloads, and some who walk away."""
    study.add(*(pair(number) for number in range(items)))
    clients = {name: study.person(name) for name in (f"person {number}" for number in range(people))}
    until = time.monotonic() + 60

    def work(name):
        chance, client, codes = random.Random(name), clients[name], Counter()
        for step in itertools.count():
            reply = client.get(f"/api/next?count={chance.randint(1, 3)}").json()
            if not reply["tasks"]:
                if reply["progress"]["left"] == 0 or time.monotonic() > until:
                    return codes
                time.sleep(0.05)  # others hold what is left; their leases end
                continue
            task = chance.choice(reply["tasks"])
            if chance.random() < 0.1:
                continue  # a reload, or somebody who walks away from what was leased
            given = {"choice": chance.choice(["left", "right", "equal", "cant"])}
            key = f"{name} {step}"
            codes[answer(client, task, given, key).status_code] += 1
            if chance.random() < 0.2:
                codes["again", answer(client, task, given, key).status_code] += 1
            if chance.random() < 0.1:
                codes["second tab", answer(client, task, {"choice": "left"}, f"{key} b").status_code] += 1

    with ThreadPoolExecutor(people) as pool:
        codes = sum((one.result(90) for one in [pool.submit(work, name) for name in clients]), Counter())
    labels = study.labels()
    seen: dict[str, set[str]] = {}
    for label in labels:
        seen.setdefault(label.item.id, set()).add(label.person)
    assert len(labels) == items * overlap
    assert {len(names) for names in seen.values()} == {overlap}
    assert len(seen) == items
    assert set(codes) <= {200, 409, ("again", 200), ("again", 409), ("second tab", 409)}
    assert codes[200] == len(labels)
    assert codes["second tab", 409]
    assert codes["again", 200]


def test_sixteen_people_and_a_hundred_items_that_three_are_to_answer(tmp_path):
    with site(tmp_path / "labels.db", overlap=3, lease=2) as study:
        crowd(study, 16, 100, 3)
