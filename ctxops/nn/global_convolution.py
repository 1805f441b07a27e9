# SPDX-License-Identifier: Apache-2.0
"""The global convolutional network (Peng et al., CVPR 2017), and what it is compared with."""

import itertools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ctxops._checks import check_kernel_size, check_maps, check_sizes


def _separable(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    vertical_first: bool,
    bias: bool,
    stride: int = 1,
) -> list[nn.Conv2d]:
    """k x 1 and 1 x k in either order, each with the stride of its own axis."""
    shapes: list[dict[str, Any]] = [
        {"kernel_size": (kernel_size, 1), "padding": (kernel_size // 2, 0), "stride": (stride, 1)},
        {"kernel_size": (1, kernel_size), "padding": (0, kernel_size // 2), "stride": (1, stride)},
    ]
    first, second = shapes if vertical_first else reversed(shapes)
    return [
        nn.Conv2d(in_channels, out_channels, bias=bias, **first),
        nn.Conv2d(out_channels, out_channels, bias=bias, **second),
    ]


class GlobalConvolution(nn.Module):
    r"""Global convolution: a k x k window in the parameters of four 1-D convolutions.

    .. math::
        Y = W_2^{1 \times k} W_1^{k \times 1} X + W_4^{k \times 1} W_3^{1 \times k} X

    without a non-linearity in between. Without biases it is one zero-padded k x k convolution; its
    kernel is ``W2[:, :, j] @ W1[:, :, i] + W4[:, :, i] @ W3[:, :, j]`` at row i and column j.

    Args:
        in_channels: channels of the map.
        out_channels: channels of the result and between the two convolutions of a branch; the
            number of classes in the paper.
        kernel_size: k, any odd number; it may exceed the map.
        bias: biases of the four convolutions. The first ones' end at the border of the map: what
            the second ones see beyond it is zero.

    The paper's Tables 1 and 2 compare it with ``nn.Conv2d(in_channels, out_channels, 1)`` and
    ``nn.Conv2d(in_channels, out_channels, k, padding=k // 2, bias=False)``, Tables 3 and 4 with
    :class:`ConvolutionStack`.

    Shape: ``(B, in_channels, H, W)`` -> ``(B, out_channels, H, W)``, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, an even ``kernel_size``, a map of another shape.

    Source: Peng et al., Large Kernel Matters, CVPR 2017, section 3.1 and Figure 2 B. The counts of
    Tables 2 and 4 exclude biases, hence the default.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, bias: bool = False
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels)
        check_kernel_size(kernel_size)
        self.in_channels = in_channels
        self.vertical_first, self.horizontal_first = (
            nn.Sequential(
                *_separable(in_channels, out_channels, kernel_size, vertical_first=order, bias=bias)
            )
            for order in (True, False)
        )

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self))
        return self.vertical_first(x) + self.horizontal_first(x)


class ConvolutionStack(nn.Sequential):
    """The stack of 3 x 3 convolutions whose window is k x k: what global convolution replaces.

    ``(kernel_size - 1) / 2`` convolutions, padded, without a non-linearity in between.

    Args:
        in_channels: channels of the map.
        out_channels: channels of the result.
        kernel_size: k, an odd number of at least 3.
        mid_channels: channels between the convolutions, m of Table 4; None: ``in_channels``.
        bias: biases of all convolutions.

    Shape: ``(B, in_channels, H, W)`` -> ``(B, out_channels, H, W)``, in the same memory format.

    Raises:
        TypeError: sizes that are no integers.
        ValueError: sizes below 1, a ``kernel_size`` that is even or below 3.

    Source: Peng et al., CVPR 2017, Figure 4 D, Tables 3 and 4, whose counts exclude biases.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        mid_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        mid_channels = in_channels if mid_channels is None else mid_channels
        check_sizes(in_channels=in_channels, out_channels=out_channels, mid_channels=mid_channels)
        check_kernel_size(kernel_size, at_least=3)
        widths = [in_channels, *[mid_channels] * (kernel_size // 2 - 1), out_channels]
        super().__init__(
            *(
                nn.Conv2d(width, following, 3, padding=1, bias=bias)
                for width, following in itertools.pairwise(widths)
            )
        )


class BoundaryRefinement(nn.Module):
    r"""Boundary refinement: a residual that moves the score map's boundaries.

    .. math::
        \tilde S = S + W_2 \operatorname{ReLU}(W_1 S)

    with two 3 x 3 convolutions.

    Args:
        channels: channels of the score map.
        bias: biases of both convolutions. The paper does not say; ``nn.Conv2d``'s default.

    Shape: ``(B, channels, H, W)`` -> the same, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, a map of another shape.

    Source: Peng et al., CVPR 2017, section 3.2 and Figure 2 C.
    """

    def __init__(self, channels: int, bias: bool = True) -> None:
        super().__init__()
        check_sizes(channels=channels)
        self.channels = channels
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.channels, self))
        return x + self.conv2(F.relu(self.conv1(x)))


class GCNBottleneck(nn.Module):
    r"""The bottleneck of ResNet-GCN: global convolution in the place of its first two layers.

    .. math::
        Y = \operatorname{ReLU}(\operatorname{norm}(W_5 (A + B)) + \operatorname{shortcut}(X))

    where A and B are the branches of :class:`GlobalConvolution`, here with norm and ReLU after each
    of the four convolutions. The shortcut is a 1 x 1 convolution with norm where stride or channels
    change, else X.

    Args:
        in_channels: channels of the map.
        channels: channels of the branches; the paper takes 85 in res-4, 128 in res-5.
        out_channels: channels of the result; 1024 and 2048.
        kernel_size: any odd number; 5 and 7.
        stride: 2 in the first block of a stage. Each 1-D convolution has that of its own axis.
        norm_layer: makes a norm from a number of channels.

    Shape: ``(B, in_channels, H, W)`` -> ``(B, out_channels, ceil(H / stride), ceil(W / stride))``,
        in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, an even ``kernel_size``, a map of another shape.

    Source: Peng et al., CVPR 2017, section 4.1.2, Figure 5 B, appendix A (Table 11). The paper does
    not say where the stride stands, and its one cost, 3700 MFLOPs, fits the sum of the branches as
    well as their concatenation: the sum, as in section 3.1, is our reading, and so are the strides.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_sizes(
            in_channels=in_channels, channels=channels, out_channels=out_channels, stride=stride
        )
        check_kernel_size(kernel_size)
        self.in_channels = in_channels

        def branch(vertical_first: bool) -> nn.Sequential:
            first, second = _separable(
                in_channels,
                channels,
                kernel_size,
                vertical_first=vertical_first,
                bias=False,
                stride=stride,
            )
            return nn.Sequential(
                nn.Sequential(first, norm_layer(channels), nn.ReLU(inplace=True)),
                nn.Sequential(second, norm_layer(channels), nn.ReLU(inplace=True)),
            )

        def projection(width: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(width, out_channels, 1, stride=stride, bias=False),
                norm_layer(out_channels),
            )

        self.vertical_first, self.horizontal_first = branch(True), branch(False)
        self.out = projection(channels, 1)
        self.shortcut = (
            projection(in_channels, stride)
            if stride != 1 or in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self))
        y = self.out(self.vertical_first(x) + self.horizontal_first(x))
        return F.relu(y + self.shortcut(x))
