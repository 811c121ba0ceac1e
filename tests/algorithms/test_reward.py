"""Reward models: what they learn from comparisons, rankings and ratings, against slow sums over pairs."""

import dataclasses
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import examples
import plaudit
import tiny
from plaudit.algorithms.reward import RewardModelling, chances

KINDS = ("comparisons", "rankings", "ratings")


def settings(kind, at, tmp_path, rows=None, **changes):
    data = {} if rows is None else {"data": tiny.lines(tmp_path / "data.jsonl", rows), "eval_data": None}
    given = {"model": str(at / "model"), "dropout": False, "weight_decay": 0.0, "evaluate_every": 0, "save_every": 0}
    return examples.settings(kind, at, tmp_path / "run", **{**given, **data, **changes})


def transformers_scores(folder, texts):
    """What people get who open the folder with transformers alone and score all texts as one padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_somebody_likes(kind, at, tmp_path):
    rows = examples.judgements(kind, 300)
    changes = {"steps": 60, "batch_size": 24, "learning_rate": 1e-2, "holdout": 0.25, "tokens_per_pass": 1024}
    run = plaudit.train(settings(kind, at, tmp_path, rows, **changes))
    first, last = run.metrics()[0], run.metrics()[-1]
    assert first["accuracy"] < 0.8
    assert run.summary["accuracy"] == last["heldout_accuracy"] > 0.95
    assert run.summary["calibration_error"] < 0.06
    texts = examples.words(40, seed=9)
    scores = transformers_scores(run.final, [f"5:{text}" for text in texts])
    likes = [text.count("a") for text in texts]
    right = [
        (scores[i] > scores[j]).item() == (likes[i] > likes[j])
        for i, j in combinations(range(40), 2)
        if likes[i] != likes[j]
    ]
    assert np.mean(right) > 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_equal_scores_cost_log_2_a_unit_whatever_the_data(kind, noise, at, tmp_path):
    algorithm = examples.built(settings(kind, at, tmp_path, noise=noise))
    torch.nn.init.zeros_(algorithm.policy.backbone.score.weight)
    batch = algorithm.collate(list(range(9)))
    loss, stats = algorithm.loss(batch)
    units = algorithm.weight(batch)
    assert (loss / units).item() == pytest.approx(math.log(2), rel=1e-6)
    assert stats["accuracy"] / units == 0.5
    count = {"comparisons": 9, "rankings": 9}.get(kind)
    assert units.item() == pytest.approx(count, rel=1e-6) if count else units.item() > 9


def slow(lead, preference, noise):
    """What one pair costs."""
    chance = (1 - noise) / (1 + math.exp(-lead)) + noise / 2
    return -preference * math.log(chance) - (1 - preference) * math.log(1 - chance)


def test_comparisons_pair_by_pair(at, tmp_path):
    rows = [
        {"prompt": "1", "chosen": "ab", "rejected": "cdefgh"},
        {"prompt": "2", "chosen": "abcdefg", "rejected": "h", "preference": 0.7},
        {"prompt": "3", "chosen": "ce", "rejected": "da", "preference": 0.5},
    ]
    algorithm = examples.built(settings("comparisons", at, tmp_path, rows, noise=0.1, centering=0.3))
    batch = algorithm.collate([2, 0, 1])
    scores = algorithm.scores(batch).double().tolist()
    total = sum(
        slow(scores[2 * i] - scores[2 * i + 1], preference, 0.1) for i, preference in enumerate((0.5, 1.0, 0.7))
    )
    total += 0.3 * sum((scores[2 * i] + scores[2 * i + 1]) ** 2 for i in range(3))
    loss, _ = algorithm.loss(batch)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert algorithm.weight(batch) == 3
    assert batch.index.tolist() == [2, 2, 0, 0, 1, 1]


def test_margins_must_be_led_by(at, tmp_path):
    rows = [{"prompt": "1", "chosen": "ab", "rejected": "cd", "margin": 2.0}]
    algorithm = examples.built(settings("comparisons", at, tmp_path, rows))
    batch = algorithm.collate([0])
    first, second = algorithm.scores(batch).tolist()
    loss, _ = algorithm.loss(batch)
    assert loss.item() == pytest.approx(slow(first - second - 2.0, 1.0, 0.0), rel=1e-5)


def test_rankings_prompt_by_prompt(at, tmp_path):
    rows = [
        {"prompt": "1", "completions": ["ab", "cde", "f"], "ranking": "B > A = C"},
        {"prompt": "2", "completions": ["abcd", "e"], "ranking": "A > B"},
        {"prompt": "3", "completions": ["g", "h", "a", "bc"], "ranking": "D > C > B > A"},
        {"prompt": "4", "completions": ["gg", "hh"], "ranking": "A = B"},
    ]
    algorithm = examples.built(settings("rankings", at, tmp_path, rows, noise=0.1, centering=0.3))
    batch = algorithm.collate([0, 1, 2, 3])
    scores = algorithm.scores(batch).double().tolist()
    ranks = [[2, 1, 2], [1, 2], [4, 3, 2, 1], [1, 1]]
    total, start = 0.0, 0
    for order in ranks:
        own = scores[start : start + len(order)]
        start += len(order)
        pairs = [(i, j) for i, j in combinations(range(len(order)), 2) if order[i] != order[j]]
        if pairs:
            costs = [
                slow(own[i] - own[j], float(order[i] < order[j]), 0.1) + 0.3 * (own[i] + own[j]) ** 2 for i, j in pairs
            ]
            total += sum(costs) / len(costs)
    loss, _ = algorithm.loss(batch)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert algorithm.weight(batch).item() == pytest.approx(3)  # nothing can be learned where all are equal


def test_ratings_pair_by_pair(at, tmp_path):
    given = [[1, 2, 3], [3], [2, 2], [5, 1, 3, 3], [4.0]]
    rows = [{"prompt": f"{i}", "completion": "abc"[: i + 1], "ratings": r} for i, r in enumerate(given)]
    changes = {"noise": 0.1, "minimum_gap": 0.5, "centering": 0.3}
    algorithm = examples.built(settings("ratings", at, tmp_path, rows, **changes))
    batch = algorithm.collate([0, 1, 2, 3, 4])
    scores = algorithm.scores(batch).double().tolist()
    total, units = 0.0, 0
    for i, j in combinations(range(5), 2):
        if abs(np.mean(given[i]) - np.mean(given[j])) < 0.5:
            continue
        above = np.mean([(a > b) + (a == b) / 2 for a in given[i] for b in given[j]])
        total += slow(scores[i] - scores[j], above, 0.1) + 0.3 * (scores[i] + scores[j]) ** 2
        units += 1
    assert units == 8
    loss, _ = algorithm.loss(batch)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert algorithm.weight(batch) == units


def test_chances_are_shares_of_pairs_of_people():
    nan = math.nan
    given = torch.tensor([[1.0, 2.0, 3.0], [2.0, nan, nan], [nan, 3.0, 3.0]])
    golden = [[0.5, 0.5, 1 / 6], [0.5, 0.5, 0.0], [5 / 6, 1.0, 0.5]]
    torch.testing.assert_close(chances(given, given), torch.tensor(golden))
    torch.testing.assert_close(chances(given[1:2, :1], given), torch.tensor(golden[1:2]))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(chances(given, given), torch.tensor(golden))


@pytest.mark.parametrize("kind", KINDS)
def test_ratings_and_rankings_that_all_agree_teach_nothing(kind, at, tmp_path):
    same = {
        "comparisons": {"prompt": "1", "chosen": "a", "rejected": "b", "preference": 0.5},
        "rankings": {"prompt": "1", "completions": ["a", "b", "c"], "ranking": "A = B = C"},
        "ratings": {"prompt": "1", "completion": "a", "ratings": [3.0]},
    }
    run = plaudit.train(settings(kind, at, tmp_path, [same[kind]] * 3, steps=1, batch_size=3, weight_decay=0.0))
    line = run.metrics()[-1]
    assert math.isfinite(line["loss"])
    if kind != "comparisons":  # where a tie is an answer: the two should score alike
        assert line["loss"] == line["gradient_norm"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_figures_pair_by_pair(kind, at, tmp_path):
    rows = examples.judgements(kind, 40, seed=4)
    algorithm = examples.built(settings(kind, at, tmp_path, rows, holdout=0.5, report_gap=0.5))
    assert 8 <= len(algorithm.held) <= 32
    figures = algorithm.evaluate()
    with torch.no_grad():
        batch = RewardModelling.rows(algorithm, algorithm.held)
        scores = algorithm.scores(batch)
    wins = []
    for i, j in combinations(range(len(batch)), 2):
        if kind != "ratings" and batch.groups[i] != batch.groups[j]:
            continue
        targets = batch.targets[[i, j]].nanmean(1) if kind == "ratings" else batch.targets[[i, j], 0]
        gap = float(targets[0] - targets[1]) * (-1 if kind == "rankings" else 1)
        if gap and (kind != "ratings" or abs(gap) >= 0.5):
            wins.append((scores[i] > scores[j]).item() == (gap > 0))
    assert figures["heldout_accuracy"] == pytest.approx(np.mean(wins), abs=1e-6)
    assert len(wins) > 8
    assert algorithm.found["reliability"]


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_rows_without_a_pair_have_no_figures(kind, at, tmp_path):
    alone = {
        "comparisons": {"prompt": "1", "chosen": "a", "rejected": "b", "preference": 0.5},
        "rankings": {"prompt": "1", "completions": ["a", "b"], "ranking": "A = B"},
        "ratings": {"prompt": "1", "completion": "a", "ratings": [3.0]},
    }
    others = tiny.lines(tmp_path / "others.jsonl", [alone[kind]])
    run = plaudit.train(settings(kind, at, tmp_path, eval_data=others, steps=1))
    assert not [name for line in run.metrics() for name in line if name.startswith("heldout")]
    assert "accuracy" not in run.summary


@pytest.mark.parametrize("kind", ["comparisons", "rankings"])
def test_equal_scores_are_half_right(kind, at, tmp_path):
    algorithm = examples.built(settings(kind, at, tmp_path))
    torch.nn.init.zeros_(algorithm.policy.backbone.score.weight)
    assert algorithm.evaluate()["heldout_accuracy"] == 0.5


def test_the_new_head_is_drawn_as_in_ziegler(at, tmp_path):
    algorithm = examples.built(settings("comparisons", at, tmp_path))
    spread = algorithm.policy.backbone.score.weight.std().item()
    assert spread == pytest.approx(1 / math.sqrt(33), rel=0.3)
    other = examples.built(dataclasses.replace(settings("comparisons", at, tmp_path), seed=1))
    assert not torch.equal(other.policy.backbone.score.weight, algorithm.policy.backbone.score.weight)
