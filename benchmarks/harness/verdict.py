# SPDX-License-Identifier: Apache-2.0
"""A paper's figure beside ours, and whether they agree.

What is measured stands as a ratio between rows, which two machines may share.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from harness.machine import NOTEWORTHY_CORES
from harness.measure import Result, Row


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


def milliseconds(row: Row) -> float:
    return row.timing.median * 1e3


def megabytes(row: Row) -> float:
    return row.memory / 2**20


def ratio_verdicts(
    table: str,
    what: str,
    papers: Mapping[str, float],
    reference: str,
    result: Result,
    figure: Callable[[Row], float],
) -> list[Verdict]:
    """Each row's figure over that of the reference row, the paper's ratio beside ours.

    Every row in its faster memory format; rows that did not fit are left out.
    """
    base, how = result.fastest(reference), result.case.title
    if (result.foreign_cores or 0.0) > NOTEWORTHY_CORES:
        how += ", DISTURBED by other programs"
    verdicts = []
    for name, paper in papers.items():
        row = result.fastest(name)
        if name == reference or base is None or row is None:
            continue
        printed, ratio = f"{paper / papers[reference]:.2f}", figure(row) / figure(base)
        title = f"{name} / {reference}, {what}"
        verdicts.append(Verdict(table, title, printed, ratio, "x", how, True))
    return verdicts
