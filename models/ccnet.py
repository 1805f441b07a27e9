# SPDX-License-Identifier: Apache-2.0
"""CCNet (Huang et al., ICCV 2019)."""

from collections.abc import Callable

from torch import nn

from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.concat_context import ConcatContext
from ctxops.nn.criss_cross import RecurrentCrissCrossAttention


@register_model("ccnet", auxiliary_channels=256)
def ccnet(
    encoder: Encoder,
    *,
    channels: int = 512,
    recurrence: int = 2,
    reduction: int = 8,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """Recurrent criss-cross attention beside the last map: CCNet.

    Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, ICCV 2019, as
    released, but for the norms' activation: :class:`ctxops.nn.RecurrentCrissCrossAttention` says
    how. Its auxiliary head had ``auxiliary_channels=512`` and ``auxiliary_bias=True``.

    Args:
        channels: of the attention and of the decoder's map.
        recurrence: rounds of attention.
        reduction: query and key have ``channels // reduction`` channels.
    """
    width = encoder.channels[-1]
    attention = RecurrentCrissCrossAttention(
        width, channels, recurrence=recurrence, reduction=reduction, norm_layer=norm_layer
    )
    decoder = ConcatContext(attention, width, channels, channels, norm_layer=norm_layer)
    return Decoder(decoder, channels)
