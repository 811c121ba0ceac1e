"""A reference that was asked once and for all says what one in memory says, to all that may ask so (B37)."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

import examples

VERBS = [
    verb for verb, kind in examples.PREFERENCES.items() if "precompute_reference" in {f.name for f in fields(kind)}
]


def learned(verb, at, tmp_path, precomputed):
    """Loss, gradient and held-out figures of a policy that has left its reference."""
    changes = {"precompute_reference": precomputed, "batch_size": 6, "lora_rank": 0}
    algorithm = examples.built(examples.settings(verb, at, tmp_path / "run", **changes))
    assert bool(algorithm.policy._reference) is not precomputed
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in algorithm.policy.learning().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    batch = next(algorithm.batches())
    algorithm.begin(batch)
    loss, _ = algorithm.loss(batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in algorithm.policy.learning().values() if p.grad is not None])
    return batch, loss.detach(), gradient, algorithm.evaluate()


@pytest.mark.parametrize("verb", VERBS)
def test_b37_precomputed_is_online_for_every_verb(verb, at, tmp_path):
    batch, loss, gradient, held = learned(verb, at, tmp_path, precomputed=True)
    online = learned(verb, at, tmp_path, precomputed=False)
    assert torch.equal(batch.index, online[0].index)
    assert batch.reference_logprobs.abs().sum() > 0
    torch.testing.assert_close(batch.reference_logprobs, online[0].reference_logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(loss, online[1], rtol=1e-4, atol=1e-5)
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(gradient, online[2], rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    assert held == pytest.approx(online[3], rel=1e-4, abs=1e-5)


def test_b37_the_verbs_are_all_there():
    assert {"dpo", "ipo", "exo", "aot", "bco"} < set(VERBS)
