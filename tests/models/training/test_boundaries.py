# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
import torch

pytest.importorskip("torchvision")

from ctxops.models.data import IGNORE
from ctxops.models.training.boundaries import (
    accuracy_by_region,
    boundary,
    boundary_f,
    maximum_within,
)
from ctxops.models.training.metrics import Metrics, boundary_scores, scores, table

SIZE = (13, 17)


def blobs(classes=3, ignored=True):
    """Labels of blocks, a few pixels of them wrong or ignored."""
    coarse = torch.randint(classes, (1, 1, 4, 5)).float()
    labels = torch.nn.functional.interpolate(coarse, SIZE)[0, 0].to(torch.uint8)
    labels[torch.rand(SIZE) < 0.05] = 0
    if ignored:
        labels[torch.rand(SIZE) < 0.1] = IGNORE
    return labels


def within(p, q, radius):
    return (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 <= radius**2


def edge_pixels(mask):
    """The pixels whose right, lower or lower right neighbour, where there is one, differs."""
    height, width = mask.shape
    return [
        (y, x)
        for y, x in itertools.product(range(height), range(width))
        if any(
            mask[min(y + dy, height - 1), min(x + dx, width - 1)] != mask[y, x]
            for dy, dx in ((0, 1), (1, 0), (1, 1))
        )
    ]


def f_of(ours, theirs, radius):
    ours, theirs = edge_pixels(ours), edge_pixels(theirs)
    if not ours and not theirs:
        return 1.0
    if not ours or not theirs:
        return 0.0
    precision = sum(any(within(p, q, radius) for q in theirs) for p in ours) / len(ours)
    recall = sum(any(within(p, q, radius) for q in ours) for p in theirs) / len(theirs)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_boundary_of_a_mask():
    mask = blobs(2, ignored=False) > 0
    assert boundary(mask).nonzero().tolist() == [list(p) for p in edge_pixels(mask)]
    assert not boundary(torch.ones(4, 5, dtype=torch.bool)).any()


@pytest.mark.parametrize("radius", [0, 1, 3, 20])
def test_maximum_within_a_disk(radius):
    x = torch.randn(2, 7, 9)
    positions = list(itertools.product(range(7), range(9)))
    expected = torch.stack([
        torch.stack([x[:, q[0], q[1]] for q in positions if within(p, q, radius)]).amax(0)
        for p in positions
    ])  # fmt: skip
    assert torch.equal(maximum_within(x, radius), expected.T.reshape(x.shape))


@pytest.mark.parametrize("thresholds", [(0.02, 0.1), (0.05,)])
def test_boundary_f_by_its_definition(thresholds):
    predicted, labels = blobs(4, ignored=False), blobs(3)
    actual = boundary_f(predicted, labels, 5, thresholds)
    ignored = labels == IGNORE
    for t, threshold in enumerate(thresholds):
        radius = math.ceil(threshold * math.hypot(*SIZE))
        expected = [f_of((predicted == k) & ~ignored, labels == k, radius) for k in range(5)]
        assert actual[t].tolist() == pytest.approx(expected)
    # One class that is in neither, one that is in the prediction alone.
    assert actual[0, 4] == 1
    assert actual[0, 3] == 0
    assert 0 < actual[0, 0] < 1


def test_thresholds_are_pixels_of_a_large_image():
    """GALD: 3, 5, 9 and 12 pixels of 1024 x 2048, whose diagonal this row is as long as."""
    labels = (torch.arange(2289) >= 100).to(torch.uint8)[None]
    for pixels, threshold in zip((3, 5, 9, 12), Metrics().thresholds, strict=True):
        for moved in (pixels, pixels + 1):
            # Of its two edges, one lies where the row begins.
            (f,) = boundary_f(labels.roll(moved, 1), labels, 2, [threshold])
            assert f.tolist() == pytest.approx([2 / 3 if moved == pixels else 0.0] * 2)


def test_accuracy_near_boundaries_by_its_definition():
    predicted, labels = blobs(), blobs()
    positions = list(itertools.product(*map(range, SIZE)))
    expected = torch.zeros(2, 2, dtype=torch.int64)
    for p in positions:
        if labels[p] != IGNORE:
            near = any(labels[q] != labels[p] for q in positions if within(p, q, 1))
            expected[0 if near else 1] += torch.tensor([int(predicted[p] == labels[p]), 1])
    assert torch.equal(accuracy_by_region(predicted, labels, 1), expected)
    assert expected.all()


def test_scores_of_boundaries_leave_absent_classes_out():
    result = scores(torch.tensor([[6, 0, 0], [0, 4, 0], [0, 0, 0]]), ("road", "car", "sky"))
    metrics = Metrics(True, thresholds=(0.01, 0.02))
    f = torch.tensor([[0.5, 0.25, 1.0], [0.75, 0.25, 1.0]])
    regions = torch.tensor([[1, 4], [9, 10]])
    found = boundary_scores(f, regions, metrics, ("road", "car", "sky"), result.absent)
    assert found.f == {0.01: {"road": 0.5, "car": 0.25}, 0.02: {"road": 0.75, "car": 0.25}}
    assert found.mean_f == {0.01: 0.375, 0.02: 0.5}
    assert (found.accuracy_at, found.accuracy_away) == pytest.approx((0.25, 0.9))
    named = result._replace(boundaries=found)
    assert named.by_name()["boundary_f/0.02"] == 0.5
    lines = table(named).splitlines()
    assert "mean boundary F  0.3750    0.5000" in lines
    assert "at boundaries   0.2500" in lines


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": ()}, r"thresholds must be numbers between 0 and 1, got \(\)"),
        ({"thresholds": (3,)}, r"thresholds must be numbers between 0 and 1, got \(3,\)"),
        ({"distance": 0}, "distance must be at least 1, got 0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        Metrics(**options)
