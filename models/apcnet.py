# SPDX-License-Identifier: Apache-2.0
"""APCNet (He et al., CVPR 2019)."""

from collections.abc import Callable, Sequence

from torch import nn

from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.adaptive_context import AdaptiveContext


@register_model("apcnet", auxiliary_channels=256)
def apcnet(
    encoder: Encoder,
    *,
    channels: int = 512,
    output_sizes: Sequence[int] = (1, 2, 3, 6),
    fusion: bool = True,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """:class:`ctxops.nn.AdaptiveContext` on the last map: APCNet.

    Source: He et al., Adaptive Pyramid Context Network for Semantic Segmentation, CVPR 2019.

    Args:
        channels: inside and of the decoder's map.
        output_sizes: the grids.
        fusion: as in :class:`ctxops.nn.AdaptiveContext`.
    """
    decoder = AdaptiveContext(
        encoder.channels[-1], channels, output_sizes, fusion=fusion, norm_layer=norm_layer
    )
    return Decoder(decoder, channels)
