"""What is asked: answers of policies to the same prompts, where they come from, and which of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tiny
from plaudit import asking
from plaudit.comparing import load
from plaudit.errors import PlauditError
from plaudit.feedback.items import Candidate, Item
from plaudit.records import Prompt
from plaudit.sampler import LocalSampler, Sampling
from plaudit.settings import Sample
from plaudit.world import World

PROMPTS = [Prompt(f"say {word}", {"id": i}) for i, word in enumerate(("one", "two", "three", "four"))]
DRAWING = Sample(model="", max_new_tokens=6, temperature=0.9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("asking")
    tiny.folder(root / "sft" / "final", seed=0, chat=False)
    tiny.folder(root / "ppo" / "final", seed=1, chat=False)
    tiny.folder(root / "wide", seed=2, chat=True)
    (root / "ppo" / "summary.json").write_text('{"verb": "ppo", "steps": 7}')
    return root


@pytest.fixture(scope="module")
def world():
    return World.start(device="cpu")


def test_two_policies_give_one_answer_each_and_say_where_it_comes_from(folders, world):
    sft, ppo = str(folders / "sft" / "final"), str(folders / "ppo" / "final")
    items = asking.candidates([sft, ppo], PROMPTS, DRAWING, world, seed=3)
    assert [item.prompt for item in items] == [prompt.prompt for prompt in PROMPTS]
    for item in items:
        assert item.kind == "compare"
        shared = {"temperature": 0.9, "seed": 3}
        assert [dict(one.source) for one in item.candidates] == [
            {"model": sft, **shared},
            {"model": ppo, "step": 7, **shared},
        ]
    assert [item.columns for item in items] == [{"id": i} for i in range(4)]
    assert [item.query for item in items] == [{"method": "random", "propensity": 1.0}] * 4  # B-16


def test_the_answers_are_those_that_the_sampler_gives(folders, world):
    """No second sampling path: the same generator gives the same texts."""
    folder = str(folders / "sft" / "final")
    said = asking.answers([folder], PROMPTS, DRAWING, world, seed=5, several=3)
    policy, template = load(folder, world, 0.9)
    prompts = [template.prompt(prompt.prompt) for prompt in PROMPTS for _ in range(3)]
    drawn = LocalSampler(policy.backbone, template.decode).sample(
        prompts, Sampling(6, 0.9, (template.end,)), 1, torch.Generator().manual_seed(5)
    )
    texts = [template.decode(ids) for ids in drawn.completions]
    assert [one.text for _, answers in said for one in answers] == texts
    assert len(set(texts)) > 6


def test_seeds_and_numbers_side_by_side(folders, world):
    folder = str(folders / "sft" / "final")
    items = asking.candidates([folder], PROMPTS, DRAWING, world, seed=1)
    assert asking.candidates([folder], PROMPTS, DRAWING, world, seed=1) == items
    assert asking.candidates([folder], PROMPTS, DRAWING, world, seed=2) != items
    # A policy beside itself is not asked to repeat itself.
    both = asking.answers([folder, folder], PROMPTS, DRAWING, world, seed=1)
    assert all(first.text != second.text for _, (first, second) in both)


def test_several_answers_are_ranked_and_what_is_said_twice_is_asked_once():
    def said(*texts):
        return [(PROMPTS[0], [Candidate(text, {"model": str(place)}) for place, text in enumerate(texts)])]

    (item,) = asking.questions(said("a", "b", "a"))
    assert (item.kind, [one.text for one in item.candidates]) == ("rank", ["a", "b"])
    assert asking.questions(said("a", "a", "a")) == []
    assert asking.questions(said("a", "a")) == []
    assert asking.questions(said("a", "")) != []
    assert asking.questions(said("a", "b"))[0].kind == "compare"


def test_b16_what_is_asked_goes_by_the_preferences_that_were_fitted_whatever_scores_were_divided_by(world, monkeypatch):
    """By hand: scores were divided by 4 in one reward model, and by a half in the other."""
    items = [Item("compare", name, (Candidate(f"{name}1"), Candidate(f"{name}2"))) for name in "xyz"]
    scaled = {"x": (2.0, 16.0), "y": (0.1, 0.4), "z": (0.5, -0.8)}  # each model's lead of the first answer
    members = [SimpleNamespace(policy=SimpleNamespace(score_deviation=value)) for value in (4.0, 0.5)]

    def each(prompts, texts):
        leads = torch.tensor([scaled[prompt] for prompt in prompts]).T
        return leads * torch.tensor([float(text.endswith("1")) for text in texts])

    known = SimpleNamespace(sources={"e": SimpleNamespace(members=members, each=each)})
    monkeypatch.setattr(asking, "load_rewards", lambda *_, **__: known)

    def picked(method):
        return [item.prompt for item in asking.chosen(items, 1, method, rewards="e", world=world)]

    # Fitted leads: x (8, 8), y (0.4, 0.2), z (2, -0.4). So x is settled, sigma is 0.88 and 0.40 at z, and the mean lead
    # is the least at y, where it is 0.3, while it is 0.8 at z. Of the scaled ones, z's, -0.15, would be the least.
    assert picked("disagreement") == ["z"]
    assert picked("margin") == ["y"]
    # Of these sigma is 0.881 and 0.802 at x, which is settled, and 0.525 and 0.475 at y.
    scaled |= {"x": (2.0, 1.4), "y": (0.1, -0.1), "z": (2.0, 16.0)}
    members[1].policy.score_deviation = 4.0
    # Fitted: x (8, 5.6), sigma 0.9997 and 0.9963; y (0.4, -0.4), 0.60 and 0.40; z (8, 64), both 1 but for 0.0003.
    assert picked("disagreement") == ["y"]


def test_conversations_are_answered_by_messages_and_what_is_too_long_is_told_of(folders, world):
    chat = [Prompt([{"role": "user", "content": word}]) for word in ("hello", "x" * 300)]
    told = []
    drawing = Sample(model="", max_new_tokens=4, max_prompt_tokens=100)
    items = asking.candidates([str(folders / "wide")], chat, drawing, world, tell=told.append)
    assert [item.prompt for item in items] == [chat[0].prompt]
    assert all(one.text[0]["role"] == "assistant" for one in items[0].candidates)
    assert told == ["1 of 2 prompts are longer than 100 tokens and left out."]


def test_too_few_and_too_many_answers_are_refused(folders, world):
    folder = str(folders / "sft" / "final")
    for policies, several in (([folder], 1), ([folder], 10), ([folder] * 10, 2)):
        with pytest.raises(PlauditError, match=r"cannot be asked about: make it 2 to 9"):
            asking.candidates(policies, PROMPTS, DRAWING, world, several=several)
