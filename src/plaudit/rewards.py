"""What completions are worth, at the level of text: functions, reward models, classifiers, counts, and their sum.

A policy and its reward model need not share a tokenizer: everything between them is text.
"""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plaudit.advantages import RunningMoments
from plaudit.backbone import limit_of
from plaudit.batch import Batch, collate
from plaudit.budget import fewer, retried
from plaudit.checks import ENSEMBLE_RULE, check_model, listed, members_of
from plaudit.config import plain
from plaudit.errors import PlauditError
from plaudit.loading import load_reward_model, load_tokenizer
from plaudit.policy import Policy
from plaudit.records import Text
from plaudit.settings.rewards import RewardSource, SeveralSources
from plaudit.templates import Template

Source = Callable[..., Sequence[float | None]]


def load_function(spec: str) -> Callable[..., Any]:
    """`path/to/file.py:name` or `package.module:name` -> the function. Raises PlauditError."""
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise PlauditError(f"reward {spec!r}: there is no file {place!r}.")
        module_spec = importlib.util.spec_from_file_location(f"plaudit_user_{path.stem}", path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module.__name__] = module  # dataclasses and pickle look a function's module up there
        try:
            module_spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise PlauditError(f"reward {spec!r}: {place} cannot be run: {_told(error)}") from error
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise PlauditError(f"reward {spec!r}: cannot import {place!r}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        functions = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise PlauditError(f"reward {spec!r}: {place} has no function {name!r} (it has: {functions or 'none'}).")
    return function


class ModelReward:
    """The score of a reward model that reads prompt and completion through its own tokenizer.

    tokens  that go through it at once at most; fewer once memory has run out
    """

    def __init__(self, policy: Policy, tokenizer: Any, tokens_per_pass: int = 4096) -> None:
        self.policy, self.template, self.tokens = policy, Template(tokenizer), tokens_per_pass

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        texts = [self.template.text(p, c) for p, c in zip(prompts, completions, strict=True)]
        rows = self.template.tokenizer(texts, truncation=True, max_length=limit_of(self.policy.backbone)).input_ids
        batch = collate(rows, [[]] * len(rows))

        return retried(lambda: self._scored(batch), lambda: self._lessen(batch, max(texts, key=len)))

    def _lessen(self, batch: Batch, longest: str) -> None:
        def count(tokens: int) -> int:
            return len(list(self.policy.parts(batch, tokens)))

        if count(self.tokens) == len(batch):
            raise PlauditError(
                f"reward: memory ran out when texts were scored one by one; the longest has {int(batch.lengths.max())} "
                f"tokens and begins with {_brief(longest)}. Lower the limit of tokens, or take a smaller reward model."
            )
        self.tokens = fewer(self.tokens, count)

    def _scored(self, batch: Batch) -> list[float]:
        scores = torch.zeros(len(batch))
        for part, places in self.policy.parts(batch, self.tokens):
            output = self.policy(part.to(self.policy.device), logprobs=False, scores=True)
            scores[places] = output.scores.float().cpu()
        return [float(score) for score in scores]


class EnsembleReward:
    """Several reward models as one: their mean, the least of their scores, or the mean less some standard deviations
    over them, which rewards only what all of them like (compare Coste et al. 2023, arXiv:2310.02743, who take off the
    variance)."""

    def __init__(self, members: Sequence[ModelReward], rule: str) -> None:
        self.members, self.rule = members, rule
        found = re.fullmatch(ENSEMBLE_RULE, rule)
        if found is None:
            raise PlauditError(f"ensemble: there is no rule {rule!r}: choose mean, minimum, or mean-1std.")
        self.deviations = float(found[1] or 0)

    def each(self, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        """(members, n) their scores."""
        return torch.tensor([member(prompts, completions) for member in self.members])

    def disagreement(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """The variance of the members' scores of each completion: where it is high, people's judgement teaches most
        (Christiano et al. 2017, arXiv:1706.03741, section 2.2.4)."""
        variances: list[float] = self.each(prompts, completions).var(0, correction=0).tolist()
        return variances

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        scores = self.each(prompts, completions)
        if self.rule == "minimum":
            combined = scores.amin(0)
        else:
            combined = scores.mean(0) - self.deviations * scores.std(0, correction=0)
        return [float(score) for score in combined]


class LabelReward:
    """A classifier's probability of one of its labels."""

    def __init__(self, model: str, label: str, device: torch.device) -> None:
        from transformers import pipeline

        check_model(model)
        self.label = label
        try:
            self.pipeline = pipeline("text-classification", model=model, top_k=None, truncation=True, device=device)
        except (OSError, ValueError) as error:
            raise PlauditError(f"reward: cannot load {model!r}: {str(error).splitlines()[0]}") from error
        config, tokenizer = self.pipeline.model.config, self.pipeline.tokenizer
        names = sorted(config.id2label.values())
        if label not in names:
            raise PlauditError(f"reward: {model!r} has no label {label!r}; its labels are {', '.join(names)}.")
        tokenizer.model_max_length = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 2**31))
        self.rows = 1 if None in (config.pad_token_id, tokenizer.pad_token_id) else 32

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        texts = [_said(p, c) for p, c in zip(prompts, completions, strict=True)]
        results = retried(lambda: self.pipeline(texts, batch_size=self.rows), self._lessen)
        return [next(row["score"] for row in rows if row["label"] == self.label) for rows in results]

    def _lessen(self) -> None:
        if self.rows == 1:
            raise PlauditError("reward: memory ran out when a classifier read one text: take a smaller one.")
        self.rows //= 2


class CountReward:
    """How often a string occurs in prompt and completion together, at most 100 times (the whole text is read)."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        return [float(min(_said(p, c).count(self.text), 100)) for p, c in zip(prompts, completions, strict=True)]


def _said(prompt: Text, completion: Text) -> str:
    """Both as one text; the turns of a conversation one below the other, without roles."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    parts = [[text] if isinstance(text, str) else [turn["content"] for turn in text] for text in (prompt, completion)]
    return "\n".join(parts[0] + parts[1])


class Rewards:
    """The weighted sum of several sources, checked, normalised by running moments where asked, and clipped."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Sequence[float] = (),
        clip: float = 0.0,
        normalise: bool = False,
        scale: bool = False,
        moments: str = "running",
    ) -> None:
        if weights and len(weights) != len(sources):
            raise PlauditError(f"reward_weights: {len(weights)} weights for {len(sources)} rewards.")
        self.sources, self.weights = dict(sources), list(weights) or [1.0] * len(sources)
        self.clip, self.normalise, self.scale = clip, normalise, scale
        self.moments, self.running = RunningMoments(), moments == "running"

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, list[Any]],
        where: Sequence[str] | None = None,
    ) -> Tensor:
        """(n,) float32: `total` of `each`, which see."""
        return self.total(self.each(prompts, completions, columns, where), where)

    def each(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, list[Any]],
        where: Sequence[str] | None = None,
    ) -> Tensor:
        """(sources, n) float32, unweighted, NaN where a source does not apply. `where` each prompt stands in the data
        (`Prompt.where`) is told in messages; without it, its place in the call is.

        Raises PlauditError for a source that fails or returns what is not n numbers. One that fails is called again
        with one prompt after the other, until it fails in the same way: the message names that prompt.
        """
        rows = []
        for name, source in self.sources.items():
            try:
                values = source(prompts=list(prompts), completions=list(completions), **columns)
            except PlauditError:
                raise
            except (Exception, SystemExit) as error:
                found = _culprit(source, error, prompts, completions, columns, where)
                raise PlauditError(f"reward {name!r} failed: {_told(error)}{found}.") from error
            rows.append(_checked(name, values, len(prompts), where))
        return torch.tensor(rows).view(len(rows), len(prompts))

    def total(self, each: Tensor, where: Sequence[str] | None = None) -> Tensor:
        """(sources, n) -> (n,) the weighted sums of what applies. Raises PlauditError where nothing does."""
        without = each.isnan().all(0).nonzero()
        if len(self.sources) and len(without):
            who = " and ".join(f"reward {name!r}" for name in self.sources)
            raise PlauditError(
                f"{who} returned NaN or None for a completion of {_prompt(where, int(without[0]))}: that says "
                "that it does not apply, but at least one reward must."
            )
        return (torch.tensor(self.weights)[:, None] * each.nan_to_num(0.0)).sum(0)

    def short_names(self) -> list[str]:
        """What the sources are called in the metrics: without folders, unless two would then be called the same."""
        names = list(self.sources)
        short = [
            name if name.startswith("count:") else name.partition("@")[0] if "@" in name else name.rpartition("/")[2]
            for name in names
        ]
        return [long if short.count(brief) > 1 else brief for long, brief in zip(names, short, strict=True)]

    def shaped(self, raw: Tensor, everywhere: Tensor) -> Tensor:
        """Raw rewards as the algorithm learns from them; those of all processes move the moments, which are running
        ones or those of the first call."""
        if self.normalise or self.scale:
            if self.running or not self.moments.count:
                self.moments = self.moments.updated(everywhere)
            spread = self.moments.std if self.moments.std > 1e-8 else 1.0  # all alike so far: nothing to scale by
            raw = (raw - (self.moments.mean if self.normalise else 0.0)) / spread
        return raw.clamp(-self.clip, self.clip) if self.clip else raw


def _prompt(where: Sequence[str] | None, place: int) -> str:
    return f"prompt {place}" if where is None else f"the prompt at {where[place]}"


def _culprit(
    source: Source,
    error: BaseException,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, list[Any]],
    where: Sequence[str] | None,
) -> str:
    """Which prompt a source fails at in the same way when it gets the completions of one prompt at a time."""
    start = 0
    for _, same in groupby(range(len(prompts)), key=lambda i: prompts[i] if where is None else where[i]):
        end = start + len(list(same))
        rows = slice(start, end)
        given = {name: list(values[rows]) for name, values in columns.items()}
        try:
            source(prompts=list(prompts[rows]), completions=list(completions[rows]), **given)
        except (Exception, SystemExit) as again:
            if (type(again), _place(again)) == (type(error), _place(error)):
                return f", at {_prompt(where, start)}"
        start = end
    return f", in a call whose first prompt is {_prompt(where, 0)}" if prompts else ""


def _checked(name: str, values: Any, count: int, where: Sequence[str] | None) -> list[float]:
    """One number for each completion; NaN where the source does not apply."""
    values = values.tolist() if isinstance(values, Tensor) else values
    if not isinstance(values, Iterable) or isinstance(values, str | Mapping):
        raise PlauditError(f"reward {name!r} returned {_brief(values)}: it must be one number for each completion.")
    values = list(values)
    if len(values) != count:
        raise PlauditError(f"reward {name!r} returned {len(values)} values for {count} completions.")
    for i, value in enumerate(values):
        if not (value is None or _is_number(value)):
            which = f"completion {i}" if where is None else f"completion {i}, of {_prompt(where, i)}"
            raise PlauditError(
                f"reward {name!r} returned {_brief(value)} for {which}: it must be a finite number (float32: at most "
                "3.4e38), or NaN or None where it does not apply."
            )
    return [math.nan if value is None else float(value) for value in values]


def _is_number(value: Any) -> bool:
    try:
        return math.isnan(value) or math.fabs(value) <= torch.finfo(torch.float32).max
    except (TypeError, ValueError, RuntimeError, OverflowError):  # of what is no number, or several, or beyond all
        return False


def _brief(value: Any) -> str:
    return " ".join(repr(value).split())[:60]


def _place(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{place.filename}:{place.lineno}"


def _told(error: BaseException) -> str:
    """An error of the user's own code, on one line: what, and where."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}{said and f': {said}'} ({_place(error)})"


def load_rewards(
    specs: RewardSource | SeveralSources,
    *,
    weights: Sequence[float] = (),
    clip: float = 0.0,
    normalise: bool = False,
    scale: bool = False,
    moments: str = "running",
    precision: str = "float32",
    device: torch.device | None = None,
    tokens_per_pass: int = 4096,
) -> Rewards:
    """Rewards from their names (see `settings.rewards`), or as the functions that they are. Raises PlauditError where a
    name leads nowhere."""
    device = device or torch.device("cpu")
    sources: dict[str, Source] = {}
    for given in listed(specs):
        spec = plain(given)
        if spec in sources:
            raise PlauditError(
                f"reward {spec!r} is named twice: name it once, with a weight, and give two functions two names."
            )
        kind, _, rest = spec.partition(":")
        if not isinstance(given, str):
            sources[spec] = given
        elif kind == "count":
            sources[spec] = CountReward(rest)
        elif kind == "label":
            label, _, model = rest.partition("@")
            sources[spec] = LabelReward(model, label, device)
        elif kind == "ensemble":
            rule, _, folder = rest.partition("@")
            members = [_load_model(name, precision, device, tokens_per_pass) for name in members_of(folder)]
            sources[spec] = EnsembleReward(members, rule)
        elif ":" in spec:
            sources[spec] = load_function(spec)
        else:
            sources[spec] = _load_model(spec, precision, device, tokens_per_pass)
    return Rewards(sources, weights, clip, normalise, scale, moments)


def _load_model(name: str, precision: str, device: torch.device, tokens_per_pass: int) -> ModelReward:
    tokenizer = load_tokenizer(name)
    policy = load_reward_model(name, tokenizer, precision=precision, learns=False).to(device)
    return ModelReward(policy, tokenizer, tokens_per_pass)
