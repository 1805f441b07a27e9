# SPDX-License-Identifier: Apache-2.0
"""The shared harness of the benchmarks: a Case of Contenders in, a table, a file, a figure out."""

from harness.breakdown import time_by_operation
from harness.check import Entry, MismatchError, check_case, flop_counter, relative_error
from harness.contender import Case, Contender, Oracle, Paper, both_formats
from harness.memory import peak_memory
from harness.options import (
    Options,
    add_options,
    output_file,
    parse_shape,
    parse_size,
    read_options,
)
from harness.program import report_verdicts, run_benchmark
from harness.ratios import megabytes, milliseconds, ratio_verdicts
from harness.report import Report
from harness.timing import Effort
from harness.verdict import Verdict, markdown, print_verdicts

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
    "Verdict",
    "add_options",
    "both_formats",
    "check_case",
    "flop_counter",
    "markdown",
    "megabytes",
    "milliseconds",
    "output_file",
    "parse_shape",
    "parse_size",
    "peak_memory",
    "print_verdicts",
    "ratio_verdicts",
    "read_options",
    "relative_error",
    "report_verdicts",
    "run_benchmark",
    "time_by_operation",
]
