# SPDX-License-Identifier: Apache-2.0
"""How much of the processor other programs took while a measurement ran."""

import os
import time
from pathlib import Path

# Threads of a parallel region wait for each other: half a core lost can double a time.
NOTEWORTHY_CORES = 0.05


class Interference:
    """``cores()``: mean number of cores that other programs kept busy since the start.

    None where the system does not tell (it needs Linux' /proc/stat).
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.busy = _busy_seconds()

    def cores(self) -> float | None:
        busy = _busy_seconds()
        if self.busy is None or busy is None:
            return None
        return max(0.0, (busy - self.busy) / (time.perf_counter() - self.start))


def _busy_seconds() -> float | None:
    """Processor time of all programs, less that of this one and its finished children."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq = (int(word) for word in first[:7])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks - sum(os.times()[:4])
