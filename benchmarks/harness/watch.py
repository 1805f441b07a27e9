# SPDX-License-Identifier: Apache-2.0
"""What a user sees while a benchmark runs, on the standard error stream."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from harness.check import Entry
from harness.measure import Measurement
from harness.options import require
from harness.report import result_table
from harness.timing import percentile

Watcher = Callable[[Measurement, str, int, Entry | None], None]


@contextlib.contextmanager
def watch() -> Iterator[Watcher]:
    """On a terminal a table that grows while rows finish, and vanishes in the end; elsewhere a
    line for each row that was checked or timed."""
    console = require("rich.console").Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _print_line
        return
    with require("rich.live").Live(console=console, transient=True, auto_refresh=False) as live:

        def show(measurement: Measurement, text: str, case: int, entry: Entry | None) -> None:
            table = result_table(measurement.results()[case], measurement.roof, console)
            doing = text if entry is None else f"{text or 'timing'} {entry.contender.label}"
            line = require("rich.text").Text(f"{doing}  {_clock(measurement)}", no_wrap=True)
            live.update(require("rich.console").Group(table, line), refresh=True)

        yield show


def _print_line(measurement: Measurement, text: str, case: int, entry: Entry | None) -> None:
    if not text:
        return
    if entry is not None:
        text = f"{text} {entry.contender.label}: {_learnt(measurement, text, entry)}"
    print(f"{text}  {_clock(measurement)}", file=sys.stderr, flush=True)


def _learnt(measurement: Measurement, text: str, entry: Entry) -> str:
    if entry.left_out:
        return f"left out, {entry.left_out}"
    if entry.needs:
        return "no room in memory"
    if text == "timed":
        samples = measurement.samples[id(entry)]
        return f"{percentile(samples, 50) * 1e3:.4g} ms, median of {len(samples)}"
    error = "" if entry.error is None else f", error {entry.error:.1e} against {entry.against}"
    return f"{entry.seconds * 1e3:.4g} ms{error}"


def _clock(measurement: Measurement) -> str:
    """Seconds since the start, and those that are left once the check has told what rows cost."""
    left = measurement.seconds_left
    told = "" if left is None else f", about {left:.0f} s left"
    return f"[{measurement.elapsed:.0f} s{told}]"
