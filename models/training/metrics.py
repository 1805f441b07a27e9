# SPDX-License-Identifier: Apache-2.0
"""Scores of a segmentation, from its confusion matrix."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """
    Attributes:
        mean_iou: over the classes that occur in the labels.
        accuracy: share of the labelled pixels whose class is right.
        iou: intersection over union of each class that occurs, by name.
        absent: the classes that no labelled pixel has. What was taken for one of them still counts
            against the class that it is.
    """

    mean_iou: float
    accuracy: float
    iou: dict[str, float]
    absent: tuple[str, ...]


def scores(confusion: Tensor, classes: Sequence[str]) -> Scores:
    """The scores of pixels counted by class (rows) and by predicted class (columns), (K, K).

    Raises:
        ValueError: no pixel at all.
    """
    if not confusion.any():
        raise ValueError("no pixel has a label: nothing can be scored")
    counts = confusion.double().cpu()
    labelled, predicted, right = counts.sum(1), counts.sum(0), counts.diagonal()
    union = labelled + predicted - right
    present = labelled > 0
    iou = {
        name: (hit / whole).item()
        for name, there, hit, whole in zip(classes, present, right, union, strict=True)
        if there
    }
    return Scores(
        sum(iou.values()) / len(iou),
        (right.sum() / labelled.sum()).item(),
        iou,
        tuple(name for name, there in zip(classes, present, strict=True) if not there),
    )


def table(result: Scores) -> str:
    """The scores as lines of text."""
    width = max(map(len, [*result.iou, "pixel accuracy"])) + 2
    rows = {name: f"{value:.4f}" for name, value in result.iou.items()}
    rows |= {"mean IoU": f"{result.mean_iou:.4f}", "pixel accuracy": f"{result.accuracy:.4f}"}
    lines = [f"{name:{width}}{value}" for name, value in rows.items()]
    if result.absent:
        lines.append(f"in no label, not in the mean: {', '.join(result.absent)}")
    return "\n".join(lines)
