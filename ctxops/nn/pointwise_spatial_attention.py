# SPDX-License-Identifier: Apache-2.0
"""Point-wise spatial attention (Zhao et al., PSANet, ECCV 2018)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops import _layout
from ctxops._checks import check_choice, check_kernel_size, check_maps, check_sizes
from ctxops.nn.cbr import cbr
from ctxops.nn.pointwise import PointwiseConv2d
from ctxops.nn.resize import resize, resize_like

PSAVariant = Literal["released", "mmsegmentation"]


class PointwiseSpatialAttention(nn.Module):
    r"""Point-wise spatial attention (PSA): every position predicts weights for all others.

    .. math::
        y_i = \operatorname{CBR}\Big(\operatorname{cat}\Big(
            \sum_j \operatorname{softmax}_j(m_{j-i}(x_i))\, x_j,\;
            \sum_j \operatorname{softmax}_j(n_{i-j}(x'_j))\, x'_j \Big)\Big)

    with two reductions :math:`x, x'` of the map, and of each a mask with one channel for each
    offset between two positions: i says what it collects (m), j what it distributes (n). An offset
    outside the mask has the logit 0.

    Args:
        in_channels: channels of the map, and of the result.
        channels: channels of the reductions.
        mask_size: height and width of the masks, odd, or any with ``variant="mmsegmentation"``:
            an even one reaches one position further forwards than backwards. The whole map of
            h x w is reached by ``(2 h' - 1, 2 w' - 1)``, with h' and w' its sides after shrinking.
        shrink_factor: the attention runs on a map of ``(h - 1) // shrink_factor + 1`` rows, columns
            likewise.
        align_corners: of the bilinear resizes.
        variant: "released", or "mmsegmentation", which sssegmentation has too. There the map of the
            last CBR has a border, one position wide, where it sees zeros. If ``shrink_factor``
            divides one of the sides, both are rounded down and resizes have
            ``align_corners=False``, else True.
        norm_layer: makes a norm from a number of channels.

    Shape: ``(B, in_channels, h, w)`` -> the same, in the same memory format.

    Raises:
        TypeError: sizes that are no integers, a map that is no floating tensor.
        ValueError: sizes below 1, an even mask, a map of another shape.

    Source: Zhao et al., PSANet: Point-wise Spatial Attention Network for Scene Parsing, ECCV 2018,
    section 3, with the layers of the released code. Its network ends with :class:`ConcatContext`.

    Deterministic: as torch's gather.
    Memory: the weights are predicted, so they exist: two of N x N for the N positions left after
        shrinking, besides their logits.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 512,
        mask_size: Sequence[int] = (97, 97),
        *,
        shrink_factor: int = 2,
        align_corners: bool = True,
        variant: PSAVariant = "released",
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, channels=channels, shrink_factor=shrink_factor)
        if not isinstance(mask_size, (list, tuple)) or len(mask_size) != 2:
            raise TypeError(f"mask_size must be a height and a width, got {mask_size!r}")
        check_choice("variant", variant, PSAVariant)
        for axis, size in enumerate(mask_size):
            if variant == "released":
                check_kernel_size(size, name=f"mask_size[{axis}]")
            else:
                check_sizes(**{f"mask_size[{axis}]": size})
        self.in_channels, self.mask_size = in_channels, tuple(mask_size)
        self.shrink_factor, self.align_corners = shrink_factor, align_corners
        self.variant = variant

        def mask() -> nn.Sequential:
            offsets = PointwiseConv2d(channels, mask_size[0] * mask_size[1], bias=False)
            return nn.Sequential(cbr(channels, channels, 1, norm_layer), offsets)

        self.reduce_collect = cbr(in_channels, channels, 1, norm_layer)
        self.reduce_distribute = cbr(in_channels, channels, 1, norm_layer)
        self.collect, self.distribute = mask(), mask()
        self.out = cbr(2 * channels, in_channels, 1, norm_layer)

    def extra_repr(self) -> str:
        return (
            f"mask_size={self.mask_size}, shrink_factor={self.shrink_factor}, "
            f"align_corners={self.align_corners}, variant={self.variant!r}"
        )

    def forward(self, x: Tensor) -> Tensor:
        check_maps(x=(x, self.in_channels, self))
        released, factor, align_corners = self.variant == "released", self.shrink_factor, True
        if released or factor == 1:
            align_corners = self.align_corners
        elif not all(extent % factor for extent in x.shape[2:]):
            align_corners = False
        if released or align_corners:
            size = [(extent - 1) // factor + 1 for extent in x.shape[2:]]
        else:
            size = [extent // factor for extent in x.shape[2:]]
        maps = [
            resize(reduce(x), torch.Size(size), align_corners)
            for reduce in (self.reduce_collect, self.reduce_distribute)
        ]
        index, inside = _offsets(size, self.mask_size, x.device)
        # Of the logits (B, N, N) of two positions the last one has predicted those.
        collected, distributed = (
            mask(y).flatten(2).gather(1, index.expand(y.shape[0], -1, -1)).masked_fill(~inside, 0)
            for mask, y in zip((self.collect, self.distribute), maps, strict=True)
        )
        # (B, N, N) of the position that attends and the one that is attended to.
        weights = [collected.mT.softmax(dim=2), distributed.softmax(dim=2)]
        context = [
            torch.bmm(y.flatten(2), w.mT).unflatten(2, size)
            for y, w in zip(maps, weights, strict=True)
        ]
        joined = torch.cat(context, dim=1).contiguous(memory_format=_layout.memory_format(x))
        if not released:
            joined = F.pad(joined, (1, 1, 1, 1))
        y = self.out(joined)
        return y if released and factor == 1 else resize_like(y, x, align_corners)


def _offsets(
    size: Sequence[int], mask_size: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The mask's channel for each pair of positions (N, N), by their offset; which have one."""
    axes = []
    for extent, window in zip(size, mask_size, strict=True):
        position = torch.arange(extent, device=device)
        axes.append(position[:, None] - position + (window - 1) // 2)
    rows, columns = axes[0][:, None, :, None], axes[1][None, :, None, :]
    height, width = mask_size
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    return index.flatten(2).flatten(0, 1), inside.flatten(2).flatten(0, 1)
