# SPDX-License-Identifier: Apache-2.0
"""DANet (Fu et al., CVPR 2019)."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ctxops.models.base import Classifier, Decoder, SegmentationNetwork, SegmentationOutput
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.dual_attention import DualAttention


class DANet(SegmentationNetwork):
    """Both attentions' maps have classifiers of their own, for training.

    Args:
        decoder: a :class:`ctxops.nn.DualAttention`.

    All others as in :class:`SegmentationNetwork`. In training the output's auxiliary logits hold
    ``"position"`` and ``"channel"`` too.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: DualAttention,
        channels: int,
        num_classes: int,
        *,
        dropout: float = 0.1,
        **options,
    ) -> None:
        super().__init__(encoder, decoder, channels, num_classes, dropout=dropout, **options)
        self.position_classifier = Classifier(channels, num_classes, dropout)
        self.channel_classifier = Classifier(channels, num_classes, dropout)

    def predict(self, maps: Sequence[Tensor]) -> SegmentationOutput:
        if not self.training:
            return SegmentationOutput(self.classifier(self.decoder(maps[-1])))
        y, position, channel = self.decoder(maps[-1], return_branches=True)
        output = SegmentationOutput(self.classifier(y))
        output.auxiliary["position"] = self.position_classifier(position)
        output.auxiliary["channel"] = self.channel_classifier(channel)
        return output


@register_model("danet", network=DANet, auxiliary_channels=256)
def danet(
    encoder: Encoder,
    *,
    channels: int = 512,
    reduction: int = 8,
    attention_bias: bool = True,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """:class:`ctxops.nn.DualAttention` on the last map: DANet.

    Source: Fu et al., Dual Attention Network for Scene Segmentation, CVPR 2019, as released: the
    logits of either attention are trained besides those of their sum.

    Args:
        channels: of the attentions and of the decoder's map.
        reduction: query and key of the position attention have ``channels // reduction`` channels.
        attention_bias: biases in the projections of the position attention.
    """
    decoder = DualAttention(
        encoder.channels[-1],
        channels,
        reduction=reduction,
        bias=attention_bias,
        norm_layer=norm_layer,
    )
    return Decoder(decoder, channels)
