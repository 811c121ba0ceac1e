"""Text or conversation -> token ids, and which of them are actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from plaudit.errors import PlauditError
from plaudit.records import Text


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and of what follows it, with one flag for each token that follows: is it an action?

    whole: a text without a prompt, which may be cut into windows.
    """

    prompt: list[int]
    completion: list[int]
    actions: list[bool]
    whole: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    def learned_whole(self) -> Encoded:
        """The same tokens, each of them an action but the first, which nothing precedes."""
        ids = self.prompt + self.completion
        return Encoded(ids[:1], ids[1:], [True] * (len(ids) - 1), whole=True)

    def windows(self, size: int, overlap: int) -> list[Encoded]:
        """Pieces of at most `size` tokens. Each begins with the last `overlap` tokens of the one before it, which are
        read there and not learned again: what is an action here is so in exactly one piece."""
        ids = self.prompt + self.completion
        acting = [False] * len(self.prompt) + self.actions
        pieces: list[Encoded] = []
        start, read = 0, len(self.prompt)
        while not pieces or read < len(ids):
            stop = start + size
            pieces.append(Encoded(ids[start:read], ids[read:stop], acting[read:stop], whole=True))
            start, read = stop - overlap, stop
        return pieces


class Template:
    """How one tokenizer writes prompts and completions.

    Prompt and completion are tokenised apart, as a sampler meets them: what is learned on is then exactly what is
    sampled from. The end token closes every completion and is an action, or stopping is never learned.

    encodes: prompts go to an encoder, which is used to the token that its tokenizer closes each text with.
    """

    def __init__(self, tokenizer: Any, encodes: bool = False) -> None:
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        written = tokenizer("a").input_ids
        self.opening: list[int] = [i for i in written[:1] if i == tokenizer.bos_token_id]
        self.closing: list[int] = [i for i in written[-1:] if encodes and i == self.end]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def prompt(self, prompt: Text) -> list[int]:
        """The ids that a completion is drawn after; never empty, so that the first token has something to follow."""
        if isinstance(prompt, str):
            ids = self._ids(prompt)
            if ids[:1] != self.opening:
                ids = self.opening + ids
            if ids[-1:] != self.closing:
                ids = ids + self.closing
        else:
            ids = self._ids(self._chat(prompt, ask=True))
        start = self.tokenizer.bos_token_id
        return ids or [self.end if start is None else start]

    def encode(self, prompt: Text, completion: Text) -> Encoded:
        """A demonstration. A conversation without prompt learns every assistant turn."""
        if isinstance(prompt, str) and isinstance(completion, str):
            ids = self._ids(completion)
            if ids[-1:] != [self.end]:
                ids.append(self.end)
            return Encoded(self.prompt(prompt), ids, [True] * len(ids), whole=not prompt)
        turns = [] if prompt == "" else _turns(prompt, "user")
        return self._conversation(turns, _turns(completion, "assistant"))

    def text(self, prompt: Text, completion: Text) -> str:
        """Both as one text, as a reward model reads it: without the first token that its tokenizer puts before."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        turns = [] if prompt == "" else _turns(prompt, "user")
        text = self._chat(turns + _turns(completion, "assistant"), ask=False)
        return text.removeprefix(self.tokenizer.bos_token) if self.opening else text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _chat(self, messages: list[dict[str, str]], ask: bool) -> str:
        if not self.tokenizer.chat_template:
            raise PlauditError(
                "the data holds conversations but the model's tokenizer has no chat template: "
                "use a chat model, or give `prompt` and `completion` as plain text."
            )
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except TemplateError as error:
            raise PlauditError(f"the model's chat template refuses a conversation of the data: {error}") from error
        return text

    def _conversation(self, prompt: list[dict[str, str]], said: list[dict[str, str]]) -> Encoded:
        """Cuts the rendered conversation before and after each assistant turn, so that no template needs marks. What
        comes before the first is what a sampler is asked with; what comes after the last is left out."""
        start: list[int] | None = None
        ids: list[int] = []
        actions: list[bool] = []
        done = ""
        for i in (i for i, turn in enumerate(said) if turn["role"] == "assistant"):
            asked = self._chat(prompt + said[:i], ask=True) if prompt or i else ""
            if start is None:
                start = self._ids(asked)
            else:
                self._extend(ids, actions, asked, done, False)
            done = self._chat(prompt + said[: i + 1], ask=False)
            self._extend(ids, actions, done, asked, True)
        if start is None:
            raise PlauditError("a conversation without an assistant turn has nothing to learn from: leave it out.")
        return Encoded(start, ids, actions)

    def _extend(self, ids: list[int], actions: list[bool], longer: str, shorter: str, acting: bool) -> None:
        if not longer.startswith(shorter):
            raise PlauditError(
                "the chat template writes earlier turns differently once later ones follow, so the assistant's tokens "
                "cannot be told apart: use a template that only appends."
            )
        added = self._ids(longer[len(shorter) :])
        # What a template writes after the end token (a line break, often) is nobody's choice.
        stop = added.index(self.end) + 1 if acting and self.end in added else len(added)
        ids += added
        actions += [acting and k < stop for k in range(len(added))]


def _turns(text: Text, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)
