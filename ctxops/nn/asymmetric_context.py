# SPDX-License-Identifier: Apache-2.0
"""The head of ANN: fusion of levels, then self-attention (Zhu et al., ICCV 2019)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ctxops._checks import check_maps, check_module, check_sizes
from ctxops.nn.bands import reach
from ctxops.nn.cbr import cbr
from ctxops.nn.non_local import AFNB, APNB, Fuse, Sampling, Variant
from ctxops.nn.resize import resize


class CommonFusion(nn.Module):
    r"""What ANN calls common fusion: the low-level map, reduced and resized, added to the other.

    .. math::
        Y = \text{high} + \operatorname{resize}(\operatorname{CBR}_{1 \times 1}(\text{low}))

    where CBR is a convolution, a norm and ReLU.

    Args:
        low_channels: channels of the low-level map.
        high_channels: channels of the high-level map and of the result.
        bias: a bias in the convolution.
        align_corners: of the bilinear resize to the size of ``high``.
        norm_layer: makes a norm from a number of channels.

    Shape: low ``(B, low_channels, H2, W2)``, high ``(B, high_channels, H, W)``
        -> ``(B, high_channels, H, W)``, in the memory format of ``high``.

    Raises:
        TypeError: sizes that are no integers, maps that are no floating tensors.
        ValueError: sizes below 1, maps of another shape.

    Source: Zhu et al., Asymmetric Non-local Neural Networks for Semantic Segmentation, ICCV 2019,
    Table 6, "Common fusion".
    """

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        *,
        bias: bool = True,
        align_corners: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        check_sizes(low_channels=low_channels, high_channels=high_channels)
        self.low_channels, self.high_channels = low_channels, high_channels
        self.align_corners = align_corners
        self.convolution = cbr(low_channels, high_channels, 1, norm_layer, bias=bias)

    def reach(self) -> float:
        return reach(self.convolution) + 2  # a resize sees the next row of a shifted one

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        check_maps(low=(low, self.low_channels, self), high=(high, None))
        low = self.convolution(low)
        check_maps(high=(high, low.shape[1]))
        return high + resize(low, high.shape[2:], self.align_corners)


class SummedFusions(nn.ModuleList):
    r"""Several levels fused with the last one, each by a fusion of its own, and added.

    .. math::
        Y = \sum_l \operatorname{fusion}_l(\text{low}_l,\, \text{high})

    Args:
        fusions: a module of two maps for each low level, such as :class:`AFNB`.

    Shape: a map of each low level, then the high-level map, each as its fusion takes it
        -> what the fusions give.

    Raises:
        ValueError: another number of maps.

    Source: Zhu et al., ICCV 2019, Table 9.
    """

    def __init__(self, fusions: Iterable[nn.Module]) -> None:
        super().__init__(fusions)

    def reach(self) -> float:
        return max(map(reach, self))

    def forward(self, *maps: Tensor) -> Tensor:
        if len(maps) != len(self) + 1:
            raise ValueError(f"maps must be {len(self)} and the last level's, got {len(maps)}")
        *lows, high = maps
        return sum(fusion(low, high) for fusion, low in zip(self, lows, strict=True))


class FusedContext(nn.Module):
    r"""A head in three steps, of any parts: fusion of levels, reduction, context.

    .. math::
        Y = \operatorname{context}(\operatorname{reduce}(\operatorname{dropout}(
            \operatorname{fusion}(X_1, \ldots, X_L))))

    Args:
        fusion: from the levels' maps to one.
        reduce: from the fused map to the one that gets its context.
        context: from that map to the result. Any part may be None: its step is left out.
        dropout: of whole channels of the fused map.

    Shape: the maps that ``fusion`` takes, one argument each -> what ``context`` gives.

    Raises:
        TypeError: parts that are no modules.

    Source: Zhu et al., ICCV 2019, section 3.4, Table 6, with the released code's dropout.
    """

    def __init__(
        self,
        fusion: nn.Module | None,
        reduce: nn.Module | None,
        context: nn.Module | None,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, part in (("fusion", fusion), ("reduce", reduce), ("context", context)):
            check_module(name, part, (nn.Module,))
        self.fusion = nn.Identity() if fusion is None else fusion
        self.reduce = nn.Identity() if reduce is None else reduce
        self.context = nn.Identity() if context is None else context
        self.dropout = nn.Dropout2d(dropout)

    def reach(self) -> float:
        return reach(self.fusion, self.dropout, self.reduce, self.context)

    def forward(self, *maps: Tensor) -> Tensor:
        return self.context(self.reduce(self.dropout(self.fusion(*maps))))


class AsymmetricNonLocalContext(FusedContext):
    r"""ANN's head without its classifier.

    .. math::
        Y = \operatorname{APNB}(\operatorname{CBR}_{3 \times 3}(
            \operatorname{AFNB}(\text{low},\, \text{high})))

    where CBR is a convolution, a norm and ReLU.

    Args:
        low_channels: channels of the low-level map: ``layer3`` of a ResNet.
        high_channels: channels of the high-level map: ``layer4``.
        channels: channels between the blocks and of the result.
        key_channels: channels of query and key in both blocks.
        value_channels: channels of the value in both blocks.
        output_sizes: the grids of both blocks' pyramids.
        fuse: as in :class:`APNB`, for both blocks.
        bias: biases in all convolutions. True: the released code. False: the counts of Jin et al.
            (ICCV 2021).
        variant: as in :class:`APNB`, for both blocks.
        sampling: as in :class:`APNB`, for both blocks.
        fold: as in :class:`APNB`, for both blocks.
        norm_layer: makes a norm from a number of channels.

    The dropout that follows the convolution and the fusion in the released code is left to the
    network.

    Shape: low ``(B, low_channels, H2, W2)``, high ``(B, high_channels, H, W)``
        -> ``(B, channels, H, W)``, in the memory format of ``high``.

    Raises:
        TypeError: sizes that are no integers, maps that are no floating tensors.
        ValueError: sizes below 1, an unknown option, maps of another shape.

    Source: Zhu et al., Asymmetric Non-local Neural Networks for Semantic Segmentation, ICCV 2019,
    section 3.4. ``AsymmetricNonLocalContext(1024, 2048, bias=False)`` is Table 3's ANN of Jin et
    al. (ICCV 2021): 20,323,840 parameters.
    """

    def __init__(
        self,
        low_channels: int,
        high_channels: int,
        channels: int = 512,
        *,
        key_channels: int = 256,
        value_channels: int = 256,
        output_sizes: Sequence[int] = (1, 3, 6, 8),
        fuse: Fuse = "concat",
        bias: bool = True,
        variant: Variant = "released",
        sampling: Sampling = "avg",
        fold: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        check_sizes(low_channels=low_channels, high_channels=high_channels, channels=channels)
        options: dict[str, Any] = {
            "output_sizes": output_sizes,
            "fuse": fuse,
            "bias": bias,
            "variant": variant,
            "sampling": sampling,
            "fold": fold,
            "norm_layer": norm_layer,
        }
        super().__init__(
            AFNB(low_channels, high_channels, key_channels, value_channels, **options),
            cbr(high_channels, channels, 3, norm_layer, bias=bias),
            APNB(channels, key_channels, value_channels, **options),
        )

    reach = FusedContext.reach

    def forward(self, low: Tensor, high: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(low, high)
