# SPDX-License-Identifier: Apache-2.0
"""category_statistics in plain torch: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops import _operator


def reference(
    features: Tensor,
    labels: Tensor,
    memory: Tensor | None,
    num_classes: int,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Map (B, C, h, w), labels (B, H, W), memory (K, C) -> sums (K, C), weights and counts (K,).

    A label that is neither a class nor ignored turns all sums and weights into NaN.
    """
    dtype = _operator.accumulator(features.dtype)
    resized = F.interpolate(
        features.to(dtype), labels.shape[1:], mode="bilinear", align_corners=align_corners
    )
    pixels = resized.movedim(1, -1).flatten(0, -2)
    labels = labels.flatten().long()
    is_class = (labels != ignore_index) & (labels >= 0) & (labels < num_classes)
    classes = labels.masked_fill(~is_class, 0)
    weights = pixels.new_ones((len(pixels),))
    if memory is not None:
        weights = 1 - F.cosine_similarity(pixels, memory.to(dtype)[classes], dim=1)
    weights = weights.masked_fill(~is_class, 0)
    weighted = (weights[:, None] * pixels).masked_fill(~is_class[:, None], 0)
    sums = pixels.new_zeros((num_classes, pixels.shape[1])).index_add(0, classes, weighted)
    totals = pixels.new_zeros((num_classes,)).index_add(0, classes, weights)
    counts = classes.new_zeros((num_classes,)).index_add(0, classes, is_class.long())
    outside = (~is_class & (labels != ignore_index)).any()
    return sums.masked_fill(outside, torch.nan), totals.masked_fill(outside, torch.nan), counts
