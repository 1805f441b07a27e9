# SPDX-License-Identifier: Apache-2.0
"""Context from beyond the image (Jin et al., MCIBI, ICCV 2021)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from ctxops._checks import check_choice
from ctxops.models.base import Decoder, FCNHead, SegmentationNetwork, SegmentationOutput
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.aspp import ASPP
from ctxops.nn.dataset_context import DatasetContextAggregation, MemoryFusion, ProjectionLayers
from ctxops.nn.feature_memory import FeatureMemory
from ctxops.nn.object_context import ObjectContext
from ctxops.nn.pyramid_pooling import PyramidPooling
from ctxops.nn.uper_decoder import FeaturePyramid

Context = Literal[None, "ppm", "aspp", "ocr", "uper"]
# 130 epochs of ADE20K in batches of 16, the paper's setting.
_TOTAL_STEPS = 164_190


class MemoryNetwork(SegmentationNetwork):
    """A first head weighs the memory's rows at each position; the decoder adds what they say.

    Args:
        decoder: a :class:`ctxops.nn.DatasetContextAggregation` of the last map.
        within: from the last map to its context within the image; an
            :class:`ctxops.nn.ObjectContext` takes the first head's logits too; None: there is none.
        first_classifier: the first head, H_1, from R to ``(B, num_classes, h, w)``.
        bank: the memory.
        pyramid: from the finer maps and the decoder's to the map that is classified; None: that is
            the decoder's.

    All others as in :class:`SegmentationNetwork`; ``classifier`` is H_2.

    In training the output's auxiliary logits hold ``"first"``, those of H_1, and its features are
    R ``(B, channels, h, w)``, detached. The training loop feeds the memory with it and makes the
    loss of the memory's rows; labels never enter the network::

        output = network(image)
        loss = ...  # of output.logits and output.auxiliary
        bank = network.bank
        loss = loss + representation_consistency_loss(
            network.classifier, bank.memory, bank.initialized
        )
        loss.backward()
        bank(output.features, labels)
    """

    decoder: DatasetContextAggregation
    bank: FeatureMemory

    def __init__(
        self,
        encoder: Encoder,
        decoder: DatasetContextAggregation,
        channels: int,
        num_classes: int,
        *,
        within: nn.Module | None,
        first_classifier: nn.Module,
        bank: FeatureMemory,
        pyramid: FeaturePyramid | None = None,
        **options,
    ) -> None:
        super().__init__(encoder, decoder, channels, num_classes, **options)
        self.within, self.first_classifier, self.bank = within, first_classifier, bank
        self.pyramid = pyramid

    def predict(self, maps: Sequence[Tensor]) -> SegmentationOutput:
        x = maps[-1]
        r = self.decoder.reduce(x)
        first = self.first_classifier(r)
        if self.within is None:
            within = None
        elif isinstance(self.within, ObjectContext):
            within = self.within(x, first)
        else:
            within = self.within(x)
        y = self.decoder(r, first, self.bank.memory, within)
        if self.pyramid is not None:
            y = self.pyramid(*maps[:-1], y)
        output = SegmentationOutput(self.classifier(y))
        if self.training:
            output.auxiliary["first"], output.features = first, r.detach()
        return output


@register_model("mcibi", network=MemoryNetwork)
def mcibi(
    encoder: Encoder,
    num_classes: int,
    *,
    context: Context = "aspp",
    channels: int = 512,
    fusion: MemoryFusion = "concat",
    within_attention: bool = True,
    projection_layers: ProjectionLayers = 2,
    kernel_size: int | None = None,
    hard: bool = False,
    memory_options: Mapping[str, Any] | None = None,
    dropout: float = 0.1,
    align_corners: bool = False,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """A network's context within the image, joined by what all images say of the classes seen.

    Args:
        context: within the image, of the last map: None (FCN + MCIBI), "ppm" (PSPNet),
            "aspp" (DeepLabv3), "ocr" (OCRNet; its regions are those of H_1's logits, our reading),
            "uper" (UPerNet, not in the paper: the pooling of "ppm", with the feature pyramid
            on top of what the memory adds; take an encoder of stride 32).
        channels: of R, of the memory, of all maps of context.
        fusion: "concat", "add" or "weighted_add", Table 1; as the following in
            :class:`ctxops.nn.DatasetContextAggregation`.
        within_attention, projection_layers, kernel_size, hard: the same.
        memory_options: further arguments of :class:`ctxops.nn.FeatureMemory`, such as
            ``{"total_steps": 80_000, "init": "clustering"}``; Table 2. By default its momentum is
            annealed over the steps of the paper's 130 epochs of ADE20K.
        dropout: of the classifiers. Both heads, H_1 and H_2, are a 1 x 1 convolution, norm, ReLU,
            dropout and the 1 x 1 convolution to the classes.
        align_corners: of all resizes, those in the memory too.

    The memory is ``network.bank``; the training loop calls it: :class:`MemoryNetwork`. An empty
    memory has rows of zeros. The context module with "aspp" is Table 3's ASPP + DCA of 45,629,440
    parameters, with None its DCA. Source: Jin et al., Mining Contextual Information Beyond Image
    for Semantic Segmentation, ICCV 2021, Figure 2, Tables 1, 2 and 5.
    """
    check_choice("context", context, Context)
    width = encoder.channels[-1]

    def pooling() -> nn.Module:
        return PyramidPooling(width, channels, align_corners=align_corners, norm_layer=norm_layer)

    within = {
        None: lambda: None,
        "ppm": pooling,
        "uper": pooling,
        "aspp": lambda: ASPP(width, channels, norm_layer=norm_layer),
        "ocr": lambda: ObjectContext(width, channels, channels // 2, norm_layer=norm_layer),
    }[context]()
    decoder = DatasetContextAggregation(
        width,
        channels,
        0 if within is None else channels,
        within_attention=within_attention,
        projection_layers=projection_layers,
        kernel_size=kernel_size,
        fusion=fusion,
        hard=hard,
        norm_layer=norm_layer,
    )
    memory = {"total_steps": _TOTAL_STEPS, "align_corners": align_corners}
    bank = FeatureMemory(num_classes, channels, **(memory | dict(memory_options or {})))

    def head() -> FCNHead:
        return FCNHead(
            channels, channels, num_classes, kernel_size=1, dropout=dropout, norm_layer=norm_layer
        )

    pyramid = None
    if context == "uper":
        pyramid = FeaturePyramid(
            [*encoder.channels[:-1], channels],
            channels,
            nn.Identity(),
            align_corners=align_corners,
            norm_layer=norm_layer,
        )
    parts = {
        "within": within,
        "first_classifier": head(),
        "bank": bank,
        "pyramid": pyramid,
        "classifier": head(),
    }
    return Decoder(decoder, channels, parts=parts)
