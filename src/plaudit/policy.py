"""`Policy`: a Hugging Face backbone with optional heads. Everything that is asked of a model goes through `forward`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from plaudit.backbone import (
    evaluating,
    layers_of,
    logit_transform,
    owner_of_layers,
    replaced,
    store_linears,
    swapped,
    tail_of,
    takes_masks,
    window_of,
)
from plaudit.batch import Batch
from plaudit.errors import PlauditError
from plaudit.layout import Layout, arrange, padded
from plaudit.numerics import at_actions, before_actions, logprobs_of, token_logprobs


class Output(NamedTuple):
    """What `Policy.forward` was asked for: logprobs, entropy, values (B, T), zero outside actions; scores (B,)."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None


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


class Policy(nn.Module):
    """A causal language model, or a sequence classifier as a reward model, and its heads.

    backbone      the Hugging Face model; with an adapter, the model inside it
    adapter       the peft model around it, or None
    value         Linear(d, 1) that reads the state before each action, or None
    frozen        how many of the first layers never learn and can be run once for all (see `trunk`)
    temperature   divides the logits wherever a log-probability is taken: sampling, update, reference alike
    """

    def __init__(self, backbone: nn.Module, adapter: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.value: nn.Linear | None = None
        self.temperature = 1.0
        self.frozen = 0
        self.config = backbone.config
        self.width: int = self.config.get_text_config().hidden_size
        self.rearranges = takes_masks(backbone)
        self.window = window_of(self.config)
        self.plain_head = self.base is not backbone
        self.stored_dtype = torch.float32  # of the folder that the model came from
        self.autocasts = False  # whether it is going to run under bfloat16 autocast
        self._cast_head: Tensor | None = None
        # In lists, so that neither counts as a part of this module: they are other views of the same weights.
        self._adapter = [adapter]
        self._reference: list[Any] = []

    @property
    def adapter(self) -> Any:
        return self._adapter[0]

    @property
    def base(self) -> Any:
        """The backbone without its head."""
        return self.backbone.base_model

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    def learning(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name: what the optimizer moves and a checkpoint keeps."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    # ------------------------------------------------------------------------------------------------- forward

    def forward(
        self, batch: Batch, *, logprobs: bool = True, entropy: bool = False, values: bool = False, scores: bool = False
    ) -> Output:
        """Runs the backbone once and returns what was asked for."""
        layout = self.layout(batch)
        hidden, logits = self._replayed(batch, layout)
        result = Output()
        # A token is predicted by what the backbone knows one column earlier, wherever that column lies.
        before = before_actions(layout.where, batch.actions)
        if logprobs:
            targets = batch.tokens[batch.actions]
            if logits is None:
                chosen, spread = self._head(hidden.index_select(0, before), targets, entropy)
            else:
                chosen, spread = logprobs_of(logits.index_select(0, before), targets, self.temperature, entropy)
            result = result._replace(logprobs=at_actions(chosen, batch.actions))
            if spread is not None:
                result = result._replace(entropy=at_actions(spread, batch.actions))
        if values and self.value is not None:
            result = result._replace(values=at_actions(_scalar(self.value, hidden[before]), batch.actions))
        if scores:
            last = layout.where.gather(1, self._scored(batch)[:, None]).squeeze(1)
            result = result._replace(scores=_scalar(self.backbone.score, hidden[last]))
        return result

    def _scored(self, batch: Batch) -> Tensor:
        """(B,) the column whose score counts: the last that is no padding token, as Hugging Face's classifiers read
        it. Models whose padding token is the end token are so read, and were so trained, one before the end."""
        padding = self.config.get_text_config().pad_token_id
        real = batch.attention if padding is None else batch.attention & (batch.tokens != padding)
        return (real * torch.arange(real.shape[1], device=real.device)).amax(1)

    def layout(self, batch: Batch) -> Layout:
        """The cheapest exact arrangement that this backbone can take."""
        if not self.rearranges or batch.tokens.shape[1] > self.window:
            return padded(batch, self.width)
        return arrange(batch, self.width)

    @torch.no_grad()
    def trunk(self, batch: Batch) -> Tensor:
        """(B, T, d) what leaves the frozen layers: computed once, it serves every epoch and the reference."""
        caught: list[Tensor] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _Reached

        layout = self.layout(batch)
        hook = layers_of(self.base)[self.frozen].register_forward_pre_hook(stop, with_kwargs=True)
        with hook, evaluating(self.backbone), suppress(_Reached):
            self._run(batch, layout)
        return layout.collect(caught[0])

    def _replayed(self, batch: Batch, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """(R * L, d) last hidden states and, for unusual heads, (R * L, V) logits; from kept activations if any."""
        if batch.trunk is None or self.frozen == 0:
            return self._run(batch, layout)
        stand_ins = [_Replay(layout.spread(batch.trunk)), *(_Skip() for _ in range(self.frozen - 1))]
        with swapped(layers_of(self.base), dict(enumerate(stand_ins))):
            return self._run(batch, layout)

    def _run(self, batch: Batch, layout: Layout) -> tuple[Tensor, Tensor | None]:
        mask = layout.mask
        if mask is not None and self.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
        inputs: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        if self.rearranges:
            inputs["position_ids"] = layout.positions
        tokens = layout.spread(batch.tokens * batch.attention)
        if self.plain_head:
            return self.base(input_ids=tokens, **inputs).last_hidden_state.flatten(0, 1), None
        output = self.backbone(input_ids=tokens, output_hidden_states=True, **inputs)
        return output.hidden_states[-1].flatten(0, 1), output.logits.flatten(0, 1)

    def _head(self, states: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        head = self.backbone.get_output_embeddings()
        device = states.device.type
        if torch.is_autocast_enabled(device):
            states = states.to(torch.get_autocast_dtype(device))
        weight = head.weight
        if not weight.requires_grad and weight.dtype != states.dtype:
            # A frozen head is converted once, not at every pass.
            if self._cast_head is None or self._cast_head.dtype != states.dtype:
                self._cast_head = weight.detach().to(states.dtype)
            weight = self._cast_head
        scale, cap = logit_transform(self.config)
        return token_logprobs(
            states,
            weight,
            targets,
            bias=head.bias,
            temperature=self.temperature,
            scale=scale,
            soft_cap=cap,
            with_entropy=entropy,
        )

    # ----------------------------------------------------------------------------------------------- reference

    def keep_reference(self) -> None:
        """Remembers the present weights as the reference, as cheaply as the way of training allows: an adapter can
        be switched off, a frozen trunk is shared, and only what learns is copied."""
        if self.adapter is not None:
            return
        learning = nn.ModuleDict({"all": self.backbone})
        if self.frozen:
            top = nn.ModuleList(list(layers_of(self.base))[self.frozen :])
            learning = nn.ModuleDict({"layers": top, "tail": nn.ModuleDict(tail_of(self.base))})
        kept = copy.deepcopy(learning).requires_grad_(False).eval()
        if self.autocasts:
            store_linears(kept, torch.bfloat16)
        self._reference = [kept]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, `forward` answers as the reference does. Raises PlauditError if none was kept."""
        if self.adapter is not None:
            with self.adapter.disable_adapter(), evaluating(self.backbone):
                yield
            return
        if not self._reference:
            raise PlauditError("this policy keeps no reference: leave the KL term out, or call keep_reference() first.")
        kept = self._reference[0]
        if not self.frozen:
            with replaced(self, {"backbone": kept["all"], "_cast_head": None}):
                yield
            return
        layers = {self.frozen + i: layer for i, layer in enumerate(kept["layers"])}
        tail = replaced(owner_of_layers(self.base), dict(kept["tail"].items()))
        with evaluating(self.backbone), swapped(layers_of(self.base), layers), tail:
            yield


def _scalar(head: nn.Linear, states: Tensor) -> Tensor:
    """(N, d) -> (N,) in float32 always: eight bits of mantissa are too few for values and scores."""
    with torch.autocast(states.device.type, enabled=False):
        dtype = torch.promote_types(states.dtype, torch.float32)
        bias = None if head.bias is None else head.bias.to(dtype)
        return functional.linear(states.to(dtype), head.weight.to(dtype), bias).squeeze(-1)
