"""Coming in by the shared link, when the first request is not heard of again; over real HTTP."""

from __future__ import annotations

import socket
import struct
import time

import pytest
from live import answer, pair, site, tasks

from plaudit.feedback.store import Store

KEY, OTHER = "a-key-of-this-browser", "a-key-of-that-browser"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with site(tmp_path_factory.mktemp("joining") / "labels.db") as found:
        found.add(*(pair(number) for number in range(20)))
        yield found


def people(study):
    with Store.read(study.path) as store:
        return store.people()


def joined(study, name, key=None):
    client = study.client()
    return client, client.post(study.links.join, json={"name": name} | ({"key": key} if key else {}))


def test_b06_who_hung_up_before_the_answer_comes_in_under_the_same_name(study):
    host, port = study.links.url.removeprefix("http://").split(":")
    body = b'{"name": "Zo\xc3\xab", "key": "%s"}' % KEY.encode()
    with socket.create_connection((host, int(port))) as gone:
        # A reset, as of a program that has given up: the answer goes nowhere.
        gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        place = study.links.join.removeprefix(study.links.url)
        head = f"POST {place} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
        gone.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        until = time.monotonic() + 10
        while "Zoë" not in people(study) and time.monotonic() < until:
            time.sleep(0.01)
    assert people(study) == ["Zoë"]
    client, reply = joined(study, "Zoë", KEY)
    assert reply.json() == {"ok": True}
    assert client.get("/api/study").json()["person"] == "Zoë"
    assert people(study) == ["Zoë"]


def test_b06_the_key_brings_back_nobody_but_who_joined_with_it(study):
    ann, reply = joined(study, "Ann", KEY)
    assert reply.status_code == 200
    again, reply = joined(study, "Ann", KEY)
    assert reply.status_code == 200
    assert {ann.get("/api/study").json()["person"], again.get("/api/study").json()["person"]} == {"Ann"}
    bob, reply = joined(study, "Bob", KEY)
    assert reply.status_code == 200
    assert bob.get("/api/study").json()["person"] == "Bob"
    for key in (None, OTHER, KEY + " "):
        stranger, reply = joined(study, "Ann", key)
        assert reply.status_code == 409
        assert "set-cookie" not in reply.headers
        assert stranger.get("/api/study").status_code == 401


def test_b06_nobody_takes_over_a_person_who_came_without_a_key_or_by_a_link_of_their_own(study):
    csrf = {}
    client, _ = joined(study, "Dora")
    csrf["x-csrf-token"] = client.get("/api/study").json()["csrf"]
    (task,) = client.get("/api/next").json()["tasks"]
    body = {"assignment": task["assignment"], "key": "k", "ms": 5, "answer": {"choice": "left"}}
    assert client.post("/api/answer", json=body, headers=csrf).status_code == 200
    named = study.person("Emil")
    assert answer(named, tasks(named)[0], {"choice": "right"}, "emil").status_code == 200
    for name in ("Dora", "Emil"):
        assert joined(study, name, KEY)[1].status_code == 409
    # A link that the manager renews makes the key void, as it does the old link.
    joined(study, "Fritz", KEY)
    study.manager.post("/api/people", json={"name": "Fritz", "renew": True})
    assert joined(study, "Fritz", KEY)[1].status_code == 409


def test_b23_a_key_that_could_be_guessed_is_refused(study):
    for key in ("short", "x" * 201):
        _, reply = joined(study, "Gert", key)
        assert (reply.status_code, reply.json()["error"][:4]) == (400, "key:")
    assert study.client().post(study.links.join, json={"name": "Gert", "key": 7}).status_code == 400
    assert "Gert" not in people(study)


def test_b06_the_key_is_good_after_a_restart(tmp_path):
    for _ in range(2):
        with site(tmp_path / "labels.db") as found:
            client, reply = joined(found, "Ann", KEY)
            assert reply.status_code == 200
            assert client.get("/api/study").json()["person"] == "Ann"
