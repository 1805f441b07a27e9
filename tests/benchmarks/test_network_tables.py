# SPDX-License-Identifier: Apache-2.0
"""The published figures of whole networks, and what the scripts make of them."""

import json

import pytest
import torch

from ctxops.models import SegmentationOutput
from harness import Effort, Options, Verdict, check_case, milliseconds, ratio_verdicts
from harness.check import Entry
from harness.measure import Result, Row, Timing
from papers import gald_efficiency, gff_cost, whole_networks
from papers.network_cases import network_case, parameters, statistics

OPTIONS = Options(torch.device("cpu"), torch.float32, Effort(0.01, 1, 1))


def counts(verdicts: list[Verdict]) -> dict[str, tuple[int, bool | None]]:
    return {v.what.removesuffix(", parameters"): (round(v.ours * 1e6), v.ok) for v in verdicts}


@pytest.mark.slow
def test_gald():
    verdicts = gald_efficiency.count_verdicts()
    assert all(v.unit == "M" for v in verdicts)
    assert counts([v for v in verdicts if v.table == "GALD, Table IV"]) == {
        "ASPP": (47_512_038, True),
        "ASPP, ResNet-101": (66_504_166, False),
        "ASPP + LDv1, added": (18_432, False),
        "ASPP + LDv2, added": (1_572_864, False),
    }
    table_6 = counts([v for v in verdicts if v.table == "GALD, Table VI"])
    assert table_6["PSPNet"] == (65_707_475, False)
    assert table_6["GALDv1"] == (66_664_915, False)
    # CCNet's context has 23,924,353, the backbone 42.624 M; DANet has three classifiers.
    assert table_6["CCNet"] == (66_558_036, False)
    assert table_6["DANet"] == (66_578_555, True)
    assert table_6["DenseASPP"] == (35_395_427, False)


@pytest.fixture(scope="module")
def gff():
    return gff_cost.verdicts()


@pytest.mark.slow
def test_gff_baseline_is_exact(gff):
    operations, count = gff[:2]
    assert f"{operations.ours:.2f}" == "580.06"
    assert operations.ok
    assert round(count.ours * 1e6) == 65_707_475


@pytest.mark.slow
def test_gff_rows(gff):
    assert [f"{v.ours:.1f}" for v in gff[2::2]] == ["620.2", "603.7"]
    assert [f"{v.ours:.2f}" for v in gff[3::2]] == ["71.44", "71.04"]
    assert not any(v.ok for v in gff[2:])


@pytest.mark.slow
def test_gff_writes_every_figure(tmp_path, capsys, monkeypatch, gff):
    monkeypatch.setattr(gff_cost, "verdicts", lambda: gff)
    file = tmp_path / "gff.json"
    assert gff_cost.main(["--json", str(file)]) == 0
    assert len(json.loads(file.read_text())["verdicts"]) == 6
    assert "PSPNet + GFF + DFP" in capsys.readouterr().out


class TinyNetwork(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.norm = torch.nn.Conv2d(3, 5, 1), torch.nn.BatchNorm2d(5)

    def forward(self, image):
        return SegmentationOutput(self.norm(self.convolution(image)))


def test_parameters_and_statistics():
    assert parameters(TinyNetwork()) == 3 * 5 + 5 + 2 * 5
    assert statistics(TinyNetwork()) == 10


def test_rows_of_a_network_have_the_same_weights():
    case = network_case("tiny", {"a": TinyNetwork, "b": TinyNetwork}, (8, 6), OPTIONS, classes=5)
    entries = check_case(case, OPTIONS.device, OPTIONS.dtype)
    assert [e.contender.name for e in entries] == ["a", "a", "b", "b"]
    assert [e.error is None for e in entries] == [True, False, True, False]
    assert entries[0].flops == 2 * 8 * 6 * 15


def test_ratios_between_rows():
    case = network_case("tiny", {"a": TinyNetwork, "b": TinyNetwork}, (8, 6), OPTIONS, classes=5)
    seconds = (4.0, 2.0, 3.0, 5.0)
    rows = [Row(Entry(c), Timing((s,)), 0) for c, s in zip(case.contenders, seconds, strict=True)]
    result = Result(case, tuple(rows))
    papers = {"a": 10, "b": 25, "absent": 1}
    (verdict,) = ratio_verdicts("T", "time", papers, "a", result, milliseconds)
    assert verdict.what == "b / a, time"
    assert (verdict.paper, verdict.printed, verdict.ok) == ("2.50", "1.50", None)


def test_ann():
    verdicts = whole_networks.count_verdicts()
    assert counts(verdicts[::2]) == {
        "DenseASPP": (35_634_083, True),
        "PSANet": (102_664_678, True),
        "ANN": (63_077_843, False),
    }
    assert counts(verdicts[1::2])["ANN"] == (62_964_435, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", whole_networks.HEADS)
def test_heads_agree_with_their_eager_twins(name):
    case = whole_networks.head_case(name, (32, 24), OPTIONS)
    entries = check_case(case, OPTIONS.device, OPTIONS.dtype)
    assert entries[0].error is None
    assert max(entry.error for entry in entries[1:]) < 1e-5
    with torch.profiler.profile() as recorded:
        for entry in entries[:2]:
            assert not entry.contender.ours
            entry.runner()
    assert not any(event.name.startswith("ctxops::") for event in recorded.events())
