# SPDX-License-Identifier: Apache-2.0
"""The code released with ANN."""

from typing import Any

from ctxops.models.importers.importer import (
    RESNET_STAGES,
    Importer,
    Shapes,
    prefixed,
    released_auxiliary,
    resnet_arguments,
)

# The same in the code of which ANN's is a part, which has two names for the stem.
_NAMED_STEM = {
    "conv1": "conv1.0",
    "bn1": "conv1.1",
    "conv2": "conv1.3",
    "bn2": "conv1.4",
    "conv3": "conv1.6",
    "bn3": "bn1",
}


def _ann_block(theirs: str, ours: str) -> dict[str, str]:
    """A block of ANN; its norm and ReLU are one module, or two in a list."""
    stage = f"{theirs}.stages.0"
    names = {f"{stage}.f_value": f"{ours}.value", f"{stage}.W": f"{ours}.out"}
    for embedding in ("query", "key"):
        names |= {
            f"{stage}.f_{embedding}.0": f"{ours}.{embedding}.0",
            f"{stage}.f_{embedding}.1": f"{ours}.{embedding}.1",
            f"{stage}.f_{embedding}.1.0": f"{ours}.{embedding}.1",
        }
    return names | {
        f"{theirs}.conv_bn_dropout.0": f"{ours}.fusion.0",
        f"{theirs}.conv_bn_dropout.1": f"{ours}.fusion.1",
        f"{theirs}.conv_bn_dropout.1.0": f"{ours}.fusion.1",
    }


def _ann_arguments(shapes: Shapes) -> dict[str, Any]:
    stem = "resinit" if shapes.has("backbone.resinit") else "prefix"
    return (
        resnet_arguments(shapes, "backbone.", f"backbone.{stem}.conv1")
        | released_auxiliary(shapes)
        | {
            "num_classes": shapes["cls.weight"][0],
            "channels": shapes["context.0.weight"][0],
            "key_channels": shapes["fusion.stages.0.f_key.0.weight"][0],
            "value_channels": shapes["fusion.stages.0.f_value.weight"][0],
            "ceil_mode": True,
        }
    )


IMPORTERS = [
    Importer(
        "ann",
        "ann",
        ("fusion.stages.0.f_key.", "context.2.stages.0.f_value."),
        prefixed({name: name for name in RESNET_STAGES}, "backbone.")
        | prefixed(_NAMED_STEM, "backbone.prefix.")
        | prefixed(_NAMED_STEM, "backbone.resinit.")
        | _ann_block("fusion", "decoder.fusion")
        | {
            "context.0": "decoder.reduce.0",
            "context.1": "decoder.reduce.1",
            "context.1.0": "decoder.reduce.1",
        }
        | _ann_block("context.2", "decoder.context")
        | {
            "cls": "classifier.1",
            "dsn.0": "auxiliary.0.0",
            "dsn.1": "auxiliary.0.1",
            "dsn.1.0": "auxiliary.0.1",
            "dsn.3": "auxiliary.1.1",
        },
        _ann_arguments,
    ),
]
