# SPDX-License-Identifier: Apache-2.0
"""Tiny trees in the layouts of the data sets."""

import numpy as np
from PIL import Image

SIZE = (6, 8)


def image(path, size=SIZE, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size, 3)
    Image.fromarray(values).convert(mode).save(path)


def labels(path, numbers=(0, 1), size=SIZE):
    """Columns of these numbers, over and over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = np.resize(np.array(numbers), size[1])
    dtype = np.uint8 if max(numbers) < 256 else np.uint16
    Image.fromarray(np.broadcast_to(row.astype(dtype), size).copy()).save(path)


def cityscapes(root, kind="gtFine", split="train"):
    for city, number in (("aachen", 0), ("aachen", 1), ("bochum", 0)):
        stem = f"{city}_00000{number}_000019"
        image(root / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png")
        for which in ("labelIds", "instanceIds", "color"):
            labels(root / f"{kind}/{split}/{city}/{stem}_{kind}_{which}.png", (7, 0, 33, 255))


def ade20k(root):
    for number in (1, 2):
        image(root / f"images/training/ADE_train_0000000{number}.jpg")
        labels(root / f"annotations/training/ADE_train_0000000{number}.png", (0, 1, 150))


def camvid(root):
    for name in ("0001TP_006690", "0001TP_006720"):
        image(root / f"train/{name}.png")
        labels(root / f"trainannot/{name}.png", (0, 10, 11))


def voc2012(root):
    for name in ("2007_000032", "2007_000039", "2007_000063"):
        image(root / f"JPEGImages/{name}.jpg")  # of which not all have labels
    for name in ("2007_000032", "2007_000039"):
        labels(root / f"SegmentationClass/{name}.png", (0, 20, 255))
        palette = Image.open(root / f"SegmentationClass/{name}.png")
        palette.putpalette([7] * 768)
        palette.save(root / f"SegmentationClass/{name}.png")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n2007_000039\n")


def folder(root, classes="- sky\n- ground\n- tree\n"):
    for split in ("train", "val"):
        image(root / f"images/{split}/a.b.jpg")
        image(root / f"images/{split}/c.png")
        (root / f"images/{split}/.hidden.png").write_bytes(b"")
        for name in ("a.b", "c"):
            labels(root / f"labels/{split}/{name}.png", (0, 2, 255))
    (root / "classes.yaml").write_text(classes)
