# SPDX-License-Identifier: Apache-2.0
"""A feature pyramid on pyramid pooling (Xiao et al., UPerNet, ECCV 2018)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctxops._checks import check_features, check_levels, check_sizes
from ctxops.nn.cbr import cbr
from ctxops.nn.pyramid_pooling import PyramidPooling
from ctxops.nn.resize import resize


class FeaturePyramid(nn.Module):
    """All maps fused by a feature pyramid whose top is the context of the last: see UPerDecoder.

    Args:
        in_channels: channels of each level's map, at least two levels.
        channels: of each level, of what ``context`` gives and of the result.
        context: the module from the last map to the top of the pyramid.
        align_corners, norm_layer: as in :class:`UPerDecoder`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        context: nn.Module,
        *,
        align_corners: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.in_channels = check_levels("in_channels", in_channels)
        self.align_corners, self.context = align_corners, context
        finer = self.in_channels[:-1]
        self.lateral = nn.ModuleList(cbr(width, channels, 1, norm_layer) for width in finer)
        self.refine = nn.ModuleList(cbr(channels, channels, 3, norm_layer) for _ in finer)
        self.fuse = cbr(len(self.in_channels) * channels, channels, 3, norm_layer)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, align_corners={self.align_corners}"

    def forward(self, *maps: Tensor) -> Tensor:
        check_features(maps, self.in_channels, (*self.lateral, self.context))
        *finer, last = maps
        y = self.context(last)
        levels, size = [y], finer[0].shape[2:]
        for x, lateral, refine in reversed(
            list(zip(finer, self.lateral, self.refine, strict=True))
        ):
            y = lateral(x) + resize(y, x.shape[2:], self.align_corners)
            levels.insert(0, refine(y))
        return self.fuse(torch.cat([resize(x, size, self.align_corners) for x in levels], dim=1))


class UPerDecoder(FeaturePyramid):
    r"""A feature pyramid whose top is the pyramid pooling of the last map, all levels fused.

    .. math::
        Y_L = \operatorname{PPM}(X_L), \qquad
        Y_l = \operatorname{CBR}_{1 \times 1}(X_l) + \operatorname{resize}_l(Y_{l+1}), \qquad
        Y = \operatorname{CBR}_{3 \times 3}\big(\operatorname{cat}(
            \operatorname{CBR}_{3 \times 3}(Y_l) \text{ for each } l < L,\, Y_L)\big)

    at the size of the finest map, where CBR is a convolution without bias, a norm and ReLU and PPM
    a :class:`PyramidPooling`.

    Args:
        in_channels: channels of each level's map, at least two levels.
        channels: of each level and of the result.
        output_sizes: the grids of the pyramid pooling.
        align_corners: of the bilinear resizes.
        norm_layer: makes a norm from a number of channels.

    The norm of a 1 x 1 grid sees one position per image: in training it needs two images.

    Shape: maps ``(B, in_channels[l], H_l, W_l)``, the finest first, one argument each
        -> ``(B, channels, H_0, W_0)``.

    Raises:
        TypeError: sizes that are no integers, maps that are no floating tensors.
        ValueError: sizes below 1, fewer than two levels, no grid; another number of maps, maps of
            other channels or another batch than the first's.

    Source: Xiao et al., Unified Perceptual Parsing for Scene Understanding, ECCV 2018, Figure 4,
    for one task.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 512,
        output_sizes: Sequence[int] = (1, 2, 3, 6),
        *,
        align_corners: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        in_channels = check_levels("in_channels", in_channels)
        check_sizes(channels=channels)
        context = PyramidPooling(
            in_channels[-1],
            channels,
            output_sizes,
            align_corners=align_corners,
            norm_layer=norm_layer,
        )
        super().__init__(
            in_channels, channels, context, align_corners=align_corners, norm_layer=norm_layer
        )
