# SPDX-License-Identifier: Apache-2.0
"""How well the boundaries of a segmentation lie, and how right it is at and away from them."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ctxops.models.data.spec import IGNORE


def boundary(mask: Tensor) -> Tensor:
    """The positions that differ from the next one on the right, below, or both, ``(..., H, W)``."""
    mask = torch.cat((mask, mask[..., -1:, :]), -2)
    mask = torch.cat((mask, mask[..., -1:]), -1)
    here = mask[..., :-1, :-1]
    others = mask[..., :-1, 1:], mask[..., 1:, :-1], mask[..., 1:, 1:]
    return (here != others[0]) | (here != others[1]) | (here != others[2])


def maximum_within(x: Tensor, radius: int) -> Tensor:
    """The maximum over the disk ``dy ** 2 + dx ** 2 <= radius ** 2`` around each position.

    Shape: ``(B, H, W)``, floating -> the same. Of zeros and ones it is their dilation.
    """
    height, result = x.shape[1], x
    for dy in range(min(radius, height - 1) + 1):
        dx = math.isqrt(radius**2 - dy**2)
        row = F.max_pool2d(x, (1, 2 * dx + 1), 1, (0, dx))
        up = F.pad(row[:, dy:], (0, 0, 0, dy), value=-math.inf)
        down = F.pad(row[:, : height - dy], (0, 0, dy, 0), value=-math.inf)
        result = torch.maximum(result, torch.maximum(up, down))
    return result


def boundary_f(
    predicted: Tensor, labels: Tensor, num_classes: int, thresholds: Sequence[float]
) -> Tensor:
    """The F-score of each class's boundary in an image, at each threshold: ``(T, num_classes)``.

    Precision is the share of the predicted mask's :func:`boundary` that lies at most
    ``ceil(threshold * diagonal)`` pixels from that of the labels, recall the reverse. Where neither
    mask has a boundary, F is 1: over many images a rare class scores high. Ignored pixels belong to
    no mask.

    Shape: predicted and labels ``(H, W)``, integers in [0, num_classes); labels also ``IGNORE``.

    Source: Perazzi et al., CVPR 2016; per class as Takikawa et al., Gated-SCNN, ICCV 2019, and Li
    et al., GALD, TIP 2021, Table V, have it: 0.00088, 0.001875, 0.00375 and 0.005 are 3, 5, 9 and
    12 pixels of 1024 x 2048.
    """
    predicted = torch.where(labels == IGNORE, labels, predicted)
    radii = [math.ceil(threshold * math.hypot(*labels.shape)) for threshold in thresholds]
    scores = torch.ones(len(radii), num_classes, device=labels.device)
    for k in torch.cat((predicted.flatten(), labels.flatten())).unique().tolist():
        if k == IGNORE:
            continue
        both = boundary(torch.stack((predicted == k, labels == k))).float()
        count = both.sum((1, 2))
        if not count.any():
            continue
        for t, radius in enumerate(radii):
            hits = (both * maximum_within(both, radius).flip(0)).sum((1, 2))
            precision, recall = hits / count.clamp_min(1)
            scores[t, k] = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return scores


def accuracy_by_region(predicted: Tensor, labels: Tensor, distance: int) -> Tensor:
    """Labelled pixels, and how many of them are right, near a boundary and elsewhere.

    A pixel is near one if some pixel at most so far from it has another label; ``IGNORE`` is one.

    Shape: predicted and labels ``(H, W)``, integers -> ``(2, 2)``, int64: (near, elsewhere) times
        (right, all).

    Source: Peng et al., Large Kernel Matters, CVPR 2017, Table 5, with a distance of 7. What
    distance it means is not stated; Euclidean is our reading.
    """
    own = labels.float()
    largest, negative = maximum_within(torch.stack((own, -own)), distance)
    near = (largest != own) | (-negative != own)
    right, labelled = predicted == labels, labels != IGNORE
    regions = (near & labelled, ~near & labelled)
    return torch.stack([torch.stack(((right & r).sum(), r.sum())) for r in regions])
