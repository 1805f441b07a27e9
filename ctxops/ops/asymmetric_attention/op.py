# SPDX-License-Identifier: Apache-2.0
"""asymmetric_attention: every position of a map attends to a few anchors."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops import _autocast, _layout, _operator
from ctxops._checks import (
    check_forward_mode,
    check_map,
    check_same_dtype,
    check_shape,
    resolve_scale,
)
from ctxops.ops.asymmetric_attention.reference import reference

# A block of positions on the CPU: with few anchors it stays in the caches, and never takes more
# than these bytes.
BLOCK_POSITIONS = 2048
BLOCK_BYTES = 16 * 2**20
# Weights of so many bytes are kept for the backward on the CPU.
KEPT_BYTES = 16 * 2**20
# Rows of whole lines of the cache: torch's products are up to 1.8 times as fast with them.
LINE_BYTES = 64


@_operator.served_by(cpu="torch, in blocks", cuda="Triton", but="float64 on CUDA: torch, in blocks")
def asymmetric_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    r"""Softmax attention of every position of a map to S anchors.

    .. math::
        y_{b,:,h,w} = \sum_s \operatorname{softmax}_s\!\big(
            \text{scale} \cdot \langle q_{b,:,h,w},\, k_{b,:,s} \rangle + \text{bias}_{b,s}
        \big)\; v_{b,:,s}

    Args:
        query: map of shape ``(B, C, H, W)``, contiguous or channels_last (others are copied).
        key: ``(B, C, S)``, S at least 1.
        value: ``(B, Cv, S)``.
        bias: ``(B, S)``, added to the logits of each anchor. -inf takes an anchor out.
        scale: factor of the dot products; ``None`` is ``C ** -0.5``, 0.0 is legal.

    Returns:
        ``(B, Cv, H, W)`` in the query's memory format.

    Raises:
        TypeError: no floating tensor, or dtypes that differ (outside autocast).
        ValueError: wrong ranks, B, C or S that differ, devices that differ, no anchors.
        NotImplementedError: forward-mode or second derivatives (use :func:`ctxops.use_reference`).

    Source: Zhu et al., Asymmetric Non-local Neural Networks, ICCV 2019, eq. 9-10. The bias is ours:
    it carries the query's bias when its projection is folded into the keys.

    Dtypes: float32, float64, float16, bfloat16; products summed and softmax taken in float32
        (float64). Autocast casts down.
    Gradients: query, key, value, bias.
    Deterministic: as torch's matrix products on the CPU; yes on CUDA's Triton path.
    Memory: CPU: at most 16 MiB (or what one position takes, if that is more) for a block of logits
        and weights, in half precision also for its inputs and outputs in float32; keys and values
        once more, in float32 for half precision. All B * N * S weights are kept for the backward
        where they take at most 16 MiB in float32 (float64), S rounded up to a multiple of 64 bytes;
        else it makes them anew, block by block. The same on CUDA in float64. CUDA otherwise: B * N
        float32 are kept for the backward, which takes 64 MiB. An upstream gradient in the other
        memory format is copied.
    """
    _check(query, key, value, bias)
    scale = resolve_scale(scale, query.shape[1])
    query, key, value, bias = _autocast.cast(query, key, value, bias)
    check_same_dtype(query=query, key=key, value=value, bias=bias)
    if not _FORWARD.serves(query):
        output = reference(query, key, value, bias, scale)
        return output.contiguous(memory_format=_layout.memory_format(query))
    check_forward_mode("asymmetric_attention", query, key, value, bias)
    save = _operator.needs_grad(query, key, value, bias)
    return _FORWARD(query, key, value, bias, scale, save)[0]


def _check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
    check_map("query", query)
    batch, channels, _, _ = query.shape
    check_shape("key", key, query, (batch, channels, None), "(B, C, S)")
    anchors = key.shape[2]
    if anchors == 0:
        raise ValueError(f"key must have at least one anchor, got {tuple(key.shape)}")
    check_shape("value", value, query, (batch, None, anchors), "(B, Cv, S)")
    if value.shape[1] == 0:
        raise ValueError(f"value must have at least one channel, got {tuple(value.shape)}")
    if bias is not None:
        check_shape("bias", bias, query, (batch, anchors), "(B, S)")


def _allocate(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, save: bool
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = query.shape
    output = _layout.empty_map((batch, value.shape[1], height, width), query)
    dtype = _operator.accumulator(query.dtype)
    # What spares the backward a pass or a product: of each position the logarithm of its softmax's
    # denominator, (B, N), from Triton, the weights (B, N, P) from others if they are small.
    kept: tuple[int, ...] = (batch, height * width)
    if not _operator.uses_triton(query):
        kept = (*kept, _padded(key.shape[2], dtype))
        save = save and math.prod(kept) * dtype.itemsize <= KEPT_BYTES
    return output, query.new_empty(kept if save else (0,), dtype=dtype)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, save: bool
) -> tuple[Tensor, Tensor]:
    output, kept = _allocate(query, key, value, bias, scale, save)
    if output.numel() == 0:
        return output, kept
    query = query.contiguous(memory_format=_layout.memory_format(query))
    with _autocast.disabled(query.device.type):
        if _operator.uses_triton(query):
            from ctxops.ops.asymmetric_attention import triton_kernels

            triton_kernels.forward(query, key, value, bias, scale, output, kept if save else None)
        else:
            _forward_in_blocks(query, key, value, bias, scale, output, kept)
    return output, kept


def _positions(x: Tensor, image: int) -> Tensor:
    """One image of a map as a matrix (N, C), a view in either memory format."""
    _, channels, height, width = x.shape
    return x[image].permute(1, 2, 0).view(height * width, channels)


def _padded(anchors: int, dtype: torch.dtype) -> int:
    """P: so many fill whole lines of the cache."""
    line = LINE_BYTES // dtype.itemsize
    return -(-anchors // line) * line


class _Anchors(NamedTuple):
    """Keys, values and biases of one image, with anchors added that have no weight, up to whole
    lines of the cache. The scale goes to the few keys, not to the many logits."""

    key: Tensor  # (C, P)
    value: Tensor  # (Cv, P)
    bias: Tensor  # (P,)

    @classmethod
    def of(cls, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, dtype: torch.dtype):
        missing = _padded(key.shape[1], dtype) - key.shape[1]
        bias = key.new_zeros(key.shape[1]) if bias is None else bias
        key, value, bias = key.to(dtype) * scale, value.to(dtype), bias.to(dtype)
        if missing == 0:  # no copy
            return cls(key, value, bias)
        key, value = F.pad(key, (0, missing)), F.pad(value, (0, missing))
        return cls(key, value, F.pad(bias, (0, missing), value=-math.inf))

    def weigh(self, query: Tensor, logits: Tensor, weights: Tensor) -> None:
        """Logits and softmax weights (n, P) of the positions (n, C)."""
        torch.mm(query, self.key, out=logits)
        torch.softmax(logits.add_(self.bias), dim=1, out=weights)


def _blocks(
    positions: int, anchors: _Anchors, others: int, kept: Tensor | None
) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
    """Cuts positions into equal blocks, each with two matrices (n, P) to work in. Together with
    ``others`` elements for each position they stay below BLOCK_BYTES. The second is a part of
    ``kept`` (N, P), if that is there."""
    padded = anchors.bias.numel()
    most = BLOCK_BYTES // (anchors.bias.itemsize * (2 * padded + others))
    most = max(1, min(most, BLOCK_POSITIONS))
    size = -(-positions // -(-positions // most))
    first = anchors.bias.new_empty((size, padded))
    second = torch.empty_like(first) if kept is None else None
    for start in range(0, positions, size):
        block = slice(start, min(start + size, positions))
        count = block.stop - start
        yield block, (first[:count], kept[block] if second is None else second[:count])


def _forward_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
    output: Tensor,
    kept: Tensor,
) -> None:
    dtype = _operator.accumulator(query.dtype)
    exact = dtype == query.dtype
    others = 0 if exact else query.shape[1] + value.shape[1]
    for image in range(len(query)):
        anchors = _Anchors.of(
            key[image], value[image], None if bias is None else bias[image], scale, dtype
        )
        q, o = _positions(query, image), _positions(output, image)
        all_weights = kept[image] if kept.numel() > 0 else None
        for block, (logits, weights) in _blocks(len(q), anchors, others, all_weights):
            anchors.weigh(q[block].to(dtype), logits, weights)
            if exact:
                torch.mm(weights, anchors.value.t(), out=o[block])
            else:
                o[block] = weights @ anchors.value.t()


def _allocate_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _layout.empty_map(query.shape, query),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        query.new_empty((0,) if bias is None else bias.shape),
    )


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = _allocate_backward(grad, query, key, value, bias, kept, scale)
    if query.numel() == 0:
        return grads
    layout = _layout.memory_format(query)
    query, grad = query.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    with _autocast.disabled(query.device.type):
        if _operator.uses_triton(query):
            from ctxops.ops.asymmetric_attention import triton_kernels

            grad_bias = grads[3] if bias is not None else None
            triton_kernels.backward(
                grad, query, key, value, bias, scale, kept, *grads[:3], grad_bias
            )
        else:
            _backward_in_blocks(grad, query, key, value, bias, kept, scale, *grads)
    return grads


def _backward_in_blocks(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_bias: Tensor,
) -> None:
    dtype = _operator.accumulator(query.dtype)
    exact = dtype == query.dtype
    others = 0 if exact else 2 * query.shape[1] + value.shape[1]
    count = key.shape[2]
    for image in range(len(query)):
        anchors = _Anchors.of(
            key[image], value[image], None if bias is None else bias[image], scale, dtype
        )
        q, dq, do = (_positions(x, image) for x in (query, grad_query, grad))
        dk, dv, db = (torch.zeros_like(x) for x in anchors)
        all_weights = kept[image] if kept.numel() > 0 else None
        for block, (dlogits, weights) in _blocks(len(q), anchors, others, all_weights):
            q_block, do_block = q[block].to(dtype), do[block].to(dtype)
            if all_weights is None:
                anchors.weigh(q_block, dlogits, weights)
            dv.addmm_(do_block.t(), weights)
            # d(logits) = weights * (d(weights) - sum of weights * d(weights))
            torch.mm(do_block, anchors.value, out=dlogits).mul_(weights)
            dlogits.addcmul_(weights, dlogits.sum(dim=1, keepdim=True), value=-1)
            if bias is not None:
                db.add_(dlogits.sum(dim=0))
            dk.addmm_(q_block.t(), dlogits)
            if exact:
                torch.mm(dlogits, anchors.key.t(), out=dq[block])
            else:
                dq[block] = dlogits @ anchors.key.t()
        grad_key[image], grad_value[image] = dk[:, :count].mul_(scale), dv[:, :count]
        if bias is not None:
            grad_bias[image] = db[:count]


def _setup_context(ctx, inputs, output):
    query, key, value, bias, ctx.scale, _ = inputs
    kept = output[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(query, key, value, bias, kept)


def _autograd(ctx, grad, _):
    if grad is None:
        return None, None, None, None, None, None
    *tensors, kept = ctx.saved_tensors
    dq, dk, dv, db = _BACKWARD(grad, *tensors, kept, ctx.scale)
    return dq, dk, dv, None if tensors[3] is None else db, None, None


def _flops(query: torch.Size, key: torch.Size, value: torch.Size, *_) -> int:
    """The logits and the weighted sum."""
    batch, channels, height, width = query
    return 2 * batch * height * width * key[2] * (channels + value[1])


def _flops_backward(
    grad: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    bias: torch.Size | None,
    kept: torch.Size,
    scale: float,
) -> int:
    """The logits again, if their softmax was not kept, d(weights) and the gradients of query, key
    and value."""
    batch, channels, height, width = query
    products = (2 if len(kept) == 3 else 3) * channels + 2 * grad[1]
    return 2 * batch * height * width * key[2] * products


_KERNELS = ("cpu", "cuda")
_FORWARD = _operator.Operator(
    "asymmetric_attention(Tensor query, Tensor key, Tensor value, Tensor? bias, float scale, "
    "bool save) -> (Tensor, Tensor)",
    fake=_allocate,
    kernels=dict.fromkeys(_KERNELS, _forward),
    setup_context=_setup_context,
    backward=_autograd,
    flops=_flops,
)
_BACKWARD = _operator.Operator(
    "asymmetric_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
    "Tensor? bias, Tensor kept, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_allocate_backward,
    kernels=dict.fromkeys(_KERNELS, _backward),
    backward=_operator.no_second_derivative("asymmetric_attention"),
    flops=_flops_backward,
)
