"""What a reference said of a data set, kept in the user's cache under a hash of the model and of the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from plaudit.errors import PlauditError
from plaudit.policy import Policy
from plaudit.run import write_atomically
from plaudit.sources import cache_folder
from plaudit.templates import Encoded


def file_of(policy: Policy, precision: str, data: Sequence[Sequence[Encoded]]) -> Path:
    """Where the log-probabilities belong that `policy`, computing in `precision`, gives to the data.

    The name is a hash of the weights (those of an adapter, which the reference does without, left out), of the model's
    config, of the precision, and of all tokens and actions.
    """
    config: Any = policy.config
    changing = ("_name_or_path", "transformers_version")
    known = {name: value for name, value in config.to_dict().items() if name not in changing}
    whole = hashlib.sha256(json.dumps([known, precision, policy.temperature], sort_keys=True, default=str).encode())
    for name, parameter in policy.backbone.named_parameters():
        if policy.adapter is None or not parameter.requires_grad:
            whole.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            whole.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for item in data:
        rows = [[row.prompt, row.completion, [int(acting) for acting in row.actions]] for row in item]
        whole.update(json.dumps(rows).encode())
    return cache_folder() / "reference" / f"{whole.hexdigest()}.safetensors"


def read(path: Path) -> list[Tensor] | None:
    """What `write` kept: one tensor for each item, or None if nothing is there."""
    if not path.is_file():
        return None
    try:
        kept = load_file(path)
    except SafetensorError:  # damaged: it is computed and written again
        return None
    return list(torch.split(kept["logprobs"], kept["lengths"].tolist()))


def write(path: Path, logprobs: Sequence[Tensor]) -> None:
    """Keeps one 1-D tensor for each item. Raises PlauditError if the cache can't be written to."""
    lengths = torch.tensor([len(one) for one in logprobs])
    try:
        write_atomically(path, save({"logprobs": torch.cat(list(logprobs)), "lengths": lengths}))
    except OSError as error:
        raise PlauditError(
            f"precompute_reference: {path.parent} can't be written to ({error.strerror}): set PLAUDIT_CACHE to another "
            "folder, or leave precompute_reference out."
        ) from error
