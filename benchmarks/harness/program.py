# SPDX-License-Identifier: Apache-2.0
"""A benchmark as a program: from its flags to its output."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from harness.case import Case
from harness.check import Entry, MismatchError
from harness.machine import describe_machine
from harness.measure import Effort, Measurement, Options, percentile
from harness.report import (
    Report,
    draw,
    print_report,
    print_verdicts,
    require,
    result_table,
    write_json,
)
from harness.verdict import Verdict

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# With a budget, so many samples are enough of any row.
_MOST = 20

# May add lines or a breakdown to the report, from the entries of every case.
Complete = Callable[[Report, Sequence[list[Entry]]], None]
Watcher = Callable[[Measurement, str, int, Entry | None], None]


def add_options(parser: argparse.ArgumentParser, budget: float | None = None) -> None:
    """``budget``: seconds for the whole program by default, where it has a time to keep."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=default, help="cpu or cuda[:index] (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=_count, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--rounds", type=_count, default=100, help="at most so many samples per row"
    )
    parser.add_argument("--seconds", type=_duration, help="time to spend on the rounds of a case")
    if budget is not None:
        which = parser.add_mutually_exclusive_group()
        which.add_argument(
            "--budget",
            type=_duration,
            metavar="SECONDS",
            help=f"time for the whole program (default: {budget:g})",
        )
        which.add_argument(
            "--thorough",
            action="store_true",
            help="time every row in both memory formats at least five times, however long it takes",
        )
    parser.set_defaults(default_budget=budget)
    parser.add_argument("--quick", action="store_true", help="a small case, within a minute")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every number")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="draw time and memory")


def read_options(arguments: argparse.Namespace) -> Options:
    """The common options; sets torch's threads, and float32 products to full precision."""
    require("rich")
    if arguments.plot:
        require("matplotlib")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(f"--device {arguments.device}: torch sees no CUDA device")
        torch.cuda.set_device(device)
    effort = _read_effort(arguments)
    dtype = DTYPES[arguments.dtype]
    return Options(device, dtype, effort, arguments.json, arguments.plot, arguments.quick)


def _read_effort(arguments: argparse.Namespace) -> Effort:
    seconds = arguments.seconds or (4.0 if arguments.quick else 60.0)
    budget = getattr(arguments, "budget", None)
    if budget is None and not (
        arguments.quick or arguments.seconds or getattr(arguments, "thorough", False)
    ):
        budget = arguments.default_budget
    fewest = min(arguments.rounds, 3 if arguments.quick else 5)
    if budget is None:
        return Effort(seconds, fewest, arguments.rounds)
    return Effort(seconds, fewest, min(arguments.rounds, _MOST), budget)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _duration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def output_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def parse_size(text: str) -> tuple[int, int]:
    """HxW, such as 96x96."""
    return _parse_extents(text, "HxW, such as 96x96", 2)


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """BxCxHxW, such as 1x256x96x96."""
    return _parse_extents(text, "BxCxHxW, such as 1x256x96x96", 4)


def _parse_extents(text: str, form: str, count: int) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) != count or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"must be {form}, got {text!r}")
    return tuple(int(p) for p in parts)


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
    mismatch, interrupted = None, False
    with watch() as watcher:
        measurement = Measurement(cases, options, watcher)
        try:
            measurement.run()
        except MismatchError as error:
            mismatch = error
        except KeyboardInterrupt:
            interrupted = True
    if mismatch is not None:
        print(f"nothing was measured, results differ: {mismatch}", file=sys.stderr)
        return 1
    settings = {"dtype": str(dtype).removeprefix("torch."), "device": str(device)} | settings
    if os.environ.get("TORCHINDUCTOR_MAX_AUTOTUNE") == "1":
        settings["max_autotune"] = True
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


def run_counts(
    name: str,
    description: str,
    verdicts: Callable[[], list[Verdict]],
    arguments: Sequence[str] | None,
) -> int:
    """A benchmark that measures nothing: a table on the terminal, and with --json its numbers."""
    parser = argparse.ArgumentParser(description=description.partition("\n\n")[0])
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every number")
    file = parser.parse_args(arguments).json
    counted = verdicts()
    print_verdicts(counted)
    if file:
        content = {
            "benchmark": name,
            "machine": describe_machine(torch.device("cpu")),
            "verdicts": [verdict.record() for verdict in counted],
        }
        file.write_text(json.dumps(content, indent=1) + "\n")
    return 0
