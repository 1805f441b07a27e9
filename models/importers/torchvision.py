# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of torchvision."""

from typing import Any

from ctxops.models.importers.importer import RESNET, Importer, Shapes, prefixed, resnet_arguments


def _torchvision_fcn(shapes: Shapes) -> dict[str, Any]:
    auxiliary = "aux_classifier.0.weight"
    return resnet_arguments(shapes, "backbone.", "backbone.conv1.0") | {
        "num_classes": shapes["classifier.4.weight"][0],
        "channels": shapes["classifier.0.weight"][0],
        "align_corners": False,
        "auxiliary_channels": shapes[auxiliary][0] if auxiliary in shapes else 0,
    }


IMPORTERS = [
    Importer(
        "torchvision",
        "fcn",
        ("backbone.layer4.", "classifier.0.weight"),
        prefixed(RESNET, "backbone.")
        | {
            "classifier.0": "decoder.0",
            "classifier.1": "decoder.1",
            "classifier.4": "classifier.1",
            "aux_classifier.0": "auxiliary.0.0",
            "aux_classifier.1": "auxiliary.0.1",
            "aux_classifier.4": "auxiliary.1.1",
        },
        _torchvision_fcn,
    )
]
