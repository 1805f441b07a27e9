# SPDX-License-Identifier: Apache-2.0
"""Modules on a map in bands of rows give what they give on the whole map."""

import itertools
import math

import pytest
import torch
from torch import nn

from ctxops.nn import (
    AFNB,
    APNB,
    ASPP,
    CGNL,
    GALD,
    AdaptiveContext,
    AsymmetricNonLocalContext,
    ChannelAttention,
    CommonFusion,
    ConcatContext,
    CrissCrossAttention,
    DenseASPP,
    DisentangledNonLocal,
    LDv1,
    LDv2,
    NonLocal2d,
    ObjectContext,
    PositionAttention,
    PyramidPooling,
    SummedFusions,
)
from ctxops.nn.bands import map_in_bands, reach, softmax_over_positions
from ctxops.nn.cbr import cbr
from modules import mostly_slow, randomise

# The maker, the channels of the maps, and how often the module asks for something of all rows.
MODULES = {
    "cbr": (lambda: cbr(6, 4, 3, nn.BatchNorm2d, dilation=3), [6], 0),
    "DenseASPP": (lambda: DenseASPP(6, 4, 4, (1, 3)), [6], 0),
    "ASPP": (lambda: ASPP(6, 4, (2, 5)), [6], 1),
    "APNB": (lambda: APNB(6, 4, 4, output_sizes=(1, 3, 4), fuse="concat"), [6], 1),
    "APNB unfolded": (lambda: APNB(6, 4, 4, output_sizes=(2, 5), fold=False), [6], 1),
    "APNB of the paper": (lambda: APNB(6, 4, 4, variant="paper", share="key_value"), [6], 1),
    "AFNB": (lambda: AFNB(4, 6, 4, 4, output_sizes=(1, 3), fuse="add"), [4, 6], 1),
    "AsymmetricNonLocalContext": (
        lambda: AsymmetricNonLocalContext(4, 6, 6, key_channels=4, value_channels=4),
        [4, 6],
        2,
    ),
    "SummedFusions": (
        lambda: SummedFusions([CommonFusion(4, 6), AFNB(5, 6, 4, 4)]), [4, 5, 6], 1,
    ),
    "PyramidPooling": (lambda: PyramidPooling(6, 4), [6], 1),
    "PyramidPooling, corners": (lambda: PyramidPooling(6, 4, align_corners=True), [6], 1),
    "AdaptiveContext": (lambda: AdaptiveContext(6, 4, (1, 3)), [6], 3),
    "ChannelAttention": (lambda: ChannelAttention(6), [6], 1),
    "ObjectContext": (lambda: ObjectContext(6, 4, 4), [6, 3], 2),
    "CGNL": (lambda: CGNL(6, 4, 2), [6], 2),
    "CGNL, scaled": (lambda: CGNL(6, 4, 2, use_scale=True, norm_layer=nn.BatchNorm2d), [6], 1),
    "LDv1": (lambda: LDv1(6, ratio=4), [6], 0),
    "LDv2": (lambda: LDv2(0, 6, 4, 3, 2), [6], 0),
    "GALD": (lambda: GALD(CGNL(6, 4, 2), LDv1(6, ratio=4), channels=6), [6], 2),
    "GALD, LDv2": (lambda: GALD(ASPP(6, 6, (2,)), LDv2(6, 6, 6, 3, 2), channels=6), [6], 1),
    "GALD, parallel": (
        lambda: GALD(PyramidPooling(6, 6), LDv1(6, ratio=2), "parallel", 4, channels=6), [6], 1,
    ),
    "GALD, ldga": (lambda: GALD(CGNL(6, 4, 2), LDv1(6, ratio=2), "ldga", 1, channels=6), [6], 2),
    "ConcatContext": (lambda: ConcatContext(ChannelAttention(6), 6, 6, 4), [6], 1),
}  # fmt: skip

whole_alone = pytest.mark.parametrize(
    "module",
    [
        NonLocal2d(4, 4, 4),
        APNB(4, 4, 4, sampling="max"),
        APNB(4, 4, 4, sampling="random"),
        APNB(4, 4, 4, norm_layer=lambda channels: nn.GroupNorm(1, channels)),
        PositionAttention(4, 2),
        CrissCrossAttention(4, reduction=2),
        DisentangledNonLocal(4),
        GALD(NonLocal2d(4, 4, 4), None, channels=4),
        LDv1(4, "bilinear"),
        LDv2(0, 4, 4, border="shift"),
        ConcatContext(nn.AvgPool2d(3, 1, 1), 4, 4, 4),
        cbr(4, 4, 3, nn.InstanceNorm2d),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.Conv2d(4, 4, 3),
    ],
    ids=lambda module: type(module).__name__,
)


def strides_of(module):
    return math.prod(m.stride[0] for m in module.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("height", [64, 77])
@pytest.mark.parametrize(
    ("make", "channels", "steps"),
    mostly_slow(MODULES, "AsymmetricNonLocalContext", "ObjectContext", "GALD", "GALD, LDv2"),
)
def test_bands_give_the_whole(make, channels, steps, height):
    module = randomise(make()).double().eval()
    maps = [torch.randn(2, n, height, 41, dtype=torch.float64) for n in channels]
    unit = strides_of(module)
    rows, halo = 16, math.ceil(reach(module) / unit) * unit
    calls, before = itertools.count(), [x.clone() for x in maps]

    def function(*parts):
        next(calls)
        assert all(part.shape[2] <= rows + 2 * halo for part in parts)
        return module(*parts)

    with torch.no_grad():
        expected = module(*maps)
        actual = map_in_bands(function, maps, rows, halo, [1] * len(maps))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    assert next(calls) == (steps + 1) * math.ceil(height / rows)
    assert all(map(torch.equal, maps, before))


@pytest.mark.parametrize(("fine", "align_corners"), [(80, True), (79, True), (79, False)])
def test_maps_of_several_strides(fine, align_corners):
    module = randomise(CommonFusion(4, 6, align_corners=align_corners)).double().eval()
    maps = [torch.randn(1, 4, fine, 33), torch.randn(1, 6, 40, 17)]
    maps = [x.double() for x in maps]
    with torch.no_grad():
        actual = map_in_bands(module, maps, 6, int(reach(module)), [2, 1])
        torch.testing.assert_close(actual, module(*maps))


def test_single_precision():
    module = randomise(AsymmetricNonLocalContext(4, 6, 6, key_channels=4, value_channels=4)).eval()
    maps = [torch.randn(1, n, 70, 30) for n in (4, 6)]
    with torch.no_grad():
        torch.testing.assert_close(map_in_bands(module, maps, 9, 1, [1, 1]), module(*maps))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(4, 4, 5, padding=4, dilation=2), 4),
        (nn.Sequential(cbr(4, 4, 3, nn.BatchNorm2d), cbr(4, 4, 3, nn.BatchNorm2d)), 2),
        (ASPP(4, 4, (3, 7)), 7 + 1),
        (DenseASPP(4, 4, 4, (3, 7)), 3 + 7),
        (LDv2(0, 4, 4, (5, 3), (3, 1)), 6),
        (GALD(ASPP(4, 4, (3,)), None, channels=4), 5 + 2 * (3 + 1)),
    ],
)
def test_reach(module, expected):
    assert reach(module.eval()) == expected


@whole_alone
def test_modules_that_need_the_whole_map(module):
    assert reach(module.eval()) == math.inf


def test_norms_in_training_need_the_whole_map():
    module = cbr(4, 4, 3, nn.BatchNorm2d)
    assert reach(module) == math.inf
    assert reach(module.eval()) == 1


def test_another_forward_is_not_trusted():
    class Mine(ChannelAttention):
        def forward(self, x):
            return super().forward(x) + x.mean()

    assert reach(ChannelAttention(4)) == 0
    assert reach(Mine(4)) == math.inf


def test_errors_pass_through():
    def fails(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        map_in_bands(fails, [torch.zeros(1, 1, 8, 8)], 4, 0, [1])


def test_softmax_in_half_precision():
    """The sum over the positions is beyond its range."""
    x = torch.zeros(1, 1, 300, 300, dtype=torch.float16)
    actual = map_in_bands(softmax_over_positions, [x], 100, 0, [1])
    assert torch.equal(actual, torch.full_like(x, 1 / 90000))
