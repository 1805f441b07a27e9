# SPDX-License-Identifier: Apache-2.0
"""NYU Depth V2 (Silberman et al., ECCV 2012), the colour images with 40 classes.

The classes are those of Gupta et al., CVPR 2013.
"""

from ctxops.models.data.spec import IGNORE, Spec, Split

_CLASSES = (
    "wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf, picture, counter, "
    "blinds, desk, shelves, curtain, dresser, pillow, mirror, floor mat, clothes, ceiling, books, "
    "refrigerator, television, paper, towel, shower curtain, box, whiteboard, person, night stand, "
    "toilet, sink, lamp, bathtub, bag, other structure, other furniture, other prop"
)

NYUDV2 = Spec(
    "nyudv2",
    tuple(_CLASSES.split(", ")),
    {
        split: Split("images/*.jpg", "segmentation/*.png", f"gt_sets/{split}.txt")
        for split in ("train", "val")
    },
    # 0 is what has no label.
    {0: IGNORE} | {k + 1: k for k in range(40)},
    source="NYUD_MT.tgz in the version of MTI-Net, whose labels are PNG files",
)
