# SPDX-License-Identifier: Apache-2.0
"""PSPNet (Zhao et al., CVPR 2017)."""

from collections.abc import Callable, Sequence

from torch import nn

from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.pyramid_pooling import PyramidPooling


@register_model("pspnet", auxiliary_channels=256)
def pspnet(
    encoder: Encoder,
    *,
    channels: int = 512,
    output_sizes: Sequence[int] = (1, 2, 3, 6),
    branch_activation: bool = True,
    align_corners: bool = True,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """:class:`ctxops.nn.PyramidPooling` on the last map: PSPNet.

    Source: Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, as released.

    Args:
        channels: of each branch and of the decoder's map.
        output_sizes: the grids.
        branch_activation: ReLU in the branches. False, with ``auxiliary_channels=512`` and
            ``auxiliary_bias=True``: the PSPNet of the authors of GFF and GALD.
        align_corners: as in :class:`SegmentationNetwork`; the branches are resized like
            the logits.
    """
    decoder = PyramidPooling(
        encoder.channels[-1],
        channels,
        output_sizes,
        activation=branch_activation,
        align_corners=align_corners,
        norm_layer=norm_layer,
    )
    return Decoder(decoder, channels)
