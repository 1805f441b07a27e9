# SPDX-License-Identifier: Apache-2.0
"""Backbones: any encoder of timm, as a list of maps."""

import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops._checks import check_flags, check_known, check_sizes
from ctxops.models._timm import require_timm
from ctxops.nn.resize import resize

_MOST_LEVELS = 4

# Of a ResNet.
_STAGES = ("layer1", "layer2", "layer3", "layer4")

# What the sides of the image must divide by: an HRNet and a DLA add up maps that differ in stride
# by factors, the windows of a Swin and the keys of a PVT lie on whole patches.
_MULTIPLES = {"hrnet": 32, "dla": 32, "swin": 4, "pvt_v2": 32}
# What the sides must have at least, where a window without padding must find room.
_LEAST = dict.fromkeys(
    (
        "convnext",
        "densenet",
        "edgenext",
        "ese_vovnet",
        "focalnet",
        "inception_next",
        "nextvit",
        "rdnet",
        "twins",
        "vgg",
    ),
    32,
)

# What lets transformers take images of any size: those on patches, those on windows. timm refuses
# arguments that a backbone does not know.
_ANY_SIZE = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"strict_img_size": False},
)


class Encoder(nn.Module):
    """The last maps of a timm backbone, at most four, the finest first.

    Args:
        name: a timm model, with or without the tag of its weights, such as ``"resnet101s"``.
        output_stride: stride of the last map. A backbone that can be dilated is, to have it;
            DenseNets too, without the pools of their transitions.
        pretrained: loads timm's weights.
        in_channels: channels of the image.
        stage_dilations: of the 3 x 3 convolutions of each of the four stages, whatever the stride:
            ``(1, 1, 2, 4)``. None: those that make up for the strides that ``output_stride`` does
            without. ResNets alone.
        multi_grid: factors of the dilations in the last stage, one per block and over again:
            ``(1, 2, 4)``. ResNets alone.
        ceil_mode: the stem's pooling rounds sizes up, as in the code released with ANN and GALD,
            and as GFF's figures have it: 512 -> 129 instead of 128. ResNets alone.
        contract_dilation: the first block of a dilated stage has half the stage's dilation. False:
            all of it, as in the code released with GALD. ResNets alone.
        dilate_both: both 3 x 3 convolutions of a basic block are dilated. False: the first alone,
            as in mmsegmentation. ResNets of basic blocks alone.
        shortcut_pools: the shortcut of a dilated stage's first block averages windows of 2 x 2.
            False: it does not, as in mmsegmentation. ResNets whose shortcuts have average pooling
            alone: ``"resnet50d"``, ``"resnest50d"``.
        bilinear_branches: an HRNet's branches are resized bilinearly where they are added up, to
            the finer one's size, as the HRNets of mmsegmentation. False: to the nearest, by
            factors, as timm's classifiers. HRNets alone.
        options: further arguments of ``timm.create_model``.

    An HRNet gives one map, its branches resized to the finest and concatenated. A vision
    transformer gives the maps of its last blocks, all at the stride of its patches. Images are
    padded with zeros where the backbone needs it: a DLA, an HRNet without ``bilinear_branches``, a
    PVT, a Swin; to 32 at least a ConvNeXt, a DenseNet, a VGG. Where timm fixes the size of the
    image (BEiT, CaiT, CoaT, CoAtNet, MaxViT) it is fixed here too, by
    ``options={"img_size": (448, 448)}``.

    Attributes:
        in_channels: of the image.
        channels: of each map.
        strides: of each map.

    Shape: ``(B, in_channels, H, W)`` -> list of ``(B, channels[l], H / strides[l],
        W / strides[l])``, sizes rounded as the backbone rounds them.

    Raises:
        ImportError: timm is missing.
        TypeError: a name that is no string, a flag that is no bool, sizes that are no integers.
        ValueError: an unknown backbone, one without this output stride, an argument for ResNets
            alone with another, no factors; an image whose sides the backbone cannot take.
    """

    body: Any  # timm's

    def __init__(
        self,
        name: str,
        output_stride: int,
        *,
        pretrained: bool = False,
        in_channels: int = 3,
        stage_dilations: Sequence[int] | None = None,
        multi_grid: Sequence[int] | None = None,
        ceil_mode: bool = False,
        contract_dilation: bool = True,
        dilate_both: bool = True,
        shortcut_pools: bool = True,
        bilinear_branches: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(name, str):
            raise TypeError(f"backbone must be the name of a timm model, got {name!r}")
        check_sizes(output_stride=output_stride, in_channels=in_channels)
        check_flags(
            pretrained=pretrained,
            ceil_mode=ceil_mode,
            contract_dilation=contract_dilation,
            dilate_both=dilate_both,
            shortcut_pools=shortcut_pools,
            bilinear_branches=bilinear_branches,
        )
        self.name, self.in_channels = name, in_channels
        # Without its hub and the tag of its weights.
        architecture = name.rpartition("/")[2].split(".")[0]
        self.concatenates = architecture.startswith("hrnet")
        self.multiple, self.least = (
            max((n for prefix, n in sides.items() if architecture.startswith(prefix)), default=1)
            for sides in (_MULTIPLES, _LEAST)
        )
        arguments: dict[str, Any] = {"pretrained": pretrained, "in_chans": in_channels}
        if self.concatenates:
            # The branches as they are, without the widening that ImageNet's classifier needs.
            arguments |= {"feature_location": "", "out_indices": (1, 2, 3, 4)}
        arguments |= options or {}
        self.body = _create(name, output_stride, arguments)
        native = getattr(self.body, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:]
        size = arguments.get("img_size") or native
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        channels, strides = self.body.feature_info.channels(), self.body.feature_info.reduction()
        if architecture.startswith("densenet"):
            strides = _dilate_densenet(self.body, strides, output_stride)
        self.channels_last = getattr(self.body, "output_fmt", None) == "NHWC"
        if self.concatenates:
            channels, strides = [sum(channels)], [min(strides)]
        self.channels = tuple(channels[-_MOST_LEVELS:])
        self.strides = tuple(strides[-_MOST_LEVELS:])
        if self.strides[-1] != output_stride:
            raise ValueError(
                f"backbone {name!r} has no map of output_stride={output_stride}; the strides of "
                f"its maps are {self.strides}: choose output_stride={self.strides[-1]}"
            )
        if bilinear_branches:
            if not self.concatenates:
                raise ValueError(f"bilinear_branches is for HRNets, not for backbone {name!r}")
            for stage in (self.body.stage2, self.body.stage3, self.body.stage4):
                for i, module in enumerate(stage):
                    stage[i] = _BilinearBranches(module)
        self.pads = self.least > 1 or (self.multiple > 1 and not bilinear_branches)
        if stage_dilations is not None:
            self._set_dilations(stage_dilations)
        if not contract_dilation:
            for blocks in (self._windows(stage, "contract_dilation") for stage in _STAGES):
                _dilate(blocks[0][0], blocks[-1][-1].dilation[0])
        if multi_grid is not None:
            _set_multi_grid(self._windows("layer4", "multi_grid"), multi_grid)
        if not dilate_both:
            for block in (b for stage in _STAGES for b in self._windows(stage, "dilate_both")):
                if len(block) == 1:
                    raise ValueError(
                        f"dilate_both is for basic blocks: backbone {name!r} has bottlenecks"
                    )
                _dilate(block[1], 1)
        if not shortcut_pools:
            self._drop_shortcut_pools()
        if ceil_mode:
            pool = self.part("maxpool", "ceil_mode")
            if not hasattr(pool, "ceil_mode"):
                raise ValueError(f"ceil_mode is for a stem's pooling: backbone {name!r} has layers")
            pool.ceil_mode = True

    def extra_repr(self) -> str:
        return f"{self.name!r}, channels={self.channels}, strides={self.strides}"

    def forward(self, image: Tensor) -> list[Tensor]:
        height, width = image.shape[2:]
        if self.pads:
            image = F.pad(image, (0, self._missing(width), 0, self._missing(height)))
        maps = self._body(image)[-_MOST_LEVELS:]
        if self.channels_last:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        if self.concatenates:
            size = maps[0].shape[2:]
            maps = [torch.cat([resize(x, size, align_corners=False) for x in maps], dim=1)]
        if not self.pads:
            return maps
        # What the padding added goes: the maps begin where the image does and end with it.
        return [
            x[:, :, : (height + stride - 1) // stride, : (width + stride - 1) // stride]
            for x, stride in zip(maps, self.strides, strict=True)
        ]

    def _missing(self, side: int) -> int:
        """How much longer a side of the image must be."""
        if self.least > 1:
            return torch.sym_max(self.least - side, 0)  # type: ignore[return-value]
        return -side % self.multiple

    def _body(self, image: Tensor) -> list[Tensor]:
        if torch.compiler.is_compiling():
            return list(self.body(image))
        try:
            return list(self.body(image))
        except (RuntimeError, AssertionError) as error:
            wanted = self._wanted(image)
            if wanted is None:
                raise
            raise ValueError(
                f"image must have {wanted} for backbone {self.name!r}, "
                f"got {tuple(image.shape[2:])}: {error}"
            ) from error

    def _wanted(self, image: Tensor) -> str | None:
        """What the sides of an image must be on which the backbone failed; None: it is not them."""
        stride, sides = max(self.body.feature_info.reduction()), image.shape[2:]
        if self._runs_on_meta(image, sides):
            return None
        if self._runs_on_meta(image, [-(-side // stride) * stride for side in sides]):
            return f"sides that are multiples of {stride}"
        if self._runs_on_meta(image, self.image_size):
            return 'the size that timm fixes, see options={"img_size": (H, W)},'
        return None

    def _runs_on_meta(self, image: Tensor, sides: Sequence[int]) -> bool:
        """Does the backbone take images of these sides? Nothing is computed. No: it may also be
        one that cannot be copied, or one with other people's hooks, which need values or raise.
        """
        try:
            body = copy.deepcopy(self.body).to("meta")
            dtype = next((p.dtype for p in body.parameters()), image.dtype)
            body(torch.empty((*image.shape[:2], *sides), dtype=dtype, device="meta"))
        except Exception:
            return False
        return True

    def _windows(self, stage: str, argument: str) -> list[list[nn.Conv2d]]:
        """The 3 x 3 convolutions of each block of a ResNet's stage."""
        blocks = []
        for block in self.part(stage, argument):
            names = ("conv2",) if hasattr(block, "conv3") else ("conv1", "conv2")
            parts = [getattr(block, name, None) for name in names]
            # That of a ResNeSt stands inside its split attention.
            blocks.append([getattr(part, "conv", part) for part in parts])
            if not all(isinstance(window, nn.Conv2d) for window in blocks[-1]):
                raise ValueError(
                    f"{argument} is for ResNets of 3 x 3 convolutions: "
                    f"backbone {self.name!r} has other blocks"
                )
        return blocks

    def _set_dilations(self, dilations: Sequence[int]) -> None:
        """Dilates each stage, its first block by half, as timm does beyond the output stride."""
        _check_list("stage_dilations", dilations, "dilations")
        if len(dilations) != len(_STAGES):
            raise ValueError(f"stage_dilations must be one for each stage, got {dilations!r}")
        for stage, dilation in zip(_STAGES, dilations, strict=True):
            blocks = self._windows(stage, "stage_dilations")
            for convolution in itertools.chain(*blocks):
                _dilate(convolution, dilation)
            _dilate(blocks[0][0], max(1, dilation // 2))

    def _drop_shortcut_pools(self) -> None:
        """Those that keep the size: a dilated stage's."""
        for stage in _STAGES[1:]:
            shortcut = self.part(stage, "shortcut_pools")[0].downsample
            if not isinstance(shortcut[0], (nn.AvgPool2d, nn.Identity)):
                raise ValueError(
                    f"shortcut_pools is for average pooling on shortcuts: backbone {self.name!r} "
                    f"has none"
                )
            if getattr(shortcut[0], "stride", 2) in (1, (1, 1)):
                shortcut[0] = nn.Identity()

    def part(self, part: str, argument: str) -> Any:
        """A part that ResNets have, for the sake of an argument that others refuse."""
        parts = dict(self.body.named_children())
        if part not in parts:
            raise ValueError(f"{argument} is for ResNets: backbone {self.name!r} has no {part}")
        return parts[part]


def _create(name: str, output_stride: int, arguments: dict[str, Any]) -> nn.Module:
    """timm's feature extractor, dilated to the output stride where the backbone can be."""
    timm = require_timm()
    if ":" not in name:  # a model of a hub
        check_known("backbone", name.split(".")[0], timm.list_models(), "timm.list_models()")
    arguments = {"features_only": True} | arguments
    for flexible in ({"output_stride": output_stride}, *_ANY_SIZE):
        try:
            return timm.create_model(name, **flexible | arguments)
        except (TypeError, AssertionError, NotImplementedError):
            continue
    return timm.create_model(name, **arguments)


def _dilate_densenet(body: Any, strides: Sequence[int], output_stride: int) -> list[int]:
    """Drops the pools beyond the stride and dilates the blocks behind them; the strides then."""
    reached, dilation = 4, 1
    for name, part in body.named_children():
        if "transition" in name:
            if 2 * reached <= output_stride:
                reached *= 2
            else:
                part.pool = nn.Identity()
                dilation *= 2
        elif "denseblock" in name:
            for layer in part.values():
                layer.conv2.dilation = layer.conv2.padding = (dilation, dilation)
    return [min(stride, reached) for stride in strides]


class _BilinearBranches(nn.Module):
    """An HRNet's module, with its layers by their names, that resizes bilinearly."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.branches, self.fuse_layers = module.branches, module.fuse_layers
        self.fuse_act = module.fuse_act
        for layer in self.modules():
            if isinstance(layer, nn.Upsample):
                layer.mode, layer.align_corners = "bilinear", False

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        sums = []
        for like, layers in zip(maps, self.fuse_layers, strict=False):  # the last may give one map
            # A coarser map's factor gives one position too many where a side was rounded up.
            parts = [
                resize(layer(x), like.shape[2:], align_corners=False)
                for layer, x in zip(layers, maps, strict=True)
            ]
            sums.append(self.fuse_act(functools.reduce(torch.add, parts)))
        return sums


def _dilate(convolution: nn.Conv2d, dilation: int) -> None:
    """Dilates a 3 x 3 convolution that keeps the size."""
    convolution.dilation = convolution.padding = (dilation, dilation)


def _check_list(name: str, values: Sequence[int], what: str) -> None:
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(f"{name} must be a list or tuple of {what}, got {values!r}")
    check_sizes(**{f"{name}[{i}]": value for i, value in enumerate(values)})


def _set_multi_grid(stage: Sequence[Sequence[nn.Conv2d]], factors: Sequence[int]) -> None:
    """Multiplies the dilation of the stage by a factor for each of its blocks."""
    _check_list("multi_grid", factors, "factors")
    dilation = stage[-1][-1].dilation[0]
    for block, factor in zip(stage, itertools.cycle(factors)):
        for convolution in block:
            _dilate(convolution, dilation * factor)
