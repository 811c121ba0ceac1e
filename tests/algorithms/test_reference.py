"""A policy that is held to another model than the one it begins with."""

from __future__ import annotations

import pytest
import torch

import tiny
from plaudit import PPO, PlauditError, train
from plaudit.batch import collate
from plaudit.comparing import total_logprobs
from plaudit.loading import load_policy
from plaudit.settings import OnlineDPO
from plaudit.world import World

SHORT = {
    "data": "prompts.jsonl",
    "rewards": "count:e",
    "precision": "float32",
    "holdout": 0.0,
    "steps": 2,
    "rollout": 4,
    "batch_size": 4,
    "max_new_tokens": 4,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("first", 0), ("second", 1)):
        tiny.folder(tmp_path / name, seed=seed, chat=False)
    tiny.folder(tmp_path / "wide", chat=False, intermediate_size=96)
    # As a run with train_layers=1 would leave it: the lower layer is that of `first`.
    upper = load_policy("first")
    with torch.no_grad():
        for parameter in list(upper.backbone.base_model.layers[1].parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    upper.backbone.save_pretrained(tmp_path / "upper")
    tiny.tokenizer(chat=False).save_pretrained(tmp_path / "upper")
    tiny.lines(tmp_path / "prompts.jsonl", [{"prompt": f"say {word}"} for word in ("one", "two", "three", "four")])
    return tmp_path


@pytest.mark.parametrize("train_layers", [0, 1])
def test_the_reference_is_the_other_model_whether_all_layers_learn_or_few(here, train_layers):
    policy, other = (load_policy(name, train_layers=train_layers) for name in ("upper", "first"))
    policy.keep_reference(other)
    policy.keep_reference()  # as algorithms do: what was given stays
    batch = collate([[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10]])
    world = World.start(device="cpu")
    with policy.as_reference():
        kept = total_logprobs(policy, batch, world, 4096)
    torch.testing.assert_close(kept, total_logprobs(load_policy("first"), batch, world, 4096), rtol=0, atol=1e-5)
    assert (kept - total_logprobs(policy, batch, world, 4096)).abs().min() > 1e-2
    assert not policy.begins_at_reference


def test_the_divergence_begins_where_the_two_models_are_apart(here):
    own = train(PPO(model="second", output="own", **SHORT))
    apart = train(PPO(model="second", reference="first", output="apart", **SHORT))
    kl = [[row["kl"] for row in run.metrics() if "kl" in row] for run in (own, apart)]
    assert kl[0][0] == pytest.approx(0, abs=1e-4)
    assert abs(kl[1][0]) > 0.02
    # Online DPO is held to it too, and another reference teaches another thing.
    same = train(OnlineDPO(model="second", output="dpo", **SHORT))
    other = train(OnlineDPO(model="second", reference="first", output="dpo-apart", **SHORT))
    assert abs(other.metrics()[0]["kl"]) > 0.02
    assert same.metrics()[0]["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reference": "wide"}, r"reference: it is a model of another make \(.*mlp.* differs\): take one of the same"),
        (
            {"reference": "second", "train_layers": 1},
            r"does not learn here \(train_layers\), and yet is another in",
        ),
        ({"reference": "first", "lora_rank": 2}, r"reference: an adapter is held to the model that it was put on"),
        ({"reference": "./gone"}, r"there is no folder './gone'"),
    ],
)
def test_what_cannot_be_a_reference_is_refused(here, changes, sentence):
    with pytest.raises(PlauditError, match=sentence):
        train(PPO(model="first", output="out", **SHORT, **changes))
