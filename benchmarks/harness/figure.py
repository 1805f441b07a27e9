# SPDX-License-Identifier: Apache-2.0
"""One figure of a report: time and memory of every contender, in its faster memory format."""

from pathlib import Path

from harness.measure import Result
from harness.options import require
from harness.report import MIB, Report

_OURS, _RIVAL, _TEXT = "#d1495b", "#b8c4cc", "#333333"


def draw(report: Report, path: Path) -> None:
    """A band of two panels for each case, with horizontal bars from zero."""
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
