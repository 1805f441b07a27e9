# SPDX-License-Identifier: Apache-2.0
"""Backbones: any encoder of timm, as a list of maps."""

from collections.abc import Mapping, Sequence

import torch
from ctxops.models._checks import check_known, require_timm
from torch import Tensor, nn

from ctxops.nn.feature_fusion import resize

_MOST_LEVELS = 4


class Encoder(nn.Module):
    """The last maps of a timm backbone, at most four, the finest first.

    Args:
        name: a timm model, with or without the tag of its weights, such as ``"resnet101s"``.
        output_stride: stride of the last map. A backbone that can be dilated is, to have it.
        pretrained: loads timm's weights.
        in_channels: channels of the image.
        multi_grid: factors of the dilations in the last stage, one per block and over again:
            ``(1, 2, 4)``. ResNets alone.
        ceil_mode: the stem's max pooling rounds sizes up, as in the code released with ANN, GALD
            and GFF: 512 -> 129 instead of 128. ResNets alone.
        options: further arguments of ``timm.create_model``.

    An HRNet gives one map, its branches resized to the finest and concatenated. A vision
    transformer gives those of its last blocks, all at the stride of its patches.

    Attributes:
        channels: of each map.
        strides: of each map.

    Shape: ``(B, in_channels, H, W)`` -> list of ``(B, channels[l], H / strides[l],
        W / strides[l])``, sizes rounded as the backbone rounds them.

    Raises:
        ImportError: timm is missing.
        ValueError: an unknown backbone, one without this output stride, ``multi_grid`` or
            ``ceil_mode`` for one that is no ResNet.
    """

    def __init__(
        self,
        name: str,
        output_stride: int,
        *,
        pretrained: bool = False,
        in_channels: int = 3,
        multi_grid: Sequence[int] | None = None,
        ceil_mode: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        architecture = name.split(".")[0]
        self.concatenates = architecture.startswith("hrnet")
        arguments: dict[str, object] = {"pretrained": pretrained, "in_chans": in_channels}
        if self.concatenates:
            # The branches as they are, without the widening that ImageNet's classifier needs.
            arguments |= {"feature_location": "", "out_indices": (1, 2, 3, 4)}
        if architecture.startswith(("vit_", "deit")):
            arguments |= {"dynamic_img_size": True, "dynamic_img_pad": True}
        self.body = _create(name, output_stride, arguments | dict(options or {}))
        channels, strides = self.body.feature_info.channels(), self.body.feature_info.reduction()
        if self.concatenates:
            channels, strides = [sum(channels)], [min(strides)]
        self.channels = tuple(channels[-_MOST_LEVELS:])
        self.strides = tuple(strides[-_MOST_LEVELS:])
        if self.strides[-1] != output_stride:
            raise ValueError(
                f"backbone {name!r} has no map of output_stride={output_stride}; the strides of "
                f"its maps are {self.strides}: choose output_stride={self.strides[-1]}"
            )
        if multi_grid is not None:
            _set_multi_grid(self.part("layer4", "multi_grid"), multi_grid)
        if ceil_mode:
            self.part("maxpool", "ceil_mode").ceil_mode = True

    def extra_repr(self) -> str:
        return f"{self.name!r}, channels={self.channels}, strides={self.strides}"

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = list(self.body(image))[-_MOST_LEVELS:]
        if not self.concatenates:
            return maps
        size = maps[0].shape[2:]
        return [torch.cat([resize(x, size, align_corners=False) for x in maps], dim=1)]

    def part(self, part: str, argument: str) -> nn.Module:
        """A part that ResNets have, for the sake of an argument that others refuse."""
        parts = dict(self.body.named_children())
        if part not in parts:
            raise ValueError(f"{argument} is for ResNets: backbone {self.name!r} has no {part}")
        return parts[part]


def _create(name: str, output_stride: int, arguments: dict[str, object]) -> nn.Module:
    """timm's feature extractor, dilated to the output stride where the backbone can be."""
    timm = require_timm()
    if ":" not in name:  # a model of a hub
        check_known("backbone", name.split(".")[0], timm.list_models(), "timm.list_models()")
    arguments = arguments | {"features_only": True}
    try:
        return timm.create_model(name, output_stride=output_stride, **arguments)
    except (TypeError, AssertionError, NotImplementedError):
        return timm.create_model(name, **arguments)


def _set_multi_grid(stage: nn.Module, factors: Sequence[int]) -> None:
    """Multiplies the dilation of the stage by a factor for each of its blocks."""
    dilation = stage[-1].conv2.dilation[0]
    for i, block in enumerate(stage):
        rate = dilation * factors[i % len(factors)]
        block.conv2.dilation = block.conv2.padding = (rate, rate)
