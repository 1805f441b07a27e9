# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of segmentation_models.pytorch."""

from typing import Any

from torch import Tensor

from ctxops.models.importers.importer import (
    RESNET,
    Importer,
    Refused,
    Shapes,
    aspp,
    image_branch_first,
    prefixed,
    refined_aspp_arguments,
    resnet_arguments,
)

_SOURCE = "segmentation_models.pytorch"
_COMMON = prefixed(RESNET, "encoder.") | {"segmentation_head.0": "classifier.1"}


def _network(shapes: Shapes) -> dict[str, Any]:
    return resnet_arguments(shapes, "encoder.", "encoder.conv1.0") | {
        "num_classes": shapes["segmentation_head.0.weight"][0],
        "align_corners": True,
        "auxiliary_channels": 0,
        # All convolutions of a dilated stage are dilated alike.
        "contract_dilation": False,
    }


def _deeplabv3(theirs: str, convolution: str, norm: str) -> Importer:
    return Importer(
        _SOURCE,
        "deeplabv3",
        # DeepLabv3+ has one more convolution of the finer map.
        ("encoder.", f"{theirs}.convs.", f"{convolution}.weight"),
        _COMMON | aspp(theirs, "decoder.0") | {convolution: "decoder.1.0", norm: "decoder.1.1"},
        lambda shapes: _network(shapes) | refined_aspp_arguments(shapes, theirs),
        transforms={"decoder.0.fuse.0.weight": image_branch_first},
    )


def _pspnet_arguments(shapes: Shapes) -> dict[str, Any]:
    """The pyramid pooling is on the map of a stage, which its width tells."""
    width = shapes["decoder.psp.blocks.0.pool.1.0.weight"][1]
    last = "conv3" if "encoder.layer1.0.conv3.weight" in shapes else "conv2"
    widths = {shapes[f"encoder.layer{n}.0.{last}.weight"][0]: n for n in (2, 3, 4)}
    if width not in widths:
        raise ValueError(f"a PSPNet of depth 1 or 2, on a map of {width} channels, is not imported")
    stage, arguments = widths[width], _network(shapes)
    del arguments["contract_dilation"]  # nothing is dilated
    options = {"out_indices": (stage,)}
    return arguments | {
        "backbone_options": arguments.get("backbone_options", {}) | options,
        "output_stride": 2 ** (stage + 1),
        "channels": shapes["decoder.conv.0.weight"][0],
        "branch_channels": shapes["decoder.psp.blocks.0.pool.1.0.weight"][0],
        "image_norm": False,
        "fuse_kernel_size": 1,
        "classifier_kernel_size": shapes["segmentation_head.0.weight"][2],
        "dropout": 0.2,
    }


def _map_last(weight: Tensor) -> Tensor:
    """That of the convolution behind the pyramid: its input ends with the map there."""
    # All branches together are as wide as the map.
    return weight.roll(weight.shape[1] // 2, dims=1) if weight.dim() == 4 else weight


IMPORTERS = [
    Importer(
        _SOURCE,
        "pspnet",
        ("encoder.", "decoder.psp."),
        _COMMON
        | {
            "decoder.psp.blocks.{}.pool.1.{}": "decoder.branches.{}.{}",
            "decoder.conv.{}": "decoder.fuse.{}",
        },
        _pspnet_arguments,
        transforms={"decoder.fuse.0.weight": _map_last},
        spare=("encoder.layer3.", "encoder.layer4."),
    ),
    _deeplabv3("decoder.aspp", "decoder.conv", "decoder.bn"),
    _deeplabv3("decoder.0", "decoder.1", "decoder.2"),  # before 0.4
]

REFUSED = [Refused(_SOURCE, "Unet, FPN or another network", ("encoder.", "segmentation_head."))]
