"""Files in and out of a store: candidates become items, labels become records, and what goes out comes back in."""

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st

from plaudit.cli import main
from plaudit.errors import PlauditError
from plaudit.feedback.candidates import read_items
from plaudit.feedback.exchange import export, take_in
from plaudit.feedback.exporting import comparisons, rankings, ratings, rows_of
from plaudit.feedback.forms import item_from_json, item_to_json, label_from_json, label_to_json
from plaudit.feedback.gathering import gather
from plaudit.feedback.habits import position
from plaudit.feedback.importing import read_labels
from plaudit.feedback.items import Answer, Candidate, Item, Label, in_words
from plaudit.feedback.store import Rules, Store
from plaudit.records import Comparison, Demonstration, Ranking, Rating, load
from plaudit.settings.feedback import Export, Import

CHAT = [{"role": "user", "content": "Hi"}]
REPLY = [{"role": "assistant", "content": "Hello"}]
RUDE = [{"role": "assistant", "content": "Go away"}]


def written(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(item):
    return [candidate.text for candidate in item.candidates]


def models(item):
    return [candidate.source.get("model") for candidate in item.candidates]


# ------------------------------------------------------------------------------------------------ candidates


@pytest.mark.parametrize(
    ("row", "kind", "wanted"),
    [
        ({"completions": ["a", "b"]}, None, [("compare", ["a", "b"])]),
        ({"completions": ["a", "b"]}, "rank", [("rank", ["a", "b"])]),
        ({"completions": ["a", "b", "c"]}, None, [("rank", ["a", "b", "c"])]),
        ({"completions": ["a", "b"]}, "rate", [("rate", ["a"]), ("rate", ["b"])]),
        ({"completions": ["a"]}, None, [("rate", ["a"])]),
        ({"completion": "a"}, None, [("rate", ["a"])]),
        ({"chosen": "a", "rejected": "b"}, None, [("compare", ["a", "b"])]),
        ({"chosen": "a", "rejected": "b"}, "rate", [("rate", ["a"]), ("rate", ["b"])]),
        ({"completions": [REPLY, []]}, None, [("compare", [REPLY, []])]),
    ],
)
def test_a_row_of_candidates_becomes_items(tmp_path, row, kind, wanted):
    items = read_items(written(tmp_path, {"prompt": "p", "topic": "t", **row}), kind)
    assert [(item.kind, texts(item)) for item in items] == wanted
    assert all((item.prompt, item.columns, item.gold) == ("p", {"topic": "t"}, None) for item in items)


def test_transcripts_are_taken_apart_and_pairs_that_say_nothing_left_out(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant:"
    rows = [{"chosen": start + " a", "rejected": start + " b"}, {"chosen": start + " a", "rejected": start + " a"}]
    (item,) = read_items(written(tmp_path, *rows, {"prompt": "p", "completions": ["same", "same"]}))
    assert (item.prompt, texts(item)) == (start, [" a", " b"])


def test_sources_and_queries_are_kept_apart_from_what_is_asked(tmp_path):
    rows = [
        {"prompt": "1", "completions": ["a", "b"], "models": ["x", {"model": "y", "step": 5}]},
        {"prompt": "2", "completions": ["a", "b"], "sources": [None, "z"], "query": {"method": "random", "round": 2}},
        {"prompt": "3", "completions": ["a", "b"], "model": "one for all"},
    ]
    items = read_items(written(tmp_path, *rows))
    assert [models(item) for item in items] == [["x", "y"], [None, "z"], ["one for all"] * 2]
    assert items[0].candidates[1].source == {"model": "y", "step": 5}
    assert items[1].query == {"method": "random", "round": 2}
    assert [item.columns for item in items] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("row", "kind", "gold"),
    [
        ({"completions": ["a", "b"], "gold": "B > A"}, None, Answer((2, 1))),
        ({"completions": ["a", "b"], "gold": "A = B"}, None, Answer((1, 1))),
        ({"completions": ["a", "b", "c"], "gold": "B > A = C"}, None, Answer((2, 1, 2))),
        ({"chosen": "a", "rejected": "b", "gold": True}, None, Answer((1, 2))),
        ({"chosen": "a", "rejected": "b", "gold": False}, None, None),
        ({"completion": "a", "gold": 0}, None, Answer(rating=0.0)),
        ({"completion": "a", "gold": 4.5}, None, Answer(rating=4.5)),
    ],
)
def test_gold_is_an_answer_in_words(tmp_path, row, kind, gold):
    (item,) = read_items(written(tmp_path, {"prompt": "p", **row}), kind)
    assert (item.gold, item.columns) == (gold, {})


def test_what_several_policies_said_to_one_prompt_is_put_together(tmp_path):
    def sampled(name, *pairs):
        rows = [{"prompt": prompt, "completion": text, "truncated": text == "b1"} for prompt, text in pairs]
        return written(tmp_path, *rows, name=name)

    a = sampled("a.jsonl", ("1", "a1"), ("2", "a2"), ("3", "same"), ("1", "a1 again"))
    b = sampled("b.jsonl", ("2", "b2"), ("1", "b1"), ("3", "same"), ("4", "alone"))
    items = read_items([a, b])
    assert [(item.kind, item.prompt, texts(item), models(item)) for item in items] == [
        ("compare", "1", ["a1", "b1"], ["a", "b"]),
        ("compare", "2", ["a2", "b2"], ["a", "b"]),
    ]
    assert [item.columns for item in items] == [{}, {"truncated": False}]  # what both say alike
    (rank,) = read_items([a, b], "rank")[:1]
    assert (rank.kind, texts(rank), models(rank)) == ("rank", ["a1", "b1", "a1 again"], ["a", "b", "a"])
    # Of the eight two are the same, which is one question.
    assert [(item.kind, models(item)) for item in read_items([a, b], "rate")] == [("rate", [None])] * 7
    (one,) = read_items(a, "compare")
    assert (texts(one), models(one)) == (["a1", "a1 again"], [None, None])
    (tmp_path / "other").mkdir()
    twin = (tmp_path / "other" / "a.jsonl").absolute()
    twin.write_text(b.read_text())
    assert models(read_items([a, twin])[0]) == [str(a), str(twin)]


@pytest.mark.parametrize(
    ("row", "kind", "problem"),
    [
        ({"prompt": "p"}, None, r"rows.jsonl:2: what is to be judged needs .* holds `prompt`"),
        ({"completions": []}, None, r"rows.jsonl:2: `completions` must be a list of 1 to 9"),
        ({"completions": ["a"] * 10}, None, r"rows.jsonl:2: `completions` must be a list of 1 to 9"),
        ({"completions": ["a", 5]}, None, r"rows.jsonl:2: `completions` must be text"),
        ({"completions": ["a", REPLY]}, None, r"rows.jsonl:2: completions must be all texts"),
        ({"completions": ["a", "b", "c"]}, "compare", r"rows.jsonl:2: to compare needs 2 candidates, but there are 3"),
        ({"completions": ["a", "b"], "models": ["x"]}, None, r"rows.jsonl:2: `models` must be a list .* 2 candidates"),
        ({"completions": ["a", "b"], "model": 5}, None, r"rows.jsonl:2: `model` must name"),
        ({"completions": ["a", "b"], "gold": "A > C"}, None, r"rows.jsonl:2: `gold`: the ranking 'A > C'"),
        ({"completions": ["a", "b"], "gold": "A > B > C"}, None, r"rows.jsonl:2: `gold`: 3 ranks do not fit 2"),
        ({"completions": ["a", "b"], "gold": 3}, None, r"rows.jsonl:2: `gold` must be"),
        ({"completion": "a", "gold": True}, None, r"rows.jsonl:2: `gold` must be"),
        ({"completion": "a", "gold": "A"}, None, r"rows.jsonl:2: `gold` must be a number"),
        ({"completions": ["a", "b"], "query": "why"}, None, r"rows.jsonl:2: `query` must be an object"),
        ({"kind": "sort", "candidates": []}, None, r"rows.jsonl:2: `kind` must be compare, rank or rate, not 'sort'"),
        ({"kind": "rate", "candidates": [{}]}, None, r"rows.jsonl:2, candidate 1: a candidate needs `text`"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused_where_it_stands(tmp_path, row, kind, problem):
    with pytest.raises(PlauditError, match=problem):
        read_items(written(tmp_path, {"prompt": "p", "completions": ["x", "y"]}, row), kind)


def test_a_number_that_json_does_not_know_is_refused_where_it_stands(tmp_path):
    with pytest.raises(PlauditError, match=r"rows.jsonl:1: holds NaN"):
        read_items(written(tmp_path, {"prompt": "p", "completions": ["x", "y"], "score": float("nan")}))
    with pytest.raises(PlauditError, match=r"rows.jsonl:1: holds NaN"):
        read_labels(written(tmp_path, {**PAIR, "score": float("nan")}), by="ann")


def test_a_file_with_nothing_to_judge_says_so(tmp_path):
    with pytest.raises(PlauditError, match="holds nothing to judge"):
        read_items(written(tmp_path, {"prompt": "p", "completions": ["same", "same"]}))


# ------------------------------------------------------------------------------------------------ JSON


words = st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)
plain_json = (
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | words
)
mappings = st.dictionaries(
    st.sampled_from(["model", "step", "margin", "chosen", "prompt", "provenance", "é"]), plain_json, max_size=3
)
dialogues = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": words}), max_size=2
)


@st.composite
def answers(draw, kind, count):
    more = {"note": draw(words), "rewrite": draw(words)}
    if draw(st.booleans()) and draw(st.booleans()):
        return Answer(**more)
    if kind == "rate":
        return Answer(rating=draw(st.sampled_from([0.0, 1.0, 2.5, -3.0, 1e300])), **more)
    given = draw(st.lists(st.integers(1, count), min_size=count, max_size=count))
    ranks = tuple(sorted(set(given)).index(rank) + 1 for rank in given)
    strength = draw(st.sampled_from([None, 1, 2, 3])) if len(set(ranks)) > 1 else None
    return Answer(ranks, strength=strength, **more)


@st.composite
def items(draw):
    kind = draw(st.sampled_from(["compare", "rank", "rate"]))
    count = {"compare": 2, "rate": 1}.get(kind) or draw(st.integers(2, 5))
    kinds = words if draw(st.booleans()) else dialogues
    candidates = tuple(Candidate(draw(kinds), draw(mappings)) for _ in range(count))
    gold = draw(answers(kind, count)) if draw(st.integers(0, 4)) == 0 else None
    return Item(kind, draw(words | dialogues), candidates, draw(mappings), gold, draw(mappings))


@st.composite
def studies(draw):
    """Labels as a store would hold them: one for each item, person and repeat."""
    found = list({item.id: item for item in draw(st.lists(items(), min_size=1, max_size=4))}.values())
    labels = []
    for number, item in enumerate(found):
        for person in draw(st.lists(st.sampled_from(["ann", "bob", "=cmd|' /C'!A0"]), unique=True, max_size=3)):
            for repeat in range(draw(st.integers(1, 2))):
                count = len(item.candidates)
                shown, order = draw(st.floats(0, 2**35)), tuple(draw(st.permutations(range(count))))
                name = f"{number:03}{person[:3]}{repeat}"
                answer = draw(answers(item.kind, count))
                ms = draw(st.integers(0, 2**53))
                labels.append(Label(name, item, person, answer, order, shown, shown + 1.5, ms, repeat))
    return draw(st.permutations(labels))


@given(studies())
def test_items_and_labels_survive_json(labels):
    for label in labels:
        assert label_from_json(json.loads(json.dumps(label_to_json(label))), "here") == label
        item = item_from_json(json.loads(json.dumps(item_to_json(label.item))), "here")
        assert (item, item.id) == (label.item, label.item.id)


def label(**changes) -> dict:
    item = Item("compare", "p", (Candidate("a"), Candidate("b")))
    return label_to_json(Label("1", item, "ann", Answer((1, 2)), (1, 0), 1.0, 2.0, 3)) | changes


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "f.jsonl:1: must be an object"),
        (label(colour=1), "there is no field 'colour'"),
        (label(person=None), "a label needs `person`"),
        (label(person="a\nb"), "`person`: holds control characters"),
        (label(person="x" * 81), "`person` must be a text of 1 to 80"),
        (label(order=[0, 0]), "`order` must hold each of the 2 candidates once"),
        (label(item={**label()["item"], "columns": {"x": float("nan")}}), "item: holds NaN"),
        (label(order=[0, True]), "`order` must be a whole number"),
        (label(ms=-1), "`ms` must be a whole number"),
        (label(answered_at=1e12), "`answered_at` must be in seconds"),
        (label(answer={"ranks": [1, 2, 3]}), "answer: 3 ranks do not fit 2"),
        (label(answer={"ranks": [1, 3]}), "answer: ranks start at 1"),
        (label(answer={"rating": 4}), "answer: a rating does not fit"),
        (label(answer={"ranks": [1, 2], "note": 5}), "answer: `note` must be a text"),
        (label(answer={"ranks": [1, 2], "strength": 9}), "answer: a strength is 1, 2 or 3"),
        (label(item={"kind": "compare", "prompt": 5, "candidates": []}), "item: `prompt` must be text"),
        (label(item={"kind": "compare", "candidates": "ab"}), "item: `candidates` must be a list"),
        (label(item={**label()["item"], "gold": {"rating": 3}}), "item, gold: a rating does not fit"),
    ],
)
def test_a_label_with_anything_wrong_is_refused_by_place_and_field(value, problem):
    with pytest.raises(PlauditError, match=problem) as error:
        label_from_json(value, "f.jsonl:1")
    assert str(error.value).startswith("f.jsonl:1")


# ------------------------------------------------------------------------------------------------ out


SIDES = (Candidate("bad", {"model": "x", "step": 7}), Candidate("good", {"model": "y"}))


def said(answer, *, item=None, name="1", person="ann", repeat=0, order=None):
    item = item or Item(
        "compare", "p", SIDES, {"method": "margin", "propensity": 0.25, "round": 3}, None, {"topic": "t"}
    )
    return Label(
        name, item, person, answer, order or tuple(range(len(item.candidates)))[::-1], 10.0, 12.5, 2500, repeat
    )


def test_a_comparison_says_who_preferred_which_how_much_and_all_about_it():
    (pair,) = comparisons([said(Answer((2, 1), strength=3, note="clear"))])
    assert (pair.prompt, pair.chosen, pair.rejected, pair.preference, pair.margin) == ("p", "good", "bad", 1.0, 3.0)
    assert pair.columns == {
        "topic": "t",
        "provenance": {
            "kind": "compare",
            "sources": [{"model": "x", "step": 7}, {"model": "y"}],
            "query": {"method": "margin", "propensity": 0.25, "round": 3},
            "places": [1, 0],
            "labels": [
                {
                    "id": "1",
                    "person": "ann",
                    "answer": {"ranks": [2, 1], "strength": 3, "note": "clear"},
                    "order": [1, 0],
                    "shown_at": 10.0,
                    "answered_at": 12.5,
                    "ms": 2500,
                    "repeat": 0,
                }
            ],
        },
    }


def test_ties_are_a_half_or_nothing_and_what_cannot_be_compared_is_never_there():
    labels = [said(Answer((1, 1))), said(Answer(), name="2"), said(Answer((1, 2)), name="3")]
    assert [(pair.chosen, pair.preference) for pair in comparisons(labels)] == [("bad", 0.5), ("bad", 1.0)]
    assert [pair.preference for pair in comparisons(labels, ties="drop")] == [1.0]
    assert [ranking.ranks for ranking in rankings(labels)] == [(1, 1), (1, 2)]
    assert ratings(labels) == []


@given(st.lists(st.integers(1, 4), min_size=2, max_size=9))
def test_a_ranking_gives_a_comparison_of_each_two_that_do_not_tie(given_ranks):
    ranks = tuple(sorted(set(given_ranks)).index(rank) + 1 for rank in given_ranks)
    item = Item("rank", "p", tuple(Candidate(str(place)) for place in range(len(ranks))))
    for ties in ("half", "drop"):
        pairs = [
            (int(pair.chosen), int(pair.rejected)) for pair in comparisons([said(Answer(ranks), item=item)], ties=ties)
        ]
        wanted = {(i, j) for i, better in enumerate(ranks) for j, worse in enumerate(ranks) if better < worse}
        assert set(pairs) == wanted
        assert len(pairs) == len(wanted)


@pytest.fixture
def study(tmp_path):
    """A store with one of everything."""
    rate = Item("rate", "q", (Candidate("so so", {"model": "x"}),))
    gold = Item("compare", "gold", SIDES, gold=Answer((2, 1)))
    chat = Item("compare", CHAT, (Candidate(REPLY), Candidate(RUDE)))
    labels = [
        said(Answer((2, 1), rewrite="better")),
        said(Answer(rating=1.0), item=rate, name="2"),
        said(Answer(rating=0.0), item=rate, name="3", person="bob"),
        said(Answer((1, 2)), item=gold, name="4"),
        said(Answer((1, 1)), name="5", person="bob"),
        said(Answer((1, 2)), name="6", repeat=1),
        said(Answer(note="neither"), name="7", person="cleo"),
        said(Answer((3, 1, 2)), item=Item("rank", "r", tuple(map(Candidate, "abc"))), name="8"),
        said(Answer((1, 2), rewrite="Good day"), item=chat, name="9"),
    ]
    with Store.open(tmp_path / "study.db") as store:
        assert store.take(labels) == ["new"] * len(labels)
    return str(tmp_path / "study.db")


def exported(study, kind, name="out.jsonl", **more):
    path = export(Export(data=study, output=str(Path(study).with_name(name)), kind=kind, **more))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_exports_are_what_training_reads(study):
    pairs = exported(study, "comparisons", "c.jsonl")
    folder = Path(study).parent
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [
        ("good", "bad"), ("bad", "good"), ("b", "a"), ("c", "a"), ("b", "c"), (REPLY, RUDE),
    ]  # fmt: skip
    assert [record.preference for record in load(folder / "c.jsonl", Comparison).records] == [1, 0.5, 1, 1, 1, 1]
    exported(study, "rankings", "r.jsonl")
    ranks = [record.ranks for record in load(folder / "r.jsonl", Ranking).records]
    assert ranks == [(2, 1), (1, 1), (3, 1, 2), (1, 2)]
    (row,) = exported(study, "ratings", "s.jsonl")
    assert [one["person"] for one in row["provenance"]["labels"]] == ["ann", "bob"]
    (rating,) = load(folder / "s.jsonl", Rating).records
    assert (rating.prompt, rating.completion, rating.ratings) == ("q", "so so", (1.0, 0.0))
    thumbs = exported(study, "thumbs", "t.jsonl")
    assert [(row["prompt"], row["completion"], row["label"]) for row in thumbs] == [
        ("q", "so so", True),
        ("q", "so so", False),
    ]
    assert [record.ratings for record in load(folder / "t.jsonl", Rating).records] == [(1.0,), (0.0,)]
    exported(study, "demonstrations", "d.jsonl")
    assert [(one.prompt, one.completion) for one in load(folder / "d.jsonl", Demonstration).records] == [
        ("p", "better"),
        (CHAT, [{"role": "assistant", "content": "Good day"}]),
    ]


def test_transcripts_are_those_of_hh_rlhf(study):
    rows = exported(study, "transcripts")
    assert rows[0]["chosen"] == "\n\nHuman: p\n\nAssistant: good"
    assert rows[-1]["rejected"] == "\n\nHuman: Hi\n\nAssistant: Go away"
    records = load(Path(study).with_name("out.jsonl"), Comparison).records
    assert [(one.prompt, one.chosen, one.rejected) for one in records[:1]] == [
        ("\n\nHuman: p\n\nAssistant:", " good", " bad")
    ]
    assert len(records) == 5  # no tie
    odd = Item("compare", "p", SIDES, columns={"prompt": "another", "topic": "t"})
    (row,) = rows_of([said(Answer((1, 2)), item=odd)], "transcripts")
    assert list(row) == ["chosen", "rejected", "topic", "provenance"]


def test_what_an_item_says_of_itself_never_stands_for_what_people_said(tmp_path):
    columns = {
        "score": 0.3,
        "rating": 0.2,
        "ratings": [0.1],
        "label": False,
        "chosen": "a",
        "rejected": "b",
        "topic": "t",
    }
    rate = Item("rate", "q", (Candidate("so so"),), columns=columns)
    wanted = said(Answer(rating=1.0), item=rate)
    for kind in ("thumbs", "ratings"):
        path = written(tmp_path, *rows_of([wanted], kind), name=f"{kind}.jsonl")
        (record,) = load(path, Rating).records
        assert (record.ratings, record.columns["topic"]) == ((1.0,), "t")
        assert [label for _, label in read_labels(path).labels] == [wanted]


def test_labels_that_two_files_hold_count_once(study, tmp_path):
    exported(study, "labels", "all.jsonl")
    found = gather([study, tmp_path / "all.jsonl"])
    assert [one.id for one in found] == [str(number) for number in range(1, 10)]


def test_gold_items_repeats_and_old_labels_are_left_out_as_asked(study):
    def names(kind="comparisons", **more):
        path = Path(study).with_name("n.jsonl")
        found = exported(study, kind, "n.jsonl", **more)
        path.unlink()
        return list(dict.fromkeys(row.get("id") or row["provenance"]["labels"][0]["id"] for row in found))

    assert names() == ["1", "5", "8", "9"]
    assert names(gold=True) == ["1", "4", "5", "8", "9"]
    assert names(repeats=True) == ["1", "5", "6", "8", "9"]
    assert names(ties="drop") == ["1", "8", "9"]
    assert names(last=3) == ["8", "9"]  # of the last three, one could not be compared
    assert names("labels") == [str(number) for number in range(1, 10)]
    assert names("labels", last=2) == ["8", "9"]


@pytest.mark.parametrize("nothing", ["", " \n", []])
def test_an_answer_to_nothing_is_no_demonstration_and_is_told_of(tmp_path, capsys, nothing):
    sides = (Candidate(REPLY), Candidate(RUDE)) if nothing == [] else SIDES
    lone = said(Answer((1, 2), rewrite="better"), item=Item("compare", nothing, sides), name="lone")
    store, out = str(tmp_path / "s.db"), str(tmp_path / "d.jsonl")
    settings = Export(data=store, output=out, kind="demonstrations")
    told = "rewritten answers left out for want of a prompt: 1"
    with Store.open(store) as study:
        study.take([lone])
    with pytest.raises(PlauditError, match=told):
        export(settings)
    with Store.open(store) as study:
        study.take([said(Answer((1, 2), rewrite="good"), name="whole")])
    assert [json.loads(line)["completion"] for line in export(settings).read_text().splitlines()] == ["good"]
    assert capsys.readouterr().err == f"{told}; the first is label lone\n"


def test_a_table_never_calculates(tmp_path):
    bad = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", '=HYPERLINK("http://x","y")']
    labels = []
    for text in bad:
        item = Item("compare", text, (Candidate(text, {"=a": 1}), Candidate("b")))
        answer = Answer((1, 2), note=text, rewrite=text)
        labels.append(said(answer, item=item, name=text + "i", person=text.strip()))
    labels.append(said(Answer(rating=-2.0), item=Item("rate", CHAT, (Candidate('ok, "so"\nbe it'),)), name="last"))
    with Store.open(tmp_path / "s.db") as store:
        store.take(labels)
    path = export(Export(data=str(tmp_path / "s.db"), output=str(tmp_path / "t.csv"), kind="labels"))
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["note"] for row in found[:-1]] == [f"'{text}" for text in bad]
    cells = [cell for row in found for cell in row.values() if cell]
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r\n"]
    assert found[0]["answer"] == "A > B"
    assert (found[-1]["candidate A"], found[-1]["prompt"], found[-1]["answered at"], found[-1]["seconds"]) == (
        "ok, \"so\"\nbe it", "user: Hi", "1970-01-01T00:00:12+00:00", "2.5",
    )  # fmt: skip


def test_answers_in_words():
    assert [in_words(one) for one in (Answer((2, 1, 2)), Answer((1, 1)), Answer(rating=4.5), Answer())] == [
        "B > A = C", "A = B", "4.5", "can't compare",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"output": "study.db"}, "output: .*study.db exists already"),
        ({"output": "out.txt"}, "output: .*out.txt ends neither in .jsonl nor"),
        ({"output": "out.csv"}, "give --kind labels"),
        ({"output": "rows.jsonl/out.jsonl"}, "output: .*out.jsonl cannot be written"),
        ({"data": "no.db"}, "no.db: there is no such store"),
        ({"data": "rows.jsonl"}, "rows.jsonl: is there, but is not a store"),
        ({"kind": "ratings", "last": 1}, "holds nothing yet that can be exported as ratings"),
        ({"kind": "stars"}, "`kind` is 'stars', but must be"),
    ],
)
def test_an_export_that_cannot_be_is_refused_in_a_sentence(study, changes, problem):
    folder = Path(study).parent
    written(folder, {"prompt": "p"})
    values = {"data": "study.db", "output": "out.jsonl", **changes}
    values |= {name: str(folder / values[name]) for name in ("data", "output")}
    with pytest.raises(PlauditError, match=problem):
        export(Export(**values))
    assert not list(folder.glob("out*"))


def test_a_rating_is_no_thumb_and_a_system_prompt_no_part_of_a_transcript():
    rate = Item("rate", "q", (Candidate("so so"),))
    with pytest.raises(PlauditError, match=r"label 1: is a rating of 3 and no thumb; export the kind `ratings`"):
        rows_of([said(Answer(rating=3.0), item=rate)], "thumbs")
    chat = Item("compare", [{"role": "system", "content": "s"}], SIDES)
    with pytest.raises(PlauditError, match="of the role 'system'"):
        rows_of([said(Answer((1, 2)), item=chat)], "transcripts")


# ------------------------------------------------------------------------------------------------ and back in


def carried(labels, kind):
    """Labels that a kind has a place for."""
    kinds = {"comparisons": ("compare", "rank"), "rankings": ("compare", "rank"), "ratings": ("rate",)}.get(kind)
    if kinds is None:
        return labels
    kept = [one for one in labels if one.item.kind in kinds and one.answer.comparable]
    tied = {one.id for one in kept if one.item.kind == "rank" and len(set(one.answer.ranks)) == 1}
    return [one for one in kept if kind != "comparisons" or one.id not in tied]


@trying(max_examples=40)
@given(studies(), st.sampled_from(["labels", "comparisons", "rankings", "ratings"]), st.sampled_from(["", ".gz"]))
def test_an_export_imported_again_is_the_same(labels, kind, ending):
    wanted = carried(labels, kind)
    if not wanted:
        return
    with TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        with Store.open(folder / "1.db") as store:
            assert store.take(labels) == ["new"] * len(labels)
            assert store.labels() == labels
        contents = []
        for turn in (1, 2):
            path = folder / f"{turn}.jsonl{ending}"
            export(Export(data=str(folder / f"{turn}.db"), output=str(path), kind=kind, gold=True, repeats=True))
            contents.append(gzip.decompress(path.read_bytes()) if ending else path.read_bytes())
            back = Import(data=str(path), output=str(folder / f"{turn + 1}.db"))
            assert (take_in(back).new, take_in(back).new) == (len(wanted), 0)
        assert contents[0] == contents[1]
        with Store.read(folder / "2.db") as store:
            found = store.labels()
        assert sorted(found, key=lambda one: one.id) == sorted(wanted, key=lambda one: one.id)
        assert kind == "ratings" or found == wanted  # ratings of one answer stand together


def test_thumbs_come_back_as_they_were(study):
    path = Path(study).with_name("t.jsonl")
    rows = exported(study, "thumbs", "t.jsonl")
    assert take_in(Import(data=str(path), output=study)).new == 0
    again = str(path.with_name("again.db"))
    assert take_in(Import(data=str(path), output=again)).new == 2
    assert exported(again, "thumbs", "t2.jsonl") == rows


def test_records_from_anywhere_become_labels(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "x", "rejected": "y", "person": "ann", "margin": 2, "topic": "t"},
        {"prompt": "p", "chosen": "y", "rejected": "x", "person": "bob", "preference": 0.5, "topic": "t"},
        {"prompt": "p", "chosen": "y", "rejected": "x", "margin": 0.7, "sources": ["m", "n"]},
        {"prompt": "p", "completions": ["c", "a", "b"], "ranking": "C > A = B"},
        {"prompt": "p", "completions": ["c", "a", "b"], "ranking": [4, 1, 4], "person": "bob"},
        {"prompt": "p", "completion": "c", "ratings": [4, 5]},
        {"prompt": "p", "completion": "c", "rating": 2, "person": "bob"},
        {"prompt": "p", "completion": "c", "ratings": [1, 1], "person": ["ann", "cleo"]},
        {"prompt": "p", "chosen": "same", "rejected": "same", "person": "ann"},
    ]
    path = written(tmp_path, *rows)
    read = read_labels(path, by="crowd")
    found = [label for _, label in read.labels]
    assert read.dropped == {"chosen and rejected are the same": [f"{path}:9"]}
    assert [(one.person, texts(one.item), one.answer.ranks or one.answer.rating) for one in found] == [
        ("ann", ["x", "y"], (1, 2)),
        ("bob", ["x", "y"], (1, 1)),
        ("crowd", ["x", "y"], (2, 1)),
        ("crowd", ["a", "b", "c"], (2, 1, 2)),
        ("bob", ["a", "b", "c"], (1, 2, 2)),
        ("crowd 1", ["c"], 4.0),
        ("crowd 2", ["c"], 5.0),
        ("bob", ["c"], 2.0),
        ("ann", ["c"], 1.0),
        ("cleo", ["c"], 1.0),
    ]
    # In what order they were shown nobody knows, and the order of the alphabet would pass for a bias.
    assert {one.order for one in found} == {()}
    assert position(found)["n"] == 0
    assert [label_from_json(label_to_json(one), "here") for one in found] == found
    assert found[0].item.id == found[1].item.id  # two people judged one pair, whichever they preferred
    assert (found[0].answer.strength, found[0].item.columns) == (2, {"topic": "t"})
    assert (found[2].answer.strength, found[2].item.columns, models(found[2].item)) == (
        None,
        {"margin": 0.7},
        ["n", "m"],
    )
    store = str(tmp_path / "s.db")
    assert [take_in(Import(data=str(path), output=store, by="crowd")).new for _ in range(2)] == [10, 0]
    first = exported(store, "comparisons", "1.jsonl")
    assert take_in(Import(data=str(tmp_path / "1.jsonl"), output=str(tmp_path / "2.db"))).new == 5
    assert exported(str(tmp_path / "2.db"), "comparisons", "2.jsonl") == first


PAIR = {"prompt": "p", "chosen": "x", "rejected": "y"}


def test_what_becomes_of_each_row_is_told_with_the_line_of_the_first(tmp_path, capsys):
    rows = [PAIR, {**PAIR, "prompt": "q"}, PAIR, {**PAIR, "preference": 0}, {**PAIR, "rejected": "x"}]
    rows += [{"prompt": "r", "completion": " ", "rating": 1}, {"prompt": "r", "completion": "c", "rating": 1}]
    path, store = written(tmp_path, *rows), tmp_path / "s.db"
    words = ["import", "--data", str(path), "--output", str(store), "--by", "ann"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "4 new labels",
        f"1 left out, already there; the first: {path}:3",
        f"1 kept as repeats, because the same person had answered the same before; the first: {path}:4",
        f"1 left out, because chosen and rejected are the same; the first: {path}:5",
        f"1 left out, because a completion is empty; the first: {path}:6",
    ]
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["0 new labels", f"5 left out, already there; the first: {path}:1"]
    with Store.read(store) as found:
        assert len(found.labels()) == 4


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p", "completion": "c"}, "a label .* is wanted, but this row holds `prompt`, `completion`"),
        (PAIR, "does not say in `person` who judged; name somebody with --by"),
        ({**PAIR, "person": 5}, "does not say in `person`"),
        ({**PAIR, "person": "a\nb"}, "name: holds control characters"),
        ({**PAIR, "person": "a", "preference": 0.8}, "`preference`: a person prefers one .* not 0.8"),
        ({"completion": "x", "ratings": [1, 2], "person": ["a"]}, "`person` must name one .* 2 ratings"),
        ({"completions": list("0123456789"), "ranking": [1] * 10, "person": "a"}, "to rank needs 2 to 9"),
        ({"item": {}, "answer": {}}, "a label needs `id`"),
        ({**PAIR, "provenance": {"labels": [], "sources": []}}, "`provenance` must say in `places`"),
        (
            {**PAIR, "provenance": {"labels": [], "sources": [{}] * 3, "places": [0, 1]}},
            r"`provenance` is of other candidates than the file's rows hold \(2\)",
        ),
    ],
)
def test_a_row_that_is_no_label_is_refused_and_nothing_taken(tmp_path, row, problem):
    path = written(tmp_path, row)
    with pytest.raises(PlauditError, match=f"rows.jsonl:1: {problem}"):
        take_in(Import(data=str(path), output=str(tmp_path / "s.db")))
    assert not (tmp_path / "s.db").exists()


def test_another_store_is_taken_in_as_it_is(study, tmp_path):
    target = tmp_path / "all.db"
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    with Store.read(study) as store:
        labels = store.labels()
    given = Import(data=(str(study), str(tmp_path / "more.jsonl")), output=str(target), by="ann")
    assert take_in(given).new == len(labels) + 1
    with Store.read(target) as store:
        assert store.labels()[:-1] == labels
    assert take_in(given).new == 0
    with pytest.raises(PlauditError, match=r"gone\.db: records are read from \.jsonl"):
        take_in(Import(data=str(tmp_path / "gone.db"), output=str(target)))


def test_another_answer_of_the_same_person_becomes_a_repeat(study):
    again = said(Answer((1, 2)), name="elsewhere")
    with Store.open(study) as store:
        assert store.take([again]) == ["repeat"]
        assert store.labels()[-1] == replace(again, repeat=2)


def test_what_was_imported_is_not_asked_again(study):
    with Store.open(study) as store:
        store.join("dan")
        prompts = [one.item.prompt for one in store.next("ann", 9, Rules(overlap=9), 0.0)]
        assert prompts == []
        assert "p" in [one.item.prompt for one in store.next("dan", 9, Rules(overlap=9), 0.0)]


def changed(value, new):
    """Every value that differs from a JSON value in one place, which is `new` there, or gone."""
    if isinstance(value, dict):
        for name in value:
            yield {other: value[other] for other in value if other != name}
            yield from ({**value, name: one} for one in (new, *changed(value[name], new)))
    elif isinstance(value, list):
        for place in range(len(value)):
            yield value[:place] + value[place + 1 :]
            yield from ([*value[:place], one, *value[place + 1 :]] for one in (new, *changed(value[place], new)))


def refusals(study, kind, news):
    """What is said to a file whose first row is wrong in one place, for each place and each wrong value."""
    path = Path(study).with_name("broken.jsonl")
    row = exported(study, kind)[0]
    for broken in (one for new in news for one in changed(row, new)):
        path.write_text(json.dumps(broken, ensure_ascii=False), errors="surrogatepass")
        for read in (read_labels, read_items, lambda path, row=broken: label_from_json(row, str(path))):
            try:
                read(path)
            except PlauditError as error:
                yield str(error)


KINDS = ["labels", "comparisons", "rankings", "ratings", "thumbs"]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_wrong_in_a_file_is_said_in_a_sentence_that_names_it(study, kind):
    said = list(refusals(study, kind, [[[]]]))
    assert len(said) > 30
    assert [one for one in said if "broken.jsonl" not in one] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_else_is_wrong_in_a_file_is_said_too(study, kind):
    news = [None, True, -1, 10**400, 0.5, "x", "", "\ud800", [], {}, {"x": 1}]
    assert [one for one in refusals(study, kind, news) if "broken.jsonl" not in one] == []
