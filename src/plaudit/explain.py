"""What a run would do, before it does it: batch arithmetic, memory, one example with its mask."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaudit import config, machine
from plaudit.data import Order
from plaudit.recipes import begun, encode, prepare, template_of
from plaudit.settings import Reward
from plaudit.settings.common import Training
from plaudit.settings.policy_gradient import OnPolicy

if TYPE_CHECKING:
    from plaudit.templates import Template


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
        for line in (*_arithmetic(settings, len(loaded.training)), *_memory(settings), *loaded.notes):
            console.print(line, highlight=False, markup=False)
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


def _memory(settings: Training) -> list[str]:
    """Weights, and how many of them learn, counted on a model without content; activations by a rule of thumb."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    from plaudit.backbone import layers_of, tail_of

    config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if isinstance(settings, Reward):
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    with torch.device("meta"):
        model = auto.from_config(config)
    bases = [model.get_encoder(), model.get_decoder()] if config.is_encoder_decoder else [model.base_model]
    stack = [layer for base in bases for layer in layers_of(base)]
    trained = stack[-settings.train_layers :]
    total = learning = _count(model)
    if settings.train_layers:
        learning = sum(map(_count, [*trained, *tail_of(model.base_model).values()]))
    elif settings.lora_rank:
        matrices = [p for layer in stack for p in layer.parameters() if p.dim() == 2]
        learning = sum(settings.lora_rank * sum(matrix.shape) for matrix in matrices)
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    # What a layer keeps for the backward pass, part of it in two bytes, part in four.
    kept = len(trained) * (8 * text.hidden_size + 4 * inner) * 3
    if settings.gradient_checkpointing:  # what comes into each layer, and all of the one that is computed again
        kept = kept // len(trained) + len(trained) * 4 * text.hidden_size
    activations = settings.tokens_per_pass * kept
    return [
        f"{total:,} weights, of which {learning:,} learn; "
        f"computing in {machine.precision(settings.precision, settings.device)}.",
        f"About {(total * 4 + learning * 12) / 1e9:.2f} GB of weights, gradients and moments, and up to "
        f"{activations / 1e9:.2f} GB of activations at {settings.tokens_per_pass} tokens a pass.",
    ]


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


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
