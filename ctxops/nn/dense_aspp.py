# SPDX-License-Identifier: Apache-2.0
"""Densely connected atrous convolutions (Yang et al., DenseASPP, CVPR 2018)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctxops._checks import check_maps, check_sizes
from ctxops.nn.aspp import check_dilations
from ctxops.nn.bands import reach
from ctxops.nn.pointwise import PointwiseConv2d


class DenseASPP(nn.Module):
    r"""Dilated convolutions, each of the map and of all that came before.

    .. math::
        F_0 = X, \qquad F_l = \operatorname{cat}(g_l(F_{l-1}),\, F_{l-1}), \qquad Y = F_L

    where :math:`g_l` is norm, ReLU, 1 x 1 convolution to ``hidden_channels``, norm, ReLU and a
    3 x 3 convolution to ``channels`` with dilation :math:`d_l`. The first begins without a norm.

    Args:
        in_channels: channels of the map.
        hidden_channels: channels between the two convolutions.
        channels: channels that each dilation adds.
        dilations: :math:`d_l`, any number of them.
        norm_layer: makes a norm from a number of channels.

    The convolutions have biases. The dropout after each is left to the network.

    Shape: ``(B, in_channels, h, w)`` -> ``(B, out_channels, h, w)``, in the same memory format,
        with ``out_channels = in_channels + len(dilations) * channels``.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, no dilation, a map of another shape.

    Source: Yang et al., DenseASPP for Semantic Segmentation in Street Scenes, CVPR 2018, section
    3.2, with the layers and the order of the released code.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int = 512,
        channels: int = 128,
        dilations: Sequence[int] = (3, 6, 12, 18, 24),
        *,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, hidden_channels=hidden_channels, channels=channels)
        self.dilations = check_dilations(dilations)
        self.in_channels = in_channels
        self.blocks = nn.ModuleList()
        width = in_channels
        for i, dilation in enumerate(self.dilations):
            self.blocks.append(
                nn.Sequential(
                    norm_layer(width) if i else nn.Identity(),
                    nn.ReLU(),  # not in place: its input is concatenated too
                    PointwiseConv2d(width, hidden_channels),
                    norm_layer(hidden_channels),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(hidden_channels, channels, 3, padding=dilation, dilation=dilation),
                )
            )
            width += channels
        self.out_channels = width

    def extra_repr(self) -> str:
        return f"dilations={self.dilations}"

    def reach(self) -> float:
        return reach(*self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self))
        for block in self.blocks:
            x = torch.cat([block(x), x], dim=1)
        return x
