"""Activations that are computed again change no bit and take less memory (B34)."""

import pytest
import torch

import examples
import plaudit.backbone
from plaudit.trainer import Trainer

CASES = {
    "llama": ("sft", {"model": "model"}),
    "llama-lora": ("sft", {"model": "model", "lora_rank": 2}),
    "llama-top": ("sft", {"model": "model", "train_layers": 1}),
    "gpt2": ("sft", {"model": "dropping", "dropout": False}),
    "gpt2-lora": ("sft", {"model": "dropping", "dropout": False, "lora_rank": 2}),
    "gpt2-dropping": ("sft", {"model": "dropping"}),
    "t5-dropping": ("sft", {"model": "encdec"}),
    "bert-dropping": ("binary", {}),
    "reference": ("dpo", {}),
    "adapted reference": ("dpo", {"lora_rank": 2}),
    "rollout": ("ppo", {}),
    "frozen trunk": ("ppo", {"train_layers": 1}),
}


def learned(kind, at, output, **changes):
    """The gradients of a first batch, its figures, and how many bytes the forward pass kept."""
    if "model" in changes:
        changes["model"] = str(at / changes["model"])
    settings = examples.settings(kind, at, output, tokens_per_pass=10**6, **changes)
    torch.manual_seed(3)
    algorithm = examples.built(settings)
    batches = algorithm.batches()
    batch = next(batches)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in algorithm.policy.learning().values():  # away from the reference, and from adapters of zeros
            parameter += 0.1 * torch.randn_like(parameter)
    batch = batch if kind == "ppo" else next(batches)
    trainer = Trainer(None, algorithm.world, settings)
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer._gradients(algorithm, batch)
    return {name: p.grad for name, p in algorithm.policy.learning().items()}, trainer.figures, kept


@pytest.mark.parametrize("case", CASES)
def test_b34_computing_activations_again_changes_no_bit_and_keeps_less(case, at, tmp_path):
    kind, changes = CASES[case]
    plain = learned(kind, at, tmp_path / "plain", **changes)
    again = learned(kind, at, tmp_path / "again", gradient_checkpointing=True, **changes)
    assert again[1] == plain[1]
    assert again[0].keys() == plain[0].keys()
    assert sum(float(grad.abs().sum()) for grad in plain[0].values() if grad is not None) > 1e-3
    for name, grad in plain[0].items():
        same = again[0][name] is None if grad is None else torch.equal(again[0][name], grad)
        assert same, name
    assert again[2] < 0.6 * plain[2]


def test_b34_passes_without_gradients_take_no_notice(at, tmp_path, monkeypatch):
    algorithm = examples.built(examples.settings("ppo", at, tmp_path / "run", gradient_checkpointing=True))
    entered = []

    def counting(forward, *args, use_reentrant, **kwargs):
        entered.append(forward)
        return forward(*args, **kwargs)

    monkeypatch.setattr(plaudit.backbone, "checkpoint", counting)
    batch = next(algorithm.batches())  # sampling, scoring, the reference
    assert not entered
    algorithm.loss(batch)
    assert len(entered) == 2  # layers
