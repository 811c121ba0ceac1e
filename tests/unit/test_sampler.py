"""The in-process sampler against transformers' `generate`, a slow loop without a cache, and the learner's own sums."""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import peft
import pytest
import scipy.stats
import torch
import transformers
from transformers import AutoModelForCausalLM

import tiny
from plaudit import decoding
from plaudit.decoding import PackedLinear, Shadow, SlabLayer, draw, fingerprint, keep_likely, packable
from plaudit.errors import PlauditError
from plaudit.numerics import token_logprobs
from plaudit.sampler import LocalSampler, Sampled, Sampling

KINDS = ["llama", "gpt2"]
PROMPTS = [[72, 105, 32, 116, 104, 101, 114, 101], [65], [70, 71, 72]]
END = 256
NEAR_ONE = 1 - 2**-53
CPU = torch.device("cpu")
packs = pytest.mark.skipif(not packable(torch.float32, CPU), reason="oneDNN packs no weights on this machine")


@lru_cache
def learner(kind: str):
    """A float64 model whose next tokens are far from uniform."""
    return tiny.model(kind, initializer_range=0.3).double()


def decode(ids):
    return bytes(i for i in ids if i < END).decode("latin-1")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scores(model, prompt, completion, temperature=1.0):
    """Log-probabilities (t, V) at the positions of `completion`, in one pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
    return (logits / temperature).log_softmax(1)[len(prompt) - 1 : -1]


def slow(model, prompt, sampling, uniforms):
    """The specification, one row and one whole forward pass at a time."""
    row, logprobs = [], []
    for step in range(sampling.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *row]])).logits[0, -1] / sampling.temperature
        if step + 1 < sampling.min_new_tokens:
            logits[list(sampling.stop_ids)] = -torch.inf
        probabilities = logits.softmax(0)
        row.append(int((probabilities.cumsum(0) <= uniforms[step]).sum()))
        logprobs.append(float(probabilities[row[-1]].log()))
        ended = any(text in decode(row) for text in sampling.stop_strings) and step + 1 >= sampling.min_new_tokens
        if ended or row[-1] in sampling.stop_ids:
            return row, logprobs, False
    return row, logprobs, True


def slow_sample(model, prompts, sampling, n, seed):
    uniforms = torch.rand(len(prompts) * n, sampling.max_new_tokens, dtype=torch.float64, generator=seeded(seed))
    rows = [slow(model, prompts[i // n], sampling, uniforms[i]) for i in range(len(prompts) * n)]
    return Sampled([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows])


def assert_same(found, expected):
    assert found.completions == expected.completions
    assert found.truncated == expected.truncated
    for row, other in zip(found.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(row, other, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_generate(kind):
    model = tiny.model(kind, initializer_range=0.3)
    found = LocalSampler(model).sample(PROMPTS, Sampling(20, temperature=0, stop_ids=(END,)), 1, seeded())
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    rows = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0)[:, width:]
    for row, completion, truncated, prompt in zip(
        rows.tolist(), found.completions, found.truncated, PROMPTS, strict=True
    ):
        assert completion == (row[: row.index(END) + 1] if END in row else row)
        assert truncated == (END not in row)
        assert scores(model, prompt, completion).argmax(1).tolist() == completion
    assert len({tuple(row) for row in found.completions}) == len(PROMPTS)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_the_learners_b36(kind, temperature):
    model = tiny.model(kind, initializer_range=0.3)
    sampling = Sampling(16, temperature=temperature, stop_ids=tuple(range(0, END, 9)))
    found = LocalSampler(model).sample(PROMPTS, sampling, 4, seeded())
    assert len({len(row) for row in found.completions}) > 3
    for i, (completion, logprobs) in enumerate(zip(found.completions, found.logprobs, strict=True)):
        exact = scores(model, PROMPTS[i // 4], completion, temperature)
        chosen = exact.gather(1, torch.tensor(completion)[:, None])[:, 0]
        np.testing.assert_allclose(logprobs, chosen, atol=1e-4)


@pytest.mark.parametrize("filters", [{}, {"top_k": 9}])
@pytest.mark.parametrize("rows", [2, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_prompt_has_its_temperature_b36(dtype, rows, filters, monkeypatch):
    monkeypatch.setattr(decoding, "SCRATCH", 600)  # two rows of logits at a time
    model = tiny.model("llama", initializer_range=0.3).to(dtype)
    temperatures = (0.7, 0.0, 1.6)

    def drawn(temperature):
        sampling = Sampling(9, temperature=temperature, stop_ids=tuple(range(0, END, 9)), **filters)
        return LocalSampler(model, rows=rows).sample(PROMPTS, sampling, 3, seeded())

    found = drawn(temperatures)
    for i, temperature in enumerate(temperatures):
        alone = drawn(temperature)
        assert found.completions[3 * i : 3 * i + 3] == alone.completions[3 * i : 3 * i + 3]
        for row, other in zip(found.logprobs[3 * i : 3 * i + 3], alone.logprobs[3 * i : 3 * i + 3], strict=True):
            np.testing.assert_allclose(row, other, atol=1e-9 if dtype == torch.float64 else 1e-5)
    assert found.completions[3] == found.completions[4] == found.completions[5]
    assert found.logprobs[:3] != drawn(1.6).logprobs[:3]


def test_a_head_with_the_temperatures_of_its_rows_says_the_same_b36():
    model = tiny.model("llama", initializer_range=0.3)
    temperatures = [0.6, 1.0, 1.7]
    found = LocalSampler(model).sample(PROMPTS, Sampling(8, temperature=temperatures), 2, seeded())
    states, targets, each = [], [], []
    for i, completion in enumerate(found.completions):
        prompt = PROMPTS[i // 2]
        with torch.no_grad():
            hidden = model.model(torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
        states.append(hidden[len(prompt) - 1 : -1])
        targets += completion
        each += [temperatures[i // 2]] * len(completion)
    head = model.get_output_embeddings().weight
    own, _ = token_logprobs(torch.cat(states), head, torch.tensor(targets), temperature=torch.tensor(each))
    np.testing.assert_allclose(np.concatenate(found.logprobs), own.detach(), atol=1e-4)


@pytest.mark.parametrize("room", [4, 128])
@pytest.mark.parametrize("compact", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_slow_loop_says_the_same(kind, compact, room, monkeypatch):
    monkeypatch.setattr(SlabLayer, "room", room)
    sampling = Sampling(10, temperature=0.8, stop_ids=tuple(range(0, END, 6)), min_new_tokens=3)
    expected = slow_sample(learner(kind), PROMPTS, sampling, 5, seed=3)
    assert len({len(row) for row in expected.completions}) > 3
    found = LocalSampler(learner(kind), compact=compact).sample(PROMPTS, sampling, 5, seeded(3))
    assert_same(found, expected)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_waves_change_nothing_and_keep_the_order(rows):
    sampling = Sampling(8, stop_ids=tuple(range(0, END, 6)))
    whole = LocalSampler(learner("gpt2")).sample(PROMPTS, sampling, 4, seeded(1))
    assert_same(LocalSampler(learner("gpt2"), rows=rows).sample(PROMPTS, sampling, 4, seeded(1)), whole)
    assert_same(whole, slow_sample(learner("gpt2"), PROMPTS, sampling, 4, seed=1))


def test_n_completions_are_n_prompts():
    sampler = LocalSampler(learner("llama"))
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    assert_same(sampler.sample(PROMPTS, Sampling(6), 3, seeded()), sampler.sample(repeated, Sampling(6), 1, seeded()))


def test_the_same_generator_state_gives_the_same_bits():
    model = tiny.model("llama", initializer_range=0.3)
    first, second = (LocalSampler(model).sample(PROMPTS, Sampling(12), 3, seeded(5)) for _ in range(2))
    assert first == second
    assert LocalSampler(model).sample(PROMPTS, Sampling(12), 3, seeded(6)).completions != first.completions


def test_prompts_are_computed_once_and_ended_rows_leave():
    model = copy.deepcopy(learner("llama"))
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    sampling = Sampling(24, stop_ids=tuple(range(0, END, 6)))
    found = LocalSampler(model).sample([*PROMPTS, PROMPTS[0]], sampling, 8, seeded())
    assert shapes[0] == (3, 8)
    lengths = torch.tensor([len(row) for row in found.completions])
    for step, shape in enumerate(shapes[1:], start=1):
        running = int((lengths > step).sum())
        assert shape[1] == 1
        assert running <= shape[0] <= max(running / 0.75, 1)
    assert len(shapes) == lengths.max()


CONFIGS = {
    "windows": ("Mistral", {"sliding_window": 5}),
    "windows and whole": ("Gemma3Text", {"sliding_window": 5, "head_dim": 8}),
    "learned positions from a mask": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "linear biases, no positions": ("Bloom", {"n_layer": 2, "n_head": 4}),
}


@pytest.mark.parametrize("rows", [3, 256])
@pytest.mark.parametrize("shape", CONFIGS)
def test_other_architectures(shape, rows):
    name, changes = CONFIGS[shape]
    common = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    ends = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**common, **more, **ends, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    sampling = Sampling(12, 0.7, stop_ids=tuple(range(0, END, 9)))
    found = LocalSampler(model, rows=rows).sample(PROMPTS, sampling, 4, seeded())
    for i, (completion, logprobs) in enumerate(zip(found.completions, found.logprobs, strict=True)):
        chosen = scores(model, PROMPTS[i // 4], completion, 0.7).gather(1, torch.tensor(completion)[:, None])[:, 0]
        np.testing.assert_allclose(logprobs, chosen, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_kernels(implementation):
    model = tiny.model("llama", initializer_range=0.3)
    model.set_attn_implementation(implementation)
    found = LocalSampler(model).sample(PROMPTS, Sampling(8), 2, seeded())
    for i, (completion, logprobs) in enumerate(zip(found.completions, found.logprobs, strict=True)):
        chosen = scores(model, PROMPTS[i // 2], completion).gather(1, torch.tensor(completion)[:, None])[:, 0]
        np.testing.assert_allclose(logprobs, chosen, atol=1e-4)


def test_how_rows_end():
    free = Sampling(12)
    row = LocalSampler(learner("llama")).sample([PROMPTS[0]], free, 1, seeded())
    (ids,) = row.completions
    assert len(ids) == 12
    assert row.truncated == [True]
    stop = next(i for i in range(3, 12) if ids[i] not in ids[:i])
    sampler = LocalSampler(learner("llama"), decode)
    ended = sampler.sample([PROMPTS[0]], Sampling(12, stop_ids=(ids[stop],)), 1, seeded())
    assert ended.completions == [ids[: stop + 1]]
    assert ended.truncated == [False]


def test_a_row_that_ends_with_its_last_token_is_not_truncated():
    sampling = Sampling(1, stop_ids=tuple(range(257)))
    found = LocalSampler(learner("llama")).sample(PROMPTS, sampling, 2, seeded())
    assert [len(row) for row in found.completions] == [1] * 6
    assert found.truncated == [False] * 6


@pytest.mark.parametrize("minimum", [0, 6])
def test_stop_strings(minimum):
    model, text = learner("gpt2"), decode(slow_sample(learner("gpt2"), [PROMPTS[2]], Sampling(14), 1, 2).completions[0])
    sampling = Sampling(14, stop_strings=(text[2:4], text[7:9]), min_new_tokens=minimum)
    expected = slow_sample(model, [PROMPTS[2]], sampling, 4, seed=2)
    assert [len(expected.completions[0]), expected.truncated[0]] == [6 if minimum else 4, False]
    found = LocalSampler(model, decode).sample([PROMPTS[2]], sampling, 4, seeded(2))
    assert_same(found, expected)


def test_min_new_tokens_holds_stop_tokens_back():
    everything_but_one = tuple(i for i in range(257) if i != 65)
    sampling = Sampling(8, stop_ids=everything_but_one, min_new_tokens=5)
    found = LocalSampler(learner("llama")).sample(PROMPTS, sampling, 2, seeded())
    for completion, logprobs in zip(found.completions, found.logprobs, strict=True):
        assert completion[:4] == [65] * 4
        assert len(completion) >= 5
        np.testing.assert_allclose(logprobs[:4], 0, atol=1e-12)
    assert_same(found, slow_sample(learner("llama"), PROMPTS, sampling, 2, seed=0))


def test_what_is_refused():
    sampler = LocalSampler(learner("gpt2"))
    with pytest.raises(PlauditError, match=r"prompt 1 has no tokens, nothing to condition on.*BOS"):
        sampler.sample([[1], []], Sampling(4), 1, seeded())
    with pytest.raises(PlauditError, match=r"prompt 0 has 250 tokens and max_new_tokens is 8.*context is 256"):
        sampler.sample([[1] * 250], Sampling(8), 1, seeded())
    assert len(sampler.sample([[1] * 249], Sampling(8), 1, seeded()).completions[0]) == 8
    with pytest.raises(PlauditError, match="decode"):
        sampler.sample([[1]], Sampling(4, stop_strings=("x",)), 1, seeded())
    with pytest.raises(PlauditError, match="there are 2 temperatures for 1 prompts"):
        sampler.sample([[1]], Sampling(4, temperature=(1.0, 0.5)), 1, seeded())
    mamba = transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2)
    recurrent = LocalSampler(AutoModelForCausalLM.from_config(mamba))
    with pytest.raises(PlauditError, match=r"Mamba.*past_key_values"):
        recurrent.sample([[1]], Sampling(2), 1, seeded())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", (1.0, -0.1)),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_new_tokens", 65),
        ("stop_strings", ("a", "")),
    ],
)
def test_settings_that_make_no_sense(field, value):
    with pytest.raises(PlauditError, match=field):
        Sampling(**{field: value})


def test_no_prompts_give_no_rows():
    sampler = LocalSampler(learner("llama"))
    for temperature in (1.0, ()):
        assert sampler.sample([], Sampling(4, temperature=temperature), 3, seeded()) == Sampled([], [], [])


# The draw


def inverse(probabilities, uniform):
    """The first index whose cumulated probability exceeds the uniform, in float64."""
    cumulated = np.cumsum(probabilities / probabilities.sum())
    return min(int(np.searchsorted(cumulated, uniform, side="right")), int(np.flatnonzero(probabilities).max()))


@pytest.mark.parametrize("vocabulary", [1, 5, 255, 256, 257, 512, 1000])
def test_draw_is_the_inverse_of_the_distribution_function(vocabulary):
    torch.manual_seed(vocabulary)
    uniforms = torch.tensor([0.0, NEAR_ONE, 0.5, 1e-300, *torch.rand(400).tolist()], dtype=torch.float64)
    logits = torch.randn(len(uniforms), vocabulary, dtype=torch.float64) * 2
    logits[:, torch.rand(vocabulary) < 0.3] = -torch.inf
    logits[:, vocabulary // 2] = 0.5
    ids, logprobs = draw(logits, uniforms)
    expected = [inverse(row.exp().numpy(), u) for row, u in zip(logits, uniforms.tolist(), strict=True)]
    assert ids.tolist() == expected
    np.testing.assert_allclose(logprobs, logits.log_softmax(1).gather(1, ids[:, None])[:, 0], atol=1e-12)


def test_draw_at_the_ends_and_on_the_steps():
    quarters = torch.tensor([-torch.inf, 0, 0, -torch.inf, 0, 0, -torch.inf]).double()
    uniforms = torch.tensor([0.0, 0.25, 0.5, 0.75, NEAR_ONE, 0.25 - 2**-54], dtype=torch.float64)
    for blocks in (0, 256, 512):
        logits = torch.cat([torch.full((blocks,), -torch.inf), quarters, torch.full((blocks,), -torch.inf)])
        ids, logprobs = draw(logits.expand(6, -1), uniforms)
        assert (ids - blocks).tolist() == [1, 2, 4, 5, 5, 1]
        np.testing.assert_allclose(logprobs, np.log(0.25))


def test_draw_never_leaves_what_is_possible_in_float32():
    torch.manual_seed(0)
    logits = torch.randn(3000, 700) * torch.rand(3000, 1) * 60
    logits[:, 600:] = -torch.inf
    logits[:, ::3] = -torch.inf
    for uniform in (0.0, NEAR_ONE):
        ids, logprobs = draw(logits, torch.full((3000,), uniform, dtype=torch.float64))
        assert bool((logits.gather(1, ids[:, None]) > -torch.inf).all())
        assert bool(logprobs.isfinite().all())


def test_draw_follows_the_distribution():
    torch.manual_seed(1)
    logits = torch.randn(600)
    number = 60_000
    ids, _ = draw(logits.expand(number, -1), torch.rand(number, dtype=torch.float64))
    counts = np.bincount(ids.numpy(), minlength=600)
    right = logits.double().softmax(0).numpy() * number
    biased = (logits.double() * 1.08).softmax(0).numpy() * number
    assert scipy.stats.chisquare(counts, right, sum_check=False).pvalue > 0.01
    assert scipy.stats.chisquare(counts, biased, sum_check=False).pvalue < 1e-4


def test_filters():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]))
    assert keep_likely(logits, 0, 1.0).equal(logits)
    assert (keep_likely(logits, 2, 1.0) > -torch.inf)[0].tolist() == [False, True, False, True]
    # 0.4 + 0.3 does not reach 0.75, 0.2 more does; a likely token stands alone.
    kept = keep_likely(logits, 0, 0.75) > -torch.inf
    assert kept.tolist() == [[False, True, True, True], [True, False, False, False]]


def test_filtered_samples_carry_the_filtered_logprobs():
    found = LocalSampler(learner("llama")).sample(PROMPTS, Sampling(6, 1.3, top_k=5), 3, seeded())
    for i, (completion, logprobs) in enumerate(zip(found.completions, found.logprobs, strict=True)):
        top = scores(learner("llama"), PROMPTS[i // 3], completion, 1.3).topk(5)
        for t, token in enumerate(completion):
            place = top.indices[t].tolist().index(token)
            assert logprobs[t] == pytest.approx(float(top.values[t].log_softmax(0)[place]), abs=1e-9)


# The shadow


def test_the_learner_is_untouched():
    model = tiny.model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, initializer_range=0.3)
    quiet = LocalSampler(copy.deepcopy(model).eval()).sample(PROMPTS, Sampling(8), 2, seeded())
    model.train()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    parameters = list(model.parameters())
    sampler = LocalSampler(model)
    assert sampler.sample(PROMPTS, Sampling(8), 2, seeded()) == quiet
    sampler.refresh()
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(module.training for module in modules)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    model(torch.tensor([PROMPTS[0]])).logits.sum().backward()
    assert all(p.grad is not None for p in parameters)


def nudge_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def nudge_data(model):
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)


def nudge_optimizer(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(torch.tensor(PROMPTS[:1])).logits.square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("nudge", [nudge_in_place, nudge_data, nudge_optimizer])
@pytest.mark.parametrize("kind", KINDS)
def test_refresh_takes_over_new_weights(kind, nudge, dtype):
    model = tiny.model(kind, initializer_range=0.3)
    sampler = LocalSampler(model, dtype=dtype)
    before = sampler.sample(PROMPTS, Sampling(8), 2, seeded())
    nudge(model)
    sampler.refresh()
    after = sampler.sample(PROMPTS, Sampling(8), 2, seeded())
    assert after != before
    assert after == LocalSampler(copy.deepcopy(model), dtype=dtype).sample(PROMPTS, Sampling(8), 2, seeded())


def test_what_is_going_to_change_is_given_back_and_what_is_frozen_stays():
    model = tiny.model("llama", initializer_range=0.3)
    frozen = model.model.layers[0].requires_grad_(False)
    kept = {id(parameter) for parameter in frozen.parameters()}
    sampler = LocalSampler(model, dtype=torch.bfloat16)
    before = sampler.sample(PROMPTS, Sampling(8), 2, seeded())
    shadow = sampler._shadow
    made = dict(shadow._made)
    sampler.release()
    assert not list(shadow.module.parameters())
    assert {id(p) for one in shadow._made.values() for p in one.parameters} <= kept
    assert 0 < len(shadow._made) < len(made)
    sampler.refresh()
    assert sampler.sample(PROMPTS, Sampling(8), 2, seeded()) == before
    again = [key for key, one in shadow._made.items() if one.tensor is made[key].tensor]
    assert 0 < len(again) < len(made)  # these were not made again


def test_a_bfloat16_shadow_of_a_float32_learner():
    model = tiny.model("llama", initializer_range=0.3)
    shadow = Shadow(model, torch.bfloat16)
    assert {p.dtype for p in shadow.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    found = LocalSampler(model, dtype=torch.bfloat16).sample(PROMPTS, Sampling(12), 4, seeded())
    gaps = []
    for i, (completion, logprobs) in enumerate(zip(found.completions, found.logprobs, strict=True)):
        chosen = scores(model, PROMPTS[i // 4], completion).gather(1, torch.tensor(completion)[:, None])[:, 0]
        gaps += (chosen - torch.tensor(logprobs)).abs().tolist()
    assert 1e-4 < np.mean(gaps) < 0.1


# peft asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_merged_adapter_is_sampled_from():
    base = tiny.model("llama", initializer_range=0.3)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), lora).eval()
    sampler = LocalSampler(model)
    model.merge_adapter()
    sampler.refresh()
    found = sampler.sample(PROMPTS, Sampling(8), 2, seeded())
    for i, (completion, logprobs) in enumerate(zip(found.completions, found.logprobs, strict=True)):
        adapted = scores(model, PROMPTS[i // 2], completion).gather(1, torch.tensor(completion)[:, None])[:, 0]
        np.testing.assert_allclose(logprobs, adapted, atol=1e-4)
    assert found != LocalSampler(base).sample(PROMPTS, Sampling(8), 2, seeded())


@packs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_compute_the_same(kind, dtype):
    if not packable(dtype, CPU):
        pytest.skip(f"oneDNN packs no {dtype} weights on this machine")
    model = tiny.model(kind, initializer_range=0.3).to(dtype)
    shadow = Shadow(model)
    linear = [m for m in shadow.module.modules() if isinstance(m, PackedLinear)]
    assert len(linear) == {"llama": 1, "gpt2": 9}[kind]  # the layers of a Llama are fused, its head is packed
    ids = torch.tensor([PROMPTS[0]])
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    with torch.no_grad():
        torch.testing.assert_close(shadow.module(ids).logits, model(ids).logits, atol=tolerance, rtol=0.02)


@packs
def test_only_changed_weights_are_packed_again():
    model = tiny.model("gpt2")
    shadow = Shadow(model)
    before = {name: m.packed for name, m in shadow.module.named_modules() if isinstance(m, PackedLinear)}
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] += 1
    shadow.refresh()
    after = {name: m.packed for name, m in shadow.module.named_modules() if isinstance(m, PackedLinear)}
    assert [name for name in before if after[name] is not before[name]] == ["transformer.h.1.mlp.c_fc"]


def test_fingerprints_notice_changes_that_cancel_out():
    for size in (64, 63):
        tensor = torch.ones(size, dtype=torch.bfloat16)
        before = fingerprint(tensor)
        assert fingerprint(tensor) == before
        tensor[0], tensor[8] = 1 + 2**-7, 1 - 2**-8
        assert fingerprint(tensor) != before
