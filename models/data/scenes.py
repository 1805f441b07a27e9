# SPDX-License-Identifier: Apache-2.0
"""Synthetic scenes in which a far landmark alone tells what half of the pixels are.

A scene is a town or a harbour. Ground, buildings, vehicles and signs look alike in both: one code
draws them, in colours that do not depend on the place. The place is told by the landmark on the
horizon, a windmill or a lighthouse. Whoever sees only the neighbourhood of a pixel has to guess.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ctxops._checks import check_known, check_sizes
from ctxops.models.data.spec import IGNORE

# The first of each pair stands in a town, the second in a harbour.
PAIRED = ("road", "water", "house", "warehouse", "car", "boat", "sign", "buoy")
CLASSES = ("sky", "tree", "pole", "landmark", *PAIRED)
PALETTE = (
    *((70, 130, 180), (107, 142, 35), (30, 30, 30), (255, 230, 0)),
    *((128, 64, 128), (0, 170, 200), (150, 60, 50), (110, 110, 120)),
    *((0, 0, 200), (255, 120, 30), (220, 20, 150), (0, 230, 120)),
)
_SKY, _TREE, _POLE, _LANDMARK, _GROUND, _BUILDING, _VEHICLE, _SIGN = 0, 1, 2, 3, 4, 6, 8, 10
_LENGTHS = {"train": 600, "val": 60, "test": 60}
_LEAST_SIDE = 64
_LANDMARK_HALF = 10
_RED = np.array([210, 30, 30], np.float32)


class Scene(NamedTuple):
    """
    Attributes:
        image: ``(3, H, W)``, uint8.
        labels: ``(H, W)``, uint8, :data:`CLASSES` by number, or ``IGNORE``.
        distance: ``(H, W)``, float32: pixels from the landmark of the pixel's place.
    """

    image: Tensor
    labels: Tensor
    distance: Tensor


class _Canvas:
    """An image with its labels; what is drawn later covers what is there."""

    def __init__(self, rng: np.random.Generator, height: int, width: int, zones: int) -> None:
        self.rng, self.height, self.width = rng, height, width
        self.image = np.empty((height, width, 3), np.float32)
        self.labels = np.empty((height, width), np.uint8)
        inner = [int(width * (z + rng.uniform(-0.1, 0.1)) / zones) for z in range(1, zones)]
        self.cuts = [0, *inner, width]
        self.places = rng.integers(0, 2, zones).astype(np.uint8)  # 0: a town, 1: a harbour
        self.zone = np.repeat(np.arange(zones), np.diff(self.cuts))  # of each column

    def colour(self, low: float, high: float) -> np.ndarray:
        return self.rng.uniform(low, high, 3).astype(np.float32)

    def between(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high))

    def box(
        self,
        rows: tuple[int, int],
        columns: tuple[int, int],
        colour: np.ndarray,
        label: int,
        paired: bool = False,
    ) -> None:
        """Fills a box, cut at the borders. A paired label is that of the column's place."""
        y, x = (slice(max(a, 0), max(b, 0)) for a, b in (rows, columns))
        self.image[y, x] = colour
        self.labels[y, x] = label + (self.places[self.zone[x]] if paired else 0)


def scene(
    index: int,
    *,
    split: str = "train",
    seed: int = 0,
    size: Sequence[int] = (96, 192),
    zones: int = 1,
) -> Scene:
    """A scene, a pure function of its arguments.

    Args:
        index: which one, from 0 on.
        split: "train", "val" or "test"; no two splits share a scene.
        seed: of the whole set.
        size: height and width, at least 64, the width for each zone.
        zones: places side by side, each with a landmark of its own: with two an average over the
            whole image no longer tells what a pixel is.
    """
    check_known("split of scenes", split, _LENGTHS)
    height, width = size
    check_sizes(height=height, width=width, zones=zones)
    if height < _LEAST_SIDE or width < _LEAST_SIDE * zones:
        raise ValueError(
            f"size must be at least ({_LEAST_SIDE}, {_LEAST_SIDE * zones}), got {tuple(size)}"
        )
    rng = np.random.default_rng((seed, list(_LENGTHS).index(split), index))
    canvas = _Canvas(rng, height, width, zones)
    horizon = int(height * rng.uniform(0.38, 0.5))
    _draw_background(canvas, horizon)
    _draw_buildings(canvas, horizon)
    _draw_trees(canvas, horizon)
    landmarks = [_draw_landmark(canvas, horizon, zone) for zone in range(zones)]
    for cut in canvas.cuts[1:-1]:  # a wall between the places
        canvas.box((0, height), (cut - 2, cut + 2), np.array([20, 20, 20], np.float32), _POLE)
    _draw_vehicles(canvas, horizon)
    _draw_poles(canvas, horizon, [column for _, column in landmarks])
    canvas.labels[height - canvas.between(0, 5) :] = IGNORE  # what the camera stands on
    light = rng.uniform(0.75, 1.2)
    image = (canvas.image * light + rng.normal(0, 6, canvas.image.shape)).clip(0, 255)
    rows, columns = np.mgrid[:height, :width]
    row, column = np.array(landmarks)[canvas.zone].T
    return Scene(
        torch.from_numpy(image.astype(np.uint8)).permute(2, 0, 1),
        torch.from_numpy(canvas.labels),
        torch.from_numpy(np.hypot(rows - row, columns - column).astype(np.float32)),
    )


def _draw_background(canvas: _Canvas, horizon: int) -> None:
    top, bottom = canvas.colour(90, 200), canvas.colour(140, 240)
    canvas.image[:horizon] = np.linspace(top, bottom, horizon)[:, None]
    canvas.labels[:horizon] = _SKY
    canvas.box((horizon, canvas.height), (0, canvas.width), canvas.colour(70, 150), _GROUND, True)
    ground = canvas.image[horizon:]
    ground += canvas.rng.normal(0, 12, (len(ground), 1, 1))  # streaks, on a road as on water
    ground += canvas.rng.normal(0, 7, (*ground.shape[:2], 1))


def _draw_buildings(canvas: _Canvas, horizon: int) -> None:
    x = -canvas.between(0, 20)
    while x < canvas.width:
        width, height = canvas.between(18, 44), canvas.between(12, int(canvas.height * 0.3))
        if canvas.rng.random() < 0.75:
            wall, window = canvas.colour(60, 200), canvas.between(5, 9)
            rows = (horizon - height, horizon + 3)
            canvas.box(rows, (x, x + width), wall, _BUILDING, True)
            for y in range(rows[0] + 2, horizon - 2, window):
                for left in range(x + 2, x + width - 3, window):
                    canvas.box((y, y + 3), (left, left + 3), wall * 0.5, _BUILDING, True)
        x += width + canvas.between(0, 12)


def _draw_trees(canvas: _Canvas, horizon: int) -> None:
    rows, columns = np.mgrid[: canvas.height, : canvas.width]
    for _ in range(canvas.between(2, 6)):
        radius, column = canvas.between(6, 13), canvas.between(0, canvas.width)
        row = horizon - canvas.between(0, 14)
        disc = (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
        green = canvas.colour(30, 90) * np.array([0.6, 1.5, 0.5], np.float32)
        canvas.image[disc] = green + canvas.rng.normal(0, 14, (disc.sum(), 1))
        canvas.labels[disc] = _TREE


def _draw_landmark(canvas: _Canvas, horizon: int, zone: int) -> tuple[int, int]:
    """A windmill or a lighthouse that nothing hides; its row and column."""
    half = _LANDMARK_HALF
    middle = canvas.between(canvas.cuts[zone] + half + 4, canvas.cuts[zone + 1] - half - 4)
    top, body = horizon - canvas.between(24, 32), canvas.colour(190, 250)
    canvas.box((top, horizon + 4), (middle - 3, middle + 4), body, _LANDMARK)
    if canvas.places[zone]:
        for y in range(top, horizon + 4, 6):
            canvas.box((y, y + 3), (middle - 3, middle + 4), _RED, _LANDMARK)
    else:
        for offset in range(1 - half, half):  # the sails, a cross
            y = top + 4 + offset
            for x in (middle - offset, middle + offset):
                canvas.box((y, y + 3), (x - 1, x + 2), body, _LANDMARK)
    return top + 8, middle


def _draw_vehicles(canvas: _Canvas, horizon: int) -> None:
    """From the far ones to the near ones, which are larger and hide those behind."""
    feet = canvas.rng.uniform(horizon + 8, canvas.height - 4, canvas.between(3, 8))
    for foot in np.sort(feet).astype(int):
        nearness = 0.35 + 0.65 * (foot - horizon) / (canvas.height - horizon)
        width, height = int(30 * nearness) + 4, int(14 * nearness) + 3
        x, body = canvas.between(-8, canvas.width - 4), canvas.colour(40, 230)
        top, middle = foot - height, foot - height // 2
        canvas.box((top, foot), (x, x + width), body, _VEHICLE, True)
        canvas.box((top, middle), (x + width // 4, x + width // 2), body * 0.35, _VEHICLE, True)
        canvas.box((foot - 2, foot), (x + 2, x + width - 2), body * 0.2, _VEHICLE, True)


def _draw_poles(canvas: _Canvas, horizon: int, landmarks: Sequence[int]) -> None:
    """Thin poles, most with a small sign; none in front of a landmark."""
    for _ in range(canvas.between(2, 6)):
        x, foot = (
            canvas.between(4, canvas.width - 8),
            canvas.between(horizon + 6, canvas.height - 8),
        )
        if min(abs(x - column) for column in landmarks) < _LANDMARK_HALF + 6:
            continue
        top, width = foot - canvas.between(30, 60), canvas.between(1, 3)
        canvas.box((top, foot), (x, x + width), canvas.colour(20, 60), _POLE)
        if canvas.rng.random() < 0.8:
            side, face = canvas.between(6, 10), canvas.colour(120, 255)
            left, top = x - side // 2, max(top, 0)
            canvas.box((top, top + side), (left, left + side), face, _SIGN, True)
            inner = (left + 2, left + side - 2)
            canvas.box((top + 2, top + side - 2), inner, face * 0.3, _SIGN, True)


def right_places(
    labels: Tensor, predicted: Tensor, distance: Tensor, *, step: int = 32, bins: int = 6
) -> Tensor:
    """How often the place is right, by the distance from the landmark that tells it.

    A pixel counts if its pair of classes is right: a house that is taken for a warehouse is in the
    wrong place, one that is taken for a tree does not count. Who does not see the landmark is right
    in half of the pixels.

    Args:
        labels, distance: of a :class:`Scene`.
        predicted: a class for each pixel.
        step: pixels; bin i holds the distances from ``i * step`` to below ``(i + 1) * step``.
        bins: how many; pixels beyond them do not count.

    Shape: ``(H, W)`` each -> ``(2, bins)``, int64: the right pixels, and all that count.
    """
    truth, predicted = labels.int(), predicted.int()
    first = CLASSES.index(PAIRED[0])  # the pairs begin with an even number
    known = (truth >= first) & (truth != IGNORE) & (truth // 2 == predicted // 2)
    bin_of = (distance / step).long()
    return torch.stack(
        [
            torch.bincount(bin_of[counted & (bin_of < bins)], minlength=bins)
            for counted in (known & (truth == predicted), known)
        ]
    )


class Scenes(Dataset):
    """Scenes of a split: ``scenes[i]`` is an image ``(3, H, W)`` and labels ``(H, W)``, uint8.

    Args:
        split: as in :func:`scene`.
        length: how many; None: 600 for training, 60 for each of the others.
        seed, size, zones: as in :func:`scene`.
    """

    def __init__(
        self,
        split: str = "train",
        *,
        length: int | None = None,
        seed: int = 0,
        size: Sequence[int] = (96, 192),
        zones: int = 1,
    ) -> None:
        check_known("split of scenes", split, _LENGTHS)
        self.split, self.seed, self.size, self.zones = split, seed, tuple(size), zones
        self.length = _LENGTHS[split] if length is None else length
        check_sizes(length=self.length)

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"scene {index} of {self.split}"

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        image, labels, _ = scene(
            index, split=self.split, seed=self.seed, size=self.size, zones=self.zones
        )
        return image, labels
