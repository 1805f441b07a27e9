# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

pytest.importorskip("torchvision")

from ctxops.models.training.metrics import scores, table

CLASSES = ("road", "car", "tree", "sky")


def test_of_a_matrix_by_hand():
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 0, 0, 4], [0, 0, 0, 4]])
    result = scores(confusion, CLASSES)
    expected = {"road": 6 / 9, "car": 3 / 6, "tree": 0.0, "sky": 4 / 8}
    assert result.iou == pytest.approx(expected)
    assert result.mean_iou == pytest.approx(sum(expected.values()) / 4)
    assert result.accuracy == pytest.approx(13 / 20)
    assert result.absent == ()


def test_absent_classes_are_named_and_left_out():
    """Also one that was predicted: that costs the class that it is."""
    confusion = torch.tensor([[6, 0, 2, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    result = scores(confusion, CLASSES)
    assert result.absent == ("tree", "sky")
    assert result.iou == pytest.approx({"road": 6 / 8, "car": 1.0})
    assert result.mean_iou == pytest.approx(7 / 8)
    assert "in no label, not in the mean: tree, sky" in table(result)


def test_table():
    result = scores(torch.eye(4).long(), CLASSES)
    assert table(result).splitlines() == [
        *(f"{name:16}1.0000" for name in (*CLASSES, "mean IoU", "pixel accuracy"))
    ]


def test_large_counts_are_exact():
    confusion = torch.tensor([[2**40, 1], [0, 1]])
    assert scores(confusion, "ab").iou["b"] == 0.5


def test_nothing_labelled():
    with pytest.raises(ValueError, match="no pixel has a label"):
        scores(torch.zeros(4, 4, dtype=torch.int64), CLASSES)
