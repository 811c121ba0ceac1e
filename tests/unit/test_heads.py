"""Heads over tokens: against whole matrices, as targets follow, and as they guide decoding."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from plaudit import PlauditError, Sample, sample
from plaudit.batch import collate
from plaudit.heads import ActionHeads
from plaudit.loading import load_policy, load_tokenizer, save_pretrained
from plaudit.sampler import LocalSampler, Sampling

TOKENS = torch.tensor([3, 0, 10, 7])


def scattered(heads: ActionHeads, seed: int = 0, size: float = 0.3) -> ActionHeads:
    """The same heads with random weights, those of the targets too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return heads


def states(count: int = 4, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def whole(head, x):
    """A head's outputs for all tokens, written out."""
    inner = (x @ head.into.weight.T + head.into.bias).clamp(min=0)
    return inner @ head.out.weight.T + head.out.bias


def test_b20_heads_say_what_whole_matrices_say():
    heads, x = scattered(ActionHeads(6, 11)).double(), states()
    found = heads(x, TOKENS)
    rows = torch.arange(4)
    q = [whole(head, x) for head in heads.q]
    target = torch.minimum(*(whole(head, x) for head in heads.target))
    assert not torch.equal(whole(heads.target[0], x) < whole(heads.target[1], x), torch.ones(4, 11, dtype=torch.bool))
    torch.testing.assert_close(found.q, torch.stack([each[rows, TOKENS] for each in q], 1))
    expected = torch.stack([each.log_softmax(1)[rows, TOKENS] for each in q], 1)
    torch.testing.assert_close(found.q_logprobs, expected)
    torch.testing.assert_close(found.target_q, target[rows, TOKENS])
    torch.testing.assert_close(found.values, whole(heads.v, x)[:, 0])
    torch.testing.assert_close(heads.advantages(x), target - whole(heads.v, x))


def test_b25_what_learns_is_q_and_v_and_the_states_beneath():
    heads, x = scattered(ActionHeads(6, 11)).double(), states().requires_grad_()
    found = heads(x, TOKENS)
    assert not found.target_q.requires_grad
    (found.q.sum() + found.q_logprobs.sum() + found.values.sum()).backward()
    assert x.grad.abs().min() > 0
    reached = {name for name, p in heads.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in heads.named_parameters() if not name.startswith("target.")}


def test_before_anything_is_learned_nothing_is_worth_more_than_anything_else():
    heads = ActionHeads(6, 11)
    found = heads(states().float(), TOKENS)
    assert found.q.tolist() == [[0.0, 0.0]] * 4
    assert found.values.tolist() == [0.0] * 4
    torch.testing.assert_close(found.q_logprobs, torch.full((4, 2), -torch.tensor(11.0).log().item()))
    assert heads.advantages(states().float()).abs().max() == 0
    assert not torch.equal(heads.q[0].into.weight, heads.q[1].into.weight)  # or two heads would be one


def test_b20_polyak_steps_are_exact():
    heads = scattered(ActionHeads(6, 11)).double()
    before = [p.clone() for p in heads.target.parameters()]
    sources = [p.clone() for p in heads.q.parameters()]
    heads.follow(0.25)
    for target, old, source in zip(heads.target.parameters(), before, sources, strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * source, rtol=0, atol=1e-15)
    assert all(torch.equal(p, s) for p, s in zip(heads.q.parameters(), sources, strict=True))
    heads.follow(1.0)
    assert all(map(torch.equal, heads.target.parameters(), heads.q.parameters()))


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A saved model with heads, and the policy that was saved."""
    folder = tmp_path_factory.mktemp("guided")
    name = tiny.folder(folder / "model")
    policy = load_policy(name, action_heads=True)
    scattered(policy.heads)
    (folder / "final").mkdir()
    save_pretrained(policy, load_tokenizer(name), folder / "final")
    return str(folder / "final"), policy


def test_saved_heads_lie_beside_a_model_that_opens_as_ever(guided):
    folder, policy = guided
    AutoModelForCausalLM.from_pretrained(folder)
    again = load_policy(folder, action_heads=True)
    for kept in ("target", "v"):
        torch.testing.assert_close(getattr(again.heads, kept).state_dict(), getattr(policy.heads, kept).state_dict())
    torch.testing.assert_close(again.heads.q.state_dict(), policy.heads.target.state_dict())
    assert not any(name.startswith("q.") for name in load_file(f"{folder}/ilql_heads.safetensors"))
    assert {name for name in again.learning() if name.startswith("heads.")} == {
        f"heads.{name}" for name, _ in policy.heads.named_parameters() if not name.startswith("target.")
    }
    assert load_policy(folder).heads is None


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_b20_guided_samples_have_the_log_probabilities_of_the_tilted_policy(guided, temperature):
    folder, policy = guided
    model = AutoModelForCausalLM.from_pretrained(folder)
    policy.temperature, policy.guidance = temperature, 3.0
    prompts = [[5, 6, 7], [8]]
    sampler = LocalSampler(policy.backbone, guide=policy.guide)
    drawn = sampler.sample(prompts, Sampling(6, temperature, stop_ids=(256,)), 2, torch.Generator().manual_seed(0))
    plain = LocalSampler(policy.backbone).sample(prompts, Sampling(6), 2, torch.Generator().manual_seed(0))
    assert drawn.completions != plain.completions
    asked = [prompt for prompt in prompts for _ in range(2)]
    batch = collate(asked, drawn.completions)
    with torch.no_grad():
        recomputed = policy(batch, entropy=True)
        for row, (prompt, said) in enumerate(zip(asked, drawn.completions, strict=True)):
            output = model(torch.tensor([prompt + said]), output_hidden_states=True)
            hidden = output.hidden_states[-1][0]
            lowest = torch.minimum(*(whole(head, hidden) for head in policy.heads.target))
            tilted = output.logits[0].log_softmax(1) + 3.0 * (lowest - whole(policy.heads.v, hidden))
            by_hand = (tilted / temperature).log_softmax(1)
            places = range(len(prompt) - 1, len(prompt) + len(said) - 1)
            expected = [by_hand[place, token].item() for place, token in zip(places, said, strict=True)]
            assert drawn.logprobs[row] == pytest.approx(expected, abs=1e-4)
            assert recomputed.logprobs[row][batch.actions[row]].tolist() == pytest.approx(expected, abs=1e-4)
            entropy = -(by_hand.exp() * by_hand).sum(1)[list(places)]
            torch.testing.assert_close(recomputed.entropy[row][batch.actions[row]], entropy, rtol=1e-4, atol=1e-4)
    policy.temperature, policy.guidance = 1.0, 0.0
    assert policy.guide is None


def test_sample_is_guided_when_told_and_only_a_model_with_heads_can_be(guided, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _ = guided
    data = tiny.lines(tmp_path / "prompts.jsonl", [{"prompt": f"{i}"} for i in range(3)])
    said = []
    for beta in (0.0, 0.0, 5.0):
        output = tmp_path / f"{len(said)}.jsonl"
        common = {"data": data, "precision": "float32", "max_new_tokens": 8, "output": str(output)}
        sample(Sample(model=folder, ilql_beta=beta, **common))
        said.append([json.loads(line)["completion"] for line in output.read_text().splitlines()])
    assert said[0] == said[1] != said[2]
    with pytest.raises(PlauditError, match=r"ilql_beta: .* has no ilql_heads\.safetensors to be guided by: take the"):
        sample(Sample(model=tiny.folder(tmp_path / "plain"), ilql_beta=1.0, **{**common, "output": "x.jsonl"}))
