# SPDX-License-Identifier: Apache-2.0
"""The pyramid pooling module (Zhao et al., PSPNet, CVPR 2017)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctxops._checks import check_kernel_size, check_maps, check_sizes
from ctxops.nn.bands import average_pyramids, reach
from ctxops.nn.cbr import cbr
from ctxops.nn.pointwise import PointwiseConv2d
from ctxops.nn.resize import resize_like
from ctxops.ops.pyramid_pool import check_output_sizes


class PyramidPooling(nn.Module):
    r"""Pyramid pooling module (PPM): what the map is on average, in grids from coarse to fine.

    .. math::
        Y = \operatorname{CBR}\big(\operatorname{cat}(X,\, \operatorname{resize}(
            \operatorname{CBR}_{1 \times 1}(P_n(X))) \text{ for each } n)\big)

    where CBR is a convolution without bias, a norm and ReLU, and :math:`P_n` the average pooling to
    n x n. All grids come from one pass over the map, :func:`ctxops.pyramid_pool`.

    Args:
        in_channels: channels of the map.
        channels: channels of the result.
        output_sizes: the grids n.
        activation: ReLU at the end of the branches. False: the PSPNet of the authors of GFF and
            GALD.
        kernel_size: of the last convolution.
        branch_channels: channels of each branch; None: ``channels``.
        image_norm: False: the branch of a 1 x 1 grid has a bias in the place of the norm, as in
            segmentation_models.pytorch.
        align_corners: of the bilinear resizes.
        norm_layer: makes a norm from a number of channels.

    The norm of a 1 x 1 grid sees one position per image: in training it needs two images, or
    ``image_norm=False``.

    Shape: ``(B, in_channels, h, w)`` -> ``(B, channels, h, w)``, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, no grid, an even kernel, a map of another shape.

    Source: Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, section 3.2.
    ``PyramidPooling(2048)`` is Table 3's PPM of Jin et al. (ICCV 2021): 23,073,792 parameters.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        output_sizes: Sequence[int] = (1, 2, 3, 6),
        *,
        activation: bool = True,
        kernel_size: int = 3,
        branch_channels: int | None = None,
        image_norm: bool = True,
        align_corners: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if branch_channels is None:
            branch_channels = channels
        check_sizes(in_channels=in_channels, channels=channels, branch_channels=branch_channels)
        self.output_sizes = check_output_sizes(output_sizes)
        check_kernel_size(kernel_size)
        self.in_channels, self.align_corners = in_channels, align_corners

        def branch(size: int) -> nn.Sequential:
            if size > 1 or image_norm:
                return cbr(in_channels, branch_channels, 1, norm_layer, activation=activation)
            convolution = PointwiseConv2d(in_channels, branch_channels)
            return nn.Sequential(convolution, *[nn.ReLU(inplace=True)] * activation)

        self.branches = nn.ModuleList(map(branch, self.output_sizes))
        width = in_channels + len(self.output_sizes) * branch_channels
        self.fuse = cbr(width, channels, kernel_size, norm_layer)

    def extra_repr(self) -> str:
        return f"output_sizes={self.output_sizes}, align_corners={self.align_corners}"

    def reach(self) -> float:
        return reach(*self.branches, self.fuse)

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self))
        grids = pyramid_grids(x, self.output_sizes)
        contexts = [
            resize_like(branch(grid), x, self.align_corners)
            for branch, grid in zip(self.branches, grids, strict=True)
        ]
        return self.fuse(torch.cat([x, *contexts], dim=1))


def pyramid_grids(x: Tensor, output_sizes: Sequence[int]) -> list[Tensor]:
    """A map ``(B, C, H, W)`` pooled to ``(B, C, n, n)`` for each n, in one pass."""
    (pooled,) = average_pyramids([x], output_sizes)
    grids = pooled.split([n * n for n in output_sizes], dim=2)
    return [grid.unflatten(2, (n, n)) for grid, n in zip(grids, output_sizes, strict=True)]
