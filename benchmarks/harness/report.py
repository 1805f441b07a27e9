# SPDX-License-Identifier: Apache-2.0
"""What a benchmark says: the tables on the terminal and the numbers in a file."""

import dataclasses
import json
import math
from pathlib import Path

import torch

from harness.contender import Paper
from harness.interference import NOTEWORTHY_CORES
from harness.machine import machine_line
from harness.measure import Result, Row
from harness.options import require
from harness.roofline import Roofline
from harness.verdict import Verdict, print_verdicts

MIB = 2**20

_LAYOUTS = {torch.contiguous_format: "NCHW", torch.channels_last: "NHWC"}

LEGEND = (
    "NCHW: contiguous; NHWC: channels_last. ms: median. MiB: peak memory beyond inputs and "
    "results. GFLOP: 2 per multiply-accumulate of convolutions and matrix products, as executed. "
    "GB/s: inputs, parameters and results moved once, over the median. roof: shortest time for "
    "the row's own GFLOP and bytes, over the median. error: relative L2."
)


@dataclasses.dataclass
class Report:
    """``lines``: sentences below the table of each case. ``breakdown``: seconds by row name and
    group of operations, for each case by its title. ``verdicts``: a paper's figures beside ours."""

    benchmark: str
    machine: dict[str, object]
    settings: dict[str, object]
    roofline: Roofline
    results: list[Result]
    lines: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    breakdown: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)
    verdicts: list[Verdict] = dataclasses.field(default_factory=list)


def summarize(result: Result) -> list[str]:
    """Ours against every rival, each in its faster memory format; then who does not fit."""
    names = dict.fromkeys(row.name for row in result.rows)
    absent = [name for name in names if result.fastest(name) is None]
    lines = [f"{name} does not fit (needs {_needs(result, name)})." for name in absent]
    ours = result.fastest(result.ours) if result.ours else None
    rivals = [rival for name in result.rivals if (rival := result.fastest(name))]
    if ours is None or not rivals:
        return lines
    speed = [f"{rival.timing.median / ours.timing.median:.2f} x {rival.name}" for rival in rivals]
    memory = [f"{_share(ours.memory, rival.memory)} of {rival.name}" for rival in rivals]
    compared = [f"{ours.name} is {', '.join(speed)}."]
    compared.append(
        f"its memory is {', '.join(memory)}."
        if ours.memory >= 1024
        else "it needs no memory beyond inputs and results."
    )
    return compared + lines


def _needs(result: Result, name: str) -> str:
    needs = next(row.entry.needs for row in result.rows if row.name == name)
    return f"{needs / 2**30:.1f} GiB"


def _share(part: int, whole: int) -> str:
    """The smaller of two as a fraction of the larger; a call may need nothing at all."""
    part, whole = max(part, 1), max(whole, 1)
    return f"1/{whole / part:.1f}" if part <= whole else f"{part / whole:.1f} x that"


def print_report(report: Report) -> None:
    rich_console = require("rich.console")
    console = rich_console.Console(highlight=False)
    tables = [_table(result, report.roofline) for result in report.results]
    # A cropped number is worse than a broken line, so a narrow terminal breaks lines.
    unbounded = console.options.update(max_width=1000)
    details = {t: _breakdown_table(t, rows) for t, rows in report.breakdown.items()}
    every = [*tables, *details.values()]
    needed = max(console.measure(table, options=unbounded).maximum for table in every)
    console.width = max(console.width, needed)
    console.print(machine_line(report.machine))
    roof = report.roofline
    console.print(
        f"roofline, measured in this run: {roof.bandwidth / 1e9:.1f} GB/s (copy), "
        f"{roof.arithmetic / 1e9:.0f} GFLOP/s ({roof.product})"
    )
    for result, table in zip(report.results, tables, strict=True):
        console.print(table)
        if (result.foreign_cores or 0.0) > NOTEWORTHY_CORES:
            console.print(
                f"DISTURBED: other programs kept {result.foreign_cores:.2f} cores busy meanwhile.",
                style="yellow",
            )
        title = result.case.title
        for line in [*summarize(result), *report.lines.get(title, [])]:
            console.print(line)
        if title in details:
            console.print(details[title])
    console.print(LEGEND, style="dim")
    print_verdicts(report.verdicts)


def _table(result: Result, roof: Roofline):
    papers = any(row.entry.contender.paper for row in result.rows)
    reference = result.reference.name if result.reference else "-"
    table = _empty_table(result.case.title)
    names = ["ms", "p20", "p80", "faster", "MiB", "GFLOP", "GB/s", "roof", "error"]
    names += ["GFLOPs", "MB", "ms"] if papers else []
    for name in ["", "", *names]:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.caption = f"faster: than {reference} in its first row."
    if papers:
        table.caption += " Last three columns: the paper's."
    for row in result.rows:
        contender = row.entry.contender
        layout = _LAYOUTS[contender.memory_format]
        cells = [contender.name, layout, *_figures(row, result, roof)]
        cells += _paper(contender.paper) if papers else []
        table.add_row(*cells, style="bold" if contender.ours else None)
    return table


def _empty_table(title: str):
    table = require("rich.table").Table(title=title, title_justify="left", title_style="bold")
    table.box = require("rich.box").SIMPLE_HEAD
    table.caption_justify = "left"
    return table


def _figures(row: Row, result: Result, roof: Roofline) -> list[str]:
    if row.timing is None:
        return ["no room", "", "", "", f"needs {row.entry.needs / MIB:.0f}", *[""] * 4]
    t, entry = row.timing, row.entry
    return [
        _significant(t.median * 1e3),
        _significant(t.p20 * 1e3),
        _significant(t.p80 * 1e3),
        f"{result.ratio(row):.2f} x",
        f"{row.memory / MIB:.1f}",
        _significant(entry.flops / 1e9, 3),
        _significant(row.bytes_per_second() / 1e9, 3),
        f"{row.roofline_share(roof):.0%}",
        "" if entry.error is None else f"{entry.error:.1e}",
    ]


def _significant(value: float, digits: int = 4) -> str:
    """So many significant digits, but every one before the decimal point, and no exponent."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}"


def _paper(paper: Paper | None) -> list[str]:
    if paper is None:
        return ["", "", ""]
    return [f"{paper.gflops}", f"{paper.megabytes:g}", f"{paper.milliseconds}"]


def _breakdown_table(title: str, rows: dict[str, dict[str, float]]):
    times_of = list(rows.values())
    groups = [g for g in times_of[0] if any(times.get(g) for times in times_of)]
    table = _empty_table(f"{title}: ms by operation, each row in its faster format")
    for name in ["", *groups, "sum"]:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for label, times in rows.items():
        values = [times.get(group, 0.0) for group in groups]
        table.add_row(label, *(f"{1e3 * v:.2f}" for v in [*values, sum(values)]))
    return table


def write_json(report: Report, path: Path) -> None:
    roof = report.roofline
    content = {
        "benchmark": report.benchmark,
        "machine": report.machine,
        "settings": report.settings,
        "roofline": {
            "bytes_per_second": roof.bandwidth,
            "flops_per_second": roof.arithmetic,
            "product": roof.product,
        },
        "units": LEGEND,
        "cases": [_case_record(result, report) for result in report.results],
        "verdicts": [verdict.record() for verdict in report.verdicts],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _case_record(result: Result, report: Report) -> dict[str, object]:
    title = result.case.title
    return {
        "title": title,
        "backward": result.case.backward,
        "foreign_cores": result.foreign_cores,
        "rows": [_row_record(row, result, report.roofline) for row in result.rows],
        "summary": summarize(result) + report.lines.get(title, []),
        "breakdown_seconds": report.breakdown.get(title),
    }


def _row_record(row: Row, result: Result, roof: Roofline) -> dict[str, object]:
    contender, entry = row.entry.contender, row.entry
    record: dict[str, object] = {
        "name": contender.name,
        "format": contender.format_name,
        "ours": contender.ours,
        "needs_bytes": entry.needs,
        "paper": dataclasses.asdict(contender.paper) if contender.paper else None,
    }
    if row.timing is None:
        return record
    return record | {
        "median_ms": row.timing.median * 1e3,
        "p20_ms": row.timing.p20 * 1e3,
        "p80_ms": row.timing.p80 * 1e3,
        "samples_ms": [round(s * 1e3, 5) for s in row.timing.samples],
        "ratio": result.ratio(row),
        "memory_bytes": row.memory,
        "flops": entry.flops,
        "bytes": entry.traffic,
        "bytes_per_second": row.bytes_per_second(),
        "flops_per_second": entry.flops / row.timing.median,
        "roofline_share": row.roofline_share(roof),
        "relative_error": entry.error,
        "error_against": entry.against or None,
    }
