# SPDX-License-Identifier: Apache-2.0
"""The measurement: check every case, then interleaved timing of each."""

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from harness.case import Case
from harness.check import Entry, check_rows
from harness.machine import Interference, Roofline, measure_roofline
from harness.meters import NEEDS_NO_WARM_UP, Clock, make_clock, make_launches

# Seconds of samples of a row that suffice under a budget.
_ENOUGH = 2.0


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


@dataclasses.dataclass(frozen=True)
class Options:
    device: torch.device
    dtype: torch.dtype
    effort: Effort
    json: Path | None = None
    plot: Path | None = None
    quick: bool = False


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


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender; ``timing`` and ``memory`` are None where it was not measured."""

    entry: Entry
    timing: Timing | None = None
    memory: int | None = None

    @property
    def name(self) -> str:
        return self.entry.contender.name

    def bytes_per_second(self) -> float:
        return self.entry.traffic / self.timing.median

    def roofline_share(self, roof: Roofline) -> float:
        """Shortest time for this row's own FLOPs and compulsory bytes, over its median."""
        return roof.seconds(self.entry.flops, self.entry.traffic) / self.timing.median


@dataclasses.dataclass(frozen=True)
class Result:
    """The rows of one case, in the order of its contenders.

    ``foreign_cores``: mean number of cores that other programs used during the rounds. ``launch``:
    how the GPU got the calls of all rows, by "graph" or, if ``uncaptured`` could not be captured in
    one, by "events"; None on the CPU and where nothing was timed.
    """

    case: Case
    rows: tuple[Row, ...]
    foreign_cores: float | None = None
    launch: str | None = None
    uncaptured: str = ""

    @property
    def reference(self) -> Row | None:
        """The row that ratios refer to: the first one that ran."""
        return next((row for row in self.rows if row.timing), None)

    def ratio(self, row: Row) -> float:
        """How many times as fast as the reference a row is, by medians."""
        return self.reference.timing.median / row.timing.median

    def best_rival(self, layout: torch.memory_format) -> Row | None:
        """The fastest row that is not ours on maps of this memory format."""
        contenders = ((row, row.entry.contender) for row in self.rows if row.timing)
        rows = [row for row, c in contenders if not c.ours and c.memory_format == layout]
        return min(rows, key=lambda row: row.timing.median, default=None)

    def lead(self, row: Row) -> float | None:
        """How many times as fast a row is as the best rival on maps of its own memory format."""
        best = self.best_rival(row.entry.contender.memory_format)
        return best and best.timing.median / row.timing.median

    def fastest(self, name: str) -> Row | None:
        """A contender's row in its faster memory format, None where neither ran."""
        rows = [row for row in self.rows if row.name == name and row.timing]
        return min(rows, key=lambda row: row.timing.median, default=None)

    @property
    def ours(self) -> str | None:
        return next((r.name for r in self.rows if r.entry.contender.ours), None)

    @property
    def rivals(self) -> list[str]:
        rows = [row for row in self.rows if not row.entry.contender.ours]
        return list(dict.fromkeys(row.name for row in rows))


class Measurement:
    """All cases of a program; what has been measured so far is there at any time.

    ``watch(measurement, text, case, entry)`` is called whenever something has been learnt of a
    case, by its number, and perhaps of one of its rows.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        options: Options,
        watch: Callable[["Measurement", str, int, Entry | None], None] = lambda *learnt: None,
    ) -> None:
        self.cases, self.options, self.watch = cases, options, watch
        self.started = time.perf_counter()
        self.checked: list[list[Entry]] = [[] for _ in cases]
        self.samples: dict[int, list[float]] = {}
        self.foreign_cores: list[float | None] = [None for _ in cases]
        self.launches: list[tuple[str | None, str]] = [(None, "") for _ in cases]
        self.roof: Roofline | None = None
        self.planned: list[list[int]] | None = None

    def run(self) -> None:
        """Checks every case, then times each; raises MismatchError before anything is timed."""
        device, dtype, effort = self.options.device, self.options.dtype, self.options.effort
        clock = make_clock(device)
        self.roof = measure_roofline(device, dtype, clock)
        for i, case in enumerate(self.cases):
            self.watch(self, f"comparing results at {case.title}", i, None)
            for entry in check_rows(case, device, dtype, effort.long):
                self.checked[i].append(entry)
                if entry.warm:
                    self.samples[id(entry)] = [entry.seconds]
                self.checked[i].sort(key=lambda e, c=case: c.contenders.index(e.contender))
                self.watch(self, "checked", i, entry)
        self.planned = self._plan()
        for i, case in enumerate(self.cases):
            self.watch(self, f"measuring {case.title}", i, None)
            self._time(i, clock)
        self.roof = self.roof.better(measure_roofline(device, dtype, clock))

    def _plan(self) -> list[list[int]]:
        """How often to time each row that runs, case by case."""
        # What the check has timed is a sample that is not to be taken again.
        effort = self.options.effort
        costs = [[entry.seconds for entry in self._running(i)] for i in range(len(self.cases))]
        if effort.budget is None:
            return [plan(each, effort.seconds, effort) for each in costs]
        left = effort.budget - self.elapsed
        left += sum(sum(samples) for samples in self.samples.values())
        counts = iter(plan([cost for each in costs for cost in each], left, effort))
        return [[next(counts) for _ in each] for each in costs]

    def _time(self, i: int, clock: Clock) -> None:
        running = self._running(i)

        def tick(number: int, seconds: float) -> None:
            entry = running[number]
            taken = self.samples.setdefault(id(entry), [])
            taken.append(seconds)
            last = len(taken) == self.planned[i][number]
            self.watch(self, "timed" if last else "", i, entry)

        calls, how, uncaptured = make_launches([e.runner for e in running], self.options.device)
        reason = "" if uncaptured is None else running[uncaptured].contender.label
        self.launches[i] = how, reason
        interference = Interference()
        missing = [
            count - len(self.samples.get(id(entry), ()))
            for entry, count in zip(running, self.planned[i], strict=True)
        ]
        try:
            interleave(calls, missing, clock, tick)
        finally:
            self.foreign_cores[i] = interference.cores()

    def _running(self, i: int) -> list[Entry]:
        return [entry for entry in self.checked[i] if entry.runner is not None]

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    @property
    def seconds_left(self) -> float | None:
        """Of the rounds that are still to come, by what each row took; None before the plan."""
        if self.planned is None:
            return None
        return sum(
            (count - len(self.samples.get(id(entry), ()))) * entry.seconds
            for i, counts in enumerate(self.planned)
            for entry, count in zip(self._running(i), counts, strict=True)
        )

    def results(self) -> list[Result]:
        return [self._result(i) for i in range(len(self.cases))]

    def _result(self, i: int) -> Result:
        def row(entry: Entry) -> Row:
            samples = self.samples.get(id(entry))
            return Row(entry, Timing(tuple(samples)) if samples else None, entry.memory)

        rows = tuple(map(row, self.checked[i]))
        return Result(self.cases[i], rows, self.foreign_cores[i], *self.launches[i])
