# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from ctxops.nn import ASPP
from modules import assert_same, cbr, count, randomise


def formula(module, x):
    image = cbr(module.image[1], x.mean((2, 3), keepdim=True))
    maps = [image + torch.zeros_like(x[:, :1]), cbr(module.branches[0], x)]
    for branch, dilation in zip(module.branches[1:], module.dilations, strict=True):
        assert branch[0].weight.shape[2:] == (3, 3)
        maps.append(cbr(branch, x, dilation))
    return cbr(module.fuse, torch.cat(maps, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"out_channels": 2}, {"fuse_kernel_size": 1}], ids=str)
def test_is_its_formula(arguments, training):
    module = randomise(ASPP(5, 3, (1, 2, 4), **arguments)).double().train(training)
    assert_same(module, [torch.randn(3, 5, 7, 6)], lambda x: formula(module, x))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"in_channels": 2048}, 42_211_328),
        # Of what stands before the classifier in readings (i) to (iv) of GALD's Table IV.
        (
            {"in_channels": 512, "channels": 256, "out_channels": 512},
            512 * 256 * (1 + 1 + 3 * 9) + 5 * 512 + 1280 * 512 * 9 + 1024,
        ),
        (
            {"in_channels": 2048, "channels": 256, "out_channels": 512, "fuse_kernel_size": 1},
            2048 * 256 * (1 + 1 + 3 * 9) + 5 * 512 + 1280 * 512 + 1024,
        ),
        (
            {"in_channels": 2048, "channels": 256, "fuse_kernel_size": 1},
            2048 * 256 * (1 + 1 + 3 * 9) + 5 * 512 + 1280 * 256 + 512,
        ),
    ],
    ids=["MCIBI", "i, ii", "iii", "iv"],
)
def test_parameter_counts(arguments, expected):
    with torch.device("meta"):
        assert count(ASPP(**arguments)) == expected


def test_says_what_it_is():
    assert "dilations=(2, 3)" in repr(ASPP(4, 4, (2, 3)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ASPP(0), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: ASPP(4, out_channels=0), ValueError, "out_channels must be at least 1, got 0"),
        (lambda: ASPP(4, 4, 6), TypeError, "dilations must be a list or tuple of integers, got 6"),
        (lambda: ASPP(4, 4, []), ValueError, "dilations must hold at least one, got none"),
        (lambda: ASPP(4, 4, (1, 0)), ValueError, r"dilations\[1\] must be at least 1, got 0"),
        (lambda: ASPP(4, fuse_kernel_size=2), ValueError, "fuse_kernel_size must be odd"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
