"""What pages and programs ask of the server, over HTTP."""

import ast
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from live import answer, fresh, pair, ranking, rating, site, tasks

from plaudit import PlauditError
from plaudit.feedback import server, serving
from plaudit.feedback.forms import item_to_json
from plaudit.feedback.items import Answer, Candidate, Item
from plaudit.feedback.store import Store

PAGE = Path(server.__file__).parent / "page"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for many tests: each has its own people, and its items come first."""
    with site(tmp_path_factory.mktemp("shared") / "labels.db", strength=True, ratings=(1, 10)) as found:
        yield found


@pytest.fixture
def study(shared):
    with fresh(shared) as found:
        yield found


numbers = itertools.count(1)


def newcomer(study):
    return study.person(f"newcomer {next(numbers)}")


def last(study):
    """The last answer as it was shown: the item's candidates in the order shown, and the answer in that order."""
    label = study.labels()[-1]
    return [label.item.candidates[place].text for place in label.order], label.answer.reordered(label.order)


# ------------------------------------------------------------------------------------------------ asking


def test_a_task_tells_what_is_needed_and_nothing_else(tmp_path):
    with site(tmp_path / "labels.db", gold_share=1.0) as study:
        check_task(study)


def check_task(study):
    study.add(Item("compare", "p", pair(0).candidates, query={"method": "margin"}, gold=Answer((1, 2))))
    with Store.read(study.path) as store:
        name = store.items()[0].id
    reply = study.person("ann").get("/api/next?count=5")
    assert len(reply.json()["tasks"]) == 1
    for task in reply.json()["tasks"]:
        assert set(task) == {"assignment", "kind", "prompt", "answers", "count", "lease_seconds", "again"}
        assert task["again"] is False
    for hidden in ("secret", "gold", "margin", "model", "step", "source", name):
        assert hidden not in reply.text


def test_the_page_of_one_person_tells_nothing_of_others(study):
    study.add(*(pair(number) for number in range(3)))
    ann, bob = study.person("ann"), study.person("Robert Tables")
    answer(bob, tasks(bob)[0], {"choice": "left", "note": "my own note"}, "b")
    seen = ann.get("/api/next?count=9").text + ann.get("/api/progress").text + ann.get("/api/study").text
    assert "Tables" not in seen
    assert "my own note" not in seen
    assert ann.get("/api/progress").json()["mine"] == 0


def test_the_order_shown_is_drawn_and_kept(study):
    study.add(*(ranking(number, 9) for number in range(6)))
    ann = study.person("ann")
    shown = [tuple(task["answers"]) for task in tasks(ann, 6)]
    assert len(set(shown)) > 1
    assert [tuple(task["answers"]) for task in tasks(ann, 6)] == shown
    for number, task in enumerate(tasks(ann, 6)):
        answer(ann, task, {"tiers": list(range(1, 10))}, f"k{number}")
    for label, order in zip(study.labels(), shown, strict=True):
        assert tuple(label.item.candidates[place].text for place in label.order) == order
        best = label.answer.ranks.index(1)
        assert label.item.candidates[best].text == order[0]


@pytest.mark.parametrize(
    ("item", "given", "expected"),
    [
        (pair(0), {"choice": "left"}, Answer((1, 2))),
        (pair(0), {"choice": "right", "strength": 3}, Answer((2, 1), strength=3)),
        (pair(0), {"choice": "equal", "note": "both"}, Answer((1, 1), note="both")),
        (pair(0), {"choice": "cant", "rewrite": "so"}, Answer(rewrite="so")),
        (ranking(0, 4), {"tiers": [2, 1, 1, 3]}, Answer((2, 1, 1, 3))),
        (ranking(0, 2), {"choice": "cant"}, Answer()),
        (rating(0), {"rating": 10}, Answer(rating=10.0)),
        (rating(0), {"rating": 2.5, "note": "meh"}, Answer(rating=2.5, note="meh")),
    ],
    ids=str,
)
def test_every_kind_of_answer_is_kept_as_it_was_given_and_comes_back_with_undo(shared, item, given, expected):
    number = next(numbers)
    item = replace(item, prompt=f"{item.kind} {number}")
    shared.add(item, priority=number)
    ann = newcomer(shared)
    [task] = tasks(ann)
    assert task["prompt"] == item.prompt
    reply = answer(ann, task, given, f"first {number}", ms=4321)
    assert reply.json()["ok"] is True
    assert reply.json()["progress"]["mine"] == 1
    assert last(shared) == (task["answers"], expected)
    assert shared.labels()[-1].ms == 4321
    undone = ann.post("/api/undo", json={"key": f"back {number}"}).json()
    assert undone["answer"] == given
    expected_task = {**task, "again": True, "lease_seconds": undone["task"]["lease_seconds"]}
    assert undone["task"] == expected_task
    assert item.prompt not in [label.item.prompt for label in shared.labels()]
    assert ann.post("/api/undo", json={"key": f"again {number}"}).json() == {"task": None, "answer": None}


def test_thumbs_belong_to_a_study_that_rates_by_them(study, tmp_path):
    study.add(rating(0))
    ann = study.person("ann")
    [task] = tasks(ann)
    for given in ({"thumb": "up"}, {"rating": 0}, {"rating": 11}, {"rating": "5"}, {"rating": True}, {}):
        assert answer(ann, task, given, "no").status_code == 400, given
    with site(tmp_path / "thumbs.db", ratings=(0, 1)) as other:
        other.add(rating(0))
        bob = other.person("bob")
        [task] = tasks(bob)
        assert answer(bob, task, {"thumb": "up"}, "yes").status_code == 200
        assert last(other)[1].rating == 1.0
        assert bob.post("/api/undo", json={"key": "u"}).json()["answer"] == {"thumb": "up"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"answer": {"choice": "middle"}}, "choice"),
        ({"answer": {"choice": "left", "more": 1}}, "more"),
        ({"answer": {"choice": "equal", "strength": 2}}, "strength"),
        ({"answer": "left"}, "answer"),
        ({"ms": -1}, "ms"),
        ({"ms": 1.5}, "ms"),
        ({"key": 7}, "key"),
        ({"key": ""}, "key"),
        ({"key": "x" * 500}, "key"),
        ({"assignment": None}, "assignment"),
    ],
    ids=str,
)
def test_what_cannot_be_an_answer_is_refused_by_name_and_not_kept(shared, body, field):
    shared.add(pair(next(numbers)), priority=next(numbers))
    ann = newcomer(shared)
    good = {"assignment": tasks(ann)[0]["assignment"], "key": "k", "ms": 1, "answer": {"choice": "left"}}
    reply = ann.post("/api/answer", json={**good, **body})
    assert reply.status_code == 400
    assert field in reply.json()["error"]
    assert ann.get("/api/progress").json()["mine"] == 0


def test_an_answer_sent_twice_counts_once_and_a_second_answer_is_a_conflict(study):
    study.add(pair(0))
    ann = study.person("ann")
    [task] = tasks(ann)
    first, again = (answer(ann, task, {"choice": "left"}, "same") for _ in range(2))
    assert (first.status_code, again.status_code) == (200, 200)
    other = answer(ann, task, {"choice": "right"}, "other")
    assert other.status_code == 409
    assert "answered already" in other.json()["error"]
    assert len(study.labels()) == 1


def test_what_is_skipped_comes_again_only_when_nothing_else_is_left(study):
    study.add(pair(0), pair(1))
    ann = study.person("ann")
    first = tasks(ann)[0]
    assert ann.post("/api/skip", json={"assignment": first["assignment"], "key": "s"}).status_code == 200
    second = tasks(ann)[0]
    assert second["prompt"] != first["prompt"]
    answer(ann, second, {"choice": "left"}, "a")
    assert tasks(ann)[0]["assignment"] == first["assignment"]


def test_assignments_of_others_and_of_nobody_do_not_exist(study):
    study.add(pair(0), pair(1))
    ann, bob = study.person("ann"), study.person("bob")
    [task] = tasks(ann)
    for path in ("/api/answer", "/api/skip"):
        for name in (task["assignment"], "0123456789abcdef", ""):
            body = {"assignment": name, "key": "k", "ms": 0, "answer": {"choice": "left"}}
            assert bob.post(path, json=body).status_code == 404
    assert tasks(ann)[0]["assignment"] == task["assignment"]


@pytest.mark.parametrize("count", ["0", "21", "-1", "x", "1.5", "²", "", pytest.param("1" * 5000, id="long")])
def test_counts_are_bounded(shared, count):
    assert newcomer(shared).get(f"/api/next?count={count}").status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/x", 404), ("POST", "/", 405), ("PUT", "/api/answer", 405), ("OPTIONS", "/api/answer", 405)],
)
def test_errors_are_sentences_in_json(shared, method, path, status):
    reply = newcomer(shared).request(method, path)
    assert reply.status_code == status
    assert reply.json()["error"]


# ------------------------------------------------------------------------------------------------ managing


def test_items_come_while_people_wait_and_priority_goes_first(study):
    ann = study.person("ann")
    assert tasks(ann) == []
    assert study.add(pair(0), pair(0), pair(1)) == 2
    assert study.add(pair(2), priority=5) == 1
    assert [task["prompt"] for task in tasks(ann, 3)] == ["prompt 2", "prompt 0", "prompt 1"]


@pytest.mark.parametrize(
    "items",
    ["x", [1], [{}], [{**item_to_json(pair(0)), "kind": "choose"}], [{**item_to_json(pair(0)), "candidates": []}],
     [{**item_to_json(pair(0)), "prompt": 5}]],
    ids=str,
)  # fmt: skip
def test_items_that_cannot_be_asked_are_refused_together(shared, items):
    good = pair(1, prompt=f"together {next(numbers)}")
    body = {"items": [item_to_json(good), *items] if isinstance(items, list) else items}
    reply = shared.manager.post("/api/items", json=body)
    assert reply.status_code == 400
    assert "items" in reply.json()["error"]
    with Store.read(shared.path) as store:
        assert good.prompt not in [item.prompt for item in store.items()]


def test_a_priority_that_no_database_holds_is_refused(shared):
    reply = shared.manager.post("/api/items", json={"items": [item_to_json(pair(0))], "priority": 2**63})
    assert (reply.status_code, "priority" in reply.json()["error"]) == (400, True)


@pytest.mark.parametrize("name", ["", "x" * 81, "a\nb", "a\x00b", 7, None])
def test_names_that_are_none_are_refused(shared, name):
    assert shared.manager.post("/api/people", json={"name": name}).status_code == 400
    assert shared.client().post(shared.links.join, json={"name": name}).status_code == 400


def test_the_shared_link_makes_a_person_of_a_name(study):
    study.add(pair(0))
    client = study.client()
    assert "name" in client.get(study.links.join).text
    assert client.post(study.links.join, json={"name": "Zoë"}).json() == {"ok": True}
    assert client.get("/api/study").json()["person"] == "Zoë"
    assert len(client.get("/api/next").json()["tasks"]) == 1
    taken = study.client().post(study.links.join, json={"name": "Zoë"})
    assert taken.status_code == 409
    assert "set-cookie" not in taken.headers


def test_nobody_joins_a_study_of_named_people(tmp_path):
    with site(tmp_path / "named.db", people=("Ann",)) as study:
        assert study.links.join == ""
        assert study.client().post("/join/None", json={"name": "Eve"}).status_code == 404
        assert study.client().post("/join/", json={"name": "Eve"}).status_code == 404
        with Store.read(study.path) as store:
            assert store.people() == ["Ann"]


def test_the_review_shows_who_said_what_of_which_model(tmp_path):
    with site(tmp_path / "labels.db") as study:
        check_review(study)


def check_review(study):
    study.add(*(pair(number) for number in range(60)))
    ann = study.person("ann")
    for number in range(55):
        answer(ann, tasks(ann)[0], {"choice": "left", "note": f"note {number}"}, f"k{number}", ms=1500)
    first, second = (study.manager.get(f"/api/review?page={page}").json() for page in (1, 2))
    assert (len(first["labels"]), len(second["labels"]), first["pages"]) == (50, 5, 2)
    assert (first["progress"]["done"], first["progress"]["left"]) == (55, 5)
    assert first["people"] == {"ann": 55}
    newest = first["labels"][0]
    assert newest["answer"]["note"] == "note 54"
    assert {one["source"]["model"] for one in newest["candidates"]} == {"secret-sft", "secret-ppo"}
    assert newest["person"] == "ann"
    assert sorted(newest["order"]) == [0, 1]
    assert newest["answer"]["ranks"] == [1 + newest["order"].index(0), 1 + newest["order"].index(1)]
    assert study.manager.get("/api/agreement").json()["people"]["ann"]["labels"] == 55


def test_a_review_reads_the_page_that_is_shown_and_nothing_where_nothing_happened(tmp_path, monkeypatch):
    with site(tmp_path / "labels.db") as study:
        study.add(*(pair(number) for number in range(60)))
        ann = study.person("ann")
        for number in range(52):
            answer(ann, tasks(ann)[0], {"choice": "left"}, f"k{number}")

        def look(page, since=""):
            return study.manager.get("/api/review", params={"page": page, "since": since}).json()

        monkeypatch.setattr(server, "RATE_EVERY", 1e9)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "labels", None)  # which reads them all
            first = look(1)
            assert (len(first["labels"]), first["pages"]) == (50, 2)
            patch.setattr(Store, "newest", None)
            assert look(1, first["version"]) == {"version": first["version"]}
        assert len(look(2, first["version"])["labels"]) == 2
        ann.post("/api/undo", json={"key": "u"})
        after = look(1, first["version"])
        assert (after["people"], after["labels"][0]["id"]) == ({"ann": 51}, first["labels"][1]["id"])


# ------------------------------------------------------------------------------------------------ running


def test_start_and_stop_from_a_program(tmp_path):
    with serving.start(tmp_path / "labels.db", title="A study", instructions="Be kind.") as served:
        with httpx.Client(base_url=served.url) as client:
            token = client.get(served.join_url).status_code
        assert token == 200
        headers = {"authorization": f"Bearer {served.manager_token}"}
        reply = httpx.post(f"{served.url}/api/people", json={"name": "ann"}, headers=headers)
        mine = {"authorization": f"Bearer {reply.json()['token']}"}
        assert httpx.get(f"{served.url}/api/study", headers=mine).json()["instructions"] == "Be kind."
    assert served.process.returncode == 0
    with serving.start(tmp_path / "labels.db") as again:
        assert (again.url, again.join_url) == (served.url, served.join_url)
        assert httpx.get(f"{again.url}/api/study", headers=mine).json()["title"] == "A study"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_in_good_order(tmp_path, number):
    served = serving.start(tmp_path / "labels.db")
    with httpx.Client(base_url=served.url) as client:
        assert client.get("/").status_code == 401
        os.kill(served.process.pid, number)
        assert served.process.wait(10) == 0
    served.stop()
    Store.open(tmp_path / "labels.db").close()


def test_a_port_that_is_taken_is_told_in_a_sentence(tmp_path):
    with serving.start(tmp_path / "a.db") as served:
        port = int(served.url.rpartition(":")[2])
        with pytest.raises(PlauditError, match=rf"port: cannot listen at 127.0.0.1:{port} .*; choose another"):
            serving.start(tmp_path / "b.db", port=port)


def test_nothing_heavy_is_loaded():
    code = (
        "import sys, plaudit.feedback.serving, plaudit.feedback.server, uvicorn;"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'pydantic', 'jinja2', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ the page's own code


def test_no_script_makes_markup_of_text_and_no_page_reaches_out():
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser|srcdoc|javascript:"
    )
    for path in PAGE.iterdir():
        text = path.read_text()
        assert not re.search(forbidden, text), path.name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|//cdn|@import", text), path.name
        if path.suffix == ".html":
            assert "<style" not in text
            assert not re.search(r"\son[a-z]+=|\sstyle=", text), path.name
            assert re.findall(r"<script(.*?)>", text) == re.findall(
                r"<script( type=\"module\" src=\"/page/\w+\.js\")>", text
            )
        if path.suffix == ".js":
            assert len(text.splitlines()) < 300


def test_every_page_is_whole_and_those_before_the_questions_share_their_head(shared):
    client, ann = shared.client(), newcomer(shared)
    doors = [client.get(path) for path in (shared.links.join, "/", "/join/nothing")]
    link = f"/join/{ann.headers['authorization'].partition(' ')[2]}"
    doors.append(client.get(link, headers={"sec-fetch-site": "cross-site"}))
    assert [reply.status_code for reply in doors] == [200, 401, 404, 200]
    for reply in (*doors, ann.get("/"), shared.manager.get("/review")):
        assert re.fullmatch(
            r"<!doctype html>\n<html.*<head>.*</head>\n<body.*<main>.*</main>.*</html>\n", reply.text, re.S
        )
        assert reply.text.count("<html") == 1
        assert "$" not in reply.text
    heads = {reply.text.partition("</head>")[0] for reply in doors}
    assert len(heads) == 1
    assert ["join.js" in reply.text for reply in doors] == [True, False, False, False]


def test_the_server_never_builds_markup():
    source = (Path(server.__file__)).read_text()
    strings = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    assert not [text for text in strings if isinstance(text, str) and re.search(r"<\w+[ >]", text)]


def test_conversations_travel_whole(study):
    turns = [{"role": "user", "content": "hi\n\n  there"}]
    said = ([{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}])
    study.add(Item("compare", turns, tuple(Candidate(text) for text in said)))
    [task] = tasks(study.person("ann"))
    assert task["prompt"] == turns
    assert sorted(task["answers"], key=str) == list(said)


def test_time_is_not_spent_waiting_for_each_other(study):
    """Answers of one person and questions of another, at once, without a lock being reported."""
    study.add(*(pair(number) for number in range(20)))
    people = [study.person(name) for name in ("a", "b")]
    began = time.monotonic()
    for number in range(10):
        for person in people:
            assert answer(person, tasks(person)[0], {"choice": "left"}, f"{number}{id(person)}").status_code == 200
    assert time.monotonic() - began < 20  # a hang, not a timing
