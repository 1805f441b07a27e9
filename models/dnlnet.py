# SPDX-License-Identifier: Apache-2.0
"""DNLNet (Yin et al., ECCV 2020)."""

from collections.abc import Callable

from torch import nn

from ctxops.models._decoders import concat_block
from ctxops.models.base import SegmentationNetwork
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.disentangled_non_local import DisentangledNonLocal


@register_model("dnlnet")
def dnlnet(
    encoder: Encoder,
    num_classes: int,
    *,
    channels: int = 512,
    key_channels: int | None = None,
    temperature: float = 0.05,
    use_scale: bool = True,
    auxiliary_channels: int = 256,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    **common,
) -> SegmentationNetwork:
    """A disentangled non-local block beside the last map: DNLNet.

    Source: Yin et al., Disentangled Non-Local Neural Networks, ECCV 2020, as released.

    Args:
        channels: of the block and of the decoder's map.
        key_channels, temperature, use_scale: as in :class:`ctxops.nn.DisentangledNonLocal`.
        auxiliary_channels: as in :class:`SegmentationNetwork`.
    """
    block = DisentangledNonLocal(
        channels,
        key_channels,
        temperature=temperature,
        use_scale=use_scale,
        norm_layer=norm_layer,
    )
    return SegmentationNetwork(
        encoder,
        concat_block(block, encoder.channels[-1], channels, norm_layer),
        channels,
        num_classes,
        auxiliary_channels=auxiliary_channels,
        norm_layer=norm_layer,
        **common,
    )
