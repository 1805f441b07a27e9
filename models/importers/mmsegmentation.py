# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of mmsegmentation, 1.x and 0.x."""

import functools
from collections.abc import Callable
from typing import Any

from ctxops.models.importers.importer import (
    HRNET,
    RESNEST,
    RESNET,
    STEM,
    Importer,
    Shapes,
    backbone_arguments,
    prefixed,
    square,
)
from ctxops.models.importers.mmsegmentation_config import untold


def _module(theirs: str, ours: str) -> dict[str, str]:
    """mmcv's ConvModule onto convolution and norm."""
    return {f"{theirs}.conv": f"{ours}.0", f"{theirs}.bn": f"{ours}.1"}


_COMMON = (
    prefixed(RESNET | RESNEST | STEM | HRNET, "backbone.")
    | {"decode_head.conv_seg": "classifier.1", "auxiliary_head.conv_seg": "auxiliary.1.1"}
    | _module("auxiliary_head.convs.0", "auxiliary.0")
)


def _mmseg_network(shapes: Shapes, head: str = "decode_head") -> dict[str, Any]:
    auxiliary = "auxiliary_head.convs.0.conv.weight"
    arguments = backbone_arguments(shapes, "backbone.")
    arguments["num_classes"] = shapes[f"{head}.conv_seg.weight"][0]
    if head == "decode_head":
        width = shapes[auxiliary][0] if auxiliary in shapes else 0
        arguments |= {"auxiliary_channels": width, "auxiliary_bias": False}
    return arguments


def _mmseg_channels(
    weight: str, **further: Callable[[Shapes, int], object]
) -> Callable[[Shapes], dict[str, Any]]:
    """The common arguments, the width of the head, and what else the shapes and the width tell."""

    def arguments(shapes: Shapes) -> dict[str, Any]:
        channels = shapes[weight][0]
        others = {name: read(shapes, channels) for name, read in further.items()}
        return _mmseg_network(shapes) | {"channels": channels} | others

    return arguments


def _reduction(weight: str) -> Callable[[Shapes, int], int]:
    return lambda shapes, channels: channels // shapes[weight][0]


def _width(weight: str) -> Callable[[Shapes, int], int]:
    return lambda shapes, _: shapes[weight][0]


def _mmseg(
    model: str,
    marker: str,
    modules: dict[str, str],
    arguments: Callable[[Shapes], dict[str, Any]],
    zeros: tuple[str, ...] = (),
) -> Importer:
    return Importer(
        "mmsegmentation",
        model,
        ("backbone.", marker),
        _COMMON | modules,
        arguments,
        zeros,
        untold=functools.partial(untold, model),
    )


# Two convolutions with a block between them, and the map beside what they make of it.
_MMSEG_CONCAT = (
    _module("decode_head.convs.0", "decoder.context.0")
    | _module("decode_head.convs.1", "decoder.context.2")
    | _module("decode_head.conv_cat", "decoder.fuse")
)


def _mmseg_attention(theirs: str, ours: str) -> dict[str, str]:
    """ANN's blocks: query and key with a norm, value and W_o without."""
    return (
        _module(f"{theirs}.stages.0.query_project", f"{ours}.query")
        | _module(f"{theirs}.stages.0.key_project", f"{ours}.key")
        | {
            f"{theirs}.stages.0.value_project": f"{ours}.value",
            f"{theirs}.stages.0.out_project": f"{ours}.out",
        }
        | _module(f"{theirs}.bottleneck", f"{ours}.fusion")
    )


def _grids(prefix: str, square: str) -> Callable[[Shapes, int], tuple[int, ...]]:
    """The grids of which a list of modules predicts the cells."""

    def read(shapes: Shapes, _: int) -> tuple[int, ...]:
        cells = [shapes[square.format(i)][0] for i in range(shapes.count(prefix))]
        return tuple(round(number**0.5) for number in cells)

    return read


def _ocr_arguments(shapes: Shapes) -> dict[str, Any]:
    regions = "decode_head.0.convs.0.conv.weight"
    return _mmseg_network(shapes, "decode_head.1") | {
        "channels": shapes["decode_head.1.bottleneck.conv.weight"][0],
        "key_channels": shapes["decode_head.1.object_context_block.value_project.conv.weight"][0],
        "region_channels": shapes[regions][0],
        "region_kernel_size": shapes[regions][2],
    }


_OCR_BLOCK = "decode_head.1.object_context_block"
_PSA = "decoder.context"

IMPORTERS = [
    _mmseg(
        "upernet",
        "decode_head.fpn_bottleneck.",
        _module("decode_head.psp_modules.{}.1", "decoder.context.branches.{}")
        | _module("decode_head.bottleneck", "decoder.context.fuse")
        | _module("decode_head.lateral_convs.{}", "decoder.lateral.{}")
        | _module("decode_head.fpn_convs.{}", "decoder.refine.{}")
        | _module("decode_head.fpn_bottleneck", "decoder.fuse"),
        _mmseg_channels("decode_head.fpn_bottleneck.conv.weight"),
    ),
    _mmseg(
        "pspnet",
        "decode_head.psp_modules.",
        _module("decode_head.psp_modules.{}.1", "decoder.branches.{}")
        | _module("decode_head.bottleneck", "decoder.fuse"),
        _mmseg_channels("decode_head.bottleneck.conv.weight"),
    ),
    _mmseg(
        "deeplabv3",
        "decode_head.aspp_modules.",
        _module("decode_head.image_pool.1", "decoder.image.1")
        | _module("decode_head.aspp_modules.{}", "decoder.branches.{}")
        | _module("decode_head.bottleneck", "decoder.fuse"),
        _mmseg_channels("decode_head.bottleneck.conv.weight"),
    ),
    _mmseg(
        "apcnet",
        "decode_head.acm_modules.",
        _module("decode_head.acm_modules.{}.pooled_redu_conv", "decoder.contexts.{}.reduce_grid")
        | _module("decode_head.acm_modules.{}.input_redu_conv", "decoder.contexts.{}.reduce")
        | _module("decode_head.acm_modules.{}.global_info", "decoder.contexts.{}.image")
        | {"decode_head.acm_modules.{}.gla": "decoder.contexts.{}.affinity"}
        | _module("decode_head.acm_modules.{}.residual_conv", "decoder.contexts.{}.residual")
        | _module("decode_head.acm_modules.{}.fusion_conv", "decoder.contexts.{}.fuse")
        | _module("decode_head.bottleneck", "decoder.fuse"),
        _mmseg_channels(
            "decode_head.bottleneck.conv.weight",
            output_sizes=_grids("decode_head.acm_modules", "decode_head.acm_modules.{}.gla.weight"),
            fusion=lambda shapes, _: shapes.has("decode_head.acm_modules.0.fusion_conv"),
        ),
    ),
    _mmseg(
        "ccnet",
        "decode_head.cca.",
        {
            "decode_head.cca.query_conv": "decoder.context.attention.query",
            "decode_head.cca.key_conv": "decoder.context.attention.key",
            "decode_head.cca.value_conv": "decoder.context.attention.value",
            "decode_head.cca.gamma.scale": "decoder.context.attention.gamma",
        }
        | _module("decode_head.convs.0", "decoder.context.reduce")
        | _module("decode_head.convs.1", "decoder.context.out")
        | _module("decode_head.conv_cat", "decoder.fuse"),
        _mmseg_channels(
            "decode_head.conv_cat.conv.weight",
            reduction=_reduction("decode_head.cca.query_conv.weight"),
        ),
    ),
    _mmseg(
        "dnlnet",
        "decode_head.dnl_block.",
        _MMSEG_CONCAT
        | {
            "decode_head.dnl_block.theta.conv": "decoder.context.1.query",
            "decode_head.dnl_block.phi.conv": "decoder.context.1.key",
            "decode_head.dnl_block.g.conv": "decoder.context.1.value",
            "decode_head.dnl_block.conv_mask": "decoder.context.1.mask",
        }
        | _module("decode_head.dnl_block.conv_out", "decoder.context.1.out"),
        _mmseg_channels(
            "decode_head.conv_cat.conv.weight",
            key_channels=_width("decode_head.dnl_block.theta.conv.weight"),
        ),
    ),
    _mmseg(
        "nonlocal",
        "decode_head.nl_block.",
        _MMSEG_CONCAT
        | {
            "decode_head.nl_block.theta.conv": "decoder.context.1.query",
            "decode_head.nl_block.phi.conv": "decoder.context.1.key",
            "decode_head.nl_block.g.conv": "decoder.context.1.value",
            "decode_head.nl_block.conv_out.conv": "decoder.context.1.out",
            "decode_head.nl_block.conv_out.bn": "decoder.context.1.out_norm",
        },
        _mmseg_channels(
            "decode_head.conv_cat.conv.weight",
            key_channels=_width("decode_head.nl_block.theta.conv.weight"),
        ),
        zeros=("decoder.context.1.out.bias",),
    ),
    _mmseg(
        "danet",
        "decode_head.pam.",
        {
            "decode_head.pam.query_project": "decoder.position.1.query",
            "decode_head.pam.key_project": "decoder.position.1.key",
            "decode_head.pam.value_project": "decoder.position.1.value",
            "decode_head.pam.gamma.scale": "decoder.position.1.gamma",
            "decode_head.cam.gamma.scale": "decoder.channel.1.gamma",
            "decode_head.pam_conv_seg": "position_classifier.1",
            "decode_head.cam_conv_seg": "channel_classifier.1",
        }
        | _module("decode_head.pam_in_conv", "decoder.position.0")
        | _module("decode_head.pam_out_conv", "decoder.position.2")
        | _module("decode_head.cam_in_conv", "decoder.channel.0")
        | _module("decode_head.cam_out_conv", "decoder.channel.2"),
        _mmseg_channels(
            "decode_head.pam_in_conv.conv.weight",
            reduction=_reduction("decode_head.pam.query_project.weight"),
        ),
    ),
    _mmseg(
        "ann",
        "decode_head.fusion.stages.",
        _mmseg_attention("decode_head.fusion", "decoder.fusion")
        | _module("decode_head.bottleneck", "decoder.reduce")
        | _mmseg_attention("decode_head.context", "decoder.context"),
        _mmseg_channels(
            "decode_head.bottleneck.conv.weight",
            key_channels=_width("decode_head.fusion.stages.0.key_project.conv.weight"),
            value_channels=_width("decode_head.fusion.stages.0.value_project.weight"),
        ),
        zeros=(
            "decoder.fusion.query.0.bias",
            "decoder.fusion.key.0.bias",
            "decoder.fusion.fusion.0.bias",
            "decoder.reduce.0.bias",
            "decoder.context.query.0.bias",
            "decoder.context.key.0.bias",
            "decoder.context.fusion.0.bias",
        ),
    ),
    _mmseg(
        "psanet",
        "decode_head.attention_p.",
        _module("decode_head.reduce", f"{_PSA}.reduce_collect")
        | _module("decode_head.reduce_p", f"{_PSA}.reduce_distribute")
        | _module("decode_head.attention.0", f"{_PSA}.collect.0")
        | _module("decode_head.attention_p.0", f"{_PSA}.distribute.0")
        | {
            "decode_head.attention.1": f"{_PSA}.collect.1",
            "decode_head.attention_p.1": f"{_PSA}.distribute.1",
        }
        | _module("decode_head.proj", f"{_PSA}.out")
        | _module("decode_head.bottleneck", "decoder.fuse"),
        _mmseg_channels(
            "decode_head.bottleneck.conv.weight",
            mask_size=lambda shapes, _: square(shapes["decode_head.attention.1.weight"][0]),
            variant=lambda *_: "mmsegmentation",
        ),
    ),
    _mmseg(
        "fcn",
        "decode_head.conv_cat.",
        _module("decode_head.convs.{}", "decoder.context.{}")
        | _module("decode_head.conv_cat", "decoder.fuse"),
        _mmseg_channels(
            "decode_head.conv_cat.conv.weight",
            kernel_size=lambda shapes, _: shapes["decode_head.conv_cat.conv.weight"][2],
            convolutions=lambda shapes, _: shapes.count("decode_head.convs"),
            concat=lambda *_: True,
        ),
    ),
    _mmseg(
        "fcn",
        "decode_head.convs.0.",
        _module("decode_head.convs.0", "decoder"),
        _mmseg_channels(
            "decode_head.convs.0.conv.weight",
            kernel_size=lambda shapes, _: shapes["decode_head.convs.0.conv.weight"][2],
        ),
    ),
    Importer(
        "mmsegmentation",
        "ocrnet",
        ("backbone.", "decode_head.1.object_context_block."),
        prefixed(RESNET | RESNEST | STEM | HRNET, "backbone.")
        | _module("decode_head.0.convs.0", "regions.0")
        | {"decode_head.0.conv_seg": "regions.1.1", "decode_head.1.conv_seg": "classifier.1"}
        | _module("decode_head.1.bottleneck", "decoder.reduce")
        | _module(f"{_OCR_BLOCK}.query_project.0", "decoder.query")
        | {
            f"{_OCR_BLOCK}.query_project.1.conv": "decoder.query.3",
            f"{_OCR_BLOCK}.query_project.1.bn": "decoder.query.4",
            f"{_OCR_BLOCK}.key_project.1.conv": "decoder.key.3",
            f"{_OCR_BLOCK}.key_project.1.bn": "decoder.key.4",
        }
        | _module(f"{_OCR_BLOCK}.key_project.0", "decoder.key")
        | _module(f"{_OCR_BLOCK}.value_project", "decoder.value")
        | _module(f"{_OCR_BLOCK}.out_project", "decoder.out")
        | _module(f"{_OCR_BLOCK}.bottleneck", "decoder.fuse"),
        _ocr_arguments,
        untold=functools.partial(untold, "ocrnet"),
    ),
]
