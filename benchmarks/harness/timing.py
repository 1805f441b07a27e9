# SPDX-License-Identifier: Apache-2.0
"""Time: samples taken in interleaved rounds, so that noise of the machine meets every row."""

import dataclasses
import random
import time
from collections.abc import Callable, Sequence

import torch

# Seconds of a call beside which a first call's own costs do not count: the check times it as well.
NEEDS_NO_WARM_UP = 1.0
# Seconds of samples of a row that suffice under a budget.
_ENOUGH = 2.0

Clock = Callable[[Callable[[], object]], float]


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between the two nearest samples."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * q / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return percentile(self.samples, 50)

    @property
    def p20(self) -> float:
        return percentile(self.samples, 20)

    @property
    def p80(self) -> float:
        return percentile(self.samples, 80)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How often each row is timed: as often as the time suffices for, from ``fewest`` to ``most``.

    ``seconds``: time for each case; ``budget``, where it is given: for the whole program instead.
    Then a row is timed ``fewest`` times or for two seconds, and twice at the least; long calls run
    in their faster memory format alone where the case has a probe, and so does what is compiled.
    """

    seconds: float = 60.0
    fewest: int = 5
    most: int = 100
    budget: float | None = None

    @property
    def long(self) -> float:
        """Seconds from which on a call is long."""
        return float("inf") if self.budget is None else NEEDS_NO_WARM_UP

    def least(self, cost: float) -> int:
        """How often a call of ``cost`` seconds is timed at the least."""
        if self.budget is None:
            return self.fewest
        return min(max(2, int(_ENOUGH / cost)), self.fewest)


def plan(costs: Sequence[float], seconds: float, effort: Effort) -> list[int]:
    """How often to time calls that take ``costs`` seconds each, in ``seconds`` altogether.

    All calls get the same share of the time, within the bounds of ``effort``.
    """

    def counts(share: float) -> list[int]:
        return [min(max(int(share / cost), effort.least(cost)), effort.most) for cost in costs]

    def fits(share: float) -> bool:
        return sum(n * cost for n, cost in zip(counts(share), costs, strict=True)) <= seconds

    low, high = 0.0, effort.most * max(costs, default=0.0)
    if fits(high):
        return counts(high)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return counts(low)


def make_clock(device: torch.device) -> Clock:
    """A function that runs a call once and returns its seconds."""
    return _CudaClock(device) if device.type == "cuda" else _cpu_clock


def _cpu_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result
    return seconds


class _CudaClock:
    """Time between two events on the stream, after the L2 cache has been overwritten."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def __call__(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        self.start.record()
        result = call()
        self.end.record()
        self.end.synchronize()
        del result
        return self.start.elapsed_time(self.end) / 1e3


def interleave(
    calls: Sequence[Callable[[], object]],
    counts: Sequence[int],
    clock: Clock,
    tick: Callable[[int, float], None],
    seed: int = 0,
) -> None:
    """Times each call so many times, in rounds; each round has a new random order.

    A call that is timed less often takes part in rounds that lie evenly among all of them. ``tick``
    learns each sample: the number of the call, and its seconds.
    """
    rounds: list[list[int]] = [[] for _ in range(max(counts, default=0))]
    for i, count in enumerate(counts):
        for k in range(count):
            rounds[(2 * k + 1) * len(rounds) // (2 * count)].append(i)
    shuffle = random.Random(seed).shuffle
    for members in rounds:
        shuffle(members)
        for i in members:
            tick(i, clock(calls[i]))
