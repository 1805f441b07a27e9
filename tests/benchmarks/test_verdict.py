# SPDX-License-Identifier: Apache-2.0
import io

import pytest

from harness import Verdict, markdown, print_verdicts

EXACT = Verdict("MCIBI, Table 3", "ASPP, parameters", "42.21", 42.211328, "M")
OFF = Verdict("ANN, Table 1", "APNB, FLOPs", "43.5", 55.406, "G", "convention S")
MEASURED = Verdict("ANN, Table 1", "NB / APNB, time", "7.3", 5.21, "x", measured=True)


@pytest.mark.parametrize(
    ("verdict", "printed", "ok", "text"),
    [
        (EXACT, "42.21", True, "exact"),
        (OFF, "55.4", False, "+27.37%"),
        (MEASURED, "5.2", None, "measured here"),
        (Verdict("", "", "434", 434.49), "434", True, "exact"),
        (Verdict("", "", "260", 260.694), "261", False, "+0.27%"),
    ],
)
def test_verdict(verdict, printed, ok, text):
    assert (verdict.printed, verdict.ok, verdict.text) == (printed, ok, text)
    assert verdict.record()["ok"] is ok


def test_tables_by_paper(capsys):
    page = markdown([OFF, EXACT, MEASURED])
    assert page.index("## ANN, Table 1") < page.index("NB / APNB") < page.index("## MCIBI, Table 3")
    assert "| ASPP, parameters | 42.21 | 42.21 | M | exact |  |" in page
    print_verdicts([OFF, EXACT, MEASURED])
    assert "convention S" in capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 200])
def test_a_narrow_terminal_breaks_words_and_no_numbers(width, monkeypatch):
    rich_console = pytest.importorskip("rich.console")
    page, make = io.StringIO(), rich_console.Console
    terminal = {"force_terminal": True, "color_system": None}
    monkeypatch.setattr(
        rich_console, "Console", lambda **fields: make(file=page, width=width, **terminal, **fields)
    )
    print_verdicts(
        [Verdict("ANN", "NB as released / APNB, time", "601.4", 601.404, "G", "S " * 40)]
    )
    assert max(map(len, page.getvalue().splitlines())) <= width
    assert page.getvalue().count("601.4") == 2
