# SPDX-License-Identifier: Apache-2.0
"""DeepLabv3 (Chen et al., 2017)."""

from collections.abc import Callable, Sequence

from torch import nn

from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.aspp import ASPP
from ctxops.nn.cbr import cbr


@register_model("deeplabv3", auxiliary_channels=256)
def deeplabv3(
    encoder: Encoder,
    *,
    channels: int = 512,
    dilations: Sequence[int] = (12, 24, 36),
    out_channels: int | None = None,
    fuse_kernel_size: int = 3,
    refine: bool = False,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """:class:`ctxops.nn.ASPP` on the last map: DeepLabv3.

    Source: Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017. The
    paper's form is ``channels=256, fuse_kernel_size=1, auxiliary_channels=0`` with
    ``multi_grid=(1, 2, 4)``, and ``dilations=(6, 12, 18)`` at ``output_stride=16``; the defaults
    are those that later work compares with.

    Args:
        channels: of each branch.
        dilations: of the 3 x 3 convolutions.
        out_channels: of the decoder's map; None: ``channels``.
        fuse_kernel_size: of the convolution behind the branches.
        refine: one more 3 x 3 convolution, norm and ReLU, as in torchvision.
    """
    out_channels = channels if out_channels is None else out_channels
    decoder: nn.Module = ASPP(
        encoder.channels[-1],
        channels,
        dilations,
        out_channels=out_channels,
        fuse_kernel_size=fuse_kernel_size,
        norm_layer=norm_layer,
    )
    if refine:
        decoder = nn.Sequential(decoder, cbr(out_channels, out_channels, 3, norm_layer))
    return Decoder(decoder, out_channels)
