"""Reward models by every objective, bootstrapped, held out and normalised; ratings however they are spread."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import examples
import plaudit
import tiny
import watched
from plaudit import PlauditError, Reward
from plaudit.algorithms.reward import FromComparisons, FromRankings, FromRatings, Judged, adapted, divided
from plaudit.algorithms.reward_objectives import BestOf, Binary, PlackettLuce, Regression
from plaudit.batch import Batch
from plaudit.policy import Output
from plaudit.rewards import load_rewards
from plaudit.trainer import Trainer
from plaudit.world import World

CPU = World(torch.device("cpu"))


class Table(torch.nn.Module):
    """A policy by whom a text is worth what its first token is: a reward model of one-hot features."""

    frozen = 0

    def __init__(self, worth: list[float]) -> None:
        super().__init__()
        self.worth = torch.nn.Parameter(torch.tensor(worth, dtype=torch.float64))

    def forward(self, batch: Batch, *, logprobs: bool, scores: bool) -> Output:
        return Output(scores=self.worth[batch.tokens[:, 0]])

    def parts(self, batch: Batch, tokens: int) -> Iterator[tuple[Batch, Tensor]]:
        return batch.parts(tokens)

    def learning(self) -> dict[str, torch.nn.Parameter]:
        return {"worth": self.worth}


def made(kind: type, worth: list[float], data: list[Judged], world: World = CPU, **changes: Any) -> Any:
    settings = Reward(**{"model": "none", "data": "none", "batch_size": len(data), "tokens_per_pass": 10**9, **changes})
    return kind(settings, world, Table(worth), data, [])


def judged(*targets: float, first: int = 0) -> Judged:
    """A text for each target: token i, and so many more of it that no two texts are equally long."""
    return Judged(
        [[i] * (1 + i % 5) for i in range(first, first + len(targets))], [[float(target)] for target in targets]
    )


def settings(kind, at, tmp_path, rows=None, **changes):
    data = {} if rows is None else {"data": tiny.lines(tmp_path / "data.jsonl", rows), "eval_data": None}
    given = {"model": str(at / "model"), "dropout": False, "weight_decay": 0.0, "evaluate_every": 0, "save_every": 0}
    quiet = {"bootstrap": False, "adaptive_weight_decay": False} if kind == "regression" else {}
    return examples.settings(kind, at, tmp_path / "run", **{**given, **quiet, **data, **changes})


# ------------------------------------------------------------------------------------------------- what a unit costs


def test_b8_equal_scores_cost_what_chance_does():
    four = [judged(3, 1, 4, 2), judged(1, 1, 1, 1), judged(2, 3, 1)]
    found = {}
    for kind in (FromRankings, PlackettLuce, BestOf):
        algorithm = made(kind, [0.7] * 4, four)
        batch = algorithm.collate([0, 1, 2])
        assert algorithm.weight(batch).item() == pytest.approx(2, rel=1e-6)  # where all are tied nothing is learned
        found[kind] = algorithm.loss(batch)[0].item()
    assert found[FromRankings] == pytest.approx(2 * math.log(2), rel=1e-6)
    assert found[PlackettLuce] == pytest.approx(math.log(24) + math.log(6), rel=1e-12)
    assert found[BestOf] == pytest.approx(math.log(4) + math.log(3), rel=1e-12)
    binary = made(Binary, [0.0] * 3, [judged(1.0), judged(0.0), judged(0.25)])
    loss, stats = binary.loss(binary.collate([0, 1, 2]))
    assert loss.item() == pytest.approx(3 * math.log(2), rel=1e-12)
    assert stats["accuracy"] == 1.5


def test_s2_13_centring_draws_the_sum_of_a_pair_to_zero_and_leaves_its_difference_alone():
    pair = Judged([[0], [1]], [[1.0, 0.0], [0.0, 0.0]])
    for first, second, cost in ((1.5, -0.5, 1.0), (0.75, -0.75, 0.0), (-2.0, -1.0, 9.0)):
        free, held = (made(FromComparisons, [first, second], [pair], centering=weight) for weight in (0.0, 0.4))
        batch = free.collate([0])
        extra = held.loss(batch)[0].item() - free.loss(batch)[0].item()
        assert extra == pytest.approx(0.4 * cost, abs=1e-6)


def test_rankings_by_hand():
    # exp(scores) = 1, 2, 3, 4: the best is the third.
    worth = [math.log(i) for i in (1, 2, 3, 4)]
    data = [judged(2, 2, 1, 3), judged(1, 1, 2)]
    luce = made(PlackettLuce, worth, data, centering=0.5)
    batch = luce.collate([0, 1])
    ordered = [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], [(0, 2), (1, 2)]  # a tie makes no pair
    centred = 0.5 * sum(sum((worth[i] + worth[j]) ** 2 for i, j in pairs) / len(pairs) for pairs in ordered)
    # First 3 of 10; then the two tied, each of what is not better; the last has no choice. The second prompt: 1 and 2
    # of 6, each drawn from all that are not better.
    expected = -math.log(3 / 10 * 1 / 7 * 2 / 7) - math.log(1 / 6 * 2 / 6)
    loss, stats = luce.loss(batch)
    assert loss.item() == pytest.approx(expected + centred, rel=1e-6)
    assert stats["accuracy"] == 0  # of the first 4 has the highest score and the last rank, of the second 3
    best = made(BestOf, worth, data)
    loss, stats = best.loss(best.collate([0, 1]))
    assert loss.item() == pytest.approx(-math.log(3 / 10) - math.log(3 / 6), rel=1e-12)
    assert stats["accuracy"] == 0


def test_texts_by_hand():
    data = [Judged([[0]], [[1.0, 3.0]]), Judged([[1]], [[2.0]]), Judged([[2]], [[0.0, 1.0, 1.0, 1.0]])]
    line = made(Regression, [1.5, 2.0, -1.0], data, centering=0.5)
    loss, _ = line.loss(line.collate([0, 1, 2]))
    assert loss.item() == pytest.approx(0.25 + 0 + 1.75**2 + 0.5 * (2.25 + 4 + 1), rel=1e-12)
    assert line.weight(line.collate([0, 2])) == 2
    thumbs = made(Binary, [math.log(3), -math.log(3), 0.3], [data[2], Judged([[1]], [[1.0]])], noise=0.2)
    loss, stats = thumbs.loss(thumbs.collate([1]))
    assert loss.item() == pytest.approx(-math.log(0.8 * 0.25 + 0.1), rel=1e-12)
    assert stats["accuracy"] == 0
    quiet = made(Binary, [0, 0, math.log(3)], [data[2]])
    assert quiet.loss(quiet.collate([0]))[0].item() == pytest.approx(0.562335144618808, rel=1e-12)


def test_b19_all_orders_together_have_probability_one():
    data = [judged(*order) for order in permutations((1, 2, 3, 4))]
    algorithm = made(PlackettLuce, [0.3, -1.2, 0.9, 0.1], data)
    total = sum(math.exp(-algorithm.loss(algorithm.collate([i]))[0].item()) for i in range(len(data)))
    assert total == pytest.approx(1, abs=1e-12)
    picks = [judged(*[1 if i == best else 2 for i in range(4)]) for best in range(4)]
    best = made(BestOf, [0.3, -1.2, 0.9, 0.1], picks)
    total = sum(math.exp(-best.loss(best.collate([i]))[0].item()) for i in range(4))
    assert total == pytest.approx(1, abs=1e-12)


def test_b19_two_texts_are_a_pair_by_any_objective():
    worth, pair = [0.4, -0.8], [Judged([[0], [1]], [[2.0], [1.0]])]
    compared = made(FromComparisons, worth, [Judged([[1], [0]], [[1.0, 0.0], [0.0, 0.0]])])
    expected = compared.loss(compared.collate([0]))[0].item()
    assert expected == pytest.approx(math.log(1 + math.exp(1.2)), rel=1e-12)
    for kind in (FromRankings, PlackettLuce, BestOf):
        algorithm = made(kind, worth, pair)
        assert algorithm.loss(algorithm.collate([0]))[0].item() == pytest.approx(expected, rel=1e-6)


def fitted(algorithm: Any) -> np.ndarray:
    """The worths that have the least loss, their mean 0."""
    worth, batch = algorithm.policy.worth, algorithm.collate(list(range(len(algorithm.data))))
    optimizer = torch.optim.LBFGS(
        [worth], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = algorithm.loss(batch)[0] / algorithm.weight(batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = worth.detach().numpy()
    return found - found.mean()


def test_b18_one_hot_comparisons_come_to_hunters_mm():
    wins = np.array([[0, 3, 2, 4], [1, 0, 3, 1], [2, 1, 0, 2], [1, 2, 1, 0]])
    ties = {(0, 1): 2, (2, 3): 1}
    data = [Judged([[i], [j]], [[1.0, 0.0], [0.0, 0.0]]) for i in range(4) for j in range(4) for _ in range(wins[i][j])]
    data += [Judged([[i], [j]], [[0.5, 0.0], [0.5, 0.0]]) for (i, j), count in ties.items() for _ in range(count)]
    halves = wins.astype(float)
    for (i, j), count in ties.items():
        halves[[i, j], [j, i]] += count / 2
    strength, games = np.ones(4), halves + halves.T
    for _ in range(3000):
        strength = halves.sum(1) / (games / (strength[:, None] + strength[None, :])).sum(1)
    expected = np.log(strength)
    np.testing.assert_allclose(fitted(made(FromComparisons, [0.0] * 4, data)), expected - expected.mean(), atol=1e-6)


def test_b18_whole_rankings_come_to_hunters_mm():
    orders = [(1, 2, 3, 4), (2, 1, 3, 4), (1, 3, 2, 4), (4, 1, 2, 3), (3, 4, 1, 2), (1, 2, 4, 3), (2, 4, 3, 1)]
    strength = np.ones(4)
    for _ in range(600):
        # Hunter 2004, section 5: how often an item is chosen before the last, over how often it could have been.
        chosen, odds = np.zeros(4), np.zeros(4)
        for ranks in orders:
            for stage in range(1, 4):
                among = np.array(ranks) >= stage
                chosen[ranks.index(stage)] += 1
                odds += among / strength[among].sum()
        strength = chosen / odds
    expected = np.log(strength)
    found = fitted(made(PlackettLuce, [0.0] * 4, [judged(*ranks) for ranks in orders]))
    np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-6)


def test_all_pairs_of_a_prompt_stay_in_one_part(at, tmp_path):
    algorithm = examples.built(settings("rankings", at, tmp_path, batch_size=5))
    batch = algorithm.collate([0, 1, 2, 3, 4])
    parts = [part for part, _ in batch.parts(1)]
    assert [len(set(part.groups.tolist())) for part in parts] == [1] * 5
    assert sum(algorithm.weight(part) for part in parts).item() == pytest.approx(5, rel=1e-6)
    sizes = sorted(len(algorithm.data[i].texts) for i in range(5))
    assert sorted(len(part) for part in parts) == sizes
    assert sizes[0] < sizes[-1]  # so that a pair of a large ranking counts less


# --------------------------------------------------------------------------------------------- ratings, spread


RATED = [[1.0, 2.0], [3.0], [2.0], [5.0, 1.0, 3.0], [4.0], [4.0], [0.0]]
WORTH = [0.3, -0.2, 1.1, 0.8, -0.9, 0.05, 0.6]


def rated(world: World = CPU, **changes: Any) -> FromRatings:
    data = [Judged([[i] * (1 + 2 * i % 5)], [given]) for i, given in enumerate(RATED)]
    given = {"noise": 0.1, "minimum_gap": 0.5, "centering": 0.3, **changes}
    algorithm: FromRatings = made(FromRatings, WORTH, data, world, **given)
    return algorithm


def learned(algorithm: FromRatings) -> tuple[torch.Tensor, dict[str, float], int]:
    """The gradient of the first batch as the trainer takes it, its figures, and into how many parts it was cut."""
    batch = next(algorithm.batches())
    trainer = Trainer(None, algorithm.world, algorithm.settings)
    trainer._gradients(algorithm, batch)
    grad = algorithm.policy.worth.grad
    assert grad is not None
    return grad, trainer.figures, len(list(batch.parts(algorithm.settings.tokens_per_pass)))


@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_b29_ratings_in_parts_are_the_whole_batch(tokens):
    whole, parts = learned(rated()), learned(rated(tokens_per_pass=tokens))
    assert whole[2] == 1 < parts[2]
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-6, atol=1e-9)
    assert parts[1] == pytest.approx(whole[1], rel=1e-6)
    total = 0.0
    for i, j in combinations(range(len(RATED)), 2):
        if abs(np.mean(RATED[i]) - np.mean(RATED[j])) >= 0.5:
            above = np.mean([(a > b) + (a == b) / 2 for a in RATED[i] for b in RATED[j]])
            chance = 0.9 / (1 + math.exp(WORTH[j] - WORTH[i])) + 0.05
            total -= above * math.log(chance) + (1 - above) * math.log(1 - chance)
            total += 0.3 * (WORTH[i] + WORTH[j]) ** 2
    assert parts[1]["loss"] * 19 == pytest.approx(total, rel=1e-6)


@dataclasses.dataclass
class Both(World):
    """One of two processes that are threads."""

    meeting: Any = None

    def gather(self, objects: list[Any]) -> list[Any]:
        barrier, boxes = self.meeting
        boxes[self.rank] = objects
        barrier.wait()
        found = boxes[0] + boxes[1]
        barrier.wait()
        return found

    def sum(self, value: Any) -> Any:
        return sum(self.gather([value.detach()]))


@pytest.mark.parametrize("tokens", [1, 10**9])
def test_b30_ratings_of_two_processes_are_the_whole_batch(tokens):
    meeting: Any = (threading.Barrier(2, timeout=30), [None, None])
    found: list[Any] = [None, None]

    def run(rank: int) -> None:
        world = Both(torch.device("cpu"), rank=rank, size=2, meeting=meeting)
        found[rank] = learned(rated(world, tokens_per_pass=tokens))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = learned(rated())
    # Each process takes its loss times their number, and those who wrap models average the gradients.
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, whole[0], rtol=1e-6, atol=1e-9)
    assert found[0][1] == found[1][1] == pytest.approx(whole[1], rel=1e-6)


# ------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("kind", examples.JUDGED)
def test_it_learns_what_somebody_likes(kind, at, tmp_path):
    rows = examples.judgements(examples.JUDGED[kind], 240)
    changes = {"steps": 45, "batch_size": 24, "learning_rate": 1e-2, "holdout": 0.25, "tokens_per_pass": 1024}
    run = plaudit.train(settings(kind, at, tmp_path, rows, **changes))
    found = run.summary
    assert found["accuracy"] == run.metrics()[-1]["heldout_accuracy"] > 0.93
    # Rankings with ties cost something, however good the scores are.
    assert run.metrics()[0]["loss"] > (1.2 if kind == "plackett_luce" else 3) * run.metrics()[-1]["loss"]
    if kind == "regression":
        assert found["pearson"] > 0.9
        assert found["mse"] < 0.25
    elif kind == "binary":
        assert found["calibration_error"] < 0.12
        assert found["reliability"]
    else:
        assert found["accuracy_best"] > 0.85


def test_held_out_figures_of_numbers_are_scipys(at, tmp_path):
    rows = examples.judgements("ratings", 40, seed=4)
    algorithm = examples.built(settings("regression", at, tmp_path, rows, holdout=0.5, report_gap=0.5))
    figures = algorithm.evaluate()
    batch = algorithm.rows(algorithm.held)
    scores, means = algorithm.scores(batch).detach().double().numpy(), batch.targets.nanmean(1).double().numpy()
    assert figures["heldout_mse"] == pytest.approx(np.mean((scores - means) ** 2), rel=1e-5)
    assert figures["heldout_pearson"] == pytest.approx(scipy_stats.pearsonr(scores, means).statistic, abs=1e-5)
    assert figures["heldout_spearman"] == pytest.approx(scipy_stats.spearmanr(scores, means).statistic, abs=1e-5)
    assert 0 <= figures["heldout_accuracy_one_rater"] <= 1
    torch.nn.init.zeros_(algorithm.policy.backbone.score.weight)
    constant = algorithm.evaluate()
    assert "heldout_pearson" not in constant
    assert constant["heldout_accuracy"] == 0.5


def test_held_out_figures_of_labels_and_choices(at, tmp_path):
    rows = examples.judgements("labels", 30)
    binary = examples.built(settings("binary", at, tmp_path, rows, holdout=0.5))
    with torch.no_grad():
        scores = binary.scores(binary.rows(binary.held))
    labels = torch.tensor([item.targets[0][0] for item in binary.held])
    assert binary.evaluate()["heldout_accuracy"] == pytest.approx(float(((scores > 0) == (labels > 0)).float().mean()))
    rows = [*examples.judgements("rankings", 30), {"prompt": "x", "completions": ["a", "b"], "ranking": "A = B"}]
    best = examples.built(settings("best_of", at, tmp_path, rows, holdout=0.5))
    right = []
    for item in best.held:
        ranks = [rank for (rank,) in item.targets]
        if len(set(ranks)) > 1:
            with torch.no_grad():
                first = int(best.scores(best.rows([item])).argmax())
            right.append(ranks[first] == min(ranks))
    assert best.evaluate()["heldout_accuracy_best"] == pytest.approx(np.mean(right))


# ------------------------------------------------------------------------------------- bootstrap and weight decay


def test_a_bootstrap_draws_with_replacement_and_holds_out_what_it_never_drew():
    plain = Reward(model="m", data="d", seed=3, weight_decay=0.1)
    items = [judged(1, 2, first=i) for i in range(2000)]
    assert divided(items[:5], plain) == ([0, 1, 2, 3, 4], [])
    both = dataclasses.replace(plain, bootstrap=True, adaptive_weight_decay=True)
    drawn, rest = divided(items, both)
    assert len(drawn) == 2000
    assert set(drawn) | set(rest) == set(range(2000))
    assert not set(drawn) & set(rest)
    assert len(rest) / 2000 == pytest.approx(1 / math.e, abs=0.03)
    assert divided(items, both) == (drawn, rest)
    assert divided(items, dataclasses.replace(both, seed=4))[0] != drawn
    drawn, rest = divided(items, dataclasses.replace(both, bootstrap=False))
    assert len(rest) == round(2000 / math.e)
    assert sorted(drawn + rest) == list(range(2000))


@pytest.mark.parametrize("bootstrap", [True, False])
def test_b18_a_question_is_learned_from_or_held_out_with_all_answers_to_it(bootstrap):
    """Two people judged each pair, one of them the other way round, and a third some of them."""
    pairs = [judged(1, 2, first=10 * i) for i in range(40)]
    turned = [Judged(pair.texts[::-1], pair.targets) for pair in pairs]
    items = [*pairs, *turned, *pairs[:10]]
    given = Reward(
        model="m", data="d", seed=1, weight_decay=0.1, adaptive_weight_decay=True, bootstrap=bootstrap, members=1
    )
    learned, kept = divided(items, given)
    asked = [frozenset(map(tuple, item.texts)) for item in items]
    assert {asked[place] for place in learned}.isdisjoint({asked[place] for place in kept})
    assert set(learned) | set(kept) == set(range(90))
    # All answers to what was drawn, as often as it was drawn.
    times = {place: learned.count(place) for place in range(90)}
    assert all(times[i] == times[40 + i] for i in range(40))
    assert all(times[i] == times[80 + i] for i in range(10))
    assert (max(times.values()) > 1) == bootstrap


@pytest.mark.parametrize("count", range(1, 6))
def test_b18_few_questions_leave_nothing_to_keep_back_and_are_learned_from_all_the_same(count):
    items = [judged(1, 2, first=10 * i) for i in range(count)]
    given = Reward(model="m", data="d", weight_decay=0.1, adaptive_weight_decay=True, batch_size=count)
    found = [divided(items, dataclasses.replace(given, bootstrap=True, seed=seed)) for seed in range(400)]
    assert all(len(learned) == count for learned, _ in found)
    without = sum(not kept for _, kept in found) / 400
    assert without == pytest.approx(math.factorial(count) / count**count, abs=0.06)
    learned, kept = divided(items, given)
    assert (len(learned), len(kept)) == {1: (1, 0), 2: (1, 1), 3: (2, 1), 4: (3, 1), 5: (3, 2)}[count]


def test_b18_where_nothing_is_kept_back_the_weight_decay_stays_and_this_is_told():
    alone = made(FromRankings, [0.0] * 3, [judged(1, 2)], adaptive_weight_decay=True, weight_decay=0.1, steps=40)
    assert alone.remarks == ["adaptive_weight_decay: nothing is left of 1 rows to see by, so weight_decay stays 0.1."]
    batches = alone.batches()
    for _ in range(10):
        next(batches)
    assert alone.weight_decay == 0.1
    assert not made(FromRankings, [0.0] * 3, [judged(1, 2)], weight_decay=0.1).remarks


def test_rows_are_named_by_their_place_in_the_data():
    data = [judged(1, 2, first=i) for i in range(9)]
    algorithm = made(FromRankings, [0.0] * 11, data, bootstrap=True, batch_size=4)
    batch = algorithm.collate([0, 5])
    first = batch.tokens[:, 0].tolist()
    assert batch.index.tolist() == [first[0], first[0], first[2], first[2]]
    assert len(set(algorithm.places)) < 9


def test_the_weight_decay_follows_the_ratio():
    assert adapted(0.1, 1.6, 1e-3) == 0.2
    assert adapted(0.1, 1.5, 1e-3) == adapted(0.1, 1.1, 1e-3) == 0.1
    assert adapted(0.1, 1.0, 1e-3) == 0.05
    assert adapted(80.0, 2.0, 1e-3) == 100.0


def test_the_weight_decay_rises_where_nothing_can_be_learned_and_reaches_the_optimizer(at, tmp_path):
    # The labels are noise: whatever is learned of the rows in training holds for no others.
    rows = [{**row, "label": i % 2 == 0} for i, row in enumerate(examples.judgements("labels", 30))]
    changes = {"weight_decay": 0.01, "adaptive_weight_decay": True, "holdout": 0.0, "batch_size": 8}
    changes |= {"model": str(at / "model"), "steps": 40, "learning_rate": 1e-2}
    seen = watched.train(settings("binary", at, tmp_path, rows, **changes))
    told = [line for line in watched.logged(tmp_path / "run")[0] if "weight_decay" in line]
    assert [line["step"] for line in told] == list(range(3, 41, 2))
    decay = 0.01
    for line in told:
        decay = adapted(decay, line["validation_ratio"], 1e-2)
        assert line["weight_decay"] == decay
    assert {group["weight_decay"] for group in seen.trainer.optimizer.param_groups} == {0.0, decay}
    assert told[-1]["validation_ratio"] > 1.1
    assert decay > 0.02


def test_what_the_weight_decay_is_told_by_is_the_loss_of_the_whole_model_though_frozen_layers_ran_once(at, tmp_path):
    changes = {
        "model": str(at / "model"),
        "adaptive_weight_decay": True,
        "bootstrap": True,
        "train_layers": 1,
        "weight_decay": 0.1,
    }
    algorithm = examples.built(settings("comparisons", at, tmp_path, examples.judgements("comparisons", 30), **changes))
    for _ in range(2):
        sides = algorithm.validation, algorithm.data
        for looked_at, items in zip(algorithm.looked_at, sides, strict=True):
            assert looked_at.trunk is not None
            whole = algorithm.mean_loss(algorithm.rows(items))
            assert algorithm.mean_loss(looked_at) == pytest.approx(whole, rel=1e-5)
        with torch.no_grad():
            for parameter in algorithm.policy.learning().values():
                parameter += 0.1 * torch.randn_like(parameter)
    assert whole != pytest.approx(math.log(2), abs=0.01)


# ------------------------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("model", ["model", "encoder"])
def test_demonstrations_score_0_wherever_the_model_is_read(model, at, tmp_path):
    said = examples.alphabet(9)
    demonstrations = tiny.lines(tmp_path / "said.jsonl", said)
    changes = {"model": str(at / model), "steps": 2, "normalise_on": demonstrations}
    runs = {}
    for name, more in {"as it is": {"normalise_on": None}, "mean": {}, "both": {"normalise_scale": True}}.items():
        given = settings("comparisons", at, tmp_path / name, **{**changes, **more})
        runs[name] = plaudit.train(given)
    prompts, completions = [row["prompt"] for row in said], [row["completion"] for row in said]
    scores = {name: load_rewards(str(run.final))(prompts, completions, {}) for name, run in runs.items()}
    raw = scores["as it is"]
    assert abs(float(raw.mean())) > 0.01
    torch.testing.assert_close(scores["mean"], raw - raw.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores["both"], (raw - raw.mean()) / raw.std(correction=0), atol=1e-4, rtol=0)
    assert runs["mean"].summary["score_mean"] == pytest.approx(float(raw.mean()), abs=1e-5)
    deviation = runs["both"].summary["score_deviation"]
    assert deviation == pytest.approx(float(raw.std(correction=0)), abs=1e-5)
    # What was fitted to people's preferences can be had back.
    divisors = {name: load_rewards(str(run.final)).sources[str(run.final)].policy for name, run in runs.items()}
    assert {name: policy.score_deviation for name, policy in divisors.items()} == {
        "as it is": 1.0,
        "mean": 1.0,
        "both": deviation,
    }

    tokenizer = AutoTokenizer.from_pretrained(runs["both"].final)
    plain = AutoModelForSequenceClassification.from_pretrained(runs["both"].final)
    with torch.no_grad():
        rows = tokenizer([p + c for p, c in zip(prompts, completions, strict=True)], padding=True, return_tensors="pt")
        logits = plain(**rows).logits[:, 0]
    # A decoder's head has no bias, so that transformers sees all scores shifted by one number, which the config tells.
    offset = getattr(plain.config, "score_offset", 0.0)
    assert (offset != 0) == (model == "model")
    torch.testing.assert_close(logits - offset, scores["both"], atol=1e-5, rtol=0)

    again = plaudit.train(
        settings("comparisons", at, tmp_path, **{**changes, "model": str(runs["both"].final), "learning_rate": 1e-9})
    )
    torch.testing.assert_close(
        load_rewards(str(again.final))(prompts, completions, {}), scores["both"], atol=1e-4, rtol=0
    )
    # It was fitted anew, on the scale that it has.
    assert load_rewards(str(again.final)).sources[str(again.final)].policy.score_deviation == 1


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "ratings",
            {"objective": "plackett_luce"},
            "objective: plackett_luce learns from rankings, but the data hold rat",
        ),
        (
            "comparisons",
            {"objective": "regression"},
            "learns from ratings, but the data hold comparisons, which take bra",
        ),
        ("rankings", {"objective": "binary"}, "which take bradley_terry or plackett_luce or best_of"),
        (
            "ratings",
            {"objective": "binary"},
            r"binary takes labels, or ratings from 0 \(bad\) to 1 \(good\), and one here",
        ),
        ("ratings", {"objective": "regression", "noise": 0.1}, "noise: regression knows no answers at random"),
        (
            "comparisons",
            {"adaptive_weight_decay": True},
            "adaptive_weight_decay: there is no weight_decay to begin with",
        ),
        ("comparisons", {"normalise_on": "none.jsonl"}, "there is no file 'none.jsonl'"),
        ("comparisons", {"objective": "ranking"}, "`objective` is 'ranking', but must be 'bradley_terry'"),
        ("comparisons", {"members": 0}, "`members` is 0, but must be greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_are_told_of_before_a_model_loads(kind, changes, message, at, tmp_path, monkeypatch):
    monkeypatch.setattr("plaudit.loading.load_reward_model", None)
    with pytest.raises(PlauditError, match=message):
        plaudit.train(settings(kind, at, tmp_path, **changes))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_text_that_the_model_has_no_positions_for(at, tmp_path):
    rows = [{"prompt": "1", "chosen": "a" * 200, "rejected": "b"}] * 3
    given = settings("comparisons", at, tmp_path, rows, model=str(at / "encoder"), steps=1)
    with pytest.raises(
        PlauditError, match=r"max_tokens: a text has 203 tokens, and '.*encoder' reads at most 128: set"
    ):
        plaudit.train(given)
