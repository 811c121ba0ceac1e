"""Using policies without training them: sampling to a file or a terminal, and comparing several of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaudit import checks, config, data, machine, sources
from plaudit.encoding import asked_of, shortened
from plaudit.errors import PlauditError
from plaudit.recipes import in_files, opened, say, start_world
from plaudit.records import Loaded, Prompt, left_out
from plaudit.run import Run, write_atomically
from plaudit.settings import Evaluate, Sample

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from plaudit.algorithms.on_policy import Asked
    from plaudit.comparing import Said
    from plaudit.policy import Policy
    from plaudit.sampler import Sampled, Sampling
    from plaudit.templates import Template
    from plaudit.world import World


def evaluate(settings: Evaluate) -> Run:
    """Compares policies on the same prompts; the run's summary and samples.jsonl hold what was found.

    Raises PlauditError for what the user can put right.
    """
    settings = config.check(in_files(settings))
    named = _named(settings.policies)
    reference = settings.model or next(iter(named.values()))
    checks.check_data(settings.data)
    for folder in (reference, *named.values()):
        checks.check_model(folder)
    if settings.ilql_beta:
        checks.check_guidance(list(named.values()))
    checks.check_rewards([*checks.listed(settings.rewards), *checks.listed(settings.judge or ())])
    prompts = _prompts(settings)
    with opened(settings, ("output", "device")) as run:
        if not run.finished:
            machine.forget_peak()
            found = {name: sources.resolve(folder) for name, folder in named.items()}
            _compare(settings, found, sources.resolve(reference), prompts, run)
        return run


def sample(settings: Sample) -> Path | None:
    """Completions of every prompt in `data`, written to `output` as JSON lines; without data, a conversation in the
    terminal. Raises PlauditError for what the user can put right."""
    settings = config.check(settings)
    checks.check_data(settings.data)
    checks.check_model(settings.model)
    if settings.ilql_beta:
        checks.check_guidance([settings.model])
    checks.check_rewards(settings.best_of)
    if settings.best_of and settings.n == 1:
        raise PlauditError("best_of: there is one completion of each prompt and nothing to choose from: raise n.")
    prompts = None if settings.data is None else _prompts(settings)
    if prompts is not None and Path(settings.output).exists():
        raise PlauditError(f"output: {settings.output} exists already: name another file, or remove it.")
    from plaudit.comparing import load

    world = start_world(settings)
    policy, template = load(sources.resolve(settings.model), world, settings.temperature, settings.ilql_beta)
    if prompts is None:
        _interactive(settings, policy, template, world)
        return None
    asked = _asked(settings, template, prompts, prompts.records[: settings.limit or None])
    return _write_samples(settings, policy, template, world, asked)


def _named(policies: Sequence[str]) -> dict[str, str]:
    """Folders by the names that they are shown under. Raises PlauditError where two have one name."""
    named: dict[str, str] = {}
    for policy in policies:
        name, _, folder = policy.partition("=") if "=" in policy else (Path(policy).name, "", policy)
        if not (name and folder) or name in named:
            problem = f"two are called {name!r}" if name in named else f"{policy!r} has no name or no folder"
            raise PlauditError(f"policies: {problem}: write name=folder for each.")
        named[name] = folder
    if not named:
        raise PlauditError("policies: there are none: write name=folder for each.")
    return named


def _prompts(settings: Evaluate | Sample) -> Loaded[Prompt]:
    """The prompts in `data` that are long enough; the terminal is told of the others. Raises PlauditError."""
    loaded = data.load(settings.data, Prompt, settings.split)
    kept, notes = data.long_enough(loaded.records, settings.min_prompt_characters, "data")
    for note in notes:
        say(note)
    return replace(loaded, records=kept)


def _asked(
    settings: Evaluate | Sample, template: Template, loaded: Loaded[Prompt], chosen: list[Prompt]
) -> list[Asked]:
    """Prompts as token ids; the terminal is told what was left out."""
    from plaudit.hooks import tell

    asked = shortened(settings, asked_of(chosen, template), template)
    asked, notes = data.within(asked, len, settings.max_prompt_tokens, "prompt")
    for note in (*left_out(loaded.dropped), *notes):
        tell(note)
    return asked


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


def _compare(settings: Evaluate, named: dict[str, str], reference: str, prompts: Loaded[Prompt], run: Run) -> None:
    from plaudit import comparing, hooks
    from plaudit.rewards import load_rewards

    started = time.perf_counter()
    world = start_world(settings)
    # The reference of KL and perplexity is never guided, even if it is one of the policies.
    policy, template = comparing.load(reference, world, settings.temperature, 0.0)
    distinct = list({data.key_of(prompt.prompt): prompt for prompt in prompts.records}.values())
    asked = _asked(settings, template, prompts, distinct)[: settings.prompts]
    bar, task = hooks.progress_bar("evaluate", len(asked) * len(named), unit="completions")
    sampled = {}
    with bar:
        for name, folder in named.items():
            own = policy
            if folder != reference or (settings.ilql_beta and checks.has_action_heads(folder)):
                own, _ = comparing.load(folder, world, settings.temperature, settings.ilql_beta)
            limits = _limits(settings, template)
            batch, texts = comparing.answer(
                own,
                asked,
                template,
                limits,
                world,
                seed=settings.seed,
                rows=settings.rows,
                advance=partial(_advance, bar, task),
            )
            # What guides a policy is worked out for the whole vocabulary at once.
            logprobs = comparing.total_logprobs(own, batch, world, 512 if own.guide else 4096)
            kept = logprobs if own is policy else comparing.total_logprobs(policy, batch, world, 4096)
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
) -> Said:
    from plaudit.algorithms.on_policy import score
    from plaudit.comparing import Said

    reward = score(rewards, asked, texts, world)
    opinion = reward if judge is rewards else score(judge, asked, texts, world)
    return Said(texts, batch.actions.sum(1).tolist(), reward, opinion, logprobs, kept)


def _side_by_side(asked: list[Asked], answers: dict[str, Said], shown: int) -> list[dict[str, Any]]:
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

    sampler = LocalSampler(policy.backbone, template.decode, dtype=world.sampling_dtype, guide=policy.guide)
    limits = _limits(settings, template, top_k=settings.top_k, top_p=settings.top_p)
    generator = torch.Generator().manual_seed(settings.seed)
    kept = _kept(settings, template, world)
    bar, task = hooks.progress_bar("sample", len(asked), unit="prompts")
    lines = []
    with bar:
        size = max(settings.rows // settings.n, 1)
        for start in range(0, len(asked), size):
            part = asked[start : start + size]
            drawn = sampler.sample([a.ids for a in part], limits, settings.n, generator)
            for place, scored in kept(part, drawn):
                record = part[place // settings.n].record
                row = {
                    **record.columns,
                    "prompt": record.prompt,
                    "completion": template.decode(drawn.completions[place]),
                    "truncated": drawn.truncated[place],
                    **scored,
                }
                lines.append(json.dumps(row, ensure_ascii=False))
            _advance(bar, task, len(part))
    path = Path(settings.output)
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def _kept(settings: Sample, template: Template, world: World) -> Callable[..., list[tuple[int, dict[str, float]]]]:
    """(prompts, what was drawn) -> the places of the completions that are kept, and more columns for each: all of
    them, or with `best_of` the best of each prompt, with its score."""
    if not settings.best_of:
        return lambda asked, drawn: [(place, {}) for place in range(len(drawn.completions))]

    from plaudit.algorithms.on_policy import score
    from plaudit.algorithms.online import extremes
    from plaudit.rewards import load_rewards

    rewards = load_rewards(settings.best_of, precision=world.precision, device=world.device)

    def best(asked: list[Asked], drawn: Sampled) -> list[tuple[int, dict[str, float]]]:
        repeated = [a for a in asked for _ in range(settings.n)]
        scores = score(rewards, repeated, [template.decode(ids) for ids in drawn.completions], world)
        return [(place, {"score": float(scores[place])}) for place in extremes(scores, settings.n)[1].tolist()]

    return best


def _advance(bar: Progress, task: TaskID, count: int) -> None:
    bar.advance(task, count)
    bar.update(task, rate=f"{bar.tasks[0].speed or 0:.1f} a second")


def _interactive(settings: Sample, policy: Policy, template: Template, world: World) -> None:
    import torch
    from rich.prompt import Prompt as Ask

    from plaudit import hooks
    from plaudit.sampler import LocalSampler

    sampler = LocalSampler(policy.backbone, template.decode, dtype=world.sampling_dtype, guide=policy.guide)
    limits = _limits(settings, template, top_k=settings.top_k, top_p=settings.top_p)
    generator = torch.Generator().manual_seed(settings.seed)
    kept = _kept(settings, template, world)
    chat = bool(template.tokenizer.chat_template)
    hooks.tell("Type a prompt; an empty line ends." + (" The model is asked as an assistant." if chat else ""))
    with suppress(EOFError):  # ctrl-D, or the end of what was piped in
        while text := Ask.ask("[bold]prompt[/]", default="", show_default=False):
            asked = asked_of([Prompt([{"role": "user", "content": text}] if chat else text)], template)
            try:
                drawn = sampler.sample([asked[0].ids], limits, settings.n, generator)
            except PlauditError as error:  # too long, most likely: the next may not be
                hooks.tell(str(error))
                continue
            for place, _ in kept(asked, drawn):
                print(template.decode(drawn.completions[place]), flush=True)
