# SPDX-License-Identifier: Apache-2.0
"""The comparison that every other test rests on must be able to fail."""

import pytest
import torch

from numerics import LAYOUTS, assert_close, check_operator


def test_accepts_the_rounded_result():
    exact = torch.randn(1000, dtype=torch.float64)
    assert_close(exact.float(), exact.float(), exact)


@pytest.mark.parametrize(
    "damage",
    [
        lambda x: x + 1e-5,
        lambda x: x * 1.00001,
        lambda x: x.flip(0),
        lambda x: torch.where(torch.arange(1000) == 500, torch.nan, x),
        lambda x: torch.where(torch.arange(1000) == 500, torch.inf, x),
        lambda x: torch.where(torch.arange(1000) == 500, 0.0, x),
        lambda x: x[:999],
        lambda x: x.double(),
    ],
    ids=["shifted", "scaled", "permuted", "nan", "inf", "zeroed", "shorter", "dtype"],
)
def test_rejects(damage):
    exact = torch.randn(1000, dtype=torch.float64) + 3
    with pytest.raises(AssertionError):
        assert_close(damage(exact.float()), exact.float(), exact)


def test_rejects_a_lost_nan():
    exact = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    with pytest.raises(AssertionError, match="NaN"):
        assert_close(torch.ones(2), exact.float(), exact)


@pytest.mark.parametrize("elements", [2, 50])
def test_rejects_a_wrong_gradient(elements):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    with pytest.raises(AssertionError, match="gradient of input 0"):
        check_operator(Halved.apply, torch.clone, [torch.randn(elements)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_values(layout):
    x = torch.randn(2, 3, 4, 5)
    y = LAYOUTS[layout](x)
    assert torch.equal(y, x[:1].expand_as(x) if layout == "expanded" else x)
