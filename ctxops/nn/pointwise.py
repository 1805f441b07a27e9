# SPDX-License-Identifier: Apache-2.0
"""The 1 x 1 convolution, in the product that suits the map."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops import _autocast
from ctxops._torch import is_transformed
from ctxops.nn.plain import is_plain


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y[b, o, h, w] = sum_i weight[o, i] x[b, i, h, w] + bias[o]``.

    Args:
        x: map ``(B, I, H, W)``, or anchors ``(B, I, S, 1)``.
        weight: ``(O, I, 1, 1)``.
        bias: ``(O,)`` or None.
    """
    x, weight, bias = _autocast.cast(x, weight, bias)
    # oneDNN reorders a contiguous map twice: 193 ms for 2048 -> 256 channels at 96 x 96 where a
    # matrix product takes 39. That wants the weight once per image, which a few anchors do not
    # repay; but compiled by torch 2.8, their convolution fixes the size of the map.
    few = not torch.compiler.is_compiling() and x.shape[3] == 1
    if x.device.type != "cpu" or few or not x.is_contiguous():
        return F.conv2d(x, weight, bias)
    batch, positions = x.shape[0], x.flatten(2)
    weights = weight.flatten(1).expand(batch, -1, -1)
    if bias is None:
        y = torch.bmm(weights, positions)
    else:
        y = torch.baddbmm(bias[None, :, None].expand(batch, -1, 1), weights, positions)
    return y.unflatten(2, x.shape[2:])


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose kernel is 1 x 1 by default; then it takes the product that suits the map.

    Arguments, parameters and results are those of ``nn.Conv2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        *args: Any,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **options)

    def forward(self, x: Tensor) -> Tensor:
        if is_pointwise(self) and x.dim() == 4:
            return pointwise(x, self.weight, self.bias)
        return super().forward(x)


def is_pointwise(convolution: nn.Conv2d) -> bool:
    """Is it the 1 x 1 convolution after all? Adapters make others of the same class, or replace
    the step in which ``nn.Conv2d`` convolves.
    """
    return (
        convolution.kernel_size == (1, 1)
        and convolution.stride == (1, 1)
        and convolution.padding == (0, 0)
        and convolution.groups == 1
        and "_conv_forward" not in convolution.__dict__
    )


def is_readable(convolution: nn.Module, like: Tensor | None = None) -> TypeGuard[nn.Conv2d]:
    """May the weights of this 1 x 1 convolution be read? See :func:`ctxops.nn.plain.is_plain`."""
    return is_plain(convolution, PointwiseConv2d, nn.Conv2d, like=like) and is_pointwise(
        convolution
    )


def convolve_concatenation(convolution: nn.Module, *maps: Tensor) -> Tensor:
    """``convolution(cat(maps))``; the concatenation of maps for a plain 1 x 1 convolution is never
    made: each map meets its part of the weight.
    """
    if len(maps) == 1:
        return convolution(*maps)
    if not is_readable(convolution, like=maps[0]):
        return convolution(torch.cat(maps, dim=1))
    *parts, last = split_weight(convolution, maps)
    y = pointwise(maps[-1], last, convolution.bias)
    for x, weight in zip(maps[:-1], parts, strict=True):
        y = accumulate(y, pointwise(x, weight))
    return y


def split_weight(convolution: nn.Conv2d, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parts of the weight for maps that stand one behind the other, each ``(O, C_i, 1, 1)``."""
    return convolution.weight.split([x.shape[1] for x in maps], dim=1)


def accumulate(y: Tensor, x: Tensor) -> Tensor:
    """``y + x``, into ``y`` where nobody else needs it and torch.func's transforms allow it."""
    return y + x if is_transformed() else y.add_(x)
