# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of torchvision."""

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

_COMMON = prefixed(RESNET, "backbone.") | {
    "classifier.4": "classifier.1",
    "aux_classifier.0": "auxiliary.0.0",
    "aux_classifier.1": "auxiliary.0.1",
    "aux_classifier.4": "auxiliary.1.1",
}


def _network(shapes: Shapes) -> dict[str, Any]:
    auxiliary = "aux_classifier.0.weight"
    return resnet_arguments(shapes, "backbone.", "backbone.conv1.0") | {
        "num_classes": shapes["classifier.4.weight"][0],
        "align_corners": False,
        "auxiliary_channels": shapes[auxiliary][0] if auxiliary in shapes else 0,
    }


IMPORTERS = [
    Importer(
        "torchvision",
        "fcn",
        ("backbone.layer4.", "classifier.0.weight"),
        _COMMON | {"classifier.0": "decoder.0", "classifier.1": "decoder.1"},
        lambda shapes: _network(shapes) | {"channels": shapes["classifier.0.weight"][0]},
    ),
    Importer(
        "torchvision",
        "deeplabv3",
        ("backbone.layer4.", "classifier.0.convs."),
        _COMMON
        | aspp("classifier.0", "decoder.0")
        | {"classifier.1": "decoder.1.0", "classifier.2": "decoder.1.1"},
        lambda shapes: _network(shapes) | refined_aspp_arguments(shapes, "classifier.0"),
        transforms={"decoder.0.fuse.0.weight": image_branch_first},
    ),
]

REFUSED = [
    Refused("torchvision", "lraspp", ("backbone.", "classifier.cbr.")),
    Refused("torchvision", "deeplabv3 on MobileNetV3", ("backbone.0.", "classifier.0.convs.")),
]
