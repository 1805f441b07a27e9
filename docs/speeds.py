# SPDX-License-Identifier: Apache-2.0
"""How many times as fast as plain PyTorch the operators are, from the files of the benchmarks.

    python docs/speeds.py                       # the table in README.md
    python docs/speeds.py --all > docs/speeds.md

A ratio compares ours with the fastest rival in the same memory format. Below 1 the rival is faster.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
FORMATS = ("contiguous", "channels_last")
# These compute the same function; the other rows of Table 1 are the block that it replaces.
APNB = ("APNB as released", "APNB compiled")

INTRODUCTION = """\
`python docs/speeds.py --all` wrote this page from the files that the headings link. Each file names
the processor, the versions and the commit. "3.5 x name" means: 3.5 times as fast as that rival, the
fastest one in the same memory format. Below 1 the rival is faster. Times are medians.
`foreign_cores` in a file tells how busy other programs kept the machine. The files in `cpu_avx2`
were written under `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=avx2` on a processor with AVX-512:
there torch and `ctxops` both use AVX2. In the files in `cpu_bfloat16` all maps are bfloat16. There
`ctxops` multiplies in float32, torch's products multiply in bfloat16."""


class Shown(NamedTuple):
    """A line of README's table. ``rivals``: None for all that the file has."""

    file: str  # in results/cpu
    title: str  # of the case
    measured: str
    compared: str = "plain PyTorch"
    rivals: Sequence[str] | None = None


_APNB_CASE = (
    "nonlocal_vs_apnb_96x96",
    "96 x 96, C = 2048, C^ = 256, forward",
    "`APNB`, 2048 x 96 x 96",
)
SHOWN = (
    Shown(*_APNB_CASE, "the non-local block it replaces", ("NB as released",)),
    Shown(*_APNB_CASE, "the same block in plain PyTorch", APNB),
    Shown(
        "neighborhood_attention",
        "neighborhood_attention 5 x 5, dilation 6, zeros, 1 x 256 x 128 x 128, forward + backward",
        "`neighborhood_attention`, 5 x 5, dilation 6, forward + backward",
    ),
    Shown(
        "criss_cross_attention",
        "criss_cross_attention, 1 x 512 x 97 x 97, forward",
        "`criss_cross_attention`, 512 x 97 x 97",
    ),
    Shown(
        "neighborhood_attention_windows",
        "neighborhood_attention 3 x 3, dilation 1, zeros, 1 x 256 x 128 x 128, forward",
        "`neighborhood_attention`, 3 x 3",
    ),
)


def read_cases(path: Path) -> dict[str, dict]:
    """The cases of a file by their titles; none in a file of another kind."""
    cases = json.loads(path.read_text()).get("cases", [])
    return {case["title"]: case for case in cases}


def ratio(case: dict, memory_format: str, rivals: Sequence[str] | None) -> tuple[str, str]:
    """It, and the rival's name; dashes where one of the two was not measured."""
    rows = [
        r for r in case["rows"] if r["format"] == memory_format and r.get("median_ms") is not None
    ]
    ours = [row for row in rows if row["ours"]]
    others = [r for r in rows if not r["ours"] and (rivals is None or r["name"] in rivals)]
    if not ours or not others:
        return "-", "-"
    best = min(others, key=lambda row: row["median_ms"])
    times = best["median_ms"] / ours[0]["median_ms"]
    digits = 2 if times < 1 else 1 if times < 10 else 0
    return f"{times:.{digits}f} x", best["name"]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def readme_table() -> str:
    lines = []
    for shown in SHOWN:
        case = read_cases(RESULTS / "cpu" / f"{shown.file}.json")[shown.title]
        ratios = [ratio(case, memory_format, shown.rivals)[0] for memory_format in FORMATS]
        link = f"[json](benchmarks/results/cpu/{shown.file}.json)"
        lines.append((shown.measured, shown.compared, *ratios, link))
    return table(("float32, forward", "compared with", *FORMATS, "file"), lines)


def page() -> str:
    parts = ["# Speeds on two CPU cores", INTRODUCTION]
    for path in sorted(RESULTS.glob("cpu*/*.json")):
        rivals = APNB if path.stem.startswith("nonlocal_vs_apnb") else None
        lines = [
            (title, *(" ".join(ratio(case, f, rivals)) for f in FORMATS))
            for title, case in read_cases(path).items()
        ]
        if not lines:
            continue
        file = path.relative_to(RESULTS)
        parts.append(f"## [{file.with_suffix('')}](../benchmarks/results/{file})")
        parts.append(table(("case", *FORMATS), lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every case of every file, as a page")
    print(page() if parser.parse_args().all else readme_table())


if __name__ == "__main__":
    main()
