# SPDX-License-Identifier: Apache-2.0
"""CamVid (Brostow et al., 2008) with the 11 classes and the splits that SegNet came with."""

from ctxops.models.data.spec import IGNORE, Spec, Split

_CLASSES = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign symbol", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)
_NAMES, _COLOURS = zip(*_CLASSES, strict=True)

CAMVID = Spec(
    "camvid",
    _NAMES,
    {split: Split(f"{split}/*.png", f"{split}annot/*.png") for split in ("train", "val", "test")},
    {k: k for k in range(11)} | {11: IGNORE},  # 11 is what belongs to no class
    _COLOURS,
    source="the folder CamVid of the SegNet tutorial",
)
