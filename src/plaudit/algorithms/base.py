"""`Algorithm`: the contract between an idea and the one loop that runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.batch import Batch
from plaudit.data import Order
from plaudit.policy import Output, Policy
from plaudit.world import World

Stats = dict[str, Tensor]


class Algorithm:
    """Gives the trainer batches, counts their units, and turns them into a loss.

    policy    the module that learns; `model` is what the trainer made of it (wrapped where there are many processes)
    steps     optimizer steps that the run is planned for
    position  batches handed out so far: raised before a batch is yielded, so that a state saved after its step
              says what comes next
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
        self.notes: dict[str, float] = {}
        self.remarks: list[str] = []
        self.shown: list[dict[str, Any]] = []

    def batches(self) -> Iterator[Batch]:
        """This process's part of each batch that one optimizer step learns from."""
        raise NotImplementedError

    def weight(self, batch: Batch) -> Tensor:
        """() how many units (tokens, pairs, sequences) the batch holds."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> tuple[Tensor, Stats]:
        """() the SUM of the loss over the batch's units, and statistics that are sums over the same units."""
        raise NotImplementedError

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
        collected: dict[str, Tensor] = {}
        dropping = [module for module in self.policy.modules() if module.training]
        self.policy.eval()
        with torch.no_grad(), self.world.autocast():
            for part, places in self.policy.parts(batch, self.tokens_per_pass):
                for name, tensor in function(part)._asdict().items():
                    if tensor is None:
                        continue
                    if name not in collected:
                        shape = (len(batch), *batch.tokens.shape[1:][: tensor.dim() - 1], *tensor.shape[2:])
                        collected[name] = tensor.new_zeros(shape)
                    if tensor.dim() > 1:
                        collected[name][places, : tensor.shape[1]] = tensor
                    else:
                        collected[name][places] = tensor
        for module in dropping:
            module.training = True
        return Output(**collected)


class FromData(Algorithm):
    """An algorithm whose batches are rows of a data set, in the order of the settings' seed.

    data, held   what it learns from, and what its evaluations are made on
    """

    def __init__(self, settings: Any, world: World, policy: Policy, data: list[Any], held: list[Any]) -> None:
        super().__init__(policy, world, settings.tokens_per_pass)
        self.settings, self.data, self.held = settings, data, held
        self.order = Order(len(data), settings.batch_size, settings.seed)
        self.steps = settings.steps or self.order.steps(settings.epochs)

    def collate(self, indices: list[int]) -> Batch:
        """The batch of these rows of the data."""
        raise NotImplementedError

    def batches(self) -> Iterator[Batch]:
        while True:
            mine = self.order[self.position][self.world.rank :: self.world.size]
            self.position += 1
            yield self.collate(mine).to(self.world.device)
