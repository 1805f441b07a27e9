# SPDX-License-Identifier: Apache-2.0
"""The non-local network (Wang et al., CVPR 2018) for segmentation."""

from collections.abc import Callable

from torch import nn

from ctxops._checks import check_sizes
from ctxops.models._decoders import concat_block
from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.non_local import NonLocal2d


@register_model("nonlocal", auxiliary_channels=256)
def non_local(
    encoder: Encoder,
    *,
    channels: int = 512,
    key_channels: int | None = None,
    use_scale: bool = True,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """A non-local block beside the last map, added to what it was given.

    Source: Wang et al., Non-local Neural Networks, CVPR 2018, eq. 6 in its embedded Gaussian form:
    linear embeddings, and a norm behind W_o. The bias of W_o, which the norm takes away again, is
    not in the released code.

    Args:
        channels: of the block and of the decoder's map.
        key_channels: of query, key and value; None: ``channels // 2``.
        use_scale: the attention's scale is ``key_channels ** -0.5``; False: 1, as in the paper.
    """
    check_sizes(channels=channels)
    key_channels = max(1, channels // 2) if key_channels is None else key_channels
    check_sizes(key_channels=key_channels)
    block = NonLocal2d(
        channels,
        key_channels,
        key_channels,
        share=None,
        fuse="add",
        variant="paper",
        scale=key_channels**-0.5 if use_scale else 1.0,
        out_norm=True,
        norm_layer=norm_layer,
    )
    return Decoder(concat_block(block, encoder.channels[-1], channels, norm_layer), channels)
