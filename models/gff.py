# SPDX-License-Identifier: Apache-2.0
"""Gated fully fusion network (Li et al., AAAI 2020)."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from ctxops._checks import check_choice, check_sizes
from ctxops.models.base import Decoder
from ctxops.models.denseaspp import denseaspp
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.cbr import cbr
from ctxops.nn.feature_fusion import AdditionFusion, ConcatFusion, FeaturePyramidFusion
from ctxops.nn.gated_fusion import (
    DenseFeaturePyramid,
    GatedFeaturePyramidFusion,
    GatedFullyFusion,
    GateSource,
)
from ctxops.nn.level_fusion_decoder import LevelFusionDecoder
from ctxops.nn.pyramid_pooling import PyramidPooling

_FUSIONS = {
    "concat": ConcatFusion,
    "addition": AdditionFusion,
    "fpn": FeaturePyramidFusion,
    "gated_fpn": GatedFeaturePyramidFusion,
    "gff": GatedFullyFusion,
}
Context = Literal["ppm", "denseaspp"]
Fusion = Literal["concat", "addition", "fpn", "gated_fpn", "gff"]
# These have the context map on top of the backbone's.
_PYRAMIDS = ("fpn", "gated_fpn")


@register_model("gff", auxiliary_bias=True)
def gff(
    encoder: Encoder,
    *,
    context: Context = "ppm",
    fusion: Fusion = "gff",
    dense_pyramid: bool = True,
    literal: bool = False,
    gate_from: GateSource = "input",
    channels: int = 256,
    context_channels: int = 512,
    align_corners: bool = True,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """PSPNet whose levels are fused by gates, then densely connected with its context map.

    Args:
        context: of the last map. "ppm": :class:`ctxops.nn.PyramidPooling` without ReLU in its
            branches, as in the authors' PSPNet. "denseaspp": :class:`ctxops.nn.DenseASPP` behind
            one more transition, the network ``denseaspp``'s decoder; with
            ``backbone="densenet121"`` the paper's other baseline (Table 4).
        fusion: of all levels of the backbone. "gff": :class:`ctxops.nn.GatedFullyFusion`. What it
            is compared with: "concat", "addition", "fpn" and "gated_fpn",
            :class:`ctxops.nn.ConcatFusion` and the others; the pyramids have the context map on
            top. Two 3 x 3 convolutions, each with norm and ReLU, refine every level after it.
        dense_pyramid: :class:`ctxops.nn.DenseFeaturePyramid` of the refined levels and the context
            map. False: the context map and the refined levels are classified themselves.
        literal: of the dense pyramid: eq. 6 as printed, which leaves out the finest map. That one
            is not refined, as nothing would train the convolutions; not with the feature pyramids.
        gate_from: of "gff".
        channels: of every level.
        context_channels: of the context map of "ppm".
        align_corners: as in :class:`SegmentationNetwork`; all maps are resized like the logits.

    The classifier sees all maps, concatenated at the size of the finest. The text leaves no doubt
    about its layers, but with 71.44 M parameters without dense pyramid and 71.04 M with it and
    ``literal=True`` (19 classes, no auxiliary head) they are not those of Table 3, which has 69.7 M
    and 70.5 M. Source: Li et al., Gated Fully Fusion for Semantic Segmentation, AAAI 2020, Figure
    3, "Network Architecture and Implementation", Tables 1 to 4.
    """
    check_choice("context", context, Context)
    check_choice("fusion", fusion, Fusion)
    check_sizes(channels=channels)
    widths = encoder.channels
    if len(widths) < 2:
        raise ValueError(
            f"gff fuses the maps of a backbone, of which {encoder.name!r} has {len(widths)}: "
            f"choose one with at least two"
        )
    options: dict[str, Any] = {"align_corners": align_corners, "norm_layer": norm_layer}
    of_last: nn.Module
    if context == "ppm":
        of_last = PyramidPooling(widths[-1], context_channels, activation=False, **options)
    else:
        dense = denseaspp(encoder, norm_layer=norm_layer)
        of_last, context_channels = dense.module, dense.channels
    fuse_context = fusion in _PYRAMIDS
    if fuse_context and dense_pyramid and literal:
        raise ValueError(
            f"literal=True leaves out the finest map, of which fusion={fusion!r} makes no other: "
            f"nothing would train its reduction"
        )
    fused_widths = (*widths, context_channels) if fuse_context else widths
    gates: dict[str, Any] = {"gate_from": gate_from} if fusion == "gff" else {}
    fused_channels = channels * (len(widths) if fusion == "concat" else 1)
    pyramid = None
    if dense_pyramid:
        pyramid = DenseFeaturePyramid(
            [fused_channels if literal else channels, *[channels] * (len(widths) - 1)],
            context_channels,
            channels,
            literal=literal,
            **options,
        )
    refine: list[nn.Module] = [
        nn.Sequential(
            cbr(fused_channels, channels, 3, norm_layer), cbr(channels, channels, 3, norm_layer)
        )
        for _ in widths
    ]
    if pyramid is not None and literal:
        refine[0] = nn.Identity()  # nothing would train it
    decoder = LevelFusionDecoder(
        of_last,
        _FUSIONS[fusion](fused_widths, channels, **gates, **options),
        refine,
        pyramid,
        fuse_context=fuse_context,
        align_corners=align_corners,
    )
    context_width = channels if dense_pyramid else context_channels
    return Decoder(decoder, context_width + channels * len(widths), levels=range(len(widths)))
