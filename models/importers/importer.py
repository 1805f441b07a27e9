# SPDX-License-Identifier: Apache-2.0
"""What importers are, and what they share: the names of ResNets, what shapes tell of one."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ctxops.models._timm import require_timm

# Blocks in the stages of a ResNet, and whether these are bottlenecks.
_DEPTHS: dict[tuple, int] = {
    (2, 2, 2, 2, False): 18,
    (3, 4, 6, 3, False): 34,
    (3, 4, 6, 3, True): 50,
    (3, 4, 23, 3, True): 101,
    (3, 8, 36, 3, True): 152,
    (3, 24, 36, 3, True): 200,
}

# timm's letter for a stem of three convolutions, by the width of the first, and whether there is
# average pooling on the shortcuts.
_LETTERS = {(32, False): "c", (64, False): "s", (32, True): "d"}

# timm's ResNeSts, and the width of the first convolution in their stems.
_RESNESTS = {50: ("resnest50d", 32), 101: ("resnest101e", 64), 200: ("resnest200e", 64)}

# The three convolutions of a stem, as mmsegmentation numbers them.
STEM = {
    "stem.0": "conv1.0",
    "stem.1": "conv1.1",
    "stem.3": "conv1.3",
    "stem.4": "conv1.4",
    "stem.6": "conv1.6",
    "stem.7": "bn1",
}

# What tells backbones that are not imported.
_OTHERS = {
    "cls_token": "a ViT or a BEiT",
    "downsample_layers": "a ConvNeXt",
    "patch_embeds": "a Twins",
    "stages.0.blocks": "a Swin",
}

RESNET_STAGES = ("layer{}.{}.conv{}", "layer{}.{}.bn{}", "layer{}.{}.downsample.{}")
RESNEST = {
    name: name
    for name in ("layer{}.{}.conv2.conv", "layer{}.{}.conv2.bn{}", "layer{}.{}.conv2.fc{}")
}
RESNET = {
    name: name for name in ("conv1", "bn1", "conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6")
} | {name: name for name in RESNET_STAGES}


HRNET = {
    name: name
    for name in (
        "conv{}",
        "bn{}",
        "transition{}.{}.{}",
        "transition{}.{}.{}.{}",
        "stage{}.{}.branches.{}.{}.conv{}",
        "stage{}.{}.branches.{}.{}.bn{}",
        "stage{}.{}.fuse_layers.{}.{}.{}",
        "stage{}.{}.fuse_layers.{}.{}.{}.{}",
    )
}


class MissingKeyError(Exception):
    """A checkpoint lacks what an option would be read from."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Shapes:
    """The shapes of a checkpoint's tensors."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise MissingKeyError(name)
        return self._shapes[name]

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix + ".") for name in self._shapes)

    def count(self, prefix: str) -> int:
        """How many modules of a list the checkpoint holds."""
        number = 0
        while self.has(f"{prefix}.{number}"):
            number += 1
        return number


@dataclasses.dataclass(frozen=True)
class Importer:
    """One architecture of one source.

    Attributes:
        source: whose code.
        model: what :func:`create_model` calls the network.
        markers: beginnings of names that tell the architecture from the source's others.
        modules: from their modules, or single tensors, to ours.
        arguments: of :func:`create_model`, from the shapes. Raises :class:`MissingKeyError`.
        zeros: our tensors that the source has none of, and that change nothing at zero.
        transforms: of tensors, by our names, where theirs has another order or form.
        spare: beginnings of names that their network may hold without computing with them.
        untold: arguments that shapes do not tell, from a configuration of the source, or from None
            the usual ones. None: the source has one network, of which shapes tell all.
    """

    source: str
    model: str
    markers: tuple[str, ...]
    modules: Mapping[str, str]
    arguments: Callable[[Shapes], dict[str, Any]]
    zeros: tuple[str, ...] = ()
    transforms: Mapping[str, Callable[[Tensor], Tensor]] = dataclasses.field(default_factory=dict)
    spare: tuple[str, ...] = ()
    untold: Callable[[Shapes, Mapping[str, Any] | None], dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Refused:
    """What another's checkpoints may be of too, and what is no network here.

    Attributes:
        source: whose code.
        model: what they call it.
        markers: as those of :class:`Importer`.
    """

    source: str
    model: str
    markers: tuple[str, ...]


def prefixed(names: Mapping[str, str], theirs: str, ours: str = "encoder.body.") -> dict[str, str]:
    return {theirs + name: ours + other for name, other in names.items()}


def resnet_arguments(
    shapes: Shapes, prefix: str, stem: str, *, pooled: bool = False
) -> dict[str, Any]:
    """The backbone by timm's name, and how it is made.

    ``stem``: the first of three convolutions, if there are such. ``pooled``: the source has no
    pooling on the shortcuts of dilated stages, if it has any.
    """
    counts = [shapes.count(f"{prefix}layer{stage}") for stage in (1, 2, 3, 4)]
    bottlenecks = f"{prefix}layer1.0.conv3.weight" in shapes
    depth = _DEPTHS.get((*counts, bottlenecks))
    if depth is None:
        raise MissingKeyError(f"{prefix}layer4 of a ResNet: its stages have {counts} blocks")
    arguments: dict[str, Any] = {}
    options: dict[str, Any] = {}
    pools = len(shapes[f"{prefix}layer2.0.downsample.1.weight"]) == 4
    if pools:
        if not pooled:
            raise ValueError("ResNets with average pooling on their shortcuts are not imported")
        arguments["shortcut_pools"] = False
    width = shapes[f"{stem}.weight"][0] if f"{stem}.weight" in shapes else None
    if shapes.has(f"{prefix}layer1.0.conv2.conv"):
        if depth not in _RESNESTS or width is None:
            raise ValueError(f"this ResNeSt of depth {depth} is not imported: timm has none such")
        name, usual = _RESNESTS[depth]
        if width != usual:
            options = {"stem_width": width}
    else:
        name = f"resnet{depth}"
        if pools:
            options = {"avg_down": True}
        if width is not None:
            options |= {"stem_type": "deep", "stem_width": width}
            letter = _LETTERS.get((width, pools))
            if letter and name + letter in require_timm().list_models():
                name, options = name + letter, {}
    if options:
        arguments["backbone_options"] = options
    return {"backbone": name} | arguments


def backbone_arguments(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """A ResNet or an HRNet of mmsegmentation, of which others' have the names and the form."""
    for part, kind in _OTHERS.items():
        if f"{prefix}{part}" in shapes or shapes.has(f"{prefix}{part}"):
            raise ValueError(f"the backbone is {kind}; ResNets, ResNeSts and HRNets are imported")
    if shapes.has(f"{prefix}stage4"):
        # Its width, and the blocks of its first stage.
        width = shapes[f"{prefix}stage2.0.branches.0.0.conv1.weight"][0]
        small = "_small_v2" if shapes.count(f"{prefix}layer1") == 2 else ""
        name = f"hrnet_w{width}{small}"
        return {"backbone": name, "output_stride": 4, "bilinear_branches": True}
    arguments = resnet_arguments(shapes, prefix, f"{prefix}stem.0", pooled=True)
    if arguments["backbone"].startswith(("resnet18", "resnet34")):
        arguments["dilate_both"] = False
    return arguments


def square(channels: int) -> tuple[int, int]:
    """The sides of the square with a position for each channel."""
    return (math.isqrt(channels),) * 2


def image_branch_first(weight: Tensor) -> Tensor:
    """That of a convolution behind ASPP: its input ends with the image's branch there."""
    # All branches are as wide as the result.
    return weight.roll(weight.shape[0], dims=1) if weight.dim() == 4 else weight


def aspp(theirs: str, ours: str) -> dict[str, str]:
    """ASPP by torchvision's names: four branches in a list, and the image's behind them."""
    return {
        f"{theirs}.convs.4.1": f"{ours}.image.1.0",
        f"{theirs}.convs.4.2": f"{ours}.image.1.1",
        f"{theirs}.convs.{{}}.0": f"{ours}.branches.{{}}.0",
        f"{theirs}.convs.{{}}.1": f"{ours}.branches.{{}}.1",
        f"{theirs}.project.0": f"{ours}.fuse.0",
        f"{theirs}.project.1": f"{ours}.fuse.1",
    }


def refined_aspp_arguments(shapes: Shapes, theirs: str) -> dict[str, Any]:
    """The options of DeepLabv3 that :func:`aspp` tells; a 3 x 3 convolution follows it."""
    return {
        "channels": shapes[f"{theirs}.convs.0.0.weight"][0],
        "out_channels": shapes[f"{theirs}.project.0.weight"][0],
        "fuse_kernel_size": shapes[f"{theirs}.project.0.weight"][2],
        "refine": True,
    }


def released_auxiliary(shapes: Shapes) -> dict[str, Any]:
    if not shapes.has("dsn"):
        return {"auxiliary_channels": 0}
    return {"auxiliary_channels": shapes["dsn.0.weight"][0], "auxiliary_bias": True}
