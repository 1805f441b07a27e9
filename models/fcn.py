# SPDX-License-Identifier: Apache-2.0
"""Fully convolutional network (Long et al., CVPR 2015), dilated: the baseline of all others."""

from collections.abc import Callable

from torch import nn

from ctxops._checks import check_kernel_size, check_sizes
from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.cbr import cbr
from ctxops.nn.concat_context import ConcatContext


@register_model("fcn")
def fcn(
    encoder: Encoder,
    *,
    channels: int = 512,
    kernel_size: int = 3,
    dilation: int = 1,
    convolutions: int = 1,
    concat: bool = False,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """Convolutions to ``channels``, each with norm and ReLU, on the last map.

    Args:
        channels: of each convolution.
        kernel_size: of each convolution. 1: the usual head of an HRNet.
        dilation: of each convolution, but not of the one behind the concatenation.
        convolutions: how many, one after the other.
        concat: the map beside what they make of it, and one more of them.
    """
    check_kernel_size(kernel_size)
    check_sizes(channels=channels, dilation=dilation, convolutions=convolutions)
    width = encoder.channels[-1]
    first, *rest = (
        cbr(channels if i else width, channels, kernel_size, norm_layer, dilation=dilation)
        for i in range(convolutions)
    )
    decoder: nn.Module
    if concat:
        context = nn.Sequential(first, *rest)
        decoder = ConcatContext(
            context, width, channels, channels, kernel_size=kernel_size, norm_layer=norm_layer
        )
    else:
        decoder = nn.Sequential(first, *rest) if rest else first
    return Decoder(decoder, channels)
