"""What is tokenised, which tokens are learned, and that every text begins once."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from plaudit.errors import PlauditError
from plaudit.loading import end_every_text
from plaudit.templates import Template

END = 256
HI = [{"role": "user", "content": "hi"}]
SAID = [{"role": "assistant", "content": "yo"}]
LONG = [*HI, *SAID, {"role": "user", "content": "so?"}, {"role": "assistant", "content": "no"}]
BEGINNING = "<|begin|>" + tiny.CHAT


def template(chat: str | None = tiny.CHAT, begins: bool = False) -> Template:
    tokenizer = tiny.tokenizer(chat=chat is not None, begins=begins)
    tokenizer.chat_template = chat
    return Template(tokenizer)


def spoken(made: Template, ids: list[int]) -> str:
    return made.tokenizer.decode(ids, skip_special_tokens=False)


def learned(made: Template, encoded) -> list[str]:
    """The runs of tokens that are actions, as texts."""
    runs: list[list[int]] = []
    before = False
    for token, acting in zip(encoded.completion, encoded.actions, strict=True):
        if acting:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = acting
    return [spoken(made, run) for run in runs]


# ------------------------------------------------------------------------------------------------------ plain text


def test_plain_text_and_its_end():
    made = template(None)
    encoded = made.encode("ab", "cd")
    assert spoken(made, encoded.prompt) == "ab"
    assert spoken(made, encoded.completion) == "cd<|end|>"
    assert encoded.completion[-1] == END
    assert encoded.actions == [True, True, True]
    assert len(encoded) == 5
    assert made.text("ab", "cd") == "abcd"


def test_an_end_that_is_written_out_is_not_doubled():
    made = template(None)
    assert made.encode("ab", "cd<|end|>") == made.encode("ab", "cd")


def test_an_empty_completion_is_an_end():
    assert template(None).encode("ab", "").completion == [END]


@pytest.mark.parametrize("begins", [False, True])
def test_an_empty_prompt_still_has_something_to_follow(begins):
    made = template(None, begins)
    first = made.tokenizer.bos_token_id if begins else END
    assert made.prompt("") == [first]
    assert made.encode("", "a").prompt == [first]


@pytest.mark.parametrize("text", ["ab", "<|begin|>ab"])
def test_B38_exactly_one_beginning(text):
    made = template(None, begins=True)
    begin = made.tokenizer.bos_token_id
    assert made.opening == [begin]
    encoded = made.encode(text, "cd")
    assert (encoded.prompt + encoded.completion).count(begin) == 1
    assert encoded.prompt[0] == begin
    assert spoken(made, encoded.prompt) == "<|begin|>ab"


def test_a_begin_token_that_the_tokenizer_does_not_use_is_not_added():
    tokenizer = tiny.tokenizer(begins=True)
    tokenizer.backend_tokenizer.post_processor = tiny.tokenizer().backend_tokenizer.post_processor
    made = Template(tokenizer)
    assert made.opening == []
    assert spoken(made, made.prompt("ab")) == "ab"


def test_decoding_leaves_special_tokens_out_and_spaces_in():
    made = template(None)
    ids = made.encode("", " a , b .  ").completion
    assert made.decode(ids) == " a , b .  "


# --------------------------------------------------------------------------------------------------- conversations


def test_the_last_turn_of_a_conversation():
    made = template()
    encoded = made.encode(HI, SAID)
    assert spoken(made, encoded.prompt) == "<user>hi<|end|>\n<assistant>"
    assert spoken(made, encoded.completion) == "yo<|end|>\n"
    assert encoded.actions == [True, True, True, False]  # the line break after the end is nobody's choice
    assert made.encode(HI, "yo") == encoded
    assert made.encode("hi", SAID) == encoded


def test_every_assistant_turn_of_a_whole_conversation():
    made = template()
    encoded = made.encode("", LONG)
    assert learned(made, encoded) == ["yo<|end|>", "no<|end|>"]
    assert spoken(made, encoded.prompt + encoded.completion) == made.text("", LONG)
    assert spoken(made, encoded.prompt) == "<user>hi<|end|>\n<assistant>"


def test_turns_after_the_prompt_and_turns_after_the_last_answer():
    made = template()
    later = [{"role": "user", "content": "ah"}]
    encoded = made.encode(LONG[:1], LONG[1:] + later)
    assert learned(made, encoded) == ["yo<|end|>", "no<|end|>"]
    assert encoded == made.encode("", LONG)
    follow = made.encode(LONG[:2], LONG[2:])
    assert learned(made, follow) == ["no<|end|>"]
    assert spoken(made, follow.prompt) == "<user>hi<|end|>\n<assistant>yo<|end|>\n<user>so?<|end|>\n<assistant>"


def merging() -> PreTrainedTokenizerFast:
    """A tokenizer whose merges reach over the marks of its template."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated")])
    plain.decoder = decoders.Fuse()
    texts = ["User: hi. Assistant: yo. User: so? Assistant: no. "] * 20
    plain.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|end|>")
    made.chat_template = (
        "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}. {% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    )
    return made


def test_what_is_learned_on_is_what_is_sampled_from():
    for made in (template(), template(BEGINNING, begins=True), Template(merging())):
        assert made.encode(HI, SAID).prompt == made.prompt(HI)
        assert made.encode("hi", "yo").prompt == made.prompt("hi")
    made = Template(merging())
    assert made.prompt(HI) != made._ids("User: hi. ") + made._ids("Assistant: ")  # where it makes a difference


@pytest.mark.parametrize("begins", [False, True])
def test_B38_a_template_that_writes_the_beginning_itself(begins):
    made = template(BEGINNING, begins=True)
    if not begins:
        made = template(BEGINNING.replace("<|begin|>", ""), begins=True)
    begin = made.tokenizer.bos_token_id
    encoded = made.encode(HI, SAID)
    assert (encoded.prompt + encoded.completion).count(begin) == begins
    # A reward model reads the text through its tokenizer, which begins and ends each one.
    end_every_text(made.tokenizer)
    ids = made.tokenizer(made.text(HI, SAID)).input_ids
    assert ids.count(begin) == 1
    assert ids[0] == begin
    assert ids[-1] == END


def test_a_template_that_rewrites_earlier_turns():
    forgetful = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if loop.last or m.role == 'user' else '...' }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    made = template(forgetful)
    assert learned(made, made.encode(HI, SAID)) == ["yo<|end|>"]
    with pytest.raises(PlauditError, match="writes earlier turns differently"):
        made.encode("", LONG)


def test_a_template_that_wants_a_user_first_is_asked_about_whole_conversations_only():
    strict = (
        "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
        "{{ raise_exception('No user query found.') }}{% endif %}" + tiny.CHAT
    )
    made = template(strict)
    system = [{"role": "system", "content": "be kind"}]
    assert learned(made, made.encode("", system + LONG)) == ["yo<|end|>", "no<|end|>"]
    with pytest.raises(PlauditError, match=r"refuses a conversation of the data: No user query found\."):
        made.prompt(system)


def test_conversations_without_a_template():
    made = template(None)
    for call in (lambda: made.prompt(HI), lambda: made.encode(HI, SAID), lambda: made.text(HI, SAID)):
        with pytest.raises(PlauditError, match="no chat template"):
            call()


def test_nobody_answers():
    for said in (HI, []):
        with pytest.raises(PlauditError, match="nothing to learn from"):
            template().encode("", said)


def test_a_conversation_as_one_text():
    made = template()
    assert made.text(HI, SAID) == "<user>hi<|end|>\n<assistant>yo<|end|>\n"
    assert made.text(HI, "yo") == made.text("hi", SAID) == made.text("", HI + SAID) == made.text(HI, SAID)


# --------------------------------------------------------------------------------------------- ending every text


@pytest.mark.parametrize("begins", [False, True])
def test_every_text_is_ended_by_the_tokenizer_itself(tmp_path, begins):
    tokenizer = tiny.tokenizer(begins=begins)
    before = tokenizer("ab").input_ids
    end_every_text(tokenizer)
    assert tokenizer("ab").input_ids == [*before, END]
    assert tokenizer("").input_ids == [*before[:-2], END]
    assert tokenizer("abcd", truncation=True, max_length=3).input_ids[-1] == END
    end_every_text(tokenizer)
    assert tokenizer("ab").input_ids == [*before, END]
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again("ab").input_ids == [*before, END]


def test_an_ended_reward_tokenizer_opens_no_text_with_its_end():
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = tokenizer.eos_token  # as GPT-2's
    assert Template(tokenizer).opening == []
    end_every_text(tokenizer)
    assert tokenizer("ab").input_ids[-1] == END
    assert Template(tokenizer).opening == []
