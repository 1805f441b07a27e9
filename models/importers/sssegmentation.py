# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of sssegmentation, the toolbox of MCIBI's authors."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ctxops.models.importers.importer import (
    HRNET,
    RESNEST,
    RESNET,
    STEM,
    Importer,
    Refused,
    Shapes,
    backbone_arguments,
    image_branch_first,
    prefixed,
    square,
)

# A convolution and its norm, which it numbers as we do.
_PAIR = {".0": ".0", ".1": ".1"}


def _cbr(theirs: str, ours: str) -> dict[str, str]:
    return prefixed(_PAIR, theirs, ours)


_COMMON = (
    prefixed(RESNET | RESNEST | STEM | HRNET, "backbone_net.")
    | _cbr("auxiliary_decoder", "auxiliary.0")
    | {"auxiliary_decoder.4": "auxiliary.1.1"}
)
# The ends of the heads: dropout and classifier, or a convolution before them too.
_CLASSIFIER = {"decoder.1": "classifier.1"}
_FUSE = _cbr("decoder", "decoder.fuse") | {"decoder.4": "classifier.1"}


def _network(shapes: Shapes, classifier: str) -> dict[str, Any]:
    return backbone_arguments(shapes, "backbone_net.") | {
        "num_classes": shapes[f"{classifier}.weight"][0],
        "align_corners": False,
    }


def _auxiliary(shapes: Shapes) -> dict[str, Any]:
    weight = "auxiliary_decoder.0.weight"
    return {"auxiliary_channels": shapes[weight][0] if weight in shapes else 0}


def _importer(
    model: str,
    markers: tuple[str, ...],
    modules: dict[str, str],
    arguments: Callable[[Shapes], dict[str, Any]],
    *,
    zeros: tuple[str, ...] = (),
    transforms: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Importer:
    return Importer(
        "sssegmentation",
        model,
        ("backbone_net.", *markers),
        _COMMON | modules,
        arguments,
        zeros,
        transforms or {},
    )


def _arguments(
    first: str, classifier: str, **further: Callable[[Shapes], object]
) -> Callable[[Shapes], dict[str, Any]]:
    """The common arguments, the width of the head's first convolution, and what else is told."""

    def read(shapes: Shapes) -> dict[str, Any]:
        others = {name: each(shapes) for name, each in further.items()}
        channels = {"channels": shapes[f"{first}.weight"][0]}
        return _network(shapes, classifier) | _auxiliary(shapes) | channels | others

    return read


def _width(module: str) -> Callable[[Shapes], int]:
    return lambda shapes: shapes[f"{module}.weight"][0]


def _reduction(first: str, query: str) -> Callable[[Shapes], int]:
    return lambda shapes: shapes[f"{first}.weight"][0] // shapes[f"{query}.weight"][0]


def _acm_grids(shapes: Shapes) -> tuple[int, ...]:
    cells = [shapes[f"acm_modules.{i}.gla.weight"][0] for i in range(shapes.count("acm_modules"))]
    return tuple(round(number**0.5) for number in cells)


def _ppm(theirs: str, ours: str) -> dict[str, str]:
    branches = {f"{theirs}.branches.{{}}.{i + 1}": f"{ours}.branches.{{}}.{i}" for i in (0, 1)}
    return branches | _cbr(f"{theirs}.bottleneck", f"{ours}.fuse")


def _aspp(theirs: str, ours: str) -> dict[str, str]:
    image = {f"{theirs}.global_branch.{i + 1}": f"{ours}.image.1.{i}" for i in (0, 1)}
    branches = _cbr(f"{theirs}.parallel_branches.{{}}", f"{ours}.branches.{{}}")
    return image | branches | _cbr(f"{theirs}.bottleneck", f"{ours}.fuse")


def _attention(theirs: str, ours: str) -> dict[str, str]:
    """Two convolutions for query and key, one for the value and one behind the attention."""
    names = {
        f"{theirs}.{part}_project.{i}.{j}": f"{ours}.{part}.{3 * i + j}"
        for part in ("query", "key")
        for i in (0, 1)
        for j in (0, 1)
    }
    value = _cbr(f"{theirs}.value_project", f"{ours}.value")
    return names | value | _cbr(f"{theirs}.out_project", f"{ours}.out")


def _asymmetric(theirs: str, ours: str) -> dict[str, str]:
    """ANN's blocks: query and key with a norm, value and W_o without."""
    return (
        _cbr(f"{theirs}.stages.0.query_project", f"{ours}.query")
        | _cbr(f"{theirs}.stages.0.key_project", f"{ours}.key")
        | {
            f"{theirs}.stages.0.value_project": f"{ours}.value",
            f"{theirs}.stages.0.out_project": f"{ours}.out",
        }
        | _cbr(f"{theirs}.bottleneck", f"{ours}.fusion")
    )


def _between(before: str, block: str, after: str) -> dict[str, str]:
    """A non-local block between two convolutions."""
    return (
        _cbr(before, "decoder.context.0")
        | {
            f"{block}.theta.0": "decoder.context.1.query",
            f"{block}.phi.0": "decoder.context.1.key",
            f"{block}.g.0": "decoder.context.1.value",
        }
        | _cbr(after, "decoder.context.2")
        | _FUSE
    )


def _mcibi(
    context: str | None,
    marker: str,
    modules: dict[str, str],
    transforms: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Importer:
    """MCIBI with a context within the image, which the marker tells."""
    attention = _attention("memory_module.self_attention", "decoder.attention")
    within = _attention("memory_module.self_attention_ms", "decoder.attention_within")
    return _importer(
        "mcibi",
        ("memory_module.memory", marker),
        _cbr("bottleneck", "decoder.bottleneck")
        | attention
        | _cbr("memory_module.bottleneck", "decoder.fuse.convolution")
        | within
        | _cbr("memory_module.bottleneck_ms", "decoder.fuse_within.convolution")
        | _cbr("decoder_stage1", "first_classifier.0")
        | _cbr("decoder_stage2", "classifier.0")
        | {
            "decoder_stage1.4": "first_classifier.1.1",
            "decoder_stage2.4": "classifier.1.1",
            "memory_module.memory": "bank.memory",
        }
        | modules,
        _arguments(
            "bottleneck.0",
            "decoder_stage2.4",
            context=lambda shapes: context,
            kernel_size=lambda shapes: shapes["bottleneck.0.weight"][2],
        ),
        zeros=("bank.step",),
        transforms={"bank.memory": _only_representative} | dict(transforms or {}),
    )


def _only_representative(memory: Tensor) -> Tensor:
    """The rows of a memory whose categories may have several; those that have keep their axis."""
    return memory[:, 0] if memory.dim() == 3 and memory.shape[1] == 1 else memory


def _ocr_arguments(shapes: Shapes) -> dict[str, Any]:
    return _network(shapes, "decoder.1") | {
        "channels": shapes["bottleneck.0.weight"][0],
        "key_channels": shapes["object_context_block.value_project.0.weight"][0],
        "region_channels": shapes["auxiliary_decoder.0.weight"][0],
        "fuse_kernel_size": shapes["object_context_block.bottleneck.0.weight"][2],
    }


def _fcn_arguments(classifier: str, convolutions: int) -> Callable[[Shapes], dict[str, Any]]:
    return _arguments(
        "decoder.0",
        classifier,
        convolutions=lambda shapes: convolutions,
        kernel_size=lambda shapes: shapes["decoder.0.weight"][2],
    )


_PSA = "decoder.context"

IMPORTERS = [
    _mcibi(
        "aspp",
        "context_within_image_module.parallel_branches.",
        _aspp("context_within_image_module", "within"),
        {"within.fuse.0.weight": image_branch_first},
    ),
    _mcibi(
        "ppm",
        "context_within_image_module.branches.",
        _ppm("context_within_image_module", "within"),
    ),
    _mcibi(None, "decoder_stage1.", {}),
    _importer(
        "upernet",
        ("lateral_convs.", "fpn_convs."),
        _ppm("ppm_net", "decoder.context")
        | _cbr("lateral_convs.{}", "decoder.lateral.{}")
        | _cbr("fpn_convs.{}", "decoder.refine.{}")
        | _FUSE,
        _arguments("decoder.0", "decoder.4"),
    ),
    _importer(
        "psanet",
        ("attention_p.",),
        _cbr("reduce", f"{_PSA}.reduce_collect")
        | _cbr("reduce_p", f"{_PSA}.reduce_distribute")
        | _cbr("attention", f"{_PSA}.collect.0")
        | _cbr("attention_p", f"{_PSA}.distribute.0")
        | {"attention.3": f"{_PSA}.collect.1", "attention_p.3": f"{_PSA}.distribute.1"}
        | _cbr("proj", f"{_PSA}.out")
        | _FUSE,
        _arguments(
            "decoder.0",
            "decoder.4",
            mask_size=lambda shapes: square(shapes["attention.3.weight"][0]),
            variant=lambda shapes: "mmsegmentation",
        ),
    ),
    _importer(
        "pspnet",
        ("ppm_net.",),
        _ppm("ppm_net", "decoder") | _CLASSIFIER,
        _arguments("ppm_net.bottleneck.0", "decoder.1"),
    ),
    _importer(
        "deeplabv3",
        ("aspp_net.",),
        _aspp("aspp_net", "decoder") | _CLASSIFIER,
        _arguments("aspp_net.bottleneck.0", "decoder.1"),
        transforms={"decoder.fuse.0.weight": image_branch_first},
    ),
    _importer(
        "ann",
        ("afn_block.",),
        _asymmetric("afn_block", "decoder.fusion")
        | _cbr("bottleneck", "decoder.reduce")
        | _asymmetric("apn_block", "decoder.context")
        | _CLASSIFIER,
        _arguments(
            "bottleneck.0",
            "decoder.1",
            key_channels=_width("afn_block.stages.0.key_project.0"),
            value_channels=_width("afn_block.stages.0.value_project"),
            bias=lambda shapes: False,
            auxiliary_bias=lambda shapes: False,
        ),
    ),
    _importer(
        "apcnet",
        ("acm_modules.",),
        _cbr("acm_modules.{}.pooled_redu_conv", "decoder.contexts.{}.reduce_grid")
        | _cbr("acm_modules.{}.input_redu_conv", "decoder.contexts.{}.reduce")
        | _cbr("acm_modules.{}.global_info", "decoder.contexts.{}.image")
        | {"acm_modules.{}.gla": "decoder.contexts.{}.affinity"}
        | _cbr("acm_modules.{}.residual_conv", "decoder.contexts.{}.residual")
        | _cbr("acm_modules.{}.fusion_conv", "decoder.contexts.{}.fuse")
        | _FUSE,
        _arguments("decoder.0", "decoder.4", output_sizes=_acm_grids),
    ),
    _importer(
        "ccnet",
        ("cca.",),
        _cbr("conv_before_cca", "decoder.context.reduce")
        | {
            "cca.query_conv": "decoder.context.attention.query",
            "cca.key_conv": "decoder.context.attention.key",
            "cca.value_conv": "decoder.context.attention.value",
            "cca.gamma.scale": "decoder.context.attention.gamma",
        }
        | _cbr("conv_after_cca", "decoder.context.out")
        | _FUSE,
        _arguments("decoder.0", "decoder.4", reduction=_reduction("decoder.0", "cca.query_conv")),
    ),
    _importer(
        "danet",
        ("pam_net.",),
        _cbr("pam_in_conv", "decoder.position.0")
        | {
            "pam_net.query_project": "decoder.position.1.query",
            "pam_net.key_project": "decoder.position.1.key",
            "pam_net.value_project": "decoder.position.1.value",
            "pam_net.gamma.scale": "decoder.position.1.gamma",
            "cam_net.gamma.scale": "decoder.channel.1.gamma",
            "decoder_pam.1": "position_classifier.1",
            "decoder_cam.1": "channel_classifier.1",
            "decoder_pamcam.1": "classifier.1",
        }
        | _cbr("pam_out_conv", "decoder.position.2")
        | _cbr("cam_in_conv", "decoder.channel.0")
        | _cbr("cam_out_conv", "decoder.channel.2"),
        _arguments(
            "pam_in_conv.0",
            "decoder_pamcam.1",
            reduction=_reduction("pam_in_conv.0", "pam_net.query_project"),
            attention_bias=lambda shapes: "pam_net.query_project.bias" in shapes,
        ),
    ),
    _importer(
        "dnlnet",
        ("dnl_block.",),
        _between("conv_before_dnl", "dnl_block", "conv_after_dnl")
        | {"dnl_block.conv_mask": "decoder.context.1.mask"}
        | _cbr("dnl_block.conv_out", "decoder.context.1.out"),
        _arguments("decoder.0", "decoder.4", key_channels=_width("dnl_block.theta.0")),
    ),
    _importer(
        "nonlocal",
        ("nl_block.",),
        _between("conv_before_nl", "nl_block", "conv_after_nl")
        | {
            "nl_block.conv_out.0": "decoder.context.1.out",
            "nl_block.conv_out.1": "decoder.context.1.out_norm",
        },
        _arguments("decoder.0", "decoder.4", key_channels=_width("nl_block.theta.0")),
        zeros=("decoder.context.1.out.bias",),
    ),
    _importer(
        "ocrnet",
        ("object_context_block.",),
        _cbr("bottleneck", "decoder.reduce")
        | _attention("object_context_block", "decoder")
        | _cbr("object_context_block.bottleneck", "decoder.fuse")
        | _cbr("auxiliary_decoder", "regions.0")
        | {"auxiliary_decoder.4": "regions.1.1"}
        | _CLASSIFIER,
        _ocr_arguments,
    ),
    _importer(
        "fcn",
        ("decoder.7.",),
        _cbr("decoder", "decoder.0")
        | {"decoder.3": "decoder.1.0", "decoder.4": "decoder.1.1", "decoder.7": "classifier.1"},
        _fcn_arguments("decoder.7", 2),
    ),
    _importer(
        "fcn",
        ("decoder.0.", "decoder.4."),
        _cbr("decoder", "decoder") | {"decoder.4": "classifier.1"},
        _fcn_arguments("decoder.4", 1),
    ),
]

REFUSED = [
    Refused("sssegmentation", "MCIBI++", ("backbone_net.", "memory_module.", "decoder_pr.")),
    Refused("sssegmentation", "EncNet, PointRend or another network", ("backbone_net.",)),
]
