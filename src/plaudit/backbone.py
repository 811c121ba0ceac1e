"""What plaudit must know of a Hugging Face model's insides: its layers, its head, which masks it can take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plaudit import attention
from plaudit.checks import read_config
from plaudit.errors import PlauditError

# Architectures whose state is not a set of keys and values: packing rows side by side would mix documents.
_RECURRENT = ("mamba", "rwkv", "xlstm", "recurrent_gemma", "jamba", "zamba", "bamba", "falcon_h1", "lfm2", "nemotron_h")


def owner_of_layers(base: nn.Module) -> nn.Module:
    """The module that holds the stack of decoder layers (Llama's model itself, OPT's decoder, ...)."""
    count = base.config.get_text_config().num_hidden_layers
    for module in base.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module
    raise PlauditError(
        f"cannot find the {count} layers of {type(base).__name__}: set neither train_layers nor gradient_checkpointing."
    )


def layers_of(base: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers."""
    count = base.config.get_text_config().num_hidden_layers
    children = owner_of_layers(base).children()
    return next(child for child in children if isinstance(child, nn.ModuleList) and len(child) == count)


def tail_of(base: nn.Module) -> dict[str, nn.Module]:
    """The modules with weights that follow the stack: the final norm."""
    owner = owner_of_layers(base)
    stack = layers_of(base)
    names = [name for name, _ in owner.named_children()]
    after = names[[child is stack for child in owner.children()].index(True) + 1 :]
    return {name: getattr(owner, name) for name in after if any(True for _ in getattr(owner, name).parameters())}


def checkpoint_layers(model: nn.Module) -> None:
    """From now on each layer keeps for the backward pass only what came into it, and is computed again there (Chen et
    al. 2016, arXiv:1604.06174). No number changes, and passes without gradients take no notice."""
    bases = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model.base_model]
    for layer in (layer for base in bases for layer in layers_of(base)):
        # transformers' own way works in training mode alone, which would bring dropout with it.
        layer.forward = partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """What a model has beside its base and with weights: of a sequence classifier, all that makes a score of states."""
    children = model.named_children()
    beside = {name: child for name, child in children if child is not model.base_model}
    return {name: child for name, child in beside.items() if any(True for _ in child.parameters())}


def score_head(model: nn.Module) -> nn.Linear:
    """The last map of a sequence classifier with one output; under an adapter, the adapter's own."""
    maps = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == 1
        if "lora_" not in name and "original_module" not in name
    ]
    return maps[-1]


def limit_of(model: nn.Module) -> int:
    """The longest row, in tokens, that a model has positions for."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 2**31
    # RoBERTa's kind begins to count after the number of its padding token.
    shifted = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
    return int(limit) - (config.pad_token_id + 1 if shifted else 0)


@contextmanager
def swapped(stack: nn.ModuleList, replacements: Mapping[int, nn.Module]) -> Iterator[None]:
    """Inside, some layers of `stack` are others. Their number stays, so masks chosen by layer still fit."""
    kept = {i: stack[i] for i in replacements}
    try:
        for i, module in replacements.items():
            stack[i] = module
        yield
    finally:
        for i, module in kept.items():
            stack[i] = module


@contextmanager
def replaced(owner: nn.Module, others: Mapping[str, Any]) -> Iterator[None]:
    """Inside, some attributes of `owner`, children among them, are others."""
    kept = {name: getattr(owner, name) for name in others}
    try:
        for name, other in others.items():
            setattr(owner, name, other)
        yield
    finally:
        for name, own in kept.items():
            setattr(owner, name, own)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is off."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def takes_masks(model: nn.Module) -> bool:
    """Whether rows may be packed: the model takes positions and a ready (R, 1, L, L) mask, and is causal."""
    config = model.config
    if config.is_encoder_decoder or config.model_type.startswith(_RECURRENT):
        return False
    if config._attn_implementation not in ("sdpa", "eager", attention.NAME) or getattr(config, "alibi", False):
        return False
    if "local" in getattr(config, "attention_layers", ()):
        return False  # GPT-Neo's windows count places in memory, whatever the mask says
    causal = all(getattr(module, "is_causal", True) for module in model.modules())
    return causal and "position_ids" in inspect.signature(model.base_model.forward).parameters


def takes_blocks(model: nn.Module) -> bool:
    """Whether rows may lie side by side: every layer then attends through `attention.attend`, which is told to it
    here, and all that it asks of attention is a scale."""
    config = model.config.get_text_config()
    plain = all(getattr(config, name, None) is None for name in ("attn_logit_softcapping", "attn_logit_softcap"))
    takes = plain and takes_masks(model) and model._supports_attention_backend
    if takes and model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = attention.NAME
    return takes and model.config._attn_implementation == attention.NAME


def drops_attention(model: nn.Module) -> bool:
    """Whether attention weights are dropped at random at present."""
    config = model.config.get_text_config()
    return model.training and any(getattr(config, name, 0.0) for name in ("attention_dropout", "attn_pdrop"))


def window_of(config: Any) -> int:
    """The longest row for which sliding-window or chunked attention is plain attention."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    in_use = getattr(text, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds)
    if "chunked_attention" in (kinds or ()):
        window, in_use = text.attention_chunk_size, True
    return int(window) if window and in_use else 2**31


class _Replay(nn.Module):
    """Stands for the first frozen layer: whatever comes in, the kept activations come out."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden


class _Skip(nn.Module):
    """Stands for the other frozen layers."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Reached(Exception):
    """Leaves the backbone once the frozen layers are through."""


@contextmanager
def stopped_before(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, a model that runs ends where it comes to this layer; the list holds what would have gone into it."""
    caught: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    with layer.register_forward_pre_hook(stop, with_kwargs=True), suppress(_Reached):
        yield caught


@contextmanager
def replaying(layers: nn.ModuleList, count: int, hidden: Tensor) -> Iterator[None]:
    """Inside, the first `count` layers are not run: `hidden` is what comes out of them."""
    with swapped(layers, dict(enumerate([_Replay(hidden), *(_Skip() for _ in range(count - 1))]))):
        yield


def logit_transform(config: Any) -> tuple[float, float | None]:
    """(scale, soft cap) that some families apply to the logits (Cohere, Granite, T5; Gemma)."""
    text = config.get_text_config()
    if getattr(text, "scale_decoder_outputs", False):
        return float(text.hidden_size**-0.5), None
    scale = getattr(text, "logit_scale", None) or 1.0 / (getattr(text, "logits_scaling", None) or 1.0)
    return float(scale), getattr(text, "final_logit_softcapping", None)


def load_backbone(name: str, auto: Any, **options: Any) -> nn.Module:
    """`auto.from_pretrained(name)` in float32, safetensors only, never with foreign code.

    Raises PlauditError when there is no such model.
    """
    read_config(name)
    try:
        model = auto.from_pretrained(
            name,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise PlauditError(f"model: cannot load {name!r}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise PlauditError(f"model: cannot load {name!r}: {str(error).splitlines()[0]}") from error
        model = auto.from_pretrained(
            name,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="eager",
            **options,
        )
    model.eval()
    return model


def store_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Frozen matrices in the type they are multiplied in. What else there is (norms, embeddings) stays as it is, so
    that a frozen copy computes bit for bit what autocast makes of the original."""
    tied = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    for child in module.modules():
        if isinstance(child, nn.Linear) and not child.weight.requires_grad and id(child.weight) not in tied:
            child.weight.data = child.weight.data.to(dtype)
