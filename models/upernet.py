# SPDX-License-Identifier: Apache-2.0
"""UPerNet (Xiao et al., ECCV 2018)."""

from collections.abc import Callable, Sequence

from torch import nn

from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.uper_decoder import UPerDecoder


@register_model("upernet", output_stride=32, auxiliary_channels=256)
def upernet(
    encoder: Encoder,
    *,
    channels: int = 512,
    output_sizes: Sequence[int] = (1, 2, 3, 6),
    align_corners: bool = True,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """:class:`ctxops.nn.UPerDecoder` on all maps: UPerNet.

    Source: Xiao et al., Unified Perceptual Parsing for Scene Understanding, ECCV 2018, for one
    task, with the auxiliary head of later work.

    Args:
        channels: of each level and of the decoder's map.
        output_sizes: the grids of the pyramid pooling.
        align_corners: as in :class:`SegmentationNetwork`; the levels are resized like the logits.
    """
    decoder = UPerDecoder(
        encoder.channels,
        channels,
        output_sizes,
        align_corners=align_corners,
        norm_layer=norm_layer,
    )
    return Decoder(decoder, channels, levels=range(len(encoder.channels)))
