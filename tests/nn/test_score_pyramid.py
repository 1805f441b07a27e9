# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops.nn import (
    BilinearDeconvolution,
    BoundaryRefinement,
    ProgressiveUpsampling,
    ScorePyramid,
)
from modules import assert_same, randomise


class Sized(nn.Module):
    """A module of a map and a size as one of a map: what assert_same compares."""

    def __init__(self, module, size):
        super().__init__()
        self.module, self.size = module, size

    def forward(self, x):
        return self.module(x, self.size)


def doubled(x, weight, size):
    """Every position adds its taps around twice its place."""
    height, width = x.shape[2:]
    y = x.new_zeros(x.shape[0], weight.shape[1], 2 * height + 1, 2 * width + 1)
    for i in range(3):
        for j in range(3):
            taps = torch.einsum("bchw,co->bohw", x, weight[:, :, i, j])
            y[:, :, i : i + 2 * height : 2, j : j + 2 * width : 2] += taps
    return y[:, :, 1 : 1 + size[0], 1 : 1 + size[1]]


def pointwise(layer, x):
    return torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], x) + layer.bias[:, None, None]


def upsampled(module, x, size):
    halves = [size]
    for _ in module.doublings:
        halves.append(tuple(-(-side // 2) for side in halves[-1]))
    if x.shape[2:] != halves[-1]:
        x = F.interpolate(x, halves[-1], mode="bilinear", align_corners=False)
    for double, refine, half in zip(
        module.doublings, module.refine, reversed(halves[:-1]), strict=True
    ):
        x = refine(doubled(x, double.weight, half))
    return x


def refinement():
    return BoundaryRefinement(5)


def score(width):
    return nn.Conv2d(width, 5, 1)


def test_doubling_starts_as_bilinear_interpolation():
    double = BilinearDeconvolution(5)
    x = torch.randn(2, 5, 4, 6)
    expected = F.interpolate(x, (7, 11), mode="bilinear", align_corners=True)
    torch.testing.assert_close(double(x, (7, 11)), expected)
    torch.testing.assert_close(double(x, (8, 12))[:, :, :7, :11], expected)


@pytest.mark.parametrize("size", [(7, 11), (8, 12), (7, 12)], ids=str)
def test_doubling_is_its_formula(size):
    double = randomise(BilinearDeconvolution(5)).double()
    x = torch.randn(2, 5, 4, 6)
    assert_same(Sized(double, size), [x], lambda x: doubled(x, double.weight, size))


@pytest.mark.parametrize(
    ("ratio", "shape", "size", "doublings"),
    [
        (1, (4, 6), (4, 6), 0),
        (2, (4, 6), (7, 12), 1),
        (4, (4, 6), (13, 24), 2),
        (4, (3, 5), (13, 24), 2),  # of a backbone that rounds sizes down
        (14, (2, 2), (25, 28), 3),
    ],
)
def test_upsampling(ratio, shape, size, doublings):
    module = randomise(ProgressiveUpsampling(ratio, 5, refinement)).double()
    assert len(module.doublings) == len(module.refine) == doublings
    x = torch.randn(2, 5, *shape)
    assert_same(Sized(module, size), [x], lambda x: upsampled(module, x, size))


def test_scores_are_added_from_the_last_level_down():
    pyramid = ScorePyramid((3, 4, 6), (4, 8, 8), 5, score, refinement)
    assert [len(upsample.doublings) for upsample in pyramid.upsample] == [1, 0]

    def formula(*maps):
        fine, middle, coarse = (
            refine(pointwise(layer, x))
            for x, layer, refine in zip(maps, pyramid.score, pyramid.refine, strict=True)
        )
        y = pyramid.refine_sum[1](middle + coarse)
        (double,) = pyramid.upsample[0].doublings
        return pyramid.refine_sum[0](fine + doubled(y, double.weight, fine.shape[2:]))

    maps = [torch.randn(2, 3, 7, 8), torch.randn(2, 4, 4, 4), torch.randn(2, 6, 4, 4)]
    assert_same(randomise(pyramid).double(), maps, formula)


def test_one_level_is_scored_and_refined():
    pyramid = ScorePyramid((3,), (4,), 5, score, refinement)
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(pyramid(x), pyramid.refine[0](pyramid.score[0](x)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BilinearDeconvolution(0), ValueError, "channels must be at least 1, got 0"),
        (
            lambda: BilinearDeconvolution(5)(torch.ones(1, 4, 2, 2), (4, 4)),
            ValueError,
            r"x must have shape \(B, 5, H, W\), got \(1, 4, 2, 2\)",
        ),
        (
            lambda: ProgressiveUpsampling(2.0, 5, refinement),
            TypeError,
            r"ratio must be an integer, got 2\.0",
        ),
        (
            lambda: ScorePyramid((3, 4), (4,), 5, score, refinement),
            ValueError,
            r"strides must be 2, one of each level, got \(4,\)",
        ),
        (
            lambda: ScorePyramid((3, 4), (4, 8), 5, score, refinement)(torch.ones(1, 3, 2, 2)),
            ValueError,
            "features must have 2 levels, got 1",
        ),
        (
            lambda: ScorePyramid((3,), (4,), 5, score, refinement)(torch.ones(1, 4, 2, 2)),
            ValueError,
            r"features\[0\] must have shape \(B, 3, H, W\), got \(1, 4, 2, 2\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
