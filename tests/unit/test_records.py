"""Records: what every habit of column names becomes, what is refused, and that nothing is lost in a file."""

import contextlib
import gzip
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from plaudit.errors import PlauditError
from plaudit.records import (
    Comparison,
    Demonstration,
    Loaded,
    Prompt,
    Ranking,
    Rating,
    comparisons_of,
    load,
    parse,
    ranking_of,
    ranks_of,
    ratings_of,
    rows,
    to_row,
    write,
)

HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A joke?\n\nAssistant:"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def one(row: dict, kind: type):
    """The record that a single row becomes."""
    (record,) = parse([("f.jsonl:1", row)], kind).records
    return record


def dropped(row: dict, kind: type) -> str:
    """Why a row is left out."""
    good = {
        Prompt: {"prompt": "p"},
        Demonstration: {"completion": "c"},
        Comparison: {"chosen": "c", "rejected": "r"},
        Ranking: {"completions": ["a", "b"], "ranking": [1, 2]},
        Rating: {"completion": "c", "label": True},
    }[kind]
    loaded = parse([("f.jsonl:1", row), ("f.jsonl:2", good)], kind)
    assert len(loaded.records) == 1
    ((reason, places),) = loaded.dropped.items()
    assert places == ["f.jsonl:1"]
    return reason


def refusal(row: dict, kind: type) -> str:
    """What is said of a row that is wrong."""
    with pytest.raises(PlauditError) as caught:
        parse([("f.jsonl:7", row)], kind)
    assert str(caught.value).startswith("f.jsonl:7: ")
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ kinds from columns


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "p", "query": "q"}, "p"),
        ({"query": "q", "question": "u"}, "q"),
        ({"question": "u"}, "u"),
        ({"prompt": None, "question": "u"}, "u"),
        ({"prompt": [user("p")]}, [user("p")]),
        ({"messages": [user("p"), assistant("a"), user("q"), assistant("b")]}, [user("p"), assistant("a"), user("q")]),
        ({"messages": [user("p"), assistant("a"), user("q")]}, [user("p"), assistant("a"), user("q")]),
        ({"chosen": HH + " No."}, HH),
        ({"chosen": [user("p"), assistant("a")]}, [user("p")]),
    ],
)
def test_prompts(row, prompt):
    assert one(row, Prompt).prompt == prompt


def test_columns_are_those_the_record_does_not_use():
    assert one({"prompt": "p", "answer": 4, "query": None}, Prompt) == Prompt("p", {"answer": 4, "query": None})
    assert one({"query": "q", "prompt": None, "answer": 4}, Prompt) == Prompt("q", {"answer": 4})
    rating = one({"completion": "c", "ratings": [1, 2], "rating": 1.5, "who": ["x", "y"]}, Rating)
    assert rating.columns == {"rating": 1.5, "who": ["x", "y"]}


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"prompt": "p", "completion": "c", "text": "t"}, "p", "c"),
        ({"completion": "c"}, "", "c"),
        ({"text": "t"}, "", "t"),
        ({"prompt": "p", "text": "t"}, "", "t"),
        ({"messages": [user("p"), assistant("a")], "prompt": "p"}, [], [user("p"), assistant("a")]),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p", "c"),
        ({"chosen": HH + " No."}, HH, " No."),
        ({"chosen": [user("p"), assistant("a"), user("q"), assistant("b")]}, "p a q", [assistant("b")]),
        ({"prompt": "p", "chosen": [user("p"), assistant("a")]}, [user("p")], [assistant("a")]),
        ({"prompt": [user("p")], "completion": "c"}, [user("p")], [assistant("c")]),
        ({"prompt": "p", "completion": [assistant("c")]}, [user("p")], [assistant("c")]),
        ({"completion": [assistant("c")]}, [], [assistant("c")]),
    ],
)
def test_demonstrations(row, prompt, completion):
    if prompt == "p a q":
        prompt = [user("p"), assistant("a"), user("q")]
    record = one(row, Demonstration)
    assert (record.prompt, record.completion) == (prompt, completion)


CONVERSATION = [user("p"), assistant("a"), user("q")]


@pytest.mark.parametrize(
    ("row", "sides"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", "c", "r")),
        ({"chosen": "c", "rejected": "r"}, ("", "c", "r")),
        ({"prompt": "", "chosen": HH + " c", "rejected": HH + " r"}, ("", HH + " c", HH + " r")),
        ({"chosen": HH + " c", "rejected": HH + " r"}, (HH, " c", " r")),
        (
            {"chosen": [*CONVERSATION, assistant("c")], "rejected": [*CONVERSATION, assistant("r"), user("x")]},
            (CONVERSATION, [assistant("c")], [assistant("r"), user("x")]),
        ),
        (
            {"prompt": "p", "chosen": [user("p"), assistant("c")], "rejected": [user("p"), assistant("r")]},
            ([user("p")], [assistant("c")], [assistant("r")]),
        ),
        (
            {"prompt": "p", "chosen": [assistant("c")], "rejected": [assistant("r")]},
            ([user("p")], [assistant("c")], [assistant("r")]),
        ),
        (
            {"prompt": CONVERSATION, "chosen": "c", "rejected": "r"},
            (CONVERSATION, [assistant("c")], [assistant("r")]),
        ),
    ],
)
def test_comparisons(row, sides):
    assert one(row, Comparison) == Comparison(*sides)


def test_each_side_of_a_transcript_is_split_at_its_own_last_turn():
    """In six rows of hh-rlhf `rejected` does not start with the prompt of `chosen`: a slice would tear a sentence."""
    chosen = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: Because."
    longer = (
        "\n\nHuman: Hi\n\nAssistant: Well, hello.\n\nHuman: Why?\n\nAssistant: No.\n\nHuman: So?\n\nAssistant: Yes."
    )
    record = one({"chosen": chosen, "rejected": longer}, Comparison)
    assert (record.prompt + record.chosen, record.rejected) == (chosen, " Yes.")
    assert record.prompt.endswith("Why?\n\nAssistant:")


def test_preference_and_margin():
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert one(row | {"preference": 0.25, "margin": 3}, Comparison) == Comparison("p", "c", "r", 0.25, 3.0)
    assert one(row | {"preference": 0, "margin": None}, Comparison) == Comparison("p", "c", "r", 0.0)
    for wrong in (1.01, -0.01, "left", float("nan"), [1]):
        assert "`preference`" in refusal(row | {"preference": wrong}, Comparison)
    for wrong in ("big", float("inf"), 10**400):
        assert "`margin` must be a number" in refusal(row | {"margin": wrong}, Comparison)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"chosen": HH + " a", "rejected": "\n\nAssistant: a"}, "chosen and rejected are the same"),
        ({"chosen": HH + " a", "rejected": HH + " "}, "a completion is empty"),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "a completion is empty"),
        ({"chosen": [user("p")], "rejected": [user("p"), assistant("a")]}, "a completion is empty"),
        ({"prompt": "p", "chosen": [assistant(" ")], "rejected": [assistant("a")]}, "a completion is empty"),
        ({"chosen": HH + " a\n\nHuman: Wait", "rejected": HH + " b"}, "ends with the person's turn"),
        ({"chosen": "c", "rejected": "r", "preference": None}, "the rater could not compare"),
        ({"chosen": "c", "rejected": "r", "preference": "can't compare"}, "the rater could not compare"),
    ],
)
def test_comparisons_that_teach_nothing_are_counted(row, reason):
    assert dropped(row, Comparison) == reason


def test_other_records_that_teach_nothing_are_counted():
    assert dropped({"prompt": "p", "completion": " \n"}, Demonstration) == "a completion is empty"
    assert dropped({"chosen": [user("p")]}, Demonstration) == "ends with the person's turn"
    assert dropped({"completions": ["a", ""], "ranking": [1, 2]}, Ranking) == "a completion is empty"
    assert dropped({"completion": "", "label": False}, Rating) == "a completion is empty"
    assert dropped({"completion": "c", "ratings": []}, Rating) == "nobody rated it"


def test_rankings():
    row = {"prompt": "p", "completions": ["a", "b", "c", "d"]}
    assert one(row | {"ranking": [2, 1, 1, 3]}, Ranking) == Ranking("p", ("a", "b", "c", "d"), (2, 1, 1, 3))
    assert one(row | {"ranking": "B = C > A > D"}, Ranking).ranks == (2, 1, 1, 3)
    chat = one({"prompt": "p", "completions": [[assistant("a")], [assistant("b")]], "ranking": "A<B"}, Ranking)
    assert chat == Ranking([user("p")], ([assistant("a")], [assistant("b")]), (2, 1))
    assert one({"completions": ["a", "b"], "ranking": [1, 1]}, Ranking).prompt == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ranking": [1, 2]}, "ranks 2 completions, but there are 3"),
        ({"ranking": "A > B"}, "ranks 2 completions, but there are 3"),
        ({"ranking": [0, 1, 2]}, "ranks from 1"),
        ({"ranking": [1, 2, True]}, "ranks from 1"),
        ({"ranking": [1.0, 2.0, 3.0]}, "ranks from 1"),
        ({"ranking": 1}, "ranks from 1"),
        ({"completions": "abc"}, "list of at least two"),
        ({"completions": ["a"]}, "list of at least two"),
        ({"completions": ["a", "b", 3]}, "`completions` must be text or a list of messages"),
        ({"completions": ["a", "b", [assistant("c")]]}, "all texts or all lists"),
        ({"ranking": "A > B > D"}, "not an order of answers"),
    ],
)
def test_wrong_rankings_are_refused(change, said):
    row = {"prompt": "p", "completions": ["a", "b", "c"], "ranking": [1, 2, 3]}
    assert said in refusal(row | change, Ranking)


def test_orders():
    assert ranks_of("A > B = C > D") == (1, 2, 2, 3)
    assert ranks_of("A < B < C = D < E") == (4, 3, 2, 2, 1)
    assert ranks_of(" C=A>B ") == (1, 2, 1)
    assert ranks_of("A") == (1,)
    assert ranks_of("A = B") == (1, 1)
    for wrong in ("", "A > C", "A > A", "a > b", "A > B < C", "A >> B", "A B", "A >", "> A", "A, B", "1 > 2"):
        with pytest.raises(PlauditError, match=r"^f:3: the ranking .* is not an order"):
            ranks_of(wrong, "f:3")


@given(st.permutations("ABCDEF"), st.lists(st.sampled_from(">="), min_size=5, max_size=5))
def test_an_order_read_backwards_is_the_same_order(names, signs):
    best_first = names[0] + "".join(sign + name for sign, name in zip(signs, names[1:], strict=True))
    assert ranks_of(best_first[::-1].replace(">", "<")) == ranks_of(best_first)
    place = {name: 1 + signs[:i].count(">") for i, name in enumerate(names)}
    assert ranks_of(best_first) == tuple(place[name] for name in "ABCDEF")


def test_ratings():
    assert one({"prompt": "p", "completion": "c", "ratings": [1, 2.5]}, Rating) == Rating("p", "c", (1.0, 2.5))
    assert one({"completion": "c", "rating": 4}, Rating) == Rating("", "c", (4.0,))
    assert one({"completion": "c", "score": -0.5}, Rating).ratings == (-0.5,)
    assert one({"prompt": "p", "completion": "c", "label": True}, Rating).ratings == (1.0,)
    assert one({"completion": "c", "label": False}, Rating).ratings == (0.0,)
    assert one({"text": "t", "label": 0}, Rating) == Rating("", "t", (0.0,))
    chat = one({"prompt": "p", "completion": [assistant("c")], "label": True}, Rating)
    assert (chat.prompt, chat.completion) == ([user("p")], [assistant("c")])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"label": "pos"}, "`label` must be true or false, not 'pos'"),
        ({"label": 2}, "`label` must be true or false"),
        ({"rating": "5"}, "`rating` must be a number, not '5'"),
        ({"score": float("nan")}, "`score` must be a number"),
        ({"ratings": 3}, "`ratings` must be a list of numbers"),
        ({"ratings": [1, None]}, "`ratings` must be a number, not None"),
    ],
)
def test_wrong_ratings_are_refused(row, said):
    assert said in refusal({"completion": "c"} | row, Rating)


# ------------------------------------------------------------------------------------------------ wrong kinds and forms


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        ({"prompt": "p", "completion": "c", "label": True}, Comparison, "this row is a rating (it holds `prompt`, "),
        ({"prompt": "p", "completion": "c", "label": True}, Comparison, "a comparison needs `chosen` and `rejected`"),
        ({"chosen": "c", "rejected": "r"}, Rating, "an algorithm that learns from comparisons"),
        ({"prompt": "p", "chosen": "c"}, Comparison, "this row is a prompt (it holds `prompt`, `chosen`)"),
        ({"completions": ["a", "b"], "ranking": "A>B"}, Comparison, "is a ranking"),
        ({"prompt": "p", "completion": "c"}, Ranking, "is a demonstration"),
        ({"prompt": "p", "completion": "c", "label": None}, Rating, "is a demonstration (it holds `prompt`, `compl"),
        ({"prompt": "p"}, Demonstration, "is a prompt"),
        ({"chosen": "no transcript"}, Prompt, "this row holds `chosen`."),
        ({"chosen": "c", "rejected": "r"}, Prompt, "is a comparison"),
        ({"answer": 3, "prompt": None}, Prompt, "this row holds `answer`."),
        ({}, Comparison, "this row holds nothing."),
    ],
)
def test_a_row_of_another_kind_is_named(row, kind, said):
    assert said in refusal(row, kind)


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (3, "a number"),
        (True, "true or false"),
        ({"role": "user"}, "an object"),
        (["hello"], "a list"),
        ([{"role": "user"}], "a list"),
        ([{"role": "user", "content": None}], "a list"),
        ([{"from": "human", "value": "hi"}], "a list"),
        ((1,), "tuple"),
    ],
)
def test_text_of_a_wrong_form_is_refused(value, seen):
    assert refusal({"prompt": value}, Prompt).endswith(f"not {seen}.")


def test_sides_of_two_forms_are_refused():
    said = refusal({"chosen": "c", "rejected": [assistant("r")]}, Comparison)
    assert "`rejected` is a list while `chosen` is text" in said


def test_no_record_left_is_an_error():
    with pytest.raises(PlauditError, match=r"no usable prompt \(there are no rows\)"):
        parse([], Prompt)
    same = {"chosen": "a", "rejected": "a"}
    with pytest.raises(PlauditError, match=r"no usable comparison \(.* the same: 2, first f:1\)"):
        parse([("f:1", same), ("f:2", same)], Comparison)


# ------------------------------------------------------------------------------------------------ files


def test_rows_of_every_file_kind(tmp_path):
    line = json.dumps({"a": "ü\u2028"}, ensure_ascii=False).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\n  \r\n" + line)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line + b"\n\n" + line.strip()))
    (tmp_path / "lines.json").write_bytes(line + b"\n\n" + line)
    (tmp_path / "list.json").write_bytes(b'\xef\xbb\xbf [\n{"a": 1},\n{"a": 2}\n]\n')
    row = {"a": "ü\u2028"}
    for name in ("a.jsonl", "a.jsonl.gz", "lines.json"):
        path = tmp_path / name
        assert list(rows(path)) == [(f"{path}:1", row), (f"{path}:4", row)], name
        assert next(rows(str(path)))[0] == f"{path}:1"
    path = tmp_path / "list.json"
    assert list(rows(path)) == [(f"{path}, item 1", {"a": 1}), (f"{path}, item 2", {"a": 2})]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("f.jsonl", b'{"a": 1}\n{"a": \n', r":2: not valid JSON \(Expecting value at "),
        ("f.jsonl", b'{"a": 1}\n[1]\n', ":2: a row must be a JSON object, {...}, not a list."),
        ("f.jsonl", b"null", ":1: a row must be a JSON object, {...}, not null."),
        ("f.jsonl", b'{"a": 1}\n{"a": "\xff"}', r":2: not valid UTF-8 \(invalid start byte\)"),
        ("f.jsonl", b'{"a": "\\ud800"}', r":1: not valid UTF-8 \(surrogates not allowed\)"),
        ("f.jsonl", b"[" * 100_000, ":1: nested too deeply"),
        ("f.jsonl", b"1" * 5000, ":1: nested too deeply, or a number too long"),
        ("f.jsonl", b"", ": the file holds no rows."),
        ("f.jsonl", b"\n \n", ": the file holds no rows."),
        ("f.jsonl.gz", b"not gzip", ": cannot be read"),
        ("f.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-20], ": cannot be read"),
        ("f.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:10] + b"\xff" * 30, ": cannot be read"),
        ("f.json", b"[]", ": the file holds no rows."),
        ("f.json", b'[{"a": 1},\n7,]', r"json: not valid JSON \(.* at line 2, column"),
        ("f.json", b'[{"a": 1}, 7]', ", item 2: a row must be a JSON object, {...}, not a number."),
        ("f.csv", b"a,b", "read from .jsonl, .jsonl.gz or .json files"),
        ("f.gz", b"", "read from .jsonl, .jsonl.gz or .json files"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_their_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PlauditError, match=said) as caught:
        list(rows(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(PlauditError, match=r"none\.jsonl: cannot be read \(No such file"):
        list(rows(tmp_path / "none.jsonl"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(PlauditError, match=r"folder\.jsonl: cannot be read \(Is a directory\)"):
        load(tmp_path / "folder.jsonl", Prompt)


def test_emoji_escaped_as_surrogate_pairs_are_fine(tmp_path):
    (tmp_path / "f.jsonl").write_bytes(b'{"prompt": "\\ud83d\\ude00"}')
    assert load(tmp_path / "f.jsonl", Prompt).records == [Prompt("😀")]


def test_lines_are_read_one_at_a_time(tmp_path):
    """The rows before a malformed line are given before it is met."""
    (tmp_path / "f.jsonl").write_bytes(b'{"a": 1}\nbroken\n')
    stream = rows(tmp_path / "f.jsonl")
    assert next(stream)[1] == {"a": 1}
    with pytest.raises(PlauditError):
        next(stream)


def test_load_joins_files(tmp_path):
    for name in ("a", "b"):
        lines = [{"chosen": name, "rejected": "a"}, {"chosen": "x", "rejected": "y"}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    a, b = tmp_path / "a.jsonl", str(tmp_path / "b.jsonl")
    both = load([a, b], Comparison)
    assert both.records == [Comparison("", "x", "y"), Comparison("", "b", "a"), Comparison("", "x", "y")]
    assert both.dropped == {"chosen and rejected are the same": [f"{a}:1"]}
    assert load(b, Comparison) == Loaded(both.records[1:], {})


KINDS = st.sampled_from([Prompt, Demonstration, Comparison, Ranking, Rating])
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"chosen"',
    b'"prompt"',
    b'"\\ud800"',
    b"1",
    b"null",
    b"\n",
    b"\xff",
    b"\x00",
]


@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join), KINDS, st.sampled_from(["json", "jsonl", "jsonl.gz"])
)
@example(b'{"chosen": [], "rejected": [{}]}', Comparison, "jsonl")
def test_any_bytes_give_records_or_a_sentence(tmp_path_factory, content, kind, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    path.write_bytes(content)
    with contextlib.suppress(PlauditError):
        load(path, kind)


def text(size):
    return st.text('ab \n\r\u2028é😀"\\:', max_size=size)


names = ["prompt", "messages", "text", "completion", "completions", "ranking", "ratings", "label", "score", "margin"]
names += ["chosen", "rejected", "preference", "query"]
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": text(3)})
leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "A > B", HH + " x"])
value = leaf | st.lists(leaf, max_size=3) | st.lists(message, max_size=3)


@given(st.dictionaries(st.sampled_from(names), value), KINDS)
def test_any_row_gives_a_record_or_a_sentence_and_what_it_gives_is_stable(row, kind):
    records = []
    with contextlib.suppress(PlauditError):
        records = parse([("f:1", row)], kind).records
    for record in records:
        assert repr(one(to_row(record), kind)) == repr(record)


# ------------------------------------------------------------------------------------------------ conversions


@given(st.lists(st.integers(1, 4), min_size=2, max_size=9))
def test_a_ranking_gives_all_pairs_that_are_not_ties(ranks):
    ranking = Ranking("p", tuple("ABCDEFGHI"[: len(ranks)]), tuple(ranks), {"id": 1})
    pairs = comparisons_of(ranking)
    ties = sum(a == b for a, b in combinations(ranks, 2))
    assert len(pairs) == len(ranks) * (len(ranks) - 1) // 2 - ties
    rank = dict(zip(ranking.completions, ranks, strict=True))
    assert all(rank[pair.chosen] < rank[pair.rejected] for pair in pairs)
    assert len({(pair.chosen, pair.rejected) for pair in pairs}) == len(pairs)
    assert all(pair.prompt == "p" and pair.columns == {"id": 1} and pair.preference == 1 for pair in pairs)


def test_the_order_of_instructgpt_by_hand():
    """A < B < C = D < E: ten pairs less one tie."""
    pairs = comparisons_of(Ranking("p", tuple("ABCDE"), ranks_of("A < B < C = D < E")))
    won = "".join(sorted(pair.chosen + pair.rejected + " " for pair in pairs))
    assert won == "BA CA CB DA DB EA EB EC ED "


def test_ratings_of_one_prompt_rank_its_answers():
    ratings = [
        Rating("p", "a", (1.0, 2.0, 3.0), {"set": 1, "id": 1}),
        Rating("p", "b", (4.0,), {"set": 1, "id": 2}),
        Rating("p", "c", (2.0, 2.0), {"set": 1}),
        Rating("p", "d", (-1.0,), {"set": 1, "id": 2}),
    ]
    assert ranking_of(ratings) == Ranking("p", ("a", "b", "c", "d"), (2, 1, 2, 3), {"set": 1})
    with pytest.raises(ValueError, match="one prompt"):
        ranking_of([*ratings, Rating("q", "e", (1.0,))])
    with pytest.raises(ValueError, match="one prompt"):
        ranking_of([])


def test_a_comparison_gives_two_ratings():
    comparison = Comparison("p", "c", "r", columns={"id": 7})
    assert ratings_of(comparison) == (Rating("p", "c", (1.0,), {"id": 7}), Rating("p", "r", (0.0,), {"id": 7}))
    assert [rating.ratings for rating in ratings_of(replace(comparison, preference=0.25))] == [(0.25,), (0.75,)]


# ------------------------------------------------------------------------------------------------ writing

words = text(8).filter(str.strip)
answers = st.lists(message, min_size=1, max_size=3).filter(lambda ms: any(m["content"].strip() for m in ms))
json_value = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text(5)
extra = st.dictionaries(
    st.sampled_from(["id", "text", "label", "columns", "ranks", "é"]), json_value | st.lists(json_value)
)
forms = st.sampled_from([(text(8), words), (st.lists(message, max_size=3), answers)])
probability = st.floats(0, 1)
number = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def records_of(draw, kind):
    prompts, completions = draw(forms)
    prompt, answer = draw(prompts), draw(completions)
    size = draw(st.integers(2, 4))
    several = tuple(draw(st.lists(completions, min_size=size, max_size=size)))
    ranks = tuple(draw(st.lists(st.integers(1, 4), min_size=size, max_size=size)))
    other = draw(completions.filter(lambda text: text != answer))
    return {
        Prompt: lambda: Prompt(prompt, draw(extra)),
        Demonstration: lambda: Demonstration(prompt, answer, draw(extra)),
        Comparison: lambda: Comparison(prompt, answer, other, draw(probability), draw(st.none() | number), draw(extra)),
        Ranking: lambda: Ranking(prompt, several, ranks, draw(extra)),
        Rating: lambda: Rating(prompt, answer, tuple(draw(st.lists(number, min_size=1, max_size=3))), draw(extra)),
    }[kind]()


@given(
    KINDS.flatmap(lambda k: st.lists(records_of(k), min_size=1, max_size=3)),
    st.sampled_from(["jsonl", "jsonl.gz"]),
)
def test_records_come_back_from_a_file_as_they_were(tmp_path_factory, records, suffix):
    path = tmp_path_factory.getbasetemp() / f"round.{suffix}"
    write(path, records)
    assert load(path, type(records[0])) == Loaded(records, {})


def test_rows_are_made_of_what_json_is_made_of():
    assert to_row(Rating("p", "c", (0.5,), {"id": 1})) == {"prompt": "p", "completion": "c", "ratings": [0.5], "id": 1}
    ranking = {"prompt": "p", "completions": ["a", "b"], "ranking": [2, 1]}
    assert to_row(Ranking("p", ("a", "b"), (2, 1))) == ranking
    assert one(ranking, Ranking) == Ranking("p", ("a", "b"), (2, 1))


def test_writing_is_readable_and_the_same_every_time(tmp_path):
    comparison = Comparison("é", "c", "r", columns={"id": 1, "margin": 3, "prompt": "lost"})
    write(tmp_path / "new" / "a.jsonl", [comparison])
    line = '{"prompt": "é", "chosen": "c", "rejected": "r", "preference": 1.0, "id": 1}\n'
    assert (tmp_path / "new" / "a.jsonl").read_text("utf-8") == line
    write(tmp_path / "a.jsonl.gz", [comparison])
    first = (tmp_path / "a.jsonl.gz").read_bytes()
    write(tmp_path / "a.jsonl.gz", [comparison])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == first
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["a.jsonl.gz", "new"]


def test_a_failing_source_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [Prompt("old")])

    def source():
        yield Prompt("new")
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        write(path, source())
    assert load(path, Prompt).records == [Prompt("old")]


def test_rewards_of_tokens_are_kept_and_rate_a_text_that_nobody_rated():
    row = {"completion": "ab", "token_rewards": [0.5, 1, -1]}
    alone = parse([("f:1", row)], Rating).records[0]
    assert alone.ratings == (0.5,)
    assert alone.columns == {"token_rewards": [0.5, 1, -1]}
    both = parse([("f:1", {**row, "rating": 4})], Rating).records[0]
    assert (both.ratings, both.columns) == ((4.0,), alone.columns)
    assert parse([("f:1", to_row(alone))], Rating).records == [alone]
    for wrong, said in (
        (2, "must be a list of numbers, one per token, not 2"),
        ([1, "x"], "must be a number, not 'x'"),
    ):
        with pytest.raises(PlauditError, match=rf"f:1: `token_rewards` {said}"):
            parse([("f:1", {**row, "token_rewards": wrong})], Rating)
