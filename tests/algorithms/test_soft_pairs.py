"""What only some people preferred: which side of a pair stands first says nothing, whatever learns from pairs."""

from __future__ import annotations

import pytest
import torch
from one_token import OneToken

import examples
import tiny
from plaudit.algorithms.preference import Answers, ContrastivePreference
from plaudit.settings.preference import CPO
from plaudit.templates import Encoded
from plaudit.world import World

SHARES = (1.0, 0.75, 0.25, 0.5, 0.0, 0.625)


def told(verb, at, tmp_path, rows):
    """(loss, statistics, gradient) of one batch of all these pairs, from a policy that has moved."""
    given = {
        "model": str(at / "model"),
        "data": tiny.lines(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", rows),
        "eval_data": None,
        "batch_size": 12 if verb in ("kto", "bco") else 6,
        "tokens_per_pass": 4096,
    }
    given |= {"precompute_reference": False} if verb in ("robust_dpo", "exo") else {}
    algorithm = examples.built(examples.settings(verb, at, tmp_path / "run", **given))
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in algorithm.policy.learning().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    batch = next(algorithm.batches())
    loss, stats = algorithm.loss(batch)
    loss.backward()
    slopes = [p.grad.flatten() for p in algorithm.policy.learning().values() if p.grad is not None]
    return loss, stats, torch.cat(slopes)


@pytest.mark.parametrize("verb", examples.PREFERENCES)
def test_s2_10_answers_and_shares_swapped_change_nothing(verb, at, tmp_path):
    texts = examples.words(12, seed=3)
    rows = [
        {"prompt": f"{i}:", "chosen": texts[i], "rejected": texts[-1 - i], "preference": p}
        for i, p in enumerate(SHARES)
    ]
    swapped = [
        row | {"chosen": row["rejected"], "rejected": row["chosen"], "preference": 1 - row["preference"]}
        for row in rows
    ]
    loss, stats, slopes = told(verb, at, tmp_path, rows)
    other, theirs, their_slopes = told(verb, at, tmp_path, swapped)
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slopes, their_slopes, rtol=1e-4, atol=1e-4 * float(slopes.abs().max()))
    assert stats.keys() == theirs.keys()
    for name, value in stats.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4)


def test_s2_10_cpo_imitates_each_answer_by_as_many_people_as_preferred_it():
    """Two answers of one token, of two and one thirds of the probability: all is known by hand."""
    one = [Encoded([0], [i], [True]) for i in range(2)]
    policy = OneToken(torch.tensor([2 / 3, 1 / 3], dtype=torch.float64).log())
    settings = CPO(model="m", data="d", beta=0.5, sft_weight=3.0, batch_size=1)
    algorithm = ContrastivePreference(settings, World(torch.device("cpu")), policy, [Answers(one, [0.25, 0.75])], [])
    loss, stats = algorithm.loss(next(algorithm.batches()))
    likely, unlikely = (torch.tensor(share, dtype=torch.float64).log() for share in (2 / 3, 1 / 3))
    imitation = -0.25 * likely - 0.75 * unlikely
    lead = 0.5 * (likely - unlikely)
    pair = -0.25 * torch.nn.functional.logsigmoid(lead) - 0.75 * torch.nn.functional.logsigmoid(-lead)
    assert loss.item() == pytest.approx((pair + 3 * imitation).item(), rel=1e-9)
    assert stats["chosen_nll"].item() == pytest.approx(imitation.item(), rel=1e-9)
