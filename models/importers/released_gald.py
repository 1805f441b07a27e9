# SPDX-License-Identifier: Apache-2.0
"""The code released with GALD."""

from typing import Any

from ctxops.models.importers.importer import (
    RESNET,
    Importer,
    Shapes,
    prefixed,
    released_auxiliary,
    resnet_arguments,
)


def _gald_arguments(shapes: Shapes) -> dict[str, Any]:
    return (
        resnet_arguments(shapes, "", "conv1.0")
        | released_auxiliary(shapes)
        | {
            "num_classes": shapes["head.bottleneck.3.weight"][0],
            "channels": shapes["head.conva.0.weight"][0],
            "ceil_mode": True,
            "contract_dilation": False,
            "multi_grid": (1, 2, 4),
        }
    )


IMPORTERS = [
    Importer(
        "gald",
        "gald",
        ("head.a2block.",),
        prefixed(RESNET, "")
        | {
            "head.conva.0": "decoder.context.0.0",
            "head.conva.1": "decoder.context.0.1",
            "head.a2block.down.0": "decoder.context.1.down.0.0",
            "head.a2block.down.1": "decoder.context.1.down.0.1",
            "head.a2block.long_relation.t": "decoder.context.1.global_aggregation.theta",
            "head.a2block.long_relation.p": "decoder.context.1.global_aggregation.phi",
            "head.a2block.long_relation.g": "decoder.context.1.global_aggregation.g",
            "head.a2block.long_relation.z": "decoder.context.1.global_aggregation.z",
            "head.a2block.long_relation.gn": "decoder.context.1.global_aggregation.norm",
            "head.convb.0": "decoder.context.2.0",
            "head.convb.1": "decoder.context.2.1",
            "head.bottleneck.0": "decoder.fuse.0",
            "head.bottleneck.1": "decoder.fuse.1",
            "head.bottleneck.3": "classifier.1",
        }
        | {
            f"head.a2block.local_attention.dconv{i + 1}.{j}": (
                f"decoder.context.1.local_distribution.down.{i}.{j}"
            )
            for i in range(3)
            for j in range(2)
        }
        | {"dsn.0": "auxiliary.0.0", "dsn.1": "auxiliary.0.1", "dsn.4": "auxiliary.1.1"},
        _gald_arguments,
    ),
]
