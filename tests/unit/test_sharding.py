"""Weights spread over a mesh of one process: made whole, cut again, and passes that are made for others' sake."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import examples
import tiny
from plaudit import recipes
from plaudit.algorithms.base import Algorithm
from plaudit.batch import collate
from plaudit.decoding import Shadow
from plaudit.errors import PlauditError
from plaudit.loading import load_policy
from plaudit.sharding import assembled, gathered, is_sharded, part_like, spread_moments
from plaudit.world import World


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("sharding") / "model")


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(folder, mesh, **changes):
    """A policy and the same policy sharded, layer by layer."""
    plain, policy = (load_policy(folder, **changes) for _ in range(2))
    for layer in policy.base.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    policy.set_reshard_after_forward(True)
    return plain, policy


@pytest.mark.parametrize("way", [{}, {"lora_rank": 2}])
def test_a_policy_made_whole_answers_as_it_did_before_it_was_sharded(folder, mesh, way):
    plain, policy = sharded(folder, mesh, **way)
    batch = collate([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]])
    expected = plain(batch).logprobs
    torch.testing.assert_close(policy(batch).logprobs, expected)
    assert all(map(is_sharded, policy.parameters()))
    whole = policy.whole()
    assert not any(map(is_sharded, whole.parameters()))
    assert [type(module) for module in whole.modules()] == [type(module) for module in plain.modules()]
    embeddings, head = whole.backbone.get_input_embeddings(), whole.backbone.get_output_embeddings()
    assert embeddings.weight is head.weight  # tied
    assert {name for name, _ in whole.learning().items()} == {name for name, _ in plain.learning().items()}
    torch.testing.assert_close(copy.deepcopy(whole)(batch).logprobs, expected)
    if way:
        assert copy.deepcopy(whole.adapter).base_model.model.model.layers[0] is not policy.base.layers[0]
    assert Shadow(policy.backbone).module.get_output_embeddings().weight.shape == head.weight.shape
    assert plain.whole() is plain
    assert assembled(plain.backbone) is plain.backbone


def test_what_is_gathered_and_cut_again_is_what_it_was(mesh):
    model = nn.Linear(3, 5)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    before = [parameter.full_tensor().detach().clone() for parameter in model.parameters()]
    tree = gathered({"weights": list(model.parameters()), "optimizer": optimizer.state_dict(), "other": 1}, keep=True)
    moments = copy.deepcopy(tree["optimizer"])  # a mesh of one gathers what it holds
    assert not is_sharded(tree["optimizer"]["state"][0]["exp_avg"])
    assert tree["other"] == 1
    assert gathered({"weights": list(model.parameters())}, keep=False) == {"weights": [None, None]}
    optimizer.step()
    after = [parameter.full_tensor().detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, kept in zip(model.parameters(), before, strict=True):
            parameter.copy_(part_like(kept, parameter))
    optimizer.load_state_dict(spread_moments(moments, optimizer))
    optimizer.step()
    for parameter, expected in zip(model.parameters(), after, strict=True):
        assert torch.equal(parameter.full_tensor(), expected)


class Busier(World):
    """A process beside one that always makes two passes more, where every pass is an exchange."""

    lockstep = True

    def maximum(self, value):
        return value + torch.tensor([2, 0]) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("kind", ["sft", "comparisons", "ppo"])
def test_passes_for_the_sake_of_others_change_no_bit(kind, tmp_path, monkeypatch):
    at = examples.place(tmp_path / "place")
    passes, made = Algorithm.passes, []

    def noted(algorithm, batch):
        parts = passes(algorithm, batch)
        made.append([places is None for _, places in parts])
        return parts

    still = {"dropout": False} if kind in ("sft", "comparisons") else {}  # passes with dropout draw numbers
    plain = recipes.train(examples.settings(kind, at, tmp_path / "plain", **still))
    monkeypatch.setattr(Algorithm, "passes", noted)
    monkeypatch.setattr(
        World, "start", classmethod(lambda cls, precision="float32", device=None: Busier(torch.device("cpu")))
    )
    busier = recipes.train(examples.settings(kind, at, tmp_path / "busier", **still))
    assert made
    assert all(repeats[-2:] == [True, True] and not any(repeats[:-2]) for repeats in made)
    timed = {"time/seconds", "time/tokens_per_second"}
    for one, other in zip(plain.metrics(), busier.metrics(), strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    weights = [(run.final / "model.safetensors").read_bytes() for run in (plain, busier)]
    assert weights[0] == weights[1]


def test_a_process_without_rows_is_told_of(folder):
    class Idle(Algorithm):
        pass

    algorithm = Idle(load_policy(folder), Busier(torch.device("cpu")), 64)
    batch = collate([[1, 2]], [[3]])
    assert [len(part) for part, _ in algorithm.passes(batch)] == [1, 1, 1]
    with pytest.raises(PlauditError, match="batch_size: one of 1 processes has no rows of a batch"):
        algorithm.passes(batch.rows(torch.arange(0)))
