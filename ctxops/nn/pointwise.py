# SPDX-License-Identifier: Apache-2.0
"""The 1 x 1 convolution, in the product that suits the map."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops import _library


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y[b, o, h, w] = sum_i weight[o, i] x[b, i, h, w] + bias[o]``.

    Args:
        x: map ``(B, I, H, W)``, or anchors ``(B, I, S, 1)``.
        weight: ``(O, I, 1, 1)``.
        bias: ``(O,)`` or None.
    """
    x, weight, bias = _library.autocast(x, weight, bias)
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
    """``nn.Conv2d`` with a 1 x 1 kernel: the same parameters, the same result."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


class PointwiseConcatConv2d(PointwiseConv2d):
    """The 1 x 1 convolution of ``cat(context, x)``, by the two parts of its weight.

    The concatenation is never made, and the context's part may be applied earlier, by
    :meth:`project`, where the context is still a combination of a few anchors.
    """

    def __init__(
        self, context_channels: int, map_channels: int, out_channels: int, bias: bool = True
    ) -> None:
        super().__init__(context_channels + map_channels, out_channels, bias)
        self.context_channels = context_channels

    def project(self, context: Tensor) -> Tensor:
        return pointwise(context, self.weight[:, : self.context_channels])

    def forward(self, context: Tensor, x: Tensor, projected: bool = False) -> Tensor:
        context = context if projected else self.project(context)
        return pointwise(x, self.weight[:, self.context_channels :], self.bias).add_(context)


def is_untouched(module: nn.Module) -> bool:
    """Is this a 1 x 1 convolution of ours, without hooks that make or watch its weight?

    Only then may a part of its work be done elsewhere: pruning and spectral norm recompute the
    weight in hooks, adapters replace the module.
    """
    return isinstance(module, PointwiseConv2d) and not (
        module._forward_pre_hooks or module._forward_hooks
    )
