# SPDX-License-Identifier: Apache-2.0
"""The head of ANN: fusion of two levels, then self-attention (Zhu et al., ICCV 2019)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ctxops._checks import check_sizes
from ctxops.nn.cbr import cbr
from ctxops.nn.non_local import AFNB, APNB, Fuse, Sampling, Variant


class AsymmetricNonLocalContext(nn.Module):
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
        super().__init__()
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
        self.fusion = AFNB(low_channels, high_channels, key_channels, value_channels, **options)
        self.reduce = cbr(high_channels, channels, 3, norm_layer, bias=bias)
        self.context = APNB(channels, key_channels, value_channels, **options)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.context(self.reduce(self.fusion(low, high)))
