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
    values = np.broadcast_to(row.astype(np.uint8 if max(numbers) < 256 else np.uint16), size).copy()
    if path.suffix == ".mat":
        matlab(path, values)
    else:
        Image.fromarray(values).save(path)


def matlab(path, values):
    """As SBD has them in cls/, and COCO-Stuff 10k in annotations/."""
    from scipy.io import savemat

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent.name == "cls":
        boundaries = np.zeros((20, 1), object)
        savemat(path, {"GTcls": {"Boundaries": boundaries, "Segmentation": values}})
    else:
        savemat(path, {"S": values, "names": np.array(["unlabeled", "person"], object)})


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
    names(root / "ImageSets/Segmentation/train.txt", "2007_000032", "2007_000039")


def voc2012_augmented(root):
    """What mmsegmentation's converter adds: the labels of SBD, and which are no others."""
    voc2012(root)
    labels(root / "SegmentationClassAug/2007_000063.png", (20, 0, 255))
    names(root / "ImageSets/Segmentation/aug.txt", "2007_000063")


def sbd(root):
    for name in ("2008_000002", "2008_000003", "2008_000007"):
        image(root / f"img/{name}.jpg")
        labels(root / f"cls/{name}.mat", (0, 20))
    names(root / "train.txt", "2008_000002", "2008_000003")
    names(root / "val.txt", "2008_000007")


def pascal_context(root):
    for name in ("2008_000002", "2008_000003", "2008_000004"):
        image(root / f"JPEGImages/{name}.jpg")  # of which not all have labels
    for name in ("2008_000002", "2008_000003"):
        labels(root / f"SegmentationClassContext/{name}.png", (0, 1, 59))
    names(root / "ImageSets/SegmentationContext/train.txt", "2008_000002", "2008_000003")
    (root / "trainval_merged.json").write_text("{}")


def coco_stuff164k(root):
    for name in ("000000000009", "000000000025"):
        image(root / f"images/train2017/{name}.jpg")
        labels(root / f"annotations/train2017/{name}.png", (0, 12, 181, 255))
    # What mmsegmentation's converter writes beside it.
    labels(root / "annotations/train2017/000000000009_labelTrainIds.png", (0, 11, 170, 255))


def coco_stuff10k(root):
    for number in (77, 109, 113):
        name = f"COCO_train2014_{number:012}"
        image(root / f"images/{name}.jpg")
        labels(root / f"annotations/{name}.mat", (0, 1, 13, 182))
    listed = [f"COCO_train2014_{number:012}" for number in (77, 109)]
    names(root / "imageLists/train.txt", *listed)
    names(root / "imageLists/test.txt", "COCO_train2014_000000000113")


def lip(root):
    for name in ("1000_1234574", "100034_483681"):
        image(root / f"train_images/{name}.jpg")
        labels(root / f"train_segmentations/{name}.png", (0, 19))


def cihp(root):
    for name in ("0000006", "0000007"):
        image(root / f"Training/Images/{name}.jpg")
        for kind in ("Category_ids", "Human_ids", "Instance_ids"):
            labels(root / f"Training/{kind}/{name}.png", (0, 19))
        image(root / f"Training/Categories/{name}.png")


def nyudv2(root):
    for name in ("0003", "0004"):
        image(root / f"images/{name}.jpg")
        labels(root / f"segmentation/{name}.png", (0, 1, 40))
    names(root / "gt_sets/train.txt", "0003", "0004")


def folder(root, classes="- sky\n- ground\n- tree\n"):
    for split in ("train", "val"):
        image(root / f"images/{split}/a.b.jpg")
        image(root / f"images/{split}/c.png")
        (root / f"images/{split}/.hidden.png").write_bytes(b"")
        for name in ("a.b", "c"):
            labels(root / f"labels/{split}/{name}.png", (0, 2, 255))
    (root / "classes.yaml").write_text(classes)


def names(path, *listed):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in listed))
