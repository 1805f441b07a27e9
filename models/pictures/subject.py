# SPDX-License-Identifier: Apache-2.0
"""What is looked at: a network and an image, and how to see inside."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ctxops.models.base import SegmentationNetwork
from ctxops.models.inference import segment, standardise


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network, the image that it sees, and what is known of both.

    Attributes:
        network: in evaluation mode.
        image: ``(3, H, W)``, uint8.
        classes: their names.
        palette: a colour for each.
        at: row and column of the pixel that is asked about.
        labels: ``(H, W)``, uint8, the true classes, where they are known.
    """

    network: SegmentationNetwork
    image: Tensor
    classes: Sequence[str]
    palette: Sequence[Sequence[int]]
    at: tuple[int, int]
    labels: Tensor | None = None

    @property
    def input(self) -> Tensor:
        """What the network is given, ``(1, 3, H, W)``."""
        return standardise(self.image[None], self.network)

    def predict(self) -> Tensor:
        """The class of every pixel, ``(H, W)``, uint8."""
        return segment(self.network, self.image[None])[0].cpu()

    def cell(self, size: Sequence[int]) -> tuple[int, int]:
        """The position of a map of that height and width in which the pixel lies."""
        (row, column), (height, width) = self.at, self.image.shape[1:]
        return row * size[0] // height, column * size[1] // width

    def find(self, *kinds: type[nn.Module]) -> dict[str, Any]:
        """The network's modules of these kinds by their names."""
        return {
            name: module
            for name, module in self.network.named_modules()
            if isinstance(module, kinds)
        }

    def run(self, *modules: nn.Module) -> list[list[tuple[tuple, Any]]]:
        """The arguments and the result of each call of these modules while the network runs."""
        calls: list[list[tuple[tuple, Any]]] = [[] for _ in modules]

        def record(into: list) -> Callable:
            return lambda _, arguments, result: into.append((arguments, result))

        with contextlib.ExitStack() as stack:
            for module, into in zip(modules, calls, strict=True):
                stack.enter_context(module.register_forward_hook(record(into)))
            self.predict()
        return calls
