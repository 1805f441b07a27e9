# SPDX-License-Identifier: Apache-2.0
"""What every operator launches on a GPU at the papers' shapes, and what that has to move at least.

The operators run on tensors without memory, as on a GPU. What they would hand to their kernels goes
to launches.cpp, which is linked with the kernels' host code.
"""

import contextlib
import importlib
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import operators as benchmarks
from ctxops import _operator
from harness.case import FORMAT_NAMES, Case, Runner, as_format
from harness.check import flop_counter
from harness.machine import Roofline
from harness.measure import Effort, Options

ROOT = Path(__file__).parents[2]
GXX = shutil.which("g++")
DTYPES = (torch.float32, torch.bfloat16)
# An H200's, as its data sheet has it for float32: no kernel here uses tensor cores.
H200 = Roofline(4.8e12, 67e12, "float32")


class Shapes(NamedTuple):
    """Cases of a benchmark: at a shape, by default its own, those whose title has the text."""

    benchmark: str
    shape: tuple[int, ...] = ()
    title: str = ""
    windows: tuple[tuple[int, int], ...] = ()  # of neighborhood_attention


# By the folder of the operator.
SHAPES = {
    "category_statistics": [
        Shapes("category_statistics", title=f"{classes} classes, labels 512 x 1024, 2 x 512 x ")
        for classes in (19, 150)
    ],
    "gated_fusion": [Shapes("self_gated_fusion")],
    "neighborhood_attention": [
        Shapes("neighborhood_attention"),
        Shapes("neighborhood_attention", (8, 64, 97, 97), windows=((5, 6),)),
    ],
    "pyramid_pool": [
        Shapes("pyramid_pool", title="avg"),
        Shapes("pyramid_pool", (1, 64, 96, 96), title="avg"),
    ],
}


class Launch(NamedTuple):
    """``kernel``: with the arguments of its template. ``shared``: bytes beside the static ones."""

    kernel: str
    blocks: int
    threads: int
    shared: int


class Pass(NamedTuple):
    """The forward or the backward of a case. ``layout``: the memory format of its maps; "any" where
    it changes nothing. ``flops`` and ``traffic`` are the benchmark's: those of products, at 2 per
    multiply-accumulate, and bytes that have to move once."""

    operator: str
    case: str
    name: str
    dtype: str
    layout: str
    flops: int
    traffic: int
    launches: tuple[Launch, ...]

    @property
    def seconds(self) -> float:
        """No kernels take less time on an H200."""
        return H200.seconds(self.flops, self.traffic)


class _Work(NamedTuple):
    """What a case of a benchmark does."""

    flops: int
    traffic: int
    launches: tuple[Launch, ...]

    def behind(self, forward: "_Work") -> "_Work":
        """What it does behind the forward."""
        count = len(forward.launches)
        assert self.launches[:count] == forward.launches, "with gradients the forward is another"
        flops, traffic = self.flops - forward.flops, self.traffic - forward.traffic
        return _Work(flops, traffic, self.launches[count:])


class _Kernels(TorchDispatchMode):
    """Runs the kernels of registered operators, which tensors without memory would pass over."""

    def __init__(self) -> None:
        super().__init__()
        modules = [importlib.import_module(f"ctxops.ops.{operator}.op") for operator in SHAPES]
        names = {"_FORWARD": "_forward", "_BACKWARD": "_backward", "_STATISTICS": "_statistics"}
        self.kernels = {
            getattr(module, operator).overload: getattr(module, kernel)
            for module in modules
            for operator, kernel in names.items()
            if hasattr(module, operator)
        }

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        return self.kernels.get(function, function)(*arguments, **(named or {}))


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[list[str]]:
    """The calls of kernel entries while the context is open, as launches.cpp reads them."""
    calls = []

    def launch(kernel: str, like: Tensor, /, **members: object) -> None:
        calls.append("\n".join([kernel, *(f"{n} {_words(x)}" for n, x in members.items()), "", ""]))

    with (
        mock.patch.object(_operator, "launch", launch),
        mock.patch.object(_operator.Operator, "serves", return_value=True),
        mock.patch.object(FakeTensor, "is_cuda", True),
        FakeTensorMode(),
        _Kernels(),
    ):
        yield calls


def _words(member: object) -> str:
    if isinstance(member, Tensor):
        start = member.storage_offset() * member.itemsize
        dtype = str(member.dtype).removeprefix("torch.")
        return " ".join(map(str, (dtype, start, member.ndim, *member.shape, *member.stride())))
    if isinstance(member, (list, tuple)):
        return " ".join([str(len(member)), *map(_words, member)])
    return str(int(member)) if isinstance(member, bool) else str(member)


def build(folder: Path) -> Path:
    """The program of launches.cpp."""
    here, program = Path(__file__).parent, folder / "launches"
    command = [GXX, "-std=c++20", "-O0", "-DCTXOPS_CUDA_ON_CPU", f"-I{ROOT / 'csrc'}", f"-I{here}"]
    command += [f"-I{ROOT / 'tests' / 'cuda_on_cpu'}", "-include", "launches.h"]
    sources = [here / "launches.cpp", *ROOT.glob("csrc/*/*_cuda.cu")]
    objects = [folder / f"{source.name}.o" for source in sources]

    def run(*command: object) -> None:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)

    with ThreadPoolExecutor(2) as pool:
        jobs = zip(sources, objects, strict=True)
        list(pool.map(lambda job: run(*command, "-x", "c++", "-c", job[0], "-o", job[1]), jobs))
    run(GXX, *objects, "-o", program)
    return program


def _launches(program: Path, calls: Sequence[str]) -> tuple[Launch, ...]:
    done = subprocess.run([program], input="".join(calls), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    lines = (line.split(maxsplit=3) for line in done.stdout.splitlines() if line)
    return tuple(Launch(_plain(name), *map(int, figures)) for *figures, name in lines)


def _plain(name: str) -> str:
    """`launches::Kernel<&(void ctxops::cuda::f<float>(...))>`: `f<float>`"""
    without = re.sub(r"\(anonymous namespace\)::|\w+::", "", name)
    without = without.removeprefix("Kernel<&").removesuffix(">")
    return re.sub(r"^\(void |\([^()]*\)\)$", "", without)


def _cases(shapes: Shapes, dtype: torch.dtype) -> list[Case]:
    benchmark = benchmarks.OPERATORS[shapes.benchmark]
    options = Options(torch.device("cpu"), dtype, Effort())
    more = {"windows": shapes.windows} if shapes.windows else {}
    cases = benchmark.cases(shapes.shape or benchmark.shape, options, **more)
    return [case for case in cases if shapes.title in case.title and "shift" not in case.title]


def _record(program: Path, case: Case, layout: torch.memory_format) -> _Work:
    ours = next(c for c in case.contenders if c.ours and c.memory_format == layout)
    with _as_on_a_gpu() as calls:
        function, inputs = ours.build(), tuple(as_format(x, layout) for x in case.inputs())
        outputs = Runner(function, inputs, ())()
        # What follows hands its gradients back in the memory format of the outputs.
        upstream = tuple(torch.empty_like(y) for y in outputs) if case.backward else ()
        runner = Runner(function, inputs, upstream)
        calls.clear()
        with flop_counter() as counter:
            runner()
        traffic = ours.traffic or runner.traffic(sum(y.nbytes for y in outputs))
    flops = counter.get_total_flops() if ours.flops is None else ours.flops
    return _Work(flops, traffic, _launches(program, calls))


def record() -> list[Pass]:
    """The passes of all shapes, dtypes and memory formats."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        return [
            each
            for operator in SHAPES
            for shapes, dtype in itertools.product(SHAPES[operator], DTYPES)
            for each in _passes(program, operator, shapes, dtype)
        ]


def _passes(program: Path, operator: str, shapes: Shapes, dtype: torch.dtype) -> list[Pass]:
    passes, forward = [], {}
    for case in _cases(shapes, dtype):
        works = {name: _record(program, case, layout) for layout, name in FORMAT_NAMES.items()}
        if case.backward:  # behind the case of its forward
            works = {name: work.behind(forward[name]) for name, work in works.items()}
        else:
            forward = works
        if len(set(works.values())) == 1:
            works = {"any": works["contiguous"]}
        title = case.title.removeprefix(shapes.benchmark).rpartition(", ")[0].lstrip(", ")
        name = "backward" if case.backward else "forward"
        passes += [
            Pass(operator, title, name, str(dtype).removeprefix("torch."), layout, *work)
            for layout, work in works.items()
        ]
    return passes


def rows_of(passes: Sequence[Pass]) -> dict[str, list[tuple[str, ...]]]:
    """Of every operator the rows of its launches on the page, without what depends on ptxas."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for each in passes:
        rows = found.setdefault(each.operator, [])
        figures = (f"{each.traffic / 1e6:.2f}", f"{each.flops / 1e9:.3f}")
        figures += (f"{each.seconds * 1e6:.1f}",)
        for launch, group in itertools.groupby(each.launches):
            count = len(list(group))
            kernel = f"{count} x `{launch.kernel}`" if count > 1 else f"`{launch.kernel}`"
            names = (each.case, each.dtype, each.layout, each.name)
            rows.append((*names, *figures, kernel, *map(str, launch[1:])))
            figures = ("", "", "")  # they are the pass's, not the kernel's
    return found
