"""What a run would do, before it does it: batch arithmetic, memory, one example with its mask."""

from __future__ import annotations

from typing import Any

from plaudit import checks, config, machine, sources
from plaudit.recipes import describe, load_records
from plaudit.settings.common import Training
from plaudit.settings.policy_gradient import OnPolicy


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
    checks.check_data(settings.data)
    model = sources.resolve(settings.model)
    checks.check_model(model)
    loaded = load_records(settings)
    for line in (*_arithmetic(settings, len(loaded.training)), *_memory(settings, model)):
        console.print(line, highlight=False)
    for note in loaded.notes:
        console.print(note)
    console.print("\n[bold]One example[/], actions in green:")
    console.print(describe(settings, model, loaded.training[0]))


def _arithmetic(settings: Training, rows: int) -> list[str]:
    if isinstance(settings, OnPolicy):
        reuse = getattr(settings, "reuse", 1)
        rollouts = max(1, round(settings.epochs * rows * settings.group / settings.rollout))
        updates = settings.rollout // settings.batch_size * reuse
        return [
            f"{rows} prompts; a rollout is {settings.rollout} completions, {settings.group} of each prompt.",
            f"Each rollout is learned from in {updates} steps of {settings.batch_size} completions.",
            f"{settings.steps or rollouts * updates} steps.",
        ]
    steps = settings.steps or max(1, round(settings.epochs * rows / settings.batch_size))
    seen = steps * settings.batch_size / rows
    return [f"{rows} rows to learn from; {steps} steps of {settings.batch_size}: each row is seen {seen:.2f} times."]


def _memory(settings: Training, model: str) -> list[str]:
    """Weights, moments and activations, counted from the config alone."""
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
    width, layers, inner = text.hidden_size, text.num_hidden_layers, getattr(text, "intermediate_size", None)
    block = 4 * width * width + 3 * width * (inner or 4 * width)
    total = layers * block + text.vocab_size * width
    learning = (settings.train_layers or layers) * block + (0 if settings.train_layers else text.vocab_size * width)
    if settings.lora_rank:
        learning = layers * settings.lora_rank * 2 * (4 * width + 3 * (inner or 4 * width))
    precision = machine.precision(settings.precision, settings.device)
    trained_layers = settings.train_layers or layers
    activations = settings.tokens_per_pass * trained_layers * (8 * width + 4 * (inner or 4 * width)) * 3
    return [
        f"{total / 1e6:.0f} M weights, {learning / 1e6:.0f} M learn; computing in {precision}.",
        f"About {(total * 4 + learning * 12) / 1e9:.2f} GB of weights, gradients and moments, and up to "
        f"{activations / 1e9:.2f} GB of activations at {settings.tokens_per_pass} tokens a pass.",
    ]
