# SPDX-License-Identifier: Apache-2.0
"""What is compared: contenders, the cases that they meet in, and one of them ready to run."""

import dataclasses
import getpass
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

Function = Callable[..., Tensor | tuple[Tensor, ...]]

# What torch reads when it first imports its compiler, which may be before anything is compiled.
# It would build and run a program for each instruction set of this processor, to see whether the
# C++ compiler knows it. That takes seconds.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# It looks its programs up without asking for which instruction set they were generated: one for
# AVX-512, compiled for AVX2, leaves out half of the elements.
if _capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    _folder = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{_capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_folder))

FORMAT_NAMES = {torch.contiguous_format: "contiguous", torch.channels_last: "channels_last"}


@dataclasses.dataclass(frozen=True)
class Paper:
    """The figures that the paper prints for a row."""

    gflops: float
    megabytes: float
    milliseconds: float


@dataclasses.dataclass(frozen=True)
class Contender:
    """One row: a way to compute what the case asks for.

    ``build`` makes the function or module, which takes the case's inputs in ``memory_format``;
    ``compile`` puts it under ``torch.compile``. Rows of one ``family`` must give equal results.
    ``peak_bytes`` predicts the most memory that a call holds beyond its inputs.
    ``flops`` (2 per multiply-accumulate) is None where torch's counter sees every product;
    ``traffic`` (bytes that have to move once) is None where it follows from inputs and outputs.
    """

    name: str
    build: Callable[[], Function]
    peak_bytes: int
    memory_format: torch.memory_format = torch.contiguous_format
    compile: bool = False
    family: str = ""
    ours: bool = False
    flops: int | None = None
    traffic: int | None = None
    paper: Paper | None = None

    @property
    def format_name(self) -> str:
        return FORMAT_NAMES[self.memory_format]

    @property
    def label(self) -> str:
        return f"{self.name} ({self.format_name})"


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The result of a family computed in float64: ``build`` makes a function that takes it.

    With ``positions``, indices into the H * W of the map, the function gives the output
    (B, C, len(positions)) there alone.
    """

    build: Callable[[], Function]
    peak_bytes: int
    positions: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: inputs (contiguous, on the device) and the rows that meet on them.

    The first contender is the eager reference that ratios refer to. A family without an oracle, or
    with one that does not fit into memory, is compared with its first row. Functions that return
    several tensors have a shape for each of them.

    ``probe`` makes a small case with the same rows, which tells the faster of two memory formats:
    a row that is slow runs in that one alone.

    ``kinked``: two ways to round a sum may lie on either side of the kink of a ReLU, which one
    gradient in a million then does not reach: the check allows the gradients more. What calls for
    it compares them in float64 itself.
    """

    title: str
    inputs: Callable[[], tuple[Tensor, ...]]
    output_shape: tuple[int, ...] | tuple[tuple[int, ...], ...]
    contenders: tuple[Contender, ...]
    oracles: Mapping[str, Oracle] = dataclasses.field(default_factory=dict)
    backward: bool = False
    probe: Callable[[], "Case"] | None = None
    kinked: bool = False

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        one = isinstance(self.output_shape[0], int)
        return (self.output_shape,) if one else self.output_shape


def both_formats(*contenders: Contender) -> tuple[Contender, ...]:
    """Each contender on contiguous and on channels_last maps."""
    return tuple(
        dataclasses.replace(contender, memory_format=layout)
        for contender in contenders
        for layout in FORMAT_NAMES
    )


class Rival(NamedTuple):
    """A way to compute an operator in plain torch: a row as it is, and one under torch.compile.

    ``peak_bytes``: where they are not those of the comparison. ``backward``: is there one?
    """

    name: str
    build: Callable[[], Function]
    eager: bool = True
    compiled: bool = True
    peak_bytes: Sequence[int] | None = None
    backward: bool = True


def compare(
    name: str,
    shape: Sequence[int],
    ours: Function,
    rivals: Sequence[Rival],
    inputs: Callable[[], tuple[Tensor, ...]],
    output_shape: tuple[int, ...] | tuple[tuple[int, ...], ...],
    *,
    peak_bytes: Sequence[int],
    traffic: Sequence[int] | None = None,
    flops: Sequence[int] | None = None,
) -> list[Case]:
    """An operator against its rivals in both memory formats: a case of the forward, and one of
    forward and backward where ``peak_bytes`` has two numbers.

    ``name`` and ``shape`` are the title. The numbers are those of Contender: of the forward, and of
    forward and backward.
    """

    def case(backward: bool) -> Case:
        counts = {"traffic": traffic and traffic[backward], "flops": flops and flops[backward]}
        rows: list[Contender] = []
        for rival in rivals:
            if rival.backward or not backward:
                peak = (rival.peak_bytes or peak_bytes)[backward]
                row = Contender(rival.name, rival.build, peak, **counts)
                compiled = dataclasses.replace(row, name=f"{rival.name} compiled", compile=True)
                rows += [row] * rival.eager + [compiled] * rival.compiled
        rows.append(Contender("ctxops", lambda: ours, peak_bytes[backward], ours=True, **counts))
        passes = "forward + backward" if backward else "forward"
        title = f"{name}, {' x '.join(map(str, shape))}, {passes}"
        return Case(title, inputs, output_shape, both_formats(*rows), backward=backward)

    return [case(backward) for backward in (False, True)[: len(peak_bytes)]]


class Runner:
    """A contender bound to its inputs. A call returns the outputs, and with ``upstream`` also the
    gradients of the inputs, then of the parameters in the order of ``parameter_names``."""

    def __init__(
        self, function: Function, inputs: tuple[Tensor, ...], upstream: tuple[Tensor, ...]
    ) -> None:
        self.function = function
        self.inputs = inputs
        self.upstream = upstream
        named = _named_parameters(function)
        self.parameter_names, self.parameters = tuple(named), tuple(named.values())

    def __call__(self) -> tuple[Tensor, ...]:
        if not self.upstream:
            with torch.no_grad():
                return _as_tuple(self.function(*self.inputs))
        inputs = tuple(x.detach().requires_grad_() for x in self.inputs)
        outputs = _as_tuple(self.function(*inputs))
        torch.autograd.backward(outputs, self.upstream)
        gradients = [leaf.grad for leaf in inputs + self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return *(output.detach() for output in outputs), *gradients

    def compile(self) -> None:
        """From now on the function runs under ``torch.compile``."""
        # Formats, sizes and modules share a code object; each needs its own compiled version.
        torch._dynamo.config.recompile_limit = 256
        self.function = torch.compile(self.function, dynamic=False)

    def traffic(self, output_bytes: int) -> int:
        """Bytes that have to move once, in and out of memory.

        Forward: inputs + parameters + output. Forward and backward: 3 (inputs + parameters) + 2
        output, since the backward reads all of them again and the upstream gradient, and writes the
        gradients.
        """
        read = sum(x.nbytes for x in self.inputs + self.parameters)
        return 3 * read + 2 * output_bytes if self.upstream else read + output_bytes


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _named_parameters(function: Function) -> dict[str, nn.Parameter]:
    """Sorted by name. A shared parameter has the first of its names, in whatever order the module
    registered them."""
    if not isinstance(function, nn.Module):
        return {}
    seen: set[int] = set()
    named = sorted(function.named_parameters(remove_duplicate=False), key=lambda item: item[0])
    return {name: p for name, p in named if not (id(p) in seen or seen.add(id(p)))}


def as_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A map in the memory format; what is no map stays as it is."""
    return x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
