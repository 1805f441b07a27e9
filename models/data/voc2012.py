# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC 2012 (Everingham et al.), the segmentation task: 20 classes and the background."""

from ctxops.models.data.spec import Spec, Split

_CLASSES = (
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, "
    "dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)

# The palette is that of its files, which spec.colours computes.
VOC2012 = Spec(
    "voc2012",
    tuple(_CLASSES.split(", ")),
    {
        split: Split(
            "JPEGImages/*.jpg", "SegmentationClass/*.png", f"ImageSets/Segmentation/{split}.txt"
        )
        for split in ("train", "val", "trainval")
    },
    source="VOCtrainval_11-May-2012.tar, its folder VOCdevkit/VOC2012",
)
