# SPDX-License-Identifier: Apache-2.0
"""A paper's figure beside ours, and whether they agree."""

import dataclasses
from collections.abc import Sequence

from harness.options import require


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One figure that a paper prints.

    ``table``: where it stands, "MCIBI, Table 3"; ``what``: "ASPP, parameters". ``paper``: the
    figure as printed, without its unit: its decimals are those that ours must have. ``ours``: the
    number in the same unit. ``convention``: how ours was counted, in a few words. ``measured``: a
    time, memory or ratio of them, which depends on the machine and is not judged.
    """

    table: str
    what: str
    paper: str
    ours: float
    unit: str = ""
    convention: str = ""
    measured: bool = False

    @property
    def printed(self) -> str:
        """Ours with the decimals of the paper's."""
        return f"{self.ours:.{len(self.paper.partition('.')[2])}f}"

    @property
    def ok(self) -> bool | None:
        """Does ours print as the paper's? None where that is not judged."""
        return None if self.measured else self.printed == self.paper

    @property
    def text(self) -> str:
        if self.measured:
            return "measured here"
        return "exact" if self.ok else f"{self.ours / float(self.paper) - 1:+.2%}"

    def cells(self) -> list[str]:
        return [
            self.what, self.paper, self.printed, self.unit, self.text, self.convention
        ]  # fmt: skip

    def record(self) -> dict[str, object]:
        """For a JSON file."""
        return dataclasses.asdict(self) | {"ok": self.ok, "verdict": self.text}


HEADINGS = ["figure", "paper", "ours", "unit", "verdict", "how ours was counted"]


def by_table(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """In the order in which the tables come first."""
    tables: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        tables.setdefault(verdict.table, []).append(verdict)
    return tables


def print_verdicts(verdicts: Sequence[Verdict]) -> None:
    """A table on the terminal for each table of the papers."""
    console = require("rich.console").Console(highlight=False)
    rich_table, box = require("rich.table"), require("rich.box").SIMPLE_HEAD
    for title, rows in by_table(verdicts).items():
        table = rich_table.Table(title=title, title_justify="left", title_style="bold", box=box)
        for heading in HEADINGS:
            number = heading in ("paper", "ours", "verdict")
            table.add_column(heading, justify="right" if number else "left", no_wrap=number)
        for row in rows:
            table.add_row(*row.cells(), style="yellow" if row.ok is False else None)
        if not console.is_terminal:  # a pipe or a file has no width
            unbounded = console.options.update(max_width=1000)
            console.width = max(console.width, console.measure(table, options=unbounded).maximum)
        console.print(table)


def markdown(verdicts: Sequence[Verdict]) -> str:
    """A section with a table for each table of the papers."""
    lines = []
    for title, rows in by_table(verdicts).items():
        lines += [f"## {title}", "", _line(HEADINGS), _line(["---"] * len(HEADINGS))]
        lines += [_line(row.cells()) for row in rows]
        lines.append("")
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
