"""Encoder-decoder models against themselves: one row at a time, without a cache, with transformers' own labels."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import tiny
from plaudit.batch import Batch, collate
from plaudit.errors import PlauditError
from plaudit.loading import _probe, encodes, load_policy, load_tokenizer, save_pretrained
from plaudit.policy import Output, Policy
from plaudit.sampler import LocalSampler, Sampling
from plaudit.seq2seq import arrange, prompt_lengths, start_of
from plaudit.templates import Template

KINDS = ["t5", "bart"]
END = START = 256
PROMPTS = [[72, 105, 32, 116, 104, 101, 114, 101], [65], [70, 71, 72]]
MIXED = collate(
    [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[2], [9, 8]],
    [[1, 2, 3, END], [5, END], [7, 7, 7, 7, 7, 9, END], [4], []],
    groups=[0, 0, 1, 2, 3],
    actions=[[True] * 4, [True, True], [True, True, False, False, True, True, True], [True], []],
)


@lru_cache
def made(kind: str) -> Policy:
    """A float64 policy with a value head; T5's own norms would compute in float32."""
    changes = {"t5": {"initializer_factor": 2.0}, "bart": {"init_std": 0.3}}
    model = tiny.model(kind, **changes[kind])
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "T5LayerNorm":
                exact = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon)
                exact.load_state_dict(child.state_dict())
                setattr(module, name, exact)
    torch.manual_seed(7)
    policy = Policy(model.double())
    policy.value = torch.nn.Linear(policy.width, 1).double()
    _probe(policy)
    return policy


def said_of(batch: Batch, i: int) -> tuple[list[int], list[int], list[int]]:
    """(prompt, what followed it, the columns of that) of a row."""
    row = batch.tokens[i, : int(batch.lengths[i])].tolist()
    first = int(batch.actions[i].int().argmax()) if batch.actions[i].any() else len(row)
    return row[:first], row[first:], list(range(first, len(row)))


@torch.no_grad()
def alone(policy: Policy, batch: Batch) -> Output:
    """The slow reference: each row by itself through the whole model, no mask and no padding."""
    logprobs, entropy, values = (torch.zeros(batch.tokens.shape, dtype=torch.float64) for _ in range(3))
    for i in range(len(batch)):
        prompt, said, columns = said_of(batch, i)
        if not said:
            continue
        output = policy.backbone(
            input_ids=torch.tensor([prompt]),
            decoder_input_ids=torch.tensor([[START, *said[:-1]]]),
            output_hidden_states=True,
        )
        everything = output.logits[0].log_softmax(-1)
        logprobs[i, columns] = everything[range(len(said)), said]
        entropy[i, columns] = -(everything.exp() * everything).sum(-1)
        values[i, columns] = policy.value(output.decoder_hidden_states[-1][0])[:, 0]
    acts = batch.actions
    return Output(logprobs * acts, entropy * acts, values * acts)


@pytest.mark.parametrize("kind", KINDS)
def test_s1_17_logprobs_entropy_and_values_are_the_models_own(kind):
    policy = made(kind)
    assert policy.plain_head
    with torch.no_grad():
        found = policy(MIXED, entropy=True, values=True, hits=True)
    expected = alone(policy, MIXED)
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-10, rtol=0)
    assert expected.entropy[MIXED.actions].std() > 0.01
    assert found.hits.shape == MIXED.tokens.shape
    assert not found.hits[~MIXED.actions].any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_transformers_own_loss(kind):
    policy = made(kind)
    rows = [0, 1, 3]  # all of whose tokens after the prompt are learned
    batch = MIXED.rows(torch.tensor(rows))
    policy.zero_grad()
    (-policy(batch).logprobs.sum() / batch.actions.sum()).backward()
    own = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    parts = [said_of(batch, i)[:2] for i in range(len(rows))]
    ids, labels = torch.zeros(3, 8, dtype=torch.int64), torch.full((3, 4), -100)
    for i, (prompt, said) in enumerate(parts):
        ids[i, : len(prompt)], labels[i, : len(said)] = torch.tensor(prompt), torch.tensor(said)
    mask = torch.tensor([[1] * len(prompt) + [0] * (8 - len(prompt)) for prompt, _ in parts])
    # The labels are shifted by hand: their filling would stand in the decoder otherwise, as a padding token.
    shifted = torch.cat([torch.full((3, 1), START), labels[:, :-1].clamp(min=0)], 1)
    policy.backbone(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted, labels=labels).loss.backward()
    other = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert own.keys() == other.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-9, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    policy.zero_grad()


def test_b38_the_decoder_reads_the_start_and_then_the_actions():
    policy, seen = made("t5"), []
    hook = policy.backbone.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    with hook, torch.no_grad():
        policy(MIXED)
    assert prompt_lengths(MIXED).tolist() == [8, 8, 1, 3, 2]
    assert [row[:n].tolist() for row, n in zip(seen[0], (4, 2, 7, 1, 1), strict=True)] == [
        [START, 1, 2, 3], [START, 5], [START, 7, 7, 7, 7, 7, 9], [START], [START],
    ]  # fmt: skip
    layout = arrange(MIXED)
    rows, columns = MIXED.actions.nonzero(as_tuple=True)
    # What predicts column t stands, in the decoder, as many places after the start as t is columns after the prompt.
    expected = rows * layout.source.shape[1] + columns - prompt_lengths(MIXED)[rows]
    assert torch.equal(layout.where[rows, columns - 1], expected)
    assert torch.equal(layout.spread(MIXED.tokens)[0, 1:4], MIXED.tokens[0, 8:11])


# ---------------------------------------------------------------------------------------------------- invariances


def test_b26_prompts_padded_on_the_left_of_the_model_itself_give_these_logprobs():
    policy = made("t5")  # whose positions are relative
    found = policy(MIXED).logprobs
    for i in range(4):
        prompt, said, columns = said_of(MIXED, i)
        ids, mask = torch.tensor([[99] * 5 + prompt]), torch.tensor([[0] * 5 + [1] * len(prompt)])
        decoder = torch.tensor([[START, *said[:-1], 3, 3]])
        logits = policy.backbone(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits[0]
        logprobs = logits.log_softmax(-1)[range(len(said)), said] * MIXED.actions[i, columns]
        torch.testing.assert_close(found[i, columns], logprobs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_b27_what_stands_in_the_padding_does_not_matter(kind):
    policy = made(kind)
    filled = [replace(MIXED, tokens=MIXED.tokens.masked_fill(~MIXED.attention, pad)) for pad in (0, END, -100)]
    with torch.no_grad():
        one, *others = (policy(batch, entropy=True, values=True) for batch in filled)
    for other in others:
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("logprobs", "entropy", "values"))


def test_b27_an_end_that_is_also_the_start_and_the_padding_is_learned():
    policy = made("bart")
    batch = collate([[3, 4]], [[5, END]])
    logprobs = policy(replace(batch, tokens=batch.tokens)).logprobs
    assert (logprobs != 0).tolist() == [[False, False, True, True]]
    policy.zero_grad()
    logprobs[0, 3].backward()
    assert policy.backbone.lm_head.weight.grad[END].abs().sum() > 0
    policy.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_b28_a_row_alone_is_the_row_in_a_batch(kind):
    policy = made(kind)
    with torch.no_grad():
        whole = policy(MIXED, entropy=True, values=True)
        for i in range(len(MIXED)):
            row = MIXED.rows(torch.tensor([i]))
            single = policy(row, entropy=True, values=True)
            for name in ("logprobs", "entropy", "values"):
                expected = getattr(whole, name)[i : i + 1, : row.tokens.shape[1]]
                torch.testing.assert_close(getattr(single, name), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unusual_head_is_found_out_and_used_as_it_is(kind):
    policy = copy.deepcopy(made(kind))
    if kind == "bart":
        policy.backbone.final_logits_bias += torch.linspace(0, 3, 257)
    else:
        policy.backbone.model_dim = 4  # a scale that no config tells of
    _probe(policy)
    assert not policy.plain_head
    expected = alone(policy, MIXED)
    found = policy(MIXED, entropy=True, values=True, hits=True)
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-10, rtol=0)


# ---------------------------------------------------------------------------------------------------- sampling


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(model, prompt, said, temperature=1.0) -> Tensor:
    """(t, V) log-probabilities where `said` stands, in one pass without a cache."""
    with torch.no_grad():
        decoder = torch.tensor([[START, *said[:-1]]])
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0].double()
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_b36_sampled_logprobs_are_the_learners(kind, temperature):
    model = tiny.model(kind)
    policy = Policy(model)
    policy.temperature = temperature
    sampling = Sampling(16, temperature=temperature, stop_ids=tuple(range(0, END, 9)))
    found = LocalSampler(model).sample(PROMPTS, sampling, 4, seeded())
    assert len({len(row) for row in found.completions}) > 3
    batch = collate([prompt for prompt in PROMPTS for _ in range(4)], found.completions)
    with torch.no_grad():
        learned = policy(batch).logprobs
    for i, (said, logprobs) in enumerate(zip(found.completions, found.logprobs, strict=True)):
        exact = scores(model, PROMPTS[i // 4], said, temperature)[range(len(said)), said]
        np.testing.assert_allclose(logprobs, exact, atol=1e-4)
        np.testing.assert_allclose(logprobs, learned[i][batch.actions[i]], atol=1e-4)


@pytest.mark.parametrize("compact", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_slow_loop_says_the_same(kind, compact):
    model = made(kind).backbone
    sampling = Sampling(9, temperature=0.8, stop_ids=tuple(range(0, END, 6)))
    found = LocalSampler(model, compact=compact, rows=7).sample(PROMPTS, sampling, 5, seeded(3))
    uniforms = torch.rand(15, 9, dtype=torch.float64, generator=seeded(3))
    for i, said in enumerate(found.completions):
        row: list[int] = []
        for step in range(9):
            probabilities = scores(model, PROMPTS[i // 5], [*row, 0], 0.8)[-1].exp()
            row.append(int((probabilities.cumsum(0) <= uniforms[i, step]).sum()))
            if row[-1] in sampling.stop_ids:
                break
        assert said == row
        assert found.truncated[i] == (row[-1] not in sampling.stop_ids)
    assert len({len(said) for said in found.completions}) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_generate(kind):
    model = tiny.model(kind)
    found = LocalSampler(model).sample(PROMPTS, Sampling(12, temperature=0, stop_ids=(END,)), 1, seeded())
    for prompt, said in zip(PROMPTS, found.completions, strict=True):
        row = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)[0, 1:].tolist()
        assert said == row


def test_a_prompt_is_encoded_once_for_all_its_completions():
    model = tiny.model("t5")
    shapes = []
    model.encoder.block[0].register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape)))
    LocalSampler(model).sample([*PROMPTS, PROMPTS[0]], Sampling(6), 4, seeded())
    assert [shape[:2] for shape in shapes] == [(3, 8)]


def test_encoder_and_decoder_have_a_context_each():
    sampler = LocalSampler(tiny.model("bart"))
    assert len(sampler.sample([[5] * 64], Sampling(64), 1, seeded()).completions[0]) == 64
    for prompt, new in (([5] * 65, 2), ([5], 65)):
        with pytest.raises(PlauditError, match=r"prompt 0 has .* but the model's context is 64"):
            sampler.sample([prompt], Sampling(new), 1, seeded())


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.folder(tmp_path_factory.mktemp("models") / "t5", "t5")


def step(policy: Policy) -> None:
    optimizer = torch.optim.AdamW(policy.learning().values(), lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        policy(MIXED).logprobs.sum().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("rank", [0, 2])
def test_b35_saved_folders_open_in_plain_transformers_and_the_reference_stays(folder, tmp_path, rank):
    assert encodes(folder)
    policy = load_policy(folder, lora_rank=rank, value_head=True)
    policy.keep_reference()
    with torch.no_grad():
        begun = policy(MIXED).logprobs
        assert torch.equal(begun, load_policy(folder)(MIXED).logprobs)
    step(policy)
    with torch.no_grad():
        expected = policy(MIXED).logprobs
        with policy.as_reference():
            assert torch.equal(policy(MIXED).logprobs, begun)
    assert (expected - begun).abs().max() > 0.1
    save_pretrained(policy, load_tokenizer(folder), tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)
    for i in range(4):
        prompt, said, columns = said_of(MIXED, i)
        logprobs = scores(model, prompt, said)[range(len(said)), said] * MIXED.actions[i, columns]
        torch.testing.assert_close(expected[i, columns].double(), logprobs, atol=1e-5, rtol=0)
    again = load_policy(str(tmp_path), value_head=True)
    torch.testing.assert_close(again(MIXED).logprobs, expected, atol=1e-5, rtol=0)


def test_what_an_encoder_decoder_cannot_do_is_told(folder):
    with pytest.raises(PlauditError, match="train_layers: an encoder-decoder model has two stacks"):
        load_policy(folder, train_layers=1)
    model = tiny.model("t5", decoder_start_token_id=None)
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(PlauditError, match="no decoder_start_token_id"):
        start_of(model)


def test_an_encoder_gets_the_token_that_its_tokenizer_closes_texts_with():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.tokenizer(chat=False)
    assert Template(tokenizer, encodes=True).closing == []  # it closes none
    closing = TemplateProcessing(single=f"$A {tiny.END}", special_tokens=[(tiny.END, END)])
    tokenizer.backend_tokenizer.post_processor = closing
    own = tokenizer("ab").input_ids
    assert own[-1] == END
    template = Template(tokenizer, encodes=True)
    assert template.prompt("ab") == template.prompt(f"ab{tiny.END}") == own
    assert template.prompt("") == [END]
    assert template.encode("ab", "c").prompt == own
    assert template.encode("ab", "c").completion == [*own[:0], *tokenizer("c").input_ids]
    assert Template(tokenizer).prompt("ab") == own[:-1]
