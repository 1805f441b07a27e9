# SPDX-License-Identifier: Apache-2.0
"""Cityscapes (Cordts et al., CVPR 2016): streets of 50 cities, 19 classes."""

from ctxops.models.data.spec import IGNORE, Spec, Split

# The 19 classes that are evaluated: name, number in the labelIds files, colour.
_CLASSES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
_NAMES, _NUMBERS, _COLOURS = zip(*_CLASSES, strict=True)
# All other numbers up to 33; a license plate, -1, is 255 in the files.
_IDS = dict.fromkeys(range(34), IGNORE) | {number: k for k, number in enumerate(_NUMBERS)}


def _split(split: str, kind: str) -> Split:
    return Split(
        f"leftImg8bit/{split}/*/*_leftImg8bit.png", f"{kind}/{split}/*/*_{kind}_labelIds.png"
    )


CITYSCAPES = Spec(
    "cityscapes",
    _NAMES,
    {split: _split(split, "gtFine") for split in ("train", "val", "test")},
    _IDS,
    _COLOURS,
    source="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com",
)
CITYSCAPES_COARSE = Spec(
    "cityscapes_coarse",
    _NAMES,
    {split: _split(split, "gtCoarse") for split in ("train", "train_extra", "val")},
    _IDS,
    _COLOURS,
    source="leftImg8bit_trainextra.zip and gtCoarse.zip of cityscapes-dataset.com",
)
