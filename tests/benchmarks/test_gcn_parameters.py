# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from papers import gcn_parameters


@pytest.fixture(scope="module")
def verdicts():
    return gcn_parameters.verdicts()


def of_table(verdicts, number):
    return [v for v in verdicts if v.table == f"GCN, Table {number}"]


def test_table_2(verdicts):
    rows = of_table(verdicts, 2)
    assert [round(1000 * v.ours) for v in rows] == [
        260_694, 434_490, 608_286, 782_082, 387_072, 1_075_200, 2_107_392, 3_483_648,
    ]  # fmt: skip
    # 260K, of k = 3, is 260,694 without its last digits.
    assert [v.ok for v in rows] == [False] + [True] * 7


def test_table_4(verdicts):
    rows = of_table(verdicts, 4)
    assert [round(1000 * v.ours) for v in rows] == [75_884_544, 28_505_088, 4_307_310, 608_286]
    assert all(v.ok for v in rows)


def test_table_11(verdicts):
    """Against the sums over the layers of both networks."""
    rows = of_table(verdicts, 11)
    assert [v.ours for v in rows] == pytest.approx([3855.9, 3737.9, 3764.7, 3646.7], abs=0.05)
    assert not any(v.ok for v in rows)
    assert rows[0].text == "+4.21%"


def test_writes_every_figure(tmp_path, capsys, monkeypatch, verdicts):
    monkeypatch.setattr(gcn_parameters, "verdicts", lambda: verdicts)
    file = tmp_path / "gcn.json"
    assert gcn_parameters.main(["--json", str(file)]) == 0
    assert "stack, m = 1024, parameters" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["benchmark"] == "gcn_parameters"
    assert written["machine"]["torch"]
    assert len(written["verdicts"]) == 16
    assert {"paper", "ours", "ok", "verdict", "convention"} <= set(written["verdicts"][0])


def test_bad_file(capsys, monkeypatch, verdicts):
    monkeypatch.setattr(gcn_parameters, "verdicts", lambda: verdicts)
    with pytest.raises(SystemExit):
        gcn_parameters.main(["--json", "/no/such/folder/x"])
    assert "there is no folder" in capsys.readouterr().err
