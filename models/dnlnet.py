# SPDX-License-Identifier: Apache-2.0
"""DNLNet (Yin et al., ECCV 2020)."""

from collections.abc import Callable

from torch import nn

from ctxops.models._decoders import concat_block
from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.disentangled_non_local import DisentangledNonLocal


@register_model("dnlnet", auxiliary_channels=256)
def dnlnet(
    encoder: Encoder,
    *,
    channels: int = 512,
    key_channels: int | None = None,
    temperature: float = 0.05,
    use_scale: bool = True,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """A disentangled non-local block beside the last map: DNLNet.

    Source: Yin et al., Disentangled Non-Local Neural Networks, ECCV 2020, as released.

    Args:
        channels: of the block and of the decoder's map.
        key_channels, temperature, use_scale: as in :class:`ctxops.nn.DisentangledNonLocal`.
    """
    block = DisentangledNonLocal(
        channels,
        key_channels,
        temperature=temperature,
        use_scale=use_scale,
        norm_layer=norm_layer,
    )
    return Decoder(concat_block(block, encoder.channels[-1], channels, norm_layer), channels)
