# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

from ctxops.nn import AdaptiveContext
from modules import assert_same, cbr, count, pool, randomise


def formula(module, x, fusion):
    maps = [x]
    for context, n in zip(module.contexts, module.output_sizes, strict=True):
        reduced = cbr(context.reduce, x)
        cells = cbr(context.reduce_grid, pool(x, n)).flatten(2)
        image = cbr(context.image, reduced.mean((2, 3), keepdim=True))
        logits = F.conv2d(reduced + image, context.affinity.weight, context.affinity.bias)
        affinity = 1 / (1 + (-logits.flatten(2)).exp())
        y = torch.einsum("bcs,bsi->bci", cells, affinity).unflatten(2, x.shape[2:])
        y = (cbr(context.residual, y) + reduced).relu()
        maps.append(cbr(context.fuse, y) if fusion else y)
    return cbr(module.fuse, torch.cat(maps, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fusion", [True, False])
def test_is_its_formula(fusion, training):
    module = AdaptiveContext(5, 3, (1, 3, 2), fusion=fusion)
    module = randomise(module).double().train(training)
    assert_same(module, [torch.randn(3, 5, 7, 8)], lambda x: formula(module, x, fusion))


def test_parameter_counts():
    with torch.device("meta"):
        assert count(AdaptiveContext(2048)) == 30_455_858
        fusion = 4 * (512 * 512 + 1024)
        assert count(AdaptiveContext(2048, fusion=False)) == 30_455_858 - fusion


def test_says_what_it_is():
    assert "output_sizes=(1, 4)" in repr(AdaptiveContext(4, 4, (1, 4)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AdaptiveContext(0), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: AdaptiveContext(4, 4, (0,)), ValueError, "output_sizes must be in 1"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
