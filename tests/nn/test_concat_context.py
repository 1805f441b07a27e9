# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from ctxops.nn import (
    ConcatContext,
    RecurrentCrissCrossAttention,
)
from modules import assert_same, cbr, count, randomise


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_is_its_formula(kernel_size, training):
    module = ConcatContext(nn.Conv2d(5, 3, 1), 5, 3, 4, kernel_size=kernel_size)
    module = randomise(module).double().train(training)
    assert module.fuse[0].weight.shape[2:] == (kernel_size, kernel_size)

    def formula(x):
        return cbr(module.fuse, torch.cat([x, module.context(x)], 1))

    assert_same(module, [torch.randn(2, 5, 4, 6)], formula)


def test_parameter_count_of_ccnet():
    with torch.device("meta"):
        context = RecurrentCrissCrossAttention(2048, 512)
        assert count(ConcatContext(context, 2048, 512, 512)) == 23_924_353


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ConcatContext(torch.relu, 4, 4, 4),
            TypeError,
            r"context must be a torch\.nn\.Module, got builtin_function_or_method",
        ),
        (
            lambda: ConcatContext(nn.Identity(), 4, 0, 4),
            ValueError,
            "context_channels must be at least 1, got 0",
        ),
        (
            lambda: ConcatContext(nn.Identity(), 4, 4, 4, kernel_size=2),
            ValueError,
            "kernel_size must be odd and at least 1, got 2",
        ),
        (
            lambda: ConcatContext(nn.MaxPool2d(1, return_indices=True), 4, 4, 4)(
                torch.ones(1, 4, 6, 6)
            ),
            TypeError,
            r"context\(x\) must be a torch\.Tensor, got tuple",
        ),
        (
            lambda: ConcatContext(nn.AvgPool2d(2), 4, 4, 4)(torch.ones(1, 4, 6, 6)),
            ValueError,
            r"context\(x\) must have shape \(1, 4, 6, 6\), got \(1, 4, 3, 3\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
