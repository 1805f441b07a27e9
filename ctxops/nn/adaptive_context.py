# SPDX-License-Identifier: Apache-2.0
"""Adaptive pyramid context (He et al., APCNet, CVPR 2019)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops import _layout
from ctxops._checks import check_maps, check_sizes
from ctxops.nn.bands import reach
from ctxops.nn.cbr import cbr
from ctxops.nn.pointwise import PointwiseConv2d
from ctxops.nn.pyramid_pooling import pyramid_grids
from ctxops.ops.pyramid_pool import check_output_sizes


class _AdaptiveContextModule(nn.Module):
    """Every position weighs the cells of one grid, by itself and by the whole image."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        output_size: int,
        fusion: bool,
        norm_layer: Callable[[int], nn.Module],
    ) -> None:
        super().__init__()
        self.reduce = cbr(in_channels, channels, 1, norm_layer)
        self.reduce_grid = cbr(in_channels, channels, 1, norm_layer)
        self.image = cbr(channels, channels, 1, norm_layer)
        self.affinity = PointwiseConv2d(channels, output_size**2)
        self.residual = cbr(channels, channels, 1, norm_layer)
        self.fuse = cbr(channels, channels, 1, norm_layer) if fusion else nn.Identity()

    def reach(self) -> float:
        return reach(*self.children())

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        x = self.reduce(x)
        cells = self.reduce_grid(grid).flatten(2)
        affinity = self.affinity(x + self.image(F.adaptive_avg_pool2d(x, 1))).sigmoid()
        context = torch.bmm(cells, affinity.flatten(2)).unflatten(2, x.shape[2:])
        context = context.contiguous(memory_format=_layout.memory_format(x))
        return self.fuse((self.residual(context) + x).relu())


class AdaptiveContext(nn.Module):
    r"""APCNet's head: for each grid of a pyramid, every position decides which cells it wants.

    .. math::
        Z_n &= \operatorname{CBR}\big(\operatorname{relu}(\operatorname{CBR}(A_n\, G_n) + R_n)\big)
        \qquad
        A_n = \operatorname{sigmoid}\big(W_n (R_n + \operatorname{CBR}(\operatorname{mean} R_n))
            + b_n\big) \\
        Y &= \operatorname{CBR}_{3 \times 3}(\operatorname{cat}(X,\, Z_n \text{ for each } n))

    with :math:`R_n = \operatorname{CBR}(X)` and the cells :math:`G_n = \operatorname{CBR}(P_n(X))`
    of the average pooling to n x n, where CBR is a 1 x 1 convolution without bias, a norm and ReLU.
    :math:`A_n` has one weight for each position and cell. All grids come from one pass over the
    map.

    Args:
        in_channels: channels of the map.
        channels: channels inside and of the result.
        output_sizes: the grids n.
        fusion: the CBR at the end of every :math:`Z_n`.
        norm_layer: makes a norm from a number of channels.

    The norm of the image's mean sees one position per image: in training it needs two images.

    Shape: ``(B, in_channels, h, w)`` -> ``(B, channels, h, w)``, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, no grid, a map of another shape.

    Source: He et al., Adaptive Pyramid Context Network for Semantic Segmentation, CVPR 2019,
    section 3.2. ``AdaptiveContext(2048)`` is Table 3's APCNet of Jin et al. (ICCV 2021): 30,455,858
    parameters.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        output_sizes: Sequence[int] = (1, 2, 3, 6),
        *,
        fusion: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, channels=channels)
        self.output_sizes = check_output_sizes(output_sizes)
        self.in_channels = in_channels
        self.contexts = nn.ModuleList(
            _AdaptiveContextModule(in_channels, channels, n, fusion, norm_layer)
            for n in self.output_sizes
        )
        width = in_channels + len(self.output_sizes) * channels
        self.fuse = cbr(width, channels, 3, norm_layer)

    def extra_repr(self) -> str:
        return f"output_sizes={self.output_sizes}"

    def reach(self) -> float:
        return reach(*self.contexts, self.fuse)

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self))
        grids = pyramid_grids(x, self.output_sizes)
        contexts = [context(x, grid) for context, grid in zip(self.contexts, grids, strict=True)]
        return self.fuse(torch.cat([x, *contexts], dim=1))
