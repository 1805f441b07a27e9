# SPDX-License-Identifier: Apache-2.0
"""Equal results first: every row of a case is run and compared before any is timed."""

import dataclasses

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from harness.contender import Case, Contender, Oracle, Runner, as_format
from harness.memory import available_memory, storage_bytes

# The largest relative L2 error, for outputs and for gradients. A wrong operator is off by 0.1 to 1.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}
# Of the memory that is free, what a call may take; the float64 run is a convenience.
_USABLE, _USABLE_BY_ORACLE = 0.9, 0.5


class MismatchError(Exception):
    """Two rows that should agree do not; the message says by how much."""


@dataclasses.dataclass
class Entry:
    """A contender that has passed the check, with what the check learnt; or one that has no room.

    ``error``: relative L2 error of the output against ``against``. ``flops``: 2 per
    multiply-accumulate of convolutions and matrix products, as executed. ``needs``: bytes beyond
    the inputs that a call needs and the machine has not.
    """

    contender: Contender
    runner: Runner | None = None
    error: float | None = None
    against: str = ""
    flops: int = 0
    traffic: int = 0
    needs: int | None = None


def relative_error(result: Tensor, expected: Tensor) -> float:
    """``||result - expected|| / ||expected||`` over all elements, in float64."""
    norm = torch.linalg.vector_norm
    expected = expected.to(torch.float64)
    size = norm(expected).item()
    return norm(result - expected).item() / (size if size > 0 else 1.0)


def check_case(case: Case, device: torch.device, dtype: torch.dtype) -> list[Entry]:
    """Binds and runs every contender of a case once; raises MismatchError where results differ."""
    inputs = case.inputs()
    upstream = _upstream(case, device, dtype)
    formatted = {}
    references: dict[str, tuple[str, Runner, tuple[Tensor, ...]]] = {}
    entries = []
    for contender in case.contenders:
        layout = contender.memory_format
        if layout not in formatted:
            formatted[layout] = [
                tuple(as_format(x, layout) for x in tensors) for tensors in (inputs, upstream)
            ]
        entry = Entry(contender)
        entries.append(entry)
        if contender.peak_bytes > _USABLE * available_memory(device):
            entry.needs = contender.peak_bytes
            continue
        family = contender.family
        if family not in references and family in case.oracles:
            truth = _run_oracle(case.oracles[family], inputs, upstream, device)
            references |= {family: truth} if truth else {}
        results = _first_run(entry, *formatted[layout], len(case.output_shapes), device)
        if family not in references:
            references[family] = (contender.label, entry.runner, results)
            continue
        entry.against, reference, expected = references[family]
        where = f"{contender.label} at {case.title}"
        outputs = len(case.output_shapes)
        entry.error = _compare(
            where, entry.against, results, expected, outputs, entry.runner, reference
        )
    return entries


def _upstream(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    if not case.backward:
        return ()
    generator = torch.Generator().manual_seed(1)
    shapes = case.output_shapes
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def _first_run(
    entry: Entry,
    inputs: tuple[Tensor, ...],
    upstream: tuple[Tensor, ...],
    outputs: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Builds the contender, counts its FLOPs and the bytes that it has to move, compiles it."""
    contender = entry.contender
    function = contender.build()
    if isinstance(function, nn.Module):
        function = function.to(device).to(memory_format=contender.memory_format)
    entry.runner = runner = Runner(function, inputs, upstream)
    results = None
    if contender.flops is None:
        with FlopCounterMode(display=False) as counter:
            results = runner()
        entry.flops = counter.get_total_flops()
    else:  # it may have no uncompiled form
        entry.flops = contender.flops
    if contender.compile:
        runner.compile()
        results = None
    results = runner() if results is None else results
    output_bytes = sum(storage_bytes(results[:outputs]).values())
    entry.traffic = runner.traffic(output_bytes) if contender.traffic is None else contender.traffic
    return results


def _run_oracle(
    oracle: Oracle, inputs: tuple[Tensor, ...], upstream: tuple[Tensor, ...], device: torch.device
) -> tuple[str, Runner, tuple[Tensor, ...]] | None:
    if oracle.peak_bytes > _USABLE_BY_ORACLE * available_memory(device):
        return None
    function = oracle.build()
    if isinstance(function, nn.Module):
        function = function.to(device)
    doubled = tuple(x.double() for x in inputs)
    runner = Runner(function, doubled, tuple(x.double() for x in upstream))
    return "float64", runner, runner()


def _compare(
    where: str,
    against: str,
    results: tuple[Tensor, ...],
    expected: tuple[Tensor, ...],
    outputs: int,
    runner: Runner,
    reference: Runner,
) -> float:
    """The largest relative error of an output, once those of the gradients are allowed as well.

    The gradients of all parameters are compared as one vector: some are exactly zero, but for
    rounding, such as that of a bias before batch norm.
    """
    if runner.parameter_names != reference.parameter_names:
        raise MismatchError(
            f"{where} has the parameters {runner.parameter_names}, "
            f"{against} has {reference.parameter_names}"
        )
    count = outputs + len(runner.inputs) if len(results) > outputs else outputs
    names = ["output"] if outputs == 1 else [f"output {i}" for i in range(outputs)]
    names += [f"gradient of input {i}" for i in range(count - outputs)]
    pairs = list(zip(results[:count], expected[:count], strict=True))
    if len(results) > count:
        names.append("gradient of the parameters")
        pairs.append((_one_vector(results[count:]), _one_vector(expected[count:])))
    tolerance = TOLERANCES[results[0].dtype]
    errors = []
    for name, (result, truth) in zip(names, pairs, strict=True):
        if result.shape != truth.shape:
            raise MismatchError(
                f"{where}: {name} has shape {tuple(result.shape)}, {against} {tuple(truth.shape)}"
            )
        errors.append(relative_error(result, truth))
        if not errors[-1] <= tolerance:
            raise MismatchError(
                f"{where}: {name} differs from {against}: relative error {errors[-1]:.3g}, "
                f"allowed {tolerance:.3g}"
            )
    return max(errors[:outputs])


def _one_vector(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
