"""Was the machine ours while we measured? Two jobs on two cores falsify each other many times over."""

from __future__ import annotations

import os
import time
from pathlib import Path


def _busy() -> float:
    """Seconds that all cores have worked since the machine started (Linux)."""
    user, nice, system, _, _, irq, soft = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Seconds that this process and the children it has waited for have worked."""
    return sum(os.times()[:4])


class Guard:
    """Measures how many cores other processes used inside a `with` block: `others`, beside `seconds`."""

    def __enter__(self) -> Guard:
        self._start = time.perf_counter(), _busy(), _own()
        return self

    def __exit__(self, *error: object) -> None:
        start, busy, own = self._start
        self.seconds = time.perf_counter() - start
        self.others = max(_busy() - busy - (_own() - own), 0.0) / self.seconds
