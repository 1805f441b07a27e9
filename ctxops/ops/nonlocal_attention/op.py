# SPDX-License-Identifier: Apache-2.0
"""nonlocal_attention: every position of a map attends to every position of another."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_efficient_attention,
    can_use_flash_attention,
)

from ctxops import _autocast, _layout, _operator
from ctxops._checks import (
    check_forward_mode,
    check_map,
    check_same_dtype,
    check_shape,
    resolve_scale,
)
from ctxops.ops.asymmetric_attention import asymmetric_attention
from ctxops.ops.nonlocal_attention.reference import reference

# The widest head that CUDA's flash kernels take.
_FLASH_WIDTH = 256


@_operator.served_by(
    cpu="torch, fused",
    cuda="torch, fused",
    but="C != Cv on the CPU, half precision with gradient there, float64 on CUDA: torch, in blocks",
)
def nonlocal_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
) -> Tensor:
    r"""Softmax attention of every position of a map to every position of another map.

    .. math::
        y_{b,:,i} = \sum_j \operatorname{softmax}_j\!\big(
            \text{scale} \cdot \langle q_{b,:,i},\, k_{b,:,j} \rangle \big)\; v_{b,:,j}

    It is torch's ``scaled_dot_product_attention`` with the maps laid out, padded and split such
    that a fused backend takes them, or :func:`ctxops.asymmetric_attention` with the other map's
    positions as anchors where that is faster or no backend is there: the N x N weights are never
    formed. NaN and inf come out as the backend has them: a position whose logits are all NaN or
    -inf may get 0, where the reference has NaN.

    Args:
        query: map of shape ``(B, C, H, W)``; channels_last spares a copy of each map.
        key: map of shape ``(B, C, H2, W2)``.
        value: map of shape ``(B, Cv, H2, W2)``.
        scale: factor of the dot products; ``None`` is ``C ** -0.5``, 0.0 is legal.

    Returns:
        ``(B, Cv, H, W)`` in the query's memory format.

    Raises:
        TypeError: no floating tensor, or dtypes that differ (outside autocast).
        ValueError: wrong ranks, B, C or sizes that differ, devices that differ, empty maps.
        NotImplementedError: forward-mode derivatives (use :func:`ctxops.use_reference`). Second
            derivatives raise torch's own error.

    Source: Wang et al., Non-local Neural Networks, CVPR 2018; Zhu et al., ICCV 2019, eq. 2-4 (one
    map) and eq. 15-16 (two maps).

    Dtypes: float32, float64, float16, bfloat16. Autocast casts down.
    Gradients: query, key, value.
    Deterministic: as torch's fused backends, on CUDA only under
        ``torch.use_deterministic_algorithms``.
    Memory: contiguous maps are copied once each, as is the output, and what the backend needs,
        which is linear in the positions. On CUDA C != Cv pads the narrower maps to the wider. On
        the CPU C != Cv, and half precision with gradient, take 16 MiB as asymmetric_attention does.
    """
    _check(query, key, value)
    scale = resolve_scale(scale, query.shape[1])
    query, key, value = _autocast.cast(query, key, value)
    check_same_dtype(query=query, key=key, value=value)
    if _operator.reference_active or query.device.type not in ("cpu", "cuda"):
        output = reference(query, key, value, scale)
        return output.contiguous(memory_format=_layout.memory_format(query))
    check_forward_mode("nonlocal_attention", query, key, value)
    if query.device.type == "cpu" and _blocks_are_faster(query, key, value):
        return asymmetric_attention(query, key.flatten(2), value.flatten(2), scale=scale)
    return _fused(query, key, value, scale)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_map("query", query)
    batch, channels, _, _ = query.shape
    check_map("key", key)
    check_shape("key", key, query, (batch, channels, None, None), "(B, C, H2, W2)")
    height, width = key.shape[2:]
    check_map("value", value)
    check_shape("value", value, query, (batch, None, height, width), "(B, Cv, H2, W2)")


def _sequence(x: Tensor, width: int) -> Tensor:
    """A map (B, C, H, W) as a sequence (B, 1, N, width) with its channels side by side."""
    sequence = x.permute(0, 2, 3, 1).flatten(1, 2)
    if sequence.shape[2] < width:
        sequence = F.pad(sequence, (0, width - sequence.shape[2]))
    return sequence.contiguous()[:, None]


def _blocks_are_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """On the CPU: are the products in blocks faster than torch's fused attention?

    Where it would be padded they take 0.6 to 0.85 of its time, and in half precision its backward
    takes 4 to 15 times theirs; with C = Cv it takes 0.7 to 1.0 of their time otherwise (AVX2).
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    wide = query.shape[1] != value.shape[1]
    return wide or (half and _operator.needs_grad(query, key, value))


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, channels, height, width = query.shape
    value_channels = value.shape[1]
    # At least 2: the stride of a single channel is accidental, and no backend takes that.
    head = part = max(channels, value_channels, 2)
    if query.is_cuda:
        # Wide values go in parts that flash takes. Widths are multiples of 16 bytes there.
        part = min(head, max(channels, _FLASH_WIDTH))
        head = -(-part // 8) * 8
    q, k = _sequence(query, head), _sequence(key, head)
    if query.is_cuda and not _is_taken(q, k):
        # Without a fused backend torch would form the N x N matrix. The other map's positions serve
        # as anchors instead.
        return asymmetric_attention(query, key.flatten(2), value.flatten(2), scale=scale)
    outputs = []
    for v in value.split(part, dim=1):
        attended = F.scaled_dot_product_attention(q, k, _sequence(v, head), scale=scale)
        outputs.append(attended[:, 0, :, : v.shape[1]])
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    output = output.view(batch, height, width, value_channels).permute(0, 3, 1, 2)
    return output.contiguous(memory_format=_layout.memory_format(query))


def _is_taken(q: Tensor, k: Tensor) -> bool:
    """Does a fused backend of CUDA take these sequences (B, 1, N, width)?"""
    parameters = SDPAParams(q, k, k, None, 0.0, False, False)
    return can_use_flash_attention(parameters) or can_use_efficient_attention(parameters)
