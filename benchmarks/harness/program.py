# SPDX-License-Identifier: Apache-2.0
"""A benchmark from its cases to its output."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from harness.check import Entry, MismatchError
from harness.contender import Case
from harness.machine import describe_machine
from harness.measure import Measurement
from harness.options import Options
from harness.report import Report, print_report, write_json
from harness.verdict import Verdict, print_verdicts
from harness.watch import watch

# May add lines or a breakdown to the report, from the entries of every case.
Complete = Callable[[Report, Sequence[list[Entry]]], None]


def run_benchmark(
    name: str,
    cases: Sequence[Case],
    options: Options,
    settings: dict[str, object],
    complete: Complete = lambda report, checked: None,
) -> int:
    """Checks, measures, prints and writes; returns the exit status.

    1 where results differ. 130 after Ctrl-C: what has been measured is printed, and no file
    written.
    """
    device, dtype = options.device, options.dtype
    machine = describe_machine(device)
    interrupted = False
    with watch() as watcher:
        measurement = Measurement(cases, options, watcher)
        try:
            measurement.run()
        except MismatchError as error:
            mismatch = error
        except KeyboardInterrupt:
            mismatch, interrupted = None, True
        else:
            mismatch = None
    if mismatch is not None:
        print(f"nothing was measured, results differ: {mismatch}", file=sys.stderr)
        return 1
    settings = {"dtype": str(dtype).removeprefix("torch."), "device": str(device)} | settings
    results = [r for r in measurement.results() if r.rows or not interrupted]
    report = Report(name, machine, settings, measurement.roof, results)
    if interrupted:
        if results:
            print_report(report)
        print("interrupted: the rows above are what has been measured", file=sys.stderr)
        return 130
    complete(report, measurement.checked)
    print_report(report)
    _say_what_it_took(measurement)
    if options.json:
        write_json(report, options.json)
    if options.plot:
        from harness.figure import draw

        draw(report, options.plot)
    return 0


def _say_what_it_took(measurement: Measurement) -> None:
    budget = measurement.options.effort.budget
    if budget is None:
        return
    took = f"{measurement.elapsed:.0f} s"
    if measurement.elapsed <= budget * 1.05:
        print(f"It took {took}; --thorough takes more samples of every row in both formats.")
    else:
        print(f"It took {took}: a budget of {budget:g} s is too small for the fewest samples.")


def report_verdicts(name: str, verdicts: Sequence[Verdict], file: Path | None) -> None:
    """What a benchmark that measures nothing says: a table on the terminal, numbers in a file."""
    print_verdicts(verdicts)
    if file:
        content = {
            "benchmark": name,
            "machine": describe_machine(torch.device("cpu")),
            "verdicts": [verdict.record() for verdict in verdicts],
        }
        file.write_text(json.dumps(content, indent=1) + "\n")
