# SPDX-License-Identifier: Apache-2.0
"""What a picture is made of: panels in rows, drawn by matplotlib."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

Points = Sequence[tuple[int, int]]
_WIDTH = 3.4  # of a panel, in inches
_TITLE = 0.35


@dataclasses.dataclass(frozen=True)
class Panel:
    """An image, and over it a map of numbers.

    Attributes:
        title: above it.
        image: ``(3, H, W)``, uint8.
        values: ``(h, w)`` of any size, stretched over the image; NaN is transparent. None: none.
        limits: the values of the two ends of the colours; None: the values' own.
        points: pixels to mark, each a row and a column of the image.
    """

    title: str
    image: Tensor
    values: Tensor | None = None
    limits: tuple[float, float] | None = None
    points: Points = ()

    @property
    def aspect(self) -> float:
        return self.image.shape[1] / self.image.shape[2]

    def draw(self, axes: Axes) -> None:
        height, width = self.image.shape[1:]
        axes.imshow(self.image.permute(1, 2, 0).numpy())
        if self.values is not None:
            low, high = self.limits or (None, None)
            shown = axes.imshow(
                self.values.numpy(),
                cmap="magma",
                alpha=0.75,
                vmin=low,
                vmax=high,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="nearest",
            )
            axes.figure.colorbar(shown, ax=axes, fraction=0.05 * self.aspect, pad=0.02)
        for row, column in self.points:
            axes.plot(column, row, "s", color="cyan", markeredgecolor="black", markersize=6)
        axes.set_axis_off()


@dataclasses.dataclass(frozen=True)
class Scatter:
    """Points in the plane, some of them named.

    Attributes:
        title: above it.
        rows: ``(N, 2)``, squares, with ``names`` and ``colours`` (0 to 255).
        dots: ``(N, 2)``, dots in the same colours; NaN where there is none.
    """

    title: str
    rows: Tensor
    names: Sequence[str]
    colours: Sequence[Sequence[int]]
    dots: Tensor

    aspect = 1.0

    def draw(self, axes: Axes) -> None:
        colours = [[channel / 255 for channel in colour] for colour in self.colours]
        axes.scatter(*self.rows.T.numpy(), c=colours, marker="s", s=60, edgecolors="black")
        axes.scatter(*self.dots.T.numpy(), c=colours, marker="o", s=30, edgecolors="black")
        for (x, y), name in zip(self.rows.tolist(), self.names, strict=True):
            axes.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set(xticks=[], yticks=[])
        axes.margins(0.15)


def draw(rows: Sequence[Sequence[Panel | Scatter]], path: str | Path) -> None:
    """Writes the panels to an image file, of the format that its name ends with."""
    columns = max(map(len, rows))
    heights = [_WIDTH * max(panel.aspect for panel in row) + _TITLE for row in rows]
    figure = Figure((_WIDTH * columns, sum(heights)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights)
    for row, line in zip(rows, grid, strict=True):
        for panel, axes in zip(row, line, strict=False):
            panel.draw(axes)
            axes.set_title(panel.title, fontsize=9)
        for axes in line[len(row) :]:
            axes.remove()
    figure.savefig(path, dpi=120, metadata={"Software": None})
