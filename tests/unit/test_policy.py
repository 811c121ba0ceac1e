"""The policy against the model's own logits, one row at a time; and its reference, which never moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

import tiny
from plaudit import layout
from plaudit.backbone import layers_of, tail_of
from plaudit.batch import Batch, collate
from plaudit.errors import PlauditError
from plaudit.loading import _probe, load_policy
from plaudit.policy import Output, Policy
from plaudit.templates import Template

KINDS = ["llama", "gpt2", "qwen2"]
LAYOUTS = [layout.padded, layout.arrange, layout.shared, layout.side_by_side]
FAMILIES = st.lists(
    st.tuples(
        st.lists(st.integers(0, 256), min_size=1, max_size=6),
        st.lists(st.lists(st.integers(0, 256), max_size=5), min_size=1, max_size=5),
    ),
    min_size=1,
    max_size=3,
)


def exact(model):
    """The model in float64, norms included: those of transformers compute in float32 whatever they are given."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon))
                getattr(module, name).load_state_dict(child.state_dict())
                getattr(module, name).requires_grad_(child.weight.requires_grad)
    return model.double()


@lru_cache
def made(kind: str) -> Policy:
    """A float64 policy, far from uniform, with a value head that says something."""
    policy = exact(Policy(tiny.model(kind, initializer_range=0.3)))
    policy.value = torch.nn.Linear(policy.width, 1).double()
    return policy


@lru_cache
def scorer(kind: str) -> Policy:
    """The same as a reward model."""
    torch.manual_seed(3)
    config = tiny.config(kind, num_labels=1, initializer_range=0.3)
    return exact(Policy(AutoModelForSequenceClassification.from_config(config).eval()))


@contextmanager
def laid(policy: Policy, lay: Callable[[Batch, int], layout.Layout]) -> Iterator[Policy]:
    """Inside, the policy lays its rows out in this way only."""
    policy.layout = lambda batch: lay(batch, policy.width)
    try:
        yield policy
    finally:
        del policy.layout


def batch_of(families: list) -> Batch:
    prompts = [prompt for prompt, completions in families for _ in completions]
    answers = [completion for _, completions in families for completion in completions]
    return collate(prompts, answers, [i for i, (_, completions) in enumerate(families) for _ in completions])


def drawn(*sizes: tuple[int, tuple[int, ...]], seed: int = 0) -> Batch:
    """Groups given as (prompt length, completion lengths), their tokens at random."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, 257, (n,), generator=generator).tolist()

    return batch_of([(tokens(prompt), [tokens(n) for n in answers]) for prompt, answers in sizes])


MIXED = drawn((5, (4, 1, 7)), (1, (3,)), (9, (2, 2)), (3, (0, 5, 6, 1, 2)))


@torch.no_grad()
def alone(policy: Policy, batch: Batch, temperature: float = 1.0) -> Output:
    """The slow reference: the whole model, one row at a time, and the plain definitions."""
    shape = batch.tokens.shape
    logprobs, entropy, values = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for i, length in enumerate(batch.lengths.tolist()):
        output = policy.backbone(batch.tokens[i : i + 1, :length], output_hidden_states=True)
        everything = (output.logits[0].double() / temperature).log_softmax(-1)
        logprobs[i, 1:length] = everything[:-1].gather(1, batch.tokens[i, 1:length, None])[:, 0]
        entropy[i, 1:length] = -(everything.exp() * everything).sum(-1)[:-1]
        if policy.value is not None:
            values[i, 1:length] = policy.value(output.hidden_states[-1][0, :-1])[:, 0].double()
    acts = batch.actions
    return Output(logprobs * acts, entropy * acts, values * acts)


def gradients(policy: Policy, batch: Batch) -> dict[str, Tensor]:
    """Of a sum that weighs each action differently."""
    policy.zero_grad()
    output = policy(batch, entropy=True, values=policy.value is not None)
    weights = torch.linspace(-1, 2, batch.tokens.numel(), dtype=torch.float64).view(batch.tokens.shape)
    total = (weights * (output.logprobs + 0.3 * output.entropy)).sum()
    if output.values is not None:
        total = total + (weights * output.values).square().sum()
    total.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=atol, rtol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


# -------------------------------------------------------------------------------------- what the model itself says


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("lay", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_B33_logprobs_entropy_and_values_are_the_models_own(kind, lay, temperature):
    policy = made(kind)
    expected = alone(policy, MIXED, temperature)
    policy.temperature = temperature
    with laid(policy, lay), torch.no_grad():
        found = policy(MIXED, entropy=True, values=True)
    policy.temperature = 1.0
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-10, rtol=0)
    assert found.scores is None


@given(FAMILIES, st.sampled_from(KINDS))
@settings(max_examples=40, deadline=None)
def test_B32_every_layout_gives_the_same_numbers(families, kind):
    batch = batch_of(families)
    for policy, asked in ((made(kind), {"entropy": True, "values": True}), (scorer(kind), {"logprobs": False})):
        outputs = []
        for lay in LAYOUTS:
            with laid(policy, lay), torch.no_grad():
                outputs.append(policy(batch, **asked, scores=policy is scorer(kind)))
        for output in outputs[1:]:
            for name, tensor in output._asdict().items():
                if tensor is not None:
                    torch.testing.assert_close(tensor, getattr(outputs[0], name), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_B32_packed_and_shared_gradients_are_the_padded_ones(kind):
    policy = made(kind)
    with laid(policy, layout.padded):
        expected = gradients(policy, MIXED)
    assert len(expected) == len(list(policy.parameters()))
    for lay in (layout.arrange, layout.shared):
        with laid(policy, lay):
            assert_close(gradients(policy, MIXED), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_shared_prompt_is_a_plain_prompt(kind, size):
    policy = made(kind)
    batches = [
        drawn((6, tuple(range(1, size + 1))), seed=size),
        drawn((1, tuple(range(size, 0, -1))), (4, (3, 0)), seed=size),
        batch_of([([7, 8, 9], [[3, 3]] * size)]),  # identical rows
        batch_of([([7, 8, 9], [[]] * size), ([1], [[2, 3]] * size)]),  # without actions, beside others with
    ]
    for batch in batches:
        with laid(policy, layout.padded):
            plain = gradients(policy, batch)
        with laid(policy, layout.shared), torch.no_grad():
            found = policy(batch, entropy=True, values=True)
        expected = alone(policy, batch)
        for name in ("logprobs", "entropy", "values"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-10, rtol=0)
        with laid(policy, layout.shared):
            assert_close(gradients(policy, batch), plain)


def test_pairs_that_share_a_beginning_are_scored_as_if_alone():
    policy = scorer("llama")
    rows = [[5, 6, 7, 8], [5, 6, 9], [1, 2], [1, 2], [3], [3, 4]]
    batch = collate(rows, [[]] * 6, groups=[0, 0, 1, 1, 2, 2])
    weight = policy.backbone.score.weight[0]
    with laid(policy, layout.shared):
        assert len(policy.layout(batch).where[batch.attention].unique()) == int(batch.lengths.sum()) - 3
        scores = policy(batch, logprobs=False, scores=True).scores
    singly = [policy.base(torch.tensor([row])).last_hidden_state[0, -1] @ weight for row in rows]
    torch.testing.assert_close(scores, torch.stack(singly), atol=1e-10, rtol=0)


# ---------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_B26_padding_on_either_side_of_the_model_itself_gives_these_logprobs_values_and_scores(kind, side):
    policy, judge, batch = made(kind), scorer(kind), MIXED
    found = policy(batch, values=True)
    scores = judge(batch, logprobs=False, scores=True).scores
    width = batch.tokens.shape[1]
    for i, length in enumerate(batch.lengths.tolist()):
        gap = width - length if side == "left" else 0
        tokens, mask = torch.full((1, width), 99), torch.zeros(1, width, dtype=torch.int64)
        tokens[0, gap : gap + length] = batch.tokens[i, :length]
        mask[0, gap : gap + length] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        given, row = {"attention_mask": mask, "position_ids": positions}, slice(gap, gap + length)
        output = policy.backbone(tokens, output_hidden_states=True, **given)
        logprobs = output.logits[0, row].log_softmax(-1)[:-1].gather(1, batch.tokens[i, 1:length, None])[:, 0]
        values = policy.value(output.hidden_states[-1][0, row])[:-1, 0]
        acting = batch.actions[i, 1:length]
        torch.testing.assert_close(found.logprobs[i, 1:length][acting], logprobs[acting], atol=1e-10, rtol=0)
        torch.testing.assert_close(found.values[i, 1:length][acting], values[acting], atol=1e-10, rtol=0)
        last = judge.base(tokens, **given).last_hidden_state[0, gap + length - 1]
        torch.testing.assert_close(scores[i], judge.backbone.score(last)[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_B27_what_stands_in_the_padding_does_not_matter(kind):
    for policy, asked in ((made(kind), {"entropy": True, "values": True}), (scorer(kind), {"logprobs": False})):
        for lay in LAYOUTS:
            with laid(policy, lay), torch.no_grad():
                outputs = [
                    policy(replace(MIXED, tokens=MIXED.tokens.masked_fill(~MIXED.attention, pad)), **asked)
                    for pad in (0, 256, -100)
                ]
            for output in outputs[1:]:
                for name, tensor in output._asdict().items():
                    assert tensor is None or torch.equal(tensor, getattr(outputs[0], name))


def test_B27_an_end_token_that_is_also_the_padding_is_learned():
    end = 256
    policy = made("llama")
    batch = collate([[1, 2], [1, 2]], [[3, end], [3, 4, 5, end]], groups=[0, 1])
    batch = replace(batch, tokens=batch.tokens.masked_fill(~batch.attention, end))
    logprobs = policy(batch).logprobs
    assert (logprobs != 0).sum(1).tolist() == [2, 4]
    logprobs[0, 3].backward()
    assert policy.backbone.lm_head.weight.grad[end].abs().sum() > 0
    policy.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
def test_B28_a_row_alone_is_the_row_in_a_batch(kind):
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
def test_B32_one_document_never_changes_another_in_the_last_bit(kind):
    policy = made(kind)
    batch = drawn((4, (5, 3)), (6, (4,)), (1, (2, 6, 3)), seed=1)
    changed = batch.tokens.clone()
    changed[0, 5:9] = (changed[0, 5:9] + 11) % 257  # a completion whose sister hangs from the same prompt
    changed[2, :10] = (changed[2, :10] + 7) % 257  # a whole row, packed beside others
    other = replace(batch, tokens=changed)
    with laid(policy, layout.shared), torch.no_grad():
        assert len(policy.layout(batch).source) == 3  # of six: they do stand in the same physical rows
        assert torch.equal(policy.layout(batch).source, policy.layout(other).source)
        one, two = (policy(b, entropy=True, values=True) for b in (batch, other))
    kept = [1, 3, 4, 5]
    for name in ("logprobs", "entropy", "values"):
        assert torch.equal(getattr(one, name)[kept], getattr(two, name)[kept])
        assert not torch.equal(getattr(one, name)[2], getattr(two, name)[2])


def test_B32_nor_does_gradient_leak_between_documents():
    policy = made("llama")
    batch = drawn((4, (5, 3)), (6, (4,)), seed=1)
    caught = []
    hook = policy.base.embed_tokens.register_forward_hook(lambda module, args, out: caught.append(out))
    with hook, laid(policy, layout.shared):
        where = policy.layout(batch).where
        logprobs = policy(batch).logprobs
    (gradient,) = torch.autograd.grad(logprobs[0].sum(), caught)
    reached = gradient.flatten(0, 1).abs().sum(1).nonzero().squeeze(1).tolist()
    assert sorted(reached) == sorted(where[0, : batch.lengths[0] - 1].tolist())  # the last token predicts nothing


def test_the_chosen_layout_has_fewer_tokens_where_that_helps():
    policy = made("llama")
    batch = drawn((40, (3, 3, 3, 3)))
    assert policy.layout(batch).source.numel() == 52
    assert policy.layout(batch).mask is not None
    assert layout.padded(batch, policy.width).source.numel() == 172


# ------------------------------------------------------------------------------------------------- unusual models


def family(kind: str, **changes) -> Policy:
    """A policy of another architecture, in float64, looked through as a loaded one is."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "eos_token_id": 256,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(kind, **{**shape, **changes})
    for attention in ("sdpa", "eager"):
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            break
        except ValueError:
            continue
    policy = Policy(model.eval().double())
    _probe(policy)
    return policy


def assert_own(policy: Policy, batch: Batch, atol: float = 1e-6) -> None:
    expected = alone(policy, batch)
    with torch.no_grad():
        found = policy(batch, entropy=True)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=atol, rtol=0)
    torch.testing.assert_close(found.entropy, expected.entropy, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0, "sliding_window": 64}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
    ],
)
def test_B33_scaled_and_capped_heads(kind, changes):
    policy = family(kind, **changes)
    assert policy.plain_head
    assert policy.rearranges
    assert_own(policy, MIXED)
    expected = alone(policy, MIXED, 0.5).logprobs
    policy.temperature = 0.5
    torch.testing.assert_close(policy(MIXED).logprobs, expected, atol=1e-6, rtol=0)


def test_a_sliding_window_is_respected():
    policy = family("mistral", sliding_window=12)
    inside, beyond = drawn((8, (3, 4, 2, 1))), drawn((8, (3, 4, 2, 6)))
    assert policy.rearranges
    assert policy.window == 12
    assert policy.layout(inside).mask is not None
    assert policy.layout(inside).source.shape[1] > 12  # rows are within the window, what they share is not
    assert policy.layout(beyond).mask is None
    for batch in (inside, beyond):
        assert_own(policy, batch, 1e-10)


def test_chunked_attention_is_respected():
    moe = {"num_local_experts": 1, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 4}
    kinds = ["chunked_attention", "full_attention"]
    policy = family("llama4_text", attention_chunk_size=12, layer_types=kinds, initializer_range=0.1, **moe)
    assert policy.window == 12
    for batch in (drawn((8, (3, 4, 2, 1))), drawn((8, (3, 4, 2, 6)))):
        assert_own(policy, batch, 1e-5)


def test_windows_that_count_places_in_memory_keep_rows_apart():
    shape = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
    policy = family("gpt_neo", **shape)
    assert not policy.rearranges
    assert_own(policy, drawn((5, (9, 2, 12)), (1, (7, 3))))


class Deaf(type(tiny.model().model)):
    """Attends to all that came before, whatever mask it is given."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **others):
        return super().forward(input_ids, position_ids=position_ids, **others)


def test_a_model_that_ignores_masks_gets_padded_rows():
    model = tiny.model(initializer_range=0.3)
    deaf = Deaf(model.config)
    deaf.load_state_dict(model.model.state_dict())
    model.model = deaf
    policy = exact(Policy(model.eval()))
    assert policy.rearranges
    _probe(policy)
    assert not policy.rearranges
    assert policy.plain_head
    assert_own(policy, MIXED, 1e-10)


def test_a_model_that_refuses_masks_gets_padded_rows():
    policy = family("openai-gpt", n_embd=32, n_layer=2, n_head=4, n_positions=256)
    assert not policy.rearranges
    assert_own(policy, MIXED, 1e-10)


class Odd(LlamaForCausalLM):
    """Its logits are not what its output embeddings make of the last states."""

    def forward(self, *args, **others):
        output = super().forward(*args, **others)
        output.logits = output.logits + torch.linspace(0, 9, output.logits.shape[-1])
        return output


class Headless(LlamaForCausalLM):
    """Keeps its head to itself."""

    def get_output_embeddings(self):
        return None


@pytest.mark.parametrize("kind", [Odd, Headless])
def test_B33_an_unusual_head_is_found_out_and_used_as_it_is(kind):
    model = exact(tiny.model(initializer_range=0.3))
    model.__class__ = kind
    policy = Policy(model)
    policy.value = torch.nn.Linear(32, 1).double()
    _probe(policy)
    assert not policy.plain_head
    assert policy.rearranges
    assert_own(policy, MIXED, 1e-10)
    torch.testing.assert_close(policy(MIXED, values=True).values, alone(policy, MIXED).values, atol=1e-10, rtol=0)
    with laid(policy, layout.padded):
        expected = gradients(policy, MIXED)
    with laid(policy, layout.shared):
        assert_close(gradients(policy, MIXED), expected)
    policy.temperature = 0.5
    torch.testing.assert_close(policy(MIXED).logprobs, alone(policy, MIXED, 0.5).logprobs, atol=1e-10, rtol=0)


def test_the_probe_keeps_what_is_right():
    for kind in KINDS:
        policy = Policy(tiny.model(kind))
        _probe(policy)
        assert policy.rearranges
        assert policy.plain_head


def test_eager_attention_takes_the_same_masks():
    config = tiny.config(initializer_range=0.3)
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().double())
    _probe(policy)
    assert policy.rearranges
    assert_own(policy, MIXED)


# ------------------------------------------------------------------------------------------------- the frozen trunk


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("models")
    layers = {"gpt2": {"n_layer": 3}}
    return {
        kind: tiny.folder(place / kind, kind, initializer_range=0.3, **layers.get(kind, {"num_hidden_layers": 3}))
        for kind in ("llama", "gpt2")
    }


def kept_trunk(policy: Policy, batch: Batch, tokens: int) -> Batch:
    """The batch with its trunk, computed in parts of `tokens`."""
    trunk = torch.zeros(*batch.tokens.shape, policy.width, dtype=torch.float64)
    for part, places in batch.parts(tokens):
        found = policy.trunk(part)
        trunk[places, : found.shape[1]] = found
    return replace(batch, trunk=trunk)


@pytest.mark.parametrize("train", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_replayed_trunk_gives_the_same_logprobs_and_gradients(folders, kind, train):
    policy = exact(load_policy(folders[kind], train_layers=train, value_head=True))
    torch.nn.init.normal_(policy.value.weight)
    expected = gradients(policy, MIXED)
    assert expected.keys() == policy.learning().keys()
    for lay in LAYOUTS:
        with laid(policy, lay):
            batch = kept_trunk(policy, MIXED, 30)
        for other in LAYOUTS:
            with laid(policy, other):
                assert_close(gradients(policy, batch), expected)
    shuffled = batch.shuffled(torch.Generator().manual_seed(1))
    assert_close(gradients(policy, shuffled.rows(torch.arange(len(shuffled)))), gradients(policy, without(shuffled)))
    for part, places in batch.parts(25):
        found = policy(part).logprobs
        torch.testing.assert_close(found, policy(MIXED).logprobs[places, : found.shape[1]], atol=1e-12, rtol=0)


def without(batch: Batch) -> Batch:
    return replace(batch, trunk=None)


def test_a_replay_never_runs_the_frozen_layers(folders):
    policy = exact(load_policy(folders["llama"], train_layers=1))
    batch = replace(MIXED, trunk=policy.trunk(MIXED))
    ran = []
    for i, layer in enumerate(layers_of(policy.base)):
        layer.register_forward_hook(lambda module, args, out, i=i: ran.append(i))
    policy(batch)
    assert ran == [2]
    policy(MIXED)
    assert ran == [2, 0, 1, 2]
    ran.clear()
    policy.trunk(MIXED)
    assert ran == [0, 1]


def test_only_the_top_layers_and_the_final_norm_learn(folders):
    policy = load_policy(folders["llama"], train_layers=1)
    learning = {name.removeprefix("backbone.model.") for name in policy.learning()}
    top = {f"layers.2.{name}" for name, _ in layers_of(policy.base)[2].named_parameters()}
    assert learning == top | {"norm.weight"}
    assert list(tail_of(policy.base)) == ["norm"]


def test_a_trunk_is_kept_for_unusual_heads_too(folders):
    policy = exact(load_policy(folders["llama"], train_layers=1))
    policy.backbone.__class__ = Odd
    policy.plain_head = False
    expected = gradients(policy, MIXED)
    assert_close(gradients(policy, kept_trunk(policy, MIXED, 40)), expected)


# --------------------------------------------------------------------------------------------------- the reference

WAYS = {"copy": {}, "trunk": {"train_layers": 1}, "adapter": {"lora_rank": 2}}


def with_reference(folder: str, way: str, **options) -> Policy:
    policy = load_policy(folder, **WAYS[way], **options)
    policy.keep_reference()
    return policy


def moved(policy: Policy, batch: Batch, cast: AbstractContextManager | None = None) -> None:
    """Takes a few large steps."""
    optimizer = torch.optim.AdamW(policy.learning().values(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with cast or nullcontext():
            logprobs = policy(batch).logprobs
        logprobs.sum().backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("way", "replayed"), [*((way, False) for way in WAYS), ("trunk", True)])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_reference_is_the_initial_policy_and_stays_it(folders, kind, way, replayed):
    policy = with_reference(folders[kind], way)
    batch = replace(MIXED, trunk=policy.trunk(MIXED)) if replayed else MIXED
    with torch.no_grad():
        initial = policy(batch).logprobs
        with policy.as_reference():
            assert torch.equal(policy(batch).logprobs, initial)  # so the divergence is 0 in every bit
    moved(policy, batch)
    with torch.no_grad():
        assert (policy(batch).logprobs - initial).abs().max() > 0.1
        with policy.as_reference():
            assert torch.equal(policy(batch).logprobs, initial)
        assert (policy(batch).logprobs - initial).abs().max() > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_B25_no_gradient_reaches_the_reference(folders, way):
    policy = with_reference(folders["llama"], way)
    own = policy(MIXED).logprobs
    with policy.as_reference():
        reference = policy(MIXED).logprobs
    (own - reference).square().sum().backward()
    learning = policy.learning()
    assert all(p.grad is None for name, p in policy.named_parameters() if name not in learning)
    for kept in policy._reference:
        assert all(p.grad is None and not p.requires_grad for p in kept.parameters())
    policy.zero_grad(set_to_none=True)
    with policy.as_reference():
        reference = policy(MIXED).logprobs
        if reference.requires_grad:
            reference.sum().backward()
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_an_exception_inside_leaves_the_policy_as_it_was(folders, way):
    policy = with_reference(folders["llama"], way)
    moved(policy, MIXED)
    before, modules = policy(MIXED).logprobs.detach(), list(policy.modules())
    policy.train()
    with pytest.raises(KeyError), policy.as_reference():
        raise KeyError
    assert [id(m) for m in policy.modules()] == [id(m) for m in modules]
    assert policy.backbone.training
    policy.eval()
    assert torch.equal(policy(MIXED).logprobs, before)
    assert policy.learning().keys() == {name for name, p in policy.named_parameters() if p.requires_grad}


def test_a_frozen_head_under_autocast_is_not_mixed_up_with_the_references(folders):
    initial = load_policy(folders["llama"], learns=False)
    policy = with_reference(folders["llama"], "copy")
    moved(policy, MIXED)
    policy.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        expected, own = initial(MIXED).logprobs, policy(MIXED).logprobs
        with policy.as_reference():
            assert torch.equal(policy(MIXED).logprobs, expected)
        with pytest.raises(AttributeError), policy.as_reference():
            policy(MIXED)._no_such_thing()
        assert torch.equal(policy(MIXED).logprobs, own)


def test_without_a_reference_there_is_a_sentence(folders):
    policy = load_policy(folders["llama"])
    with pytest.raises(PlauditError, match="keeps no reference"), policy.as_reference():
        pass


def test_the_reference_is_no_part_of_what_learns_or_is_saved(folders):
    policy = load_policy(folders["llama"])
    before = (list(policy.learning()), list(policy.state_dict()))
    policy.keep_reference()
    assert (list(policy.learning()), list(policy.state_dict())) == before


def test_a_shared_trunk_copies_only_what_learns(folders):
    copied = {
        way: sum(p.numel() for kept in with_reference(folders["llama"], way)._reference for p in kept.parameters())
        for way in WAYS
    }
    policy = load_policy(folders["llama"], train_layers=1)
    assert copied["adapter"] == 0
    assert copied["trunk"] == sum(p.numel() for p in policy.learning().values())
    assert copied["copy"] == sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_B37_dropout_is_off_in_reference_and_old_policy_passes(tmp_path, way):
    loud = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    policy = with_reference(tiny.folder(tmp_path, "gpt2", initializer_range=0.3, **loud), way)
    with torch.no_grad():
        initial = policy(MIXED).logprobs
        assert torch.equal(policy(MIXED).logprobs, initial)
        torch.testing.assert_close(initial.double(), alone(policy, MIXED).logprobs, atol=1e-4, rtol=0)
        trunk = policy.trunk(MIXED) if policy.frozen else None
        policy.train()
        assert not torch.equal(policy(MIXED).logprobs, initial)
        with policy.as_reference():
            assert torch.equal(policy(MIXED).logprobs, initial)
        assert not torch.equal(policy(MIXED).logprobs, initial)
        if policy.frozen:
            assert torch.equal(policy.trunk(MIXED), trunk)
            with policy.as_reference():
                assert torch.equal(policy(replace(MIXED, trunk=trunk)).logprobs, initial)


# ------------------------------------------------------------------------------------------------------ bfloat16


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_under_autocast_policy_and_reference_are_equal_to_the_last_bit(tmp_path, kind, way, stored):
    folder = tiny.folder(tmp_path, kind, initializer_range=0.3)
    AutoModelForCausalLM.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    policy = with_reference(folder, way, precision="bfloat16")

    @torch.autocast("cpu", torch.bfloat16)
    def both(batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            own = policy(batch).logprobs
            with policy.as_reference():
                return own, policy(batch).logprobs

    with torch.autocast("cpu", torch.bfloat16):
        batch = replace(MIXED, trunk=policy.trunk(MIXED)) if policy.frozen else MIXED
    own, reference = both(batch)
    assert torch.equal(own, reference)
    moved(policy, batch, torch.autocast("cpu", torch.bfloat16))
    after, still = both(batch)
    assert not torch.equal(after, own)
    assert torch.equal(still, reference)


def test_values_and_scores_are_float32_under_autocast(folders):
    policy = load_policy(folders["llama"], value_head=True)
    torch.nn.init.normal_(policy.value.weight)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = policy(MIXED, values=True)
    assert found.values.dtype == found.logprobs.dtype == torch.float32
    assert (found.values.bfloat16().float() != found.values).any()


# --------------------------------------------------------------------------------------- B38: known by hand


def bigrams(table: Tensor) -> Policy:
    """A model whose next token depends on the present one only: log-probabilities (V, V) as given."""
    vocabulary = len(table)
    config = tiny.config(
        vocab_size=vocabulary, hidden_size=264, tie_word_embeddings=False, num_hidden_layers=1, rms_norm_eps=0.0
    )
    model = exact(AutoModelForCausalLM.from_config(config).eval())
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary, 264))
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :vocabulary] = table.T / 264**0.5  # what the norm makes of a one
    return Policy(model)


@pytest.mark.parametrize("begins", [False, True])
def test_B38_bigrams(begins):
    tokenizer = tiny.tokenizer(begins=begins)
    template = Template(tokenizer)
    table = torch.randn(258, 258, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    policy = bigrams(table)
    encoded = [template.encode("ab", "cd"), template.encode("ab", "e"), template.encode("", "f")]
    batch = collate([e.prompt for e in encoded], [e.completion for e in encoded], [0, 0, 1])
    a, b, c, d, e, f = (tokenizer(letter, add_special_tokens=False).input_ids[0] for letter in "abcdef")
    end = tokenizer.eos_token_id
    start = [tokenizer.bos_token_id] if begins else []
    first = start or [end]  # something that the first token can follow
    assert [row[real].tolist() for row, real in zip(batch.tokens, batch.attention, strict=True)] == [
        [*start, a, b, c, d, end],
        [*start, a, b, e, end],
        [*first, f, end],
    ]
    pairs = [[(b, c), (c, d), (d, end)], [(b, e), (e, end)], [(first[0], f), (f, end)]]
    for lay in LAYOUTS:
        with laid(policy, lay), torch.no_grad():
            found = policy(batch).logprobs
        for row, acting, expected in zip(found, batch.actions, pairs, strict=True):
            wanted = torch.tensor([float(table[i, j]) for i, j in expected], dtype=torch.float64)
            torch.testing.assert_close(row[acting], wanted, atol=1e-12, rtol=0)
            assert row[~acting].eq(0).all()
