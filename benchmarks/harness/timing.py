# SPDX-License-Identifier: Apache-2.0
"""Time: samples taken in interleaved rounds, so that noise of the machine meets every row."""

import dataclasses
import random
import time
from collections.abc import Callable, Sequence

import torch

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
    """How long to measure a case: rounds until ``seconds`` are over, within these bounds."""

    seconds: float = 60.0
    fewest: int = 5
    most: int = 100


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
    clock: Clock,
    effort: Effort,
    tick: Callable[[float], None] = lambda share: None,
    seed: int = 0,
) -> list[Timing]:
    """Times the calls in rounds. Each round runs each of them once, in a new random order.

    ``tick`` learns which share of the measurement is done.
    """
    samples: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    shuffle = random.Random(seed).shuffle
    start = time.perf_counter()
    for done in range(effort.most):
        spent = (time.perf_counter() - start) / effort.seconds
        if done >= effort.fewest and spent >= 1:
            break
        tick(max(min(spent, done / effort.fewest), done / effort.most))
        shuffle(order)
        for i in order:
            samples[i].append(clock(calls[i]))
    tick(1.0)
    return [Timing(tuple(s)) for s in samples]
