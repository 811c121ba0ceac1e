"""Learning from preferences without a reward model: what each algorithm starts from, converges to and learns; that
nothing depends on how a batch is cut or spread; where the reference comes from."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from one_token import OneToken
from transformers import AutoModelForCausalLM

import examples
import plaudit
import tiny
from plaudit import preferences, reference
from plaudit.algorithms import base
from plaudit.algorithms.preference import (
    Answers,
    ContrastivePreference,
    DirectPreference,
    IdentityPreference,
    OddsRatio,
    RankResponses,
    RobustDirectPreference,
    ShapedPreference,
    SimplePreference,
)
from plaudit.settings.preference import CPO, DPO, IPO, ORPO, RRHF, AlphaPO, Referenced, RobustDPO, SimPO
from plaudit.templates import Encoded
from plaudit.world import World

REFERENCED = [verb for verb, kind in examples.PREFERENCES.items() if issubclass(kind, Referenced)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAUDIT_CACHE", str(tmp_path / "cache"))


def settings(verb, at, tmp_path, rows=None, **changes):
    data = {} if rows is None else {"data": tiny.lines(tmp_path / "data.jsonl", rows), "eval_data": None}
    given = {"model": str(at / "model"), "weight_decay": 0.0, "evaluate_every": 0, "save_every": 0}
    return examples.settings(verb, at, tmp_path / "run", **{**given, "tokens_per_pass": 4096, **data, **changes})


def moved(algorithm, scale=0.1):
    """The policy, no longer what it began as."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in algorithm.policy.learning().values():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return algorithm


def gradients(algorithm):
    return torch.cat([p.grad.flatten() for p in algorithm.policy.learning().values() if p.grad is not None])


# --------------------------------------------------------------------------------------------------- does it learn?


SLOWER = {
    "ipo_avg": {"beta": 0.1},
    "apo_down": {"steps": 30},
    "cpo": {"beta": 0.5, "sft_weight": 0.1, "steps": 32, "learning_rate": 6e-3},
    "slic": {"beta": 0.5, "sft_weight": 0.1, "steps": 32, "learning_rate": 6e-3},
    "kto": {"beta": 0.5, "steps": 28},
    "bco": {"beta": 0.5},
    "bco_pair": {"beta": 0.5},
}


@pytest.mark.parametrize("verb", examples.PREFERENCES)
def test_it_learns_what_somebody_likes(verb, at, tmp_path):
    rows = examples.judgements("comparisons", 160)
    changes = {"steps": 16, "batch_size": 16, "learning_rate": 3e-3, "holdout": 0.25, "schedule": "constant"}
    run = plaudit.train(settings(verb, at, tmp_path, rows, **changes | SLOWER.get(verb, {})))
    first, last = run.metrics()[0], run.metrics()[-1]
    if verb in REFERENCED:
        assert first["heldout_accuracy"] == 0.5
        assert first["heldout_margin"] == pytest.approx(0, abs=1e-4)
    assert last["heldout_accuracy"] == run.summary["preference_accuracy"] > 0.85
    assert last["heldout_loss"] < first["heldout_loss"]
    assert last["heldout_margin"] > first["heldout_margin"]


# ----------------------------------------------------------------------------------------------- where it begins

STARTS = {
    "dpo": math.log(2),
    "robust_dpo": math.log(2),
    "dpo_norm": math.log(2),
    "f_dpo": math.log(2),
    "ld_dpo": math.log(2),
    "ipo": 1 / (4 * 0.1**2),
    "ipo_avg": 1 / 4,
    "hinge": 1.0,
    "exo": -math.log(2) - math.log(1e-3 * (1 - 1e-3)) / 2,
    "nca": 2 * math.log(2),
    "sppo": 1 / (2 * 0.1**2),
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "bco_pair": 2 * math.log(2),
    "mpo": 1.2 * math.log(2),
    "apo_zero": 1.0,
    "apo_zero_unpaired": 0.5,
    "apo_down": 1.0,
    "discopop": (math.log(2) + 1) / 2,
    "kto": 0.5,
    "bco": math.log(2),
}


@pytest.mark.parametrize("verb", STARTS)
def test_b8_a_policy_that_is_its_reference(verb, at, tmp_path):
    # A model with dropout of its own: it stays off, or nothing would be exact.
    evenly = {"bco": {"match_prompts": False}, "mpo": {"sft_weight": 0.0}}.get(verb, {})
    algorithm = examples.built(settings(verb, at, tmp_path, model=str(at / "dropping"), **evenly))
    batch = next(algorithm.batches())
    loss, stats = algorithm.loss(batch)
    assert (loss / algorithm.weight(batch)).item() == pytest.approx(STARTS[verb], rel=1e-6)
    assert stats["accuracy"] / algorithm.weight(batch) == 0.5
    assert batch.reference_logprobs is not None


def test_b9_the_first_gradient_of_dpo(at, tmp_path):
    algorithm = examples.built(settings("dpo", at, tmp_path, beta=0.3))
    batch = next(algorithm.batches())
    algorithm.loss(batch)[0].backward()
    found = gradients(algorithm)
    algorithm.policy.zero_grad()
    totals = algorithm.totals(algorithm.policy(batch).logprobs, batch)
    (-0.3 / 2 * (totals[0::2] - totals[1::2]).sum()).backward()
    torch.testing.assert_close(found, gradients(algorithm), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("verb", ["dpo", "kto"])
def test_frozen_layers_run_once_for_policy_and_reference_and_no_number_changes(verb, at, tmp_path, monkeypatch):
    found, passes = {}, {}
    for name, kept in {"shared": base.KEPT, "alone": 0}.items():
        monkeypatch.setattr(base, "KEPT", kept)
        algorithm = moved(examples.built(settings(verb, at, tmp_path, train_layers=1, steps=3)))
        counted = []
        lowest = algorithm.policy.base.layers[0]
        lowest.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        batch = next(algorithm.batches())
        found[name] = {"loss": algorithm.loss(batch)[0].item(), "kl": algorithm.notes.get("kl", 0.0)}
        passes[name] = len(counted)
        found[name] |= algorithm.evaluate()
    assert passes["shared"] * 2 == passes["alone"] == {"dpo": 2, "kto": 4}[verb]
    assert found["shared"] == pytest.approx(found["alone"], rel=1e-4)
    assert found["shared"]["loss"] != pytest.approx(STARTS[verb] * len(batch), rel=1e-3)


# --------------------------------------------------------------------------------------------- where it converges


def converged(kind, settings, logits, pairs):
    """The policy where the gradient of the real algorithm's loss is zero; pairs are (i, j, chance that i wins)."""
    policy = OneToken(logits)
    one = [Encoded([0], [i], [True]) for i in range(len(logits))]
    data = [Answers([one[i], one[j]], [p, 1 - p]) for i, j, p in pairs]
    world = World(torch.device("cpu"))
    algorithm = kind(replace(settings, batch_size=len(data)), world, policy, data, [])
    batch = next(algorithm.batches())
    shares = [share for i in batch.index[0::2].tolist() for share in data[i].targets]
    batch = replace(batch, targets=torch.tensor(shares, dtype=torch.float64))
    for _ in range(40):
        loss, _ = algorithm.loss(batch)
        (slope,) = torch.autograd.grad(loss, policy.logits, create_graph=True)
        bend = torch.stack([torch.autograd.grad(each, policy.logits, retain_graph=True)[0] for each in slope])
        with torch.no_grad():
            policy.logits -= torch.linalg.pinv(bend, rtol=1e-10) @ slope
    return policy.logits.detach().log_softmax(0), policy.kept.log_softmax(0)


GIVEN = {"model": "m", "data": "d"}


def first_loss(kind, settings, logprob, targets):
    """Loss and statistics of one prompt, whose answers have one, two, three tokens, each of `logprob`."""
    policy = OneToken(torch.tensor([math.log(-math.expm1(logprob)), logprob], dtype=torch.float64))
    answers = [Encoded([0], [1] * length, [True] * length) for length in range(1, len(targets) + 1)]
    data = [Answers(answers, targets)]
    algorithm = kind(replace(settings, batch_size=1), World(torch.device("cpu")), policy, data, [])
    batch = next(algorithm.batches())
    loss, stats = algorithm.loss(batch)
    assert algorithm.weight(batch) == 1
    return loss.item(), stats["accuracy"].item(), stats["margin"].item()


def test_b8_where_all_tokens_are_equally_likely_the_losses_without_a_reference_are_known():
    logprob = -math.log(7)
    for gamma, beta in ((1.0, 2.0), (0.3, 5.0)):  # averages are equal, and only the margin is left
        found = first_loss(SimplePreference, SimPO(**GIVEN, beta=beta, gamma=gamma), logprob, [1.0, 0.0])
        assert found == pytest.approx((math.log1p(math.exp(gamma)), 0.5, 0.0), abs=1e-12)
        shaped = AlphaPO(**GIVEN, beta=beta, gamma=gamma, alpha=0.3)
        assert first_loss(ShapedPreference, shaped, logprob, [1.0, 0.0]) == pytest.approx(found, abs=1e-12)
    # So are the odds of averages.
    found = first_loss(OddsRatio, ORPO(**GIVEN, beta=0.4), logprob, [1.0, 0.0])
    assert found == pytest.approx((-logprob + 0.4 * math.log(2), 0.5, 0.0), abs=1e-12)
    # Sums are not: the second answer is a token longer, and so a factor of 7 less likely.
    found = first_loss(ContrastivePreference, CPO(**GIVEN, beta=0.5, sft_weight=0.25), logprob, [1.0, 0.0])
    loss = math.log1p(math.exp(0.5 * logprob)) - 0.25 * logprob
    assert found == pytest.approx((loss, 1.0, -0.5 * logprob), abs=1e-12)
    # Ranks by averages cost nothing where these are equal; what is left is the likelihood of the whole best answer.
    loss, _, margin = first_loss(RankResponses, RRHF(**GIVEN, rank_weight=9.0), logprob, [3.0, 2.0, 1.0])
    assert (loss, margin) == pytest.approx((-3 * logprob, 0.0), abs=1e-12)


def test_b6_dpo_on_exact_preferences_reaches_the_optimum_of_rlhf():
    generator = torch.Generator().manual_seed(0)
    logits, rewards = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    chance = torch.sigmoid(rewards[:, None] - rewards[None, :])
    pairs = [(i, j, chance[i, j].item()) for i, j in combinations(range(5), 2)]
    pairs += [(j, i, chance[j, i].item()) for i, j, _ in pairs[:4] * 2]  # any distribution of full support
    found, kept = converged(DirectPreference, DPO(**GIVEN, beta=0.7), logits, pairs)
    optimum = (kept + rewards / 0.7).softmax(0)
    assert (found.exp() - optimum).abs().sum() / 2 < 1e-8
    assert (kept.exp() - optimum).abs().sum() / 2 > 0.1


@pytest.mark.parametrize(
    ("kind", "given", "seen", "optimum"),
    [
        (IdentityPreference, IPO(**GIVEN, beta=0.1), 0.8, (2 * 0.8 - 1) / (2 * 0.1)),
        (DirectPreference, DPO(**GIVEN, beta=0.5, label_smoothing=0.1), 0.8, math.log(0.74 / 0.26) / 0.5),
        # Four of five prefer the first, and every fifth of their answers was flipped.
        (RobustDirectPreference, RobustDPO(**GIVEN, beta=0.5, label_smoothing=0.2), 0.68, math.log(0.8 / 0.2) / 0.5),
    ],
    ids=["ipo", "cdpo", "robust"],
)
def test_b7_two_arms(kind, given, seen, optimum):
    logits = torch.tensor([0.3, -0.2], dtype=torch.float64)
    found, kept = converged(kind, given, logits, [(0, 1, seen)])
    lead = (found - kept)[0] - (found - kept)[1]
    assert lead.item() == pytest.approx(optimum, rel=1e-5)


# ------------------------------------------------------------------- what depends on a whole batch, and on processes


@pytest.mark.parametrize("verb", ["aot", "aot_unpaired"])
def test_b29_aot_of_parts_is_the_loss_of_the_whole(verb, at, tmp_path):
    algorithm = moved(examples.built(settings(verb, at, tmp_path, batch_size=8, label_smoothing=0.1)))
    batch = next(algorithm.batches())
    whole, _ = algorithm.objective(algorithm.policy(batch).logprobs, batch)
    whole.backward()
    expected = gradients(algorithm)
    algorithm.policy.zero_grad()
    parts = [algorithm.loss(part)[0] for part, _ in batch.parts(40)]
    assert len(parts) > 3
    sum(parts).backward()
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(gradients(algorithm), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def hugging_face(algorithm, folder, prompt, completion, model=None):
    """log pi of a completion after a prompt, token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder) if model is None else model
    ids = [*prompt, *completion]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))


def test_kto_is_compared_with_mismatched_answers(at, tmp_path):
    algorithm = moved(examples.built(settings("kto", at, tmp_path, batch_size=5)), 0.02)
    batch = next(algorithm.batches())
    items = [algorithm.data[i].encoded[0] for i in algorithm.order[0]]
    total = 0.0
    for k, item in enumerate(items):
        said = items[k - 1].completion
        total += hugging_face(algorithm, None, item.prompt, said, algorithm.policy.backbone)
        total -= hugging_face(algorithm, at / "model", item.prompt, said)
    assert batch.baselines.tolist() == pytest.approx([max(total / 5, 0)] * 5, abs=1e-4)
    own = algorithm.ratios(algorithm.policy(batch).logprobs, batch).tolist()
    side = [2 * target - 1 for target in batch.targets.tolist()]
    assert sorted(set(side)) == [-1, 1]
    slow = sum(1 / (1 + math.exp(0.1 * s * (x - batch.baselines[0].item()))) for s, x in zip(side, own, strict=True))
    assert algorithm.loss(batch)[0].item() == pytest.approx(slow, rel=1e-5)


def test_kto_never_takes_another_answer_to_the_same_prompt_for_a_mismatched_one(at, tmp_path):
    rows = [{"prompt": f"{n}:", "chosen": "a" * n, "rejected": "b" * n} for n in (1, 2, 3)]
    algorithm = examples.built(settings("kto", at, tmp_path, rows))
    found = algorithm.mismatched(algorithm.data, list(range(6)))
    by_byte = {item.encoded[0].prompt[0] for item in found}
    assert len(by_byte) == 3
    order = sorted(by_byte)
    lengths = [(order.index(item.encoded[0].prompt[0]) + 1, len(item.encoded[0].completion) - 1) for item in found]
    assert all(asked != said for asked, said in lengths)
    alone = algorithm.mismatched(algorithm.data, [0, 1])
    assert [item.encoded[0].completion for item in alone] == [algorithm.data[i].encoded[0].completion for i in (1, 0)]


def test_bco_is_compared_with_all_rewards_so_far(at, tmp_path):
    algorithm = examples.built(settings("bco", at, tmp_path, batch_size=5))
    batches, seen = algorithm.batches(), []
    for _ in range(3):
        moved(algorithm, 0.02)
        batch = next(batches)
        seen += (0.1 * algorithm.ratios(algorithm.policy(batch).logprobs, batch)).tolist()
        assert batch.baselines.tolist() == pytest.approx([sum(seen) / len(seen)] * 5, abs=1e-5)
    assert algorithm.mean != 0
    other = examples.built(settings("bco", at, tmp_path, batch_size=5))
    other.restore(algorithm.state())
    assert (other.mean, other.seen, other.position) == (algorithm.mean, 15, 3)


def test_s2_08_bco_of_pairs_is_bco_of_both_sides_against_all_rewards_so_far(at, tmp_path):
    algorithm = examples.built(settings("bco_pair", at, tmp_path, batch_size=4))
    batches, seen = algorithm.batches(), []
    for _ in range(2):
        moved(algorithm, 0.02)
        batch = next(batches)
        ratios = algorithm.ratios(algorithm.policy(batch).logprobs, batch)
        seen += (0.1 * ratios).tolist()
        assert batch.baselines.tolist() == pytest.approx([sum(seen) / len(seen)] * 8, abs=1e-5)
        single, _ = preferences.bco(ratios, batch.targets > 0.5, batch.baselines, 0.1)
        assert algorithm.loss(batch)[0].item() == pytest.approx(single.item(), rel=1e-6)
        assert algorithm.weight(batch) == 4
    other = examples.built(settings("bco_pair", at, tmp_path, batch_size=4))
    other.restore(algorithm.state())
    assert (other.mean, other.seen) == (algorithm.mean, 16)


def test_bco_weighs_bad_answers_by_their_prompts(at, tmp_path):
    rows = [{"prompt": f"{'x' * 8}{i}", "completion": "a", "label": True} for i in range(10)]
    rows += [{"prompt": f"{'x' * 8}{i}", "completion": "b", "label": False} for i in range(10, 15)]
    rows += [{"prompt": f"{'?' * 8}{i}", "completion": "b", "label": False} for i in range(15, 25)]
    algorithm = examples.built(settings("bco", at, tmp_path, rows, match_prompts=True, min_density_ratio=0.1))
    counts = algorithm.collate(list(range(25))).weights
    assert counts[:10].tolist() == [1.0] * 10
    assert counts[10:15].min() > 1 > counts[15:].max() >= 0.1
    plain = examples.built(settings("bco", at, tmp_path, rows, match_prompts=False))
    assert plain.collate(list(range(25))).weights.tolist() == [1.0] * 25


class Twin(World):
    """One of two ranks in two threads, which exchange through a list."""

    def __init__(self, rank, slots, barrier):
        super().__init__(torch.device("cpu"), rank=rank, size=2)
        self.slots, self.barrier = slots, barrier

    def gather(self, objects):
        self.slots[self.rank] = list(objects)
        self.barrier.wait(20)
        joined = self.slots[0] + self.slots[1]
        self.barrier.wait(20)
        return joined

    def _reduce(self, value, operation):
        return sum(self.gather([value]))

    def share(self, value):
        return self.gather([value])[0]


def by_two(verb, at, tmp_path, **changes):
    """Loss and gradient per unit of one batch, spread over two ranks and cut into small parts."""
    slots, barrier, found = [None, None], threading.Barrier(2), {}
    given = settings(verb, at, tmp_path, batch_size=7, **changes)
    algorithms = [moved(examples.built(given), 0.02) for _ in range(2)]

    def work(rank):
        algorithm = algorithms[rank]
        algorithm.world = Twin(rank, slots, barrier)
        batch = next(algorithm.batches())
        total = algorithm.world.sum(algorithm.weight(batch))
        losses = [algorithm.loss(part)[0] / total for part, _ in batch.parts(30)]
        sum(losses).backward()
        found[rank] = (sum(losses).item(), gradients(algorithm))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found[0][0] + found[1][0], found[0][1] + found[1][1]


@pytest.mark.parametrize("verb", ["dpo", "aot", "aot_unpaired", "bco_pair", "kto", "bco"])
def test_b30_two_processes_learn_as_one(verb, at, tmp_path):
    algorithm = moved(examples.built(settings(verb, at, tmp_path, batch_size=7)), 0.02)
    batch = next(algorithm.batches())
    loss = algorithm.loss(batch)[0] / algorithm.weight(batch)
    loss.backward()
    expected = gradients(algorithm)
    found = by_two(verb, at, tmp_path)
    assert found[0] == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


# ----------------------------------------------------------------------------------------------------- the reference


def test_b37_precomputed_is_online_and_is_kept_by_model_and_data(at, tmp_path, monkeypatch):
    written = []
    write = reference.write
    monkeypatch.setattr(reference, "write", lambda path, values: (written.append(path), write(path, values)))
    online = examples.built(settings("dpo", at, tmp_path))
    before = next(online.batches())
    assert written == []
    given = settings("dpo", at, tmp_path, precompute_reference=True)
    for _ in range(2):
        algorithm = examples.built(given)
        assert len(written) == 1  # what is held out are the same rows; the second time all are there already
        assert not algorithm.policy._reference
        batch = next(algorithm.batches())
        torch.testing.assert_close(batch.reference_logprobs, before.reference_logprobs, rtol=1e-6, atol=1e-6)
        assert algorithm.evaluate() == pytest.approx(online.evaluate(), rel=1e-4, abs=1e-6)
        assert batch.reference_logprobs.abs().sum() > 0
    examples.built(replace(given, model=tiny.folder(tmp_path / "other", seed=3)))
    assert len(written) == 2
    rows = examples.judgements("comparisons", 14, seed=2)
    examples.built(replace(given, data=tiny.lines(tmp_path / "other.jsonl", rows)))
    assert len(set(written)) == len(written) == 3  # what is held out did not change


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_b35_an_adapter_is_switched_off_for_the_reference(at, tmp_path):
    plain = next(examples.built(settings("dpo", at, tmp_path)).batches())
    adapted = moved(examples.built(settings("dpo", at, tmp_path, lora_rank=2)))
    batch = next(adapted.batches())
    torch.testing.assert_close(batch.reference_logprobs, plain.reference_logprobs)
    assert adapted.loss(batch)[1]["margin"].abs() > 1e-3


def test_a_cache_that_cannot_be_written_to_is_named(at, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLAUDIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(plaudit.PlauditError, match=r"precompute_reference: .* can't be written to .*PLAUDIT_CACHE"):
        examples.built(settings("dpo", at, tmp_path, precompute_reference=True))


# ----------------------------------------------------------------------------------------------------------- data


def test_paired_data_feed_unpaired_algorithms_and_the_other_way_round(at, tmp_path):
    ratings = [{"prompt": f"{i // 2}:", "completion": "ab"[i % 2], "label": i % 2 == 0} for i in range(8)]
    paired = examples.built(settings("dpo", at, tmp_path, ratings))
    assert [tiny.tokenizer().decode(e.completion) for e in paired.data[0].encoded] == [f"a{tiny.END}", f"b{tiny.END}"]
    assert len(paired.data) == 4
    comparisons = [{"prompt": "1", "chosen": "a", "rejected": "b"}, {"prompt": "2", "chosen": "c", "rejected": "d"}]
    single = examples.built(settings("kto", at, tmp_path, comparisons))
    assert [item.targets for item in single.data] == [[1.0], [0.0], [1.0], [0.0]]
    ranked = examples.built(settings("rrhf", at, tmp_path, examples.judgements("rankings", 5)))
    assert max(len(item.targets) for item in ranked.data) > 2


def test_soft_preferences_are_learned_from_or_counted(at, tmp_path, capsys):
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b", "preference": (0.5, 0.8, 0.3)[i % 3]} for i in range(6)]
    soft = examples.built(settings("dpo", at, tmp_path, rows, batch_size=6))
    batch = soft.collate(list(range(6)))
    assert batch.targets.tolist() == pytest.approx([0.5, 0.5, 0.8, 0.2, 0.3, 0.7] * 2)
    hard = settings("apo_zero", at, tmp_path, rows, steps=1)
    assert len(examples.built(hard).data) == 4
    plaudit.train(hard)
    assert "2 ties left out: this loss has no use for them" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["dpo", "kto"])
def test_texts_that_the_model_has_no_positions_for_are_told_of(verb, at, tmp_path):
    folder = tiny.folder(tmp_path / "short", "gpt2", n_positions=16)
    rows = [{"prompt": "1:", "chosen": "a" * 30, "rejected": "b"}]
    with pytest.raises(plaudit.PlauditError, match=r"max_tokens: a text has 33 tokens, and '.*short' reads at most 16"):
        examples.built(settings(verb, at, tmp_path, rows * 4, model=folder))


def test_a_damaged_cache_of_the_reference_is_written_anew(tmp_path):
    path = tmp_path / "kept.safetensors"
    reference.write(path, [torch.ones(2), torch.zeros(1)])
    assert [one.tolist() for one in reference.read(path)] == [[1, 1], [0]]
    path.write_bytes(path.read_bytes()[:20])
    assert reference.read(path) is None
