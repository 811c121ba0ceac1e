"""One process or many: the only file that imports accelerate, and only if a launcher started several processes.

A loss is already divided by the unit count of all ranks, so gradients are to be summed over ranks. DDP, FSDP2 and
DeepSpeed average them instead; `World.backward` makes up for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from plaudit.errors import PlauditError
from plaudit.sharding import whole

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
Number = TypeVar("Number", float, Tensor)
PRECISIONS = ("float32", "bfloat16")


@dataclass
class World:
    """The processes of a run. Every method that exchanges something must be called by all ranks, in the same order.

    rank, size  which process this is, of how many
    sharded     whether the model that `prepare` was given is spread over the ranks (FSDP2)
    lockstep    True if every forward and backward pass is an exchange too (FSDP2, DeepSpeed): all ranks must then run
                the same number of them. Under DDP the numbers may differ, but every rank must run the last,
                synchronised one.
    """

    device: torch.device
    precision: str = "float32"
    rank: int = 0
    size: int = 1
    accelerator: Accelerator | None = None
    engine: Any = None  # DeepSpeed's, which owns the optimizer step
    sharded: bool = False

    @classmethod
    def start(cls, precision: str = "float32", device: str | None = None) -> World:
        """Joins the processes of torchrun or `accelerate launch` if one of them started this one; else stays alone.

        precision: "float32", or "bfloat16" for autocast; the weights stay float32 either way.
        device: "cuda", "cuda:1", "mps" or "cpu"; None takes the first of these that the machine has.
        """
        if precision not in PRECISIONS:
            raise PlauditError(f"precision: {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}.")
        chosen = _device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and "ACCELERATE_MIXED_PRECISION" not in os.environ:
            return cls(chosen, precision)
        accelerator = _accelerator(cpu=chosen.type == "cpu")
        return cls(accelerator.device, precision, accelerator.process_index, accelerator.num_processes, accelerator)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sampling_dtype(self) -> torch.dtype | None:
        """What samplers compute in; None leaves the weights' own type."""
        return torch.bfloat16 if self.precision == "bfloat16" else None

    @property
    def shards(self) -> bool:
        """Whether `prepare` is going to spread the model, or has."""
        return self.accelerator is not None and bool(self.accelerator.is_fsdp2)

    @property
    def lockstep(self) -> bool:
        return self.sharded or self.engine is not None

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """The model on its device, wrapped or sharded as the launcher asks; train and clip what this returns.

        All ranks start from rank 0's weights, but under FSDP2 each from its part of its own, which must be the same.
        Call it once: DeepSpeed and FSDP2 take one model.
        """
        if self.accelerator is None:
            return model.to(self.device), optimizer
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if deepspeed is not None:
            _check_deepspeed(deepspeed)
        model, optimizer = self.accelerator.prepare(model, optimizer)
        # DDP would send its buffers round in evaluation too, where ranks may hold different numbers of batches.
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.broadcast_buffers = False
        self.engine = model if deepspeed is not None else None
        self.sharded = self.shards
        if self.sharded:
            # Else some weights stay gathered after a pass without gradients, and who reads them then meets both kinds.
            model.set_reshard_after_forward(True)
        return model, optimizer

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model that was given to `prepare`. Under FSDP2 its parameters stay sharded."""
        unwrapped: nn.Module = model if self.accelerator is None else self.accelerator.unwrap_model(model)
        return unwrapped

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 matrix products inside, if the run asked for them and the device is a CPU or CUDA."""
        if self.precision == "bfloat16" and self.device.type in ("cpu", "cuda"):
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def synchronised(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of one micro-batch: DDP exchanges gradients only in the last.

        Sharded models exchange in each, since keeping whole gradients until the last would undo the sharding.
        """
        if self.engine is not None:
            self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        if last or self.lockstep or self.accelerator is None:
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` (0-d, this rank's part of the global loss), to be summed over ranks."""
        loss = loss * self.size
        if self.engine is not None:
            self.engine.backward(loss)
        else:
            loss.backward()

    def clip(self, parameters: Iterable[nn.Parameter], norm: float | None) -> Tensor:
        """Total norm (0-d) of the summed gradient, before it's scaled down to `norm`; None only measures.

        Under DeepSpeed, which clips inside its own step, this is where the step happens, and the optimizer's does
        nothing. Whether a step whose norm isn't finite is left out is then DeepSpeed's own configuration.
        """
        if self.engine is not None:
            self.engine.optimizer.clip_grad = norm or 0.0
            self.engine.step()
            return torch.as_tensor(self.engine.get_global_grad_norm(), device=self.device)
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        total = nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
        if norm is not None:
            nn.utils.clip_grads_with_norm_(trained, norm, total)
        return whole(total)

    def sum(self, value: Number) -> Number:
        """The sum over ranks of a number or, element by element, of a tensor of the same shape everywhere."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def maximum(self, value: Number) -> Number:
        """The largest over ranks, as `sum`."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def stop_requested(self, flag: bool) -> bool:
        """True on every rank if any rank was asked to stop."""
        return self.maximum(float(flag)) > 0

    def gather(self, objects: list[T]) -> list[T]:
        """The lists of all ranks, joined in rank order, on every rank. Between the run's own processes only."""
        if self.size == 1:
            return list(objects)
        lists: list[Any] = [None] * self.size
        dist.all_gather_object(lists, objects)
        return [item for part in lists for item in part]

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leaves the other processes, once all have come this far: the last thing a run does that went well.

        A rank that failed must not call it, as nobody would come; its launcher ends the others.
        """
        if self.accelerator is not None:
            # Waiting together lets gloo's threads let go of the tensors of earlier exchanges. One that still holds some
            # when the interpreter ends aborts the process (pytorch/pytorch#179291).
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()

    def _reduce(self, value: Number, operation: Any) -> Number:
        if self.size == 1:
            return value.detach() if isinstance(value, Tensor) else value
        if not isinstance(value, Tensor):
            held = torch.tensor(value, dtype=torch.float64, device=self.device)
            dist.all_reduce(held, operation)
            return held.item()
        held = value.detach().to(self.device, copy=True)
        dist.all_reduce(held, operation)
        return held


def _device(asked: str | None) -> torch.device:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked is None:
        return torch.device(next(name for name, found in available.items() if found))
    if not available.get(asked.split(":")[0], False):
        found = ", ".join(name for name, there in available.items() if there)
        raise PlauditError(f"device: {asked!r} is not to be found on this machine; it has {found}.")
    return torch.device(asked)


def _accelerator(cpu: bool) -> Accelerator:
    from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType

    # A loss may leave parameters out (a reward model, its vocabulary head): DDP has to look for those.
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[handler])
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise PlauditError("accelerate config: FSDP version 1 is not supported; set fsdp_version: 2.")
    if accelerator.is_fsdp2:
        # Else all ranks but the first would read empty weights, and a reference is copied before the model is sharded.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return accelerator


def _check_deepspeed(plugin: Any) -> None:
    config = plugin.deepspeed_config
    if plugin.zero_stage == 0:
        raise PlauditError("DeepSpeed config: ZeRO stage 0 shards nothing; launch without DeepSpeed, or set 1 or 2.")
    if plugin.zero_stage == 3:
        raise PlauditError(
            "DeepSpeed config: plaudit cannot gather the weights that ZeRO stage 3 spreads; set stage 1 or 2, or take "
            "FSDP version 2, which spreads them too."
        )
    if config.get("gradient_accumulation_steps", "auto") not in ("auto", 1):
        raise PlauditError(
            "DeepSpeed config: gradient_accumulation_steps must be 1 or auto; plaudit cuts the batch by tokens itself."
        )
    # It only serves DeepSpeed's throughput log: micro-batches here have no fixed number of rows.
    config["train_micro_batch_size_per_gpu"] = 1
