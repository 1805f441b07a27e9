# SPDX-License-Identifier: Apache-2.0
"""The published parameter and operation counts of all that is here beside ours, and the published
times and memory as ratios between rows beside the ratios on this machine, on one page.

    python benchmarks/papers/paper_tables.py --quick --output tables.md
    python benchmarks/papers/paper_tables.py --device cuda --output tables.md

It runs the scripts of the papers' tables: with --quick on small images and with few samples, else
at the papers' sizes, which wants a GPU or patience.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import _path  # noqa: F401
from harness import Verdict, markdown, output_file
from harness.machine import describe_machine, machine_line

BENCHMARKS = Path(__file__).parents[1]
# Does the script measure on a device, or only count?
SCRIPTS = {
    "nonlocal_vs_apnb.py": True,
    "papers/whole_networks.py": True,
    "papers/context_modules.py": True,
    "papers/gff_cost.py": False,
    "papers/gald_efficiency.py": True,
    "papers/gcn_parameters.py": False,
}


def run_script(name: str, arguments: Sequence[str]) -> list[Verdict]:
    """The verdicts of a benchmark, run as a program of its own; raises where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, str(BENCHMARKS / name), *arguments, "--json", str(file)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        records = json.loads(file.read_text())["verdicts"]
    return [read_verdict(record) for record in records]


def read_verdict(record: dict[str, object]) -> Verdict:
    return Verdict(**{field.name: record[field.name] for field in dataclasses.fields(Verdict)})


def page(verdicts: Sequence[Verdict], machine: str) -> str:
    judged = [v for v in verdicts if v.ok is not None]
    exact = sum(v.ok for v in judged)
    return "\n".join(
        [
            "# The papers' tables",
            "",
            f"Of {len(judged)} published parameter and operation counts {exact} come out to the "
            "last printed digit; the others show by how much they differ. Times and memory are "
            "ratios between two rows, at the size that the last column names: measured on",
            machine + ".",
            "",
            markdown(verdicts),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small cases, within ten minutes")
    parser.add_argument("--output", type=output_file, metavar="FILE.md", help="default: print it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args(arguments)
    verdicts = []
    flags = ["--device", chosen.device, *(["--quick"] if chosen.quick else [])]
    for name, measures in SCRIPTS.items():
        start = time.perf_counter()
        verdicts += run_script(name, flags if measures else [])
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    text = page(verdicts, machine_line(describe_machine(torch.device(chosen.device))))
    if chosen.output:
        chosen.output.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
