# SPDX-License-Identifier: Apache-2.0
"""What a benchmark says: tables on the terminal, numbers in a file, a figure."""

import dataclasses
import importlib
import json
import math
import types
from collections.abc import Sequence
from pathlib import Path

import torch

from harness.case import Paper
from harness.machine import NOTEWORTHY_CORES, Roofline, machine_line
from harness.measure import Result, Row
from harness.verdict import HEADINGS, Verdict, by_table

MIB = 2**20

_LAYOUTS = {torch.contiguous_format: "NCHW", torch.channels_last: "NHWC"}

LEGEND = (
    "NCHW: contiguous; NHWC: channels_last. ms: median of so many runs. MiB: peak memory beyond "
    "inputs and results. GFLOP: 2 per multiply-accumulate of convolutions and matrix products, as "
    "executed. lead: over the best rival in the row's own memory format. GB/s: inputs, parameters "
    "and results moved once, over the median. roof: shortest "
    "time for the row's own GFLOP and bytes, over the median. error: relative L2."
)

# Below so many runs, a row says so.
FEW_RUNS = 5

# The columns, and which of them a narrow terminal gives up: those of the largest number first.
_COLUMNS = {
    "ms": 0, "p20": 8, "p80": 8, "runs": 5, "faster": 1, "lead": 3, "MiB": 2, "GFLOP": 6, "GB/s": 7,
    "roof": 7, "error": 4,
}  # fmt: skip
_PAPER_COLUMNS = {"GFLOPs": 9, "MB": 9, "ms": 9}

# Of the figure.
_OURS, _RIVAL, _TEXT = "#d1495b", "#b8c4cc", "#333333"


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


def require(name: str) -> types.ModuleType:
    """A module of the extra ``bench``; where it is missing, the program ends and names the cure."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SystemExit(
            f'the benchmarks need {name}, which is not installed: pip install "ctxops[bench]"'
        ) from None


def summarize(result: Result) -> list[str]:
    """Ours against every rival, each in its faster memory format; then what is to be known of rows
    that were measured seldom or not at all."""
    lines = _remarks(result)
    ours = result.fastest(result.ours) if result.ours else None
    rivals = [rival for name in result.rivals if (rival := result.fastest(name))]
    if ours is None or not rivals:
        return lines
    speed = [f"{rival.timing.median / ours.timing.median:.2f} x {rival.name}" for rival in rivals]
    memory = [f"{_share(ours.memory, rival.memory)} of {rival.name}" for rival in rivals]
    compared = [f"{ours.name} is {', '.join(speed)}.", *_leads(result)]
    compared.append(
        f"its memory is {', '.join(memory)}."
        if ours.memory >= 1024
        else "it needs no memory beyond inputs and results."
    )
    return compared + lines


def _leads(result: Result) -> list[str]:
    """Ours in each memory format against the best rival there, where there is more than one."""
    rows = [row for row in result.rows if row.name == result.ours and row.timing]
    leads = [(result.lead(row), row) for row in rows if result.lead(row)]
    if len(leads) < 2:
        return []
    each = [
        f"{lead:.2f} x {result.best_rival(row.entry.contender.memory_format).name} in "
        f"{_LAYOUTS[row.entry.contender.memory_format]}"
        for lead, row in leads
    ]
    return [
        f"against the best rival in each format it is {', '.join(each)}: "
        f"{min(leads, key=lambda pair: pair[0])[0]:.2f} x at the least."
    ]


def _remarks(result: Result) -> list[str]:
    few = [r for r in result.rows if r.timing and len(r.timing.samples) < FEW_RUNS]
    seldom = [f"{_title(row)} ({len(row.timing.samples)} runs)" for row in few]
    lines = [f"Measured fewer than {FEW_RUNS} times: {', '.join(seldom)}."] if seldom else []
    lines += [
        f"{_title(row)} is not measured: {row.entry.left_out}."
        for row in result.rows
        if row.entry.left_out
    ]
    if result.launch == "events":
        lines.append(
            f"Python launches every row: {result.uncaptured} cannot be captured in a CUDA graph."
        )
    absent = {r.name: r for r in result.rows if r.entry.needs and not result.fastest(r.name)}
    return lines + [
        f"{name} does not fit (needs {row.entry.needs / 2**30:.1f} GiB)."
        for name, row in absent.items()
    ]


def _title(row: Row) -> str:
    return f"{row.name} {_LAYOUTS[row.entry.contender.memory_format]}"


def _share(part: int, whole: int) -> str:
    """The smaller of two as a fraction of the larger; a call may need nothing at all."""
    part, whole = max(part, 1), max(whole, 1)
    return f"1/{whole / part:.1f}" if part <= whole else f"{part / whole:.1f} x that"


def print_report(report: Report) -> None:
    console = require("rich.console").Console(highlight=False)
    details = {t: _breakdown_table(t, rows) for t, rows in report.breakdown.items()}
    every = [*(result_table(r, report.roofline) for r in report.results), *details.values()]
    _widen(console, every)
    console.print(machine_line(report.machine))
    roof = report.roofline
    console.print(
        f"roofline, measured in this run: {roof.bandwidth / 1e9:.1f} GB/s (copy), "
        f"{roof.arithmetic / 1e9:.0f} GFLOP/s ({roof.product})"
    )
    for result in report.results:
        console.print(result_table(result, roof, console))
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


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """A table on the terminal for each table of the papers."""
    console = require("rich.console").Console(highlight=False)
    for title, rows in by_table(verdicts).items():
        table = _empty_table(title)
        for heading in HEADINGS:
            number = heading in ("paper", "ours", "verdict")
            table.add_column(heading, justify="right" if number else "left", no_wrap=number)
        for row in rows:
            table.add_row(*row.cells(), style="yellow" if row.ok is False else None)
        _widen(console, [table])
        console.print(table)


def result_table(result: Result, roof: Roofline, console=None):
    """The table of a case; on a console, with as many columns as it has room for."""
    papers = any(row.entry.contender.paper for row in result.rows)
    offered = list(_COLUMNS.items()) + list(_PAPER_COLUMNS.items()) * papers
    kept = list(range(len(offered)))
    table = _table(result, roof, offered, kept)
    while console is not None and len(kept) > 1 and _width(table, console) > console.width:
        kept.remove(max(reversed(kept), key=lambda i: offered[i][1]))
        table = _table(result, roof, offered, kept)
    return table


def _width(table, console) -> int:
    return console.measure(table, options=console.options.update(max_width=1000)).maximum


def _widen(console, tables: Sequence) -> None:
    """A pipe or a file has no width: it gets that of the tables."""
    if not console.is_terminal:
        console.width = max([console.width, *(_width(table, console) for table in tables)])


def _table(result: Result, roof: Roofline, offered: list[tuple[str, int]], kept: list[int]):
    reference = result.reference.name if result.reference else "-"
    table = _empty_table(result.case.title)
    for name in ["", "", *(offered[i][0] for i in kept)]:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.caption = f"faster: than {reference} in its first row."
    papers = [i for i in kept if i >= len(_COLUMNS)]
    if papers:
        table.caption += " From GFLOPs on: the paper's."
    if len(kept) < len(offered):
        table.caption += " A wider terminal shows more columns."
    for row in result.rows:
        contender = row.entry.contender
        cells = [*_figures(row, result, roof), *_paper(contender.paper)]
        shown = [contender.name, _LAYOUTS[contender.memory_format], *(cells[i] for i in kept)]
        table.add_row(*shown, style="bold" if contender.ours else None)
    return table


def _empty_table(title: str):
    table = require("rich.table").Table(title=title, title_justify="left", title_style="bold")
    table.box = require("rich.box").SIMPLE_HEAD
    table.caption_justify = "left"
    return table


def _figures(row: Row, result: Result, roof: Roofline) -> list[str]:
    """The cells of _COLUMNS."""
    t, entry = row.timing, row.entry
    if entry.needs or entry.left_out:
        needs = f"needs {entry.needs / MIB:.0f}" if entry.needs else ""
        why = "no room" if entry.needs else "not run"
        return [why, "", "", "", "", "", needs, "", "", "", ""]
    error = "" if entry.error is None else f"{entry.error:.1e}"
    memory, flops = f"{row.memory / MIB:.1f}", _significant(entry.flops / 1e9, 3)
    if t is None:
        return ["", "", "", "0", "", "", memory, flops, "", "", error]
    return [
        _significant(t.median * 1e3),
        _significant(t.p20 * 1e3),
        _significant(t.p80 * 1e3),
        str(len(t.samples)),
        f"{result.ratio(row):.2f} x",
        f"{lead:.2f} x" if (lead := result.lead(row)) else "",
        memory,
        flops,
        _significant(row.bytes_per_second() / 1e9, 3),
        f"{row.roofline_share(roof):.0%}",
        error,
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
    # A cropped number is worse than a broken one.
    for name in ["", *groups, "sum"]:
        table.add_column(name, justify="right" if name else "left", overflow="fold")
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
    # Whole or not at all, whatever stops the program meanwhile.
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


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
        "left_out": entry.left_out or None,
        "paper": dataclasses.asdict(contender.paper) if contender.paper else None,
    }
    if row.timing is None:
        return record
    return record | {
        "median_ms": row.timing.median * 1e3,
        "p20_ms": row.timing.p20 * 1e3,
        "p80_ms": row.timing.p80 * 1e3,
        "launch": result.launch,
        "samples_ms": [round(s * 1e3, 5) for s in row.timing.samples],
        "ratio": result.ratio(row),
        "lead": result.lead(row),
        "memory_bytes": row.memory,
        "flops": entry.flops,
        "bytes": entry.traffic,
        "bytes_per_second": row.bytes_per_second(),
        "flops_per_second": entry.flops / row.timing.median,
        "roofline_share": row.roofline_share(roof),
        "relative_error": entry.error,
        "error_against": entry.against or None,
    }


def draw(report: Report, path: Path) -> None:
    """Time and memory of every contender, in its faster memory format: horizontal bars from zero,
    in a band of two panels for each case."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    heights = [0.85 + 0.32 * len(_names(result)) for result in report.results]
    figure = pyplot.figure(figsize=(9.5, sum(heights) + 0.3), layout="constrained")
    bands = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)
    for band, result in zip(bands[:, 0], report.results, strict=True):
        _draw_case(band, result)
    machine = report.machine
    words = [machine["device"], f"{machine['threads']} threads", f"torch {machine['torch']}"]
    caption = ", ".join([*words, report.settings["dtype"]])
    bands[-1, 0].supxlabel(caption, x=0.99, ha="right", fontsize=8, color=_TEXT)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def _names(result: Result) -> list[str]:
    return list(dict.fromkeys(row.name for row in result.rows))


def _draw_case(band, result: Result) -> None:
    band.suptitle(result.case.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    time_panel, memory_panel = band.subplots(1, 2)
    rows = {name: result.fastest(name) for name in _names(result)}
    times = {name: row and row.timing.median * 1e3 for name, row in rows.items()}
    memory = {name: row and row.memory / MIB for name, row in rows.items()}
    _draw_bars(time_panel, times, result.ours)
    _draw_bars(memory_panel, memory, result.ours)
    time_panel.set_yticks(range(len(rows)), rows, fontsize=9)
    time_panel.set_title("time, ms", loc="left", fontsize=9)
    memory_panel.set_title("memory beyond input and results, MiB", loc="left", fontsize=9)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _draw_bars(panel, values: dict[str, float | None], ours: str | None) -> None:
    for y, (name, value) in enumerate(values.items()):
        color = _OURS if name == ours else _RIVAL
        panel.barh(y, value or 0.0, color=color, height=0.7)
        text = " does not fit" if value is None else f" {_number(value)}"
        weight = "bold" if name == ours else "normal"
        panel.text(value or 0.0, y, text, va="center", fontsize=9, color=_TEXT, fontweight=weight)
    panel.set_xlim(0, 1.2 * max([v for v in values.values() if v] or [1.0]))
    panel.set_yticks([])
    panel.invert_yaxis()
    panel.tick_params(length=0)
    panel.xaxis.set_visible(False)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
