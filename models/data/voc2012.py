# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC 2012 (Everingham et al.), the segmentation task: 20 classes and the background.

Also with the labels that the Semantic Boundaries Dataset (Hariharan et al., ICCV 2011) adds.
"""

from ctxops.models.data.spec import Spec, Split

_CLASSES = (
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, "
    "dog, horse, motorbike, person, pottedplant, sheep, sofa, train, tvmonitor"
)
_NAMES = tuple(_CLASSES.split(", "))


def _split(split: str, labels: str = "SegmentationClass") -> Split:
    return Split("JPEGImages/*.jpg", f"{labels}/*.png", f"ImageSets/Segmentation/{split}.txt")


# The palette is that of its files, which spec.colours computes.
VOC2012 = Spec(
    "voc2012",
    _NAMES,
    {split: _split(split) for split in ("train", "val", "trainval")}
    # The 10582 images of VOC's train and SBD without VOC's val: "train+aug" where mmsegmentation's
    # converter has been, which writes SBD's labels alone; "trainaug" where SegmentationClassAug has
    # the labels of all, as DeepLab's users share it.
    | {split: _split(split, "SegmentationClassAug") for split in ("aug", "trainaug")},
    source="VOCtrainval_11-May-2012.tar, its folder VOCdevkit/VOC2012",
)
SBD = Spec(
    "sbd",
    _NAMES,
    # Its own train and val share images with VOC's val; train_noval does not.
    {
        split: Split("img/*.jpg", "cls/*.mat", f"{split}.txt")
        for split in ("train", "val", "train_noval")
    },
    variable="GTcls.Segmentation",
    source="benchmark.tgz of SBD, its folder benchmark_RELEASE/dataset, and train_noval.txt beside "
    "its lists",
)
