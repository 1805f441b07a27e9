# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from papers import context_modules
from papers.context_modules import TABLE_3, count_verdicts, multiply_accumulates, product_lines

INTEGERS = {
    "ASPP": 42_211_328,
    "PPM": 23_073_792,
    "CCNet": 23_924_353,
    "DANet": 23_924_738,
    "ANN": 20_323_840,
    "DNL": 24_122_625,
    "APCNet": 30_455_858,
    "DCA": 14_816_768,
    "ASPP+DCA": 45_629_440,
}


def test_every_published_count_is_met():
    verdicts = count_verdicts()
    assert len(verdicts) == 2 * (len(TABLE_3) + 1)
    assert [v.what for v in verdicts if not v.ok] == []
    counts = {v.what: v.convention for v in verdicts}
    for name, count in INTEGERS.items():
        assert counts[f"{name}, parameters"] == f"{count:,}"


def test_says_what_the_paper_leaves_out():
    counts = multiply_accumulates()
    # Of these the convolutions are all, or nearly.
    assert counts["ASPP"] == pytest.approx(674.3, abs=0.1)
    assert counts["PPM"] == pytest.approx(309.3, abs=0.1)
    # 2 N^2 C of the position attention, and 2 N C^2 of the channels', come to the convolutions.
    n = 128 * 128
    products = (n * n * (64 + 512) + 2 * n * 512 * 512) / 1e9
    assert counts["DANet"] == pytest.approx(391.9 + products, abs=0.2)
    assert "PPM and ANN cost less than DCA" in product_lines()[1]


@pytest.mark.slow
def test_writes_every_number(tmp_path, capsys, monkeypatch):
    for name, channels in (("LOW_CHANNELS", 24), ("IN_CHANNELS", 40), ("CHANNELS", 32)):
        monkeypatch.setattr(context_modules, name, channels)
    file = tmp_path / "table.json"
    arguments = ["--quick", "--device", "cpu", "--size", "5x4", "--seconds", "0.1"]
    assert context_modules.main([*arguments, "--json", str(file)]) == 0
    assert "in GMAC as executed: ASPP" in " ".join(capsys.readouterr().out.split())
    written = json.loads(file.read_text())
    (case,) = written["cases"]
    assert [(r["name"], r["format"]) for r in case["rows"]] == [
        (name, layout) for name in TABLE_3 for layout in ("contiguous", "channels_last")
    ]
    ratios = {v["what"]: v["paper"] for v in written["verdicts"] if v["measured"]}
    assert ratios["ASPP / DCA, time"] == "2.13"
    assert len(ratios) == len(TABLE_3) - 1
