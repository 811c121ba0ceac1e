"""Where the prompt ends and the answer begins: in conversations, in transcripts of the hh-rlhf kind, in plain text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from plaudit.rows import LeaveOut, Text

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_EMPTY, _OPEN = "a completion is empty", "ends with the person's turn"


def said(text: Text) -> Text:
    """`text`, unless nothing is said in it."""
    if not (text.strip() if isinstance(text, str) else any(message["content"].strip() for message in text)):
        raise LeaveOut(_EMPTY)
    return text


def includes_prompt(text: Text) -> bool:
    """Whether a conversation starts before the answer does."""
    return isinstance(text, list) and bool(text) and text[0]["role"] != "assistant"


def split(transcript: Text) -> tuple[Text, Text]:
    """A whole transcript -> (prompt, last answer); text without an assistant's turn is all answer."""
    if isinstance(transcript, str):
        before, marker, last = transcript.rpartition(ASSISTANT)
        if marker and HUMAN in last:
            raise LeaveOut(_OPEN)
        return before + marker, last
    if transcript and transcript[-1]["role"] != "assistant":
        raise LeaveOut(_OPEN)
    return transcript[:-1], transcript[-1:]


def aligned(prompt: Text, completion: Text) -> tuple[Text, Text]:
    """Both as text or both as messages: a lone text becomes the message that it must have been."""
    if isinstance(prompt, list) and isinstance(completion, str):
        return prompt, [{"role": "assistant", "content": completion}]
    if isinstance(prompt, str) and isinstance(completion, list):
        return [{"role": "user", "content": prompt}] if prompt else [], completion
    return prompt, completion


def parted(texts: Sequence[Any]) -> tuple[Text, list[Text]]:
    """(the prompt that several texts of one form begin with, what is left of each).

    Of conversations, the messages that all share. Of transcripts, all up to the assistant's last turn: in a few rows of
    hh-rlhf they differ before it, so each is split at its own, and the first gives the prompt; cutting all at the
    length of one prompt would tear a sentence. Of plain texts, what all share, see `common`.
    """
    if isinstance(texts[0], list):
        shared = _shared(texts)
        return texts[0][:shared], [text[shared:] for text in texts]
    if any(ASSISTANT in text for text in texts):
        parts = [split(text) for text in texts]
        return parts[0][0], [last for _, last in parts]
    prompt = common(texts)
    return prompt, [text[len(prompt) :] for text in texts]


def common(texts: Sequence[str]) -> str:
    """What plain texts begin with, up to the end of a line or of a word. The space before a word stays with it, where
    tokenizers have it, and each text keeps a word at least."""
    first, *_, last = sorted(text.rstrip() for text in texts)  # what these two share, all share
    places = enumerate(zip(first, last, strict=False))
    shared = next((place for place, (one, other) in places if one != other), len(first))
    return re.sub(r"[^\S\n]*\S*\Z", "", first[:shared])


def _shared(texts: Sequence[list[dict[str, str]]]) -> int:
    """How many messages all conversations begin with, none of which is the assistant's last word in one of them."""
    most = min(len(text) - (text[-1:] != [] and text[-1]["role"] == "assistant") for text in texts)
    differ = (i for i in range(most) if any(text[i] != texts[0][i] for text in texts))
    return next(differ, most)
