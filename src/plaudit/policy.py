"""`Policy`: a Hugging Face backbone with optional heads. Everything that is asked of a model goes through `forward`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from plaudit import machine, seq2seq
from plaudit.backbone import (
    evaluating,
    layers_of,
    logit_transform,
    owner_of_layers,
    replaced,
    replaying,
    score_head,
    stopped_before,
    store_linears,
    swapped,
    tail_of,
    takes_blocks,
    takes_masks,
    window_of,
)
from plaudit.batch import Batch
from plaudit.errors import PlauditError
from plaudit.heads import ActionHeads, Perceptron, scalar
from plaudit.layers import lean
from plaudit.layout import Layout, arrange, computed, padded, side_by_side
from plaudit.numerics import at_actions, before_actions, likeliest, logprobs_of, token_logprobs
from plaudit.sharding import assembled, whole


class Output(NamedTuple):
    """What `Policy.forward` was asked for: logprobs, entropy, values, target_q (B, T) and q, q_logprobs (B, T, 2), zero
    outside actions; hits (B, T), True where an action is the likeliest token; origins (B, T, d), the states that they
    were chosen from; scores (B,)."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    q: Tensor | None = None
    q_logprobs: Tensor | None = None
    target_q: Tensor | None = None
    hits: Tensor | None = None
    origins: Tensor | None = None


class Policy(nn.Module):
    """A language model, causal or encoder-decoder, or a sequence classifier as a reward model, and its heads.

    backbone      the Hugging Face model; with an adapter, the model inside it
    adapter       the peft model around it, or None
    value         what reads the state before each action, linear or with a hidden layer, or None
    heads         what says how much each token is worth, or None
    guidance      how much of Q - V is added to the log-probabilities, in sampling and in `forward` alike
    own_head      whether scores come from a classifier's own head, which reads a whole row, as an encoder's does
    frozen        how many of the first layers never learn and can be run once for all (see `trunk`)
    temperature   divides the logits wherever a log-probability is taken: sampling, update, reference alike
    begins_at_reference  whether the reference is what this policy was in the beginning
    wide_reference       whether the reference keeps full precision under autocast: it is moved by small steps
    """

    def __init__(self, backbone: nn.Module, adapter: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.value: nn.Linear | Perceptron | None = None
        self.heads: ActionHeads | None = None
        self.guidance = 0.0
        self.temperature = 1.0
        self.own_head = False
        self.wide_reference = False
        self.frozen = 0
        self.config = backbone.config
        self._no_split_modules = getattr(backbone, "_no_split_modules", None)  # where accelerate looks for layers
        self.width: int = self.config.get_text_config().hidden_size
        self.rearranges = takes_masks(backbone)
        self.blocks = takes_blocks(backbone)
        if self.blocks:
            lean(layers_of(self.base))
        self.window = window_of(self.config)
        self.encodes = bool(self.config.is_encoder_decoder) and backbone.get_output_embeddings() is not None
        self.plain_head = self.encodes or self.base is not backbone
        self.stored_dtype = torch.float32  # of the folder that the model came from
        self.autocasts = False  # whether it is going to run under bfloat16 autocast
        self._cast_head: Tensor | None = None
        # In lists, so that neither counts as a part of this module: they are other views of the same weights.
        self._adapter = [adapter]
        self._reference: list[Any] = []
        self.begins_at_reference = True

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

    def whole(self) -> Policy:
        """This policy with all weights, where they are spread over processes, all of which must call this; else
        itself."""
        copies: dict[int, Any] = {}
        copy = assembled(self, copies)
        if copy is not self:
            copy._adapter = [self.adapter and assembled(self.adapter, copies)]
        return copy

    # ------------------------------------------------------------------------------------------------- forward

    def forward(
        self,
        batch: Batch,
        *,
        logprobs: bool = True,
        entropy: bool = False,
        values: bool = False,
        scores: bool = False,
        worth: bool = False,
        hits: bool = False,
        origins: bool = False,
    ) -> Output:
        """Runs the backbone once and returns what was asked for; `worth` is all that `heads` say of the actions."""
        if self.own_head:
            return Output(scores=self._classified(batch) - self._score_offset)
        layout = self.layout(batch)
        hidden, logits = self._replayed(batch, layout)
        result = Output()
        # A token is predicted by what the backbone knows one column earlier, wherever that column lies.
        before = before_actions(layout.where, batch.actions)
        if logprobs:
            targets = batch.tokens[batch.actions]
            states = hidden.index_select(0, before)
            if logits is None and self.guide is None:
                chosen, spread = self._head(states, targets, entropy)
            else:
                full = self._logits(states) if logits is None else logits.index_select(0, before)
                full = full if self.guide is None else full + self.guide(states)
                chosen, spread = logprobs_of(full, targets, self.temperature, entropy)
            result = result._replace(logprobs=at_actions(chosen, batch.actions))
            if spread is not None:
                result = result._replace(entropy=at_actions(spread, batch.actions))
        if hits:
            found = self._likeliest(hidden, logits, before, batch.tokens[batch.actions])
            result = result._replace(hits=at_actions(found, batch.actions))
        if values and self.value is not None:
            result = result._replace(values=at_actions(scalar(self.value, hidden[before]), batch.actions))
        if worth and self.heads is not None:
            judged = self.heads(hidden.index_select(0, before), batch.tokens[batch.actions])
            result = result._replace(**{name: _spread(each, batch.actions) for name, each in judged._asdict().items()})
        if origins:
            kept = hidden.new_zeros(*batch.actions.shape, hidden.shape[-1])
            kept[batch.actions] = hidden.index_select(0, before)
            result = result._replace(origins=kept)
        if scores:
            last = layout.where.gather(1, self._scored(batch)[:, None]).squeeze(1)
            result = result._replace(scores=scalar(self.backbone.score, hidden[last]) - self._score_offset)
        return result

    def _likeliest(self, hidden: Tensor, logits: Tensor | None, before: Tensor, targets: Tensor) -> Tensor:
        """(N,) whether each target is the likeliest token."""
        if logits is not None:
            return logits.index_select(0, before).argmax(1) == targets
        head = self.backbone.get_output_embeddings()
        return likeliest(hidden.index_select(0, before), head.weight, targets, head.bias)

    def _classified(self, batch: Batch) -> Tensor:
        """(B,) what the model's own head makes of whole rows, from which padding is hidden."""
        padding = self.config.get_text_config().pad_token_id or 0
        tokens = batch.tokens.masked_fill(~batch.attention, padding)
        head, caught = score_head(self.backbone), list[Tensor]()
        with head.register_forward_pre_hook(lambda module, states: caught.append(states[0])):
            self.backbone(input_ids=tokens, attention_mask=batch.attention.long())
        return scalar(head, caught[0])

    @property
    def _score_offset(self) -> float:
        return getattr(self.config, "score_offset", 0.0)

    @torch.no_grad()
    def normalise_scores(self, mean: float, deviation: float) -> None:
        """From now on a score s is (s - mean) / deviation. The head takes this up, but for a mean where it has no bias,
        as decoders' heads have none: that goes into the config as `score_offset`, which Hugging Face's classifiers
        keep and do not apply. There `score_deviation` says too by how much a score was divided since it was fitted."""
        head, shift = score_head(self.backbone), mean + self._score_offset
        head.weight /= deviation
        if head.bias is not None:
            head.bias.sub_(shift).div_(deviation)
            shift = 0.0
        if shift or self._score_offset:
            self.config.score_offset = shift / deviation
        if deviation != self.score_deviation:
            self.config.score_deviation = deviation

    @property
    def score_deviation(self) -> float:
        """So many times a difference of scores is the difference that was fitted to people's preferences."""
        return getattr(self.config, "score_deviation", 1.0)

    @property
    def guide(self) -> Callable[[Tensor], Tensor] | None:
        """(N, d) states -> (N, V) what is added to their logits, if anything: pi exp(guidance (Q - V)) is decoded
        then (Snell et al. 2022, arXiv:2206.11871, section 4.3)."""
        heads, guidance = self.heads, self.guidance
        return (lambda states: guidance * heads.advantages(states)) if heads is not None and guidance else None

    def distribution(self, states: Tensor) -> Tensor:
        """(N, d) of `Output.origins` -> (N, V) log-probabilities of all tokens. Raises PlauditError for a model whose
        logits are not those of its head alone."""
        if not self.plain_head:
            raise PlauditError(
                "kl_term: full, as wpo, needs logits that the head alone makes: this model adds to them."
            )
        return torch.log_softmax(self._logits(states) / self.temperature, -1)

    def _logits(self, states: Tensor) -> Tensor:
        """(N, d) -> (N, V) all logits."""
        head = self.backbone.get_output_embeddings()
        scale, cap = logit_transform(self.config)
        raw = functional.linear(states, head.weight, head.bias)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32)) * scale
        return torch.tanh(raw / cap) * cap if cap else raw

    def _scored(self, batch: Batch) -> Tensor:
        """(B,) the column whose score counts: the last that is no padding token, as Hugging Face's classifiers read
        it. Models whose padding token is the end token are so read, and were so trained, one before the end."""
        padding = self.config.get_text_config().pad_token_id
        real = batch.attention if padding is None else batch.attention & (batch.tokens != padding)
        return (real * torch.arange(real.shape[1], device=real.device)).amax(1)

    def layout(self, batch: Batch) -> Layout:
        """The cheapest exact arrangement that this backbone can take."""
        if self.encodes:
            return seq2seq.arrange(batch)
        if self.beside(batch):
            return side_by_side(batch, self.width)
        fits = self.rearranges and batch.tokens.shape[1] <= self.window
        return arrange(batch, self.width) if fits else padded(batch, self.width)

    def parts(self, batch: Batch, tokens: int) -> Iterator[tuple[Batch, Tensor]]:
        """Micro-batches of which at most `tokens` tokens are computed, each with the places (n,) of its rows."""
        return batch.parts(tokens, computed(batch) if self.beside(batch) else None)

    def beside(self, batch: Batch) -> bool:
        """Whether the rows are going to lie side by side. Other devices have fused kernels for masks."""
        fits = (
            self.blocks
            and not self.own_head
            and 0 < batch.tokens.shape[1] <= self.window
            and bool(batch.attention[:, 0].all())
        )
        return fits and self.device.type in ("cpu", "meta")

    @torch.no_grad()
    def trunk(self, batch: Batch) -> Tensor:
        """(B, T, d) what leaves the frozen layers: computed once, it serves every epoch and the reference."""
        layout = self.layout(batch)
        with evaluating(self.backbone), stopped_before(layers_of(self.base)[self.frozen]) as caught:
            self._run(batch, layout)
        return layout.collect(caught[0])

    def _replayed(self, batch: Batch, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """(R * L, d) last hidden states and, for unusual heads, (R * L, V) logits; from kept activations if any."""
        if batch.trunk is None or self.frozen == 0:
            return self._run(batch, layout)
        with replaying(layers_of(self.base), self.frozen, layout.spread(batch.trunk)):
            return self._run(batch, layout)

    def _run(self, batch: Batch, layout: Layout) -> tuple[Tensor, Tensor | None]:
        if self.encodes:
            return seq2seq.run(self.backbone, batch, layout, self.plain_head)
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

    @machine.handing_back()
    def keep_reference(self, other: Policy | None = None) -> None:
        """Remembers the present weights as the reference, as cheaply as the way of training allows: an adapter can
        be switched off, a frozen trunk is shared, and only what learns is copied. `other`, a policy of the same make,
        is remembered instead, and then stays the reference. Raises PlauditError if its frozen layers are others."""
        if self.adapter is not None or self._reference:
            return
        of = self if other is None else other
        if other is not None:
            self._check_trunk(other)
        self.begins_at_reference = other is None
        kept = copy.deepcopy(of._kept_of_reference()).requires_grad_(False).eval()
        if self.autocasts and not self.wide_reference:
            store_linears(kept, torch.bfloat16)
        self._reference = [kept]

    def _kept_of_reference(self) -> nn.ModuleDict:
        """What a reference has of its own: all, or what comes after the frozen layers."""
        if not self.frozen:
            return nn.ModuleDict({"all": self.backbone})
        top = nn.ModuleList(list(layers_of(self.base))[self.frozen :])
        return nn.ModuleDict({"layers": top, "tail": nn.ModuleDict(tail_of(self.base))})

    @torch.no_grad()
    def move_reference(self, share: float) -> None:
        """The reference becomes (1 - share) times itself plus share times this policy."""
        own = self._kept_of_reference()
        for theirs, mine in zip(self.reference.parameters(), own.parameters(), strict=True):
            theirs.copy_(torch.lerp(theirs.to(mine.dtype), whole(mine), share))

    @property
    def reference(self) -> nn.Module:
        """What the reference that is kept has of its own."""
        kept: nn.Module = self._reference[0]
        return kept

    def _check_trunk(self, other: Policy) -> None:
        theirs = dict(other.backbone.named_parameters())
        for name, own in self.backbone.named_parameters():
            if name not in theirs or theirs[name].shape != own.shape:
                raise PlauditError(f"reference: it is a model of another make ({name} differs): take one of the same.")
            if self.frozen and not own.requires_grad and not torch.equal(own.cpu(), theirs[name].cpu()):
                raise PlauditError(
                    f"reference: {name} does not learn here (train_layers), and yet is another in the reference: "
                    "raise train_layers, or leave reference out."
                )

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


def _spread(found: Tensor, actions: Tensor) -> Tensor:
    """(N,) or (N, K) of each action -> (B, T) or (B, T, K), zero elsewhere."""
    if found.dim() == 1:
        return at_actions(found, actions)
    return torch.stack([at_actions(column, actions) for column in found.unbind(1)], 2)
