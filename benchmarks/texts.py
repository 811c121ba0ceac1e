"""The texts that both sides of `against_trl.py` learn from, in the order in which plaudit's seed takes them."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from plaudit.data import Order
from works import Work

TURN = "\n\nAssistant:"


def dialogues(folder: Path, seed: int) -> list[dict[str, str]]:
    """`prompt`, `chosen` and `rejected` of hh-rlhf's test parts, shuffled: the last of the assistant's turns is the
    answer. Raises SystemExit where the files are missing."""
    found = []
    for part in ("helpful-base", "harmless-base"):
        path = folder / "hh-rlhf" / part / "test.jsonl.gz"
        if not path.is_file():
            raise SystemExit(f"{path} is missing: --data names a folder that holds hh-rlhf/{part}/test.jsonl.gz.")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found += [pair for pair in map(cut, map(json.loads, lines)) if pair]
    random.Random(seed).shuffle(found)
    return found


def cut(row: dict[str, str]) -> dict[str, str] | None:
    """A dialogue as a pair; nothing where the answers are the same, empty, or do not follow one prompt."""
    end = row["chosen"].rindex(TURN) + len(TURN)
    prompt, chosen = row["chosen"][:end], row["chosen"][end:]
    rejected = row["rejected"][end:]
    fits = row["rejected"].startswith(prompt) and TURN not in rejected and chosen != rejected
    spoken = all(text.startswith(" ") and text.strip() for text in (chosen, rejected))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected} if fits and spoken else None


def openings(folder: Path, seed: int) -> list[dict[str, str]]:
    """The first words of movie reviews, shuffled."""
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    found = sorted({json.loads(line)["prompt"] for line in lines})
    random.Random(seed).shuffle(found)
    return [{"prompt": prompt} for prompt in found]


class Lengths:
    """Tokens of texts, where both sides count the same."""

    def __init__(self, tokenizer: Any) -> None:
        self.ids: Callable[[str], list[int]] = lambda text: tokenizer(text, add_special_tokens=False).input_ids

    def within(self, row: dict[str, str], limit: int) -> bool:
        """Whether each answer after its prompt, an end token added, keeps the limit; and whether plaudit, which reads
        prompt and answer apart, and TRL, which reads them together, read the same tokens."""
        prompt = self.ids(row["prompt"])
        for text in (row["chosen"], row["rejected"]):
            both = prompt + self.ids(text)
            if len(both) >= limit or both != self.ids(row["prompt"] + text):
                return False
        return True


def rows(work: Work, tokenizer: Any, data: Path, reviews: Path) -> list[dict[str, Any]]:
    """As many rows as the work takes, warm-up included, in no particular order."""
    count = work.items * (work.steps + 1)
    found = list(some(work, Lengths(tokenizer), data, reviews, count))[:count]
    if len(found) < count:
        raise SystemExit(f"{work.kind}: {count} rows are needed and {len(found)} are at hand: take fewer steps.")
    return found


def some(work: Work, lengths: Lengths, data: Path, reviews: Path, count: int) -> Iterator[dict[str, Any]]:
    if work.kind == "ppo":
        yield from openings(reviews, work.seed)
        return
    pairs = dialogues(data, work.seed)
    if work.kind == "grpo":
        yield from ({"prompt": one["prompt"]} for one in pairs if len(lengths.ids(one["prompt"])) <= work.max_tokens)
        return
    kept = (one for one in pairs if lengths.within(one, work.max_tokens))
    for one, _ in zip(kept, range(count), strict=False):
        if work.kind == "sft":
            yield {"prompt": one["prompt"], "completion": one["chosen"]}
        elif work.kind == "kto":
            yield {"prompt": one["prompt"], "completion": one["chosen"], "label": True}
            yield {"prompt": one["prompt"], "completion": one["rejected"], "label": False}
        else:
            yield one


def in_order(work: Work, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as plaudit comes to them, for TRL to take one after the other."""
    order = Order(len(found), work.items, work.seed)
    return [found[i] for step in range(work.steps + 1) for i in order[step]]


def write(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
