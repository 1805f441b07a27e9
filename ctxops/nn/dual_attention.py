# SPDX-License-Identifier: Apache-2.0
"""Attention between positions and between channels (Fu et al., DANet, CVPR 2019)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctxops import _autocast, _layout, _operator
from ctxops._checks import check_maps, check_sizes
from ctxops.nn.bands import total
from ctxops.nn.cbr import cbr
from ctxops.nn.pointwise import PointwiseConv2d
from ctxops.ops.nonlocal_attention import nonlocal_attention


class PositionAttention(nn.Module):
    r"""Attention of every position to every other, added to the map (PAM).

    .. math::
        Y = \gamma\, \operatorname{attention}(W_q X,\, W_k X,\, W_v X) + X

    with the attention of :func:`ctxops.nonlocal_attention`, its scale 1: never N x N.

    Args:
        channels: channels of the map.
        reduction: query and key have ``channels // reduction`` channels, at least 1.
        bias: biases in the three projections. The released code has them; the counts of Jin et al.
            (ICCV 2021) have none.

    The gain :math:`\gamma`, one number, starts at zero: the untrained block is the identity.

    Shape: ``(B, channels, h, w)`` -> the same, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, a reduction larger than the channels, a map of another shape.

    Source: Fu et al., Dual Attention Network for Scene Segmentation, CVPR 2019, eq. 1-2.
    """

    def __init__(self, channels: int, reduction: int = 8, *, bias: bool = False) -> None:
        super().__init__()
        check_sizes(channels=channels, reduction=reduction)
        if reduction > channels:
            raise ValueError(f"reduction must be at most the channels, {channels}, got {reduction}")
        self.channels, self.reduction = channels, reduction
        self.query = PointwiseConv2d(channels, channels // reduction, bias=bias)
        self.key = PointwiseConv2d(channels, channels // reduction, bias=bias)
        self.value = PointwiseConv2d(channels, channels, bias=bias)
        self.gamma = nn.Parameter(torch.zeros(1))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, reduction={self.reduction}, gamma starts at zero"

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.channels, self))
        attended = nonlocal_attention(self.query(x), self.key(x), self.value(x), scale=1.0)
        return self.gamma * attended + x


class ChannelAttention(nn.Module):
    r"""Attention of every channel to every other, added to the map (CAM).

    .. math::
        Y_c = \gamma \sum_d \operatorname{softmax}_d\big(\max_e \langle X_c, X_e \rangle
            - \langle X_c, X_d \rangle\big)\, X_d + X_c

    over the positions of the map: a channel attends to those that it resembles least. The sums of
    the C x C products, one for each position, leave the range of half precision; they are float32.

    Args:
        channels: channels of the map. Nothing is made of them: other numbers are taken too.

    The gain :math:`\gamma`, one number, starts at zero: the untrained block is the identity.

    Shape: ``(B, C, h, w)`` -> the same, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, a map that is not (B, C, h, w).

    Source: Fu et al., CVPR 2019, eq. 3-4, with the maximum of the released code: eq. 3 has the
    softmax of the products themselves.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_sizes(channels=channels)
        self.channels = channels
        self.gamma = nn.Parameter(torch.zeros(1))

    def extra_repr(self) -> str:
        return f"channels={self.channels}, gamma starts at zero"

    def reach(self) -> float:
        return 0

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.channels, self))
        return self.gamma * channel_attention(x) + x


def channel_attention(x: Tensor) -> Tensor:
    """Each channel of a map as the mean of those that it resembles least, in its memory format."""
    with _autocast.disabled(x.device.type):
        # The maximum of each row cancels in the softmax.
        weights = total(_products, x).neg().softmax(dim=2)
        attended = (weights.to(x.dtype) @ x.flatten(2)).unflatten(2, x.shape[2:])
    return attended.contiguous(memory_format=_layout.memory_format(x))


def _products(x: Tensor) -> Tensor:
    """Of each two channels, ``(B, C, C)``."""
    rows = x.flatten(2).to(_operator.accumulator(x.dtype))
    return rows @ rows.mT


class DualAttention(nn.Module):
    r"""DANet's head without its classifiers: both attentions on a reduced map, added.

    .. math::
        Y = \operatorname{CBR}(\operatorname{position}(\operatorname{CBR}(X)))
          + \operatorname{CBR}(\operatorname{channel}(\operatorname{CBR}(X)))

    where every CBR is a 3 x 3 convolution without bias of its own, a norm and ReLU. DANet trains a
    classifier on either summand besides the one on the sum: :meth:`branches` returns them::

        position, channel = head.branches(x)
        y = position + channel

    Args:
        in_channels: channels of the map.
        channels: channels inside and of the result.
        reduction: as in :class:`PositionAttention`.
        bias: biases in the projections of :class:`PositionAttention`.
        norm_layer: makes a norm from a number of channels.

    Shape: ``(B, in_channels, h, w)`` -> ``(B, channels, h, w)``, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, a reduction larger than the channels, a map of another shape.

    Source: Fu et al., CVPR 2019, section 3. ``DualAttention(2048)`` is Table 3's DANet of Jin et
    al. (ICCV 2021): 23,924,738 parameters.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        *,
        reduction: int = 8,
        bias: bool = False,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, channels=channels)
        self.in_channels = in_channels

        def branch(attention: nn.Module) -> nn.Sequential:
            return nn.Sequential(
                cbr(in_channels, channels, 3, norm_layer),
                attention,
                cbr(channels, channels, 3, norm_layer),
            )

        self.position = branch(PositionAttention(channels, reduction, bias=bias))
        self.channel = branch(ChannelAttention(channels))

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The context between positions and that between channels, each (B, channels, h, w)."""
        return self(x, return_branches=True)[1:]

    def forward(
        self, x: Tensor, return_branches: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The sum of both contexts; with ``return_branches`` also each of them."""
        check_maps(x=(x, self.in_channels, self))
        position, channel = self.position(x), self.channel(x)
        y = position + channel
        return (y, position, channel) if return_branches else y
