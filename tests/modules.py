# SPDX-License-Identifier: Apache-2.0
"""What the tests of modules share."""

import torch
from torch import nn

from numerics import random_like


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


def activate(x, norm):
    """Batch norm and ReLU of a map, written out."""
    if norm.training:
        mean = x.mean((0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
    else:
        mean, variance = norm.running_mean, norm.running_var
    gain = norm.weight / (variance + norm.eps).sqrt()
    x = gain[:, None, None] * (x - mean[:, None, None]) + norm.bias[:, None, None]
    return x * (x > 0)
