# SPDX-License-Identifier: Apache-2.0
"""What is scored, and the scores of a segmentation from its counts."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ctxops._checks import check_flags, check_sizes


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What is scored besides IoU and accuracy.

    Attributes:
        boundaries: the F-score of each class's boundary, and the accuracy at and away from
            boundaries.
        thresholds: of the F-score, shares of the image's diagonal. Those of GALD's Table V.
        distance: in pixels, up to which a pixel is at a boundary. That of GCN's Table 5.
    """

    boundaries: bool = False
    thresholds: Sequence[float] = (0.00088, 0.001875, 0.00375, 0.005)
    distance: int = 7

    def __post_init__(self) -> None:
        check_flags(boundaries=self.boundaries)
        check_sizes(distance=self.distance)
        if not self.thresholds or not all(0 < x < 1 for x in self.thresholds):
            raise ValueError(f"thresholds must be numbers between 0 and 1, got {self.thresholds!r}")


class BoundaryScores(NamedTuple):
    """
    Attributes:
        f: by threshold and class, of the classes that occur, the mean over all images of
            :func:`ctxops.models.training.boundaries.boundary_f`.
        mean_f: by threshold, the mean over these classes.
        accuracy_at: share of the labelled pixels near a boundary whose class is right; nan where
            there are none.
        accuracy_away: of all others.
    """

    f: dict[float, dict[str, float]]
    mean_f: dict[float, float]
    accuracy_at: float
    accuracy_away: float


class Scores(NamedTuple):
    """
    Attributes:
        mean_iou: over the classes that occur in the labels.
        accuracy: share of the labelled pixels whose class is right.
        iou: intersection over union of each class that occurs, by name.
        absent: the classes that no labelled pixel has. What was taken for one of them still counts
            against the class that it is.
        boundaries: where they were asked for.
    """

    mean_iou: float
    accuracy: float
    iou: dict[str, float]
    absent: tuple[str, ...]
    boundaries: BoundaryScores | None = None

    def by_name(self) -> dict[str, float]:
        """All of them, by names for a log."""
        named = {"mIoU": self.mean_iou, "accuracy": self.accuracy}
        named |= {f"iou/{name}": iou for name, iou in self.iou.items()}
        if self.boundaries is not None:
            named |= {f"boundary_f/{t}": f for t, f in self.boundaries.mean_f.items()}
            named["accuracy/at_boundaries"] = self.boundaries.accuracy_at
            named["accuracy/away_from_boundaries"] = self.boundaries.accuracy_away
        return named


def scores(confusion: Tensor, classes: Sequence[str]) -> Scores:
    """The scores of pixels counted by class (rows) and by predicted class (columns), (K, K).

    Raises:
        ValueError: no pixel at all.
    """
    if not confusion.any():
        raise ValueError("no pixel has a label: nothing can be scored")
    counts = confusion.cpu().double()
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


def boundary_scores(
    f: Tensor, regions: Tensor, metrics: Metrics, classes: Sequence[str], absent: Sequence[str]
) -> BoundaryScores:
    """The scores of means ``f (T, K)`` and of the counts ``regions (2, 2)``.

    Both as in :mod:`ctxops.models.training.boundaries`; ``absent`` classes are left out.
    """
    by_class = {
        threshold: {name: x for name, x in zip(classes, row, strict=True) if name not in absent}
        for threshold, row in zip(metrics.thresholds, f.tolist(), strict=True)
    }
    means = {threshold: sum(row.values()) / len(row) for threshold, row in by_class.items()}
    return BoundaryScores(by_class, means, *(regions[:, 0] / regions[:, 1]).tolist())


def table(result: Scores) -> str:
    """The scores as lines of text."""
    rows = dict(result.iou)
    rows |= {"mean IoU": result.mean_iou, "pixel accuracy": result.accuracy}
    boundaries = result.boundaries
    if boundaries is not None:
        rows |= {
            "at boundaries": boundaries.accuracy_at,
            "away from them": boundaries.accuracy_away,
        }
    width = max(map(len, [*rows, "pixel accuracy"])) + 2
    lines = [f"{name:{width}}{value:.4f}" for name, value in rows.items()]
    if boundaries is not None:
        columns = [
            boundaries.f[t] | {"mean boundary F": mean} for t, mean in boundaries.mean_f.items()
        ]
        width = max(map(len, columns[0])) + 2
        heads = "".join(f"{t:<10g}" for t in boundaries.f)
        lines.append(f"{'boundary F at':{width}}{heads}".rstrip())
        for name in columns[0]:
            cells = "".join(f"{column[name]:<10.4f}" for column in columns)
            lines.append(f"{name:{width}}{cells}".rstrip())
    if result.absent:
        lines.append(f"in no label, not in the mean: {', '.join(result.absent)}")
    return "\n".join(lines)
