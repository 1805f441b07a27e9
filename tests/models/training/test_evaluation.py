# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

pytest.importorskip("lightning", reason='needs pip install "ctxops[train]"')

from ctxops.models.data import IGNORE
from ctxops.models.training.boundaries import accuracy_by_region, boundary_f
from ctxops.models.training.evaluation import Evaluation
from ctxops.models.training.metrics import Metrics

CLASSES = ["road", "car", "sky"]


def pairs():
    """Images of two sizes; no label is "sky"."""
    for size in ((1, 9, 12), (1, 16, 8)):
        labels = torch.randint(2, size, dtype=torch.uint8)
        labels[torch.rand(size) < 0.1] = IGNORE
        yield torch.randint(3, size, dtype=torch.uint8), labels


def test_counts_of_all_images():
    metrics, seen = Metrics(True, thresholds=(0.1, 0.2), distance=2), list(pairs())
    evaluation = Evaluation(CLASSES, metrics)
    for pair in seen:
        evaluation.update(*pair)
    result = evaluation.compute()
    f = sum(boundary_f(x[0], y[0], 3, metrics.thresholds) for x, y in seen) / 2
    assert result.boundaries.f[0.2] == pytest.approx(dict(zip(CLASSES[:2], f[1].tolist())))  # noqa: B905
    regions = sum(accuracy_by_region(x[0], y[0], 2) for x, y in seen)
    assert result.boundaries.accuracy_at == pytest.approx((regions[0, 0] / regions[0, 1]).item())
    right = sum(((x == y) & (y != IGNORE)).sum() for x, y in seen)
    assert result.accuracy == pytest.approx(
        (right / sum((y != IGNORE).sum() for _, y in seen)).item()
    )
    assert result.absent == ("sky",)
    evaluation.reset()
    evaluation.update(seen[0][0], torch.full_like(seen[0][1], IGNORE))
    assert evaluation.compute() is None


def test_boundaries_only_where_asked_for():
    evaluation = Evaluation(CLASSES, Metrics())
    for pair in pairs():
        evaluation.update(*pair)
    assert evaluation.compute().boundaries is None
