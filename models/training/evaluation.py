# SPDX-License-Identifier: Apache-2.0
"""The scores of a split: what is counted image by image, in whichever process."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ctxops.models.data.spec import IGNORE
from ctxops.models.training.boundaries import accuracy_by_region, boundary_f
from ctxops.models.training.metrics import Metrics, Scores, boundary_scores, scores


class Evaluation(Metric):
    """Counts over images, of all processes together; ``compute`` gives :class:`Scores`.

    Args:
        classes: their names.
        metrics: what is counted besides the confusion matrix.
    """

    higher_is_better, is_differentiable, full_state_update = True, False, False
    confusion: Tensor
    boundary_f: Tensor
    images: Tensor
    regions: Tensor

    def __init__(self, classes: list[str], metrics: Metrics) -> None:
        super().__init__()
        self.classes, self.metrics = classes, metrics
        count, integers = len(classes), torch.int64
        for name, start in {
            "confusion": torch.zeros(count, count, dtype=integers),
            "boundary_f": torch.zeros(len(metrics.thresholds), count),
            "images": torch.zeros((), dtype=integers),
            "regions": torch.zeros(2, 2, dtype=integers),
        }.items():
            self.add_state(name, start, dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Shape: ``(B, H, W)`` both, integers; labels also ``IGNORE``."""
        count = len(self.classes)
        self.confusion += multiclass_confusion_matrix(
            predicted.flatten(),
            labels.long().flatten(),
            count,
            ignore_index=IGNORE,
            validate_args=False,
        )
        if not self.metrics.boundaries:
            return
        for ours, theirs in zip(predicted, labels, strict=True):
            self.boundary_f += boundary_f(ours, theirs, count, self.metrics.thresholds)
            self.images += 1
            self.regions += accuracy_by_region(ours, theirs, self.metrics.distance)

    def compute(self) -> Scores | None:
        """None where no pixel had a label."""
        if not self.confusion.any():
            return None
        result = scores(self.confusion, self.classes)
        if not self.metrics.boundaries:
            return result
        f = self.boundary_f / self.images
        boundaries = boundary_scores(f, self.regions, self.metrics, self.classes, result.absent)
        return result._replace(boundaries=boundaries)
