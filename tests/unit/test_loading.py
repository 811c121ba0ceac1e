"""Folders in, folders out: nothing lost, nothing changed that did not learn, and plain transformers agrees."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import tiny
from plaudit.batch import Batch, collate
from plaudit.errors import PlauditError
from plaudit.loading import end_every_text, load_policy, load_reward_model, load_tokenizer, save_pretrained
from plaudit.policy import Policy
from plaudit.rewards import ModelReward

BATCH = collate([[1, 2, 3], [1, 2, 3], [9]], [[4, 5, 6], [7, 256], [8, 8, 8, 256]], groups=[0, 0, 1])
WAYS = {"all": {}, "top": {"train_layers": 1}, "lora": {"lora_rank": 2}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("models")
    untied = {"tie_word_embeddings": False}
    found = {kind: tiny.folder(place / kind, kind, initializer_range=0.2) for kind in ("llama", "gpt2")}
    found["untied"] = tiny.folder(place / "untied", "llama", initializer_range=0.2, **untied)
    for name in ("llama", "gpt2", "untied"):
        model = AutoModelForCausalLM.from_pretrained(found[name], dtype=torch.bfloat16)
        found[f"{name}-bf16"] = str(place / f"{name}-bf16")
        model.save_pretrained(found[f"{name}-bf16"])
        tiny.tokenizer().save_pretrained(found[f"{name}-bf16"])
    return found


def weights(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def step(policy: Policy, scores: bool = False) -> set[str]:
    """One large step of everything that learns; the names of what should have moved."""
    optimizer = torch.optim.AdamW(policy.learning().values(), lr=0.02, weight_decay=0.1)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=policy.autocasts):
            output = policy(BATCH, logprobs=not scores, scores=scores, values=policy.value is not None)
        total = output.scores.sum() if scores else output.logprobs.sum()
        if output.values is not None:
            total = total + (output.values - 1).square().sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return {name for name, p in policy.named_parameters() if p.grad is not None}


def plain_logprobs(folder: Path, batch: Batch = BATCH) -> Tensor:
    """What plain transformers makes of a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(batch.tokens).logits.log_softmax(-1)
    found = logits[:, :-1].gather(2, batch.tokens[:, 1:, None])[..., 0]
    return torch.nn.functional.pad(found, (1, 0)) * batch.actions


# ------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("kind", ["llama", "gpt2", "untied"])
def test_B35_an_adapter_begins_as_the_base_and_switched_off_is_the_base(folders, kind):
    base, policy = load_policy(folders[kind]), load_policy(folders[kind], lora_rank=2)
    expected = base(BATCH).logprobs
    assert torch.equal(policy(BATCH).logprobs, expected)
    moved = step(policy)
    assert moved == policy.learning().keys()
    assert all(".lora_" in name for name in moved)
    assert not torch.allclose(policy(BATCH).logprobs, expected, atol=0.1)
    with policy.as_reference():
        assert torch.equal(policy(BATCH).logprobs, expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "untied"])
def test_B35_base_weights_are_the_same_to_the_last_bit_after_training(folders, kind):
    policy = load_policy(folders[kind], lora_rank=2)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    moved = step(policy)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in moved)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "untied"])
def test_B35_merged_and_saved_is_unmerged(folders, tmp_path, kind):
    policy = load_policy(folders[kind], lora_rank=2)
    step(policy)
    expected = policy(BATCH).logprobs
    save_pretrained(policy, load_tokenizer(folders[kind]), tmp_path)
    torch.testing.assert_close(plain_logprobs(tmp_path), expected, atol=1e-5, rtol=0)
    assert torch.equal(policy(BATCH).logprobs, expected)  # saving is no training
    with policy.as_reference():
        assert torch.equal(policy(BATCH).logprobs, load_policy(folders[kind])(BATCH).logprobs)
    torch.testing.assert_close(load_policy(str(tmp_path))(BATCH).logprobs, expected, atol=1e-5, rtol=0)
    assert weights(tmp_path).keys() == weights(folders[kind]).keys()


def test_the_adapter_is_kept_beside_the_merged_model_and_opens_with_peft(folders, tmp_path):
    import peft

    policy = load_policy(folders["llama"], lora_rank=2, lora_alpha=8.0)
    step(policy)
    save_pretrained(policy, load_tokenizer(folders["llama"]), tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    expected = model(BATCH.tokens).logits
    found = AutoModelForCausalLM.from_pretrained(tmp_path)(BATCH.tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 8.0


def test_layers_and_adapters_exclude_each_other(folders):
    with pytest.raises(PlauditError, match="exclude each other"):
        load_policy(folders["llama"], train_layers=1, lora_rank=2)


@pytest.mark.parametrize("layers", [3, -1])
def test_a_model_has_only_so_many_layers(folders, layers):
    with pytest.raises(PlauditError, match="of 2 layers: choose 1 to 2"):
        load_policy(folders["llama"], train_layers=layers)


# -------------------------------------------------------------------------------------------------- number types


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "untied"])
@pytest.mark.parametrize("stored", ["", "-bf16"])
def test_a_folder_keeps_its_number_type_and_all_that_did_not_learn(folders, tmp_path, kind, stored, way):
    name = folders[kind + stored]
    before = weights(name)
    policy = load_policy(name, precision="bfloat16", **WAYS[way])
    untouched = {n.removeprefix("backbone.") for n, p in policy.named_parameters() if not p.requires_grad}
    step(policy)
    save_pretrained(policy, load_tokenizer(name), tmp_path)
    after = weights(tmp_path)
    assert after.keys() == before.keys()
    assert {t.dtype for t in after.values()} == {torch.bfloat16 if stored else torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == ("bfloat16" if stored else "float32")
    if way == "lora":
        untouched = {n for n in before if "proj" not in n and "attn" not in n and "mlp" not in n}
    for tensor in untouched & after.keys():
        assert torch.equal(after[tensor], before[tensor])
    moved = [n for n in before if not torch.equal(after[n], before[n])]
    assert moved
    assert way == "all" or untouched.isdisjoint(moved)


@pytest.mark.parametrize("stored", ["", "-bf16"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_learns_is_float32_and_only_what_loses_nothing_shrinks(folders, stored, precision):
    policy = load_policy(folders["llama" + stored], precision=precision, train_layers=1)
    shrinks = precision == "bfloat16" and stored == "-bf16"
    for parameter in policy.parameters():
        small = shrinks and not parameter.requires_grad
        assert parameter.dtype == (torch.bfloat16 if small else torch.float32)


@pytest.mark.parametrize("learns", [True, False])
def test_heads_stay_float32_and_their_targets_follow_whatever_the_model_is_stored_in(folders, learns):
    policy = load_policy(folders["llama-bf16"], precision="bfloat16", action_heads=True, learns=learns)
    assert {parameter.dtype for parameter in policy.heads.parameters()} == {torch.float32}
    with torch.no_grad():
        policy.heads.q[0].out.bias.fill_(2.0)
    policy.heads.follow(0.25)
    torch.testing.assert_close(policy.heads.target[0].out.bias, torch.full_like(policy.heads.q[0].out.bias, 0.5))


def test_saving_what_never_learned_changes_nothing(folders, tmp_path):
    for name in ("llama", "gpt2-bf16", "untied"):
        policy = load_policy(folders[name], precision="bfloat16", learns=False)
        assert policy.learning() == {}
        save_pretrained(policy, load_tokenizer(folders[name]), tmp_path / name)
        after, before = weights(tmp_path / name), weights(folders[name])
        assert after.keys() == before.keys()
        assert all(torch.equal(after[n], before[n]) for n in before)


# --------------------------------------------------------------------------------------------------- the value head


def test_a_value_head_begins_at_nothing_and_is_saved(folders, tmp_path):
    policy = load_policy(folders["llama"], value_head=True)
    assert policy(BATCH, values=True).values.eq(0).all()
    assert {"value.weight", "value.bias"} <= policy.learning().keys()
    step(policy)
    expected = policy(BATCH, values=True).values
    assert expected.abs().max() > 0.1
    save_pretrained(policy, load_tokenizer(folders["llama"]), tmp_path)
    again = load_policy(str(tmp_path), value_head=True)
    torch.testing.assert_close(again(BATCH, values=True).values, expected, atol=1e-6, rtol=0)
    assert load_policy(str(tmp_path)).value is None
    torch.testing.assert_close(plain_logprobs(tmp_path), policy(BATCH).logprobs, atol=1e-5, rtol=0)


def test_a_new_value_head_leaves_the_random_state_alone_enough_to_repeat(folders):
    one, other = (load_policy(folders["llama"], value_head=True) for _ in range(2))
    assert torch.equal(one.value.weight, other.value.weight)


# ----------------------------------------------------------------------------------------------- reward models

TEXTS = [("ab", "cd"), ("ab", "c"), ("", "a longer one, with a few words"), ("x", "")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "untied-bf16"])
def test_a_saved_reward_model_scores_alike_in_plain_transformers(folders, tmp_path, kind, way):
    tokenizer = load_tokenizer(folders[kind])
    end_every_text(tokenizer)
    policy = load_reward_model(folders[kind], tokenizer, **WAYS[way])
    before = policy.backbone.score.weight.detach().clone()
    assert step(policy, scores=True) == policy.learning().keys()
    assert not torch.equal(policy.backbone.score.weight, before)
    prompts, completions = (list(column) for column in zip(*TEXTS, strict=True))
    expected = torch.tensor(ModelReward(policy, tokenizer)(prompts, completions))
    save_pretrained(policy, tokenizer, tmp_path)

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.config.num_labels == 1
    assert plain.config.pad_token_id == opened.pad_token_id != opened.eos_token_id
    rows = opened([p + c for p, c in TEXTS], padding=True, padding_side="right", return_tensors="pt")
    assert [int(ids[mask.bool()][-1]) for ids, mask in zip(rows.input_ids, rows.attention_mask, strict=True)] == [
        256
    ] * 4
    assert not rows.attention_mask.all()
    tolerance = 0.05 if kind.endswith("bf16") else 1e-5  # what learned is written in the folder's own type
    torch.testing.assert_close(plain(**rows).logits[:, 0], expected, atol=tolerance, rtol=0)

    tokenizer = load_tokenizer(str(tmp_path))
    again = ModelReward(load_reward_model(str(tmp_path), tokenizer, learns=False), tokenizer)
    torch.testing.assert_close(torch.tensor(again(prompts, completions)), plain(**rows).logits[:, 0], atol=1e-5, rtol=0)


def test_only_the_adapters_own_score_learns(folders):
    tokenizer = load_tokenizer(folders["llama"])
    policy = load_reward_model(folders["llama"], tokenizer, lora_rank=2)
    names = [name for name in policy.learning() if "score" in name]
    assert names == ["backbone.score.modules_to_save.default.weight"]


def test_a_new_score_is_drawn_as_in_ziegler(folders):
    torch.manual_seed(0)
    model = load_reward_model(folders["llama"], load_tokenizer(folders["llama"]))
    assert float(model.backbone.score.weight.detach().std()) == pytest.approx(33**-0.5, rel=0.3)


def test_an_own_token_pads_where_no_other_is_special(folders):
    tokenizer = load_tokenizer(folders["llama"])
    policy = load_reward_model(folders["llama"], tokenizer)
    assert tokenizer.pad_token == "<|pad|>"
    assert policy.config.pad_token_id == tokenizer.pad_token_id == 257
    assert policy.base.embed_tokens.num_embeddings == 258


def test_a_vocabulary_with_room_is_left_as_it_is(tmp_path):
    folder = tiny.folder(tmp_path, vocab_size=300)
    tokenizer = load_tokenizer(folder)
    policy = load_reward_model(folder, tokenizer)
    assert policy.config.pad_token_id == 257
    assert policy.base.embed_tokens.num_embeddings == policy.config.vocab_size == 300


def test_a_reward_model_from_elsewhere_that_pads_with_its_end_token_scores_as_hugging_face_reads_it(tmp_path):
    folder = tiny.folder(tmp_path, initializer_range=0.2)
    torch.manual_seed(0)
    other = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=256)
    other.save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    end_every_text(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256
    prompts, completions = (list(column) for column in zip(*TEXTS, strict=True))
    rows = tokenizer([p + c for p, c in TEXTS], padding=True, padding_side="right", return_tensors="pt")
    assert all(int(ids[mask.bool()][-1]) == 256 for ids, mask in zip(rows.input_ids, rows.attention_mask, strict=True))
    expected = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)(**rows).logits[:, 0]
    found = ModelReward(load_reward_model(folder, tokenizer, learns=False), tokenizer)(prompts, completions)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


def test_another_special_token_pads_if_there_is_one(tmp_path):
    folder = tiny.folder(tmp_path, vocab_size=258)
    tiny.tokenizer(begins=True).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    policy = load_reward_model(folder, tokenizer)
    assert tokenizer.pad_token == "<|begin|>"
    assert policy.config.pad_token_id == 257
    assert policy.config.vocab_size == 258


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path):
    config = tiny.config(num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PlauditError, match="classifier of 3 labels"):
        load_reward_model(str(tmp_path), load_tokenizer(str(tmp_path)))


# -------------------------------------------------------------------------------------------------- wrong folders


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(PlauditError, match="there is no folder"):
        load_policy(str(tmp_path / "nowhere"))
    with pytest.raises(PlauditError, match=r"has no config\.json"):
        load_policy(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(PlauditError, match="cannot load"):
        load_policy(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(tiny.config().to_dict()))
    with pytest.raises(PlauditError, match="cannot load"):
        load_policy(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "_attn_implementation_internal": "a/b"}')
    with pytest.raises(PlauditError, match="foreign code"):
        load_policy(str(tmp_path))
    with pytest.raises(PlauditError, match="foreign code"):
        load_tokenizer(str(tmp_path))


def test_broken_weights(tmp_path):
    folder = tiny.folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PlauditError, match="cannot load"):
        load_policy(folder)


def test_a_hub_name_that_cannot_be_reached():
    for call in (load_policy, load_tokenizer):
        with pytest.raises(PlauditError, match="cannot load") as caught:
            call("nobody/nothing-at-all")
        assert "\n" not in str(caught.value)


def test_a_damaged_tokenizer_is_named(tmp_path):
    folder = tiny.folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    with pytest.raises(PlauditError, match="cannot load the tokenizer of"):
        load_tokenizer(folder)


def test_tokenizers(folders, tmp_path):
    tokenizer = load_tokenizer(folders["llama"])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 256
    endless = tiny.tokenizer()
    endless.eos_token = None
    AutoModelForCausalLM.from_config(tiny.config()).save_pretrained(tmp_path)
    endless.save_pretrained(tmp_path)
    with pytest.raises(PlauditError, match="has no end token"):
        load_tokenizer(str(tmp_path))


def test_a_model_that_only_has_eager_attention_loads_too(tmp_path):
    from transformers import GPTNeoConfig

    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]}
    config = GPTNeoConfig(vocab_size=257, max_position_embeddings=64, window_size=8, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path))
    torch.testing.assert_close(policy(BATCH).logprobs, plain_logprobs(tmp_path), atol=1e-5, rtol=0)
    assert policy.config._attn_implementation == "eager"
    assert policy.rearranges
    assert torch.equal(policy(replace(BATCH, tokens=BATCH.tokens * BATCH.attention)).logprobs, policy(BATCH).logprobs)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_is_no_policy(kind, tmp_path):
    tiny.encoder(tmp_path, kind)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(PlauditError, match=r"LMHeadModel\) looks both ways|ForCausalLM\) looks both ways") as told:
        load_policy(str(tmp_path))
    assert str(told.value).endswith("so it cannot continue a text: take a causal or an encoder-decoder model.")
    assert repr(str(tmp_path)) in str(told.value)
    policy = load_policy(tiny.encoder(tmp_path / "decoder", kind, is_decoder=True))
    begun = replace(BATCH, tokens=BATCH.tokens.clone())
    begun.tokens[2, 4] = 11
    assert torch.equal(policy(begun).logprobs[2, :4], policy(BATCH).logprobs[2, :4])


HOLES = """
import ctypes, sys
from plaudit import machine
from plaudit.loading import load_policy, load_reward_model, load_tokenizer

class Found(ctypes.Structure):
    NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in NAMES.split()]

allocator = ctypes.CDLL(None)
allocator.mallinfo2.restype = Found
folder, kind = sys.argv[1:]
tokenizer = load_tokenizer(folder)
machine.keep_memory()
if kind == "reference":
    policy = load_policy(folder, precision="bfloat16")
    before = allocator.mallinfo2().fordblks
    policy.keep_reference()
else:
    before = allocator.mallinfo2().fordblks
    if kind == "policy":
        load_policy(folder, precision="bfloat16", learns=False)
    else:
        load_reward_model(folder, tokenizer, precision="bfloat16", learns=False)
print(allocator.mallinfo2().fordblks - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of another system")
@pytest.mark.parametrize("kind", ["policy", "reward", "reference"])
def test_weights_that_are_kept_in_fewer_bytes_leave_no_holes(kind, tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8}
    folder = tiny.folder(tmp_path / "float32", "llama", **shape)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-c", HOLES, str(tmp_path), kind], capture_output=True, check=True, text=True)
    assert int(run.stdout.splitlines()[-1]) < 4 * 2**20  # of 32 MB in float32
