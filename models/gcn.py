# SPDX-License-Identifier: Apache-2.0
"""The global convolutional network (Peng et al., CVPR 2017)."""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from ctxops._checks import check_choice, check_kernel_size
from ctxops.models.base import Decoder, SegmentationNetwork
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.global_convolution import (
    BoundaryRefinement,
    ConvolutionStack,
    GCNBottleneck,
    GlobalConvolution,
)
from ctxops.nn.score_pyramid import ProgressiveUpsampling, ScorePyramid

Score = Literal["gcn", "pointwise", "conv", "stack"]
# Kernel size and width of ResNet50-GCN's last two stages.
_GLOBAL_STAGES = {"layer3": (5, 85), "layer4": (7, 128)}


class GlobalConvolutionalNetwork(SegmentationNetwork):
    """Its decoder gives the scores, and deconvolutions take them to the size of the image.

    Args:
        decoder: takes the maps of ``levels`` to scores ``(B, num_classes, h, w)``.
        to_image: from the scores and the size of the image to the logits.

    All others as in :class:`SegmentationNetwork`.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: nn.Module,
        channels: int,
        num_classes: int,
        *,
        levels: Sequence[int],
        to_image: nn.Module,
    ) -> None:
        super().__init__(
            encoder,
            decoder,
            channels,
            num_classes,
            levels=levels,
            auxiliary_channels=0,
            classifier=nn.Identity(),
        )
        self.to_image = to_image

    def _resize(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        return self.to_image(logits, size)


def _set_global_stages(encoder: Encoder, norm_layer: Callable[[int], nn.Module]) -> None:
    """Makes the last two stages of a ResNet those of ResNet50-GCN, untrained."""
    for level, (name, (kernel_size, width)) in zip((-2, -1), _GLOBAL_STAGES.items(), strict=True):
        blocks = len(encoder.part(name, "global_backbone"))
        before, channels = encoder.channels[level - 1], encoder.channels[level]
        stride = encoder.strides[level] // encoder.strides[level - 1]
        first = GCNBottleneck(before, width, channels, kernel_size, stride, norm_layer=norm_layer)
        encoder.body[name] = nn.Sequential(
            first,
            *(
                GCNBottleneck(channels, width, channels, kernel_size, norm_layer=norm_layer)
                for _ in range(blocks - 1)
            ),
        )


@register_model("gcn", backbone="resnet152", output_stride=32, network=GlobalConvolutionalNetwork)
def gcn(
    encoder: Encoder,
    num_classes: int,
    *,
    score: Score = "gcn",
    kernel_size: int = 15,
    mid_channels: int | None = None,
    boundary_refinement: bool = True,
    global_backbone: bool = False,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """Global convolutional network: a score map of each level, added from the coarsest on.

    Every map of the backbone gets a score layer to K channels. From the last level down the sum so
    far is doubled by a deconvolution of K channels and added to the next scores, and twice more up
    to the size of the image. Each score map, each sum and each of the last two is refined.

    Args:
        score: the layer from a map to its scores. "gcn": :class:`ctxops.nn.GlobalConvolution`.
            What it is compared with: "pointwise", a 1 x 1 convolution (Table 1's baseline); "conv",
            one k x k convolution (Table 2); "stack", :class:`ctxops.nn.ConvolutionStack` (Tables 3
            and 4).
        kernel_size: k of all levels, odd. 15 covers the last map of a 512 x 512 image, 25 of an
            800 x 800 one, the paper's for Cityscapes.
        mid_channels: m of Table 4, for "stack" alone; None: the channels of each map.
        boundary_refinement: :class:`ctxops.nn.BoundaryRefinement`; False: none.
        global_backbone: :class:`ctxops.nn.GCNBottleneck` in the last two stages of a ResNet: with
            ``backbone="resnet50"`` the paper's ResNet50-GCN (Table 11). Weights of the backbone
            that ``pretrained`` loads reach the stages before them.

    There is no auxiliary head and no dropout. The deconvolutions are 3 x 3 without bias and start
    as bilinear interpolation, our reading. Source: Peng et al., Large Kernel Matters, CVPR
    2017, Figure 2, sections 3.2 and 4.1.
    """
    check_choice("score", score, Score)

    def score_layer(channels: int) -> nn.Module:
        if score == "gcn":
            return GlobalConvolution(channels, num_classes, kernel_size)
        if score == "pointwise":
            return nn.Conv2d(channels, num_classes, 1)
        if score == "conv":
            padding = kernel_size // 2
            return nn.Conv2d(channels, num_classes, kernel_size, padding=padding, bias=False)
        return ConvolutionStack(channels, num_classes, kernel_size, mid_channels)

    def refinement() -> nn.Module:
        return BoundaryRefinement(num_classes) if boundary_refinement else nn.Identity()

    check_kernel_size(kernel_size)
    if global_backbone:
        _set_global_stages(encoder, norm_layer)
    decoder = ScorePyramid(encoder.channels, encoder.strides, num_classes, score_layer, refinement)
    return Decoder(
        decoder,
        num_classes,
        levels=range(len(encoder.channels)),
        parts={"to_image": ProgressiveUpsampling(encoder.strides[0], num_classes, refinement)},
    )
