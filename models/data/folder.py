# SPDX-License-Identifier: Apache-2.0
"""One's own data: a folder of images, a folder of labels, and the names of the classes."""

from pathlib import Path

import yaml

from ctxops.models.data.spec import Spec, Split, colours

CLASSES_FILE = "classes.yaml"
LAYOUT = (
    f"expected {CLASSES_FILE}, images/train/, images/val/, labels/train/ and labels/val/; an image "
    "and its labels, a PNG of class numbers, have the same name"
)


def folder_spec(root: str | Path) -> Spec:
    """The data set in a folder: :data:`LAYOUT`.

    ``classes.yaml`` is a list of names, or names each with its colour ``[red, green, blue]``; the
    first one is class 0. Label 255 is ignored.

    Raises:
        FileNotFoundError: no ``classes.yaml``.
        ValueError: one that is neither of the two.
    """
    file = Path(root) / CLASSES_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: {LAYOUT}")
    try:
        classes = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(classes, (list, dict)) or any(isinstance(c, (list, dict)) for c in classes):
        raise ValueError(f"{file} must be a list of names, or names with colours, got {classes!r}")
    names = tuple(map(str, classes))
    palette = colours(len(names))
    if isinstance(classes, dict):
        given = [own if own is not None else ours for own, ours in zip(
            classes.values(), palette, strict=True)]  # fmt: skip
        wrong = [colour for colour in given if not _is_colour(colour)]
        if wrong:
            raise ValueError(f"{file} must have colours of three numbers up to 255, got {wrong[0]}")
        palette = tuple(map(tuple, given))
    splits = {split: Split(f"images/{split}/*.*", f"labels/{split}/*.png") for split in _SPLITS}
    return Spec("folder", names, splits, palette=palette, source=LAYOUT)


def _is_colour(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(isinstance(x, int) and 0 <= x < 256 for x in value)
    )


_SPLITS = ("train", "val", "test")
