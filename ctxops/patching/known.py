# SPDX-License-Identifier: Apache-2.0
"""The modules of other packages that ctxops can compute: one entry a class.

To add one, write its ``forward`` in ``forwards.py``, its entry here, and its original in
``tests/originals.py``. Checked with mmcv 2.1.0, mmsegmentation 1.2.2, sssegmentation
1.7.0, segmentation_models.pytorch 0.6.0 and timm 1.0.31.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from ctxops.patching import forwards


@dataclasses.dataclass(frozen=True)
class Known:
    """What computes a class, and what shows that it is the version that we know."""

    forward: Callable  # the module's, its arguments named as theirs
    by: str  # the operators
    children: str | None = ""  # the names of all children; None: children are numbered
    optional: str = ""  # names of further children, which may be missing
    attributes: str = ""  # names of what else the forward reads
    refuse: Callable[[Any], str] = lambda module: ""  # why the module's options do not fit


def _no_pairwise(module: Any) -> str:
    """Non-local blocks: only a softmax of products has an operator."""
    modes = ("embedded_gaussian", "embeddedgaussian", "gaussian")
    return "" if module.mode in modes else f"no operator computes mode={module.mode!r}"


def _not_disentangled(module: Any) -> str:
    if module.mode == "gaussian" or module.sub_sample:
        return "the original computes neither mode='gaussian' nor sub_sample=True correctly"
    return _no_pairwise(module)


def _reduced_query(module: Any) -> str:
    # The original puts the channels of a reduced query into the positions that are missing.
    return "" if module.query_downsample is None else "no operator computes query_downsample"


_PROJECTIONS = "query_project key_project value_project"
_CRISS_CROSS = Known(
    forwards.criss_cross,
    by="criss_cross_attention",
    children="query_conv key_conv value_conv gamma",
)
_NON_LOCAL = Known(
    forwards.non_local,
    by="nonlocal_attention",
    children="g conv_out",
    optional="theta phi concat_project",
    attributes="mode use_scale sub_sample inter_channels",
    refuse=_no_pairwise,
)
_DISENTANGLED = dataclasses.replace(
    _NON_LOCAL,
    forward=forwards.disentangled,
    children="g theta phi conv_out conv_mask",
    optional="concat_project",
    attributes=f"{_NON_LOCAL.attributes} temperature",
    refuse=_not_disentangled,
)


def _self_attention(forward: Callable, by: str, channels: str, children: str = "") -> Known:
    return Known(
        forward,
        by=by,
        children=f"{_PROJECTIONS} {children}",
        optional="out_project query_downsample key_downsample",
        attributes=f"query_downsample key_downsample out_project matmul_norm {channels}",
        refuse=_reduced_query,
    )


_ANCHORS = "pyramid_pool, asymmetric_attention"
_MAPS = "nonlocal_attention or asymmetric_attention"
_ANY = f"pyramid_pool, {_MAPS}"
_MMSEG, _SSSEG = "mmseg.models.decode_heads", "ssseg.modules.models.segmentors"

KNOWN = {
    "mmcv.ops.cc_attention.CrissCrossAttention": _CRISS_CROSS,
    "mmcv.cnn.bricks.non_local.NonLocal2d": _NON_LOCAL,
    f"{_SSSEG}.nonlocalnet.nonlocalblock.NonLocal2d": _NON_LOCAL,
    f"{_MMSEG}.dnl_head.DisentangledNonLocal2d": _DISENTANGLED,
    f"{_SSSEG}.dnlnet.dnlblock.DisentangledNonLocal2d": _DISENTANGLED,
    f"{_MMSEG}.ann_head.SelfAttentionBlock": _self_attention(
        forwards.self_attention, _ANCHORS, "channels"
    ),
    f"{_SSSEG}.base.selfattention.SelfAttentionBlock": _self_attention(
        forwards.self_attention, _ANY, "transform_channels"
    ),
    f"{_MMSEG}.ann_head.AFNB": Known(
        forwards.asymmetric_fusion, by=_ANCHORS, children="stages bottleneck"
    ),
    f"{_SSSEG}.annnet.afnblock.AFNBlock": Known(
        forwards.asymmetric_fusion, by=_ANCHORS, children="stages bottleneck"
    ),
    f"{_MMSEG}.ann_head.APNB": Known(
        forwards.asymmetric_pyramid, by=_ANCHORS, children="stages bottleneck"
    ),
    f"{_SSSEG}.annnet.apnblock.APNBlock": Known(
        forwards.asymmetric_pyramid, by=_ANCHORS, children="stages bottleneck"
    ),
    f"{_MMSEG}.da_head.PAM": _self_attention(
        forwards.position_attention, _MAPS, "channels", "gamma"
    ),
    f"{_SSSEG}.danet.pam.PositionAttentionModule": _self_attention(
        forwards.position_attention, _MAPS, "transform_channels", "gamma"
    ),
    f"{_MMSEG}.da_head.CAM": Known(
        forwards.channel_attention, by="the products of ChannelAttention", children="gamma"
    ),
    f"{_SSSEG}.danet.cam.ChannelAttentionModule": Known(
        forwards.channel_attention, by="the products of ChannelAttention", children="gamma"
    ),
    f"{_MMSEG}.ocr_head.ObjectAttentionBlock": _self_attention(
        forwards.object_attention, "asymmetric_attention", "channels", "bottleneck"
    ),
    f"{_SSSEG}.ocrnet.objectcontext.ObjectContextBlock": _self_attention(
        forwards.object_attention, "asymmetric_attention", "transform_channels", "bottleneck"
    ),
    f"{_MMSEG}.psp_head.PPM": Known(
        forwards.pyramid_maps, by="pyramid_pool", children=None, attributes="align_corners"
    ),
    f"{_SSSEG}.pspnet.ppm.PyramidPoolingModule": Known(
        forwards.pyramid_context,
        by="pyramid_pool",
        children="branches bottleneck",
        attributes="align_corners",
    ),
    "segmentation_models_pytorch.decoders.pspnet.decoder.PSPModule": Known(
        forwards.pyramid_blocks, by="pyramid_pool", children="blocks"
    ),
    "timm.layers.non_local_attn.NonLocalAttn": Known(
        forwards.normed_non_local,
        by="nonlocal_attention",
        children="t p g z norm",
        attributes="scale",
    ),
}
