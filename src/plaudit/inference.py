"""Using policies without training them: sampling to a file or a terminal, and comparing several of them."""

from __future__ import annotations

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaudit import checks, config, data, machine, sources
from plaudit.errors import PlauditError
from plaudit.recipes import asked_of, listed, start_world
from plaudit.records import Prompt
from plaudit.run import Run, write_atomically
from plaudit.settings import Evaluate, Sample

if TYPE_CHECKING:
    from plaudit.algorithms.on_policy import Asked
    from plaudit.comparing import Answers
    from plaudit.policy import Policy
    from plaudit.sampler import Sampling
    from plaudit.templates import Template
    from plaudit.world import World


def evaluate(settings: Evaluate) -> Run:
    """Compares policies on the same prompts; the run's summary and samples.jsonl hold what was found.

    Raises PlauditError for what the user can put right.
    """
    settings = config.check(settings)
    named = dict(_named(policy) for policy in settings.policies)
    reference = settings.model or next(iter(named.values()))
    checks.check_data(settings.data)
    for folder in (reference, *named.values()):
        checks.check_model(sources.resolve(folder))
    checks.check_rewards([*listed(settings.rewards), *listed(settings.judge or ())])
    prompts = data.load(settings.data, Prompt, settings.split).records
    with Run.open(settings.output, {"verb": "evaluate", **dataclasses.asdict(settings)}, ("output", "device")) as run:
        if not run.finished:
            machine.forget_peak()
            _compare(settings, named, sources.resolve(reference), prompts, run)
        return run


def sample(settings: Sample) -> Path | None:
    """Completions of every prompt in `data`, written to `output` as JSON lines; without data, a conversation in the
    terminal. Raises PlauditError for what the user can put right."""
    settings = config.check(settings)
    checks.check_data(settings.data)
    model = sources.resolve(settings.model)
    checks.check_model(model)
    records = None if settings.data is None else data.load(settings.data, Prompt, settings.split).records
    world = start_world(settings)
    policy, template = _load(model, world, settings.temperature)
    if records is None:
        _interactive(settings, policy, template, world)
        return None
    asked, _ = asked_of(records[: settings.limit or None], template, settings.max_prompt_tokens)
    return _write_samples(settings, policy, template, world, asked)


def _named(policy: str) -> tuple[str, str]:
    name, found, folder = policy.partition("=")
    return (name, folder) if found else (Path(policy).name, policy)


def _load(model: str, world: World, temperature: float) -> tuple[Policy, Template]:
    from plaudit.loading import load_policy, load_tokenizer
    from plaudit.templates import Template

    policy = load_policy(model, precision=world.precision, learns=False).to(world.device)
    policy.temperature = temperature
    return policy, Template(load_tokenizer(model))


def _limits(settings: Any, template: Template, **filters: Any) -> Sampling:
    from plaudit.sampler import Sampling

    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        stop_ids=(template.end,),
        stop_strings=settings.stop,
        **filters,
    )


# -------------------------------------------------------------------------------------------------------- comparing


def _compare(settings: Evaluate, named: dict[str, str], reference: str, prompts: list[Prompt], run: Run) -> None:
    from plaudit import comparing, hooks
    from plaudit.rewards import load_rewards

    started = time.perf_counter()
    world = start_world(settings)
    policy, template = _load(reference, world, settings.temperature)
    distinct = list({data.key_of(prompt.prompt): prompt for prompt in prompts}.values())
    asked, _ = asked_of(distinct, template, settings.max_prompt_tokens)
    asked = asked[: settings.prompts]
    bar, task = hooks.progress_bar("evaluate", len(asked) * len(named), unit="completions")
    sampled = {}
    with bar:
        for name, folder in named.items():
            own, _ = (policy, template) if folder == reference else _load(folder, world, settings.temperature)
            limits = _limits(settings, template)
            batch, texts = comparing.answer(
                own,
                asked,
                template,
                limits,
                world,
                seed=settings.seed,
                rows=settings.rows,
                advance=partial(bar.advance, task),
            )
            logprobs = comparing.total_logprobs(own, batch, world, 4096)
            kept = comparing.total_logprobs(policy, batch, world, 4096)
            sampled[name] = (batch, texts, logprobs, kept)
    options: dict[str, Any] = {"precision": world.precision, "device": world.device}
    rewards = load_rewards(settings.rewards, weights=settings.reward_weights, **options)
    judge = load_rewards(settings.judge, **options) if settings.judge else rewards
    answers = {
        name: _answers(asked, *found, rewards=rewards, judge=judge, world=world) for name, found in sampled.items()
    }
    figures = comparing.compare(answers, settings.judge_positive)
    run.rewind(-1)
    run.samples(0, _side_by_side(asked, answers, settings.shown))
    seconds = time.perf_counter() - started
    tokens = sum(sum(a.tokens) for a in answers.values())
    run.finish(
        {
            "verb": "evaluate",
            "seconds": seconds,
            "peak_memory_mb": machine.peak_memory_mb(),
            "tokens_per_second": tokens / seconds,
            **figures,
            "histograms": {name: a.reward.tolist() for name, a in answers.items()},
        }
    )


def _answers(
    asked: list[Asked],
    batch: Any,
    texts: list[str],
    logprobs: Any,
    kept: Any,
    *,
    rewards: Any,
    judge: Any,
    world: World,
) -> Answers:
    from plaudit.algorithms.on_policy import score
    from plaudit.comparing import Answers

    reward = score(rewards, asked, texts, world)
    opinion = reward if judge is rewards else score(judge, asked, texts, world)
    return Answers(texts, batch.actions.sum(1).tolist(), reward, opinion, logprobs, kept)


def _side_by_side(asked: list[Asked], answers: dict[str, Answers], shown: int) -> list[dict[str, Any]]:
    rows = []
    for i in range(min(shown, len(asked))):
        row: dict[str, Any] = {"prompt": asked[i].record.prompt}
        for name, found in answers.items():
            row[name] = found.texts[i]
            row[f"{name}_judge"] = round(float(found.judge[i]), 3)
            row[f"{name}_reward"] = round(float(found.reward[i]), 3)
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------- sampling


def _write_samples(settings: Sample, policy: Policy, template: Template, world: World, asked: list[Asked]) -> Path:
    import torch

    from plaudit import hooks
    from plaudit.sampler import LocalSampler

    sampler = LocalSampler(policy.backbone, template.decode, dtype=world.sampling_dtype)
    limits = _limits(settings, template, top_k=settings.top_k, top_p=settings.top_p)
    generator = torch.Generator().manual_seed(settings.seed)
    bar, task = hooks.progress_bar("sample", len(asked), unit="prompts")
    lines = []
    with bar:
        size = max(settings.rows // settings.n, 1)
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            drawn = sampler.sample([a.ids for a in part], limits, settings.n, generator)
            repeated = [a for a in part for _ in range(settings.n)]
            for a, ids, cut in zip(repeated, drawn.completions, drawn.truncated, strict=True):
                row = {
                    **a.record.columns,
                    "prompt": a.record.prompt,
                    "completion": template.decode(ids),
                    "truncated": cut,
                }
                lines.append(json.dumps(row, ensure_ascii=False))
            bar.advance(task, len(part))
    path = Path(settings.output)
    if path.exists():
        raise PlauditError(f"output: {path} exists already: name another file, or remove it.")
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def _interactive(settings: Sample, policy: Policy, template: Template, world: World) -> None:
    import torch
    from rich.prompt import Prompt as Ask

    from plaudit import hooks
    from plaudit.sampler import LocalSampler

    sampler = LocalSampler(policy.backbone, template.decode, dtype=world.sampling_dtype)
    limits = _limits(settings, template, top_k=settings.top_k, top_p=settings.top_p)
    generator = torch.Generator().manual_seed(settings.seed)
    chat = bool(template.tokenizer.chat_template)
    hooks.tell("Type a prompt; an empty line ends." + (" The model is asked as an assistant." if chat else ""))
    while text := Ask.ask("[bold]prompt[/]", default="", show_default=False):
        ids = template.prompt([{"role": "user", "content": text}] if chat else text)
        drawn = sampler.sample([ids], limits, settings.n, generator)
        for completion in drawn.completions:
            print(template.decode(completion), flush=True)
