# SPDX-License-Identifier: Apache-2.0
"""What every CUDA kernel takes of a multiprocessor, as ptxas says, and how it is launched.

    python tests/build/resources.py > docs/kernels.md
    python tests/build/resources.py --all                  # every instantiation by itself

It finds the kernels by itself: all of csrc/*/*_cuda.cu. ``test_resources.py`` holds them to the
page, and ``test_launches.py`` their launches.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("csrc/*/*_cuda.cu"))
ARCHS = (80, 90)
# Of the first of these dtypes that the arguments of a kernel's template name.
DTYPES = {
    "float64": r"\bdouble\b",
    "half": r"\b(BFloat16|Half)\b",
    "float32": r"\bfloat\b",
}

HEADER = """\
# CUDA kernels

What each kernel takes of a multiprocessor, as `ptxas` of nvcc {version} says. This command writes
the page, and with `--all` prints every instantiation:

```
python tests/build/resources.py > docs/kernels.md
```

Of every operator the first table has its kernels. A row is the largest of each figure over the
instantiations of a kernel for a dtype. Half is float16 and bfloat16. Where a kernel has the
accumulator as its only dtype, float32 serves half precision too. Two figures with a slash are those
of sm_80 and of sm_90. Spills are bytes of stores + loads, shared memory is the static part. A test
fails where a kernel needs more registers than its row says, or spills more.

The second table has what is launched at the papers' shapes, those of `benchmarks/operators.py`. A
test holds it to the operators. Without a GPU it tells what no measurement is needed for:

- MB and GFLOP of all launches of a pass are the benchmark's: every input is read once, every output
  is written once, and only products count. The roofline is the least time for them on an H200, with
  4.8 TB/s and 67 TFLOP/s. So many its float32 units have; no kernel here uses tensor cores.
- Maps are contiguous or channels_last. Any: the launches are the same, after a copy of what is not
  channels_last. What torch launches for copies and sums is not in the table.
- A number before a kernel says how often it is launched in a row. Shared is the dynamic part, in
  bytes.
- Resident are the blocks that a multiprocessor of sm_80 / sm_90 holds at once, as registers,
  threads and shared memory allow. Waves are the blocks over all that the 132 multiprocessors of an
  H200 hold at once.
"""
COLUMNS = ("kernel", "dtype", "forms", "registers", "spills", "shared bytes", "stack bytes")
LAUNCH_COLUMNS = (
    "case", "dtype", "maps", "pass", "MB", "GFLOP", "roofline us", "kernel", "blocks", "threads",
    "shared", "resident", "waves",
)  # fmt: skip

# Bytes of shared memory of a multiprocessor. All have 65536 registers in four parts, and place for
# 64 warps and 32 blocks.
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
MULTIPROCESSORS = 132


class Kernel(NamedTuple):
    """An instantiation of a kernel on an architecture; all but registers in bytes."""

    operator: str
    name: str  # with the arguments of its template
    arch: int
    registers: int
    stores: int
    loads: int
    shared: int
    stack: int

    @property
    def template(self) -> str:
        return self.name.partition("<")[0]

    @property
    def dtype(self) -> str:
        arguments = self.name.partition("<")[2]
        return next((d for d, pattern in DTYPES.items() if re.search(pattern, arguments)), "any")

    @property
    def row(self) -> tuple[str, str, str]:
        return self.operator, self.template, self.dtype


def find_nvcc() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def nvcc_version() -> str:
    said = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release ([\d.]+)", said.stdout)[1]


def compile_kernels(source: Path, archs: Sequence[int] = ARCHS) -> list[Kernel]:
    """As CMakeLists.txt has it compiled: all machine code from the oldest architecture's PTX."""
    codes = ",".join(f"sm_{arch}" for arch in archs)
    command = [find_nvcc(), "-std=c++17", "-O1", "-DNDEBUG", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"]
    command.append(f"--generate-code=arch=compute_{ARCHS[0]},code=[{codes}]")
    with tempfile.TemporaryDirectory() as folder:
        command += ["-c", str(source), "-o", f"{folder}/kernels.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
    return parse(source.parent.name, done.stdout + done.stderr)


def parse(operator: str, said: str) -> list[Kernel]:
    """The kernels in what ``ptxas -v`` says."""
    parts = re.split(r"Compiling entry function '([^']+)' for 'sm_(\d+)\w*'", said)[1:]
    names = _demangle(parts[::3])
    kernels = []
    for name, arch, text in zip(names, parts[1::3], parts[2::3], strict=True):

        def figure(pattern: str, text: str = text) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        kernels.append(
            Kernel(
                operator,
                name,
                int(arch),
                figure(r"Used (\d+) registers"),
                figure(r"(\d+) bytes spill stores"),
                figure(r"(\d+) bytes spill loads"),
                figure(r"(\d+) bytes smem"),
                figure(r"(\d+) bytes stack frame"),
            )
        )
    assert all(kernel.registers for kernel in kernels), "ptxas prints something else now"
    return kernels


def _demangle(names: Sequence[str]) -> list[str]:
    """Without result, namespaces and parameters: `bins_kernel<float, (Mode)0, 4>`."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    plain = re.sub(r"\(anonymous namespace\)::|\w+::", "", done.stdout)
    return [re.sub(r"^void |\([^()]*\)$", "", line) for line in plain.splitlines()]


def rows(kernels: Iterable[Kernel]) -> dict[tuple[str, str, str], list[Kernel]]:
    """The instantiations of every row of the page."""
    found: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in sorted(kernels, key=lambda kernel: (*kernel.row, kernel)):
        found.setdefault(kernel.row, []).append(kernel)
    return found


def resident_blocks(kernel: Kernel, threads: int, shared: int) -> int:
    """How many blocks a multiprocessor holds at once; ``shared`` is a launch's dynamic part."""
    warps = -(-threads // 32)
    # Registers are given out by 256 to a warp, which lies in one part; shared memory by 128 bytes,
    # and CUDA takes 1 KiB of it for every block.
    warps_of_part = 65536 // 4 // (-(-kernel.registers * 32 // 256) * 256)
    bytes_of_block = -(-(kernel.shared + shared + 1024) // 128) * 128
    by_registers = 4 * warps_of_part // warps
    return min(by_registers, SHARED_BYTES[kernel.arch] // bytes_of_block, 64 // warps, 32)


def _occupancy(row: Sequence[str], kernels: Sequence[Kernel]) -> tuple[str, str]:
    """The last columns of a row of launches."""
    name, (blocks, threads, shared) = row[-4].split("`")[1], map(int, row[-3:])
    resident = [
        resident_blocks(
            next(k for k in kernels if (k.name, k.arch) == (name, arch)), threads, shared
        )
        for arch in ARCHS
    ]
    waves = blocks / (MULTIPROCESSORS * resident[-1])
    return " / ".join(map(str, resident)), f"{waves:.2f}"


def page(
    kernels: Sequence[Kernel], launches: Mapping[str, Sequence[Sequence[str]]], version: str
) -> str:
    """``launches``: of every operator the rows of its second table, without the last columns."""
    found = rows(kernels)
    lines = [HEADER.format(version=version)]
    for operator in dict.fromkeys(operator for operator, _, _ in found):
        lines += [f"## {operator}\n", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        for (owner, template, dtype), forms in found.items():
            if owner == operator:
                lines.append(_line([f"`{template}`", dtype, *_figures(forms)]))
        lines += ["", _line(LAUNCH_COLUMNS), _line(["---"] * len(LAUNCH_COLUMNS))]
        own = [k for k in kernels if k.operator == operator]
        lines += [_line([*row, *_occupancy(row, own)]) for row in launches.get(operator, ())]
        lines.append("")
    return "\n".join(lines)


def _figures(forms: Sequence[Kernel]) -> list[str]:
    of_archs = [[k for k in forms if k.arch == arch] for arch in ARCHS]

    def worst(*fields: str) -> str:
        maxima = [[max(getattr(k, f) for k in kernels) for f in fields] for kernels in of_archs]
        return " / ".join(" + ".join(map(str, each)) for each in maxima)

    count = str(len(of_archs[0]))
    return [count, worst("registers"), worst("stores", "loads"), worst("shared"), worst("stack")]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def limits(text: str, arch: int) -> dict[tuple[str, str, str], tuple[int, int, int]]:
    """Registers, spill stores and loads of every row of a page."""
    at, operator, found = ARCHS.index(arch), "", {}
    for line in text.splitlines():
        if line.startswith("## "):
            operator = line[3:]
        if line.startswith("| `"):
            template, dtype, _, registers, spills, *_ = (x.strip() for x in line[1:-1].split("|"))
            here = [cell.split(" / ")[at] for cell in (registers, spills)]
            figures = tuple(int(x) for cell in here for x in cell.split(" + "))
            found[operator, template.strip("`"), dtype] = figures
    return found


def main(arguments: Sequence[str]) -> int:
    if find_nvcc() is None:
        print("needs nvcc: put it on PATH or set CUDACXX", file=sys.stderr)
        return 1
    kernels = [kernel for source in SOURCES for kernel in compile_kernels(source)]
    if "--all" in arguments:
        for k in kernels:
            print(
                f"{k.operator} {k.name} sm_{k.arch}: {k.registers} registers, spills {k.stores} + "
                f"{k.loads}, {k.shared} bytes shared, stack {k.stack}"
            )
    else:
        sys.path.append(str(ROOT / "benchmarks"))
        from launches import record, rows_of  # here, as they need torch and our extension

        print(page(kernels, rows_of(record()), nvcc_version()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
