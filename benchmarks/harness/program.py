# SPDX-License-Identifier: Apache-2.0
"""A benchmark from its cases to its output."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from harness.check import Entry, MismatchError
from harness.contender import Case
from harness.machine import describe_machine
from harness.measure import Progress, check_all, measure_all
from harness.options import Options, require
from harness.report import Report, print_report, write_json
from harness.verdict import Verdict, print_verdicts

# May add lines or a breakdown to the report, from the entries of every case.
Complete = Callable[[Report, Sequence[list[Entry]]], None]


def run_benchmark(
    name: str,
    cases: Sequence[Case],
    options: Options,
    settings: dict[str, object],
    complete: Complete = lambda report, checked: None,
) -> int:
    """Checks, measures, prints and writes; returns the exit status, 1 where results differ."""
    device, dtype = options.device, options.dtype
    with _progress_bar() as progress:
        try:
            checked = check_all(cases, device, dtype, progress)
        except MismatchError as error:
            mismatch = error
        else:
            mismatch = None
            results, roof = measure_all(cases, checked, device, dtype, options.effort, progress)
    if mismatch is not None:
        print(f"nothing was measured, results differ: {mismatch}", file=sys.stderr)
        return 1
    settings = {"dtype": str(dtype).removeprefix("torch."), "device": str(device)} | settings
    report = Report(name, describe_machine(device), settings, roof, results)
    complete(report, checked)
    print_report(report)
    if options.json:
        write_json(report, options.json)
    if options.plot:
        from harness.figure import draw

        draw(report, options.plot)
    return 0


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


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar on the standard error stream that vanishes when the work is done."""
    rich_progress, rich_console = require("rich.progress"), require("rich.console")
    console = rich_console.Console(stderr=True)
    with rich_progress.Progress(console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)
