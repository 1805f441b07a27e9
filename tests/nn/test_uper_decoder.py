# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from ctxops.nn import UPerDecoder
from modules import assert_same, count, feature_pyramid, randomise


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("align_corners", [True, False])
def test_is_its_formula(align_corners, training):
    module = UPerDecoder([4, 5, 6], 3, (1, 2), align_corners=align_corners)
    module = randomise(module).double().train(training)
    # Sizes as backbones round them, and two levels of one size.
    sizes = (7, 9), (4, 5), (4, 5)
    inputs = [torch.randn(2, width, *size) for width, size in zip((4, 5, 6), sizes, strict=True)]
    assert_same(module, inputs, lambda *maps: feature_pyramid(module, *maps))


def test_parameter_count():
    """That of mmsegmentation's head on a ResNet-50, with its classifier of 19 classes."""
    with torch.device("meta"):
        module = UPerDecoder([256, 512, 1024, 2048])
    pyramid = 23_073_792
    lateral = (256 + 512 + 1024) * 512 + 3 * 1024
    refine = 3 * (512 * 512 * 9 + 1024)
    assert count(module) == pyramid + lateral + refine + 4 * 512 * 512 * 9 + 1024


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: UPerDecoder([4]), ValueError, "in_channels must have at least two levels"),
        (lambda: UPerDecoder(4), TypeError, "in_channels must be a list or tuple of integers"),
        (lambda: UPerDecoder([4, 4], 0), ValueError, "channels must be at least 1, got 0"),
        (
            lambda: UPerDecoder([4, 4], 2)(torch.randn(1, 4, 3, 3)),
            ValueError,
            "features must have 2 levels, got 1",
        ),
        (
            lambda: UPerDecoder([4, 5], 2)(*[torch.randn(1, 4, 3, 3)] * 2),
            ValueError,
            r"features\[1\] must have shape",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
