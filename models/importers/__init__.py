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
    sssegmentation,
    torchvision,
)

IMPORTERS = [
    importer
    for source in (mmsegmentation, sssegmentation, torchvision, released_ann, released_gald)
    for importer in source.IMPORTERS
]
