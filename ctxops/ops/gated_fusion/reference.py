# SPDX-License-Identifier: Apache-2.0
"""gated_fusion in plain torch: the definition."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    features: Sequence[Tensor], gates: Sequence[Tensor], align_corners: bool
) -> tuple[Tensor, ...]:
    """L maps (B, C, H_l, W_l) and their gates (B, 1, H_l, W_l) -> L maps like the features."""
    sent = [gate * x for x, gate in zip(features, gates, strict=True)]
    fused = []
    for level, (x, gate) in enumerate(zip(features, gates, strict=True)):
        others = sent[:level] + sent[level + 1 :]
        received = sum(_resize(other, x, align_corners) for other in others)
        fused.append((1 + gate) * x + (1 - gate) * received)
    return tuple(fused)


def reference_gates(
    features: Sequence[Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """L maps (B, C, H_l, W_l), weight (L, C), bias (L,) -> L gates (B, 1, H_l, W_l)."""
    gates = []
    for level, x in enumerate(features):
        logits = (x * weight[level, :, None, None]).sum(dim=1, keepdim=True)
        gates.append(torch.sigmoid(logits if bias is None else logits + bias[level]))
    return tuple(gates)


def _resize(x: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    if x.shape[2:] == like.shape[2:]:
        return x
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=align_corners)
