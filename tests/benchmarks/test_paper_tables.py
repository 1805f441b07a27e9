# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

from harness import Verdict
from papers import paper_tables

RATIO = Verdict("ANN, Table 1", "NB / APNB, time", "1.57", 1.3, "x", "48 x 48", measured=True)
EXACT = Verdict("GCN, Table 4", "GCN, parameters", "608", 608.286, "K")
OFF = Verdict("GCN, Table 2", "GCN, k = 3, parameters", "260", 260.694, "K")


def test_a_verdict_survives_the_file():
    for verdict in (RATIO, EXACT, OFF):
        assert paper_tables.read_verdict(verdict.record()) == verdict


def test_page():
    text = paper_tables.page([RATIO, EXACT, OFF], "a machine")
    assert "Of 2 published parameter and operation counts 1 come out" in text
    assert "| NB / APNB, time | 1.57 | 1.30 | x | measured here | 48 x 48 |" in text
    assert "a machine." in text


@pytest.mark.slow
def test_runs_a_script_and_writes_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_tables, "SCRIPTS", {"papers/gcn_parameters.py": False})
    file = tmp_path / "tables.md"
    assert paper_tables.main(["--quick", "--output", str(file)]) == 0
    text = file.read_text()
    assert "## GCN, Table 11" in text
    assert "Of 16 published parameter and operation counts 11 come out" in text


@pytest.mark.parametrize("quick", [True, False])
def test_scripts_that_measure_get_the_device_and_the_effort(quick, monkeypatch, capsys):
    ran = {}
    monkeypatch.setattr(paper_tables, "run_script", lambda *call: ran.update([call]) or [EXACT])
    paper_tables.main(["--device", "cpu", *(["--quick"] if quick else [])])
    flags = ["--device", "cpu", *(["--quick"] if quick else [])]
    assert ran["papers/whole_networks.py"] == ran["nonlocal_vs_apnb.py"] == flags
    assert ran["papers/gcn_parameters.py"] == ran["papers/gff_cost.py"] == []


@pytest.mark.slow
def test_a_script_that_fails_is_named():
    with pytest.raises(RuntimeError, match=r"(?s)py --quick.*unrecognized arguments"):
        paper_tables.run_script("papers/gcn_parameters.py", ["--quick"])


def test_every_script_is_there():
    assert all((paper_tables.BENCHMARKS / name).exists() for name in paper_tables.SCRIPTS)


@pytest.mark.slow
def test_every_script_runs_from_any_folder(tmp_path):
    """Each as ``python SCRIPT --help`` would, but in one process, which imports torch once."""
    program = """
import runpy, sys
from pathlib import Path
folder, *names = sys.argv[1:]
path = sys.path[1:]
for name in names:
    sys.argv = [str(Path(folder, name)), "--help"]
    sys.path[:] = [str(Path(folder, name).parent), *path]
    ours = [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(folder)]
    for module in ours:
        del sys.modules[module]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, name
"""
    command = [sys.executable, "-c", program, str(paper_tables.BENCHMARKS), *paper_tables.SCRIPTS]
    printed = subprocess.check_output(command, cwd=tmp_path, text=True)
    assert printed.count("write every number") == len(paper_tables.SCRIPTS)
