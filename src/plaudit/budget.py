"""What a run takes of the memory, counted on a model without content, and how many tokens find room at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from plaudit import machine
from plaudit.backbone import heads_of, layers_of, tail_of
from plaudit.errors import PlauditError
from plaudit.settings import Reward
from plaudit.settings.common import Training
from plaudit.settings.online import BestOfN
from plaudit.settings.policy_gradient import OnPolicy
from plaudit.settings.preference import Referenced

T = TypeVar("T")

SHARE = 0.5
"""Of the room that is left, activations get so much: the rest is for what nobody counts."""

LIMITS = {"cpu": (512, 4096), "cuda": (1024, 65536)}
"""Fewest and most tokens of a pass. More than these gain a CPU nothing; fewer would leave its cores waiting."""

UNKNOWN = 4096
"""Tokens of a pass where the system does not say what is free."""


@dataclass(frozen=True)
class Needs:
    """What a run of some settings takes.

    model     the model itself, on the meta device
    weights   how many numbers it has; learning: how many of them learn
    copies    bytes of what else is held of the weights: in another type, as a reference, for sampling
    token     bytes that a token of a pass costs
    """

    model: Any
    weights: int
    learning: int
    copies: int
    token: int

    @property
    def state(self) -> int:
        """Bytes of weights, gradients and AdamW's two moments, all in float32."""
        return self.weights * 4 + self.learning * 12


def needs_of(settings: Training, precision: str) -> Needs:
    """Counts them; the weights themselves are not read. Raises PlauditError for a model that there is not."""
    model = hollow(settings)
    bases = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model.base_model]
    layers = sum(base.config.get_text_config().num_hidden_layers for base in bases)
    weights = learning = count(model)
    if settings.train_layers:
        trained = list(layers_of(model.base_model))[-settings.train_layers :]
        layers = len(trained)
        learning = sum(map(count, [*trained, *tail_of(model.base_model).values()]))
    elif settings.lora_rank:
        learning = settings.lora_rank * sum(sum(matrix.shape) for matrix in matrices(model))
    half = precision == "bfloat16"
    text = model.config.get_text_config()
    return Needs(
        model,
        weights,
        learning,
        _copies(settings, weights, learning, half),
        token_bytes(text.hidden_size, _inner(text), layers, half, settings.gradient_checkpointing),
    )


def hollow(settings: Training) -> Any:
    """The model that these settings train, on the meta device: every shape, no number. Raises PlauditError."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    try:
        config = AutoConfig.from_pretrained(settings.model, trust_remote_code=False)
        auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if isinstance(settings, Reward):
            auto, config.num_labels = AutoModelForSequenceClassification, 1
        with torch.device("meta"):
            return auto.from_config(config)
    except (OSError, ValueError) as error:
        raise PlauditError(f"model: cannot load {settings.model!r}: {str(error).splitlines()[0]}") from error


def count(module: nn.Module) -> int:
    """How many numbers the parameters of a module hold, those that are shared once."""
    return sum(parameter.numel() for parameter in module.parameters())


def matrices(model: Any) -> list[nn.Parameter]:
    """The matrices that adapters are put beside: all but embeddings and heads."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    beside = [head] if head is not None else heads_of(model).values()
    heads = {id(module) for head in beside for module in head.modules()}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    return [module.weight for module in linear if id(module) not in heads]


def token_bytes(width: int, inner: int, layers: int, half: bool, checkpointed: bool) -> int:
    """Bytes of activations that one token keeps for the backward pass in `layers` layers of this width and inner
    width. The two sums are fitted to what a Llama's layer was measured to keep (SmolLM2-135M): norms and residuals stay
    float32 in either type, and the inner states are of the type that is computed in."""
    layer = 48 * width + (8 if half else 16) * inner
    # With checkpointing: what comes into each layer, and all of the one that is being computed again.
    return layer + layers * 4 * width if checkpointed else layer * layers


def _inner(text: Any) -> int:
    names = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")
    size = next((size for name in names if (size := getattr(text, name, None))), 4 * text.hidden_size)
    return max(size) if isinstance(size, list) else size  # of some models each layer has its own


def _copies(settings: Training, weights: int, learning: int, half: bool) -> int:
    """Autocast keeps what it multiplies by as bfloat16; a reference is what learns once more; the sampler has weights
    of its own, laid out for decoding."""
    refers = isinstance(settings, Referenced | OnPolicy) and not isinstance(settings, BestOfN)
    total = 2 * weights if half else 0
    if refers and not settings.lora_rank and not getattr(settings, "precompute_reference", False):
        total += (2 if half else 4) * learning
    return total + (4 * weights if isinstance(settings, OnPolicy) else 0)


def free_on(device: torch.device) -> int | None:
    """Bytes that are free for this process where it computes: processes of one machine share what there is."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) // math.ceil(processes / torch.cuda.device_count())
    free_here = machine.free_memory() if device.type == "cpu" else None
    return None if free_here is None else free_here // processes


def ran_out(error: RuntimeError) -> bool:
    """Whether PyTorch says with this error that there is no more memory."""
    said = ("DefaultCPUAllocator", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def retried(work: Callable[[], T], lessen: Callable[[], None]) -> T:
    """What `work` returns, which leaves nothing behind if it fails: where memory runs out, it is done again once
    `lessen` has made it smaller, which raises where it can't be."""
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not ran_out(error):
                raise
        # Here the error is gone, and with it all that its frames held.
        lessen()
        machine.release()


def fewer(tokens: int, count: Callable[[int], int]) -> int:
    """`tokens` of a pass, halved until what is to go through is cut into more parts; `count` says into how many."""
    before = count(tokens)
    while count(tokens) <= before:
        tokens //= 2
    return tokens


def tokens_that_fit(free: int | None, needs: Needs, kind: str) -> int:
    """How many tokens a pass may have where `free` bytes are free before the model is loaded, on a device of this kind
    (cpu, cuda): a multiple of 256 within `LIMITS`; `UNKNOWN` where nobody says what is free."""
    if free is None or kind not in LIMITS:
        return UNKNOWN
    least, most = LIMITS[kind]
    room = (free - needs.state - needs.copies) * SHARE
    return min(max(int(room // needs.token) // 256 * 256, least), most)


def reason(free: int | None, needs: Needs, kind: str) -> str:
    """Why it is so many tokens, in words."""
    if free is None or kind not in LIMITS:
        return "this system does not say what is free"
    least, most = LIMITS[kind]
    room = free - needs.state - needs.copies
    fitting = max(int(room * SHARE // needs.token), 0)
    said = (
        f"{free / 1e9:.1f} GB are free, {max(room, 0) / 1e9:.1f} GB beside the model; {SHARE:.0%} of that holds "
        f"{fitting:,} tokens of {needs.token / 1e6:.3g} MB"
    )
    if fitting >= most:
        return f"{said}, and more than {most:,} gain nothing"
    return said if fitting >= least else f"{said}, and fewer than {least:,} take too long"
