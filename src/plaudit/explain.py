"""What a run would do, before it does it: batch arithmetic, memory, number type, layout, one example with its mask."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaudit import config, machine
from plaudit.data import Order
from plaudit.recipes import begun, encode, found_before, prepare, settled, start_world, template_of
from plaudit.settings import Reward
from plaudit.settings.common import Training
from plaudit.settings.policy_gradient import OnPolicy
from plaudit.settings.preference import Preference

if TYPE_CHECKING:
    from rich.table import Table

    from plaudit.batch import Batch
    from plaudit.policy import Policy
    from plaudit.templates import Template
    from plaudit.world import World


def explain(settings: Any) -> None:
    """Prints how the settings work out on this machine and this data. Raises PlauditError as the run would."""
    from rich.console import Console
    from rich.table import Table

    settings = config.check(settings)
    console = Console(soft_wrap=True)
    table = Table("setting", "value", title=f"plaudit {config.verb_of(type(settings))}", title_justify="left")
    for name, value in config.to_mapping(settings).items():
        table.add_row(name, str(value))
    console.print(table)
    if not isinstance(settings, Training):
        return
    settings, loaded = prepare(settings)
    with tempfile.TemporaryDirectory() as folder:  # for a model that the run itself would make
        settings = begun(settings, loaded, Path(folder))
        template = template_of(settings)
        loaded = encode(settings, template, loaded)
        memory, tables = _on_this_machine(settings, loaded.training)
        for line in (*_arithmetic(settings, len(loaded.training)), *memory, *loaded.notes):
            console.print(line, highlight=False, markup=False)
        for table in tables:
            console.print(table, highlight=False)
    console.print("\n[bold]One example[/], what is learned in green between ⟦ and ⟧:")
    console.print(_shown(loaded.training[0], template))


def _arithmetic(settings: Training, rows: int) -> list[str]:
    if isinstance(settings, OnPolicy):
        prompts = settings.rollout // settings.group
        updates = settings.rollout // settings.batch_size * getattr(settings, "reuse", 1)
        steps = settings.steps or Order(rows, prompts, settings.seed).steps(settings.epochs) * updates
        return [
            f"{rows} prompts; a rollout is {settings.rollout} completions of {prompts} prompts.",
            f"Each rollout is learned from in {updates} steps of {settings.batch_size} completions.",
            f"{steps} steps: each prompt is asked {steps / updates * prompts / rows:.2f} times.",
        ]
    steps = settings.steps or Order(rows, settings.batch_size, settings.seed).steps(settings.epochs)
    seen = steps * settings.batch_size / rows
    return [f"{rows} rows to learn from; {steps} steps of {settings.batch_size}: each row is seen {seen:.2f} times."]


# ------------------------------------------------------------------------------------------------- on this machine


def _on_this_machine(settings: Training, items: list[Any]) -> tuple[list[str], list[Table]]:
    """Sentences about memory; and, as tables, what the run takes of what it might have taken, and why: number type,
    tokens of a pass, and how the first batch lies in memory."""
    from rich.table import Table

    from plaudit import budget, speed

    world, folder = start_world(settings), Path(settings.output)
    whys = {"precision": speed.choose(settings.precision, world.device).why, "tokens_per_pass": "as asked for"}
    taken = settled(settings, folder, world)
    needs = budget.needs_of(settings, world.precision)
    if not settings.tokens_per_pass:
        whys["tokens_per_pass"] = budget.reason(budget.free_on(world.device), needs, world.device.type)
    for name in found_before(folder):
        if getattr(settings, name) in ("auto", 0):
            whys[name] = "as when this run began, so that it goes on alike"
    table = Table("what", "taken", "why", title="On this machine", title_justify="left")
    table.add_row("device", str(world.device), _named(world))
    table.add_row("number type", world.precision, whys["precision"])
    table.add_row("tokens a pass", f"{taken.tokens_per_pass:,}", whys["tokens_per_pass"])
    said = [
        f"{needs.weights:,} weights, of which {needs.learning:,} learn; computing in {world.precision}.",
        f"About {needs.state / 1e9:.2f} GB of weights, gradients and moments, {needs.copies / 1e9:.2f} GB of copies, "
        f"and up to {taken.tokens_per_pass * needs.token / 1e9:.2f} GB of activations at {taken.tokens_per_pass} "
        "tokens a pass.",
    ]
    return said, [table, _layouts(taken, needs.model, first_batch(settings, items), world.device.type)]


def _named(world: World) -> str:
    import torch

    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    threads = torch.get_num_threads()
    return f"{machine.processor()}, {threads} thread{'s' * (threads > 1)}"


def first_batch(settings: Training, items: list[Any]) -> Batch:
    """The rows that the first step learns from, in one process. Where they are yet to be sampled, completions of
    `max_new_tokens` tokens stand for them."""
    from plaudit.algorithms import preference, reward, sft
    from plaudit.batch import collate

    if isinstance(settings, OnPolicy):
        order = Order(len(items), settings.rollout // settings.group, settings.seed)[0]
        asked = [items[i].ids for i in order[: settings.batch_size // settings.group]]
        prompts = [ids for ids in asked for _ in range(settings.group)]
        groups = [row // settings.group for row in range(len(prompts))]
        return collate(prompts, [[0] * settings.max_new_tokens] * len(prompts), groups)
    if isinstance(settings, Reward):
        items = [items[i] for i in reward.divided(items, settings)[0]]
    order = Order(len(items), settings.batch_size, settings.seed)[0]
    if isinstance(settings, Preference):
        return preference.rows(items, order)
    if isinstance(settings, Reward):
        texts = [(group, text) for group, i in enumerate(order) for text in items[i].texts]
        return collate([text for _, text in texts], [[]] * len(texts), [group for group, _ in texts])
    return sft.rows(items, order)


def _layouts(settings: Training, model: Any, batch: Batch, device: str) -> Table:
    """What the passes over this batch compute in each layout that the model can take there, and which they take."""
    from rich.table import Table
    from torch import nn

    from plaudit.policy import Policy

    policy = Policy(model)
    policy.rearranges &= not isinstance(settings, Reward) or isinstance(getattr(model, "score", None), nn.Linear)
    policy.blocks &= device == "cpu"
    parts = [part for part, _ in policy.parts(batch, settings.tokens_per_pass)]
    counted = [computed(policy, part) for part in parts]
    sampled = ", if every completion runs to the limit" * isinstance(settings, OnPolicy)
    title = (
        f"Layout of the first batch: {len(batch)} rows, {int(batch.lengths.sum()):,} tokens in {len(parts)} "
        f"pass{'es' * (len(parts) > 1)}{sampled}"
    )
    table = Table("layout", "tokens computed", "passes that take it", title=title, title_justify="left")
    for name in ("padded", "packed", "prompt shared"):
        if any(name in tokens for tokens, _ in counted):
            together = sum(tokens.get(name, tokens.get("packed", 0)) for tokens, _ in counted)
            table.add_row(name, f"{together:,}", str(sum(taken == name for _, taken in counted)))
    return table


def computed(policy: Policy, batch: Batch) -> tuple[dict[str, int], str]:
    """How many tokens this policy computes for the batch in each layout, padding included, and which layout it takes:
    of that one, the tokens as it takes it."""
    from dataclasses import replace

    import torch

    from plaudit import layout, seq2seq

    found = policy.layout(batch)
    tokens = {"padded": len(batch) * batch.tokens.shape[1]}
    if policy.encodes:
        prompts = len(batch) * int(seq2seq.prompt_lengths(batch).max())
        return {"padded": prompts + found.source.numel()}, "padded"
    if policy.rearranges and batch.tokens.shape[1] <= policy.window:
        alone = replace(batch, groups=torch.arange(len(batch)))
        beside = policy.beside(batch)
        packed, shared = (layout.side_by_side,) * 2 if beside else (layout.arrange, layout.shared)
        tokens["packed"] = packed(alone, policy.width).source.numel()
        if len(batch.groups.unique()) < len(batch):
            tokens["prompt shared"] = shared(batch, policy.width).source.numel()
    shares = len(found.where[batch.attention].unique()) < int(batch.attention.sum())
    taken = "padded" if found.mask is None else "prompt shared" if shares else "packed"
    return {**tokens, taken: found.source.numel()}, taken


def _shown(item: Any, template: Template) -> Any:
    """Token ids as the model will see them: a rich text in which the actions are told apart, without colours too."""
    from rich.text import Text

    from plaudit.algorithms.on_policy import Asked
    from plaudit.algorithms.preference import Answers
    from plaudit.algorithms.reward import Judged

    if isinstance(item, Answers):
        item = item.encoded[0]
    if isinstance(item, Asked):
        ids, actions = item.ids, [False] * len(item)
    elif isinstance(item, Judged):
        ids, actions = item.texts[0], [False] * len(item.texts[0])
    else:
        ids, actions = item.prompt + item.completion, [False] * len(item.prompt) + item.actions
    shown = Text()
    for i, acting in enumerate(actions):
        text = template.tokenizer.decode([ids[i]]).replace("\n", "\\n")
        opens, closes = acting and not (i and actions[i - 1]), acting and not (actions[i + 1 :] or [False])[0]
        shown.append("⟦" * opens + text + "⟧" * closes, style="black on green" if acting else "dim")
    return shown
