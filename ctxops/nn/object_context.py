# SPDX-License-Identifier: Apache-2.0
"""Object-contextual representations (Yuan et al., OCRNet, ECCV 2020)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ctxops import _autocast
from ctxops._checks import check_kernel_size, check_maps, check_same_dtype, check_sizes
from ctxops.nn.bands import reach, softmax_over_positions, total
from ctxops.nn.cbr import cbr
from ctxops.ops.asymmetric_attention import asymmetric_attention


class ObjectContext(nn.Module):
    r"""Object-contextual representations: every position attends to the classes' mean features.

    .. math::
        f_k = \sum_i \operatorname{softmax}_i(\text{scale} \cdot l_{k,i})\, R_i, \qquad
        C = g_o\big(\operatorname{attention}(g_q(R),\, g_k(f),\, g_v(f))\big), \qquad
        Y = \operatorname{CBR}(\operatorname{cat}(C,\, R))

    with :math:`R = \operatorname{CBR}(X)` and one region :math:`f_k` for each class k of the
    logits l, the mean of the pixels by how much each seems to belong to it. The attention is
    :func:`ctxops.asymmetric_attention`, its scale ``key_channels ** -0.5`` and its anchors the
    regions. :math:`g_q` and :math:`g_k` are two CBR each, :math:`g_v` and :math:`g_o` one: 1 x 1
    convolutions without bias, a norm and ReLU.

    Args:
        in_channels: channels of X.
        channels: channels of R and of the result.
        key_channels: channels of query, key and value.
        kernel_size: of the convolution in R.
        fuse_kernel_size: of the convolution behind the concatenation: 1 as in the paper, or 3.
        scale: of the logits.
        norm_layer: makes a norm from a number of channels.

    The head that makes the logits stays outside; OCRNet trains it by a loss of its own.

    Shape: X ``(B, in_channels, h, w)``, logits ``(B, K, h, w)`` for any K
        -> ``(B, channels, h, w)``, in the memory format of X.

    Raises:
        TypeError: sizes that are no integers, a scale that is no number, maps that are no floating
            tensors or, outside autocast, differ in dtype.
        ValueError: sizes below 1, an even kernel, maps of another shape.

    Source: Yuan et al., Object-Contextual Representations for Semantic Segmentation, ECCV 2020,
    section 3, with the layers of the released code.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        key_channels: int = 256,
        *,
        kernel_size: int = 3,
        fuse_kernel_size: int = 1,
        scale: float = 1.0,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, channels=channels, key_channels=key_channels)
        check_kernel_size(kernel_size)
        check_kernel_size(fuse_kernel_size, name="fuse_kernel_size")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale must be a number, got {scale!r}")
        self.in_channels, self.key_channels, self.scale = in_channels, key_channels, scale

        def projection(layers: int) -> nn.Sequential:
            stack = cbr(channels, key_channels, 1, norm_layer)
            for _ in range(layers - 1):
                stack.extend(cbr(key_channels, key_channels, 1, norm_layer))
            return stack

        self.reduce = cbr(in_channels, channels, kernel_size, norm_layer)
        self.query, self.key, self.value = projection(2), projection(2), projection(1)
        self.out = cbr(key_channels, channels, 1, norm_layer)
        self.fuse = cbr(2 * channels, channels, fuse_kernel_size, norm_layer)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, scale={self.scale}"

    def reach(self) -> float:
        return reach(*self.children())

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        self._check(x, logits)
        weights = softmax_over_positions(self.scale * logits)
        pixels = self.reduce(x)
        # Autocast casts all but float64, which the logits may be.
        regions = total(_weighted_sums, pixels, weights.to(pixels.dtype)).unsqueeze(3)
        key, value = self.key(regions).squeeze(3), self.value(regions).squeeze(3)
        scale = self.key_channels**-0.5  # also of query and key that a tool has pruned
        context = self.out(asymmetric_attention(self.query(pixels), key, value, scale=scale))
        return self.fuse(torch.cat([context, pixels], dim=1))

    def _check(self, x: Tensor, logits: Tensor) -> None:
        check_maps(x=(x, self.in_channels, self), logits=(logits, None))
        if logits.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"logits must have the height and width of x, {tuple(x.shape[2:])}, "
                f"got {tuple(logits.shape[2:])}"
            )
        if not _autocast.is_active(x.device.type):
            check_same_dtype(x=x, logits=logits)


def _weighted_sums(x: Tensor, weights: Tensor) -> Tensor:
    """Over all positions, ``(B, C, K)``, by weights ``(B, K, h, w)``."""
    return torch.bmm(x.flatten(2), weights.flatten(2).mT)
