# SPDX-License-Identifier: Apache-2.0
"""Scores of all levels, added from the coarsest on and upsampled (Peng et al., CVPR 2017)."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctxops._checks import check_features, check_maps, check_sizes
from ctxops.nn.resize import resize


class BilinearDeconvolution(nn.ConvTranspose2d):
    r"""A transposed convolution that doubles a map and starts as bilinear interpolation.

    3 x 3 with stride 2 and without bias; at first every channel is interpolated for itself, the
    corners aligned, with the taps :math:`(1/2,\, 1,\, 1/2)` in both directions.

    Args:
        channels: channels of the map.

    ``forward(x, size)``: the result has ``size``, twice that of ``x``, or one less where it was
    rounded up in halving.

    Shape: ``(B, channels, H, W)`` -> ``(B, channels, *size)``.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, a map of another shape.

    Source: the deconvolutions of Long et al., Fully Convolutional Networks, CVPR 2015, section 4.1,
    which start so, and of Peng et al., Large Kernel Matters, CVPR 2017, Figure 2, whose kernel and
    start are our reading.
    """

    def __init__(self, channels: int) -> None:
        check_sizes(channels=channels)
        super().__init__(channels, channels, 3, stride=2, padding=1, output_padding=1, bias=False)
        taps = torch.tensor([0.5, 1.0, 0.5])
        with torch.no_grad():
            self.weight.zero_()
            self.weight[range(channels), range(channels)] = torch.outer(taps, taps)

    def forward(  # type: ignore[override]
        self, x: Tensor, size: Sequence[int]
    ) -> Tensor:
        check_maps(x=(x, self.in_channels))
        x = super().forward(x)
        for dim, side in enumerate(size, start=2):
            # A slice would make an exported graph ask which sizes are odd.
            x = x.index_select(dim, torch.arange(side, device=x.device))
        return x


class ProgressiveUpsampling(nn.Module):
    """As many doublings as a ratio of strides needs, each a deconvolution and a refinement.

    Args:
        ratio: of the strides. The part of it that is no power of two, and what a backbone rounds
            otherwise than up, is a bilinear resize before the first doubling.
        channels: channels of the map.
        refine: makes a refinement, a module that keeps the shape, for each doubling.

    Shape: ``(B, channels, h, w)`` and a size (H, W) -> ``(B, channels, H, W)``.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, a map of another shape.

    Source: Peng et al., CVPR 2017, Figure 2, with :class:`BoundaryRefinement`.
    """

    def __init__(self, ratio: int, channels: int, refine: Callable[[], nn.Module]) -> None:
        super().__init__()
        check_sizes(ratio=ratio, channels=channels)
        count = ratio.bit_length() - 1
        self.doublings = nn.ModuleList(BilinearDeconvolution(channels) for _ in range(count))
        self.refine = nn.ModuleList(refine() for _ in range(count))

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        sizes = [tuple(size)]
        for _ in self.doublings:
            sizes.append(tuple((side - 1) // 2 + 1 for side in sizes[-1]))
        x = resize(x, sizes.pop(), align_corners=False)
        for double, refine in zip(self.doublings, self.refine, strict=True):
            x = refine(double(x, sizes.pop()))
        return x


class ScorePyramid(nn.Module):
    r"""Scores of every level, the coarser ones upsampled and added from the last level down.

    .. math::
        Y_L = R(S_L(X_L)), \qquad
        Y_l = R\big(R(S_l(X_l)) + \operatorname{up}_l(Y_{l+1})\big)

    with a score layer S_l and refinements R of its own for each level and each sum, and
    :class:`ProgressiveUpsampling` without refinements.

    Args:
        in_channels: channels of each level's map, the finest first.
        strides: of each level's map.
        channels: channels of the scores: the number of classes.
        score: makes the layer from a map to its scores from its channels.
        refine: makes a refinement, a module that keeps the shape.

    Shape: maps ``(B, in_channels[l], H_l, W_l)``, one argument each
        -> ``(B, channels, H_0, W_0)``.

    Raises:
        TypeError: sizes that are no integers, maps that are no floating tensors.
        ValueError: sizes below 1, a stride that is not each level's; another number of maps, maps
            of other channels or another batch than the first's.

    Source: Peng et al., Large Kernel Matters, CVPR 2017, Figure 2, where the score layer is
    :class:`GlobalConvolution` and the refinement :class:`BoundaryRefinement`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        channels: int,
        score: Callable[[int], nn.Module],
        refine: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        check_sizes(channels=channels)
        if len(strides) != len(in_channels):
            raise ValueError(
                f"strides must be {len(in_channels)}, one of each level, got {strides}"
            )
        self.in_channels, self.strides = tuple(in_channels), tuple(strides)
        self.score = nn.ModuleList(score(width) for width in in_channels)
        self.refine = nn.ModuleList(refine() for _ in in_channels)
        self.refine_sum = nn.ModuleList(refine() for _ in in_channels[1:])
        self.upsample = nn.ModuleList(
            ProgressiveUpsampling(coarse // fine, channels, nn.Identity)
            for fine, coarse in itertools.pairwise(strides)
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, strides={self.strides}"

    def forward(self, *maps: Tensor) -> Tensor:
        check_features(maps, self.in_channels, self.score)
        levels = zip(maps, self.score, self.refine, strict=True)
        *scores, y = [refine(score(x)) for x, score, refine in levels]
        steps = zip(scores, self.upsample, self.refine_sum, strict=True)
        for x, upsample, refine in reversed(list(steps)):
            y = refine(x + upsample(y, x.shape[2:]))
        return y
