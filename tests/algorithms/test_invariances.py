"""How a batch is cut, ordered, padded or repeated changes no gradient (B29, B39)."""

import dataclasses

import pytest
import torch

import examples
from plaudit import layout
from plaudit.algorithms.reward import FromRatings
from plaudit.batch import Batch
from plaudit.trainer import Trainer

KINDS = (
    "sft",
    "comparisons",
    "rankings",
    "ratings",
    *examples.JUDGED,
    *examples.PREFERENCES,
    "ppo",
    "ppo-top",
    *examples.SAMPLED,
    "ilql",
    *examples.ENCDEC,
)
CENTRED = {"comparisons", "rankings", "ratings", *examples.JUDGED}
NOISY = {"comparisons", "rankings", "ratings", "binary"}


@pytest.fixture(scope="module", params=KINDS)
def case(request, at, tmp_path_factory):
    """(algorithm, settings, batch) in float64: rows of unequal lengths, and a policy that is no longer what sampled."""
    changes = {"centering": 0.3} if request.param in CENTRED else {}
    changes |= {"noise": 0.1} if request.param in NOISY else {}
    if request.param in ("sft", "sft-encdec", *CENTRED):
        changes |= {"dropout": False, "batch_size": 7}
    else:
        changes |= {"batch_size": 8}
    settings = examples.settings(request.param, at, tmp_path_factory.mktemp("run"), **changes)
    algorithm = examples.built(settings)
    batch = next(algorithm.batches())
    assert len(set(batch.lengths.tolist())) > 2
    algorithm.policy.double()
    computed = {name: batch.tensors().get(name) for name in ("trunk", "reference_logprobs")}
    exact = {name: tensor.double() for name, tensor in computed.items() if tensor is not None}
    batch = dataclasses.replace(batch, **exact)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in algorithm.policy.learning().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).double()
    algorithm.unmoved = False
    if isinstance(algorithm, FromRatings):
        algorithm.begin(batch)
        assert algorithm.everybody is not None
    return algorithm, settings, batch


def gradient(case, batch, tokens=10**9):
    """The trainer's own gradient of a batch, as one vector, its figures, and how many parts the batch was cut into."""
    algorithm, settings, _ = case
    trainer = Trainer(None, algorithm.world, settings)
    algorithm.tokens_per_pass = tokens
    trainer._gradients(algorithm, batch)
    grads = [p.grad for p in algorithm.policy.learning().values() if p.grad is not None]
    assert grads
    return (
        torch.cat([grad.flatten() for grad in grads]),
        trainer.figures,
        len(list(algorithm.policy.parts(batch, tokens))),
    )


def assert_same(found, expected, share=1e-9):
    """share: by how much of the largest gradient others may be off."""
    assert expected[0].abs().max() > 1e-4
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=share * float(expected[0].abs().max()))
    assert found[1].keys() == expected[1].keys()
    assert found[1] == pytest.approx(expected[1], rel=1e-6, abs=1e-9)


def test_b29_how_a_batch_is_cut_changes_nothing(case):
    _, _, batch = case
    whole = gradient(case, batch)
    assert whole[2] == 1
    groups = len(batch.blocks())
    cuts = [gradient(case, batch, tokens) for tokens in (1, 3 * int(batch.lengths.max()))]
    assert cuts[0][2] == groups  # nothing smaller than a group
    for cut in cuts:
        assert_same(cut, whole)
    if "clip_fraction" in whole[1]:
        assert whole[1]["clip_fraction"] > 0  # or the case would be too easy


def test_b32_how_rows_lie_changes_nothing(case, monkeypatch):
    """A prompt computed once for all its answers, or once for each."""
    policy, batch = case[0].policy, case[2]
    if policy.encodes or policy.own_head:
        pytest.skip("this model reads rows in one way only")
    assert policy.rearranges
    found = {}
    for way in (layout.shared, layout.padded):
        monkeypatch.setattr(policy, "layout", lambda part, way=way: way(part, policy.width))
        found[way] = gradient(case, batch)
    if len(batch.blocks()) < len(batch):
        assert len(layout.shared(batch, policy.width).where[batch.attention].unique()) < batch.attention.sum()
    # Llama's norms compute in float32 whatever the weights are, and a shared prompt's gradients meet before them.
    assert_same(found[layout.shared], found[layout.padded], 1e-6)


def test_b39_the_order_of_rows_changes_nothing(case):
    _, _, batch = case
    blocks = batch.blocks()
    order = torch.cat(blocks[::-1])
    assert_same(gradient(case, batch.rows(order)), gradient(case, batch))


def test_b39_a_group_given_twice_counts_twice(case):
    algorithm, _, batch = case
    block = batch.blocks()[0]
    if isinstance(algorithm, FromRatings):
        pytest.skip("a rating is compared with all others of its batch")
    first, both = batch.rows(block), batch.rows(torch.cat([torch.arange(len(batch)), block]))
    both.groups[-len(block) :] = int(batch.groups.max()) + 1
    weights = [algorithm.weight(b).double() for b in (batch, first)]
    parts = [gradient(case, b)[0] for b in (batch, first)]
    expected = (parts[0] * weights[0] + parts[1] * weights[1]) / algorithm.weight(both)
    # Llama's norms compute in float32 whatever the weights are, and here the three losses have different scales.
    torch.testing.assert_close(gradient(case, both)[0], expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_what_lies_outside_rows_and_actions_changes_nothing(case):
    _, _, batch = case
    rows, columns = batch.tokens.shape
    wide = {}
    for name, tensor in batch.tensors().items():
        if tensor.dim() >= 2 and name != "targets":
            tensor = torch.cat([tensor, tensor.new_zeros(rows, 5, *tensor.shape[2:])], 1)
        wide[name] = tensor
    padding = ~wide["attention"]
    assert int(padding.sum()) > 5 * rows
    generator = torch.Generator().manual_seed(1)
    wide["tokens"] = torch.where(padding, torch.randint(0, 257, padding.shape, generator=generator), wide["tokens"])
    for name in ("logprobs", "reference_logprobs", "values", "advantages", "returns"):
        if name in wide:
            wide[name] = wide[name].masked_fill(~wide["actions"], torch.nan)
    assert wide["tokens"].shape[1] == columns + 5
    assert_same(gradient(case, Batch(**wide)), gradient(case, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_handed_out_with_gradients_on(kind, at, tmp_path):
    algorithm = examples.built(examples.settings(kind, at, tmp_path / "run"))
    batches = algorithm.batches()
    for _ in range(5):
        batch = next(batches)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not any(tensor.is_inference() for tensor in batch.tensors().values())


def test_b25_what_was_given_gets_no_gradient(case):
    algorithm, _, batch = case
    names = {"logprobs", "values", "advantages", "returns", "scores", "trunk"}
    names |= {"reference_logprobs", "weights", "baselines"}
    floats = {name: t.clone().requires_grad_() for name, t in batch.tensors().items() if name in names}
    loss, stats = algorithm.loss(dataclasses.replace(batch, **floats))
    loss.backward()
    # Frozen activations are inputs of what learns, so that a gradient reaches them and ends there.
    reached = {name for name, tensor in floats.items() if tensor.grad is not None and tensor.grad.abs().sum() > 0}
    assert reached <= {"trunk"}
    assert not any(value.requires_grad for value in stats.values())
