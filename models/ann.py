# SPDX-License-Identifier: Apache-2.0
"""Asymmetric non-local neural network (Zhu et al., ICCV 2019)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from ctxops._checks import check_choice, check_sizes
from ctxops.models.base import Decoder
from ctxops.models.encoder import Encoder
from ctxops.models.registry import register_model
from ctxops.nn.asymmetric_context import CommonFusion, FusedContext, SummedFusions
from ctxops.nn.cbr import cbr
from ctxops.nn.non_local import (
    AFNB,
    APNB,
    Fuse,
    FusionNonLocal2d,
    NonLocal2d,
    Sampling,
    Share,
    Variant,
)

Fusion = Literal[None, "common", "fnb", "afnb"]
Attention = Literal[None, "nb", "apnb"]
# The paper's Stage5 is the backbone's last map.
_LAST_STAGE = 5


def _levels(encoder: Encoder, fuse_stages: Sequence[int]) -> list[int]:
    """The encoder's maps of these stages, counted from the last; raises where there are none."""
    first = _LAST_STAGE + 1 - len(encoder.channels)
    known = range(first, _LAST_STAGE)
    if (
        not isinstance(fuse_stages, (list, tuple))
        or not fuse_stages
        or len(set(fuse_stages)) < len(fuse_stages)
        or any(stage not in known for stage in fuse_stages)
    ):
        raise ValueError(
            f"fuse_stages must be different stages out of {list(known)} for backbone "
            f"{encoder.name!r}, got {fuse_stages!r}"
        )
    return [stage - _LAST_STAGE - 1 for stage in fuse_stages]


@register_model("ann", auxiliary_bias=True)
def ann(
    encoder: Encoder,
    *,
    fusion: Fusion = "afnb",
    attention: Attention = "apnb",
    fuse_stages: Sequence[int] = (4,),
    output_sizes: Sequence[int] = (1, 3, 6, 8),
    sampling: Sampling = "avg",
    channels: int = 512,
    key_channels: int = 256,
    value_channels: int = 256,
    share: Share = "query_key",
    fuse: Fuse = "concat",
    out_norm: bool = False,
    variant: Variant = "released",
    fold: bool = True,
    bias: bool = True,
    dropout: float = 0.05,
    align_corners: bool = True,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> Decoder:
    """Stage 4 fused into stage 5, one 3 x 3 convolution, norm and ReLU, then self-attention.

    Args:
        fusion: of the last map, Stage5, with earlier ones. "afnb": :class:`ctxops.nn.AFNB`. "fnb":
            :class:`ctxops.nn.FusionNonLocal2d`. "common": ``Stage5 + ReLU(norm(conv(Stage4)))``
            with a 1 x 1 convolution. None: none.
        attention: of the convolution's map to itself. "apnb": :class:`ctxops.nn.APNB`. "nb":
            :class:`ctxops.nn.NonLocal2d`. None: none. Without both it is the paper's baseline.
        fuse_stages: the stages, 2 to 4 for a ResNet, that are fused into the last one; where there
            are several, what each fusion gives is added (Table 9).
        output_sizes, sampling, fold: of the anchors of "afnb" and "apnb" (Table 7).
        channels: of the convolution's map.
        key_channels, value_channels, fuse, variant: of all blocks.
        share: of "apnb" and "nb".
        out_norm: of "fnb" and "afnb": the norm after W_o of appendix C.
        bias: biases of all convolutions of the head, as the auxiliary head has them by default.
        dropout: of the classifiers, and after the fusion.
        align_corners: of the resize of all logits, and of that in "common".

    The defaults are the released code's head, whose backbone has ``ceil_mode=True``: 62,964,435
    parameters for 19 classes without auxiliary head, where the paper's Table 2 has 63.17 M. Source:
    Zhu et al., Asymmetric Non-local Neural Networks for Semantic Segmentation, ICCV 2019, Figure 3,
    Tables 6, 7 and 9.
    """
    check_choice("fusion", fusion, Fusion)
    check_choice("attention", attention, Attention)
    check_sizes(channels=channels)
    levels = [] if fusion is None else _levels(encoder, fuse_stages)
    high = encoder.channels[-1]
    block: dict[str, Any] = {
        "key_channels": key_channels,
        "value_channels": value_channels,
        "fuse": fuse,
        "variant": variant,
        "bias": bias,
        "norm_layer": norm_layer,
    }
    anchors: dict[str, Any] = {"output_sizes": output_sizes, "sampling": sampling, "fold": fold}

    def fusion_block(low: int) -> nn.Module:
        if fusion == "common":
            return CommonFusion(
                low, high, bias=bias, align_corners=align_corners, norm_layer=norm_layer
            )
        if fusion == "fnb":
            return FusionNonLocal2d(low, high, out_norm=out_norm, **block)
        return AFNB(low, high, out_norm=out_norm, **anchors, **block)

    def attention_block() -> nn.Module:
        if attention == "nb":
            return NonLocal2d(channels, share=share, **block)
        return APNB(channels, share=share, **anchors, **block)

    fusions = [fusion_block(encoder.channels[level]) for level in levels]
    fused: nn.Module | None
    if len(fusions) > 1:
        fused = SummedFusions(fusions)
    else:  # a single one has the names of its parameters in AsymmetricNonLocalContext
        fused = fusions[0] if fusions else None
    decoder = FusedContext(
        fused,
        cbr(high, channels, 3, norm_layer, bias=bias),
        None if attention is None else attention_block(),
        dropout=dropout if fusions else 0.0,
    )
    return Decoder(decoder, channels, levels=(*levels, -1))
