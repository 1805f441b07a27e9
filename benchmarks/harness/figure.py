# SPDX-License-Identifier: Apache-2.0
"""One figure of a report: time and memory of every contender, in its faster memory format."""

from collections.abc import Callable
from pathlib import Path

from harness.measure import Result, Row
from harness.options import require
from harness.report import MIB, Report

_OURS, _RIVAL, _TEXT = "#d1495b", "#9fb1bd", "#333333"


def draw(report: Report, path: Path) -> None:
    """A line of two panels for each case, horizontal bars on logarithmic axes."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    bars = max(len(_names(result)) for result in report.results)
    height = 0.7 + len(report.results) * (0.75 + 0.3 * bars)
    figure, panels = pyplot.subplots(
        len(report.results), 2, figsize=(9.5, height), squeeze=False, layout="constrained"
    )
    for (time_panel, memory_panel), result in zip(panels, report.results, strict=True):
        _bars(time_panel, result, _milliseconds, labels=True)
        _bars(memory_panel, result, _mebibytes, labels=False)
        time_panel.set_title(f"{result.case.title}: time (ms)", loc="left", fontsize=10)
        memory_panel.set_title("memory beyond input and output (MiB)", loc="left", fontsize=10)
    machine = report.machine
    caption = f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}"
    figure.supxlabel(f"{caption}, {report.settings['dtype']}", fontsize=8, color=_TEXT)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def _names(result: Result) -> list[str]:
    return list(dict.fromkeys(row.name for row in result.rows))


def _milliseconds(row: Row) -> float:
    return row.timing.median * 1e3


def _mebibytes(row: Row) -> float:
    return row.memory / MIB


def _bars(panel, result: Result, quantity: Callable[[Row], float], labels: bool) -> None:
    names = _names(result)
    rows = [result.fastest(name) for name in names]
    values = [quantity(row) if row else 0.0 for row in rows]
    least = min((v for v in values if v > 0), default=1.0)
    # A logarithmic axis has no zero: bars start well below the smallest of them.
    start = least / 4
    lengths = [max(v - start, 0.0) for v in values]
    colors = [_OURS if name == result.ours else _RIVAL for name in names]
    panel.barh(range(len(names)), lengths, left=start, color=colors, height=0.7)
    panel.set_xscale("log")
    panel.set_xlim(start, max([*values, least]) * 4)
    for y, (row, value) in enumerate(zip(rows, values, strict=True)):
        text = f" {value:.3g}" if row else " does not fit"
        panel.text(max(value, start), y, text, va="center", fontsize=9, color=_TEXT)
    panel.set_yticks(range(len(names)), names if labels else [""] * len(names), fontsize=9)
    panel.invert_yaxis()
    panel.tick_params(length=0)
    panel.xaxis.set_visible(False)
    for side in ("top", "right", "bottom"):
        panel.spines[side].set_visible(False)
