# SPDX-License-Identifier: Apache-2.0
"""Atrous spatial pyramid pooling (Chen et al., DeepLabv3, 2017)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctxops._checks import check_kernel_size, check_maps, check_sizes
from ctxops.nn.bands import reach
from ctxops.nn.cbr import cbr
from ctxops.nn.resize import broadcast_like


class ASPP(nn.Module):
    r"""Atrous spatial pyramid pooling: windows of several dilations, and the whole image.

    .. math::
        Y = \operatorname{CBR}\big(\operatorname{cat}(\operatorname{CBR}(\operatorname{mean}(X)),\,
            \operatorname{CBR}_{1 \times 1}(X),\, \operatorname{CBR}_{3 \times 3}^{d}(X)
            \text{ for each dilation } d)\big)

    where CBR is a convolution without bias, a norm and ReLU, and the image's mean goes to every
    position.

    Args:
        in_channels: channels of the map.
        channels: channels of each branch.
        dilations: of the 3 x 3 convolutions, any number of them.
        out_channels: channels of the result; None: ``channels``.
        fuse_kernel_size: of the last convolution: 3, or 1 as in the paper.
        norm_layer: makes a norm from a number of channels.

    The norm of the image's mean sees one position per image: in training it needs two images.

    Shape: ``(B, in_channels, h, w)`` -> ``(B, out_channels, h, w)``, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, no dilation, an even kernel, a map of another shape.

    Source: Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017,
    section 3.3, where ``channels=256``, ``dilations=(6, 12, 18)`` at output stride 16 and
    ``fuse_kernel_size=1``. ``ASPP(2048)`` is Table 3's of Jin et al. (ICCV 2021): 42,211,328
    parameters.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        dilations: Sequence[int] = (12, 24, 36),
        *,
        out_channels: int | None = None,
        fuse_kernel_size: int = 3,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        check_sizes(in_channels=in_channels, channels=channels, out_channels=out_channels)
        self.dilations = check_dilations(dilations)
        check_kernel_size(fuse_kernel_size, name="fuse_kernel_size")
        self.in_channels = in_channels
        self.image = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), cbr(in_channels, channels, 1, norm_layer)
        )
        self.branches = nn.ModuleList(
            [
                cbr(in_channels, channels, 1, norm_layer),
                *(
                    cbr(in_channels, channels, 3, norm_layer, dilation=dilation)
                    for dilation in self.dilations
                ),
            ]
        )
        width = (2 + len(self.dilations)) * channels
        self.fuse = cbr(width, out_channels, fuse_kernel_size, norm_layer)

    def extra_repr(self) -> str:
        return f"dilations={self.dilations}"

    def reach(self) -> float:
        _, of_image = self.image
        return max(map(reach, self.branches)) + reach(of_image, self.fuse)

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self))
        maps = [branch(x) for branch in self.branches]
        image = broadcast_like(self.image(x), maps[0])
        return self.fuse(torch.cat([image, *maps], dim=1))


def check_dilations(dilations: Sequence[int]) -> tuple[int, ...]:
    """The dilations as a tuple; raises unless there is at least one, each at least 1."""
    if not isinstance(dilations, (list, tuple)):
        raise TypeError(f"dilations must be a list or tuple of integers, got {dilations!r}")
    if not dilations:
        raise ValueError("dilations must hold at least one, got none")
    check_sizes(**{f"dilations[{i}]": dilation for i, dilation in enumerate(dilations)})
    return tuple(dilations)
