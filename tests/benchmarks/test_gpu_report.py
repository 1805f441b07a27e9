# SPDX-License-Identifier: Apache-2.0
"""The report of a GPU machine: what it survives, where it goes on, what it says."""

import json
import sys

import pytest

import gpu_report
from gpu_report import Aim, Part


def python(program):
    return [sys.executable, "-c", program]


@pytest.fixture
def parts(tmp_path):
    """One that succeeds and counts its runs, and one for each way not to."""
    counts = tmp_path / "counts"
    return [
        Part("good", python(f"open({str(counts)!r}, 'a').write('1')"), 60),
        Part("bad", python("print('of no use'); raise SystemExit(3)"), 60),
        Part("slow", python("import time; print('begun', flush=True); time.sleep(60)"), 1),
        Part("absent", ["no-such-program"], 60),
        Part("without its tool", python(""), 60, tool="no-such-tool"),
        Part("last", python(""), 60),
    ]


def test_no_part_stops_the_others(parts, tmp_path):
    state = gpu_report.run_parts(parts, tmp_path, 5, dry=False)
    assert {name: result["status"] for name, result in state["parts"].items()} == {
        "good": "ok",
        "bad": "failed with exit code 3",
        "slow": "stopped after 1 s",
        "absent": "failed",
        "without its tool": "no no-such-tool here",
        "last": "ok",
    }
    page = (tmp_path / "gpu_report.md").read_text()
    assert "2 of 6 parts succeeded" in page
    assert "of no use" in page


def test_it_goes_on_where_it_was_cut(parts, tmp_path):
    gpu_report.run_parts(parts[:1], tmp_path, 5, dry=False)
    parts = [parts[0], parts[-1]]
    state = gpu_report.run_parts(parts, tmp_path, 5, dry=False)
    assert list(state["parts"]) == ["good", "last"]
    assert (tmp_path / "counts").read_text() == "1"
    # Of another commit, all is to be done again.
    file = tmp_path / "gpu_report.json"
    file.write_text(json.dumps(state | {"commit": "another"}))
    gpu_report.run_parts(parts, tmp_path, 5, dry=False)
    assert (tmp_path / "counts").read_text() == "11"


def test_it_keeps_its_time(parts, tmp_path):
    assert gpu_report.run_parts(parts, tmp_path, 0, dry=False)["parts"] == {}
    slow = [parts[2]._replace(seconds=60)]
    state = gpu_report.run_parts(slow, tmp_path, 1.2 / 60, dry=False)
    assert state["parts"]["slow"]["status"] == "cut by the end of the time"


def test_what_failed_comes_after_the_rest(tmp_path):
    order = tmp_path / "order"

    def part(name, code):
        program = f"open({str(order)!r}, 'a').write('{name} '); raise SystemExit({code})"
        return Part(name, python(program), 60)

    parts = [part("build", 1), part("bad", 1), part("good", 0)]
    gpu_report.run_parts(parts[:2], tmp_path, 5, dry=False)
    gpu_report.run_parts(parts, tmp_path, 5, dry=False)
    assert order.read_text().split() == ["build", "bad", "build", "good", "bad"]


def test_it_needs_no_git(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)  # no repository
    assert gpu_report.run_parts(parts[:1], tmp_path, 5, dry=False)["commit"] == "unknown"


def row(name, milliseconds, **more):
    return {"name": name, "ours": name == "ctxops", "median_ms": milliseconds} | more


@pytest.mark.parametrize(
    ("aim", "figure"),
    [
        (Aim("fuse", "", 2), 1.5),  # the fastest rival, in the worst case
        (Aim("fuse", "small", 2), 2.0),
        (Aim("fuse", "", 2, rivals=["slow"]), 2.5),
        (Aim("fuse", "", roofline=0.7), 0.4),
        (Aim("fuse", "", 2, rivals=["absent"]), None),
        (Aim("fuse", "none", 2), None),
        (Aim("other", "", 2), None),
    ],
)
def test_an_aim_is_judged_by_its_worst_case(aim, figure, tmp_path):
    ours = [row("ctxops", 4.0, roofline_share=0.2), row("ctxops", 2.0, roofline_share=0.4)]
    cases = [
        {"title": "large", "backward": False, "rows": [*ours, row("quick", 3.0), row("slow", 5.0)]},
        {
            "title": "small",
            "backward": False,
            "rows": [
                row("ctxops", 1.0, roofline_share=0.8),
                row("quick", 2.0),
                row("slow", 4.0),
                {"name": "absent", "ours": False},
            ],
        },
        {"title": "large", "backward": True, "rows": [row("ctxops", 9.0), row("quick", 1.0)]},
    ]
    files = [tmp_path / f"{number}.json" for number in range(len(cases))]
    for case, file in zip(cases, files, strict=True):
        file.write_text(json.dumps({"cases": [case]}))
    assert gpu_report.measured(aim, files if aim.benchmark == "fuse" else []) == figure


def test_the_page_has_every_aim(tmp_path):
    parts = gpu_report.list_parts(tmp_path, "cuda")
    name = "neighborhood_attention 5x6 float32"
    (file,) = (part.file for part in parts if part.name == name)
    rows = [row("ctxops", 2.0, roofline_share=0.4), row("unfold", 5.0)]
    cases = [{"title": "neighborhood_attention", "backward": False, "rows": rows}]
    file.write_text(json.dumps({"cases": cases}))
    state = {"commit": "1234", "dry": False, "parts": {}}
    line = "| neighborhood_attention | float32 | 1 x the fastest rival | {} |"
    # The file of another commit does not count.
    assert line.format("not measured | ") in gpu_report.page(parts, state, tmp_path)
    state["parts"] = {name: {"status": "ok", "seconds": 3.0}}
    page = gpu_report.page(parts, state, tmp_path)
    assert line.format("2.50 x in 1 of 3 parts | reached") in page
    assert "1 aims are reached, 1 are missed" in page


def test_every_aim_has_its_benchmark(tmp_path):
    parts = gpu_report.list_parts(tmp_path, "cuda")
    measured = {part.measures for part in parts}
    for aim in gpu_report.AIMS:
        assert {(aim.benchmark, dtype) for dtype in aim.dtypes} <= measured
    files = [part.file for part in parts if part.file]
    assert len({part.name for part in parts}) == len(parts)
    assert len(set(files)) == len(files)
