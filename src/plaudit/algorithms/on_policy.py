"""What algorithms share that learn from their own samples: a rollout is sampled, scored, and handed out in parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plaudit.advantages import RunningMoments, degenerate, overlong_penalty
from plaudit.algorithms.base import Algorithm
from plaudit.batch import Batch, collate
from plaudit.data import Order
from plaudit.errors import PlauditError, SharedError
from plaudit.policy import Policy
from plaudit.records import Prompt
from plaudit.rewards import Rewards
from plaudit.sampler import LocalSampler, Sampler, Sampling
from plaudit.settings.policy_gradient import OnPolicy
from plaudit.templates import Template
from plaudit.world import World


@dataclass(frozen=True)
class Asked:
    """A prompt, as the record it came from and as token ids."""

    record: Prompt
    ids: list[int]

    @property
    def where(self) -> str:
        """What a person finds it by: file and line, or how it begins if it comes from neither."""
        return self.record.where or f"{self.record.prompt!r:.60}"

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int, template: Template) -> Asked:
        """The same prompt, cut to the first `count` tokens of its text. Raises PlauditError for a conversation."""
        if not isinstance(self.record.prompt, str):
            raise PlauditError(
                f"prompt_tokens: the prompt at {self.where} is a conversation, which cannot be cut: take data of plain "
                "text, or leave prompt_tokens out."
            )
        kept = self.ids[: len(template.opening) + count]
        if len(kept) + len(template.closing) >= len(self.ids):
            return self
        return Asked(replace(self.record, prompt=template.decode(kept)), kept + template.closing)


@dataclass(frozen=True)
class Completion:
    """One completion of a prompt, scored: `score` is the reward as it is learned from."""

    asked: Asked
    index: int
    ids: list[int]
    logprobs: list[float]
    truncated: bool
    text: str
    score: float


def score(rewards: Rewards, asked: Sequence[Asked], texts: Sequence[str], world: World) -> Tensor:
    """(n,) raw rewards of completions; the prompts' other columns go to the reward functions by name."""
    return score_each(rewards, asked, texts, world)[1]


def score_each(rewards: Rewards, asked: Sequence[Asked], texts: Sequence[str], world: World) -> tuple[Tensor, Tensor]:
    """(sources, n) rewards of each source, NaN where it does not apply, and (n,) their weighted sums. Raises
    SharedError on all processes if scoring fails on any."""
    names = sorted({name for a in asked for name in a.record.columns})
    columns = {name: [a.record.columns.get(name) for a in asked] for name in names}
    prompts = [a.record.prompt for a in asked]
    said = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    where = [a.where for a in asked]
    failure: PlauditError | None = None
    try:
        with world.autocast():
            each = rewards.each(prompts, said, columns, where)
        raw = rewards.total(each, where)
    except PlauditError as error:
        failure = error
    if told := [sentence for sentence in world.gather([str(failure or "")]) if sentence]:
        raise SharedError(told[0]) from failure
    return each, raw


class OnPolicyAlgorithm(Algorithm):
    """Samples, scores and reuses rollouts; a subclass says what advantages are and what the loss is.

    settings.rollout completions are sampled at a time; each optimizer step sees settings.batch_size of them.
    """

    reuse = 1
    unmoved = False
    """Whether the policy is still the one that sampled what is learned from."""

    def __init__(
        self,
        settings: OnPolicy,
        world: World,
        policy: Policy,
        template: Template,
        sampler: Sampler,
        rewards: Rewards,
        data: list[Asked],
        held: list[Asked],
    ) -> None:
        super().__init__(policy, world, settings.tokens_per_pass)
        self.settings, self.template, self.sampler, self.rewards = settings, template, sampler, rewards
        self.data, self.held = data, held
        policy.temperature = settings.temperature
        if settings.rollout % (settings.group * world.size) or settings.batch_size % (settings.group * world.size):
            raise PlauditError(
                f"rollout ({settings.rollout}) and batch_size ({settings.batch_size}) must be multiples of group x "
                f"processes ({settings.group} x {world.size}), so that the completions of a prompt stay together."
            )
        self.order = Order(len(data), settings.rollout // settings.group, settings.seed)
        self.per_rollout = settings.rollout // settings.batch_size * self.reuse
        self.steps = settings.steps or self.order.steps(settings.epochs) * self.per_rollout
        self.generator = torch.Generator().manual_seed(settings.seed * 7919 + world.rank)
        self.current: Batch | None = None

    # ------------------------------------------------------------------------------------------------- rollouts

    def batches(self) -> Iterator[Batch]:
        while True:
            place = self.position % self.per_rollout
            if place == 0 or self.current is None:
                if self.position:
                    self.current = None  # the memory is wanted for the next one
                self.current = self.rollout()
            self.unmoved = place == 0
            minibatch = self.minibatch(place)
            self.position += 1
            yield minibatch

    def minibatch(self, place: int) -> Batch:
        """The `place`-th part handed out of the present rollout: in every epoch another shuffle, drawn from the
        seed and the position alone, so that nothing of it needs saving."""
        assert self.current is not None
        parts = self.settings.rollout // self.settings.batch_size
        epoch, part = divmod(place, parts)
        seed = (self.settings.seed * 1_000_003 + self.position - place + epoch) * 31 + 17
        shuffled = self.current.shuffled(torch.Generator().manual_seed(seed))
        size = len(shuffled) // parts
        return shuffled.rows(torch.arange(part * size, (part + 1) * size, device=shuffled.tokens.device))

    @torch.no_grad()
    def rollout(self) -> Batch:
        """A fresh batch with everything that the loss needs."""
        drawn = self.sample(self.prompts())
        self.sampler.release()
        batch = self.collated(drawn)
        assert batch.logprobs is not None
        # A sampled token's surprise is the entropy in expectation; a bonus for it computes the entropy itself.
        self.notes["entropy"] = self.mean(-batch.logprobs[batch.actions])
        batch = self.advantages(self.sharing_trunk(batch))
        self.show(drawn)
        return batch.to(self.world.device)

    def prompts(self) -> list[int]:
        """The places of this rollout's prompts in the data, over all processes."""
        return self.order[self.position // self.per_rollout]

    def sample(self, indices: list[int]) -> list[Completion]:
        """This process's share of the rollout: whole groups, side by side."""
        return self.draw(indices)

    def draw(self, indices: list[int], noted: bool = True) -> list[Completion]:
        """`group` completions of each of this process's share of these prompts, scored; figures go to `notes`."""
        settings = self.settings
        mine = indices[self.world.rank :: self.world.size]
        self.sampler.refresh()
        drawn = self.sampler.sample([self.data[i].ids for i in mine], self.limits(), settings.group, self.generator)
        places = [i for i in mine for _ in range(settings.group)]
        asked = [self.data[i] for i in places]
        texts = [self.template.decode(completion) for completion in drawn.completions]
        each, raw = score_each(self.rewards, asked, texts, self.world)
        truncated = torch.tensor(drawn.truncated, dtype=torch.bool)
        lengths = torch.tensor([len(ids) for ids in drawn.completions])
        worth = self.worth(each, raw)
        shaped = self.rewards.shaped(worth, torch.cat(self.world.gather([worth])))
        shaped = shaped - settings.missing_end_penalty * truncated
        shaped = shaped + settings.overlong_penalty * overlong_penalty(
            lengths, settings.max_new_tokens, settings.overlong
        )
        if noted:
            self.note(each, raw, truncated, lengths, torch.tensor([len(a) for a in asked]))
            if settings.group > 1:
                self.notes["degenerate"] = self.mean(degenerate(shaped, settings.group).float())
        rows = zip(
            asked, places, drawn.completions, drawn.logprobs, drawn.truncated, texts, shaped.tolist(), strict=True
        )
        return [Completion(*row) for row in rows]

    def worth(self, each: Tensor, raw: Tensor) -> Tensor:
        """(n,) what is learned from, of rewards by each source (sources, n) and their weighted sum (n,)."""
        return raw

    def note(self, each: Tensor, raw: Tensor, truncated: Tensor, lengths: Tensor, prompts: Tensor) -> None:
        """Figures of what was drawn, over all processes; `prompts` (n,) are their lengths."""
        figures = {"score": raw, "completion_tokens": lengths.float(), "prompt_tokens": prompts.float()}
        spread = dict(figures)
        figures["truncated"] = truncated.float()
        if len(each) > 1:
            for name, values in zip(self.rewards.short_names(), each, strict=True):
                figures[f"reward/{name}"] = values[~values.isnan()]
        self.notes |= self.means(figures)
        self.notes |= self.deviations(spread, self.notes)

    def collated(self, drawn: list[Completion]) -> Batch:
        """The batch of these completions, with logprobs, scores, truncated and index."""
        groups = [place // self.settings.group for place in range(len(drawn))]
        batch = collate([c.asked.ids for c in drawn], [c.ids for c in drawn], groups)
        logprobs = torch.zeros(batch.tokens.shape)
        for row, c in enumerate(drawn):
            logprobs[row, len(c.asked) : len(c.asked) + len(c.ids)] = torch.tensor(c.logprobs)
        batch = replace(
            batch,
            logprobs=logprobs,
            scores=torch.tensor([c.score for c in drawn]),
            truncated=torch.tensor([c.truncated for c in drawn]),
            index=torch.tensor([c.index for c in drawn]),
        )
        return batch.to(self.world.device)

    def advantages(self, batch: Batch) -> Batch:
        """The batch with `advantages`, and whatever else the loss reads."""
        raise NotImplementedError

    def show(self, drawn: list[Completion]) -> None:
        """Keeps samples for people to read: a few of the first process's, or all."""
        shown = drawn[: self.settings.shown or None]
        self.shown = [
            {"prompt": c.asked.record.prompt, "completion": c.text, "score": round(c.score, 4)} for c in shown
        ]
        if getattr(self.settings, "compare_samples", False):
            for row, beside in zip(self.shown, self.of_reference([c.asked for c in shown]), strict=True):
                row |= beside
        if not self.settings.shown:
            self.shown = self.world.gather(self.shown)

    def of_reference(self, asked: list[Asked]) -> list[dict[str, Any]]:
        """What the reference answers to these prompts, and the raw reward of that. Nothing that learns is touched."""
        generator = torch.Generator().manual_seed(self.settings.seed * 7919 + self.position)
        with self.policy.as_reference():
            sampler = LocalSampler(self.policy.backbone, self.template.decode, dtype=self.world.sampling_dtype)
            drawn = sampler.sample([a.ids for a in asked], self.limits(), 1, generator)
        texts = [self.template.decode(completion) for completion in drawn.completions]
        raw = score(self.rewards, asked, texts, self.world).tolist()
        return [{"reference": text, "reference_score": round(value, 4)} for text, value in zip(texts, raw, strict=True)]

    # ---------------------------------------------------------------------------------------------- the contract

    def weight(self, batch: Batch) -> Tensor:
        return batch.actions.sum()

    def named(self, index: list[int]) -> str:
        return f"rows {', '.join(self.data[i].where for i in index)} of the data"

    def evaluate(self) -> dict[str, float]:
        """The mean reward of one completion of each held-out prompt, drawn with the same numbers every time."""
        if not self.held:
            return {}
        self.sampler.refresh()
        generator = torch.Generator().manual_seed(self.settings.seed)
        drawn = self.sampler.sample([a.ids for a in self.held], self.limits(), 1, generator)
        self.sampler.release()
        texts = [self.template.decode(completion) for completion in drawn.completions]
        return {"heldout_score": float(score(self.rewards, self.held, texts, self.world).mean())}

    def limits(self) -> Sampling:
        """How completions are drawn."""
        return Sampling(
            max_new_tokens=self.settings.max_new_tokens,
            temperature=self.settings.temperature,
            stop_ids=(self.template.end,),
            stop_strings=self.settings.stop,
        )

    def check_start(self, sampled: Tensor, own: Tensor, reference: Tensor | None, actions: Tensor) -> None:
        """Before the first update the sampler, the learner and the reference are one policy. A run in which they
        are not would learn from ratios and divergences that mean nothing; it stops here. Raises PlauditError."""
        gap = float(((sampled - own).abs() * actions).sum() / actions.sum().clamp(min=1))
        self.notes["sampler_gap"] = gap
        if self.position or self.current is not None:
            return
        loose = self.world.precision != "float32"
        if gap > (0.25 if loose else 1e-3):
            raise PlauditError(
                f"the sampler and the learner disagree by {gap:.3g} nats a token before the first update, so "
                "probability ratios would not start at 1: does the model change its output while generating?"
            )
        if reference is not None and self.policy.adapter is None and self.policy.begins_at_reference:
            divergence = float(((own - reference).abs() * actions).max())
            if divergence > (0.05 if loose else 1e-4):
                raise PlauditError(
                    f"the policy and its reference disagree by {divergence:.3g} nats before the first update, "
                    "so the KL divergence would not start at 0."
                )

    def state(self) -> dict[str, Any]:
        batch = self.current.tensors() if self.current is not None and self.position % self.per_rollout else {}
        moments = self.rewards.moments
        return {
            **super().state(),
            "processes": self.world.size,
            "generator": self.generator.get_state(),
            "moments": [moments.count, moments.mean, moments.m2],
            "rollout": batch,
        }

    def restore(self, state: dict[str, Any]) -> None:
        if state["processes"] != self.world.size:
            raise PlauditError(
                f"the run was saved by {state['processes']} processes, each with a part of the rollout and random "
                f"numbers of its own: go on with as many, not {self.world.size}."
            )
        super().restore(state)
        self.generator.set_state(state["generator"])
        self.rewards.moments = RunningMoments(*state["moments"])
        self.current = Batch(**state["rollout"]).to(self.world.device) if state["rollout"] else None

    # --------------------------------------------------------------------------------- figures over all processes

    def means(self, figures: dict[str, Tensor]) -> dict[str, float]:
        """The mean of each over all processes, for one reduction and one wait for the device."""
        sums = torch.stack([values.sum().double() for values in figures.values()]).cpu()
        counts = torch.tensor([float(values.numel()) for values in figures.values()]).double()
        total = self.world.sum(torch.stack([sums, counts]))
        return dict(zip(figures, (total[0] / total[1].clamp(min=1)).tolist(), strict=True))

    def mean(self, values: Tensor) -> float:
        """The mean over all processes."""
        return self.means({"": values})[""]

    def deviations(self, figures: dict[str, Tensor], means: dict[str, float]) -> dict[str, float]:
        """The standard deviation of each over all processes, as NAME_std, from the means that are known."""
        squares = {f"{name}_std": (values - means[name]).square() for name, values in figures.items()}
        return {name: math.sqrt(value) for name, value in self.means(squares).items()}
