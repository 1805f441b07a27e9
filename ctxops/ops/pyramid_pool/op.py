# SPDX-License-Identifier: Apache-2.0
"""pyramid_pool: adaptive pooling to several grids in one pass over the map."""

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ctxops import _layout, _native, _operator
from ctxops._checks import check_forward_mode, check_map
from ctxops.ops.pyramid_pool.reference import reference

Mode = Literal["avg", "max"]
_MODES = get_args(Mode)
_MAX_SIZES = _native.limit("max_ints")


@_operator.served_by(cpu="C++", cuda="C++")
def pyramid_pool(
    input: Tensor, output_sizes: Sequence[int] = (1, 3, 6, 8), *, mode: Mode = "avg"
) -> Tensor:
    r"""Pools a map to every n x n grid of ``output_sizes``, flattened and concatenated.

    .. math::
        y_{b,c,s} = \frac{1}{|\Omega_s|} \sum_{(h,w) \in \Omega_s} x_{b,c,h,w}
        \qquad\text{or}\qquad \max_{(h,w) \in \Omega_s} x_{b,c,h,w}

    Bin :math:`\Omega_s` in row i and column j of grid n covers rows
    :math:`\lfloor iH/n \rfloor \dots \lceil (i+1)H/n \rceil - 1`, and columns likewise: torch's
    adaptive bins. They may overlap, and a grid larger than the map repeats positions.

    Args:
        input: map of shape ``(B, C, H, W)``, contiguous or channels_last. Others are copied, unless
            their channels or columns lie side by side.
        output_sizes: at most 32 values of n, each in 1 ... 32768; H * W must be below 2**31.
        mode: ``"avg"``, or ``"max"``: NaN wins, and the gradient goes to the first maximum in
            row-major order.

    Returns:
        ``(B, C, S)`` with ``S = sum(n * n)``: bins row-major, grids in the order given.

    Raises:
        TypeError: ``input`` is no floating tensor, or a size is no integer.
        ValueError: a wrong rank, an empty C, H or W, a size out of range, an unknown mode.
        NotImplementedError: forward-mode or second derivatives (use :func:`ctxops.use_reference`).

    Source: Zhu et al., Asymmetric Non-local Neural Networks, ICCV 2019, Fig. 4, eq. 8 and 12.

    Dtypes: float32, float64, float16, bfloat16; sums in float32 (float64). Autocast keeps it.
    Gradients: input.
    Deterministic: yes, forward and backward, for any number of threads.
    Memory: B * C * R * Q values of 4 bytes (8 for float64), R and Q the cells that all bins cut an
        axis into: at most 2 * sum(n) and its length; beyond 255 cells, its length. mode="max" with
        gradient: as many int32 again, and B * S * C int32 are kept. Backward: the same cells (none
        for maxima) and B * S * C values; maxima of half precision on the CPU: a float32 map, of a
        grid finer than the map: a float64 map, and the gradient in float64.
    """
    sizes = _check(input, output_sizes, mode)
    if not _FORWARD.serves(input):
        return reference(input, sizes, mode)
    check_forward_mode("pyramid_pool", input)
    maximum = mode == "max"
    grad = _operator.needs_grad(input)
    return _FORWARD(input, sizes, maximum, maximum and grad)[0]


def _check(input: Tensor, output_sizes: Sequence[int], mode: Mode) -> tuple[int, ...]:
    check_map("input", input)
    sizes = check_output_sizes(output_sizes)
    if input.shape[2] * input.shape[3] >= 2**31 - 1:
        raise ValueError(
            f"input must have fewer than 2147483647 positions, got {tuple(input.shape)}"
        )
    if mode not in _MODES:
        raise ValueError(f"mode must be 'avg' or 'max', got {mode!r}")
    return sizes


def check_output_sizes(output_sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a pyramid as a tuple; raises unless they are 1 to 32 integers in 1 ... 32768."""
    if not isinstance(output_sizes, Sequence) or isinstance(output_sizes, str):
        raise TypeError(f"output_sizes must be a sequence of integers, got {output_sizes!r}")
    if not 1 <= len(output_sizes) <= _MAX_SIZES:
        raise ValueError(f"output_sizes must hold 1 to {_MAX_SIZES} integers, got {output_sizes!r}")
    for n in output_sizes:
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"output_sizes must hold integers, got {n!r}")
        if not 1 <= n <= 32768:
            raise ValueError(f"output_sizes must be in 1 ... 32768, got {n}")
    return tuple(output_sizes)


def _new_cells(like: Tensor, size: Sequence[int], sizes: list[int]) -> Tensor:
    """The workspace (B, R, Q, C) for a map of that size, in the accumulator's dtype."""
    batch, channels, height, width = size
    count = _native.extension.pyramid_pool_cells
    shape = (batch, count(height, sizes), count(width, sizes), channels)
    dtype = _operator.accumulator(like.dtype)
    return torch.empty(shape, dtype=dtype, device=like.device)


def _forward(
    input: Tensor, sizes: list[int], maximum: bool, save: bool, *, fake: bool = False
) -> tuple[Tensor, Tensor]:
    batch, channels, _, _ = input.shape
    bins = sum(n * n for n in sizes)
    output = input.new_empty((batch, channels, bins))
    # The position of each maximum, (B, S, C): the kernels' own order.
    argmax = input.new_empty((batch, bins, channels) if save else (0,), dtype=torch.int32)
    if fake or output.numel() == 0:
        return output, argmax
    cells = _new_cells(input, input.shape, sizes)
    _operator.launch(
        "pyramid_pool_forward", input,
        input=_layout.inner_dense(input), output=output, argmax=argmax, cells=cells,
        cell_argmax=torch.empty_like(cells, dtype=torch.int32) if save else argmax, sizes=sizes,
        maximum=maximum,
    )  # fmt: skip
    return output, argmax


def _backward(
    grad: Tensor,
    argmax: Tensor | None,
    sizes: list[int],
    height: int,
    width: int,
    channels_last: bool,
    *,
    fake: bool = False,
) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    grad_input = _layout.empty_map((*grad.shape[:2], height, width), grad, layout)
    if fake or grad_input.numel() == 0:
        return grad_input
    if argmax is not None:
        # The CPU's kernel adds in the map itself. A grid finer than the map sends a position so
        # many gradients that a float loses them.
        finer = max(sizes) > min(height, width) and grad.dtype != torch.float64
        if finer or (not grad.is_cuda and grad.dtype.itemsize == 2):
            wide = grad.double() if finer else grad.float()
            return grad_input.copy_(_backward(wide, argmax, sizes, height, width, channels_last))
        grad_cells = grad.new_empty((0,), dtype=torch.float32)
    else:
        argmax = grad.new_empty((0,), dtype=torch.int32)
        grad_cells = _new_cells(grad, grad_input.shape, sizes)
    _operator.launch(
        "pyramid_pool_backward", grad,
        grad_output=grad.transpose(1, 2).contiguous(), argmax=argmax, grad_cells=grad_cells,
        grad_input=grad_input, sizes=sizes,
    )  # fmt: skip
    return grad_input


def _setup_context(ctx, inputs, output):
    input, ctx.sizes, ctx.maximum, saved = inputs
    argmax = output[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmax)
    if ctx.maximum:
        # A graph that was exported without gradients has no argmax: the backward takes it anew.
        ctx.save_for_backward(argmax if saved else input)
    ctx.saved = saved
    ctx.map_size = input.shape[2:]
    ctx.channels_last = _layout.memory_format(input) == torch.channels_last


def _autograd(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    argmax = None
    if ctx.maximum:
        (argmax,) = ctx.saved_tensors
        if not ctx.saved:
            argmax = _FORWARD(argmax, ctx.sizes, True, True)[1]
        argmax = argmax.contiguous()  # hooks may return it with other strides
    grad_input = _BACKWARD(grad, argmax, ctx.sizes, *ctx.map_size, ctx.channels_last)
    return grad_input, None, None, None


_FORWARD = _operator.Operator(
    "pyramid_pool(Tensor input, int[] sizes, bool maximum, bool save) -> (Tensor, Tensor)",
    fake=functools.partial(_forward, fake=True),
    kernels=_operator.native_devices(_forward),
    setup_context=_setup_context,
    backward=_autograd,
    flops=_operator.no_products,
)
_BACKWARD = _operator.Operator(
    "pyramid_pool_backward(Tensor grad, Tensor? argmax, int[] sizes, SymInt height, SymInt width, "
    "bool channels_last) -> Tensor",
    fake=functools.partial(_backward, fake=True),
    kernels=_operator.native_devices(_backward),
    backward=_operator.no_second_derivative("pyramid_pool"),
    flops=_operator.no_products,
)
