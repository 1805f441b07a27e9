# SPDX-License-Identifier: Apache-2.0
"""What a benchmark says: the tables on the terminal and the numbers in a file."""

import dataclasses
import json
from pathlib import Path

from harness.contender import Paper
from harness.interference import NOTEWORTHY_CORES
from harness.machine import machine_line
from harness.measure import Result, Row
from harness.options import require
from harness.roofline import Roofline

MIB = 2**20

LEGEND = (
    "ms: median. MiB: peak memory beyond inputs and results. GFLOP: 2 per multiply-accumulate of "
    "convolutions and matrix products, as executed. GB/s: inputs, parameters and results moved "
    "once, over the median. roof: shortest time for the row's own GFLOP and bytes, over the "
    "median. error: relative L2."
)


@dataclasses.dataclass
class Report:
    """``lines``: sentences below the table of each case. ``breakdown``: seconds by row name and
    group of operations, for each case by its title."""

    benchmark: str
    machine: dict[str, object]
    settings: dict[str, object]
    roofline: Roofline
    results: list[Result]
    lines: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    breakdown: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)


def summarize(result: Result) -> list[str]:
    """Ours against every rival, each in its faster memory format, in a sentence or two."""
    ours = result.fastest(result.ours) if result.ours else None
    if ours is None:
        return []
    speed, memory, absent = [], [], []
    for name in result.rivals:
        rival = result.fastest(name)
        if rival is None:
            needs = next(row.entry.needs for row in result.rows if row.name == name)
            absent.append(f"{name} does not fit (needs {needs / 2**30:.1f} GiB)")
            continue
        speed.append(f"{rival.timing.median / ours.timing.median:.2f} x {name}")
        if ours.memory:
            memory.append(f"{_share(ours.memory, rival.memory)} of {name}")
    lines = [f"{ours.name} is {', '.join(speed)}"] if speed else []
    if memory:
        lines.append(f"its memory is {', '.join(memory)}")
    return [line + "." for line in lines + absent]


def _share(part: float, whole: float) -> str:
    return f"1/{whole / part:.1f}" if part <= whole else f"{part / max(whole, 1):.1f} x that"


def print_report(report: Report) -> None:
    rich_console = require("rich.console")
    console = rich_console.Console(highlight=False)
    console.width = max(console.width, 130)
    console.print(machine_line(report.machine))
    roof = report.roofline
    console.print(
        f"roofline, measured in this run: {roof.bandwidth / 1e9:.1f} GB/s (copy), "
        f"{roof.arithmetic / 1e9:.0f} GFLOP/s ({roof.product})"
    )
    for result in report.results:
        console.print(_table(result, roof))
        if (result.foreign_cores or 0.0) > NOTEWORTHY_CORES:
            console.print(
                f"DISTURBED: other programs kept {result.foreign_cores:.2f} cores busy meanwhile.",
                style="yellow",
            )
        title = result.case.title
        notes = [_note(row) for row in result.rows if row.entry.contender.note]
        for line in [*summarize(result), *report.lines.get(title, []), *dict.fromkeys(notes)]:
            console.print(line)
        if title in report.breakdown:
            console.print(_breakdown_table(title, report.breakdown[title]))
    console.print(LEGEND, style="dim")


def _note(row: Row) -> str:
    return f"{row.name}: {row.entry.contender.note}"


def _table(result: Result, roof: Roofline):
    papers = any(row.entry.contender.paper for row in result.rows)
    reference = result.reference.name if result.reference else "-"
    table = _empty_table(result.case.title)
    table.add_column("")
    table.add_column("format")
    names = ["ms", "p20", "p80", "faster", "MiB", "GFLOP", "GB/s", "roof", "error"]
    for name in names + (["paper: GFLOPs", "MB", "ms"] if papers else []):
        table.add_column(name, justify="right")
    table.caption = f"faster: than {reference} in its first row"
    for row in result.rows:
        contender = row.entry.contender
        cells = [contender.name, contender.format_name, *_figures(row, result, roof)]
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
        return ["does not fit:", "needs", f"{row.entry.needs / 2**30:.1f} GiB", *[""] * 6]
    t, entry = row.timing, row.entry
    return [
        f"{t.median * 1e3:.2f}",
        f"{t.p20 * 1e3:.2f}",
        f"{t.p80 * 1e3:.2f}",
        f"{result.ratio(row):.2f} x",
        f"{row.memory / MIB:.1f}",
        f"{entry.flops / 1e9:#.3g}",
        f"{row.bytes_per_second() / 1e9:#.3g}",
        f"{row.roofline_share(roof):.0%}",
        "" if entry.error is None else f"{entry.error:.1e}",
    ]


def _paper(paper: Paper | None) -> list[str]:
    if paper is None:
        return ["", "", ""]
    return [f"{paper.gflops}", f"{paper.megabytes:g}", f"{paper.milliseconds}"]


def _breakdown_table(title: str, rows: dict[str, dict[str, float]]):
    times_of = list(rows.values())
    groups = [g for g in times_of[0] if any(times.get(g) for times in times_of)]
    table = _empty_table(f"{title}: ms by operation, each row in its faster format")
    for name in ["", *groups, "sum"]:
        table.add_column(name, justify="right" if name else "left")
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
        "note": contender.note,
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
