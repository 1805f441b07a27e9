# SPDX-License-Identifier: Apache-2.0
"""How the checkpoints of other code name what the networks of this package hold; a file a source.

An importer is one architecture of one source. Its table leads from their modules to ours; ``{}``
stands for a number, the same on both sides. What the tables do not say, the options of the network,
is read from the shapes.
"""

from ctxops.models.importers import (
    mmsegmentation,
    released_ann,
    released_gald,
    segmentation_models_pytorch,
    sssegmentation,
    torchvision,
)

_SOURCES = (
    mmsegmentation,
    sssegmentation,
    torchvision,
    segmentation_models_pytorch,
    released_ann,
    released_gald,
)
IMPORTERS = [importer for source in _SOURCES for importer in source.IMPORTERS]
REFUSED = [
    *sssegmentation.REFUSED,
    *torchvision.REFUSED,
    *segmentation_models_pytorch.REFUSED,
]
