# SPDX-License-Identifier: Apache-2.0
"""Data sets: images with the class of every pixel."""

from pathlib import Path

from torch.utils.data import Dataset

from ctxops._checks import check_known
from ctxops.models.data.ade20k import ADE20K
from ctxops.models.data.augment import Augmentation, Augmented, mirrored_classes
from ctxops.models.data.camvid import CAMVID
from ctxops.models.data.check import check_data, expected
from ctxops.models.data.cityscapes import CITYSCAPES, CITYSCAPES_COARSE
from ctxops.models.data.coco_stuff import COCO_STUFF_10K, COCO_STUFF_164K
from ctxops.models.data.files import Files, read_image
from ctxops.models.data.folder import LAYOUT, folder_spec
from ctxops.models.data.human_parsing import CIHP, LIP
from ctxops.models.data.nyudv2 import NYUDV2
from ctxops.models.data.order import StreamSampler
from ctxops.models.data.pascal_context import PASCAL_CONTEXT_59, PASCAL_CONTEXT_60
from ctxops.models.data.scenes import CLASSES, PALETTE, Scenes, right_places, scene
from ctxops.models.data.spec import IGNORE, Spec, Split
from ctxops.models.data.voc2012 import SBD, VOC2012

__all__ = [
    "IGNORE",
    "SPECS",
    "Augmentation",
    "Augmented",
    "Files",
    "Scenes",
    "Spec",
    "Split",
    "StreamSampler",
    "check_data",
    "expected",
    "find_spec",
    "folder_spec",
    "mirrored_classes",
    "open_split",
    "read_image",
    "right_places",
    "scene",
]

_SPECS = (
    *(ADE20K, CAMVID, CIHP, CITYSCAPES, CITYSCAPES_COARSE, COCO_STUFF_10K, COCO_STUFF_164K, LIP),
    *(NYUDV2, PASCAL_CONTEXT_59, PASCAL_CONTEXT_60, SBD, VOC2012),
)
SPECS = {spec.name: spec for spec in _SPECS}


def find_spec(name: str, root: str | Path | None = None) -> Spec:
    """The spec of a data set of files; that of "folder" is in its root.

    Raises:
        ValueError: an unknown name (the closest is given), "folder" without root.
        FileNotFoundError, ValueError: as :func:`folder_spec`.
    """
    check_known("data set", name, [*SPECS, "folder"])
    if name != "folder":
        return SPECS[name]
    if root is None:
        raise ValueError(f"root must be the folder of your data, got None: {LAYOUT}")
    return folder_spec(root)


def class_names(name: str, root: str | Path | None = None) -> tuple[tuple, tuple]:
    """The names of the classes of any data set, and their colours."""
    if name == "scenes":
        return CLASSES, PALETTE
    check_known("data set", name, [*SPECS, "folder", "scenes"])
    spec = find_spec(name, root)
    return spec.classes, spec.palette


def open_split(
    name: str, split: str, root: str | Path | None = None, *, skip_bad: bool = False, **options
) -> Dataset:
    """A split of any data set: :class:`Files`, or :class:`Scenes`, which need no root.

    ``skip_bad`` is that of :class:`Files`, ``options`` are those of :class:`Scenes`.
    """
    if name == "scenes":
        return Scenes(split, **options)
    if options:
        raise ValueError(f"options are for scenes, not for {name}: got {sorted(options)}")
    spec = find_spec(name, root)
    if root is None:
        raise ValueError(f"root must be the folder of {name} ({spec.source}), got None")
    return Files(spec, root, split, skip_bad=skip_bad)
