# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from ctxops.nn import AFNB, APNB, CGNL, FusionNonLocal2d, NonLocal2d, PyramidPooling
from papers.conventions import count_operations


@pytest.mark.parametrize(
    ("kind", "size", "gigas"),
    [
        (NonLocal2d, (96, 96), 58.0127),
        (NonLocal2d, (256, 128), 601.404),
        (APNB, (96, 96), 15.574),
    ],
)
def test_table_1_of_ann(kind, size, gigas):
    options = {"fold": False} if kind is APNB else {}
    with torch.device("meta"):
        block, x = kind(2048, 256, 256, **options), torch.empty(1, 2048, *size)
        count = count_operations(block, x, convention="S")
    assert count / 1e9 == pytest.approx(gigas, abs=5e-5 if gigas == 58.0127 else 5e-4)


def stack():
    """One convolution with and one without bias, one batch norm, and a ReLU that runs twice."""
    relu = nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), relu,
        nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 6, 1, groups=2, bias=False), relu,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        ("T", 35 * 4 * (27 + 1 + 2 + 1) + 35 * 4 + 4 * 6 * (2 + 1)),
        ("S", 35 * 4 * (27 + 1 + 2) + 4 * 4 * (2 * 3 + 1) + 4 * 6 * (2 + 1)),
        ("F", 35 * 4 * (54 + 1 + 2 + 1) + 4 * 6 * (4 + 1)),
    ],
)
def test_each_convention_by_hand(convention, expected):
    assert count_operations(stack(), torch.ones(1, 3, 5, 7), convention=convention) == expected


def test_blocks_by_hand():
    low, high = torch.ones(2, 6, 4, 5), torch.ones(2, 8, 3, 7)
    grids = {"output_sizes": (1, 2), "fold": False, "bias": False}
    convolutions = 2 * (21 * 8 * 3 + 20 * 6 * 3 + 20 * 6 * 4 + 21 * 4 * 8)
    norms = 2 * 3 * 3 * (21 + 20)
    afnb = AFNB(6, 8, 3, 4, **grids)
    assert count_operations(afnb, low, high) == convolutions + norms + 2 * 20 * (3 + 4) * 2
    windows = 2 * 4 * (1 * (20 + 1) + 4 * (4 + 1))
    products = 2 * 2 * 21 * 5 * (3 + 4)
    count = count_operations(afnb, low, high, convention="S")
    assert count == convolutions + norms + windows + products
    count = count_operations(FusionNonLocal2d(6, 8, 3, 4, bias=False), low, high, convention="S")
    assert count == convolutions + norms + 2 * 2 * 21 * 20 * 4
    ppm = PyramidPooling(8, 4, (1, 3))
    layers = 2 * (10 * 8 * 4 + 21 * 16 * 9 * 4) + 2 * 3 * 4 * (10 + 21)
    assert count_operations(ppm, high) == layers + 2 * 2 * 8 * 21
    windows = 2 * 8 * (1 * (21 + 1) + 9 * (2 + 1))
    assert count_operations(ppm, high, convention="S") == layers + windows


@pytest.mark.parametrize(("convention", "each"), [("T", 1), ("F", 2)])
def test_a_shared_embedding_counts_twice(convention, each):
    x = torch.ones(2, 6, 3, 7)
    count = count_operations(NonLocal2d(6, 4, 5, bias=False), x, convention=convention)
    assert count == 42 * (2 * (each * 6 * 4 + 3 * 4) + each * 6 * 5 + each * 5 * 6)
    separate = NonLocal2d(6, 4, 5, bias=False, share=None)
    assert count_operations(separate, x, convention=convention) == count


def test_leaves_no_hook_behind():
    block = stack()
    count_operations(block, torch.ones(1, 3, 5, 7))
    with pytest.raises(RuntimeError):
        count_operations(block, torch.ones(1, 4, 5, 7))
    assert not any(m._forward_hooks for m in block.modules())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: count_operations(stack(), torch.ones(1, 3, 5, 7), convention="X"),
            ValueError,
            r"convention must be one of \('T', 'S', 'F'\), got 'X'",
        ),
        (
            lambda: count_operations(APNB(8, 4, 4), torch.ones(1, 8, 3, 3)),
            ValueError,
            "APNB must have fold=False to be counted",
        ),
        (
            lambda: count_operations(CGNL(8, 8, 2), torch.ones(1, 8, 3, 3), convention="F"),
            TypeError,
            "convention F has no rule for GroupNorm",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
