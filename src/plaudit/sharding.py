"""Weights that are spread over processes (PyTorch's `fully_shard`): made whole to be read, and cut to be written.

Whatever gathers here is an exchange, so all processes must call it, in the same order. What is not spread is returned
as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor holds one process's part only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor."""
    spread: Any = tensor
    found: Tensor = spread.full_tensor() if is_sharded(tensor) else tensor
    return found


def part_like(tensor: Tensor, model: Tensor) -> Tensor:
    """What this process keeps of a whole `tensor` that is spread as `model` is: no exchange, each cuts its own."""
    if not is_sharded(model) or tensor.shape != model.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    spread: Any = model
    return distribute_tensor(tensor.to(model.device), spread.device_mesh, spread.placements, src_data_rank=None)


def gathered(tree: Any, keep: bool) -> Any:
    """Nested dicts and lists with whole tensors, on the CPU, in place of spread ones; None in place of these where
    they are not to be kept."""
    if isinstance(tree, Mapping):
        return {key: gathered(value, keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [gathered(value, keep) for value in tree]
    if not is_sharded(tree):
        return tree
    found = whole(tree)
    return found.cpu() if keep else None


def spread_moments(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state of whole tensors, each spread as the parameter that it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        place: {name: part_like(value, parameters[place]) for name, value in each.items()}
        for place, each in state["state"].items()
    }
    return {**state, "state": moments}


def assembled(module: M, copies: dict[int, Any] | None = None) -> M:
    """A copy of a module with whole parameters, of the class that it had before it was sharded, for this process alone
    to compute with, copy and save; the module itself if none of its parameters is spread. `copies` remembers what has
    been copied, so that what is shared stays shared."""
    if not any(map(is_sharded, module.parameters())):
        return module
    copied: M = _copied(module, {} if copies is None else copies)
    return copied


def _copied(module: Any, copies: dict[int, Any]) -> Any:
    if id(module) in copies:
        return copies[id(module)]
    from torch.distributed.fsdp import FSDPModule

    kind = type(module)
    sharded = isinstance(module, FSDPModule)
    # `fully_shard` makes a class of two: its own, and that of the module.
    copy: Any = object.__new__(kind.__bases__[1] if sharded else kind)
    copies[id(module)] = copy
    # PyTorch's notes on a sharded module stay with it, as does a forward that somebody wrapped, which is bound to it.
    own = {
        name: _rebound(value, copies)
        for name, value in module.__dict__.items()
        if name != "forward" and "__composable_api" not in name
    }
    # The hooks of a sharded module gather it.
    hooks = {
        name: type(value)() if sharded else value.copy()
        for name, value in own.items()
        if "_hooks" in name and isinstance(value, dict)
    }
    copy.__dict__.update(own)
    copy.__dict__.update(
        hooks,
        _parameters={name: _parameter(p, copies) for name, p in module._parameters.items()},
        _buffers=dict(module._buffers),
        _modules={name: m if m is None else _copied(m, copies) for name, m in module._modules.items()},
    )
    return copy


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """A method of another module that a module keeps, as peft's do, is one of that module's copy."""
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _copied(value.__self__, copies))
    return value


def _parameter(parameter: nn.Parameter | None, copies: dict[int, Any]) -> nn.Parameter | None:
    if parameter is None or not is_sharded(parameter):
        return parameter
    if id(parameter) not in copies:
        copies[id(parameter)] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
    found: nn.Parameter = copies[id(parameter)]
    return found
