# SPDX-License-Identifier: Apache-2.0
"""DenseASPP (Yang et al., CVPR 2018)."""

from collections.abc import Callable, Sequence

from torch import nn

from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.cbr import cbr
from ctxops.nn.dense_aspp import DenseASPP


@register_model("denseaspp", backbone="densenet161", auxiliary_channels=0)
def denseaspp(
    encoder: Encoder,
    *,
    reduced_channels: int | None = None,
    hidden_channels: int = 512,
    channels: int = 128,
    dilations: Sequence[int] = (3, 6, 12, 18, 24),
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """:class:`ctxops.nn.DenseASPP` on the last map, behind one more transition of the DenseNet.

    Source: Yang et al., DenseASPP for Semantic Segmentation in Street Scenes, CVPR 2018, as
    released, without an auxiliary head and without the dropout inside the blocks.

    Args:
        reduced_channels: of the transition, a 1 x 1 convolution and a norm; None: half the last
            map's.
        hidden_channels, channels, dilations: as in :class:`ctxops.nn.DenseASPP`.
    """
    width = encoder.channels[-1]
    reduced_channels = width // 2 if reduced_channels is None else reduced_channels
    context = DenseASPP(
        reduced_channels, hidden_channels, channels, dilations, norm_layer=norm_layer
    )
    transition = cbr(width, reduced_channels, 1, norm_layer, activation=False)
    return Decoder(nn.Sequential(transition, context), context.out_channels)
