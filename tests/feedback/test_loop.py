"""The loop over real HTTP and a real store: what it asks, learns, keeps and survives."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import yaml
from people import answering, former

import tiny
from plaudit import asking, evaluate, loop_page, looping, machine
from plaudit.cli import shipped
from plaudit.data import hold_out
from plaudit.errors import PlauditError
from plaudit.feedback.annotator import Annotator
from plaudit.feedback.items import Answer, Candidate, Item, Label
from plaudit.feedback.store import Store
from plaudit.loop_plan import Sections, questions, read
from plaudit.records import Prompt
from plaudit.rewards import load_function, load_rewards
from plaudit.run import Run
from plaudit.settings import Evaluate, Sample
from plaudit.settings.feedback import Loop
from plaudit.world import World

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
LOOP = {
    "model": "model",
    "prompts": "prompts.jsonl",
    "output": "out",
    "rounds": 2,
    "labels": 16,
    "first": 0.5,
    "precision": "float32",
    "reward": {"members": 2, "batch_size": 8, "steps": 2, "learning_rate": 1e-3},
    "policy": {
        "verb": "rloo",
        "steps": 2,
        "rollout": 8,
        "batch_size": 8,
        "max_new_tokens": 6,
        "learning_rate": 1e-3,
        "holdout": 0.0,
        "save_every": 1,
    },
    "synthetic": {"rewards": "taste.py:taste", "temperature": 0.5},
}
TASTE = """
def taste(prompts, completions, **columns):
    return [sum(map(ord, text)) % 7 / 2 for text in completions]
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Giving memory back takes a third of a second in a process as large as pytest's, and tiny models hold none. The
    page is drawn where it is looked at, and at every end."""
    monkeypatch.setattr(machine, "release", lambda: None)
    monkeypatch.setattr(loop_page, "kept", lambda folder, doing: nullcontext())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return prepare(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder where the loop ran from beginning to end."""
    folder = prepare(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "release", lambda: None)
        patch.chdir(folder)
        looping.run("loop.yaml")
    return folder


def prepare(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    tiny.folder(folder / "model", seed=0, chat=False)
    tiny.lines(folder / "prompts.jsonl", [{"prompt": f"say {word}", "id": i} for i, word in enumerate(WORDS)])
    (folder / "taste.py").write_text(TASTE)
    (folder / "loop.yaml").write_text(yaml.safe_dump({**LOOP, **changes}, sort_keys=False))
    return folder


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def weights(folder) -> dict[str, bytes]:
    """Every weight that a loop leaves, by its path within the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("final/*.safetensors"))
    }


def test_a_loop_asks_learns_pleases_and_says_where_everything_comes_from(whole, monkeypatch):
    monkeypatch.chdir(whole)
    with Store.read("out/answers.sqlite") as store:
        labels = store.labels()
    # The budget, to the last answer; each question once.
    assert len(labels) == 16
    assert len({label.item.id for label in labels}) == 16
    assert {label.person for label in labels} == {"synthetic-1"}
    asked = {number: lines(f"out/round-00{number}/ask.jsonl") for number in (1, 2)}
    assert {number: len(rows) for number, rows in asked.items()} == {1: 8, 2: 8}
    speakers = {1: {"model"}, 2: {"out/round-001/policy/final"}}
    for number, rows in asked.items():
        assert {one["source"]["model"] for row in rows for one in row["candidates"]} == speakers[number]
        assert all(row["query"] == {"method": "random", "propensity": 1.0, "round": number} for row in rows)
    assert {one["source"]["step"] for row in asked[2] for one in row["candidates"]} == {2}
    # What the reward models learned from names round, policy and person.
    learned = lines("out/round-002/labels.jsonl")
    assert len(learned) == 16
    first, last = learned[0]["provenance"], learned[-1]["provenance"]
    assert (first["query"]["round"], last["query"]["round"]) == (1, 2)
    assert last["sources"][0]["model"] == "out/round-001/policy/final"
    assert last["labels"][0]["person"] == "synthetic-1"
    # The second round begins with the first one's policy, is rewarded by its own models, and held to the first policy.
    second = yaml.safe_load(Path("out/round-002/policy/config.yaml").read_text())
    assert (second["model"], second["reference"]) == ("out/round-001/policy/final", "model")
    assert second["rewards"] == "ensemble:mean@out/round-002/reward"
    kl = [row["kl"] for row in lines("out/round-002/policy/metrics.jsonl") if "kl" in row]
    assert abs(kl[0]) > 1e-3
    # What is not about the policy that the round improves says so.
    assert [row["stale"] for row in learned] == [True] * 8 + [False] * 8
    rounds = lines("out/metrics.jsonl")
    assert [(row["step"], row["asked"], row["labels"]) for row in rounds] == [(1, 8, 8), (2, 8, 16)]
    assert [row["stale"] for row in rounds] == [0, 8]
    text = Path("out/loop.html").read_text()
    assert "2 of 2 rounds are done, with 16 answers." in text
    assert "http-equiv" not in text
    # Done is done.
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.safetensors")}
    assert looping.run("loop.yaml") == Path("out/loop.html")
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.safetensors")} == before


def test_people_answer_each_question_twice_about_the_first_policy(here, monkeypatch):
    """Offline, by disagreement, only the last answers, and two named people in the browser's place."""
    prepare(
        here,
        people=["anna", "ben"],
        overlap=2,
        online=False,
        latest=6,
        synthetic={},
        queries={"method": "disagreement", "pool": 2},
    )
    store = here / "out" / "answers.sqlite"
    with answering(store, "anna", former), answering(store, "ben", former):
        looping.run("loop.yaml")
    with Store.read(store) as opened:
        labels = opened.labels()
    asked = [lines(f"out/round-00{number}/ask.jsonl") for number in (1, 2)]
    assert [len(rows) for rows in asked] == [4, 4]
    who = sorted((label.item.id, label.person) for label in labels)
    assert who == sorted((item, name) for item in {label.item.id for label in labels} for name in ("anna", "ben"))
    assert len(who) == 16
    # The second round asks about the first policy too, and its ensemble chose.
    assert {one["source"]["model"] for rows in asked for row in rows for one in row["candidates"]} == {"model"}
    assert [{row["query"]["method"] for row in rows} for rows in asked] == [{"random"}, {"disagreement"}]
    learned = lines("out/round-002/labels.jsonl")
    assert len(learned) <= 6
    assert {row["provenance"]["query"]["round"] for row in learned} == {2}


def test_what_is_asked_where_the_reward_models_disagree_is_where_their_preferences_vary_most(whole, monkeypatch):
    monkeypatch.chdir(whole)
    world = World.start(device="cpu")
    said = asking.answers(
        ["model"], [Prompt(f"say {word}") for word in WORDS], Sample(model="", max_new_tokens=6), world, seed=9
    )
    items = asking.questions(said)
    spec = "ensemble:mean@out/round-001/reward"
    picked = asking.chosen(items, 3, "disagreement", rewards=spec, world=world, round=2)
    members = load_rewards(spec).sources[spec].members
    prompts = [item.prompt for item in items]
    scores = [[member(prompts, [item.candidates[i].text for item in items]) for i in (0, 1)] for member in members]
    scales = [json.loads(Path(f"out/round-001/reward/member-{n}/summary.json").read_text()) for n in (0, 1)]
    sure = [
        [1 / (1 + math.exp((b - a) * found["score_deviation"])) for a, b in zip(*pair, strict=True)]
        for pair, found in zip(scores, scales, strict=True)
    ]
    spread = [(first - second) ** 2 for first, second in zip(*sure, strict=True)]
    expected = sorted(range(len(items)), key=lambda place: -spread[place])[:3]
    assert [item.id for item in picked] == [items[place].id for place in expected]
    assert [dict(item.query) for item in picked] == [{"method": "disagreement", "propensity": 1.0, "round": 2}] * 3


def test_training_goes_on_while_people_answer_and_what_comes_late_counts_later(here):
    prepare(here, synthetic={}, labels=32, wait=0.5)
    store = here / "out" / "answers.sqlite"
    trained = here / "out" / "round-001" / "policy" / "config.yaml"
    with answering(store, "anna", former, most=10), answering(store, "ben", former, after=trained):
        looping.run("loop.yaml")
    first, second = (lines(f"out/round-00{number}/labels.jsonl") for number in (1, 2))
    who = [[label["person"] for row in rows for label in row["provenance"]["labels"]] for rows in (first, second)]
    assert set(who[0]) == {"anna"}
    assert 8 <= len(first) <= 10
    late = [row for row in second if row["provenance"]["query"]["round"] == 1]
    assert len(late) >= len(first)
    assert "ben" in who[1]
    assert len(second) < 32


def test_a_reward_model_that_is_right_often_enough_ends_the_loop(here, monkeypatch):
    found = {1: 0.6, 2: 0.8, 3: 0.9}

    monkeypatch.setattr(looping.Looping, "_trained", lambda *_: {"accuracy": 0.1, "seconds": 1.0, "score": 0.0})
    monkeypatch.setattr(looping.Looping, "_agreement", lambda self, now: found[now.number])
    prepare(here, rounds=3, online=False, target=0.75)
    looping.run("loop.yaml")
    summary = json.loads(Path("out/summary.json").read_text())
    assert (summary["rounds"], summary["labels"], summary["agreement"]) == (2, 12, 0.8)
    assert not Path("out/round-003").exists()


def test_b18_b20_however_few_answers_there_are_the_loop_ends_with_a_policy(here, capsys):
    """Three answers, one of which is held out: a bootstrap of the two others draws both every second time."""
    prepare(here, rounds=1, labels=3, reward={**LOOP["reward"], "members": 3})
    looping.run("loop.yaml")
    assert (here / "out" / "round-001" / "policy" / "final").is_dir()
    rows = lines("out/round-001/labels.jsonl")
    assert len(rows) == 3
    adapted = [
        any("validation_ratio" in row for row in lines(f"out/round-001/reward/member-{number}/metrics.jsonl"))
        for number in range(3)
    ]
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("nothing is left of 2 rows to see by, so weight_decay stays 0.01") == adapted.count(False) > 0


def test_b15_agreement_is_of_the_ensemble_that_rewards(whole, monkeypatch):
    monkeypatch.chdir(whole)
    settings = read("loop.yaml")
    told = [row["agreement"] for row in lines("out/metrics.jsonl")]
    for number, agreement in enumerate(told, 1):
        rows = lines(f"out/round-00{number}/labels.jsonl")
        _, held = hold_out(rows, 0.1, lambda row: row["prompt"])
        held = [row for row in held if row.get("preference", 1) != 0.5]
        rewards = load_rewards(f"ensemble:mean@out/round-00{number}/reward")
        right = [float(rewards([row["prompt"]] * 2, [row["chosen"], row["rejected"]], {}).diff()) < 0 for row in held]
        assert agreement == pytest.approx(sum(right) / len(held))
    assert Sections.of(settings).reward.holdout == 0.1


def test_b20_a_target_that_nothing_can_be_held_out_for_is_told_before_anything_is_sampled(here):
    tiny.lines(here / "prompts.jsonl", [{"prompt": "say one"}] * 8)
    prepared = yaml.safe_load((here / "loop.yaml").read_text())
    (here / "loop.yaml").write_text(yaml.safe_dump({**prepared, "target": 0.9}))
    with pytest.raises(PlauditError, match="target: of a single prompt no answer can be held out to be foreseen"):
        looping.run("loop.yaml")
    assert not (here / "out").exists()


def test_b20_a_round_whose_held_out_answers_prefer_nothing_says_that_the_target_was_not_looked_at(
    here, monkeypatch, capsys
):
    monkeypatch.setattr(looping.Looping, "_trained", lambda *_: {"seconds": 1.0})
    monkeypatch.setattr(looping.Looping, "_agreement", lambda *_: None)
    prepare(here, online=False, target=0.75)
    looping.run("loop.yaml")
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("no held-out answer prefers anything, so `target` cannot be looked at.") == 2


def test_b13_b25_the_latest_answers_are_the_latest_that_decide_anything(here, capsys):
    """Somebody who cannot compare anything in the second round, of which four answers are the latest."""
    looped = looping.Looping(read("loop.yaml", ["latest=4"]), Sections.of(read("loop.yaml")), [], Run(here / "run", -1))
    said = [Candidate(text, {"model": "model"}) for text in ("a", "b")]
    items = [Item("compare", f"{place}", tuple(said)) for place in range(8)]
    labels = [
        Label(str(place), item, "ann", Answer((1, 2) if place < 5 else None), (0, 1), 0.0, 0.0, 1)
        for place, item in enumerate(items)
    ]
    looped._write(looped.rounds[0], labels)
    assert [row["prompt"] for row in lines(looped.rounds[0].labels)] == ["1", "2", "3", "4"]
    told = " ".join(capsys.readouterr().err.split())
    assert "4 of 8 answers are learned from; 3 could not compare, 1 came before the `latest`." in told
    with pytest.raises(PlauditError, match="all 3 answers say that the two cannot be compared"):
        looped._write(looped.rounds[0], labels[5:])


def test_prompts_that_are_too_long_leave_the_others_to_be_asked(here, monkeypatch):
    """A single short one is drawn again and again."""
    monkeypatch.setattr(looping.Looping, "_trained", lambda *_: {"seconds": 1.0})
    monkeypatch.setattr(looping.Looping, "_agreement", lambda *_: None)
    prepare(here, rounds=1, policy={**LOOP["policy"], "max_prompt_tokens": 8})
    prompts = ["say one", *(f"say something longer than {word}" for word in WORDS)]
    tiny.lines(here / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    looping.run("loop.yaml")
    asked = lines("out/round-001/ask.jsonl")
    assert len(asked) == 16
    assert {row["prompt"] for row in asked} == {"say one"}


@pytest.mark.timeout(60)
def test_whatever_the_program_fails_with_that_answers_ends_the_loop(here, monkeypatch):
    def broken(self):
        raise RuntimeError("out of order")

    monkeypatch.setattr(Annotator, "turn", broken)
    with pytest.raises(RuntimeError, match="out of order"):
        looping.run("loop.yaml")


@pytest.mark.slow
def test_with_a_hidden_reward_the_policy_s_true_reward_rises(here):
    """Letters are liked; nothing but comparisons says so."""
    (here / "taste.py").write_text(
        "def taste(prompts, completions, **columns):\n"
        "    return [4.0 * sum(c.isascii() and c.isalpha() for c in text) / 6 for text in completions]\n"
    )
    reward = {"members": 2, "batch_size": 16, "epochs": 6, "learning_rate": 3e-3, "weight_decay": 0.01}
    policy = {**LOOP["policy"], "steps": 25, "rollout": 32, "batch_size": 32, "learning_rate": 3e-3, "kl": 0.01}
    synthetic = {"rewards": "taste.py:taste", "temperature": 0.5}
    prepare_again = {**LOOP, "labels": 240, "rounds": 3, "reward": reward, "policy": policy, "synthetic": synthetic}
    Path("loop.yaml").write_text(yaml.safe_dump(prepare_again))
    looping.run("loop.yaml")
    found = evaluate(
        Evaluate(
            policies=("first=model", *(f"round-{n}=out/round-00{n}/policy/final" for n in (1, 2, 3))),
            data="prompts.jsonl",
            rewards="taste.py:taste",
            max_new_tokens=6,
            precision="float32",
        )
    ).summary
    rewards = [found[name]["reward"] for name in ("first", "round-1", "round-2", "round-3")]
    assert rewards == sorted(rewards)
    assert rewards[-1] > rewards[0] + 2


# ----------------------------------------------------------------------------------------------------------- the file


def file(here, **changes):
    (here / "loop.yaml").write_text(yaml.safe_dump({**LOOP, **changes}))
    return "loop.yaml"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"round": 2}, "loop.yaml: `loop` has no setting `round`; the nearest is `rounds`."),
        (
            {"queries": {"methd": "margin"}},
            "loop.yaml: queries: `queries` has no setting `methd`; the nearest is `method`.",
        ),
        (
            {"queries": {"method": "best"}},
            "loop.yaml: queries: `method` is 'best', but must be 'random', 'disagreement'",
        ),
        ({"policy": {"verb": "dpo"}}, "loop.yaml: policy: 'dpo' does not learn from its own samples: ppo, vpg, rloo"),
        ({"policy": {"clipp": 1}}, "loop.yaml: policy: `ppo` has no setting `clipp`; the nearest is `clip`."),
        ({"policy": {"rewards": "count:e"}}, "loop.yaml: policy: `rewards` is the loop's to decide: leave it out."),
        ({"reward": {"data": "x"}}, "loop.yaml: reward: `data` is the loop's to decide: leave it out."),
        ({"reward": {"members": 1}, "queries": {"method": "margin"}}, "queries: margin needs several reward models"),
        ({"synthetic": {"rewards": "count:e", "url": "x"}}, "synthetic: `url` is the loop's to decide: leave it out."),
        ({"synthetic": {"rewards": "gone.py:taste"}}, "reward 'gone.py:taste': there is no file 'gone.py'."),
        ({"people": ["anna"], "overlap": 2}, "overlap: 2 people are to answer, but fewer are named."),
        ({"rounds": 20}, "labels: round 2 of 20 would ask nothing: raise labels, or lower first or rounds."),
        (
            {"target": 0.9, "reward": {"holdout": 0.0}},
            "loop.yaml: target: no answer is held out to be foreseen: raise `holdout` in `reward`.",
        ),
        ({"reward": {"holdout": 1}}, "loop.yaml: reward: with `holdout` 1 nothing is left to train on: lower it."),
        ({"policy": {"verb": "rloo", "holdout": 1}}, "loop.yaml: policy: with `holdout` 1 nothing is left to train on"),
        ({"reward": {"objective": "regression"}}, "objective: regression learns from ratings, but the data hold comp"),
        ({"reward": {"eval_data": "gone.jsonl"}}, "data: there is no file 'gone.jsonl'."),
        ({"policy": {"verb": "rloo", "lora_rank": 2}}, "reference: an adapter is held to the policy that its round"),
        ({"policy": {"verb": "rloo", "rollout": 6, "batch_size": 4}}, r"batch_size (4) must divide rollout (6)."),
        ({"prompts": "gone.jsonl"}, "data: there is no file 'gone.jsonl'."),
    ],
)
def test_mistakes_in_the_file_are_told_before_anything_is_sampled(here, changes, sentence):
    with pytest.raises(PlauditError) as told:
        looping.run(file(here, **changes))
    assert sentence in str(told.value)
    assert not (here / "out").exists()


def test_overrides_reach_the_loop_and_its_sections_and_files_are_found_beside_it(here, monkeypatch):
    words = ["output=elsewhere", "rounds=3", "policy.steps=7", "policy.verb=ppo", "queries.method=coverage"]
    settings = read(file(here), words)
    assert (settings.output, settings.rounds, settings.queries) == ("elsewhere", 3, {"method": "coverage"})
    assert (settings.policy["verb"], settings.policy["steps"], settings.policy["rollout"]) == ("ppo", 7, 8)
    with pytest.raises(PlauditError, match=r"'policy.x.y' is no override: write field=value or section.field=value"):
        read(file(here), ["policy.x.y"])
    with pytest.raises(PlauditError, match=r"'rward.steps=2' is no override: .* a section being queries, reward"):
        read(file(here), ["rward.steps=2"])
    with pytest.raises(PlauditError, match=r"policy: is 'ppo', but must be a mapping of its settings\."):
        read(file(here, policy="ppo"), ["policy.steps=2"])
    file(here)
    (here / "below").mkdir()
    monkeypatch.chdir(here / "below")
    moved = read("../loop.yaml")
    assert (moved.prompts, moved.synthetic["rewards"]) == ("../prompts.jsonl", "../taste.py:taste")


def test_what_holds_for_the_loop_holds_for_the_program_that_answers(here):
    assert Sections.of(read(file(here))).synthetic.precision == "float32"
    apart = read(file(here), ["synthetic.precision=auto", "threads=1"])
    assert (Sections.of(apart).synthetic.precision, Sections.of(apart).synthetic.threads) == ("auto", 1)


def test_the_shipped_recipe_is_sound_wherever_it_is_started_from():
    settings = read(shipped("loop.yaml"), ["model=m", "prompts=p.jsonl"])
    assert settings.output == "runs/loop"
    assert load_function(settings.synthetic["rewards"]).__name__ == "vader"


@pytest.mark.parametrize("schedule", ["constant", "hyperbolic", "annealed"])
@pytest.mark.parametrize(
    ("labels", "rounds", "first", "overlap"), [(100, 4, 0.25, 1), (101, 3, 0.0, 2), (60, 1, 0.25, 1)]
)
def test_the_budget_is_spent_to_the_last_question(schedule, labels, rounds, first, overlap):
    counts = questions(
        Loop(model="m", prompts="p", labels=labels, rounds=rounds, first=first, overlap=overlap, schedule=schedule)
    )
    assert len(counts) == rounds
    assert sum(counts) == labels // overlap
    if first and rounds > 1:
        assert counts[0] == first * labels
    later = counts[bool(first) :]
    if schedule == "constant":
        assert max(later, default=0) - min(later, default=0) <= 1
    else:
        assert later == sorted(later, reverse=True)
        assert rounds == 1 or later[0] > later[-1]


# ------------------------------------------------------------------------------------------------------ being killed


def killed(folder: Path, *moments: str) -> list[int]:
    """How the processes of `killed_loop.py` ended that ran the loop in this folder."""
    script = Path(__file__).parents[1] / "processes" / "killed_loop.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script), *moments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def survived(folder: Path, count: int, labels: int = 16) -> None:
    """No answer was lost or given twice, no question asked twice."""
    with Store.read(folder / "out" / "answers.sqlite") as store:
        assert len(store.labels()) == labels
        items = [item.id for item in store.items()]
    asked = [row for path in sorted(folder.glob("out/round-*/ask.jsonl")) for row in lines(path)]
    texts = [(row["prompt"], *sorted(one["text"] for one in row["candidates"])) for row in asked]
    assert len(items) == len(set(items)) == len(texts) == len(set(texts)) == labels
    assert [row["step"] for row in lines(folder / "out" / "metrics.jsonl")] == list(range(1, count + 1))


def same(whole: Path, broken: Path) -> None:
    """All questions and all weights are the same, to the bit."""
    for path in sorted(whole.glob("out/round-*/ask.jsonl")):
        assert (broken / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert len(weights(whole)) == 6
    assert weights(broken) == weights(whole)


@pytest.mark.slow
def test_killed_between_two_reward_models_it_ends_with_the_bits_of_one_that_was_not(whole, tmp_path):
    broken = prepare(tmp_path)
    assert killed(broken, "step:3") == [-9, 0]
    survived(broken, 2)
    same(whole, broken)


@pytest.mark.slow
def test_killed_at_every_moment_of_both_rounds(whole, tmp_path):
    broken = prepare(tmp_path)
    first = ["sampling:1", "asking:1", "posting:1", "posting:2", "answering:1", "answering:8", "writing:1", "between:1"]
    first += ["step:1", "step:2", "between:2", "step:1", "step:3", "telling:1"]
    second = [
        "sampling:1",
        "asking:1",
        "answering:4",
        "writing:1",
        "step:1",
        "step:3",
        "step:2",
        "telling:1",
        "ending:1",
    ]
    assert killed(broken, *first, *second) == [-9] * len(first + second) + [0]
    survived(broken, 2)
    same(whole, broken)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_time(whole, tmp_path, seed):
    """From outside, by the clock, until it ends by itself."""
    broken, draw = prepare(tmp_path), random.Random(seed)
    kills = 0
    while not (broken / "out" / "summary.json").exists():
        process = subprocess.Popen(
            [sys.executable, "-c", "import torch, plaudit.looping as l; torch.set_num_threads(1); l.run('loop.yaml')"],
            cwd=broken,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.DEVNULL,
        )
        with suppress(subprocess.TimeoutExpired):
            assert process.wait(draw.uniform(5, 11)) == 0
        if process.returncode is None:
            process.kill()
            process.wait()
            kills += 1
    assert kills
    survived(broken, 2)
    same(whole, broken)
