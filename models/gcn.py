# SPDX-License-Identifier: Apache-2.0
"""The global convolutional network (Peng et al., CVPR 2017)."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctxops._checks import check_choice, check_kernel_size
from ctxops.models.base import SegmentationNetwork
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.global_convolution import (
    BoundaryRefinement,
    ConvolutionStack,
    GCNBottleneck,
    GlobalConvolution,
)
from ctxops.nn.resize import resize

_SCORES = ("gcn", "pointwise", "conv", "stack")
# Kernel size and width of ResNet50-GCN's last two stages.
_GLOBAL_STAGES = {"layer3": (5, 85), "layer4": (7, 128)}


class _Doubling(nn.ConvTranspose2d):
    """Doubles a score map; starts as bilinear interpolation of every class for itself."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1, output_padding=1, bias=False)
        taps = torch.tensor([0.5, 1.0, 0.5])
        with torch.no_grad():
            self.weight.zero_()
            self.weight[range(channels), range(channels)] = torch.outer(taps, taps)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """``size``: twice that of x, or one less, where it was rounded up in halving."""
        x = super().forward(x)
        for dim, side in enumerate(size, start=2):
            # A slice would make an exported graph ask which sizes are odd.
            x = x.index_select(dim, torch.arange(side, device=x.device))
        return x


class _Upsampling(nn.Module):
    """As many doublings as a ratio of strides needs, each with a refinement."""

    def __init__(self, ratio: int, channels: int, refine: Callable[[], nn.Module]) -> None:
        super().__init__()
        count = ratio.bit_length() - 1
        self.doublings = nn.ModuleList(_Doubling(channels) for _ in range(count))
        self.refine = nn.ModuleList(refine() for _ in range(count))

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        sizes = [tuple(size)]
        for _ in self.doublings:
            sizes.append(tuple((side - 1) // 2 + 1 for side in sizes[-1]))
        # ResNets halve so; a backbone that rounds otherwise needs this resize.
        x = resize(x, sizes.pop(), align_corners=False)
        for double, refine in zip(self.doublings, self.refine, strict=True):
            x = refine(double(x, sizes.pop()))
        return x


class _ScorePyramid(nn.Module):
    """Scores of every level, the coarser ones doubled and added from the last level down."""

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        score: Callable[[int], nn.Module],
        refine: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.score = nn.ModuleList(score(width) for width in encoder.channels)
        self.refine = nn.ModuleList(refine() for _ in encoder.channels)
        self.refine_sum = nn.ModuleList(refine() for _ in encoder.channels[1:])
        self.upsample = nn.ModuleList(
            _Upsampling(coarse // fine, num_classes, nn.Identity)
            for fine, coarse in itertools.pairwise(encoder.strides)
        )

    def forward(self, *maps: Tensor) -> Tensor:
        levels = zip(maps, self.score, self.refine, strict=True)
        *scores, y = [refine(score(x)) for x, score, refine in levels]
        steps = zip(scores, self.upsample, self.refine_sum, strict=True)
        for x, upsample, refine in reversed(list(steps)):
            y = refine(x + upsample(y, x.shape[2:]))
        return y


class _GlobalConvolutionalNetwork(SegmentationNetwork):
    """Its decoder gives the scores, and deconvolutions take them to the size of the image."""

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        score: Callable[[int], nn.Module],
        refine: Callable[[], nn.Module],
    ) -> None:
        super().__init__(
            encoder,
            _ScorePyramid(encoder, num_classes, score, refine),
            num_classes,
            num_classes,
            levels=range(len(encoder.channels)),
            auxiliary_channels=0,
            classifier=nn.Identity(),
        )
        self.to_image = _Upsampling(encoder.strides[0], num_classes, refine)

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


@register_model("gcn", backbone="resnet152", output_stride=32)
def gcn(
    encoder: Encoder,
    num_classes: int,
    *,
    score: str = "gcn",
    kernel_size: int = 15,
    mid_channels: int | None = None,
    boundary_refinement: bool = True,
    global_backbone: bool = False,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> SegmentationNetwork:
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
    check_choice("score", score, _SCORES)

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
    return _GlobalConvolutionalNetwork(encoder, num_classes, score_layer, refinement)
