# SPDX-License-Identifier: Apache-2.0
"""Measured figures beside a paper's: as ratios between rows, which two machines may share."""

from collections.abc import Callable, Mapping

from harness.interference import NOTEWORTHY_CORES
from harness.measure import Result, Row
from harness.verdict import Verdict


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
