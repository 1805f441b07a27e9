# SPDX-License-Identifier: Apache-2.0
"""Convolution, norm, ReLU: CBR in the papers' figures."""

from collections.abc import Callable

from torch import nn

from ctxops.nn.pointwise import PointwiseConv2d


def cbr(
    in_channels: int,
    channels: int,
    kernel_size: int,
    norm_layer: Callable[[int], nn.Module],
    *,
    dilation: int = 1,
    bias: bool = False,
    activation: bool = True,
) -> nn.Sequential:
    """Convolution that keeps the size, norm, and with ``activation`` ReLU."""
    convolution: nn.Conv2d
    if kernel_size == 1:
        convolution = PointwiseConv2d(in_channels, channels, bias=bias)
    else:
        padding = dilation * (kernel_size // 2)
        convolution = nn.Conv2d(
            in_channels, channels, kernel_size, padding=padding, dilation=dilation, bias=bias
        )
    return nn.Sequential(convolution, norm_layer(channels), *[nn.ReLU(inplace=True)] * activation)
