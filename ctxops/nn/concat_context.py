# SPDX-License-Identifier: Apache-2.0
"""A map beside its context, fused."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctxops._checks import (
    check_concatenated,
    check_kernel_size,
    check_map,
    check_maps,
    check_sizes,
)
from ctxops.nn.bands import reach
from ctxops.nn.cbr import cbr


class ConcatContext(nn.Module):
    r"""The end of many heads: the map and its context, concatenated and reduced.

    .. math::
        Y = \operatorname{CBR}(\operatorname{cat}(X,\, \operatorname{context}(X)))

    where CBR is a convolution without bias, a norm and ReLU. CCNet, DNL, GALD and the non-local
    baseline end so.

    Args:
        context: any module from ``(B, in_channels, h, w)`` to ``(B, context_channels, h, w)``.
        in_channels: channels of the map.
        context_channels: channels of its context.
        channels: channels of the result.
        kernel_size: of the convolution.
        norm_layer: makes a norm from a number of channels.

    Shape: ``(B, in_channels, h, w)`` -> ``(B, channels, h, w)``, in the same memory format.

    Raises:
        TypeError: a context that is no module, sizes that are no integers, a map or a result of
            the context that is no floating tensor.
        ValueError: sizes below 1, an even kernel, a map or a result of another shape.

    Source: the released code of Huang et al., CCNet, ICCV 2019, of which
    ``ConcatContext(RecurrentCrissCrossAttention(2048, 512), 2048, 512, 512)`` is the head: the
    23,924,353 parameters that Jin et al. (ICCV 2021), Table 3, give CCNet.
    """

    def __init__(
        self,
        context: nn.Module,
        in_channels: int,
        context_channels: int,
        channels: int,
        *,
        kernel_size: int = 3,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if not isinstance(context, nn.Module):
            raise TypeError(f"context must be a torch.nn.Module, got {type(context).__name__}")
        check_sizes(in_channels=in_channels, context_channels=context_channels, channels=channels)
        check_kernel_size(kernel_size)
        self.in_channels, self.context_channels = in_channels, context_channels
        self.context = context
        self.fuse = cbr(in_channels + context_channels, channels, kernel_size, norm_layer)

    def reach(self) -> float:
        return reach(self.context, self.fuse)

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self.context))
        context = self.context(x)
        check_map("context(x)", context)
        expected = (x.shape[0], context.shape[1], *x.shape[2:])
        if tuple(context.shape) != expected:
            raise ValueError(f"context(x) must have shape {expected}, got {tuple(context.shape)}")
        maps = {"x": (x, self.in_channels), "context(x)": (context, self.context_channels)}
        check_concatenated(self.fuse, **maps)
        return self.fuse(torch.cat([x, context], dim=1))
