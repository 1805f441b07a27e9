# SPDX-License-Identifier: Apache-2.0
"""The shared harness of the benchmarks: a Case of Contenders in, a table, a file, a figure out.

``case``: what is compared. ``check``: equal results. ``meters``: time and memory of a call.
``machine``: what a measurement was made with, and what disturbed it. ``measure``: all rows of all
cases. ``report``: tables, JSON and figures. ``verdict``: a paper's figures beside ours.
``program``: the command line.
"""

from harness.case import Case, Contender, Oracle, Paper, Rival, both_formats, compare
from harness.check import Entry, MismatchError, check_case, flop_counter, relative_error
from harness.measure import Effort, Options, percentile
from harness.meters import peak_memory, time_by_operation
from harness.program import (
    add_options,
    output_file,
    parse_shape,
    parse_size,
    read_options,
    run_benchmark,
    run_counts,
)
from harness.report import Report, print_verdicts
from harness.verdict import Verdict, markdown, megabytes, milliseconds, ratio_verdicts

__all__ = [
    "Case",
    "Contender",
    "Effort",
    "Entry",
    "MismatchError",
    "Options",
    "Oracle",
    "Paper",
    "Report",
    "Rival",
    "Verdict",
    "add_options",
    "both_formats",
    "check_case",
    "compare",
    "flop_counter",
    "markdown",
    "megabytes",
    "milliseconds",
    "output_file",
    "parse_shape",
    "parse_size",
    "peak_memory",
    "percentile",
    "print_verdicts",
    "ratio_verdicts",
    "read_options",
    "relative_error",
    "run_benchmark",
    "run_counts",
    "time_by_operation",
]
