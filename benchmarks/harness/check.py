# SPDX-License-Identifier: Apache-2.0
"""Equal results first: every row of a case is run and compared before any is timed."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ctxops
from harness.case import Case, Contender, Function, Oracle, Runner, as_format
from harness.machine import available_memory
from harness.meters import NEEDS_NO_WARM_UP, Tensors, observe_memory, storage_bytes

# The largest relative L2 error, for outputs and for gradients. A wrong operator is off by 0.1 to 1.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}
# The same for the gradients of a case that is kinked.
KINKED = 1e-2
# Elements that are compared at a time: their float64 forms stay in the cache.
_TOGETHER = 2**18
# Of the memory that is free, what a call may take; the float64 run is a convenience.
_USABLE, _USABLE_BY_ORACLE = 0.9, 0.5


class MismatchError(Exception):
    """Two rows that should agree do not; the message says by how much."""


@dataclasses.dataclass
class Entry:
    """A contender that has passed the check, with what the check learnt; or one that did not run.

    ``error``: relative L2 error of the output against ``against``. ``flops``: 2 per
    multiply-accumulate of convolutions and matrix products, as executed. ``memory``: bytes that a
    call holds at most beyond inputs and results. ``seconds``: of a call of the check, which is a
    sample of the row's time if ``warm``. ``needs``: bytes beyond the inputs that a call needs and
    the machine has not. ``left_out``: why the row does not run in this memory format.
    """

    contender: Contender
    runner: Runner | None = None
    error: float | None = None
    against: str = ""
    flops: int = 0
    traffic: int = 0
    memory: int | None = None
    seconds: float = 0.0
    warm: bool = False
    needs: int | None = None
    left_out: str = ""


class _Truth(NamedTuple):
    """What rows are compared with, at some positions of the map or (None) at all of them."""

    name: str
    runner: Runner
    results: Tensors
    positions: Tensor | None = None

    def at_positions(self, results: Tensors) -> Tensors:
        if self.positions is None:
            return results
        return tuple(x.flatten(2)[..., self.positions] for x in results)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """``||result - expected|| / ||expected||`` over all elements, in float64."""
    norm = torch.linalg.vector_norm
    dim = max(result.ndim - 2, 0)  # rows of a map, whose elements lie together in either format
    parts = max(1, -(-result.numel() // _TOGETHER))
    norms = [
        (norm(each - exact), norm(exact))
        for each, exact in zip(
            torch.atleast_1d(result).chunk(parts, dim),
            (x.double() for x in torch.atleast_1d(expected).chunk(parts, dim)),
            strict=True,
        )
    ]
    difference, size = (norm(torch.stack(each)).item() for each in zip(*norms, strict=True))
    return difference / (size if size > 0 else 1.0)


def flop_counter() -> FlopCounterMode:
    """Of products, at 2 per multiply-accumulate, those of ctxops included."""
    return FlopCounterMode(display=False, custom_mapping=ctxops.flop_formulas)


def check_case(case: Case, device: torch.device, dtype: torch.dtype) -> list[Entry]:
    """Binds and runs every contender of a case once; raises MismatchError where results differ."""
    return list(check_rows(case, device, dtype))


def check_rows(
    case: Case, device: torch.device, dtype: torch.dtype, long: float = float("inf")
) -> Iterator[Entry]:
    """The entries of a case, each as soon as its contender has been run and compared.

    Of a contender whose call takes longer than ``long`` seconds in the format that is the faster
    one in ``case.probe``, the other format is left out; where ``long`` is finite, also that of a
    contender to be compiled whose uncompiled form is slower in it: a compilation takes longer than
    many calls.
    """
    inputs = case.inputs()
    upstream = _upstream(case, device, dtype)
    formatted = {}
    truths: dict[str, list[_Truth]] = {}
    counted: dict[Callable[[], Function], int] = {}
    outputs = len(case.output_shapes)
    probed = _probe(case.probe, device) if case.probe else {}
    long_rows: dict[str, Contender] = {}
    eager: dict[Contender, float] = {}
    for contender in sorted_by_format(case.contenders, probed):
        layout = contender.memory_format
        if layout not in formatted:
            formatted[layout] = [
                tuple(as_format(x, layout) for x in tensors) for tensors in (inputs, upstream)
            ]
        entry = Entry(contender)
        if contender.name in long_rows:
            entry.left_out = _why_left_out(contender, long_rows[contender.name], probed, case)
        elif contender.compile and long < float("inf"):
            entry.left_out = _why_not_compiled(contender, eager)
        if entry.left_out:
            yield entry
            continue
        if contender.peak_bytes > _USABLE * available_memory(device):
            entry.needs = contender.peak_bytes
            yield entry
            continue
        family = truths.setdefault(contender.family, [])
        if not family and contender.family in case.oracles:
            family += _run_oracle(case.oracles[contender.family], inputs, upstream, device)
        try:
            results = _first_run(entry, *formatted[layout], outputs, device, counted)
        except Exception as error:
            entry.runner, entry.left_out = None, why_it_fails(contender, error, device)
            if not entry.left_out:
                raise
            yield entry
            continue
        where = f"{contender.label} at {case.title}"
        errors = [
            _compare(where, truth, results, outputs, entry.runner, case.kinked) for truth in family
        ]
        if errors:
            entry.error, entry.against = errors[0], family[0].name
        if all(truth.positions is not None for truth in family):
            family.append(_Truth(contender.label, entry.runner, results))
        if not contender.compile:
            eager[contender] = entry.seconds
        if entry.seconds > long and contender.label in probed:
            long_rows[contender.name] = contender
        yield entry


def why_it_fails(contender: Contender, error: Exception, device: torch.device) -> str:
    """Why the other rows are measured nevertheless, or nothing: then the error is ours.

    On a GPU a rival may ask for a backend, a package or memory that is not there."""
    if contender.ours:
        return ""
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return "torch cannot compile it here"
    if device.type == "cpu":
        return ""
    said = str(error).strip().partition("\n")[0]
    return f"it fails here with {type(error).__name__}: {said}"


def sorted_by_format(
    contenders: tuple[Contender, ...], probed: dict[str, float]
) -> list[Contender]:
    """The contenders in their order, but each in the format first that was faster in the probe."""
    names = list(dict.fromkeys(c.name for c in contenders))
    return sorted(contenders, key=lambda c: (names.index(c.name), probed.get(c.label, 0.0)))


@functools.cache
def _probe(build: Callable[[], Case], device: torch.device) -> dict[str, float]:
    """Seconds of a call of every contender that has two formats, by label.

    Cases with one probe share its seconds. What torch compiles is probed uncompiled: to compile
    takes longer than the probe.
    """
    case = build()
    inputs = case.inputs()
    probed: dict[tuple[Callable[[], Function], torch.memory_format], float] = {}
    for contender in case.contenders:
        layout = contender.memory_format
        key = contender.build, layout
        if key not in probed:
            formatted = tuple(as_format(x, layout) for x in inputs)
            runner = Runner(_build(contender, device), formatted, ())
            try:
                runner()
            except Exception as error:
                if not why_it_fails(contender, error, device):
                    raise
                continue
            probed[key] = min(_timed(runner, device)[0] for _ in range(2))
    names = [contender.name for contender in case.contenders]
    return {
        c.label: probed[c.build, c.memory_format]
        for c in case.contenders
        if names.count(c.name) > 1 and (c.build, c.memory_format) in probed
    }


def _why_left_out(
    contender: Contender, faster: Contender, probed: dict[str, float], case: Case
) -> str:
    ratio = probed[contender.label] / probed[faster.label]
    return f"{ratio:.2f} x as slow as {faster.format_name} in a probe at {case.probe().title}"


def _why_not_compiled(contender: Contender, eager: dict[Contender, float]) -> str:
    """Nothing, unless what the contender compiles was faster in another memory format."""
    forms = {row.memory_format: row for row in eager if row.build == contender.build}
    faster = min(forms.values(), key=eager.get, default=None)
    here = forms.get(contender.memory_format, faster)
    if here is faster:
        return ""
    ratio = eager[here] / eager[faster]
    return f"uncompiled it is {ratio:.2f} x as slow as {faster.format_name}"


def _timed(runner: Runner, device: torch.device) -> tuple[float, Tensors]:
    start = time.perf_counter()
    results = runner()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, results


def _upstream(case: Case, device: torch.device, dtype: torch.dtype) -> Tensors:
    if not case.backward:
        return ()
    generator = torch.Generator().manual_seed(1)
    shapes = case.output_shapes
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def _build(contender: Contender, device: torch.device) -> Function:
    function = contender.build()
    if isinstance(function, nn.Module):
        function = function.to(device).to(memory_format=contender.memory_format)
    return function


def _first_run(
    entry: Entry,
    inputs: Tensors,
    upstream: Tensors,
    outputs: int,
    device: torch.device,
    counted: dict[Callable[[], Function], int],
) -> Tensors:
    """Builds the contender; counts its FLOPs, its memory and the bytes that it has to move.

    ``counted``: FLOPs of what has been built, which memory format and compilation do not change.
    """
    contender = entry.contender
    entry.runner = runner = Runner(_build(contender, device), inputs, upstream)
    flops = contender.flops if contender.flops is not None else counted.get(contender.build)
    if contender.compile:  # it may have no uncompiled form
        if flops is None:
            with flop_counter() as counter:
                runner()
            flops = counter.get_total_flops()
        runner.compile()
        runner()
    with flop_counter() if flops is None else contextlib.nullcontext() as counter:
        results = _observe(entry, device)
    entry.flops = counter.get_total_flops() if flops is None else flops
    counted[contender.build] = entry.flops
    # A kernel that is compiled at its first call may well take as long there.
    entry.warm = device.type == "cpu" and not upstream and entry.seconds > NEEDS_NO_WARM_UP
    if not entry.warm:
        del results
        results = _observe(entry, device)
    output_bytes = storage_bytes(results[:outputs])
    entry.traffic = runner.traffic(output_bytes) if contender.traffic is None else contender.traffic
    return results


def _observe(entry: Entry, device: torch.device) -> Tensors:
    """Calls the entry's function; notes its memory and its seconds."""

    def call() -> Tensors:
        entry.seconds, results = _timed(entry.runner, device)
        return results

    entry.memory, results = observe_memory(call, device)
    return results


def _run_oracle(
    oracle: Oracle, inputs: Tensors, upstream: Tensors, device: torch.device
) -> list[_Truth]:
    """The oracle's results, where it has room."""
    if oracle.peak_bytes > _USABLE_BY_ORACLE * available_memory(device):
        return []
    function = oracle.build()
    if isinstance(function, nn.Module):
        function = function.to(device)
    doubled = tuple(x.double() for x in inputs)
    runner = Runner(function, doubled, tuple(x.double() for x in upstream))
    return [_Truth("float64", runner, runner(), oracle.positions)]


def _compare(
    where: str, truth: _Truth, results: Tensors, outputs: int, runner: Runner, kinked: bool
) -> float:
    """The largest relative error of an output, once those of the gradients are allowed as well.

    The gradients of all parameters are compared as one vector: some are exactly zero, but for
    rounding, such as that of a bias before batch norm.
    """
    against, reference, expected, _ = truth
    results = truth.at_positions(results)
    with_gradients = len(results) > outputs
    if with_gradients and runner.parameter_names != reference.parameter_names:
        raise MismatchError(
            f"{where} has the parameters {runner.parameter_names}, "
            f"{against} has {reference.parameter_names}"
        )
    count = outputs + len(runner.inputs) if with_gradients else outputs
    names = ["output"] if outputs == 1 else [f"output {i}" for i in range(outputs)]
    names += [f"gradient of input {i}" for i in range(count - outputs)]
    pairs = list(zip(results[:count], expected[:count], strict=True))
    if len(results) > count:
        names.append("gradient of the parameters")
        pairs.append((_one_vector(results[count:]), _one_vector(expected[count:])))
    tolerance = TOLERANCES[results[0].dtype]
    errors = []
    for name, (result, exact) in zip(names, pairs, strict=True):
        if result.shape != exact.shape:
            raise MismatchError(
                f"{where}: {name} has shape {tuple(result.shape)}, {against} {tuple(exact.shape)}"
            )
        errors.append(relative_error(result, exact))
        allowed = tolerance
        if kinked and name.startswith("gradient"):
            allowed = max(tolerance, KINKED)
        if not errors[-1] <= allowed:
            raise MismatchError(
                f"{where}: {name} differs from {against}: relative error {errors[-1]:.3g}, "
                f"allowed {allowed:.3g}"
            )
    return max(errors[:outputs])


def _one_vector(tensors: Tensors) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
