# SPDX-License-Identifier: Apache-2.0
"""LIP (Gong et al., CVPR 2017), one person in each image, and CIHP (Gong et al., ECCV 2018)."""

from ctxops.models.data.spec import Spec, Split

_CLASSES = (
    ("background", (0, 0, 0)),
    ("hat", (128, 0, 0)),
    ("hair", (255, 0, 0)),
    ("glove", (0, 85, 0)),
    ("sunglasses", (170, 0, 51)),
    ("upper clothes", (255, 85, 0)),
    ("dress", (0, 0, 85)),
    ("coat", (0, 119, 221)),
    ("socks", (85, 85, 0)),
    ("pants", (0, 85, 85)),
    ("jumpsuits", (85, 51, 0)),
    ("scarf", (52, 86, 128)),
    ("skirt", (0, 128, 0)),
    ("face", (0, 0, 255)),
    ("left arm", (51, 170, 221)),
    ("right arm", (0, 255, 255)),
    ("left leg", (85, 255, 170)),
    ("right leg", (170, 255, 85)),
    ("left shoe", (255, 255, 0)),
    ("right shoe", (255, 170, 0)),
)
_NAMES, _COLOURS = zip(*_CLASSES, strict=True)

LIP = Spec(
    "lip",
    _NAMES,
    {
        split: Split(f"{split}_images/*.jpg", f"{split}_segmentations/*.png")
        for split in ("train", "val")
    },
    palette=_COLOURS,
    source="TrainVal_images.zip and TrainVal_parsing_annotations.zip of LIP, their folders side by "
    "side",
)
CIHP = Spec(
    "cihp",
    tuple("torso skin" if name == "jumpsuits" else name for name in _NAMES),
    {
        split: Split(f"{folder}/Images/*.jpg", f"{folder}/Category_ids/*.png")
        for split, folder in (("train", "Training"), ("val", "Validation"))
    },
    palette=_COLOURS,
    source="instance-level_human_parsing.tar.gz",
)
