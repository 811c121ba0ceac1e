"""What a process of a benchmark knows of itself (Linux). Nothing is imported: both sides of a comparison use it."""

from __future__ import annotations

import os
import time
from pathlib import Path


def seconds_since_start() -> float:
    """Since this process was started, imports included."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")


def peak_memory_mb() -> float:
    """Most resident memory of this process so far, in MB (10^6 bytes)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


class Marks:
    """When steps ended, and what else was going on in them.

    ends      seconds of the clock at the end of each step, the warm-up included
    started   seconds from the start of the process to the end of the first step
    sampling  seconds that sampling took in each step; none where nothing is sampled
    """

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.sampling: list[float] = []
        self.started = self.peak = self._sampled = 0.0

    def timed(self, function):  # type: ignore[no-untyped-def]
        """The same function, whose time counts as sampling."""

        def wrapped(*args, **kwargs):  # type: ignore[no-untyped-def]
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self._sampled += time.perf_counter() - start
            return result

        return wrapped

    def step(self) -> None:
        """A step has ended."""
        if not self.ends:
            self.started = seconds_since_start()
        self.ends.append(time.perf_counter())
        self.sampling.append(self._sampled)
        self._sampled = 0.0
        self.peak = peak_memory_mb()

    def report(self) -> dict[str, object]:
        """The first step is a warm-up: only its end counts, as the beginning of the second."""
        seconds = [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]
        sampling = self.sampling[1:] if any(self.sampling) else []
        return {"seconds": seconds, "sampling": sampling, "started": self.started, "peak_mb": self.peak}
