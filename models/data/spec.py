# SPDX-License-Identifier: Apache-2.0
"""What a data set is: where its images and labels lie, and what its labels' numbers mean."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ctxops._checks import check_known

# The label of pixels that neither losses nor metrics count.
IGNORE = 255
_UNKNOWN = -1


class Split(NamedTuple):
    """Where the pairs of a split lie, as patterns below the root.

    Attributes:
        images: such as ``"images/train/*.jpg"``; a star stands for any part of a name without "/".
        labels: what the stars of ``images`` stand for takes the place of the stars here, in order.
        names: a file with what the star stands for, one on a line; None: all images that exist.
    """

    images: str
    labels: str
    names: str | None = None


class Pair(NamedTuple):
    image: Path
    labels: Path


@dataclasses.dataclass(frozen=True)
class Spec:
    """A data set of image and label files.

    Attributes:
        name: of the data set.
        classes: the names of the classes.
        splits: by name.
        ids: from the numbers in the files to the classes, or to ``IGNORE``; None: the files hold
            the classes. Whether it is listed or not, the number 255 is ``IGNORE``.
        palette: a colour (red, green, blue) for each class; empty: :func:`colours`.
        source: where the files come from, for whoever has none.
        variable: what holds the numbers in labels that are .mat files; a field of it after a dot,
            as ``"GTcls.Segmentation"``.
    """

    name: str
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    ids: Mapping[int, int] | None = None
    palette: tuple[tuple[int, int, int], ...] = ()
    source: str = ""
    variable: str = ""

    def __post_init__(self) -> None:
        if not 1 < len(self.classes) <= IGNORE:
            raise ValueError(f"classes must be 2 to {IGNORE}, got {len(self.classes)}")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must have different names, got {list(self.classes)}")
        if not self.palette:
            object.__setattr__(self, "palette", colours(len(self.classes)))
        if len(self.palette) != len(self.classes):
            raise ValueError(
                f"palette must have a colour for each of {len(self.classes)} classes, "
                f"got {len(self.palette)}"
            )

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """The class of every number that a file of up to 16 bits can hold."""
        ids = {k: k for k in range(len(self.classes))} if self.ids is None else self.ids
        table = np.full(1 << 16, _UNKNOWN, np.int16)
        table[IGNORE] = IGNORE
        table[list(ids)] = list(ids.values())
        return table

    def to_classes(self, numbers: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """The classes of a file's numbers, uint8, and which numbers the data set does not know.

        What is not known becomes ``IGNORE``.
        """
        classes = self._table[numbers]
        unknown = classes == _UNKNOWN
        if not unknown.any():
            return classes.astype(np.uint8), []
        return np.where(unknown, IGNORE, classes).astype(np.uint8), np.unique(
            numbers[unknown]
        ).tolist()

    def pairs(self, root: str | Path, split: str) -> list[Pair]:
        """The files of a split, or of several joined by "+", sorted by name.

        Whether each labels file exists is not looked at.

        Raises:
            ValueError: an unknown split.
            FileNotFoundError: no image at all, or no list of names. The message says what to put
                where.
        """
        root = Path(root)
        return [pair for part in split.split("+") for pair in self._pairs(root, part)]

    def unpaired(self, root: str | Path, split: str) -> list[Path]:
        """Labels without an image, sorted; none of a split whose images a list names.

        ``NAME_more.png`` beside ``NAME.png`` is no labels file: converters write such.
        """
        root, known = Path(root), {pair.labels for pair in self.pairs(root, split)}
        found = {
            path
            for part in split.split("+")
            if self.splits[part].names is None
            for path in _glob(root, self.splits[part].labels)
        }
        return sorted(
            path
            for path in found - known
            if Path(f"{str(path).rpartition('_')[0]}{path.suffix}") not in known
        )

    def layout(self, split: str) -> str:
        """Which files of a split are expected below the root."""
        where = self.splits[split]
        names = f" of the names in {where.names}" if where.names else ""
        return f"images {where.images}{names}, labels {where.labels}"

    def _pairs(self, root: Path, split: str) -> list[Pair]:
        check_known(f"split of {self.name}", split, self.splits)
        where = self.splits[split]
        if where.names is None:
            found = _glob(root, where.images)
            images = sorted(path.relative_to(root).as_posix() for path in found)
        else:
            file = root / where.names
            names = file.read_text().split() if file.is_file() else []
            images = [where.images.replace("*", name) for name in names]
        if not images:
            source = f" ({self.source})" if self.source else ""
            raise FileNotFoundError(
                f"no {split!r} images of {self.name}{source} in {root}: "
                f"expected {self.layout(split)}"
            )
        stars = re.compile(re.escape(where.images).replace(r"\*", "([^/]*)"))
        return [
            Pair(root / image, root / _fill(where.labels, stars.fullmatch(image).groups()))
            for image in images
        ]


def _glob(root: Path, pattern: str) -> list[Path]:
    return [path for path in root.glob(pattern) if not path.name.startswith(".")]


def _fill(pattern: str, parts: Sequence[str]) -> str:
    for part in parts:
        pattern = pattern.replace("*", part, 1)
    return pattern


def colours(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours that neighbouring classes do not share: those of PASCAL VOC, black first."""

    def channel(number: int, first: int) -> int:
        return sum((number >> (3 * bit + first) & 1) << (7 - bit) for bit in range(8))

    return tuple((channel(k, 0), channel(k, 1), channel(k, 2)) for k in range(count))
