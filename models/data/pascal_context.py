# SPDX-License-Identifier: Apache-2.0
"""PASCAL Context (Mottaghi et al., CVPR 2014): its 59 most frequent classes, and the background.

The labels are those that mmsegmentation's converter makes of ``trainval_merged.json`` by the Detail
API: the classes in alphabetical order after the background, 0.
"""

from ctxops.models.data.spec import IGNORE, Spec, Split

_CLASSES = (
    "aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, "
    "cabinet, car, cat, ceiling, chair, cloth, computer, cow, cup, curtain, dog, door, fence, "
    "floor, flower, food, grass, ground, horse, keyboard, light, motorbike, mountain, mouse, "
    "person, plate, platform, pottedplant, road, rock, sheep, shelves, sidewalk, sign, sky, snow, "
    "sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood"
)
_NAMES = tuple(_CLASSES.split(", "))
_SPLITS = {
    split: Split(
        "JPEGImages/*.jpg",
        "SegmentationClassContext/*.png",
        f"ImageSets/SegmentationContext/{split}.txt",
    )
    for split in ("train", "val")
}
_SOURCE = (
    "the folder VOCdevkit/VOC2010 of VOCtrainval_03-May-2010.tar, labels and lists converted from "
    "trainval_merged.json by mmsegmentation's tools/dataset_converters/pascal_context.py"
)

PASCAL_CONTEXT_59 = Spec(
    "pascal_context_59",
    _NAMES,
    _SPLITS,
    {0: IGNORE} | {k + 1: k for k in range(59)},
    source=_SOURCE,
)
PASCAL_CONTEXT_60 = Spec("pascal_context_60", ("background", *_NAMES), _SPLITS, source=_SOURCE)
