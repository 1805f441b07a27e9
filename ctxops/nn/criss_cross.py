# SPDX-License-Identifier: Apache-2.0
"""Criss-cross attention, once and repeated (Huang et al., CCNet, ICCV 2019)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctxops._checks import check_maps, check_sizes
from ctxops.nn.cbr import cbr
from ctxops.nn.pointwise import PointwiseConv2d
from ctxops.ops.criss_cross_attention import criss_cross_attention


class CrissCrossAttention(nn.Module):
    r"""Attention of every position to its column and its row, added to the map.

    .. math::
        Y = \gamma\, \operatorname{attention}(W_q X + b_q,\, W_k X + b_k,\, W_v X + b_v) + X

    with the attention of :func:`ctxops.criss_cross_attention`, its scale 1.

    Args:
        in_channels: channels of the map.
        reduction: query and key have ``in_channels // reduction`` channels, at least 1.

    The gain :math:`\gamma`, one number, starts at zero: the untrained block is the identity.

    Shape: ``(B, in_channels, H, W)`` -> the same, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, a reduction larger than the channels, a map of another shape.

    Source: Huang et al., CCNet: Criss-Cross Attention for Semantic Segmentation, ICCV 2019,
    section 3.2, as in the released code.
    """

    def __init__(self, in_channels: int, reduction: int = 8) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, reduction=reduction)
        if reduction > in_channels:
            raise ValueError(
                f"reduction must be at most the channels, {in_channels}, got {reduction}"
            )
        self.in_channels, self.reduction = in_channels, reduction
        self.query = PointwiseConv2d(in_channels, in_channels // reduction)
        self.key = PointwiseConv2d(in_channels, in_channels // reduction)
        self.value = PointwiseConv2d(in_channels, in_channels)
        self.gamma = nn.Parameter(torch.zeros(1))

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, reduction={self.reduction}, gamma starts at zero"

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self))
        attended = criss_cross_attention(self.query(x), self.key(x), self.value(x), scale=1.0)
        return self.gamma * attended + x


class RecurrentCrissCrossAttention(nn.Module):
    r"""CCNet's head without its last convolution: the same attention several times.

    .. math::
        H_0 = \operatorname{CBR}(X), \qquad H_r = \operatorname{attention}(H_{r-1}), \qquad
        Y = \operatorname{CBR}(H_R)

    where CBR is a 3 x 3 convolution without bias, a norm and ReLU, and the attention is one
    :class:`CrissCrossAttention`. After two rounds every position has seen the whole map.

    Args:
        in_channels: channels of the map.
        channels: channels inside; None: ``in_channels // 4``.
        out_channels: channels of the result; None: ``channels``.
        recurrence: rounds R.
        reduction: as in :class:`CrissCrossAttention`.
        norm_layer: makes a norm from a number of channels.

    CCNet then reduces ``cat(X, Y)`` by one more 3 x 3 convolution, which belongs to its head.

    Shape: ``(B, in_channels, H, W)`` -> ``(B, out_channels, H, W)``, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, a reduction larger than the channels, a map of another shape.

    Source: Huang et al., ICCV 2019, section 3.3. The released code has a leaky ReLU of slope 0.01
    in the place of ReLU; its parameters are these.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int | None = None,
        out_channels: int | None = None,
        *,
        recurrence: int = 2,
        reduction: int = 8,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, recurrence=recurrence)
        channels = max(1, in_channels // 4) if channels is None else channels
        out_channels = channels if out_channels is None else out_channels
        check_sizes(channels=channels, out_channels=out_channels)
        self.in_channels, self.recurrence = in_channels, recurrence
        self.reduce = cbr(in_channels, channels, 3, norm_layer)
        self.attention = CrissCrossAttention(channels, reduction)
        self.out = cbr(channels, out_channels, 3, norm_layer)

    def extra_repr(self) -> str:
        return f"recurrence={self.recurrence}"

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self))
        x = self.reduce(x)
        for _ in range(self.recurrence):
            x = self.attention(x)
        return self.out(x)
