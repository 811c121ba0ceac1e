"""Encoders as reward models: their own head, padding hidden, and the same scores wherever they are opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BartConfig, BartForSequenceClassification

import examples
import plaudit
import tiny
from plaudit import PlauditError
from plaudit.backbone import heads_of, limit_of
from plaudit.batch import Batch, collate
from plaudit.loading import end_every_text, load_reward_model, load_tokenizer, save_pretrained
from plaudit.policy import Policy
from plaudit.rewards import ModelReward, load_rewards
from plaudit.statistics import pairwise_accuracy

KINDS = ("bert", "distilbert", "roberta", "deberta")
WAYS = {"all": {}, "top": {"train_layers": 1}, "lora": {"lora_rank": 2}}
TEXTS = ["ab", "a longer one, with a few words", "", "x" * 40]
# peft asks transformers for a name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("encoders")
    return {kind: tiny.encoder(place / kind, kind) for kind in KINDS}


def batch_of(name: str, texts: list[str] = TEXTS) -> Batch:
    rows = load_tokenizer(name)(texts).input_ids
    return collate(rows, [[]] * len(rows))


def scored(policy: Policy, batch: Batch) -> Tensor:
    with torch.no_grad():
        scores = policy(batch, logprobs=False, scores=True).scores
    assert scores is not None
    return scores


def plain_scores(folder: str | Path, texts: list[str] = TEXTS) -> Tensor:
    """What plain transformers makes of all texts as one padded batch."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_b26_b27_padding_and_company_change_no_score(folders, kind):
    torch.manual_seed(0)
    policy = load_reward_model(folders[kind], load_tokenizer(folders[kind]))
    batch = batch_of(folders[kind])
    together = scored(policy, batch)
    assert together.max() - together.min() > 0.01
    alone = torch.cat([scored(policy, batch.rows(torch.tensor([i]))) for i in range(len(batch))])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    filled = replace(batch, tokens=torch.where(batch.attention, batch.tokens, torch.full_like(batch.tokens, 77)))
    assert torch.equal(scored(policy, filled), together)
    # A token in the middle counts, since an encoder looks both ways.
    other = replace(batch, tokens=batch.tokens.clone())
    other.tokens[1, 5] = 70
    assert (scored(policy, other)[1] - together[1]).abs() > 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert scored(policy, batch).dtype == torch.float32


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_b35_a_saved_encoder_scores_alike_in_plain_transformers(folders, tmp_path, kind, way):
    tokenizer = load_tokenizer(folders[kind])
    end_every_text(tokenizer)
    torch.manual_seed(0)
    policy = load_reward_model(folders[kind], tokenizer, **WAYS[way])
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    batch, optimizer = batch_of(folders[kind]), torch.optim.AdamW(policy.learning().values(), lr=0.02)
    first = scored(policy, batch)
    for _ in range(2):
        optimizer.zero_grad()
        policy(batch, logprobs=False, scores=True).scores.square().sum().backward()
        optimizer.step()
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= policy.learning().keys()
    head = list(heads_of(policy.backbone))[-1]
    assert any(f"backbone.{head}." in name for name in moved)
    if way == "lora":
        assert {"lora_" in name or "modules_to_save" in name for name in moved} == {True}
        assert any("lora_" in name for name in moved)
    elif way == "top":
        assert any("layer.1." in name for name in moved)
        assert not any("layer.0." in name or "embeddings" in name for name in moved)
    expected = scored(policy, batch)
    assert (expected - first).abs().min() > 1e-3
    save_pretrained(policy, tokenizer, tmp_path)
    torch.testing.assert_close(plain_scores(tmp_path), expected, atol=1e-5, rtol=0)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lora" in name or "modules_to" in name]
    assert (tmp_path / "adapter").exists() == (way == "lora")
    empty, whole = [""] * len(TEXTS), load_rewards(str(tmp_path), tokens_per_pass=16)
    torch.testing.assert_close(whole(empty, TEXTS, {}), expected, atol=1e-5, rtol=0)


def test_b35_the_adapter_alone_brings_the_heads(folders, tmp_path):
    import peft

    torch.manual_seed(0)
    policy = load_reward_model(folders["distilbert"], load_tokenizer(folders["distilbert"]), lora_rank=2)
    batch = batch_of(folders["distilbert"])
    first = scored(policy, batch)
    policy(batch, logprobs=False, scores=True).scores.sum().backward()
    torch.optim.SGD(policy.learning().values(), lr=0.05).step()
    save_pretrained(policy, load_tokenizer(folders["distilbert"]), tmp_path)
    torch.manual_seed(9)  # other heads than ours, all of which the adapter has to replace
    base = AutoModelForSequenceClassification.from_pretrained(folders["distilbert"], num_labels=1)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    with torch.no_grad():
        found = model(input_ids=batch.tokens, attention_mask=batch.attention.long()).logits[:, 0]
    torch.testing.assert_close(found, scored(policy, batch), atol=1e-5, rtol=0)
    assert not torch.allclose(found, first, atol=1e-3)


def test_an_encoder_learns_what_somebody_likes_and_is_a_reward(at, tmp_path):
    rows = examples.judgements("comparisons", 240)
    data = {"data": tiny.lines(tmp_path / "data.jsonl", rows), "eval_data": None, "holdout": 0.25}
    given = {"model": str(at / "encoder"), "dropout": False, "steps": 45, "batch_size": 24, "learning_rate": 5e-3}
    quiet = {"evaluate_every": 0, "save_every": 0, "weight_decay": 0.0, "tokens_per_pass": 1024}
    run = plaudit.train(examples.settings("comparisons", at, tmp_path / "run", **data, **given, **quiet))
    assert run.summary["accuracy"] > 0.93
    texts = examples.words(40, seed=9)
    found = load_rewards(str(run.final))(["5:"] * 40, texts, {})
    torch.testing.assert_close(found, plain_scores(run.final, [f"5:{text}" for text in texts]), atol=1e-5, rtol=0)
    assert pairwise_accuracy(found.tolist(), [text.count("a") for text in texts]).accuracy > 0.9


def test_rows_are_no_longer_than_the_positions(folders):
    for kind in KINDS:
        policy = load_reward_model(folders[kind], load_tokenizer(folders[kind]), learns=False)
        assert limit_of(policy.backbone) == 128
        reward = ModelReward(policy, load_tokenizer(folders[kind]))
        longest, longer = reward([""] * 2, ["y" * 126, "y" * 300])
        assert longer == pytest.approx(longest, abs=1e-5)


def test_a_classifier_from_elsewhere_keeps_its_head(folders, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=1)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    torch.manual_seed(5)
    policy = load_reward_model(str(tmp_path), load_tokenizer(str(tmp_path)))
    torch.testing.assert_close(scored(policy, batch_of(str(tmp_path))), plain_scores(tmp_path), atol=1e-5, rtol=0)


def test_a_model_of_both_kinds_is_no_reward_model(tmp_path):
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    config = BartConfig(vocab_size=257, num_labels=1, eos_token_id=256, pad_token_id=1, **shape, **heads)
    BartForSequenceClassification(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PlauditError, match=r"BartForSequenceClassification\) has an encoder and a decoder"):
        load_reward_model(str(tmp_path), load_tokenizer(str(tmp_path)))
