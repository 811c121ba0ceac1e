"""The work that both sides do, in numbers. Nothing is imported that one of them lacks.

How many rows TRL takes at once (`micro`) was looked for on two cores, by the seconds of one step after a warm-up, and
its peak memory; `micro` is the place to look again. Taken was the fastest, and of those near it the one with least
memory, on the rows that the benchmark itself uses, which can only favour TRL. plaudit's own was left to plaudit.

What adapters make of it was not looked at: they take the size of the same work without them. KTO compares the rows of
one pass with each other, so that all are one pass. Of PPO's, `micro` is how many are sampled side by side: all.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Work:
    """kind           the algorithm: sft, reward, dpo, ipo, orpo, simpo, kto, grpo or ppo
    batch          rows (or pairs) that an optimizer step sees
    max_tokens     of a row, its end included; of a prompt where completions are sampled
    rollout, group completions that are sampled at a time, and of each prompt
    new_tokens     limit of a completion
    epochs         over a rollout
    lora, top      rank of adapters, and how many of the last layers learn (0: all), which TRL has no word for
    micro          rows (or pairs) that go through TRL's model at once (see above); the gradient is the whole batch's
    steps          that are timed, after one that is not: optimizer steps, or rollouts with all that is learned of them.
                   Where they are short, more: what a process does once, such as growing, falls into the first two
    model, rewards folders; data, a file of JSON lines; output, a folder that is this side's own
    precision      "bfloat16": autocast over float32 weights that learn
    falls          whether the learning rate rises over a tenth of the steps and falls to zero, or stays as it is
    keep           save what was learned in the folder `final` of the output, and report the loss of every step
    """

    kind: str
    batch: int
    max_tokens: int
    learning_rate: float
    micro: int
    rollout: int = 0
    group: int = 1
    new_tokens: int = 0
    epochs: int = 1
    lora: int = 0
    top: int = 0
    steps: int = 3
    seed: int = 0
    precision: str = "bfloat16"
    falls: bool = False
    keep: bool = False
    model: str = ""
    rewards: str = ""
    data: str = ""
    output: str = ""

    @property
    def sampled(self) -> bool:
        """Whether it learns from what it samples."""
        return self.rollout > 0

    @property
    def updates(self) -> int:
        """Optimizer steps in one of `steps`."""
        return self.epochs * self.rollout // self.batch if self.sampled else 1

    @property
    def items(self) -> int:
        """Rows, pairs or prompts of the data that one of `steps` takes."""
        return self.rollout // self.group if self.sampled else self.batch

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Work:
        return cls(**json.loads(path.read_text()))


_GRPO = {"batch": 32, "rollout": 32, "group": 8, "max_tokens": 128, "new_tokens": 64, "micro": 8}
_PPO = {"batch": 16, "rollout": 32, "max_tokens": 128, "new_tokens": 32, "epochs": 2, "micro": 32}
WORKS = {
    "grpo": Work("grpo", learning_rate=1e-6, **_GRPO),
    "grpo_lora": Work("grpo", learning_rate=1e-5, lora=16, **_GRPO),
    "ppo": Work("ppo", learning_rate=1e-6, **_PPO),
    "ppo_top8": Work("ppo", learning_rate=1e-6, top=8, **_PPO),
    "dpo": Work("dpo", batch=4, max_tokens=512, learning_rate=1e-6, micro=1, steps=6),
    "dpo_lora": Work("dpo", batch=4, max_tokens=512, learning_rate=1e-5, lora=16, micro=1, steps=6),
    "reward": Work("reward", batch=8, max_tokens=512, learning_rate=1e-6, micro=2, steps=6),
    "kto": Work("kto", batch=8, max_tokens=512, learning_rate=1e-6, micro=8),
    "sft": Work("sft", batch=8, max_tokens=256, learning_rate=1e-5, micro=2, steps=6),
}
