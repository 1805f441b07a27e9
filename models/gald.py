# SPDX-License-Identifier: Apache-2.0
"""Global aggregation then local distribution (Li et al., TIP 2021)."""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from ctxops._checks import check_choice, check_sizes
from ctxops.models._decoders import concat_block
from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.aspp import ASPP
from ctxops.nn.cgnl import CGNL
from ctxops.nn.local_distribution import GALD, Arrangement, Downsample, LDv1, LDv2, Source
from ctxops.nn.non_local import NonLocal2d
from ctxops.nn.pyramid_pooling import PyramidPooling

Aggregation = Literal[None, "ppm", "aspp", "nonlocal", "cgnl"]
Distribution = Literal[None, "ldv1", "ldv2"]


@register_model("gald", auxiliary_bias=True)
def gald(
    encoder: Encoder,
    *,
    global_aggregation: Aggregation = "cgnl",
    local_distribution: Distribution = "ldv1",
    arrangement: Arrangement = "gald",
    downsample: int = 2,
    channels: int = 512,
    aspp_dilations: Sequence[int] = (6, 12, 18),
    mask_downsample: Downsample = "conv",
    kernel_size: int = 5,
    dilation: int = 3,
    query_from: Source = "both",
    key_from: Source = "both",
    align_corners: bool = True,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """Context found on the whole map and distributed to its positions, beside the last map.

    ``CBR(cat(X, CBR(GALD(CBR(X)))))`` with 3 x 3 convolutions and :class:`ctxops.nn.GALD`, then the
    classifier.

    Args:
        global_aggregation: "cgnl": :class:`ctxops.nn.CGNL`. "ppm":
            :class:`ctxops.nn.PyramidPooling`. "aspp": :class:`ctxops.nn.ASPP`. "nonlocal": the
            non-local block of Wang et al. (CVPR 2018) with its residual. None: none.
        local_distribution: "ldv1" or "ldv2": :class:`ctxops.nn.LDv1`, :class:`ctxops.nn.LDv2`.
            None: none. Without both it would be the network ``fcn``.
        arrangement: "gald", "ldga" or "parallel", as in :class:`ctxops.nn.GALD` (Table I c).
        downsample: by how much the map is downsampled before the aggregation.
        channels: of the map in front of the classifier and of all inside.
        aspp_dilations: of "aspp"; on a map of half the size these reach as far as twice of them.
        mask_downsample: ``downsample`` of LDv1 (Table II a).
        kernel_size, dilation: k and r of LDv2. The paper's best are 5 and 6 with ASPP on
            Cityscapes (Table II b), 7 and 6 alone, 5 and 3 for all other data sets.
        query_from, key_from: of LDv2 (Table II c).
        align_corners: as in :class:`SegmentationNetwork`; all maps are resized like the logits.

    The defaults are the head of GALDNet as released, the paper's GALDv1: 66,664,915 parameters for
    19 classes without auxiliary head. Its backbone has ``ceil_mode=True``,
    ``contract_dilation=False`` and ``multi_grid=(1, 2, 4)`` besides. Of GALDv2, whose default is
    ``global_aggregation="aspp"``, ``local_distribution="ldv2"``, no code is released, and no widths
    reproduce the counts of Tables IV and VI; its widths here are those of GALDv1. Source: Li et
    al., Global Aggregation then Local Distribution for Scene Parsing, TIP 2021, Figures 4 to 6,
    Tables I to IV.
    """
    check_choice("global_aggregation", global_aggregation, Aggregation)
    check_choice("local_distribution", local_distribution, Distribution)
    check_sizes(channels=channels)
    # What LD sees: with "gald" the result of GA beside the map.
    after = arrangement == "gald" and global_aggregation is not None

    def aggregation() -> nn.Module | None:
        if global_aggregation == "ppm":
            return PyramidPooling(
                channels, channels, align_corners=align_corners, norm_layer=norm_layer
            )
        if global_aggregation == "aspp":
            return ASPP(
                channels,
                channels // 2,
                aspp_dilations,
                out_channels=channels,
                norm_layer=norm_layer,
            )
        if global_aggregation == "nonlocal":
            return NonLocal2d(
                channels,
                channels // 2,
                channels // 2,
                share=None,
                fuse="add",
                variant="paper",
                norm_layer=norm_layer,
            )
        return None if global_aggregation is None else CGNL(channels, channels // 2)

    def distribution() -> LDv1 | LDv2 | None:
        if local_distribution == "ldv1":
            return LDv1(
                channels, mask_downsample, align_corners=align_corners, norm_layer=norm_layer
            )
        if local_distribution == "ldv2":
            return LDv2(
                channels if after else 0,
                channels,
                channels,
                kernel_size,
                dilation,
                query_from=query_from,
                key_from=key_from,
            )
        return None

    block = GALD(
        aggregation(),
        distribution(),
        arrangement,
        downsample,
        channels=channels,
        align_corners=align_corners,
        norm_layer=norm_layer,
    )
    decoder = concat_block(
        block,
        encoder.channels[-1],
        channels,
        norm_layer,
        block_channels=2 * channels if arrangement == "parallel" else channels,
    )
    return Decoder(decoder, channels)
