# SPDX-License-Identifier: Apache-2.0
"""The torch.library namespace ``ctxops``, and what every operator shares.

An operator is ``define``d once with its schema, and registered for the devices that have a kernel.
torch's dispatcher chooses among them; where it has none, the public function calls the operator's
reference.
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake
from torch.utils.dlpack import to_dlpack

from ctxops import _native
from ctxops._torch import is_transformed

_LIBRARY = Library("ctxops", "DEF")

reference_active = False
_reference_depth = 0

# The major compute capability from which on a GPU runs the kernels, C++ and Triton.
OLDEST_CAPABILITY = 8

# The registered operators by name.
operators: dict[str, "Operator"] = {}

# What the operators compute, for FlopCounterMode(custom_mapping=ctxops.flop_formulas). Who imported
# torch's counter before ctxops has the formulas already. ctxops does not import it: the counter
# imports Triton, which takes longer than the import of all of ctxops.
flop_formulas: dict[object, Callable[..., int]] = {}


class Served(NamedTuple):
    """What serves a public operator, as ``served_by`` declares it."""

    cpu: str
    cuda: str
    but: str


# By the name of the public function; for `ctxops info`.
served: dict[str, Served] = {}


def served_by(*, cpu: str, cuda: str, but: str = "") -> Callable[[Callable], Callable]:
    """Declares what serves a public operator, forward and backward, on the CPU and on CUDA.

    ``"C++"``: the extension's kernel, or where there is none the reference. ``"Triton"``: what
    ``uses_triton`` asks for, or without Triton torch, in blocks. Everything else begins with
    ``"torch"`` and is there always. ``but`` says which calls something else serves.
    """

    def declare(function: Callable) -> Callable:
        served[function.__name__] = Served(cpu, cuda, but)
        return function

    return declare


@contextlib.contextmanager
def use_reference() -> Iterator[None]:
    """Routes every operator to its reference in plain torch while the context is open.

    For derivatives that the kernels do not have, export to ONNX, and debugging. The switch is one
    for the whole process, not for the thread that sets it: it is on while any such context is open.
    It works around and inside compiled and exported functions.
    """
    global reference_active, _reference_depth
    _reference_depth += 1
    reference_active = True
    try:
        yield
    finally:
        _reference_depth -= 1
        reference_active = _reference_depth > 0


class Operator:
    """One operator of the namespace: its schema, its kernels by device, its autograd rule.

    ``kernels`` maps a device type to a function; ``fake`` allocates the outputs and computes
    nothing; ``setup_context`` and ``backward`` are those of ``torch.library.register_autograd``.
    ``flops`` takes the arguments with shapes for tensors and counts for torch's FlopCounterMode, in
    its convention: 2 for each multiply-accumulate of a product, and no other arithmetic.
    """

    def __init__(
        self,
        schema: str,
        *,
        fake: Callable,
        kernels: dict[str, Callable],
        backward: Callable,
        flops: Callable[..., int],
        setup_context: Callable | None = None,
    ) -> None:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema)
        for device, kernel in kernels.items():
            _LIBRARY.impl(name, kernel, device.upper())
        register_fake(f"ctxops::{name}", fake, lib=_LIBRARY)
        register_autograd(f"ctxops::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        self.name, self.devices = name, frozenset(kernels) | {"meta"}
        operators[name] = self
        self.overload = getattr(torch.ops.ctxops, name).default
        self._count(flops)

    def __call__(self, *arguments: object):
        return self.overload(*arguments)

    def _count(self, flops: Callable[..., int]) -> None:
        def count(*shapes: object, out_shape: object, **named: object) -> int:
            return flops(*shapes, **named)

        packet = self.overload.overloadpacket
        flop_formulas[packet] = count
        counter = sys.modules.get("torch.utils.flop_counter")
        if counter is not None:
            counter.register_flop_formula(packet)(count)

    def serves(self, tensor: Tensor) -> bool:
        """Is there a kernel for this tensor, and has nobody asked for the reference?

        torch.func's transforms ask for it: kernels have no rule for them, and a tensor under vmap
        does not tell that it wants a gradient.
        """
        if reference_active or tensor.device.type not in self.devices:
            return False
        return not is_transformed() and (not tensor.is_cuda or has_kernels(tensor.device))


def has_kernels(gpu: torch.device | None = None) -> bool:
    """Has a GPU, by default the current one, the compute capability that all kernels need?

    True where there is no GPU: what is traced for one there runs elsewhere.
    """
    if not torch.cuda.is_available():
        return True
    return torch.cuda.get_device_properties(gpu).major >= OLDEST_CAPABILITY


def native_devices(kernel: Callable) -> dict[str, Callable]:
    """``kernels`` of an operator whose kernel is the extension's, on the devices that it serves."""
    modules = {"cpu": _native.cpu, "cuda": _native.cuda}
    return {device: kernel for device, module in modules.items() if module is not None}


def no_second_derivative(name: str) -> Callable:
    """The autograd rule of a backward kernel: it has none, and says so."""

    def backward(ctx, *grads):
        raise NotImplementedError(
            f"the gradient of {name} cannot be differentiated again; call {name} under "
            f"ctxops.use_reference() for second derivatives"
        )

    return backward


def no_products(*shapes: object, **named: object) -> int:
    """``flops`` of an operator that adds, weighs and resizes: torch counts that as nothing."""
    return 0


def launch(kernel: str, like: Tensor, /, **arguments: object) -> None:
    """Calls the extension's kernel on the device of ``like``, on its current stream or all threads.

    Raises RuntimeError where CUDA fails, ValueError where the kernel refuses its arguments.
    ``arguments`` are the members of the kernel's struct of parameters, tensors as DLPack capsules.
    """
    for name, argument in arguments.items():
        if isinstance(argument, Tensor):
            arguments[name] = to_dlpack(argument)
        elif isinstance(argument, list) and isinstance(argument[0], Tensor):
            arguments[name] = [to_dlpack(tensor) for tensor in argument]
    if like.is_cuda:
        # When it ends, torch makes no context on a former device that has none.
        with torch.cuda.device(like.device):
            getattr(_native.cuda, kernel)(arguments, torch.cuda.current_stream().cuda_stream)
    else:
        getattr(_native.cpu, kernel)(arguments, torch.get_num_threads())


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of that dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """On CUDA, except for float64, which Triton's matrix products do not serve."""
    return x.is_cuda and x.dtype != torch.float64 and has_triton()
