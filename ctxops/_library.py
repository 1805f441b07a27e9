# SPDX-License-Identifier: Apache-2.0
"""The torch.library namespace ``ctxops``, and what every operator shares.

An operator is ``define``d once with its schema, and registered for the devices that have a kernel.
torch's dispatcher chooses among them; where it has none, the public function calls the operator's
reference.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.library import Library, register_autograd, register_fake
from torch.utils.dlpack import to_dlpack

from ctxops import _native

_LIBRARY = Library("ctxops", "DEF")

_FLOP_COUNTER = "torch.utils.flop_counter"

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

reference_active = False
_reference_depth = 0

# The registered operators by name; for torch's FlopCounterMode.
operators: dict[str, "Operator"] = {}


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
        self.flops = flops
        if _FLOP_COUNTER in sys.modules:
            self.register_flops(sys.modules[_FLOP_COUNTER])

    def __call__(self, *arguments: object, differentiable: bool = True):
        """Calls the operator. ``differentiable=False``: no input wants a gradient.

        The autograd rule would find that out too, but in Python and through a second dispatch: 7 of
        34 us of a call on a tiny tensor. A tracer must see the call as it is.
        """
        if differentiable or torch.compiler.is_compiling():
            return self.overload(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*arguments)

    def register_flops(self, flop_counter: types.ModuleType) -> None:
        """Makes ``flops`` known to ``torch.utils.flop_counter``."""

        def count(*shapes: object, out_shape: object, **named: object) -> int:
            return self.flops(*shapes, **named)

        flop_counter.register_flop_formula(self.overload.overloadpacket)(count)

    def serves(self, tensor: Tensor) -> bool:
        """Is there a kernel for this tensor, and has nobody asked for the reference?

        torch.func's transforms ask for it: kernels have no rule for them, and a tensor under vmap
        does not tell that it wants a gradient.
        """
        if reference_active or tensor.device.type not in self.devices:
            return False
        return not is_transformed()


def is_transformed() -> bool:
    """Do torch.func's transforms run, such as vmap? A compiler has taken them away."""
    if torch.compiler.is_compiling():
        return False
    return _functorch.peek_interpreter_stack() is not None


class _FlopCounterFinder(importlib.abc.MetaPathFinder):
    """Registers the operators' ``flops`` whenever somebody imports torch's counter.

    It imports Triton, which takes longer than the import of all of ctxops. The finder stays: a
    module may be looked for before it is imported, and be reloaded after.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _FLOP_COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: types.ModuleType) -> None:
            execute(module)
            for operator in operators.values():
                operator.register_flops(module)

        spec.loader.exec_module = execute_and_register
        return spec


sys.meta_path.insert(0, _FlopCounterFinder())


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


def launch(name: str, like: Tensor, *arguments: object) -> None:
    """Calls the extension's kernel ``name`` on the device of ``like``.

    Tensors travel as DLPack capsules; the number of threads or the current stream comes last.
    """
    handed = [
        to_dlpack(a) if isinstance(a, Tensor)
        else [to_dlpack(t) for t in a] if isinstance(a, list) and isinstance(a[0], Tensor)
        else a
        for a in arguments
    ]  # fmt: skip
    if like.is_cuda:
        stream = torch.cuda.current_stream(like.device).cuda_stream
        getattr(_native.cuda, name)(*handed, stream)
    else:
        getattr(_native.cpu, name)(*handed, torch.get_num_threads())


def empty_map(
    shape: Sequence[int], like: Tensor, layout: torch.memory_format | None = None
) -> Tensor:
    """An uninitialised map in the dtype and device of ``like``, in its or another memory format."""
    layout = memory_format(like) if layout is None else layout
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last if and only if the map is that and not also contiguous."""
    if x.is_contiguous() or is_transformed():  # vmap does not tell of channels_last
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of that dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """On CUDA, except for float64, which Triton's matrix products do not serve."""
    return x.is_cuda and x.dtype != torch.float64 and has_triton()


def inner_dense(x: Tensor) -> Tensor:
    """``x`` itself where its channels or its columns lie side by side, else a contiguous copy."""
    _, channels, _, width = x.shape
    _, stride_c, _, stride_w = x.stride()
    return x if stride_w == 1 or stride_c == 1 or width == 1 or channels == 1 else x.contiguous()


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_active(device: str) -> bool:
    # Other devices may have no autocast, and asking torch 2.8 for that cannot be traced.
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on; float64 stays, as in torch."""
    device = next(t for t in tensors if t is not None).device.type
    if not autocast_active(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


@contextlib.contextmanager
def no_autocast(device: str) -> Iterator[None]:
    """For kernels made of torch's own operations, which autocast would cast down once more."""
    if not autocast_active(device):
        yield
        return
    with torch.autocast(device, enabled=False):
        yield


def check_map(name: str, x: Tensor) -> None:
    """Raises unless ``x`` is a floating, strided (B, C, H, W) with C, H and W at least 1."""
    check_dtype(name, x)
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"{name} must have shape (B, C, H, W), got {tuple(shape)}")
    _, channels, height, width = shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"{name} must have C, H and W of at least 1, got {tuple(shape)}")


def check_shape(
    name: str, x: Tensor, like: Tensor, shape: tuple[int | None, ...], meaning: str
) -> None:
    """Raises unless ``x`` is floating, on the device of ``like``, of that shape (None: any)."""
    check_dtype(name, x)
    if x.dim() != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, x.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape {meaning} = ({wanted}), got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device {like.device}, got {x.device}")


def check_same_dtype(**tensors: Tensor | None) -> None:
    """Raises unless all tensors have the dtype of the first."""
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and tensor.dtype != reference.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first}, {reference.dtype}, got {tensor.dtype}"
            )


def check_dtype(name: str, x: Tensor) -> None:
    """Raises unless ``x`` is a strided tensor of a floating dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else x.layout
        raise TypeError(f"{name} must be a dense, strided tensor, got {layout}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}")


def resolve_scale(scale: float | None, channels: int) -> float:
    """``scale`` as a float, ``channels ** -0.5`` for None; raises unless it is a number."""
    if scale is None:
        return channels**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    return float(scale)


def check_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """Raises for dual tensors: kernels have no forward-mode rule, and torch would yield zeros."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative; call it under ctxops.use_reference()"
            )
