"""What this machine is: its processor, its memory, and how much of that is used."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")

_KEEPING = {"M_MMAP_MAX": 0, "M_TRIM_THRESHOLD": -1}
_HANDING_BACK = {"M_MMAP_MAX": 65536, "M_MMAP_THRESHOLD": 2**20}
_NUMBERS = {"M_TRIM_THRESHOLD": -1, "M_MMAP_THRESHOLD": -3, "M_MMAP_MAX": -4}  # as malloc.h has them
_usual: dict[str, int] = {}
"""What this process's allocator is told outside of `handing_back`: nothing until memory is kept."""


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
    _usual.update(_KEEPING)
    _allocate(**_usual)


@contextmanager
def handing_back() -> Iterator[None]:
    """Inside, large blocks go back to the system as soon as they are freed, whether memory is kept or not. Weights that
    are read in one type and then kept in another would leave holes behind that what is larger does not fit in."""
    _allocate(**_HANDING_BACK)
    try:
        yield
    finally:
        _allocate(**_usual)


def _allocate(**options: int) -> None:
    """Sets options of glibc's allocator; elsewhere there is nothing to set."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for name, value in options.items():
            mallopt(_NUMBERS[name], value)


def release() -> None:
    """Gives back what a finished stage held: Python's cycles, the graphics card's cache, the allocator's free pages."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def bounded(before: float) -> float:
    """For whoever does the same again and again while memory is kept: lasting blocks come to lie between large ones of
    ever other sizes, and so holes grow that nothing fits in. Once this process holds half as much again as `before`,
    in MB, what is free goes back.

    Returns what the next call is to be told: 0 at first, and after something was given back, since what is needed for
    the same again is known only once it has been done.
    """
    now = resident_mb()
    if _usual and before and now > 1.5 * before:
        release()
        return 0.0
    return before or now


def resident_mb() -> float:
    """Resident memory of this process at present, in MB (10^6 bytes); 0 where the system does not say (Linux does)."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() / 1e6 if pages.exists() else 0.0


def peak_memory_mb() -> float:
    """Most resident memory of this process since `forget_peak`, in MB (10^6 bytes)."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def processor(proc: Path = Path("/proc")) -> str:
    """The name of this machine's processor, with its family and model where there are any: virtual machines give the
    same name to processors of very different speed."""
    known: dict[str, str] = {}
    for line in _lines(proc / "cpuinfo"):
        name, _, value = line.partition(":")
        known.setdefault(name.strip(), value.strip())
    if "model name" not in known:
        return platform.processor() or platform.machine()
    numbers = [f"{name.removeprefix('cpu ')} {known[name]}" for name in ("cpu family", "model") if name in known]
    return known["model name"] + f" ({', '.join(numbers)})" * bool(numbers)


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process can still take, where the system says so (Linux): what the machine has left, or what the
    groups that the process is in (containers, batch systems) have left of their limits, whichever is less."""
    if not (proc / "meminfo").exists():
        return None
    found = [int(line.split()[1]) * 1024 for line in _lines(proc / "meminfo") if line.startswith("MemAvailable:")]
    for entry in _lines(proc / "self" / "cgroup"):
        number, controllers, name = entry.split(":", 2)
        if number == "0":
            root, limit, used = groups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Inside a container the name may lead nowhere, and the group's own files lie at the root.
        within = root / name.lstrip("/")
        for folder in (within, *within.parents):
            if not folder.is_relative_to(root):
                break
            limits, taken = ("".join(_lines(folder / file)) for file in (limit, used))
            if limits.isdigit() and taken.isdigit():
                found.append(int(limits) - int(taken) + _reclaimable(folder))
    return max(min(found), 0) if found else None


def _reclaimable(group: Path) -> int:
    """Bytes of files that a group keeps in memory only as long as nobody needs the room."""
    rows = (line.split() for line in _lines(group / "memory.stat"))
    return next((int(value) for name, value in rows if name in ("inactive_file", "total_inactive_file")), 0)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


class Guard:
    """Was the machine ours while we measured? Two jobs on the same cores falsify each other many times over.

    Inside a `with` block: `seconds`, and `others`, the cores that other processes used; 0 where the system does not
    say. Children count as ours once they have been waited for.
    """

    def __enter__(self) -> Guard:
        self._start = time.perf_counter(), _busy(), sum(os.times()[:4])
        return self

    def __exit__(self, *error: object) -> None:
        start, busy, own = self._start
        self.seconds = time.perf_counter() - start
        self.others = max(_busy() - busy - (sum(os.times()[:4]) - own), 0.0) / self.seconds


def _busy() -> float:
    """Seconds that all cores have worked since the machine started (Linux)."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _, _, irq, soft = map(int, path.read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
