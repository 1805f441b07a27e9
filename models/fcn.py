# SPDX-License-Identifier: Apache-2.0
"""Fully convolutional network (Long et al., CVPR 2015), dilated: the baseline of all others."""

from collections.abc import Callable

from ctxops.models.base import SegmentationNetwork
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from torch import nn

from ctxops.nn.cbr import cbr


@register_model("fcn")
def fcn(
    encoder: Encoder,
    num_classes: int,
    *,
    channels: int = 512,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    **common,
) -> SegmentationNetwork:
    """One 3 x 3 convolution to ``channels``, norm and ReLU on the last map, then the classifier."""
    decoder = cbr(encoder.channels[-1], channels, 3, norm_layer)
    return SegmentationNetwork(
        encoder, decoder, channels, num_classes, norm_layer=norm_layer, **common
    )
