# SPDX-License-Identifier: Apache-2.0
"""What the tests of modules share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ctxops
from numerics import random_like


def mostly_slow(cases, *quick: str):
    """The cases, a dictionary or a list, of which the quick suite runs the named ones alone.

    A case that is a tuple gives several arguments.
    """
    cases = cases if isinstance(cases, dict) else {str(case): case for case in cases}
    assert cases.keys() >= set(quick)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=name,
            marks=() if name in quick else pytest.mark.slow,
        )
        for name, case in cases.items()
    ]


def randomise(module: nn.Module) -> nn.Module:
    """Nothing at zero or one: neither output projections nor norms hide what the block computes."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module


def assert_same(block, inputs, expected_of):
    """Outputs and all gradients equal those of ``expected_of(*inputs)``, in float64."""
    inputs = [x.double().requires_grad_() for x in inputs]
    leaves = [*inputs, *block.parameters()]
    expected = expected_of(*inputs)
    upstream = random_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    actual = block(*inputs)
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(actual, leaves, upstream, allow_unused=True)
    for a, b in zip(grads, expected_grads, strict=True):
        # A parameter without influence may be unused or get zeros.
        a, b = (torch.zeros((), dtype=torch.float64) if g is None else g for g in (a, b))
        torch.testing.assert_close(*torch.broadcast_tensors(a, b), rtol=1e-6, atol=1e-8)


def normalise(x, norm):
    """Batch norm of a map, written out."""
    if norm.training:
        mean = x.mean((0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
    else:
        mean, variance = norm.running_mean, norm.running_var
    gain = norm.weight / (variance + norm.eps).sqrt()
    return gain[:, None, None] * (x - mean[:, None, None]) + norm.bias[:, None, None]


def activate(x, norm):
    """Batch norm and ReLU of a map, written out."""
    x = normalise(x, norm)
    return x * (x > 0)


def cbr(layers, x, dilation=1, bias=False):
    """Convolutions that keep the size, batch norm and ReLU after each."""
    while len(layers):
        convolution, norm, _ = layers[:3]
        assert (convolution.bias is not None) is bias
        padding = dilation * (convolution.weight.shape[2] // 2)
        x = F.conv2d(x, convolution.weight, convolution.bias, padding=padding, dilation=dilation)
        layers, x = layers[3:], activate(x, norm)
    return x


def feature_pyramid(module, *maps):
    """The formula of UPerDecoder."""

    def resize(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=module.align_corners)

    *finer, last = maps
    sums = [module.context(last)]
    for x, lateral in zip(reversed(finer), reversed(module.lateral), strict=True):
        sums.insert(0, cbr(lateral, x) + resize(sums[0], x))
    levels = [cbr(refine, y) for refine, y in zip(module.refine, sums[:-1], strict=True)]
    levels = [resize(y, maps[0]) for y in (*levels, sums[-1])]
    return cbr(module.fuse, torch.cat(levels, 1))


def pool(x, n):
    """Adaptive average pooling to n x n, bin by bin."""
    _, _, height, width = x.shape
    rows = [slice(i * height // n, -((i + 1) * height // -n)) for i in range(n)]
    columns = [slice(i * width // n, -((i + 1) * width // -n)) for i in range(n)]
    return torch.stack(
        [torch.stack([x[:, :, r, c].mean((2, 3)) for c in columns], 2) for r in rows], 2
    )


def count(module):
    return sum(p.numel() for p in module.parameters())


def flop_counter() -> FlopCounterMode:
    """Torch's, with the products of our operators."""
    return FlopCounterMode(display=False, custom_mapping=ctxops.flop_formulas)
