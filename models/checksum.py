# SPDX-License-Identifier: Apache-2.0
"""Numbers of an imported network's logits, to compare with those of the original."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctxops.models._timm import require_timm
from ctxops.models.base import SegmentationNetwork
from ctxops.models.data.files import read_image

# Divided by every stride.
_SIDE = 512


def check_image(path: str | Path) -> Tensor:
    """An image as every check has it, whatever the network expects: ``(1, 3, 512, 512)``, float32.

    RGB, upright, resized by PIL's bilinear filter, divided by 255, less ImageNet's mean, over its
    deviation.

    Raises:
        OSError: no such file.
        ValueError: no image that can be read.
    """
    original = Image.fromarray(read_image(path).permute(1, 2, 0).numpy())
    pixels = np.asarray(original.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
    constants = require_timm().data.constants
    mean, deviation = constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD
    image = (pixels / 255 - mean) / deviation
    return torch.from_numpy(image).float().permute(2, 0, 1)[None]


@torch.no_grad()
def checksum(network: SegmentationNetwork, image: Tensor) -> str:
    """Shape, mean and deviation of the logits of an image, and how many pixels each class has."""
    logits = network(image).logits
    counts = logits.argmax(1).flatten().bincount(minlength=network.num_classes)
    return (
        f"logits {tuple(logits.shape)}, mean {logits.mean():.5g}, deviation {logits.std():.5g}, "
        f"pixels of each class {counts.tolist()}"
    )
