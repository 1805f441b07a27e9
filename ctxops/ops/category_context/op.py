# SPDX-License-Identifier: Apache-2.0
"""category_context: what is stored of each class, averaged by the class probabilities."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops import _autocast, _layout, _operator
from ctxops._checks import check_map, check_same_dtype, check_shape
from ctxops.ops.category_context.reference import reference


@_operator.served_by(cpu="torch", cuda="torch")
def category_context(logits: Tensor, memory: Tensor, *, hard: bool = False) -> Tensor:
    r"""The mean of a memory's rows, one per class, by the class probabilities of each position.

    .. math::
        y_{b,:,i} = \sum_k \operatorname{softmax}_k(l_{b,:,i})\; m_{k,:}
        \qquad \text{hard:}\quad y_{b,:,i} = m_{\arg\max_k l_{b,k,i},\,:}

    Args:
        logits: scores of K classes, a map of shape ``(B, K, h, w)``.
        memory: ``(K, C)``, one row per class.
        hard: takes the row of the most likely class instead of the mean.

    Returns:
        ``(B, C, h, w)`` in the memory format of the logits.

    Raises:
        TypeError: no floating tensor, or dtypes that differ (outside autocast).
        ValueError: wrong ranks, K that differ, devices that differ, empty maps.

    Source: Jin et al., Mining Contextual Information Beyond Image for Semantic Segmentation, ICCV
    2021, eq. 11-12; ``hard`` is an option of the released code.

    Dtypes: float32, float64, float16, bfloat16. Autocast casts down.
    Gradients: logits (none where hard) and memory, of any order.
    Deterministic: as torch's matrix products; hard: as its indexing.
    Memory: the weights, as large as the logits, which the backward keeps; hard: B * h * w int64,
        and the output twice where it is contiguous. In bfloat16 on the CPU torch's product may hold
        the output in float32 besides.
    """
    check_map("logits", logits)
    check_shape("memory", memory, logits, (logits.shape[1], None), "(K, C)")
    logits, memory = _autocast.cast(logits, memory)
    check_same_dtype(logits=logits, memory=memory)
    channels_last = _layout.memory_format(logits) == torch.channels_last
    if _operator.reference_active:
        output = reference(logits, memory, hard)
    elif hard:
        output = _rows(logits, memory, channels_last)
    else:
        output = _means(logits, memory, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return output.contiguous(memory_format=layout)


def _rows(logits: Tensor, memory: Tensor, channels_last: bool) -> Tensor:
    index = logits.argmax(dim=1)
    if channels_last:
        return F.embedding(index, memory).permute(0, 3, 1, 2)
    # Gathering channel by channel: the transposition of gathered rows takes three times as long.
    return memory.t()[:, index].transpose(0, 1)


def _means(logits: Tensor, memory: Tensor, channels_last: bool) -> Tensor:
    if not channels_last:
        weights = logits.softmax(dim=1).flatten(2)
        rows = memory.t().expand(logits.shape[0], -1, -1)
        return torch.bmm(rows, weights).unflatten(2, logits.shape[2:])
    # As the last dimension: torch's softmax over the channels would lay the map out anew.
    weights = logits.permute(0, 2, 3, 1).softmax(dim=3)
    if logits.dtype == torch.bfloat16 and logits.device.type == "cpu":
        # oneDNN's convolution takes 0.5 to 0.7 of the time of the product; in float32 up to 1.8.
        return F.conv2d(weights.permute(0, 3, 1, 2), memory.t()[:, :, None, None])
    return (weights @ memory).permute(0, 3, 1, 2)
