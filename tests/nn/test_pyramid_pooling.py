# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

import ctxops
from ctxops.nn import PyramidPooling
from modules import assert_same, cbr, count, normalise, pool, randomise


def formula(module, x, activation, align_corners):
    maps = [x]
    for branch, n in zip(module.branches, module.output_sizes, strict=True):
        convolution, norm, *relu = branch
        assert len(relu) == activation
        y = normalise(F.conv2d(pool(x, n), convolution.weight), norm)
        y = y.relu() if activation else y
        maps.append(F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=align_corners))
    return cbr(module.fuse, torch.cat(maps, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("activation", [True, False])
def test_is_its_formula(activation, align_corners, training):
    options = {"activation": activation, "align_corners": align_corners}
    module = randomise(PyramidPooling(5, 3, (1, 3, 2), **options)).double().train(training)
    expected = lambda x: formula(module, x, **options)  # noqa: E731
    assert_same(module, [torch.randn(3, 5, 7, 8)], expected)


def test_image_without_norm():
    """Its branch has a bias, and trains on one image; branches may be narrower than the result."""
    module = randomise(PyramidPooling(5, 3, (1, 2), branch_channels=2, image_norm=False)).double()
    x = torch.randn(1, 5, 4, 6, dtype=torch.float64)
    module.train()(x).backward(torch.randn(1, 3, 4, 6, dtype=torch.float64))
    assert all(p.grad is not None for p in module.parameters())
    module.eval()
    image, grid = module.branches
    mean = F.conv2d(pool(x, 1), image[0].weight, image[0].bias).relu()
    y = normalise(F.conv2d(pool(x, 2), grid[0].weight), grid[1]).relu()
    y = F.interpolate(y, (4, 6), mode="bilinear")
    expected = cbr(module.fuse, torch.cat([x, mean.expand(-1, -1, 4, 6), y], 1))
    torch.testing.assert_close(module(x), expected)


def test_pools_once(monkeypatch):
    calls = []
    module = __import__("ctxops.nn.bands", fromlist=["bands"])

    def pyramid_pool(x, output_sizes):
        calls.append(tuple(output_sizes))
        return ctxops.pyramid_pool(x, output_sizes)

    monkeypatch.setattr(module, "pyramid_pool", pyramid_pool)
    PyramidPooling(4, 2)(torch.randn(2, 4, 5, 5))
    assert calls == [(1, 2, 3, 6)]


def test_parameter_counts():
    with torch.device("meta"):
        assert count(PyramidPooling(2048)) == 23_073_792
        assert count(PyramidPooling(2048, activation=False)) == 23_073_792
        assert count(PyramidPooling(2048, kernel_size=1)) == 23_073_792 - 4096 * 512 * 8


def test_says_what_it_is():
    assert "output_sizes=(1, 4), align_corners=True" in repr(
        PyramidPooling(4, 4, (1, 4), align_corners=True)
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PyramidPooling(4, 0), ValueError, "channels must be at least 1, got 0"),
        (lambda: PyramidPooling(4, 4, ()), ValueError, "output_sizes must hold 1 to 32 integers"),
        (lambda: PyramidPooling(4, kernel_size=4), ValueError, "kernel_size must be odd"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
