# SPDX-License-Identifier: Apache-2.0
"""The measurement: check every case, then memory and interleaved timing of each."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from harness.check import Entry, check_case
from harness.contender import Case
from harness.interference import Interference
from harness.memory import peak_memory
from harness.roofline import Roofline, measure_roofline
from harness.timing import Effort, Timing, interleave, make_clock

# Called with what is being done and the share of it that is done.
Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured contender; ``timing`` and ``memory`` are None where it does not fit."""

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

    ``foreign_cores``: mean number of cores that other programs used during the rounds.
    """

    case: Case
    rows: tuple[Row, ...]
    foreign_cores: float | None = None

    @property
    def reference(self) -> Row | None:
        """The row that ratios refer to: the first one that ran."""
        return next((row for row in self.rows if row.timing), None)

    def ratio(self, row: Row) -> float:
        """How many times as fast as the reference a row is, by medians."""
        return self.reference.timing.median / row.timing.median

    def fastest(self, name: str) -> Row | None:
        """A contender's row in its faster memory format, None where neither fits."""
        rows = [row for row in self.rows if row.name == name and row.timing]
        return min(rows, key=lambda row: row.timing.median, default=None)

    @property
    def ours(self) -> str | None:
        return next((r.name for r in self.rows if r.entry.contender.ours), None)

    @property
    def rivals(self) -> list[str]:
        rows = [row for row in self.rows if not row.entry.contender.ours]
        return list(dict.fromkeys(row.name for row in rows))


def check_all(
    cases: Sequence[Case], device: torch.device, dtype: torch.dtype, progress: Progress
) -> list[list[Entry]]:
    """The entries of every case; raises MismatchError before anything has been timed."""
    checked = []
    for i, case in enumerate(cases):
        progress(f"comparing results at {case.title}", i / len(cases))
        checked.append(check_case(case, device, dtype))
    return checked


def measure_all(
    cases: Sequence[Case],
    checked: Sequence[list[Entry]],
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    progress: Progress,
) -> tuple[list[Result], Roofline]:
    """Memory and time of every checked case, and the roofline measured before and after them."""
    clock = make_clock(device)
    roof = measure_roofline(device, dtype, clock)
    results = []
    for case, entries in zip(cases, checked, strict=True):

        def tick(share: float, title: str = case.title) -> None:
            progress(f"measuring {title}", share)

        tick(0.0)
        results.append(_measure_case(case, entries, device, effort, tick))
    return results, roof.better(measure_roofline(device, dtype, clock))


def _measure_case(
    case: Case,
    entries: list[Entry],
    device: torch.device,
    effort: Effort,
    tick: Callable[[float], None],
) -> Result:
    running = [entry for entry in entries if entry.runner is not None]
    # The run under the profiler is also the last warm-up: the check was the first.
    memory = {id(entry): peak_memory(entry.runner, device) for entry in running}
    interference = Interference()
    timings = interleave([entry.runner for entry in running], make_clock(device), effort, tick)
    foreign_cores = interference.cores()
    timed = {id(entry): timing for entry, timing in zip(running, timings, strict=True)}
    rows = tuple(Row(entry, timed.get(id(entry)), memory.get(id(entry))) for entry in entries)
    return Result(case, rows, foreign_cores)
