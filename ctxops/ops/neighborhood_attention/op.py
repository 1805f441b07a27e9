# SPDX-License-Identifier: Apache-2.0
"""neighborhood_attention: every position attends to a dilated window around it."""

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ctxops import _autocast, _layout, _native, _operator
from ctxops._checks import (
    check_dtype,
    check_forward_mode,
    check_map,
    check_same_dtype,
    check_shape,
    resolve_scale,
)
from ctxops.ops.neighborhood_attention.reference import reference, reference_weights

Border = Literal["zeros", "mask", "shift"]
_BORDERS = get_args(Border)  # outside of what a tracer sees
_MAX_WINDOW = _native.limit("neighborhood_attention_max_window")
_MAX_WINDOW_ALONG_COLUMNS = _native.limit("neighborhood_attention_max_window_along_columns")
_MAX_SLIDING_WINDOW_ALONG_COLUMNS = _native.limit(
    "neighborhood_attention_max_sliding_window_along_columns"
)


@_operator.served_by(cpu="C++", cuda="C++")
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    *,
    scale: float | None = None,
    border: Border = "zeros",
    num_heads: int = 1,
    rel_pos_bias: Tensor | None = None,
) -> Tensor:
    r"""Attention of every position to a dilated window of kh x kw neighbours around it.

    .. math::
        y_p = \sum_{n} \operatorname{softmax}_n(s \, \langle q_p, k_{p + \Delta_n} \rangle
              + b_{\Delta_n}) \; v_{p + \Delta_n}

    Neighbour ``n = i * kw + j`` stands in row i and column j of the window, at
    :math:`\Delta_n = ((i - \lfloor kh/2 \rfloor)\, d_h, (j - \lfloor kw/2 \rfloor)\, d_w)`: an even
    window reaches one step further up and left than down and right.

    Args:
        query: map of shape ``(B, C, H, W)``.
        key: map of the same shape.
        value: map of shape ``(B, Cv, H, W)``.
        kernel_size: kh and kw, or one number for both, at least 1; at most 4096 neighbours.
        dilation: positions between two neighbours along each axis, or one number for both.
        scale: s; None: ``(C / num_heads) ** -0.5``.
        border: what stands where a window leaves the map. ``"zeros"``: a zero vector, with logit 0
            and value 0, which keeps its share of the softmax (the paper). ``"mask"``: nothing; the
            softmax is over the neighbours inside. ``"shift"``: the window slides inside the map, in
            steps of the dilation, as in NATTEN.
        num_heads: the channels are split into so many equal groups, each with its own weights.
        rel_pos_bias: the relative position bias b, of shape ``(num_heads, 2 * kh - 1,
            2 * kw - 1)``; None: 0. Entry ``[m, kh - 1 + i, kw - 1 + j]`` belongs to the neighbours
            that stand i steps of the dilation down and j to the right. With ``"shift"`` there are
            neighbours at all of these steps, with the other borders at kh x kw of them. What stands
            outside the map has no bias: with ``"zeros"`` its logit stays 0.

    Returns:
        ``(B, Cv, H, W)`` in the query's memory format.

    Raises:
        TypeError: no floating tensors, or of different dtypes; sizes that are no integers.
        ValueError: shapes that do not fit, sizes below 1, an unknown border, heads that do not
            divide the channels, ``"shift"`` with fewer positions along an axis than its window.
        NotImplementedError: forward-mode or second derivatives (use :func:`ctxops.use_reference`).

    Source: Li et al., Global Aggregation then Local Distribution for Scene Parsing, TIP 2021,
    eq. 7 and 8 (LDv2), whose s is 1. The bias: Hassani et al., Neighborhood Attention Transformer,
    CVPR 2023, eq. 2.

    Dtypes: float32, float64, float16, bfloat16; sums in float32 (float64). Autocast casts down. On
        the CPU a weight below exp(-87) is 0, unless in float64.
    Gradients: query, key, value, rel_pos_bias.
    Deterministic: yes, forward and backward, for any number of threads.
    Memory: with gradient, B * num_heads * kh * kw * H * W values of 4 bytes (8 for float64) are
        kept. Backward: as many again. Besides, on CUDA one channels_last copy of every map that is
        not so. On the CPU a copy of every map that is not in the query's memory format; where that
        is channels_last also a float32 copy of every map in half precision; and where a window has
        more than 2048 neighbours, with ``"shift"`` 32, a float32 copy of every map.
    """
    check_dtype("value", value)
    kernel, steps, scale = _check(
        query, key, value, kernel_size, dilation, scale, border, num_heads, rel_pos_bias
    )
    query, key, value, bias = _autocast.cast(query, key, value, rel_pos_bias)
    check_same_dtype(query=query, key=key, value=value, rel_pos_bias=bias)
    options = (kernel, steps, scale, border, num_heads)
    if not _FORWARD.serves(query):
        output = reference(query, key, value, *options, bias)
        return output.contiguous(memory_format=_layout.memory_format(query))
    check_forward_mode("neighborhood_attention", query, key, value, bias)
    grad = _operator.needs_grad(query, key, value, bias)
    return _FORWARD(query, key, value, *options, grad, bias)[0]


@_operator.served_by(cpu="C++", cuda="C++", but="with gradient: reference")
def neighborhood_attention_weights(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    *,
    scale: float | None = None,
    border: Border = "zeros",
    num_heads: int = 1,
    rel_pos_bias: Tensor | None = None,
) -> Tensor:
    """The softmax weights of :func:`neighborhood_attention`, to look at.

    Arguments, dtypes and errors are those of :func:`neighborhood_attention`.

    Returns:
        ``(B, num_heads, kh * kw, H, W)``. Entry ``[b, m, i * kw + j, h, w]`` is the weight that
        position (h, w) gives to row i and column j of its window; with ``border="zeros"`` those
        outside the map included, with ``"mask"`` they are 0.

    Source: Li et al., TIP 2021, Fig. 9.

    Gradients: query, key and rel_pos_bias, through the reference: with them, every position's
        window of keys is stored.
    Deterministic: yes.
    Memory: copies of query and key as in :func:`neighborhood_attention`; for half precision the
        weights in float32.
    """
    kernel, steps, scale = _check(
        query, key, None, kernel_size, dilation, scale, border, num_heads, rel_pos_bias
    )
    query, key, bias = _autocast.cast(query, key, rel_pos_bias)
    check_same_dtype(query=query, key=key, rel_pos_bias=bias)
    options = (kernel, steps, scale, border, num_heads)
    if _operator.needs_grad(query, key, bias) or not _FORWARD.serves(query):
        return reference_weights(query, key, *options, bias).flatten(2, 3)
    check_forward_mode("neighborhood_attention_weights", query, key, bias)
    weights = _FORWARD(query, key, None, *options, True, bias)[1]
    return weights.to(query.dtype)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    scale: float | None,
    border: Border,
    num_heads: int,
    rel_pos_bias: Tensor | None,
) -> tuple[tuple[int, int], tuple[int, int], float]:
    check_map("query", query)
    batch, channels, height, width = query.shape
    check_shape("key", key, query, query.shape, "(B, C, H, W)")
    if not isinstance(num_heads, int) or isinstance(num_heads, bool):
        raise TypeError(f"num_heads must be an integer, got {num_heads!r}")
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads must divide the query's {channels} channels, got {num_heads}")
    if value is not None:
        check_shape("value", value, query, (batch, None, height, width), "(B, Cv, H, W)")
        if value.shape[1] == 0 or value.shape[1] % num_heads:
            raise ValueError(
                f"value must have a multiple of num_heads = {num_heads} channels, "
                f"got {tuple(value.shape)}"
            )
    kernel = check_pair("kernel_size", kernel_size)
    steps = check_pair("dilation", dilation)
    if kernel[0] * kernel[1] > _MAX_WINDOW:
        raise ValueError(
            f"kernel_size must have at most {_MAX_WINDOW} positions, got {kernel[0]} x {kernel[1]}"
        )
    if rel_pos_bias is not None:
        shape = _bias_shape(kernel, num_heads)
        meaning = "(num_heads, 2 * kh - 1, 2 * kw - 1)"
        check_shape("rel_pos_bias", rel_pos_bias, query, shape, meaning)
    if border not in _BORDERS:
        raise ValueError(f"border must be one of {_BORDERS}, got {border!r}")
    # A tracer must not learn the map's size; the kernel finds the same fault when it runs.
    if border == "shift" and not torch.compiler.is_compiling():
        for axis, extent, k, d in zip("HW", (height, width), kernel, steps, strict=True):
            if (extent - min(d, extent)) // d + 1 < k:
                raise ValueError(
                    f"border='shift' needs kernel_size positions of every residue class of the "
                    f"dilation: {axis} of at least {k * d} for kernel_size {k} and dilation {d}, "
                    f"got {extent}; use border='mask' or a smaller window"
                )
    return kernel, steps, resolve_scale(scale, channels // num_heads)


def check_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """A value per axis, from two or from one for both; raises unless they are in 1 ... 2^31 - 1."""
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        raise TypeError(f"{name} must be an integer or two, got {value!r}")
    for size in pair:
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must hold integers, got {size!r}")
        if not 1 <= size < 2**31:
            raise ValueError(f"{name} must be at least 1 and below 2147483648, got {size}")
    return pair[0], pair[1]


def _bias_shape(kernel_size: Sequence[int], num_heads: int) -> tuple[int, int, int]:
    return num_heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1


def _new_weights(
    query: Tensor, kernel_size: Sequence[int], border: Border, num_heads: int
) -> Tensor:
    """Uninitialised weights (B, heads, kh * kw, H, W) in the accumulator's dtype.

    In memory the weights of a position stand side by side; the positions of a weight do where
    vectors run along the columns, and where CUDA's tiles write them, as they do for the usual
    windows.
    """
    batch, _, height, width = query.shape
    count = kernel_size[0] * kernel_size[1]
    dtype = _operator.accumulator(query.dtype)
    square = kernel_size[0] == kernel_size[1] and kernel_size[0] in (3, 5, 7)
    tiles = query.is_cuda and square and border != "shift" and dtype == torch.float32
    if tiles or _inner_dimension(query, kernel_size, border) == 3:
        return query.new_empty((batch, num_heads, count, height, width), dtype=dtype)
    weights = query.new_empty((batch, height, width, num_heads, count), dtype=dtype)
    return weights.permute(0, 3, 4, 1, 2)


def _inner_dimension(query: Tensor, kernel_size: Sequence[int], border: str) -> int:
    """The dimension along which the kernels need unit stride of all maps, as in their header."""
    most = _MAX_SLIDING_WINDOW_ALONG_COLUMNS if border == "shift" else _MAX_WINDOW_ALONG_COLUMNS
    fits = kernel_size[0] * kernel_size[1] <= most
    unit_stride = query.shape[1] == 1 or query.stride(1) == 1
    return 3 if not query.is_cuda and not unit_stride and fits else 1


def _empty_kernel_map(x: Tensor, inner: int) -> Tensor:
    """``x`` itself where the kernels take it, else an uninitialised map that they take."""
    # Along the channels the CPU's kernels know no half precision.
    narrow = inner == 1 and not x.is_cuda and x.dtype.itemsize == 2
    if not narrow and (x.stride(inner) == 1 or x.shape[inner] == 1):
        return x
    dtype = torch.float32 if narrow else x.dtype
    layout = torch.channels_last if inner == 1 else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout)


def _kernel_map(x: Tensor, inner: int) -> Tensor:
    """The map as the kernels take it."""
    taken = _empty_kernel_map(x, inner)
    return x if taken is x else taken.copy_(x)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
    border: Border,
    num_heads: int,
    save: bool,
    rel_pos_bias: Tensor | None = None,
    *,
    fake: bool = False,
) -> tuple[Tensor, Tensor]:
    output = query.new_empty((0,)) if value is None else _layout.empty_map(value.shape, query)
    weights = query.new_empty((0,), dtype=torch.float32)
    if save:
        weights = _new_weights(query, kernel_size, border, num_heads)
    if fake or query.numel() == 0:
        return output, weights
    inner = _inner_dimension(query, kernel_size, border)
    target = output if value is None else _empty_kernel_map(output, inner)
    dtype = _operator.accumulator(query.dtype)
    bias = query.new_empty((0,)) if rel_pos_bias is None else rel_pos_bias.to(dtype).contiguous()
    _operator.launch(
        "neighborhood_attention_forward", query,
        query=_kernel_map(query, inner), key=_kernel_map(key, inner),
        value=target if value is None else _kernel_map(value, inner), output=target,
        weights=weights,
        kernel_size=kernel_size, dilation=dilation, scale=scale, border=border,
        num_heads=num_heads, bias=bias,
    )  # fmt: skip
    if target is not output:
        output.copy_(target)
    return output, weights


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
    border: Border,
    num_heads: int,
    wants_bias: bool = False,
    *,
    fake: bool = False,
) -> tuple[Tensor, ...]:
    grads = tuple(_layout.empty_map(x.shape, x) for x in (query, key, value))
    shape = _bias_shape(kernel_size, num_heads) if wants_bias else (0,)
    grad_bias = query.new_zeros(shape, dtype=_operator.accumulator(query.dtype))
    if fake or query.numel() == 0:
        return *grads, grad_bias.to(query.dtype)
    inner = _inner_dimension(query, kernel_size, border)
    targets = [_empty_kernel_map(g, inner) for g in grads]
    grad_logits = _new_weights(query, kernel_size, border, num_heads)
    if weights.stride() != grad_logits.stride():  # hooks on saved tensors may have moved them
        weights = _new_weights(query, kernel_size, border, num_heads).copy_(weights)
    _operator.launch(
        "neighborhood_attention_backward", query,
        grad=_kernel_map(grad, inner), query=_kernel_map(query, inner),
        key=_kernel_map(key, inner), value=_kernel_map(value, inner), weights=weights,
        grad_logits=grad_logits,
        grad_query=targets[0], grad_key=targets[1], grad_value=targets[2],
        kernel_size=kernel_size, dilation=dilation, scale=scale, border=border,
        num_heads=num_heads, grad_bias=grad_bias,
    )  # fmt: skip
    for gradient, target in zip(grads, targets, strict=True):
        if target is not gradient:
            gradient.copy_(target)
    return *grads, grad_bias.to(query.dtype)


def _setup_context(ctx, inputs, output):
    query, key, value, *ctx.options, saved, bias = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    # A graph that was exported without gradients has no weights: the backward takes them anew.
    ctx.save_for_backward(query, key, value, output[1] if saved else None, bias)


def _autograd(ctx, grad, _):
    no_gradients = (None,) * 10
    if grad is None:
        return no_gradients
    query, key, value, weights, bias = ctx.saved_tensors
    if weights is None:
        weights = _FORWARD(query, key, None, *ctx.options, True, bias)[1]
    wants_bias = ctx.needs_input_grad[-1]
    *grads, grad_bias = _BACKWARD(grad, query, key, value, weights, *ctx.options, wants_bias)
    return *grads, *no_gradients[3:-1], grad_bias if wants_bias else None


def _flops(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size | None,
    kernel_size: list[int],
    *_,
) -> int:
    """The logits and the weighted sum over whole windows, wherever they lie."""
    batch, channels, height, width = query
    widths = channels + (0 if value is None else value[1])
    return 2 * batch * height * width * kernel_size[0] * kernel_size[1] * widths


def _flops_backward(
    grad: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    weights: torch.Size,
    *_,
) -> int:
    """d(weights) and the gradients of query, key and value."""
    batch, channels, height, width = query
    return 4 * batch * height * width * weights[2] * (channels + value[1])


_OPTIONS = "int[] kernel_size, int[] dilation, float scale, str border, int num_heads"
_FORWARD = _operator.Operator(
    f"neighborhood_attention(Tensor query, Tensor key, Tensor? value, {_OPTIONS}, bool save, "
    "Tensor? rel_pos_bias=None) -> (Tensor, Tensor)",
    fake=functools.partial(_forward, fake=True),
    kernels=_operator.native_devices(_forward),
    setup_context=_setup_context,
    backward=_autograd,
    flops=_flops,
)
_BACKWARD = _operator.Operator(
    "neighborhood_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
    f"Tensor weights, {_OPTIONS}, bool wants_bias=False) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=functools.partial(_backward, fake=True),
    kernels=_operator.native_devices(_backward),
    backward=_operator.no_second_derivative("neighborhood_attention"),
    flops=_flops_backward,
)
