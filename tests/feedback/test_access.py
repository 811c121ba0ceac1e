"""Who may do what (R28): each promise asked of a real server over HTTP, or of its limits with a clock of our own."""

import json
import re
import stat
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import anyio
import httpx
import pytest
from live import answer, pair, site, tasks

from plaudit import PlauditError
from plaudit.feedback import secret, serving
from plaudit.feedback.access import HEADERS, Access, Bucket, Limits
from plaudit.feedback.desk import Desk
from plaudit.feedback.refusals import Refused
from plaudit.feedback.store import Store


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    with site(tmp_path_factory.mktemp("access") / "labels.db") as found:
        found.add(*(pair(number) for number in range(40)))
        yield found


@pytest.fixture
def ann(study, request):
    return study.person(request.node.name[:70])


def browser(study, name):
    """A client that has followed a personal link, with the value that its page would send along."""
    client = study.client()
    reply = client.get(f"/join/{study.token(name)}")
    assert (reply.status_code, reply.headers["location"]) == (303, "/")
    csrf = client.get("/api/study").json()["csrf"]
    return client, {"x-csrf-token": csrf, "origin": study.links.url}


def raw(study, host, path="/", method="GET", **headers):
    """A request with any Host header and any path, unmended."""
    connection = HTTPConnection("127.0.0.1", int(study.links.url.rpartition(":")[2]))
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"host": host, **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    reply = connection.getresponse()
    found = reply.status, reply.read().decode()
    connection.close()
    return found


# ------------------------------------------------------------------------------------------------ who


@pytest.mark.parametrize("path", ["/", "/api/next", "/api/progress", "/api/study", "/review", "/api/review"])
def test_nobody_is_known_without_a_token(study, path):
    reply = study.client().get(path)
    assert reply.status_code == 401
    assert "secret-" not in reply.text


def test_there_is_no_default_account(study):
    for token in ("Bearer admin", "Bearer manager", "Bearer plaudit", "Bearer null", "Bearer", "Basic bWU6bWU="):
        assert study.client().get("/api/review", headers={"authorization": token}).status_code == 401


def test_the_person_comes_from_the_token_and_never_from_the_body(study, ann):
    bob = study.person("bob-of-body")
    [task] = tasks(ann)
    body = {"assignment": task["assignment"], "key": "body-1", "ms": 1, "answer": {"choice": "left"}}
    assert bob.post("/api/answer", json={**body, "person": "ann"}).status_code == 404
    assert answer(ann, task, {"choice": "left"}, "body-2").status_code == 200
    assert {label.person for label in study.labels() if label.item.prompt == task["prompt"]} == {
        study.labels()[-1].person
    }


def test_what_is_asked_comes_from_the_store_and_never_from_the_body(study, ann):
    [task] = tasks(ann)
    body = {"assignment": task["assignment"], "key": "text-1", "ms": 1, "answer": {"choice": "right"}}
    reply = ann.post("/api/answer", json={**body, "prompt": "mine", "answers": ["a", "b"], "order": [1, 0]})
    assert reply.status_code == 200
    kept = study.labels()[-1]
    assert kept.item.prompt == task["prompt"]
    assert [kept.item.candidates[place].text for place in kept.order] == task["answers"]
    assert kept.answer.reordered(kept.order).ranks == (2, 1)


def test_people_are_not_managers_and_managers_are_not_people(study, ann):
    for method, path in [("GET", "/api/review"), ("POST", "/api/items"), ("POST", "/api/people"), ("GET", "/review")]:
        assert ann.request(method, path, json={}).status_code == 403
    assert study.manager.get("/api/next").status_code == 403


def test_a_renewed_link_makes_the_old_one_void(study):
    name = "renewed"
    old = study.person(name)
    assert old.get("/api/next").status_code == 200
    assert study.manager.post("/api/people", json={"name": name}).status_code == 409
    token = study.manager.post("/api/people", json={"name": name, "renew": True}).json()["token"]
    assert old.get("/api/next").status_code == 401
    assert study.client(token).get("/api/next").status_code == 200


# ------------------------------------------------------------------------------------------------ browsers


def test_the_cookie_is_out_of_reach_of_scripts_and_of_other_sites(study):
    reply = study.client().get(f"/join/{study.token('cookie')}")
    attributes = {part.strip().lower() for part in reply.headers["set-cookie"].split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/"} <= attributes


def test_a_link_followed_from_another_site_still_arrives(study):
    """A strict cookie does not travel along a redirect that another site began, so the page itself goes on."""
    reply = study.client().get(f"/join/{study.token('mail')}", headers={"sec-fetch-site": "cross-site"})
    assert (reply.status_code, reply.headers["refresh"]) == (200, "0; url=/")


def test_a_post_needs_the_value_that_only_the_own_page_knows(study):
    client, good = browser(study, "csrf")
    [task] = client.get("/api/next").json()["tasks"]
    body = {"assignment": task["assignment"], "key": "csrf-1", "ms": 1, "answer": {"choice": "left"}}
    other = browser(study, "csrf-other")[1]["x-csrf-token"]
    for headers in ({}, {"x-csrf-token": ""}, {"x-csrf-token": other}):
        assert client.post("/api/answer", json=body, headers=headers).status_code == 403
    assert client.post("/api/answer", json=body, headers=good).status_code == 200


@pytest.mark.parametrize(
    "foreign",
    [{"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://[::1"},
     {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}],
)  # fmt: skip
def test_a_page_of_another_site_gets_nothing(study, foreign):
    client, good = browser(study, f"foreign {foreign}")
    assert client.post("/api/undo", json={"key": "f"}, headers={**good, **foreign}).status_code == 403
    assert client.get("/api/next", headers=foreign).status_code == 403
    assert study.client().post(study.links.join, json={"name": "x"}, headers=foreign).status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.7", "", "x@127.0.0.1", "[::1"])
def test_no_other_name_is_answered_to(study, host):
    """DNS rebinding: a name of the attacker's points at this machine, and the browser takes it for the same site."""
    status, text = raw(study, host)
    assert (status, "hostnames" in text or "Invalid" in text) in [(403, True), (400, True)]


def test_tunnels_may_change_the_port(study):
    assert raw(study, "localhost:9999")[0] == 401


def test_pages_carry_the_headers_that_keep_them_safe(study, ann):
    for reply in (ann.get("/api/next"), ann.get("/nowhere"), study.client().get("/"), ann.get("/page/page.js")):
        policy = reply.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert reply.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in reply.headers
        assert "server" not in reply.headers


def test_an_answer_to_what_nobody_expected_is_a_sentence_with_the_same_headers(study, ann, monkeypatch):
    sound = ann.get("/api/progress")
    monkeypatch.setattr(Store, "next", lambda *_: 1 / 0)
    reply = ann.get("/api/next")
    assert reply.status_code == 500
    assert reply.json() == {"error": "Something went wrong in the server; its terminal says what."}
    assert {name: reply.headers.get(name) for name in HEADERS} == {name: sound.headers[name] for name in HEADERS}


@pytest.mark.parametrize(
    "path",
    ["/page/../server.py", "/page/..%2fserver.py", "/page/%2e%2e/secret.py", "/page//etc/passwd", "/page/page.html",
     "/page/..\\server.py", "/join/../../labels.db", "/page/page.css%00.js"],
)  # fmt: skip
def test_no_path_leads_out_of_the_page(study, path):
    status, text = raw(study, "127.0.0.1", path)
    assert status in (404, 400)
    assert "import" not in text


# ------------------------------------------------------------------------------------------------ limits


def test_large_bodies_are_refused_before_they_are_read(study, ann):
    limit = Limits().body
    headers = {"content-type": "application/json"}
    assert ann.post("/api/answer", content=b"x" * (limit + 1), headers=headers).status_code == 413

    def parts():
        for _ in range(limit // 1024 + 2):
            yield b" " * 1024

    assert ann.post("/api/answer", content=parts(), headers=headers).status_code == 413
    assert ann.post("/api/answer", content=b" " * limit, headers=headers).status_code == 400
    items = {"items": [], "more": "x" * limit}
    assert study.manager.post("/api/items", json=items).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"key": "\\ud800"}',
        b"\xff",
        b"[" * 100_000,
        b'"text"',
        b'{"key": "\xed\xa0\x80"}',
        '{"key": "k"}'.encode("utf-16"),
    ],
)
def test_what_is_no_object_is_refused(ann, body):
    reply = ann.post("/api/undo", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert set(reply.json()) == {"error"}


def test_forms_of_other_sites_cannot_pass_for_json(study, ann):
    assert ann.post("/api/undo", content=b'{"key": "k"}', headers={"content-type": "text/plain"}).status_code == 400


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_a_person_who_asks_too_often_waits(tmp_path):
    with site(tmp_path / "limits.db") as study:
        client, _ = browser(study, "eager")
        replies = [client.get("/api/progress") for _ in range(150)]
        refused = [reply for reply in replies if reply.status_code == 429]
        assert 20 < len(refused) < 60
        assert refused[0].headers["retry-after"] == "1"
        assert study.person("calm").get("/api/progress").status_code == 200


def test_the_rate_recovers():
    clock = Clock()
    bucket = Bucket(10, 2, clock)
    assert [bucket.take() for _ in range(21)] == [True] * 20 + [False]
    clock.now += 0.5
    assert [bucket.take() for _ in range(6)] == [True] * 5 + [False]


def test_guessing_links_is_throttled_and_known_links_still_work(tmp_path):
    with site(tmp_path / "guess.db") as study:
        ann = study.person("ann")
        guesser = study.client()
        codes = [guesser.get(f"/join/guess-{number}").status_code for number in range(40)]
        assert codes == [404] * 30 + [429] * 10
        assert guesser.get("/api/next", headers={"authorization": "Bearer guess"}).status_code == 429
        assert ann.get("/api/next").status_code == 200
        assert study.manager.get("/api/review").status_code == 200


def test_the_throttle_forgets_after_a_minute():
    clock = Clock()
    access = Access(lambda token: None, "manager-token", "study", limits=Limits(failures=2), clock=clock)
    assert [anyio.run(access.find, "wrong") for _ in range(2)] == [None, None]
    with pytest.raises(Refused, match="Too many unknown"):
        anyio.run(access.find, "wrong")
    clock.now += 61
    assert anyio.run(access.find, "wrong") is None


def test_new_people_come_one_after_the_other(tmp_path):
    with site(tmp_path / "crowd.db") as study:
        codes = [study.client().post(study.links.join, json={"name": f"n{i}"}).status_code for i in range(35)]
        assert codes[:30] == [200] * 30
        assert 429 in codes[30:]


def test_a_full_disk_is_not_acknowledged(tmp_path, monkeypatch):
    """SQLite is given no more pages, which is the error that a full disk is."""
    opened = []
    opening = Store.open
    monkeypatch.setattr(Store, "open", lambda path: opened.append(opening(path)) or opened[-1])
    with site(tmp_path / "full.db") as study:
        study.add(*(pair(number) for number in range(3)))
        ann = study.person("ann")
        first, second, _ = tasks(ann, 3)
        assert answer(ann, first, {"choice": "left"}, "fits").status_code == 200
        [store] = opened
        (pages,) = store._db.execute("PRAGMA page_count").fetchone()
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        note = {"choice": "left", "note": "n" * 9000}
        full = answer(ann, second, note, "full")
        assert full.status_code == 507
        assert "ok" not in full.json()
        assert len(study.labels()) == 1
        store._db.execute("PRAGMA max_page_count = 1000000")
        assert answer(ann, second, note, "full").status_code == 200
        assert len(study.labels()) == 2


# ------------------------------------------------------------------------------------------------ serving


def test_a_link_that_the_manager_renewed_lives_through_a_restart(tmp_path):
    path = tmp_path / "a.db"
    with site(path, people=("Ann",)) as one:
        token = one.manager.post("/api/people", json={"name": "Ann", "renew": True}).json()["token"]
    with site(path, people=("Ann",)) as one:
        assert one.client(token).get("/api/next").status_code == 200
        assert one.links.people["Ann"].endswith(f"/join/{token}")


def test_b23_a_token_that_becomes_void_while_it_is_looked_up_is_not_kept():
    """A request looks its token up; before it goes on, the manager renews that person's link."""
    known = {"old": SimpleNamespace(name="Ann", role="person")}

    def who(token):
        found = known.pop(token, None)
        access.forget()
        return found

    access = Access(who, "manager", "study")
    assert anyio.run(access.find, "old") == ("Ann", "person")
    assert anyio.run(access.find, "old") is None


def test_secrets_are_random_private_and_live_through_a_restart(tmp_path):
    with site(tmp_path / "a.db", people=("Ann", "Zoë 😀")) as one:
        first = one.links
    with site(tmp_path / "a.db", people=("Ann", "Zoë 😀")) as one:
        assert one.links == first
        assert not one.links.join
        assert one.client().get(one.links.people["Zoë 😀"]).status_code == 303
        assert one.client(one.links.people["Ann"].rpartition("/")[2]).get("/api/study").json()["person"] == "Ann"
    with site(tmp_path / "b.db") as other:
        assert len({*other.links.people.values(), other.links.review, other.links.join, first.review}) == 3
    for name in ("a.db", "a.db.secrets"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert all(len(token) >= 32 for token in (first.manager_token, first.people["Ann"].rpartition("/")[2]))


def test_secrets_that_others_may_read_are_refused(tmp_path):
    with site(tmp_path / "a.db"):
        pass
    (tmp_path / "a.db.secrets").chmod(0o644)
    with pytest.raises(PlauditError, match=r"others on this machine may read it; first `chmod 600"):
        serving.serve(serving.Options(store=str(tmp_path / "a.db")), print)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_a_wide_bind_needs_a_token_of_the_users(tmp_path, host):
    with pytest.raises(PlauditError, match="can be reached by other machines; that needs `token_file` too"):
        serving.serve(serving.Options(store=str(tmp_path / "w.db"), host=host), print)
    assert not (tmp_path / "w.db").exists()


@pytest.mark.parametrize("content", ["short", "", "x" * 30 + " " + "y" * 10, None])
def test_a_token_must_be_worth_the_name(tmp_path, content):
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
        file.chmod(0o600)
    with pytest.raises(PlauditError, match=r"token_file: .* must hold a secret of 20 or more"):
        serving.serve(serving.Options(store=str(tmp_path / "w.db"), host="0.0.0.0", token_file=str(file)), print)


def test_with_a_token_of_the_users_it_is_reached_by_the_names_given(tmp_path):
    file = tmp_path / "token"
    file.write_text("0123456789abcdef0123456789abcdef\n")
    file.chmod(0o600)
    with site(tmp_path / "w.db", host="0.0.0.0", token_file=str(file), hostnames=("label.example",)) as study:
        assert study.links.url.startswith("http://label.example:")
        port = int(study.links.url.rpartition(":")[2])
        assert study.links.manager_token == file.read_text().strip()
        for host, status in [("label.example", 401), ("127.0.0.1", 401), ("10.1.2.3", 401), ("evil.example", 403)]:
            reply = httpx.get(f"http://127.0.0.1:{port}/", headers={"host": host})
            assert reply.status_code == status, host


def test_behind_a_proxy_with_tls_it_is_reached_by_its_address_alone(tmp_path):
    own = "https://labels.example.org"
    with site(tmp_path / "p.db", address=f"{own.upper()}:443/", people=("Ann",)) as study:
        assert study.links.url.startswith("http://127.0.0.1:")
        links = [study.links.people["Ann"], study.links.review]
        assert all(link.startswith(f"{own}/join/") for link in links)
        token = study.links.people["Ann"].rpartition("/")[2]
        for host, status in [("labels.example.org", 303), ("127.0.0.1", 303), ("example.org", 403)]:
            assert raw(study, host, f"/join/{token}")[0] == status
        cookie = study.client().get(f"/join/{token}").headers["set-cookie"]
        assert "secure" in cookie.lower()
        sent = {"cookie": cookie.partition(";")[0]}
        csrf = study.client().get("/api/study", headers=sent).json()["csrf"]
        for origin, status in [(own, 200), (own.replace("https", "http"), 403), ("https://example.org", 403)]:
            # The proxy names itself as Host, as nginx does unless it is told otherwise.
            headers = {**sent, "x-csrf-token": csrf, "origin": origin}
            assert study.client().post("/api/undo", json={"key": "k"}, headers=headers).status_code == status
    with site(tmp_path / "o.db", people=("Ann",)) as study:
        assert "secure" not in study.client().get(study.links.people["Ann"]).headers["set-cookie"].lower()


@pytest.mark.parametrize(
    "address",
    ["labels.example.org", "ftp://labels.example.org", "https://", "https://labels.example.org/study", "https://a b",
     "https://me@labels.example.org", "https://labels.example.org:x", "https://[::1", "https://a?b", "https://bücher.de"],
)  # fmt: skip
def test_an_address_that_is_none_is_told(tmp_path, address):
    with pytest.raises(PlauditError, match=r"address: .* is none such as https://labels\.example\.org"):
        serving.serve(serving.Options(store=str(tmp_path / "w.db"), address=address), print)
    assert not (tmp_path / "w.db").exists()


def test_a_program_reaches_its_own_server_whatever_the_address(tmp_path):
    told = []
    with Desk.open(tmp_path / "d.db", address="https://labels.example.org:8443") as desk:
        desk.ask([pair(0)])
        desk.tell(told.append)
    assert [line.partition("/join/")[0] for line in told] == [
        f"{name}: https://labels.example.org:8443" for name in ("people", "review")
    ]


def test_the_default_is_loopback(tmp_path):
    with serving.start(tmp_path / "l.db") as served:
        assert served.url.startswith("http://127.0.0.1:")
        port = served.url.rpartition(":")[2]
        tables = [Path(f"/proc/{served.process.pid}/net/{name}") for name in ("tcp", "tcp6")]
        table = "".join(path.read_text() for path in tables if path.exists())
        listening = [line.split()[1] for line in table.splitlines() if re.search(rf":{int(port):04X} \S+ 0A", line)]
        assert listening == [f"0100007F:{int(port):04X}"]


def test_one_writer_only(tmp_path):
    with serving.start(tmp_path / "one.db"), pytest.raises(PlauditError, match=r"one\.db"):
        serving.start(tmp_path / "one.db")


def test_a_server_ends_with_the_program_that_started_it(tmp_path):
    code = (
        "import json, os, signal, sys; from plaudit.feedback import serving\n"
        f"served = serving.start({str(tmp_path / 'o.db')!r}); print(served.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(200):
        # It is gone, or nobody has asked for how it ended yet.
        found = Path(f"/proc/{pid}/stat")
        if not found.exists() or found.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the server outlived the program")
    Store.open(tmp_path / "o.db").close()


def test_secrets_that_are_none_are_told(tmp_path):
    file = tmp_path / "s.db.secrets"
    for text in ("{", "[]", json.dumps({"other": 1})):
        file.write_text(text)
        file.chmod(0o600)
        with pytest.raises(PlauditError, match="holds no secrets of a study"):
            secret.load(tmp_path / "s.db")
