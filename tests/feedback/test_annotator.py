"""The synthetic annotator: the law of its answers, and its way through the server that people answer at."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter

import numpy as np
import pytest
from labelled import item
from scipy.special import expit
from scipy.stats import binom, chisquare

from plaudit import people
from plaudit.errors import PlauditError
from plaudit.feedback import serving
from plaudit.feedback.annotator import Annotator, Taste, annotate
from plaudit.feedback.items import read_answer
from plaudit.feedback.store import Store
from plaudit.settings.feedback import Annotate

REWARDS = {"good": 1.0, "fair": 0.4, "bad": -0.5}
DRAWS = 4000


def reward(prompts, completions):
    return [REWARDS[text] for text in completions]


def drawn(taste, kind, answers, ratings=(0, 1)):
    """What it says of as many questions as there are draws, each shown in an order of its own; in the order given."""
    counts = Counter()
    for number in range(DRAWS):
        order = [(number + place) % len(answers) for place in range(len(answers))]
        said = taste.answer(kind, f"Question {number}", [answers[place] for place in order], ratings)
        counts[read_answer(kind, len(answers), said).restored(order)] += 1
    return {(answer.ranks, answer.rating): count for answer, count in counts.items()}


def fits(counts, law):
    """Whether counts come from a law with these probabilities, all of them; a false alarm once in a thousand."""
    assert set(counts) <= {key for key, probability in law.items() if probability > 0}
    observed = [counts.get(key, 0) for key in law]
    return chisquare(observed, [DRAWS * probability for probability in law.values()]).pvalue > 0.001


@pytest.mark.parametrize(("temperature", "noise"), [(1.0, 0.1), (0.5, 0.0), (2.0, 0.4)])
def test_comparisons_are_boltzmann_with_uniform_noise(temperature, noise):
    """P = (1 - noise) sigma(difference / temperature) + noise / 2: 0.9 sigma + 0.05 by default."""
    counts = drawn(Taste(reward, temperature, noise), "compare", ["good", "bad"])
    p = (1 - noise) * expit(1.5 / temperature) + noise / 2
    assert fits(counts, {((1, 2), None): p, ((2, 1), None): 1 - p})


def test_ties_and_what_cannot_be_compared():
    taste = Taste(reward, noise=0.1, tie_band=0.6, cant_share=0.2, seed=3)
    counts = drawn(taste, "compare", ["good", "fair"])
    law = {(None, None): 0.2, ((1, 1), None): 0.8 * 0.9, ((1, 2), None): 0.04, ((2, 1), None): 0.04}
    assert fits(counts, law)
    p = 0.8 * (0.9 * expit(1.5) + 0.05)
    law = {(None, None): 0.2, ((1, 2), None): p, ((2, 1), None): 0.8 - p}
    assert fits(drawn(taste, "compare", ["good", "bad"]), law)


def plackett_luce(order, noise):
    weights = [np.exp(REWARDS[name]) for name in order]
    p = np.prod([weight / sum(weights[place:]) for place, weight in enumerate(weights)])
    return (1 - noise) * p + noise / 6


def test_rankings_are_plackett_luce():
    names = ["good", "fair", "bad"]
    law = {}
    for order in itertools.permutations(names):
        law[tuple(order.index(name) + 1 for name in names), None] = plackett_luce(order, 0.1)
    assert sum(law.values()) == pytest.approx(1)
    assert fits(drawn(Taste(reward, noise=0.1), "rank", names), law)


def test_neighbours_within_the_band_share_a_tier():
    names = ["good", "fair", "bad"]
    law = Counter()
    for order in itertools.permutations(names):
        tier, tiers, head = 0, {}, np.inf
        for name in order:
            if abs(REWARDS[name] - head) > 0.7:
                tier, head = tier + 1, REWARDS[name]
            tiers[name] = tier
        law[tuple(tiers[name] for name in names), None] += plackett_luce(order, 0.0)
    assert law[(1, 1, 2), None] > 0.4
    assert fits(drawn(Taste(reward, noise=0, tie_band=0.7), "rank", names), law)


def test_ratings_and_thumbs():
    taste = Taste(reward, noise=0.1, cant_share=0.5)
    up = 0.9 * expit(1.0) + 0.05
    assert fits(drawn(taste, "rate", ["good"]), {(None, 1.0): up, (None, 0.0): 1 - up})
    law = {(None, 1.0 + k): 0.9 * binom.pmf(k, 4, expit(1.0)) + 0.1 / 5 for k in range(5)}
    assert fits(drawn(taste, "rate", ["good"], (1, 5)), law)


def test_without_temperature_and_noise_the_best_always_wins():
    taste = Taste(reward, temperature=0, noise=0)
    assert taste.answer("compare", "Q", ["bad", "good"], (0, 1)) == {"choice": "right"}
    assert taste.answer("rank", "Q", ["bad", "good", "fair"], (0, 1)) == {"tiers": [3, 1, 2]}
    assert taste.answer("rate", "Q", ["good"], (1, 7)) == {"rating": 7}
    assert taste.answer("rate", "Q", ["bad"], (0, 1)) == {"thumb": "down"}


def test_answers_depend_on_the_question_and_not_on_the_order():
    """So a loop with several servers, threads and orders shown is repeatable."""
    questions = [f"Question {number}" for number in range(60)]
    first, second = Taste(reward, seed=1), Taste(reward, seed=1)
    there = {q: first.answer("compare", q, ["good", "fair"], (0, 1))["choice"] for q in questions}
    back = {q: second.answer("compare", q, ["fair", "good"], (0, 1))["choice"] for q in reversed(questions)}
    assert {q: {"left": "right", "right": "left"}[side] for q, side in back.items()} == there
    again = {q: first.answer("compare", q, ["good", "fair"], (0, 1))["choice"] for q in questions}
    assert 5 < sum(again[q] != there[q] for q in questions) < 50  # asked once more, it is drawn once more
    other = Taste(reward, seed=2)
    assert {q: other.answer("compare", q, ["good", "fair"], (0, 1))["choice"] for q in questions} != there


# ---------------------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.db"
    with serving.start(path, people=("ann", "bob"), overlap=2, ratings=(1, 5)) as server:
        yield server, path


def token_of(server, name):
    return server.people[name].rpartition("/")[2]


def put(server, items):
    import httpx

    from plaudit.feedback.forms import item_to_json

    headers = {"Authorization": f"Bearer {server.manager_token}"}
    body = {"items": [item_to_json(each) for each in items]}
    httpx.post(f"{server.url}/api/items", json=body, headers=headers, trust_env=False).raise_for_status()


def stored(path, kind):
    with Store.read(path) as store:
        return [label for label in store.labels() if label.item.kind == kind]


def test_two_annotators_answer_everything_in_the_items_order(served):
    """Left or right as shown, what is stored is of the candidate: the server's order never shows through."""
    server, path = served
    put(server, [item(f"Pair {number}", texts=("bad", "good")) for number in range(12)])
    tastes = [Taste(reward, temperature=0, noise=0, seed=seed) for seed in (1, 2)]
    counts = annotate(server.url, [token_of(server, name) for name in ("ann", "bob")], tastes, patience=0.1)
    assert counts == [12, 12]
    labels = stored(path, "compare")
    assert {label.answer.ranks for label in labels} == {(2, 1)}
    assert {label.order for label in labels} == {(0, 1), (1, 0)}
    assert Counter(label.person for label in labels) == {"ann": 12, "bob": 12}
    assert all(label.ms > 0 for label in labels)


def test_rankings_ratings_and_a_limit(served):
    server, path = served
    put(server, [item(f"Rank {number}", "rank", ("bad", "good", "fair")) for number in range(4)])
    taste = Taste(reward, temperature=0, noise=0)
    assert annotate(server.url, token_of(server, "ann"), taste, limit=3, patience=0.1) == [3]
    assert [label.answer.ranks for label in stored(path, "rank")] == [(3, 1, 2)] * 3
    assert annotate(server.url, token_of(server, "ann"), taste, patience=0.1) == [1]
    put(server, [item("Rate", "rate", ("good",))])
    annotate(server.url, token_of(server, "bob"), taste, patience=0.1)
    assert [label.answer.rating for label in stored(path, "rate")] == [5.0]


def test_it_stops_when_told(served):
    server, _ = served
    stop = threading.Event()
    stop.set()
    assert annotate(server.url, token_of(server, "ann"), Taste(reward), patience=60, stop=stop) == [0]


def test_a_wrong_token_and_a_missing_server_are_said(served):
    server, _ = served
    with pytest.raises(PlauditError, match="the label server refused /api/study"):
        Annotator(server.url, "x" * 43, Taste(reward), patience=0)
    with pytest.raises(PlauditError, match="no label server answers at"):
        Annotator("http://127.0.0.1:9", "x", Taste(reward), patience=0)


def test_an_answer_that_got_lost_on_the_way_is_given_once(served, monkeypatch):
    """The server took it, the client did not hear of it: the same key, the same label."""
    import httpx

    server, path = served
    put(server, [item("Lost?", texts=("bad", "good"))])
    real, lost = httpx.Client.request, []

    def request(client, method, place, **given):
        reply = real(client, method, place, **given)
        if place == "/api/answer" and not lost:
            lost.append(given["json"]["key"])
            raise httpx.ReadError("the line is dead")
        return reply

    monkeypatch.setattr(httpx.Client, "request", request)
    annotate(server.url, token_of(server, "ann"), Taste(reward), patience=0.5)
    assert lost
    assert sum(label.item.prompt == "Lost?" for label in stored(path, "compare")) == 1


def test_the_verb_lets_people_in_and_answers_for_them(served, tmp_path, monkeypatch):
    server, path = served
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hidden.py").write_text(
        "def liking(prompts, completions, **rest):\n    return [len(c) for c in completions]\n"
    )
    (tmp_path / "token").write_text(server.manager_token + "\n")
    put(server, [item(f"Long {number}", texts=("a", "a longer one")) for number in range(3)])
    settings = Annotate(
        url=server.url,
        token_file="token",
        people=("eve", "joe"),
        rewards="hidden.py:liking",
        temperature=0,
        noise=0,
        patience=0.1,
        precision="float32",
    )
    counts = people.annotate(settings)
    assert sum(counts) >= 3 * 2
    mine = [label for label in stored(path, "compare") if label.item.prompt.startswith("Long")]
    assert {label.answer.ranks for label in mine} == {(2, 1)}
    assert {label.person for label in mine} <= {"eve", "joe"}
    with pytest.raises(PlauditError, match="'eve'"):
        people.annotate(settings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "url: give the address"),
        ({"url": "http://127.0.0.1:9"}, "token: nobody answers"),
        ({"url": "http://127.0.0.1:9", "token_file": "nowhere"}, "token_file: there is no file 'nowhere'"),
        ({"url": "http://127.0.0.1:9/join/abc", "token": "def", "people": ("a",)}, "people: these are let in"),
        ({"url": "http://127.0.0.1:9", "token": "abc", "rewards": "no.py:f"}, "there is no file 'no.py'"),
        ({"url": "http://127.0.0.1:9", "token": "abc", "people": ("a",)}, "no label server answers"),
    ],
)
def test_mistakes_are_told_before_anything_loads(given, said):
    with pytest.raises(PlauditError, match=said):
        people.annotate(Annotate(**{"rewards": "count:a", **given}))


def test_a_file_of_tokens_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "tokens").write_bytes(b"\xff\xfe")
    with pytest.raises(PlauditError, match=r"token_file: .*tokens cannot be read"):
        people.annotate(Annotate(url="http://127.0.0.1:9", token_file=str(tmp_path / "tokens"), rewards="count:a"))


# -------------------------------------------------------------------------------------------------- plaudit agreement


def pandalm(path, rows):
    """[(cmp_key, annotators' choices), ...] as a JSON list."""
    values = []
    for number, (models, choices) in enumerate(rows):
        row = {"idx": number, "cmp_key": models, "instruction": f"Do {number}", "input": ""}
        said = {f"annotator{place}": choice for place, choice in enumerate(choices, 1)}
        values.append({**row, "response1": f"One {number}", "response2": True, **said})
    path.write_text(json.dumps(values))
    return path


def test_a_table_with_annotators_columns(tmp_path, monkeypatch, capsys):
    from plaudit.feedback.gathering import gather

    rows = [("x_y", (1, 1, 1))] * 6 + [("x_y", (2, 2, 1)), ("y_x", (1, 0, None)), ("y_x", (1, 1, 2))]
    path = pandalm(tmp_path / "judged.json", rows)
    labels = gather([path])
    assert len(labels) == 26
    assert labels[0].item.candidates[1].text == "true"
    from plaudit.settings.feedback import Agreement

    page = people.agreement(Agreement(data=str(path), output=str(tmp_path / "out"), resamples=50))
    found = json.loads((tmp_path / "out" / "agreement.json").read_text())
    # Pairs that agree: 6 x 3 + 1 + 0 + 1 of 6 x 3 + 3 + 1 + 3.
    assert found["kinds"]["compare"]["figures"]["raw"]["value"] == pytest.approx(20 / 25)
    # x won 18 + 1 + 0.5 + 1, and lost the rest.
    odds = np.log(20.5 / 5.5)
    assert found["strengths"]["models"]["x"]["value"] == pytest.approx(odds / 2, abs=1e-4)
    html = page.read_text()
    assert html.count("<svg") >= 5
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "80.0% of comparisons" in html
    assert "Fleiss’ κ" in capsys.readouterr().out


def test_a_folder_that_takes_no_figures_is_refused_in_a_sentence(tmp_path):
    from plaudit.settings.feedback import Agreement

    path = pandalm(tmp_path / "judged.json", [("x_y", (1, 2))])
    (tmp_path / "out" / "agreement.json").mkdir(parents=True)
    with pytest.raises(PlauditError, match=r"output: .*out cannot be written \(Is a directory\); choose another"):
        people.agreement(Agreement(data=str(path), output=str(tmp_path / "out"), resamples=5))


def test_names_are_text_on_the_page_and_in_the_terminal(monkeypatch, capsys):
    from labelled import compared

    from plaudit import feedback_report
    from plaudit.feedback.agreement import summary

    hostile = "[red]<script>$1&$2"
    found = summary(compared({hostile: "1212=1", "ann": "1221=1"}), resamples=20)
    html = feedback_report.page(found, title="<b>study</b>")
    assert "<script>" not in html
    assert "<b>study" not in html
    assert "&lt;script&gt;" in html
    monkeypatch.setenv("COLUMNS", "200")
    feedback_report.show(found)
    assert hostile in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"response1": "a", "response2": "b", "annotator1": 3}', "`annotator1` must be 1, 2, or 0 for a tie, not 3"),
        ('{"response1": "a", "annotator1": 1}', "needs `response2`"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "rows.jsonl:1"),
    ],
)
def test_what_cannot_be_read_says_where(tmp_path, content, said):
    from plaudit.feedback.gathering import gather

    path = tmp_path / "rows.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(PlauditError, match=said):
        gather([path])
    with pytest.raises(PlauditError, match="there is no file"):
        gather([tmp_path / "nothing.db"])
