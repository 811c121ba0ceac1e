"""What completions are worth: functions of people who make mistakes, models with their own words, and sums."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

import tiny
from plaudit.errors import PlauditError
from plaudit.loading import end_every_text, load_reward_model, load_tokenizer, save_pretrained
from plaudit.rewards import CountReward, LabelReward, ModelReward, Rewards, load_function, load_rewards

CPU = torch.device("cpu")
HI = [{"role": "user", "content": "good day"}]
SAID = [{"role": "assistant", "content": "a good one"}]


@pytest.fixture(autouse=True)
def _forget_modules():
    yield
    for name in [name for name in sys.modules if name.startswith(("plaudit_user_", "mine_for_"))]:
        del sys.modules[name]


def source(path: Path, text: str, name: str = "reward") -> str:
    path.write_text(text)
    return f"{path}:{name}"


# ------------------------------------------------------------------------------------------------------- functions


def test_a_function_gets_prompts_completions_and_the_other_columns(tmp_path):
    spec = source(
        tmp_path / "mine.py",
        "def reward(prompts, completions, answer, **rest):\n"
        "    assert sorted(rest) == ['level']\n"
        "    return [len(p) + 10 * (c == a) for p, c, a in zip(prompts, completions, answer)]\n",
    )
    rewards = load_rewards(spec)
    found = rewards(["ab", "c"], ["x", "y"], {"answer": ["x", "z"], "level": [1, 2]})
    assert found.tolist() == [12.0, 1.0]
    assert found.dtype == torch.float32


def test_a_function_of_a_module(tmp_path, monkeypatch):
    assert load_function("math:sqrt")(4) == 2
    source(tmp_path / "mine_for_reward.py", "def reward(**columns): return [1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function("mine_for_reward:reward")() == [1.0]


def test_a_file_may_hold_dataclasses(tmp_path):
    spec = source(
        tmp_path / "mine.py",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: int\n"
        "def reward(**columns): return [Point(3).x]\n",
    )
    assert load_function(spec)() == [3]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0]", "returned 1 values for 2 completions"),
        ("[1, 2, 3]", "returned 3 values for 2 completions"),
        ("None", "returned None: it must be one number for each completion"),
        ("0.5", "returned 0.5: it must be"),
        ("'ab'", "returned 'ab': it must be"),
        ("{0: 1.0, 1: 2.0}", "returned {0: 1.0, 1: 2.0}: it must be"),
        ("[1.0, None]", "returned NaN or None for a completion of prompt 1"),
        ("['1', 2]", "returned '1' for completion 0: it must be a finite number (float32: at most 3.4e38), or NaN or"),
        ("[0, 1e39]", "returned 1e+39 for completion 1: it must be a finite number"),
        ("[0, -10**400]", "returned -1000"),
        ("[torch.zeros(3, 3), 1]", "returned tensor([[0., 0., 0.], [0., 0., 0.], [0., 0., 0.]]) for completion 0"),
        ("[0, float('nan')]", "returned NaN or None for a completion of prompt 1"),
        ("[float('inf'), 0]", "returned inf for completion 0"),
        ("[0, -float('inf')]", "returned -inf for completion 1"),
        ("[[1], [2]]", "returned [1] for completion 0"),
        ("[1j, 2]", "returned 1j for completion 0"),
        ("torch.zeros(2, 1)", "returned [0.0] for completion 0"),
        ("torch.tensor(1.0)", "returned 1.0: it must be"),
    ],
)
def test_what_is_not_one_finite_number_each(tmp_path, returned, message):
    spec = source(tmp_path / "mine.py", f"import torch\ndef reward(**columns): return {returned}\n")
    with pytest.raises(PlauditError, match=re.escape(f"reward {spec!r} {message}")) as caught:
        load_rewards(spec)(["a", "b"], ["c", "d"], {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "returned",
    [[1, 2], (1.0, 2.0), torch.tensor([1, 2]), np.array([1.0, 2.0]), iter([1, 2]), [torch.tensor(1.0), np.float32(2)]],
    ids=["list", "tuple", "tensor", "array", "iterator", "scalars"],
)
def test_any_sequence_of_numbers_will_do(returned):
    assert Rewards({"mine": lambda **columns: returned})(["a", "b"], ["c", "d"], {}).tolist() == [1.0, 2.0]


def test_booleans_are_ones_and_zeros():
    assert Rewards({"mine": lambda **columns: [True, False]})(["a", "b"], ["c", "d"], {}).tolist() == [1.0, 0.0]


def test_a_function_that_fails_is_named_with_what_it_said(tmp_path):
    spec = source(tmp_path / "mine.py", "def reward(prompts, completions):\n    return [1 / 0 for _ in prompts]\n")
    with pytest.raises(PlauditError) as caught:
        load_rewards(spec)(["a"], ["b"], {})
    message = str(caught.value)
    assert message.startswith(f"reward {spec!r} failed: ZeroDivisionError: division by zero")
    assert "mine.py:2" in message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_function_that_does_not_take_the_columns(tmp_path):
    spec = source(tmp_path / "mine.py", "def reward(prompts, completions):\n    return [0.0]\n")
    with pytest.raises(PlauditError, match="unexpected keyword argument 'answer'") as caught:
        load_rewards(spec)(["a"], ["b"], {"answer": ["x"]})
    assert isinstance(caught.value.__cause__, TypeError)


def test_what_plaudit_has_to_say_itself_is_not_wrapped():
    def complain(**columns):
        raise PlauditError("no chat template.")

    with pytest.raises(PlauditError, match=r"^no chat template\.$"):
        Rewards({"mine": complain})(["a"], ["b"], {})


def test_an_interrupt_goes_through():
    def stop(**columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Rewards({"mine": stop})(["a"], ["b"], {})


def test_functions_that_cannot_be_loaded(tmp_path):
    spec = source(tmp_path / "mine.py", "value = 3\ndef other(): pass\ndef _hidden(): pass\n", "reward")
    with pytest.raises(PlauditError, match=r"has no function 'reward' \(it has: other\)"):
        load_rewards(spec)
    with pytest.raises(PlauditError, match="has no function 'value'"):
        load_rewards(spec.replace(":reward", ":value"))
    with pytest.raises(PlauditError, match="there is no file"):
        load_rewards(f"{tmp_path}/none.py:reward")
    for module in ("no_such_module_here:f", "no_such.module.here:f"):
        with pytest.raises(PlauditError, match="cannot import 'no_such"):
            load_rewards(module)


@pytest.mark.parametrize("text", ["import no_such_module_here\n", "def reward(:\n", "1 / 0\n", "raise SystemExit\n"])
def test_a_file_that_cannot_be_run(tmp_path, text):
    spec = source(tmp_path / "mine.py", text)
    with pytest.raises(PlauditError, match=r"mine\.py cannot be run: ") as caught:
        load_rewards(spec)
    assert caught.value.__cause__ is not None


# ----------------------------------------------------------------------------------------------- counts and sums


def test_counts_read_the_whole_text_and_end_at_a_hundred():
    assert CountReward("aa")(["aa", "a", "b"], ["aa", "ab", ""]) == [2.0, 1.0, 0.0]
    assert CountReward("x")([""], ["x" * 500]) == [100.0]
    assert load_rewards("count:a:b")(["a:b"], ["-a:b"], {}).tolist() == [2.0]


def test_counts_read_conversations_too():
    assert CountReward("good")([HI, HI], [SAID, "no"]) == [2.0, 1.0]
    assert CountReward("user")([HI], [SAID]) == [0.0]


def test_a_weighted_sum():
    one, two = (lambda **columns: [1.0, 2.0]), (lambda **columns: [10.0, -10.0])
    assert Rewards({"one": one, "two": two})(["a", "b"], ["c", "d"], {}).tolist() == [11.0, -8.0]
    weighted = Rewards({"one": one, "two": two}, weights=(2.0, -0.5))
    assert weighted(["a", "b"], ["c", "d"], {}).tolist() == [-3.0, 9.0]


def test_a_source_that_does_not_apply_is_left_out_of_the_sum():
    given = {"one": [1.0, math.nan, 3.0], "two": torch.tensor([math.nan, 5.0, 10.0]), "none": [None, 0, None]}
    sources = {name: lambda values=values, **columns: values for name, values in given.items()}
    rewards, texts = Rewards(sources, weights=(2.0, 1.0, 100.0)), ["x"] * 3
    assert rewards(texts, texts, {}).tolist() == [2.0, 5.0, 16.0]
    each = rewards.each(texts, texts, {})
    assert each.isnan().tolist() == [[False, True, False], [True, False, False], [True, False, True]]
    assert rewards.total(each).tolist() == [2.0, 5.0, 16.0]
    message = "reward 'two' and reward 'none' returned NaN or None for a completion of the prompt at d:40: that says"
    with pytest.raises(PlauditError, match=message):
        Rewards({"two": sources["two"], "none": sources["none"]})(texts, texts, {}, ["d:40", "d:41", "d:41"])


def test_names_are_short_unless_two_would_be_the_same():
    names = ["runs/one/final", "runs/two/final", "a/b.py:f", "count:a/b", "label:GOOD@some/model", "org/judge"]
    short = Rewards(dict.fromkeys(names)).short_names()
    assert short == ["runs/one/final", "runs/two/final", "b.py:f", "count:a/b", "label:GOOD", "judge"]


def failing(tmp_path, body, where=("d:7", "d:3", "d:3", "d:9")):
    """What is told when a reward function of this body gets four completions of three prompts."""
    spec = source(tmp_path / "mine.py", f"import sys\ndef reward(prompts, completions, level):\n    {body}\n")
    with pytest.raises(PlauditError) as caught:
        load_rewards(spec)(["a", "b", "b", "a"], ["1", "2", "3", ""], {"level": [5, 6, 6, 0]}, where)
    return str(caught.value).removeprefix(f"reward {spec!r} failed: ").replace(f"{tmp_path}/", "")


def test_a_failure_names_the_prompt_that_it_comes_from(tmp_path):
    found = failing(tmp_path, "return [1 / n for n in level]")
    assert found == "ZeroDivisionError: division by zero (mine.py:3), at the prompt at d:9."
    found = failing(tmp_path, "return [float(said[0]) for said in completions]", None)
    assert found == "IndexError: string index out of range (mine.py:3), at prompt 3."
    # The completions of a prompt stay together; what fails otherwise, or not at all, is not to blame.
    found = failing(tmp_path, "assert len(prompts) == 1\n    raise ValueError('no')")
    assert found == "AssertionError (mine.py:3), at the prompt at d:3."
    found = failing(tmp_path, "if len(prompts) > 2: raise ValueError('many')\n    raise ValueError('few')")
    assert found == "ValueError: many (mine.py:3), in a call whose first prompt is the prompt at d:7."


def test_a_failure_is_told_on_one_line_and_an_exit_is_one(tmp_path):
    found = failing(tmp_path, "raise ValueError('one\\n  two\\r\\n\\nthree ')")
    assert found == "ValueError: one two three (mine.py:3), at the prompt at d:7."
    assert failing(tmp_path, "sys.exit('enough')") == "SystemExit: enough (mine.py:3), at the prompt at d:7."


def test_scaling_leaves_the_mean_where_it_is():
    rewards, values = Rewards({}, scale=True, clip=4.0), torch.tensor([1.0, 3.0])
    assert rewards.shaped(values, values).tolist() == [1.0, 3.0]  # their standard deviation is 1
    later = torch.tensor([6.0, 10.0])
    found = rewards.shaped(later, later)
    spread = np.std([1, 3, 6, 10])
    torch.testing.assert_close(found, torch.tensor([6 / spread, 10 / spread]).clamp(max=4.0).float())
    assert rewards.moments.count == 4


def test_weights_and_names_must_match():
    with pytest.raises(PlauditError, match="2 weights for 1 rewards"):
        load_rewards("count:a", weights=(1.0, 2.0))
    with pytest.raises(PlauditError, match="named twice"):
        load_rewards(["count:a", "count:a"], weights=(1.0, 2.0))


def test_clipping_is_on_both_sides():
    raw = torch.tensor([-3.0, -1.0, 0.5, 7.0])
    assert Rewards({}, clip=2.0).shaped(raw, raw).tolist() == [-2.0, -1.0, 0.5, 2.0]
    assert torch.equal(Rewards({}).shaped(raw, raw), raw)


def test_running_moments_are_those_of_all_rewards_so_far():
    rewards = Rewards({}, normalise=True)
    parts = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([-4.0]), torch.tensor([0.0, 3.0])]
    for i, part in enumerate(parts):
        found = rewards.shaped(part, part)
        seen = np.concatenate(parts[: i + 1])
        np.testing.assert_allclose(found, (part - seen.mean()) / max(seen.std(), 1e-8), rtol=1e-5)
    assert rewards.moments.count == 6


def test_b30_the_rewards_of_all_processes_move_the_moments():
    rewards = Rewards({}, normalise=True)
    assert rewards.shaped(torch.tensor([1.0]), torch.tensor([1.0, 3.0])).tolist() == [-1.0]
    assert rewards.moments.count == 2


def test_equal_rewards_normalise_to_nothing():
    assert Rewards({}, normalise=True).shaped(*[torch.full((4,), 0.1)] * 2).abs().max() < 1


def test_clipping_comes_after_normalising():
    rewards = Rewards({}, clip=1.0, normalise=True)
    assert rewards.shaped(*[torch.tensor([0.0] * 9 + [100.0])] * 2)[-1] == 1.0


# --------------------------------------------------------------------------------------------------------- models


def wordy(path: Path, **changes) -> str:
    """A reward model whose tokens are words: another vocabulary than the policy's bytes."""
    words = ["<pad>", "<end>", "<unk>", "good", "bad", "day", "a", "one", "very"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(1)
    ids = {"vocab_size": len(words), "eos_token_id": 1, "pad_token_id": 0, "num_labels": 1}
    config = tiny.config(**ids, **changes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_reward_model_reads_through_its_own_tokenizer(tmp_path):
    name = wordy(tmp_path)
    texts = ["good day a good one", "bad day", "good", "very " * 20]
    prompts, completions = [t[:4] for t in texts], [t[4:] for t in texts]
    found = load_rewards(name)(prompts, completions, {"ignored": [0] * 4})
    tokenizer = load_tokenizer(name)
    model = AutoModelForSequenceClassification.from_pretrained(name)
    rows = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        expected = model(**rows).logits[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(set(found.tolist())) == 4
    for tokens in (1, 8, 10_000):
        small = load_rewards(name, tokens_per_pass=tokens)(prompts, completions, {})
        torch.testing.assert_close(small, expected, atol=1e-5, rtol=0)


def test_a_text_too_long_is_cut_before_its_end(tmp_path):
    name = wordy(tmp_path, max_position_embeddings=8)
    found = load_rewards(name)(["very "] * 2, ["good " * 7 + "bad", "good " * 6], {})
    assert found[0] == found[1]


def test_a_reward_model_gives_no_gradient_and_has_no_dropout(tmp_path):
    name = wordy(tmp_path, attention_dropout=0.9)
    rewards = load_rewards(name)
    model = rewards.sources[name].policy
    assert not any(p.requires_grad for p in model.parameters())
    first = rewards(["good "], ["day"], {})
    assert not first.requires_grad
    assert torch.equal(rewards(["good "], ["day"], {}), first)


def test_a_reward_model_reads_conversations_as_its_own_template_writes_them(tmp_path):
    folder = tiny.folder(tmp_path / "base", vocab_size=258, initializer_range=0.3)
    tokenizer = tiny.tokenizer(begins=True)
    tokenizer.chat_template = "<|begin|>" + tiny.CHAT
    end_every_text(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    policy = load_reward_model(folder, tokenizer)
    save_pretrained(policy, tokenizer, tmp_path / "saved")
    found = load_rewards(str(tmp_path / "saved"))([HI], [SAID], {})
    text = "<user>good day<|end|>\n<assistant>a good one<|end|>\n"
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    states = policy.base(torch.tensor([ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(found[0], (policy.backbone.score.weight[0] @ states).detach(), atol=1e-5, rtol=0)
    tokenizer.chat_template = None
    with pytest.raises(PlauditError, match="no chat template"):
        ModelReward(policy, tokenizer)([HI], [SAID])


def test_wrong_models(tmp_path):
    with pytest.raises(PlauditError, match="there is no folder"):
        load_rewards("./no-such-model")
    with pytest.raises(PlauditError, match="there is no folder"):
        load_rewards("label:good@./no-such-model")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "_attn_implementation_internal": "a/b"}')
    for spec in (str(tmp_path), f"label:good@{tmp_path}"):
        with pytest.raises(PlauditError, match="foreign code"):
            load_rewards(spec)


# --------------------------------------------------------------------------------------------------------- labels


def classifier(path: Path, kind: str = "bert", pad: bool = True) -> str:
    """A classifier of two labels."""
    wordy(path)
    torch.manual_seed(2)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    if kind == "bert":
        config = BertConfig(vocab_size=9, max_position_embeddings=12, initializer_range=0.5, **shape, **labels)
    else:
        config = tiny.config(vocab_size=9, pad_token_id=0 if pad else None, initializer_range=0.5, **labels)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(("kind", "pad"), [("bert", True), ("llama", True), ("llama", False)])
def test_a_label_is_worth_its_probability(tmp_path, kind, pad):
    name = classifier(tmp_path, kind, pad)
    texts = ["good day a good one", "bad day", "one"]
    rewards = load_rewards(f"label:good@{name}")
    found = rewards([t[:3] for t in texts], [t[3:] for t in texts], {})
    model = AutoModelForSequenceClassification.from_pretrained(name)
    tokenizer = load_tokenizer(name)
    for text, value in zip(texts, found, strict=True):
        with torch.no_grad():
            probability = model(torch.tensor([tokenizer(text).input_ids])).logits.softmax(-1)[0, 1]
        assert float(value) == pytest.approx(float(probability), abs=1e-5)
    other = load_rewards(f"label:bad@{name}")([t[:3] for t in texts], [t[3:] for t in texts], {})
    torch.testing.assert_close(found + other, torch.ones(3), atol=1e-5, rtol=0)


def test_a_classifier_reads_what_was_said_and_no_more_than_it_can(tmp_path):
    reward = LabelReward(classifier(tmp_path), "good", CPU)
    assert reward([HI], [SAID]) == pytest.approx(reward(["good day\n"], ["a good one"]))
    assert 0 < reward([""], ["very " * 50])[0] < 1
    assert reward([""], ["very " * 50]) == pytest.approx(reward([""], ["very " * 60]))
    assert math.isfinite(sum(reward(["good "] * 40, ["day"] * 40)))


def test_a_label_that_the_model_does_not_have(tmp_path):
    name = classifier(tmp_path)
    with pytest.raises(PlauditError, match=r"has no label 'great'; its labels are bad, good\."):
        load_rewards(f"label:great@{name}")


def test_rewards_that_are_all_alike_so_far_are_not_scaled():
    values = torch.full((4,), -1.0)
    assert Rewards({}, scale=True).shaped(values, values).tolist() == [-1.0] * 4
