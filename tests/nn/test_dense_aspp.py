# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops.nn import DenseASPP
from modules import activate, assert_same, count, randomise


def formula(module, x):
    for i, (block, d) in enumerate(zip(module.blocks, module.dilations, strict=True)):
        norm, _, narrow, second, _, wide = block
        y = activate(x, norm) if i else x.relu()
        y = activate(F.conv2d(y, narrow.weight, narrow.bias), second)
        x = torch.cat([F.conv2d(y, wide.weight, wide.bias, padding=d, dilation=d), x], 1)
    return x


@pytest.mark.parametrize("training", [True, False])
def test_is_its_formula(training):
    module = randomise(DenseASPP(5, 4, 3, (2, 1, 3))).double().train(training)
    assert module.out_channels == 14
    assert_same(module, [torch.randn(2, 5, 7, 6)], lambda x: formula(module, x))


def test_parameter_count():
    """On DenseNet-161 halved once more, whose last map has 1104 channels, 1744 come out."""
    with torch.device("meta"):
        module = DenseASPP(1104)
    widths = [1104 + 128 * i for i in range(5)]
    each = 512 + 2 * 512 + 512 * 128 * 9 + 128
    assert module.out_channels == 1744
    assert count(module) == 512 * sum(widths) + 2 * sum(widths[1:]) + 5 * each
    assert isinstance(module.blocks[0][0], nn.Identity)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DenseASPP(4, 0), ValueError, "hidden_channels must be at least 1, got 0"),
        (lambda: DenseASPP(4, 4, 4, ()), ValueError, "dilations must hold at least one, got none"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
