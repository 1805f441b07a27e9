# SPDX-License-Identifier: Apache-2.0
"""OCRNet (Yuan et al., ECCV 2020)."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ctxops._checks import check_sizes
from ctxops.models.base import Decoder, FCNHead, SegmentationNetwork, SegmentationOutput
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.bands import reach
from ctxops.nn.object_context import ObjectContext
from ctxops.nn.resize import resize


class OCRNet(SegmentationNetwork):
    """A first head marks the object regions, whose features the decoder brings to the positions.

    Args:
        decoder: takes the last map and the regions' logits to ``(B, channels, h, w)``.
        regions: head on the last but one of the encoder's maps (on the only one, where there is
            one), to ``(B, num_classes, h, w)``.

    All others as in :class:`SegmentationNetwork`. In training the output's auxiliary logits are
    ``"regions"``.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: nn.Module,
        channels: int,
        num_classes: int,
        *,
        regions: nn.Module,
        dropout: float = 0.1,
        align_corners: bool = True,
    ) -> None:
        super().__init__(
            encoder,
            decoder,
            channels,
            num_classes,
            levels=(max(-2, -len(encoder.channels)), -1),
            auxiliary_channels=0,
            dropout=dropout,
            align_corners=align_corners,
        )
        self.regions = regions

    def reach(self) -> float:
        # The resize of the regions sees the next row of a shifted one.
        return reach(self.regions, self.decoder, self.classifier) + 2

    def predict(self, maps: Sequence[Tensor]) -> SegmentationOutput:
        regions, last = self.regions(maps[-2:][0]), maps[-1]
        at_last = resize(regions, last.shape[2:], self.align_corners)
        output = SegmentationOutput(self.classifier(self.decoder(last, at_last)))
        if self.training:
            output.auxiliary["regions"] = regions
        return output


@register_model("ocrnet", network=OCRNet)
def ocrnet(
    encoder: Encoder,
    num_classes: int,
    *,
    channels: int = 512,
    key_channels: int = 256,
    region_channels: int = 256,
    region_kernel_size: int = 3,
    region_bias: bool = False,
    fuse_kernel_size: int = 1,
    dropout: float = 0.1,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """:class:`ctxops.nn.ObjectContext` on the last map and the logits of a first head: OCRNet.

    Source: Yuan et al., Object-Contextual Representations for Semantic Segmentation, ECCV 2020.

    Args:
        channels: of the pixels' representation and of the decoder's map.
        key_channels: of query, key and value.
        region_channels, region_kernel_size, region_bias: the convolution of the first head. The
            paper's has 512 channels and a bias; on HRNet-W18 it is 1 x 1 with 270 channels.
        fuse_kernel_size: as in :class:`ctxops.nn.ObjectContext`.
        dropout: of both classifiers.
    """
    check_sizes(region_channels=region_channels)
    regions = FCNHead(
        encoder.channels[-2:][0],
        region_channels,
        num_classes,
        kernel_size=region_kernel_size,
        dropout=dropout,
        norm_layer=norm_layer,
        bias=region_bias,
    )
    decoder = ObjectContext(
        encoder.channels[-1],
        channels,
        key_channels,
        fuse_kernel_size=fuse_kernel_size,
        norm_layer=norm_layer,
    )
    return Decoder(decoder, channels, parts={"regions": regions})
