# SPDX-License-Identifier: Apache-2.0
"""APCNet (He et al., CVPR 2019)."""

from collections.abc import Callable, Sequence

from torch import nn

from ctxops.models.base import SegmentationNetwork
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.adaptive_context import AdaptiveContext


@register_model("apcnet")
def apcnet(
    encoder: Encoder,
    num_classes: int,
    *,
    channels: int = 512,
    output_sizes: Sequence[int] = (1, 2, 3, 6),
    fusion: bool = True,
    auxiliary_channels: int = 256,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    **common,
) -> SegmentationNetwork:
    """:class:`ctxops.nn.AdaptiveContext` on the last map: APCNet.

    Source: He et al., Adaptive Pyramid Context Network for Semantic Segmentation, CVPR 2019.

    Args:
        channels: inside and of the decoder's map.
        output_sizes: the grids.
        fusion: as in :class:`ctxops.nn.AdaptiveContext`.
        auxiliary_channels: as in :class:`SegmentationNetwork`.
    """
    decoder = AdaptiveContext(
        encoder.channels[-1], channels, output_sizes, fusion=fusion, norm_layer=norm_layer
    )
    return SegmentationNetwork(
        encoder,
        decoder,
        channels,
        num_classes,
        auxiliary_channels=auxiliary_channels,
        norm_layer=norm_layer,
        **common,
    )
