# SPDX-License-Identifier: Apache-2.0
"""Leaves out every barrier of the CUDA kernels, one at a time, and prints what notices it.

    python tests/cuda_on_cpu/barriers.py [operator ...]

"values": a program's own checks fail, or it waits in vain. "races": the thread sanitizer reports.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_on_cpu.test_cuda_on_cpu import (
    PROGRAMS,
    RACE,
    RACES,
    SANITIZE,
    WATCHED,
    compile_program,
    execute,
)

BARRIER = re.compile(r"__sync(threads|warp)\(\);|\w+\.sync\(\);")
# Takes the place of a barrier: it is there but on the line that the environment names.
LINE = "CTXOPS_WITHOUT_LINE"
PREAMBLE = f"""\
#include <cstdlib>
static const int left_out = std::atoi(std::getenv("{LINE}"));
#line 1
"""
# Beyond WATCHED, where each of several teams has several positions.
VALUES = WATCHED | {"gated_fusion": [*WATCHED["gated_fusion"], ("float32", "many", "given")]}


def prepare(operator: str, folder: Path, sanitize: list[str]) -> Path:
    """The program of an operator whose barriers can be left out."""
    program, cuda, *others = PROGRAMS[operator]
    copy = folder / cuda.name
    keep = r"if (left_out != __LINE__) { \g<0> }"
    copy.write_text(PREAMBLE + BARRIER.sub(keep, cuda.read_text()))
    path = folder / f"{operator}{sanitize[0]}"
    errors = compile_program([program, copy, *others], path, sanitize)
    if errors:
        raise SystemExit(errors)
    return path


def main(chosen: list[str]) -> None:
    print("| barrier | values | races |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for operator in chosen or WATCHED:
            values, races = (prepare(operator, Path(folder), kind) for kind in (SANITIZE, RACES))
            cuda = PROGRAMS[operator][1]
            for number, line in enumerate(cuda.read_text().splitlines(), start=1):
                barrier = BARRIER.search(line)
                if barrier is None:
                    continue
                os.environ[LINE] = str(number)
                wrong = (execute(values, *each).returncode != 0 for each in VALUES[operator])
                race = (execute(races, *each).returncode == RACE for each in WATCHED[operator])
                noticed = " | ".join("yes" if any(each) else "no" for each in (wrong, race))
                print(f"| `{cuda.name}:{number}` `{barrier[0]}` | {noticed} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
