# SPDX-License-Identifier: Apache-2.0
"""What every CUDA kernel takes of a multiprocessor, as ptxas says.

    python tests/build/resources.py > docs/kernels.md
    python tests/build/resources.py --all                  # every instantiation by itself

It finds the kernels by itself: all of csrc/*/*_cuda.cu. ``test_resources.py`` holds them to the
page.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
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

A row is the largest of each figure over the instantiations of a kernel for a dtype. Half is float16
and bfloat16. Where a kernel has the accumulator as its only dtype, float32 serves half precision
too. Two figures with a slash are those of sm_80 and of sm_90. Spills are bytes of stores + loads,
shared memory is the static part. A test fails where a kernel needs more registers than its row
says, or spills more.
"""
COLUMNS = ("kernel", "dtype", "forms", "registers", "spills", "shared bytes", "stack bytes")


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


def page(kernels: Iterable[Kernel], version: str) -> str:
    found = rows(kernels)
    lines = [HEADER.format(version=version)]
    for operator in dict.fromkeys(operator for operator, _, _ in found):
        lines += [f"## {operator}\n", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
        for (owner, template, dtype), forms in found.items():
            if owner == operator:
                lines.append(_line([f"`{template}`", dtype, *_figures(forms)]))
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
        print(page(kernels, nvcc_version()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
