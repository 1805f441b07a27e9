# SPDX-License-Identifier: Apache-2.0
"""PSPNet (Zhao et al., CVPR 2017)."""

from collections.abc import Callable, Sequence

from torch import nn

from ctxops.models.base import Classifier, Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.pyramid_pooling import PyramidPooling


@register_model("pspnet", auxiliary_channels=256)
def pspnet(
    encoder: Encoder,
    num_classes: int,
    *,
    channels: int = 512,
    output_sizes: Sequence[int] = (1, 2, 3, 6),
    branch_channels: int | None = None,
    branch_activation: bool = True,
    image_norm: bool = True,
    fuse_kernel_size: int = 3,
    classifier_kernel_size: int = 1,
    dropout: float = 0.1,
    align_corners: bool = True,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """:class:`ctxops.nn.PyramidPooling` on the last map: PSPNet.

    Source: Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, as released.

    Args:
        channels: of the decoder's map.
        output_sizes: the grids.
        branch_channels: of each branch; None: ``channels``.
        branch_activation: ReLU in the branches. False, with ``auxiliary_channels=512`` and
            ``auxiliary_bias=True``: the PSPNet of the authors of GFF and GALD.
        image_norm: False: the branch of the 1 x 1 grid has a bias in the place of the norm.
        fuse_kernel_size: of the convolution behind the branches.
        classifier_kernel_size: of the convolution to the classes.
        dropout: of the classifier.
        align_corners: as in :class:`SegmentationNetwork`; the branches are resized like
            the logits.

    The PSPNet of segmentation_models.pytorch has branches of a quarter of the map's channels,
    ``image_norm=False``, ``fuse_kernel_size=1`` and ``classifier_kernel_size=3``.
    """
    decoder = PyramidPooling(
        encoder.channels[-1],
        channels,
        output_sizes,
        activation=branch_activation,
        kernel_size=fuse_kernel_size,
        branch_channels=branch_channels,
        image_norm=image_norm,
        align_corners=align_corners,
        norm_layer=norm_layer,
    )
    classifier = Classifier(channels, num_classes, dropout, classifier_kernel_size)
    return Decoder(decoder, channels, parts={"classifier": classifier})
