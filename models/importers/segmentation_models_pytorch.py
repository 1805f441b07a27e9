# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of segmentation_models.pytorch."""

from typing import Any

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


IMPORTERS = [
    _deeplabv3("decoder.aspp", "decoder.conv", "decoder.bn"),
    _deeplabv3("decoder.0", "decoder.1", "decoder.2"),  # before 0.4
]

REFUSED = [Refused(_SOURCE, "Unet, FPN or another network", ("encoder.", "segmentation_head."))]
