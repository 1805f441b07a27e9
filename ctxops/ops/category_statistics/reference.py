# SPDX-License-Identifier: Apache-2.0
"""category_statistics in plain torch: the definition."""

import torch.nn.functional as F
from torch import Tensor

from ctxops import _library


def reference(
    features: Tensor,
    labels: Tensor,
    memory: Tensor | None,
    num_classes: int,
    ignore_index: int,
    align_corners: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Map (B, C, h, w), labels (B, H, W), memory (K, C) -> sums (K, C), weights and counts (K,)."""
    dtype = _library.accumulator(features.dtype)
    resized = F.interpolate(
        features.to(dtype), labels.shape[1:], mode="bilinear", align_corners=align_corners
    )
    pixels = resized.movedim(1, -1).flatten(0, -2)
    labels = labels.flatten().long()
    ignored = labels == ignore_index
    classes = labels.masked_fill(ignored, 0)
    weights = pixels.new_ones(len(pixels))
    if memory is not None:
        weights = 1 - F.cosine_similarity(pixels, memory.to(dtype)[classes], dim=1)
    weights = weights.masked_fill(ignored, 0)
    weighted = (weights[:, None] * pixels).masked_fill(ignored[:, None], 0)
    sums = pixels.new_zeros((num_classes, pixels.shape[1])).index_add(0, classes, weighted)
    counts = classes.new_zeros(num_classes).index_add(0, classes, (~ignored).long())
    return sums, pixels.new_zeros(num_classes).index_add(0, classes, weights), counts
