# SPDX-License-Identifier: Apache-2.0
"""Fusions of maps of several levels without gates: concatenation, addition, feature pyramid."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctxops._checks import check_features, check_levels, check_sizes
from ctxops.nn.cbr import cbr
from ctxops.nn.resize import resize


def resized_sum(maps: Sequence[Tensor], size: Sequence[int], align_corners: bool) -> Tensor:
    """The sum of all maps at one size. Resizing is linear, so it waits for the maps of one size."""
    sums: list[Tensor] = []
    for x in maps:
        for i, other in enumerate(sums):
            if x.shape[2:] == other.shape[2:]:
                sums[i] = other + x
                break
        else:
            sums.append(x)
    first, *others = (resize(x, size, align_corners) for x in sums)
    for x in others:
        first = first + x
    return first


class LevelFusion(nn.Module):
    """What the fusions share: the levels' channels, and their reduction to one width."""

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        *,
        align_corners: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.in_channels = check_levels("in_channels", in_channels)
        check_sizes(channels=channels)
        self.channels, self.align_corners = channels, align_corners
        self.reduce = nn.ModuleList(
            cbr(width, channels, 1, norm_layer) for width in self.in_channels
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, channels={self.channels}, align_corners={self.align_corners}"

    def _reduce(self, features: Sequence[Tensor]) -> list[Tensor]:
        check_features(features, self.in_channels, self.reduce)
        return [reduce(x) for reduce, x in zip(self.reduce, features, strict=True)]


class ConcatFusion(LevelFusion):
    r"""Concatenation of all levels, at the size of each.

    .. math::
        Y_l = \operatorname{cat}_i \operatorname{resize}_l(X_i)

    of the maps after their reduction: each a 1 x 1 convolution, norm and ReLU.

    Args:
        in_channels: channels of each level's map, at least two levels. A context map joins as one
            more, the last.
        channels: channels that each map is reduced to.
        align_corners: of the bilinear resizes.
        norm_layer: makes a norm from a number of channels.

    Shape: maps ``(B, in_channels[l], H_l, W_l)`` of any sizes, as list or tuple
        -> as many maps ``(B, levels * channels, H_l, W_l)``, as tuple. A graph exported with open
        sizes keeps which levels differ in height.

    Raises:
        TypeError: sizes that are no integers, features that are no list of floating tensors.
        ValueError: sizes below 1, fewer than two levels, another number of maps, maps of other
            channels or another batch than the first's.

    Source: Li et al., Gated Fully Fusion for Semantic Segmentation, AAAI 2020, eq. 2, Table 1. The
    two 3 x 3 convolutions that refine what was fused belong to the network.
    """

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        maps = self._reduce(features)
        return tuple(
            torch.cat([resize(x, level.shape[2:], self.align_corners) for x in maps], dim=1)
            for level in maps
        )


class AdditionFusion(LevelFusion):
    r"""Sum of all levels, at the size of each.

    .. math::
        Y_l = \sum_i \operatorname{resize}_l(X_i)

    of the maps after their reduction. Arguments, what raises and source as in
    :class:`ConcatFusion`; eq. 3.

    Shape: maps ``(B, in_channels[l], H_l, W_l)`` of any sizes, as list or tuple
        -> as many maps ``(B, channels, H_l, W_l)``, as tuple.
    """

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        maps = self._reduce(features)
        return tuple(resized_sum(maps, level.shape[2:], self.align_corners) for level in maps)


class FeaturePyramidFusion(LevelFusion):
    r"""Feature pyramid: from the last level down, each receives what the one above it fused.

    .. math::
        Y_L = X_L, \qquad Y_l = X_l + \operatorname{resize}_l(Y_{l+1})

    of the maps after their reduction. Arguments, what raises and source as in
    :class:`ConcatFusion`; eq. 4. In the paper's Table 1 it has five maps: the context map on top of
    the backbone's four. Resizes are bilinear and the reductions end with norm and ReLU, as in
    everything it is compared with there; the pyramid of Lin et al. (CVPR 2017) has neither.

    Shape: maps ``(B, in_channels[l], H_l, W_l)`` of any sizes, the finest first, as list or tuple
        -> as many maps ``(B, channels, H_l, W_l)``, as tuple.
    """

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        *maps, top = self._reduce(features)
        fused = [top]
        for x in reversed(maps):
            fused.append(x + resize(fused[-1], x.shape[2:], self.align_corners))
        return tuple(reversed(fused))
