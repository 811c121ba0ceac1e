"""Checkpoints that are either whole or absent: safetensors and JSON, a manifest of sizes and SHA-256, never pickle.

    folder/step-000120/tensors.safetensors   every tensor, each storage once
                       state.json            everything else
                       manifest.json         size and SHA-256 of both, the step, and a digest of itself

A save goes into a hidden folder beside its final name, is flushed file by file, and becomes visible by one rename;
older checkpoints are removed only when that rename is on the disk. So whatever kills the process, or the machine,
some complete checkpoint can be found again. One process writes to a folder at a time; any number may read.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from plaudit.errors import PlauditError

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
LARGEST_HEADER = 2**25  # bytes; a model of 100,000 tensors with its optimizer needs about half of it
VISIBLE = re.compile(r"step-(\d+)")
SET_ASIDE = re.compile(r"\.step-(\d+)\.old")
PLAIN = (bool, int, float, str)
TAG = "$"  # marks what JSON alone can't say: {"$": "tensor", ...}


# Every change to the disk goes through the next five functions and os.mkdir: the tests kill a save at each of them.


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path)


def _flush(path: Path) -> None:
    """Waits until the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(source: Path, target: Path) -> None:
    source.rename(target)


def _delete(folder: Path) -> None:
    shutil.rmtree(folder)


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int = 1,
    best: int | None = None,
) -> Path:
    """Writes `folder`/step-000120 durably, then removes old checkpoints.

    Tensors may be of any dense dtype, on any device, not contiguous, and share memory: an exact alias (tied weights)
    is stored once and is one tensor again after `load`; other views are stored in full.
    `keep` checkpoints stay, counted up to and including `step`; later ones (of a run since rewound) and `best` are
    never removed. A checkpoint of the same step is replaced.

    Raises PlauditError, naming the path, if the disk refuses; what was there before is then still there.
    """
    if keep < 1:
        raise PlauditError(f"{folder}: keep = {keep} would remove the checkpoint just written; it must be at least 1.")
    final = named(folder, step)
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise PlauditError(f"{final} is not a folder, so no checkpoint can be written there; move it away.")
    temporary = folder / f".{final.name}.tmp-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        os.mkdir(temporary)
        _fill(temporary, step, tensors, state)
        _publish(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise PlauditError(
            f"{final}: the checkpoint could not be written ({error}); earlier ones are untouched. "
            "Free space there or choose another folder, then resume."
        ) from error
    try:
        _retire(folder, step, keep, best)
    except OSError as error:
        raise PlauditError(
            f"{error.filename or folder}: checkpoint {final.name} is safe, but an older one could not be removed "
            f"({error}); correct the rights of the folder or remove it by hand."
        ) from error
    return final


def named(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:06d}"


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, or None, and one sentence for each newer one that had to be skipped.

    Reads every byte of the checkpoints it judges and changes nothing.
    """
    skipped: list[str] = []
    for _, path in sorted(_checkpoints(folder), reverse=True):
        try:
            _verify(path)
        except PlauditError as error:
            skipped.append(f"{error} This checkpoint is skipped.")
        else:
            return path, skipped
    return None, skipped


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the state of a checkpoint.

    Raises PlauditError, naming the file, if one is missing, damaged, swapped, a link, or of another kind.
    """
    _verify(path)
    try:
        tensors = load_file(path / TENSORS)
        document = json.loads((path / STATE).read_bytes())
        aliases, state = dict(document["aliases"]), dict(document["state"])
        tensors |= {name: tensors[target] for name, target in aliases.items()}
    except (SafetensorError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise PlauditError(f"{path}: the files are whole, but plaudit did not write them ({error!r}).") from error
    return tensors, state


def pack(tree: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nested dicts, lists and tuples of tensors and plain values -> (tensors by name, JSON) for `save`.

    `unpack` gives the tree back exactly: floats bit for bit (NaN payloads apart), keys that are numbers, tuples.
    Dicts of any class come back as plain dicts. Tensors are not copied.

    Raises TypeError, naming the place, for a value of any other kind.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(tree, "", tensors)


def unpack(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    """The tree given to `pack`."""
    tree: dict[str, Any] = _decode(state, tensors)
    return tree


def random_states() -> dict[str, Any]:
    """The states of python's, numpy's and torch's global generators, as a tree for `pack`."""
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    numpy_state["state"] = numpy_state["state"] | {"key": numpy_state["state"]["key"].tolist()}
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(tree: Mapping[str, Any]) -> None:
    """Puts the generators back; GPUs that the saved run did not have keep their state."""
    random.setstate(tree["python"])
    inner = tree["numpy"]["state"]
    np.random.set_state(tree["numpy"] | {"state": inner | {"key": np.array(inner["key"], dtype=np.uint32)}})
    torch.set_rng_state(tree["torch"])
    for device, state in zip(range(torch.cuda.device_count()), tree["cuda"], strict=False):
        torch.cuda.set_rng_state(state, device)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of what looks like a checkpoint, in no order.

    One set aside by an interrupted replacement counts while its own name is free: it is then the only copy.
    """
    if not folder.is_dir():
        return []
    visible = [(int(m[1]), path) for path in folder.iterdir() if (m := VISIBLE.fullmatch(path.name))]
    names = {path.name for _, path in visible}
    aside = [(int(m[1]), path) for path in folder.iterdir() if (m := SET_ASIDE.fullmatch(path.name))]
    return visible + [(step, path) for step, path in aside if f"step-{step:06d}" not in names]


def _clean(folder: Path) -> None:
    """Removes what interrupted saves left; one that stopped in the middle of a replacement is undone."""
    for path in list(folder.glob(".step-*.tmp-*")):
        _delete(path)
    for path in list(folder.glob(".step-*.old")):
        own = path.with_name(path.name.removeprefix(".").removesuffix(".old"))
        if own.exists():
            _delete(path)
        else:
            _move(path, own)


def _fill(temporary: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    stored, aliases = _separate(tensors)
    _write_tensors(temporary / TENSORS, stored)
    _write(temporary / STATE, json.dumps({"aliases": aliases, "state": state}).encode())
    entries = {}
    for name in (TENSORS, STATE):
        _flush(temporary / name)
        entries[name] = {"size": (temporary / name).stat().st_size, "sha256": _digest(temporary / name)}
    _write(temporary / MANIFEST, _manifest(step, entries))
    _flush(temporary / MANIFEST)
    _flush(temporary)


def _publish(temporary: Path, final: Path) -> None:
    """Gives the finished folder its name. A folder can't be renamed over another, so an old one first steps aside."""
    aside = final.with_name(f".{final.name}.old")
    replacing = final.exists()
    if replacing:
        _move(final, aside)
    try:
        _move(temporary, final)
    except OSError:
        if replacing:
            _move(aside, final)
        raise
    _flush(final.parent)
    if replacing:
        _delete(aside)


def _retire(folder: Path, step: int, keep: int, best: int | None) -> None:
    past = sorted((found, path) for found, path in _checkpoints(folder) if found <= step)
    for found, path in past[:-keep]:
        if found != best:
            # Hidden first, so that a removal cut short isn't taken for a damaged checkpoint.
            doomed = folder / f".{path.name}.tmp-{os.getpid()}"
            _move(path, doomed)
            _delete(doomed)


def _separate(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to store, contiguous and with memory of its own, and the exact aliases (name -> stored name)."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple[Any, ...], str] = {}
    memories: set[int] = set()
    for name, tensor in tensors.items():
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{name} is one process's part of a sharded tensor; gather it before saving")
        tensor = tensor.detach()
        memory = tensor.untyped_storage().data_ptr()
        view = (tensor.device, memory, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in owners:
            aliases[name] = owners[view]
            continue
        owners[view] = name
        flat = tensor.cpu().contiguous()
        stored[name] = flat.clone() if flat.untyped_storage().data_ptr() in memories else flat
        memories.add(stored[name].untyped_storage().data_ptr())
    return stored, aliases


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(step: int, entries: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The only bytes that a manifest with this content may have, its own digest among them."""
    content = {"step": step, "files": {name: dict(entries[name]) for name in sorted(entries)}}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=1).encode()


def _verify(path: Path) -> None:
    """Raises PlauditError, naming the file, unless the folder holds exactly what one save wrote there."""
    if not path.is_dir():
        raise PlauditError(f"{path} is not a checkpoint folder.")
    for entry in sorted(path.iterdir()):
        if entry.is_symlink() or not stat.S_ISREG(entry.lstat().st_mode):
            raise PlauditError(f"{entry} is not a plain file; a checkpoint has no links or folders in it.")
        # Hidden files (a desktop's .DS_Store) are harmless: nothing here opens them.
        if entry.name not in (TENSORS, STATE, MANIFEST) and not entry.name.startswith("."):
            raise PlauditError(
                f"{entry} doesn't belong in a checkpoint, which holds safetensors and JSON only; remove that file."
            )
    for name, entry in _entries(path).items():
        file = path / name
        if not file.exists():
            raise PlauditError(f"{file} is missing.")
        if file.stat().st_size != entry["size"]:
            raise PlauditError(f"{file} has {file.stat().st_size:,} bytes; its manifest says {entry['size']:,}.")
        if _digest(file) != entry["sha256"]:
            raise PlauditError(
                f"{file} is damaged, or belongs to another checkpoint: its SHA-256 is not the manifest's."
            )
    _verify_header(path / TENSORS)


def _entries(path: Path) -> dict[str, Any]:
    """File name -> size and SHA-256, from a manifest that is itself sound and of this step."""
    file = path / MANIFEST
    if not file.exists():
        raise PlauditError(f"{file} is missing: the save was not finished, or the file was deleted.")
    data = file.read_bytes()
    try:
        content = json.loads(data)
        step, entries = content["step"], content["files"]
        sound = data == _manifest(step, entries) and set(entries) == {TENSORS, STATE}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise PlauditError(f"{file} is damaged.")
    named = VISIBLE.fullmatch(path.name)
    if named and int(named[1]) != step:
        raise PlauditError(f"{file} belongs to step {step}, not to {path.name}.")
    return dict(entries)


def _verify_header(file: Path) -> None:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    if length > LARGEST_HEADER:
        raise PlauditError(f"{file} announces a header of {length:,} bytes; plaudit reads at most {LARGEST_HEADER:,}.")


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = place
        while name in tensors:  # {"a/b": x, "a": {"b": y}}
            name += "'"
        tensors[name] = value
        return {TAG: "tensor", "name": name}
    if isinstance(value, Mapping):
        items = [(key, _encode(item, f"{place}/{key}".lstrip("/"), tensors)) for key, item in value.items()]
        if all(type(key) is str for key in value) and TAG not in value:
            return dict(items)
        for key in value:
            if key is not None and type(key) not in PLAIN:
                raise TypeError(f"{place}: the key {key!r} can't be stored in a checkpoint")
        return {TAG: "dict", "items": items}
    if type(value) in (list, tuple):
        encoded = [_encode(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
        return encoded if type(value) is list else {TAG: "tuple", "items": encoded}
    if value is None or type(value) in PLAIN:
        return value
    raise TypeError(f"{place}: a {type(value).__name__} can't be stored in a checkpoint")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, Mapping):
        return value
    kind = value.get(TAG)
    if kind == "tensor":
        return tensors[value["name"]]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in value["items"])
    items = value["items"] if kind == "dict" else value.items()
    return {key: _decode(item, tensors) for key, item in items}
