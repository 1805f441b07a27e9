# SPDX-License-Identifier: Apache-2.0
"""The augmentation of the papers: random scale, crop, flip and photometric change."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from ctxops.models.data.order import generator
from ctxops.models.data.spec import IGNORE

_CROP_ATTEMPTS = 10
# Keeps the numbers of the augmentation apart from those of the order.
_STREAM = 1


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to an image and its labels in training, in this order.

    Attributes:
        scale: both sides are multiplied by a number drawn between these two.
        crop: height and width of a random crop; a smaller image is padded at the bottom and on the
            right by zeros, its labels by ``IGNORE``. None: no crop.
        most_of_one_class: a crop of which one class has a larger share is drawn again, ten times at
            most.
        flip: probability of a mirror image.
        brightness, contrast, saturation: the factor is drawn between 1 - x and 1 + x.
        hue: the shift is drawn between -x and x, at most 0.5, a half turn.
        mirrored: pairs of classes that change places in a mirror image: :func:`mirrored_classes`.
    """

    scale: Sequence[float] = (1.0, 1.0)
    crop: Sequence[int] | None = None
    most_of_one_class: float = 1.0
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    mirrored: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be two numbers 0 < low <= high, got {self.scale}")
        if self.crop is not None and (len(self.crop) != 2 or min(self.crop) < 1):
            raise ValueError(f"crop must be a height and a width, got {self.crop}")
        for name, most in (("most_of_one_class", 1), ("flip", 1), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be in [0, {most}], got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def __call__(
        self, image: Tensor, labels: Tensor, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Image ``(C, H, W)`` and labels ``(H, W)``, uint8, and the source of all chance."""

        def draw(low: float, high: float) -> float:
            return low + (high - low) * torch.rand((), generator=random).item()

        if tuple(self.scale) != (1.0, 1.0):
            factor = draw(*self.scale)
            size = [max(1, round(side * factor)) for side in labels.shape]
            image = transforms.resize(image, size, antialias=True)
            nearest = InterpolationMode.NEAREST
            labels = transforms.resize(labels[None], size, interpolation=nearest)[0]
        if self.crop is not None:
            image, labels = self._crop(image, labels, random)
        if draw(0, 1) < self.flip:
            image, labels = image.flip(-1), labels.flip(-1)
            for left, right in self.mirrored:
                was_left, was_right = labels == left, labels == right
                labels[was_left], labels[was_right] = right, left
        for name in ("brightness", "contrast", "saturation", "hue"):
            amount = getattr(self, name)
            if amount:
                middle = 0 if name == "hue" else 1
                change = getattr(transforms, f"adjust_{name}")
                image = change(image, draw(middle - amount, middle + amount))
        return image.contiguous(), labels.contiguous()

    def _crop(
        self, image: Tensor, labels: Tensor, random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        missing = [max(0, want - side) for want, side in zip(self.crop, labels.shape, strict=True)]
        if any(missing):
            padding = [0, 0, missing[1], missing[0]]
            image = transforms.pad(image, padding)
            labels = transforms.pad(labels[None], padding, fill=IGNORE)[0]
        for _ in range(_CROP_ATTEMPTS):
            y, x = (
                int(torch.randint(side - want + 1, (), generator=random))
                for want, side in zip(self.crop, labels.shape, strict=True)
            )
            part = labels[y : y + self.crop[0], x : x + self.crop[1]]
            if self.most_of_one_class == 1 or _largest_share(part) <= self.most_of_one_class:
                break
        return image[:, y : y + self.crop[0], x : x + self.crop[1]], part


def mirrored_classes(names: Sequence[str]) -> list[tuple[int, int]]:
    """The classes called "left ..." with those called "right ..." and the same, as LIP's arms."""
    numbers = {name: k for k, name in enumerate(names)}
    others = {name: name.replace("left ", "right ", 1) for name in names if name[:5] == "left "}
    return [(numbers[a], numbers[b]) for a, b in others.items() if b in numbers]


def _largest_share(labels: Tensor) -> float:
    """The share that the most frequent class has of the labelled pixels."""
    counts = torch.bincount(labels[labels != IGNORE].long().flatten(), minlength=1)
    return (counts.max() / counts.sum().clamp_min(1)).item()


class Augmented(Dataset):
    """A data set by the keys of a stream: ``augmented[index, position]``.

    The augmentation is a function of the seed and the position alone, in whichever process. So is
    the sample: for one that is None, the data set's next one takes its place.

    Raises:
        ValueError: all samples are None.
    """

    def __init__(self, samples: Any, augmentation: Augmentation, seed: int = 0) -> None:
        self.samples, self.augmentation, self.seed = samples, augmentation, seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        first, position = key
        random = generator(self.seed, position, _STREAM)
        for index in (*range(first, len(self)), *range(first)):
            sample = self.samples[index]
            if sample is not None:
                image, labels = sample
                return *self.augmentation(image, labels, random), index
        raise ValueError(f"all {len(self)} samples were passed over")
