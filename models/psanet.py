# SPDX-License-Identifier: Apache-2.0
"""PSANet (Zhao et al., ECCV 2018)."""

from collections.abc import Callable, Sequence

from torch import nn

from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.concat_context import ConcatContext
from ctxops.nn.pointwise_spatial_attention import PointwiseSpatialAttention, PSAVariant


@register_model("psanet", auxiliary_channels=256)
def psanet(
    encoder: Encoder,
    *,
    channels: int = 512,
    mask_size: Sequence[int] = (97, 97),
    shrink_factor: int = 2,
    align_corners: bool = True,
    variant: PSAVariant = "released",
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """:class:`ctxops.nn.PointwiseSpatialAttention` beside the last map: PSANet.

    Source: Zhao et al., PSANet: Point-wise Spatial Attention Network for Scene Parsing, ECCV 2018,
    as released: collection and distribution.

    Args:
        channels: of the attention and of the decoder's map.
        mask_size: height and width of the masks. (97, 97) reaches all of a 769 x 769 crop,
            (129, 257) all of an image of 1024 x 2048.
        shrink_factor, variant: as in :class:`ctxops.nn.PointwiseSpatialAttention`.
        align_corners: as in :class:`SegmentationNetwork`; the attention's maps are
            resized like the logits.
    """
    width = encoder.channels[-1]
    attention = PointwiseSpatialAttention(
        width,
        channels,
        mask_size,
        shrink_factor=shrink_factor,
        align_corners=align_corners,
        variant=variant,
        norm_layer=norm_layer,
    )
    decoder = ConcatContext(attention, width, width, channels, norm_layer=norm_layer)
    return Decoder(decoder, channels)
