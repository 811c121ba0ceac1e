"""`Algorithm`: the contract between an idea and the one loop that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from plaudit.batch import Batch
from plaudit.budget import fewer, retried
from plaudit.data import Order
from plaudit.errors import PlauditError, SharedError
from plaudit.policy import Output, Policy
from plaudit.world import World

Stats = dict[str, Tensor]
T = TypeVar("T")

KEPT = 2**27
"""Numbers, at most, that are kept of what frozen layers make of a batch, or of a data set."""


class Algorithm:
    """Gives the trainer batches, counts their units, and turns them into a loss.

    policy    the module that learns; `model` is what the trainer made of it (wrapped where there are many processes)
    steps     optimizer steps that the run is planned for
    tokens_per_pass  tokens that go through the model at once at most; fewer once memory has run out
    position  batches handed out so far: raised before a batch is yielded, so that a state saved after its step
              says what comes next
    held_by   what is held out, once more, by the values of the column `eval_by` if there is one
    notes     figures about the last rollout, logged with the next step
    remarks   sentences for the user about what it begins with
    shown     samples for people to read, written with the next step
    """

    evaluates_first = True
    """Whether held-out figures mean something before the first step."""

    weight_decay: float | None = None
    """What the optimizer's weight decay is from the next step on, where an algorithm adapts it."""

    policy: Policy
    model: nn.Module
    steps: int

    def __init__(self, policy: Policy, world: World, tokens_per_pass: int) -> None:
        self.policy = self.model = policy
        self.world = world
        self.tokens_per_pass = tokens_per_pass
        self.position = 0
        self.held_by: dict[str, list[Any]] = {}
        self.notes: dict[str, float] = {}
        self.remarks: list[str] = []
        self.shown: list[dict[str, Any]] = []

    def batches(self) -> Iterator[Batch]:
        """This process's part of each batch that one optimizer step learns from."""
        raise NotImplementedError

    def begin(self, batch: Batch) -> None:
        """Called with this process's part of each batch, before it is split, and again before it is split anew."""

    def weight(self, batch: Batch) -> Tensor:
        """() how many units (tokens, pairs, sequences) the batch holds."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        """() the SUM of the loss over the batch's units, and statistics that are sums over the same units."""
        raise NotImplementedError

    def objection(self, figures: dict[str, float]) -> str:
        """Why a batch with these figures is not to be learned from, though its gradient is known; "" where it is."""
        return ""

    def after_step(self, step: int) -> None:
        """Called once the optimizer has moved."""

    def named(self, index: list[int]) -> str:
        """These values of a batch's `index`, as a person finds what they stand for."""
        return f"rows {index} of those trained on, the first being 0"

    def evaluate(self) -> dict[str, float]:
        """Held-out figures of the present policy."""
        return {}

    def finish(self) -> None:
        """Called once after the last step, before the policy is saved."""

    def state(self) -> dict[str, Any]:
        """All that must survive a restart beside weights, optimizer and global random states."""
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` returned."""
        self.position = state["position"]

    def over(self, batch: Batch, function: Callable[[Batch], Output]) -> Output:
        """`function` over micro-batches, without gradients or dropout, its results in the order of `batch`'s rows."""
        dropping = [module for module in self.policy.modules() if module.training]
        self.policy.eval()
        with torch.no_grad(), self.world.autocast():
            output = self.fitting(batch, lambda: self._collected(batch, function))
        for module in dropping:
            module.training = True
        return output

    def _collected(self, batch: Batch, function: Callable[[Batch], Output]) -> Output:
        collected: dict[str, Tensor] = {}
        for part, places in self.passes(batch):
            for name, tensor in function(part)._asdict().items():
                if tensor is None or places is None:
                    continue
                if name not in collected:
                    shape = (len(batch), *batch.tokens.shape[1:][: tensor.dim() - 1], *tensor.shape[2:])
                    collected[name] = tensor.new_zeros(shape)
                if tensor.dim() > 1:
                    collected[name][places, : tensor.shape[1]] = tensor
                else:
                    collected[name][places] = tensor
        return Output(**collected)

    def passes(self, batch: Batch) -> list[tuple[Batch, Tensor | None]]:
        """The parts of a batch, which go through the model one after the other, each with the places (n,) of its rows.

        Where every pass is an exchange, all processes must call this, and get as many passes as the one that needs
        most: those that this one lacks repeat its shortest group and have no places, and what they give is to be left
        out. Raises SharedError on all processes if one has no rows at all."""
        parts: list[tuple[Batch, Tensor | None]] = [*self.policy.parts(batch, self.tokens_per_pass)]
        if not self.world.lockstep:
            return parts
        most, empty = self.world.maximum(torch.tensor([len(parts), not parts])).tolist()
        if empty:
            raise SharedError(
                f"batch_size: one of {self.world.size} processes has no rows of a batch, and sharded models need some "
                "on each: raise batch_size, or start fewer processes."
            )
        shortest = min(batch.blocks(), key=lambda rows: int(batch.lengths[rows].sum()))
        return parts + [(batch.rows(shortest), None)] * (most - len(parts))

    def sharing_trunk(self, batch: Batch) -> Batch:
        """The batch with what frozen layers make of it, for several passes to share, unless that is too much to keep or
        nothing is frozen."""
        if batch.trunk is not None or not self.has_trunk or batch.tokens.numel() * self.policy.width > KEPT:
            return batch
        return replace(batch, trunk=self.over_trunk(batch))

    @property
    def has_trunk(self) -> bool:
        """Whether there are frozen layers that can be run apart."""
        return bool(self.policy.frozen) and not (self.policy.own_head or self.world.sharded)

    def over_trunk(self, batch: Batch) -> Tensor:
        """(B, T, d) the frozen layers' activations, computed once for all passes over this batch."""
        with self.world.autocast():
            return self.fitting(batch, lambda: self._over_trunk(batch))

    def _over_trunk(self, batch: Batch) -> Tensor:
        kept: Tensor | None = None
        for part, places in self.policy.parts(batch, self.tokens_per_pass):
            activations = self.policy.trunk(part)
            if kept is None:
                kept = activations.new_zeros(*batch.tokens.shape, activations.shape[-1])
            kept[places, : activations.shape[1]] = activations
        assert kept is not None
        return kept

    def fitting(self, batch: Batch, work: Callable[[], T]) -> T:
        """What `work` returns, which sends `batch` through the model in parts and leaves nothing behind if it fails:
        where memory runs out, it is done again in smaller parts, and so is whatever comes after. Raises PlauditError
        where parts cannot be smaller."""
        return retried(work, lambda: self._lessen(batch))

    def _lessen(self, batch: Batch) -> None:
        """Halves the tokens of a pass until they cut the batch into more parts."""

        def count(tokens: int) -> int:
            return len(list(self.policy.parts(batch, tokens)))

        now = self.tokens_per_pass
        if self.world.size > 1:  # the others are in the middle of theirs
            raise PlauditError(f"memory ran out in a pass of {now} tokens: set tokens_per_pass to {max(now // 2, 1)}.")
        if count(now) == len(batch.blocks()):
            raise PlauditError(
                "memory ran out in a pass that held one row, or one prompt with its answers: no smaller one can be "
                "made. Set gradient_checkpointing, train less (train_layers, lora_rank), or lower the limit of tokens."
            )
        self.tokens_per_pass = fewer(now, count)


class HeldToReference(Algorithm):
    """An algorithm whose reference may follow the policy, as in TR-DPO (Gorbatovski et al. 2024, arXiv:2404.09656,
    section 3: a share of 1 is its hard update, a smaller one its soft update)."""

    settings: Any

    @property
    def follows(self) -> int:
        """Steps between two moves of the reference; 0 if it stays, or there is none."""
        every: int = getattr(self.settings, "reference_every", 0)
        return every

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if self.follows and step % self.follows == 0:
            self.move_reference()

    def move_reference(self) -> None:
        """The reference takes its step towards the policy."""
        self.policy.move_reference(self.settings.reference_share)

    def state(self) -> dict[str, Any]:
        if not self.follows:
            return super().state()
        # It is the same in all processes, and large.
        return super().state() | {"reference": self.policy.reference.state_dict() if self.world.is_main else None}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if self.follows:
            self.policy.reference.load_state_dict(self.world.share(state["reference"]))


class FromData(Algorithm):
    """An algorithm whose batches are rows of a data set, in the order of the settings' seed.

    data, held   what it learns from, and what its evaluations are made on
    trunks       what frozen layers make of the rows of an item (n, L, d), by its place, where that is kept
    """

    def __init__(self, settings: Any, world: World, policy: Policy, data: list[Any], held: list[Any]) -> None:
        super().__init__(policy, world, settings.tokens_per_pass)
        self.settings, self.data, self.held = settings, data, held
        self.trunks: dict[int, Tensor] = {}
        self.order = Order(len(data), settings.batch_size, settings.seed)
        self.steps = settings.steps or self.order.steps(settings.epochs)

    def collate(self, indices: list[int]) -> Batch:
        """The batch of these rows of the data."""
        raise NotImplementedError

    def measured(self, items: list[Any]) -> dict[str, float]:
        """Figures of the present policy on these held-out items, of which there are some."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        named = {"": self.held, **{f"/{value}": items for value, items in self.held_by.items()}}
        return {
            f"heldout_{name}{which}": value
            for which, items in named.items()
            if items
            for name, value in self.measured(items).items()
        }

    def batches(self) -> Iterator[Batch]:
        while True:
            mine = self.order[self.position][self.world.rank :: self.world.size]
            self.position += 1
            batch = self.collate(mine).to(self.world.device)
            yield replace(batch, trunk=self.kept_trunk(batch, mine)) if mine and self.keeps_trunk else batch

    @cached_property
    def keeps_trunk(self) -> bool:
        """Whether what frozen layers make of each row is kept from one epoch to the next: if there is one, if there is
        room for it, and if nothing in those layers is random."""
        visits = self.steps * self.settings.batch_size / self.world.size
        if not self.has_trunk or self.policy.backbone.training or visits <= len(self.data):
            return False
        room = KEPT // self.policy.width
        for start in range(0, len(self.data), self.settings.batch_size):
            room -= self.collate(self.companions(start)).attention.numel()
            if room < 0:
                return False
        return True

    def companions(self, place: int) -> list[int]:
        """The places of the rows that go through frozen layers together with the one at `place`: always the same, so
        that a run that goes on finds the same bits."""
        start = place - place % self.settings.batch_size
        return list(range(start, min(start + self.settings.batch_size, len(self.data))))

    def kept_trunk(self, batch: Batch, places: list[int]) -> Tensor:
        """(B, T, d) what frozen layers make of a batch of the rows at `places`, each of which goes through them once in
        a run."""
        for place in places:
            if place not in self.trunks:
                together = self.companions(place)
                rows = self.collate(together).to(self.world.device)
                trunk = self.over_trunk(rows)
                lengths = [int(rows.lengths[block].max()) for block in rows.blocks()]
                parts = [trunk[block, :length] for block, length in zip(rows.blocks(), lengths, strict=True)]
                self.trunks |= zip(together, parts, strict=True)
        some = self.trunks[places[0]]
        kept = some.new_zeros(*batch.tokens.shape, some.shape[-1])
        for block, place in zip(batch.blocks(), places, strict=True):
            kept[block, : self.trunks[place].shape[1]] = self.trunks[place]
        return kept
