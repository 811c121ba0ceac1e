"""What this machine is: memory used, number types it computes in."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")


def processes() -> tuple[int, int]:
    """(which process this is, of how many), as the launcher says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def forget_peak() -> None:
    """Starts the peak memory count anew, where the system can (Linux)."""
    with suppress(OSError):  # elsewhere the file is missing, and some sandboxes let nobody write to it
        Path("/proc/self/clear_refs").write_text("5")


def keep_memory() -> None:
    """From now on this process's allocator (glibc) keeps what was freed instead of handing it back: the system clears
    each page that it gives out, and a training step would have gigabytes cleared again and again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX: no mappings; M_TRIM_THRESHOLD: nothing is given back
            mallopt(option, value)


def release() -> None:
    """Gives back what a finished stage held: Python's cycles, the graphics card's cache, the allocator's free pages."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_memory_mb() -> float:
    """Most resident memory of this process since `forget_peak`, in MB (10^6 bytes)."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def precision(asked: str, device: str | None) -> str:
    """`auto` -> bfloat16 where the machine multiplies in it, else float32."""
    import torch

    if asked != "auto":
        return asked
    kind = device and device.partition(":")[0]
    if kind in (None, "cuda") and torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if kind in (None, "cpu") and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bfloat16"
    return "float32"
