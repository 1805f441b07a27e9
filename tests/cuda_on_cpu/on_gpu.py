# SPDX-License-Identifier: Apache-2.0
"""The programs that run the CUDA kernels on the host, built for the GPU and run on it.

    python tests/cuda_on_cpu/on_gpu.py                     # values against the reference
    python tests/cuda_on_cpu/on_gpu.py memcheck racecheck synccheck

They need nvcc and no torch, so that a tool of compute-sanitizer takes minutes. initcheck is none of
them: what nobody wrote is filled with NaN, which the values show.
"""

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_on_cpu.test_cuda_on_cpu import CSRC, HERE, NVCC, PROGRAMS, WATCHED

TOOLS = ("memcheck", "racecheck", "synccheck")
FLAGS = ["-std=c++17", "-O1", "-lineinfo", f"-I{CSRC}", f"-I{HERE}", "-DCTXOPS_ISA=baseline"]


def build(program: str, folder: Path, arch: str = "native") -> Path:
    """Whatever is no .cu file is compiled by the host's compiler alone."""
    built = folder / program
    sources = [str(source) for source in PROGRAMS[program]]
    subprocess.run([NVCC, *FLAGS, f"-arch={arch}", *sources, "-o", built], check=True)
    return built


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}")
    tools = parser.parse_args().tools
    if NVCC is None:
        print("needs nvcc: put it on PATH or set CUDACXX", file=sys.stderr)
        return 1
    failed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        all_built = pool.map(lambda program: build(program, Path(folder)), WATCHED)
        for (program, cases), built in zip(WATCHED.items(), all_built, strict=True):
            for dtype in ("float32", "float16"):
                for _, *others in cases:
                    arguments = [dtype, *others]
                    for tool in tools or [""]:
                        sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool", tool]
                        run = subprocess.run(
                            [*(sanitizer if tool else []), built, *arguments],
                            stdout=subprocess.PIPE, text=True,
                        )  # fmt: skip
                        if run.returncode != 0:
                            failed += 1
                            print(f"{program} {' '.join(arguments)} {tool}:\n{run.stdout[-4000:]}")
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
