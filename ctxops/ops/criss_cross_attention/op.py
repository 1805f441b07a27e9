# SPDX-License-Identifier: Apache-2.0
"""criss_cross_attention: every position of a map attends to its column and its row."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ctxops import _autocast, _layout, _native, _operator
from ctxops._checks import (
    check_forward_mode,
    check_map,
    check_same_dtype,
    check_shape,
    resolve_scale,
)
from ctxops.ops.criss_cross_attention.reference import reference, reference_weights

# What the CPU needs for a block of columns or rows stays below this many bytes. Of contiguous maps,
# a block of few columns would read and write parts of the cache's lines.
BLOCK_BYTES = 12 * 2**20
# Channels that are copied at a time where a product cannot take them as they lie.
COPIED_CHANNELS = 64


@_operator.served_by(cpu="torch, in blocks", cuda="Triton", but="float64 on CUDA: torch, in blocks")
def criss_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
) -> Tensor:
    r"""Softmax attention of every position of a map to its column and its row, itself once.

    .. math::
        y_p = \sum_{r \in R(p)} \operatorname{softmax}_r(s \, \langle q_p, k_r \rangle) \; v_r,
        \qquad R(h, w) = \{(i, w)\} \cup \{(h, j) : j \ne w\}

    Args:
        query: map of shape ``(B, C, H, W)``; channels_last is the fastest.
        key: map of the same shape.
        value: map of shape ``(B, Cv, H, W)``.
        scale: s; ``None`` is ``C ** -0.5``, 0.0 is legal. CCNet has 1.0.

    Returns:
        ``(B, Cv, H, W)`` in the query's memory format.

    Raises:
        TypeError: no floating tensors, or of different dtypes (outside autocast).
        ValueError: shapes that do not fit, devices that differ, empty maps.
        NotImplementedError: forward-mode or second derivatives (use :func:`ctxops.use_reference`).

    Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, ICCV 2019,
    section 3.2. The position itself counts once, as in the released code.

    Dtypes: float32, float64, float16, bfloat16; products summed and softmax taken in float32
        (float64). On CUDA, half precision rounds the sum over the column before the row is added.
        Autocast casts down.
    Gradients: query, key, value.
    Deterministic: as torch's matrix products on the CPU; yes on CUDA's Triton path.
    Memory: one float32 (float64) for each position and, for the backward, the output are kept. CPU:
        12 MiB (or what one row or column takes, if that is more) at a time, in both passes; in half
        precision also one image's maps in float32. CUDA: one channels_last copy of every map that
        is not so, the output and an upstream gradient included; each pass needs one more
        float32 for each position. Maps whose rows and channels are both strided are copied.
    """
    _check(query, key, value)
    scale = resolve_scale(scale, query.shape[1])
    query, key, value = _autocast.cast(query, key, value)
    check_same_dtype(query=query, key=key, value=value)
    if not _FORWARD.serves(query):
        output = reference(query, key, value, scale)
        return output.contiguous(memory_format=_layout.memory_format(query))
    check_forward_mode("criss_cross_attention", query, key, value)
    return _FORWARD(query, key, value, scale)[0]


@_operator.served_by(cpu="torch", cuda="torch")
def criss_cross_attention_weights(
    query: Tensor, key: Tensor, *, scale: float | None = None
) -> Tensor:
    """The softmax weights of :func:`criss_cross_attention`, to look at.

    Arguments and errors are those of :func:`criss_cross_attention`.

    Returns:
        ``(B, H + W - 1, H, W)``. Entry ``[b, i, h, w]`` for i below H is the weight that position
        (h, w) gives to row i of its column, itself included. The other W - 1 are those of its row
        without itself, from left to right: entry ``H + j`` belongs to column j where j is below w,
        else to column j + 1.

    Source: Huang et al., ICCV 2019, section 3.2.

    Dtypes: float32, float64, float16, bfloat16, in which it computes. Autocast casts down.
    Gradients: query and key, of any order, through plain torch.
    Deterministic: as torch's matrix products.
    Memory: four times the weights.
    """
    _check(query, key, None)
    scale = resolve_scale(scale, query.shape[1])
    query, key = _autocast.cast(query, key)
    check_same_dtype(query=query, key=key)
    return reference_weights(query, key, scale).permute(0, 3, 1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor | None) -> None:
    check_map("query", query)
    batch, _, height, width = query.shape
    check_shape("key", key, query, query.shape, "(B, C, H, W)")
    if value is None:
        return
    check_shape("value", value, query, (batch, None, height, width), "(B, Cv, H, W)")
    if value.shape[1] == 0:
        raise ValueError(f"value must have at least one channel, got {tuple(value.shape)}")


def _allocate(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, _, height, width = query.shape
    # The logarithm of each position's softmax denominator: it merges the column with the row.
    lse = query.new_empty((batch, height, width), dtype=_operator.accumulator(query.dtype))
    return _layout.empty_map(value.shape, query), lse


def _forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    output, lse = _allocate(query, key, value, scale)
    if output.numel() == 0:
        return output, lse
    with _autocast.disabled(query.device.type):
        if _operator.uses_triton(query):
            from ctxops.ops.criss_cross_attention import triton_kernels

            triton_kernels.forward(query, key, value, scale, output, lse)
        else:
            _forward_in_blocks(query, key, value, scale, output, lse)
    return output, lse


# On the CPU a map is a batch of lines (L, n, C): its columns, then its rows. Both are views, which
# torch's batched products take as they lie; but for the columns of contiguous maps.


def _columns(x: Tensor) -> Tensor:
    """(C, H, W) or (H, W) as (W, H, C) or (W, H), a view."""
    return x.transpose(0, -1) if x.dim() == 3 else x.t()


def _rows(x: Tensor) -> Tensor:
    """(C, H, W) or (H, W) as (H, W, C) or (H, W), a view."""
    return x.permute(1, 2, 0) if x.dim() == 3 else x


def _is_matrix(lines: Tensor) -> bool:
    return lines.stride(1) == 1 or lines.stride(2) == 1


def _matrix(lines: Tensor) -> Tensor:
    """Lines (L, n, C) that a batched product takes as they lie: a copy where these are not."""
    if _is_matrix(lines):
        return lines
    count, size, channels = lines.shape
    turned = lines.new_empty(count, channels, size)
    _turn(lines.permute(2, 1, 0), turned.transpose(0, 1))
    return turned.mT


def _turn(planes: Tensor, output: Tensor) -> None:
    """``output = planes.mT``, for planes (C, M, N)."""
    # A map of one row and one channel may have any strides.
    unit = all(x.shape[2] == 1 or x.stride(2) == 1 for x in (planes, output))
    if unit and not planes.is_cuda and _native.cpu is not None:
        _operator.launch("criss_cross_attention_turn", planes, input=planes, output=output)
    else:
        output.copy_(planes.mT)


def _needs_copies(*inputs: Tensor, outputs: tuple[Tensor, ...]) -> bool:
    """Does :func:`_matrix` or :func:`_put_product` copy any of these lines?"""
    return not all(map(_is_matrix, inputs)) or not all(x.is_contiguous() for x in outputs)


def _channel_slices(channels: int, copied: bool) -> Iterator[slice]:
    """All channels at once, or few at a time where they are copied."""
    step = COPIED_CHANNELS if copied else channels
    for start in range(0, channels, step):
        yield slice(start, min(start + step, channels))


def _put_product(output: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """``output = a @ b`` or ``output += a @ b`` for lines."""
    if output.is_contiguous():
        output.baddbmm_(a, b) if add else torch.bmm(a, b, out=output)
        return
    # To other strides torch would make one product after the other.
    product = torch.bmm(a, b) if output.stride(2) == 1 else torch.bmm(b.mT, a.mT).mT
    if add:
        output.add_(product)
    elif _is_matrix(output):
        output.copy_(product)
    else:
        _turn(product.permute(2, 0, 1), output.permute(2, 1, 0))


def _blocks(lines: Tensor, values: int) -> Iterator[slice]:
    """Cuts lines into equal blocks that stay below BLOCK_BYTES, with so many ``values`` a line."""
    count = len(lines)
    most = max(1, BLOCK_BYTES // (values * lines.element_size()))
    step = -(-count // -(-count // most))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _logits(query: Tensor, key: Tensor, scale: float, others: bool) -> Tensor:
    """(L, n, n); with ``others`` no position attends to itself."""
    logits = torch.bmm(query, key.mT).mul_(scale)
    if others:
        logits.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return logits


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised image like ``x``, or ``x`` itself if it has that dtype."""
    return x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)


def _forward_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor, lse: Tensor
) -> None:
    query, key, value = (_layout.inner_dense(x) for x in (query, key, value))
    for image in zip(query, key, value, output, lse, strict=True):
        _forward_image(*image, scale)


def _forward_image(
    query: Tensor,  # (C, H, W)
    key: Tensor,  # (C, H, W)
    value: Tensor,  # (Cv, H, W)
    output: Tensor,  # (Cv, H, W), written
    lse: Tensor,  # (H, W), written
    scale: float,
) -> None:
    query, key, value = (x.to(lse.dtype) for x in (query, key, value))
    widened = _widened(output, lse.dtype)
    for lines, others in ((_columns, False), (_rows, True)):
        _attend(*map(lines, (query, key, value, widened, lse)), scale=scale, others=others)
    if widened is not output:
        output.copy_(widened)


def _attend(
    query: Tensor,  # (L, n, C)
    key: Tensor,  # (L, n, C)
    value: Tensor,  # (L, n, Cv)
    output: Tensor,  # (L, n, Cv), written; with `others` read as well
    lse: Tensor,  # (L, n), likewise
    *,
    scale: float,
    others: bool,
) -> None:
    """Attention along lines; with ``others`` to those but itself, beside what output and lse hold.

    The softmax over both goes on from the former with a running maximum. Lines of one position add
    nothing, but NaN where all logits are -inf.
    """
    _, size, channels = query.shape
    copied = _needs_copies(query, key, value, outputs=(output,))
    # of query and key; after them of values and a product
    copies = max(2 * channels, 2 * COPIED_CHANNELS) if copied else 0
    for block in _blocks(query, size * (size + copies)):
        former = lse[block]
        weights = _logits(_matrix(query[block]), _matrix(key[block]), scale, others)
        pivot = weights.amax(dim=2)
        if others:
            pivot = torch.maximum(pivot, former)
        # finite where all logits are -inf: -inf - -inf is NaN
        pivot.clamp_(min=torch.finfo(pivot.dtype).min)
        total = weights.sub_(pivot[:, :, None]).exp_().sum(dim=2)
        if others:
            share = (former - pivot).exp_()
            total.add_(share)
            output[block].mul_(share.div_(total)[:, :, None])
        former.copy_(total.log().add_(pivot))
        if not others:
            # less where all logits are -inf: 0 / 0 would outlast the row
            total.clamp_(min=1)
        weights.div_(total[:, :, None])
        for c in _channel_slices(value.shape[2], copied):
            _put_product(output[block, :, c], weights, _matrix(value[block, :, c]), others)
        del weights  # before the next block allocates its own


def _allocate_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    return tuple(_layout.empty_map(x.shape, x) for x in (query, key, value))


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    grads = _allocate_backward(grad, query, key, value, output, lse, scale)
    if output.numel() == 0:
        return grads
    with _autocast.disabled(query.device.type):
        if _operator.uses_triton(query):
            from ctxops.ops.criss_cross_attention import triton_kernels

            triton_kernels.backward(grad, query, key, value, scale, output, lse, *grads)
        else:
            _backward_in_blocks(grad, query, key, value, scale, output, lse, *grads)
    return grads


def _backward_in_blocks(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    output: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    maps = [_layout.inner_dense(x) for x in (grad, query, key, value, output)]
    for image in zip(*maps, lse, grad_query, grad_key, grad_value, strict=True):
        _backward_image(*image, scale=scale)


def _backward_image(
    grad: Tensor,  # (Cv, H, W)
    query: Tensor,  # (C, H, W)
    key: Tensor,  # (C, H, W)
    value: Tensor,  # (Cv, H, W)
    output: Tensor,  # (Cv, H, W)
    lse: Tensor,  # (H, W)
    grad_query: Tensor,  # (C, H, W), written
    grad_key: Tensor,  # (C, H, W), written
    grad_value: Tensor,  # (Cv, H, W), written
    *,
    scale: float,
) -> None:
    dtype = lse.dtype
    grad, query, key, value = (x.to(dtype) for x in (grad, query, key, value))
    delta = _inner_products(grad, output.to(dtype))
    grads = (grad_query, grad_key, grad_value)
    widened = [_widened(x, dtype) for x in grads]
    for lines, others in ((_columns, False), (_rows, True)):
        maps = map(lines, (grad, query, key, value, lse, delta, *widened))
        _attend_backward(*maps, scale=scale, others=others)
    for x, wide in zip(grads, widened, strict=True):
        if wide is not x:
            x.copy_(wide)


def _inner_products(a: Tensor, b: Tensor) -> Tensor:
    """(H, W), of the vectors of two images (C, H, W)."""
    products = a.new_empty(a.shape[1:])
    for block in _blocks(products, 2 * a.shape[0] * a.shape[2]):
        products[block] = (a[:, block] * b[:, block]).sum(dim=0)
    return products


def _attend_backward(
    grad: Tensor,  # (L, n, Cv)
    query: Tensor,  # (L, n, C)
    key: Tensor,  # (L, n, C)
    value: Tensor,  # (L, n, Cv)
    lse: Tensor,  # (L, n)
    delta: Tensor,  # (L, n), the inner products of grad and output
    grad_query: Tensor,  # (L, n, C), written; with `others` added to
    grad_key: Tensor,  # (L, n, C), likewise
    grad_value: Tensor,  # (L, n, Cv), likewise
    *,
    scale: float,
    others: bool,
) -> None:
    _, size, channels = query.shape
    if others and size == 1:
        return
    outputs = (grad_query, grad_key, grad_value)
    copied = _needs_copies(grad, query, key, value, outputs=outputs)
    # of two of query, key and a gradient of these; between, of gradients, values and a product
    copies = max(2 * channels, 3 * COPIED_CHANNELS) if copied else 0
    for block in _blocks(query, size * (2 * size + copies)):
        weights = _logits(_matrix(query[block]), _matrix(key[block]), scale, others)
        weights.sub_(lse[block][:, :, None]).exp_()
        dlogits = torch.zeros_like(weights) if copied else None
        for c in _channel_slices(value.shape[2], copied):
            g, v = _matrix(grad[block, :, c]), _matrix(value[block, :, c])
            dlogits = torch.bmm(g, v.mT) if dlogits is None else dlogits.baddbmm_(g, v.mT)
            _put_product(grad_value[block, :, c], weights.mT, g, others)
            del g, v
        # d(logits) = weights * (d(weights) - sum of weights * d(weights)), the sum being delta
        dlogits.sub_(delta[block][:, :, None]).mul_(weights).mul_(scale)
        _put_product(grad_query[block], dlogits, _matrix(key[block]), others)
        _put_product(grad_key[block], dlogits.mT, _matrix(query[block]), others)
        del weights, dlogits


def _setup_context(ctx, inputs, output):
    query, key, value, ctx.scale = inputs
    attended, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, attended, lse)


def _autograd(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    return *_BACKWARD(grad, *ctx.saved_tensors, ctx.scale), None


def _flops(query: torch.Size, key: torch.Size, value: torch.Size, *_) -> int:
    """The logits and the weighted sum."""
    batch, channels, height, width = query
    return 2 * batch * height * width * (height + width - 1) * (channels + value[1])


def _flops_backward(grad: torch.Size, query: torch.Size, *_) -> int:
    """The logits again, d(weights) and the gradients of query, key and value."""
    batch, channels, height, width = query
    return 2 * batch * height * width * (height + width - 1) * (3 * channels + 2 * grad[1])


_KERNELS = ("cpu", "cuda")
_FORWARD = _operator.Operator(
    "criss_cross_attention(Tensor query, Tensor key, Tensor value, float scale) -> "
    "(Tensor, Tensor)",
    fake=_allocate,
    kernels=dict.fromkeys(_KERNELS, _forward),
    setup_context=_setup_context,
    backward=_autograd,
    flops=_flops,
)
_BACKWARD = _operator.Operator(
    "criss_cross_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
    "Tensor output, Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
    fake=_allocate_backward,
    kernels=dict.fromkeys(_KERNELS, _backward),
    backward=_operator.no_second_derivative("criss_cross_attention"),
    flops=_flops_backward,
)
