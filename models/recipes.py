# SPDX-License-Identifier: Apache-2.0
"""How the checkpoints of other code name what the networks of this package hold.

A recipe is one architecture of one source. Its table leads from their modules to ours; ``{}``
stands for a number, the same on both sides. What the tables do not say, the options of the network,
is read from the shapes.
"""

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor

from ctxops.models._checks import require_timm

# Blocks in the stages of a ResNet, and whether these are bottlenecks.
_DEPTHS = {
    (2, 2, 2, 2, False): 18,
    (3, 4, 6, 3, False): 34,
    (3, 4, 6, 3, True): 50,
    (3, 4, 23, 3, True): 101,
    (3, 8, 36, 3, True): 152,
}

# timm's letter for a stem of three convolutions, by the width of the first.
_STEM_LETTERS = {32: "c", 64: "s"}

# The three convolutions of a stem, as mmsegmentation numbers them.
STEM = {
    "stem.0": "conv1.0",
    "stem.1": "conv1.1",
    "stem.3": "conv1.3",
    "stem.4": "conv1.4",
    "stem.6": "conv1.6",
    "stem.7": "bn1",
}

# The same in the code of which ANN's is a part, which has two names for the stem.
_NAMED_STEM = {
    "conv1": "conv1.0",
    "bn1": "conv1.1",
    "conv2": "conv1.3",
    "bn2": "conv1.4",
    "conv3": "conv1.6",
    "bn3": "bn1",
}

_STAGES = ("layer{}.{}.conv{}", "layer{}.{}.bn{}", "layer{}.{}.downsample.{}")
_HRNET = {
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
_PLAIN_RESNET = {
    name: name for name in ("conv1", "bn1", "conv1.0", "conv1.1", "conv1.3", "conv1.4", "conv1.6")
} | {name: name for name in _STAGES}


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
class Recipe:
    """One architecture of one source.

    Attributes:
        source: whose code.
        model: what :func:`create_model` calls the network.
        markers: beginnings of names that tell the architecture from the source's others.
        modules: from their modules, or single tensors, to ours.
        arguments: of :func:`create_model`, from the shapes. Raises :class:`MissingKeyError`.
        zeros: our tensors that the source has none of, and that change nothing at zero.
    """

    source: str
    model: str
    markers: tuple[str, ...]
    modules: Mapping[str, str]
    arguments: Callable[[Shapes], dict[str, object]]
    zeros: tuple[str, ...] = ()


def _prefixed(names: Mapping[str, str], theirs: str, ours: str = "encoder.body.") -> dict[str, str]:
    return {theirs + name: ours + other for name, other in names.items()}


def _resnet(shapes: Shapes, prefix: str, stem: str) -> dict[str, object]:
    """The backbone by timm's name. ``stem``: the first of three convolutions, if there are such."""
    counts = [shapes.count(f"{prefix}layer{stage}") for stage in (1, 2, 3, 4)]
    bottlenecks = f"{prefix}layer1.0.conv3.weight" in shapes
    depth = _DEPTHS.get((*counts, bottlenecks))
    if depth is None:
        raise MissingKeyError(f"{prefix}layer4 of a ResNet: its stages have {counts} blocks")
    if len(shapes[f"{prefix}layer2.0.downsample.1.weight"]) == 4:
        # Dilated, timm's average pooling on shortcuts has windows of 2 x 2, the others' of 1 x 1.
        raise ValueError("ResNets with average pooling on their shortcuts are not imported")
    if f"{stem}.weight" not in shapes:
        return {"backbone": f"resnet{depth}"}
    width = shapes[f"{stem}.weight"][0]
    if width in _STEM_LETTERS:
        name = f"resnet{depth}{_STEM_LETTERS[width]}"
        if name in require_timm().list_models():
            return {"backbone": name}
    options = {"stem_type": "deep", "stem_width": width}
    return {"backbone": f"resnet{depth}", "backbone_options": options}


# mmsegmentation -----------------------------------------------------------------------------------


def _module(theirs: str, ours: str) -> dict[str, str]:
    """mmcv's ConvModule onto convolution and norm."""
    return {f"{theirs}.conv": f"{ours}.0", f"{theirs}.bn": f"{ours}.1"}


_MMSEG_COMMON = (
    _prefixed(_PLAIN_RESNET | STEM | _HRNET, "backbone.")
    | {"decode_head.conv_seg": "classifier.1", "auxiliary_head.conv_seg": "auxiliary.1.1"}
    | _module("auxiliary_head.convs.0", "auxiliary.0")
)


def _hrnet(shapes: Shapes) -> dict[str, object]:
    """The backbone by timm's name: its width, and the blocks of its first stage."""
    width = shapes["backbone.stage2.0.branches.0.0.conv1.weight"][0]
    small = "_small_v2" if shapes.count("backbone.layer1") == 2 else ""
    return {"backbone": f"hrnet_w{width}{small}", "output_stride": 4, "bilinear_branches": True}


def _mmseg_network(shapes: Shapes, head: str = "decode_head") -> dict[str, object]:
    auxiliary = "auxiliary_head.convs.0.conv.weight"
    if shapes.has("backbone.stage4"):
        arguments = _hrnet(shapes)
    else:
        arguments = _resnet(shapes, "backbone.", "backbone.stem.0")
    arguments |= {"num_classes": shapes[f"{head}.conv_seg.weight"][0], "align_corners": False}
    if arguments["backbone"].startswith(("resnet18", "resnet34")):
        arguments["dilate_both"] = False
    if head == "decode_head":
        width = shapes[auxiliary][0] if auxiliary in shapes else 0
        arguments |= {"auxiliary_channels": width, "auxiliary_bias": False}
    return arguments


def _mmseg_channels(
    weight: str, **further: Callable[[Shapes, int], object]
) -> Callable[[Shapes], dict[str, object]]:
    """The common arguments, the width of the head, and what else the shapes and the width tell."""

    def arguments(shapes: Shapes) -> dict[str, object]:
        channels = shapes[weight][0]
        own = {name: read(shapes, channels) for name, read in further.items()}
        return _mmseg_network(shapes) | {"channels": channels} | own

    return arguments


def _reduction(weight: str) -> Callable[[Shapes, int], int]:
    return lambda shapes, channels: channels // shapes[weight][0]


def _width(weight: str) -> Callable[[Shapes, int], int]:
    return lambda shapes, _: shapes[weight][0]


def _mmseg(
    model: str,
    marker: str,
    modules: Mapping[str, str],
    arguments: Callable[[Shapes], dict[str, object]],
    zeros: tuple[str, ...] = (),
) -> Recipe:
    common = _MMSEG_COMMON
    return Recipe(
        "mmsegmentation", model, ("backbone.", marker), common | modules, arguments, zeros
    )


# Two convolutions with a block between them, and the map beside what they make of it.
_MMSEG_CONCAT = (
    _module("decode_head.convs.0", "decoder.context.0")
    | _module("decode_head.convs.1", "decoder.context.2")
    | _module("decode_head.conv_cat", "decoder.fuse")
)


def _mmseg_attention(theirs: str, ours: str) -> dict[str, str]:
    """ANN's blocks: query and key with a norm, value and W_o without."""
    return (
        _module(f"{theirs}.stages.0.query_project", f"{ours}.query")
        | _module(f"{theirs}.stages.0.key_project", f"{ours}.key")
        | {
            f"{theirs}.stages.0.value_project": f"{ours}.value",
            f"{theirs}.stages.0.out_project": f"{ours}.out",
        }
        | _module(f"{theirs}.bottleneck", f"{ours}.fusion")
    )


def _grids(prefix: str, square: str) -> Callable[[Shapes, int], tuple[int, ...]]:
    """The grids of which a list of modules predicts the cells."""

    def read(shapes: Shapes, _: int) -> tuple[int, ...]:
        cells = [shapes[square.format(i)][0] for i in range(shapes.count(prefix))]
        return tuple(round(number**0.5) for number in cells)

    return read


def _ocr_arguments(shapes: Shapes) -> dict[str, object]:
    regions = "decode_head.0.convs.0.conv.weight"
    return _mmseg_network(shapes, "decode_head.1") | {
        "channels": shapes["decode_head.1.bottleneck.conv.weight"][0],
        "key_channels": shapes["decode_head.1.object_context_block.value_project.conv.weight"][0],
        "region_channels": shapes[regions][0],
        "region_kernel_size": shapes[regions][2],
    }


_OCR_BLOCK = "decode_head.1.object_context_block"

_MMSEG = [
    _mmseg(
        "pspnet",
        "decode_head.psp_modules.",
        _module("decode_head.psp_modules.{}.1", "decoder.branches.{}")
        | _module("decode_head.bottleneck", "decoder.fuse"),
        _mmseg_channels("decode_head.bottleneck.conv.weight"),
    ),
    _mmseg(
        "deeplabv3",
        "decode_head.aspp_modules.",
        _module("decode_head.image_pool.1", "decoder.image.1")
        | _module("decode_head.aspp_modules.{}", "decoder.branches.{}")
        | _module("decode_head.bottleneck", "decoder.fuse"),
        _mmseg_channels("decode_head.bottleneck.conv.weight"),
    ),
    _mmseg(
        "apcnet",
        "decode_head.acm_modules.",
        _module("decode_head.acm_modules.{}.pooled_redu_conv", "decoder.contexts.{}.reduce_grid")
        | _module("decode_head.acm_modules.{}.input_redu_conv", "decoder.contexts.{}.reduce")
        | _module("decode_head.acm_modules.{}.global_info", "decoder.contexts.{}.image")
        | {"decode_head.acm_modules.{}.gla": "decoder.contexts.{}.affinity"}
        | _module("decode_head.acm_modules.{}.residual_conv", "decoder.contexts.{}.residual")
        | _module("decode_head.acm_modules.{}.fusion_conv", "decoder.contexts.{}.fuse")
        | _module("decode_head.bottleneck", "decoder.fuse"),
        _mmseg_channels(
            "decode_head.bottleneck.conv.weight",
            output_sizes=_grids("decode_head.acm_modules", "decode_head.acm_modules.{}.gla.weight"),
            fusion=lambda shapes, _: shapes.has("decode_head.acm_modules.0.fusion_conv"),
        ),
    ),
    _mmseg(
        "ccnet",
        "decode_head.cca.",
        {
            "decode_head.cca.query_conv": "decoder.context.attention.query",
            "decode_head.cca.key_conv": "decoder.context.attention.key",
            "decode_head.cca.value_conv": "decoder.context.attention.value",
            "decode_head.cca.gamma.scale": "decoder.context.attention.gamma",
        }
        | _module("decode_head.convs.0", "decoder.context.reduce")
        | _module("decode_head.convs.1", "decoder.context.out")
        | _module("decode_head.conv_cat", "decoder.fuse"),
        _mmseg_channels(
            "decode_head.conv_cat.conv.weight",
            reduction=_reduction("decode_head.cca.query_conv.weight"),
        ),
    ),
    _mmseg(
        "dnlnet",
        "decode_head.dnl_block.",
        _MMSEG_CONCAT
        | {
            "decode_head.dnl_block.theta.conv": "decoder.context.1.query",
            "decode_head.dnl_block.phi.conv": "decoder.context.1.key",
            "decode_head.dnl_block.g.conv": "decoder.context.1.value",
            "decode_head.dnl_block.conv_mask": "decoder.context.1.mask",
        }
        | _module("decode_head.dnl_block.conv_out", "decoder.context.1.out"),
        _mmseg_channels(
            "decode_head.conv_cat.conv.weight",
            key_channels=_width("decode_head.dnl_block.theta.conv.weight"),
        ),
    ),
    _mmseg(
        "nonlocal",
        "decode_head.nl_block.",
        _MMSEG_CONCAT
        | {
            "decode_head.nl_block.theta.conv": "decoder.context.1.query",
            "decode_head.nl_block.phi.conv": "decoder.context.1.key",
            "decode_head.nl_block.g.conv": "decoder.context.1.value",
            "decode_head.nl_block.conv_out.conv": "decoder.context.1.out",
            "decode_head.nl_block.conv_out.bn": "decoder.context.1.out_norm",
        },
        _mmseg_channels(
            "decode_head.conv_cat.conv.weight",
            key_channels=_width("decode_head.nl_block.theta.conv.weight"),
        ),
        zeros=("decoder.context.1.out.bias",),
    ),
    _mmseg(
        "danet",
        "decode_head.pam.",
        {
            "decode_head.pam.query_project": "decoder.position.1.query",
            "decode_head.pam.key_project": "decoder.position.1.key",
            "decode_head.pam.value_project": "decoder.position.1.value",
            "decode_head.pam.gamma.scale": "decoder.position.1.gamma",
            "decode_head.cam.gamma.scale": "decoder.channel.1.gamma",
            "decode_head.pam_conv_seg": "position_classifier.1",
            "decode_head.cam_conv_seg": "channel_classifier.1",
        }
        | _module("decode_head.pam_in_conv", "decoder.position.0")
        | _module("decode_head.pam_out_conv", "decoder.position.2")
        | _module("decode_head.cam_in_conv", "decoder.channel.0")
        | _module("decode_head.cam_out_conv", "decoder.channel.2"),
        _mmseg_channels(
            "decode_head.pam_in_conv.conv.weight",
            reduction=_reduction("decode_head.pam.query_project.weight"),
        ),
    ),
    _mmseg(
        "ann",
        "decode_head.fusion.stages.",
        _mmseg_attention("decode_head.fusion", "decoder.fusion")
        | _module("decode_head.bottleneck", "decoder.reduce")
        | _mmseg_attention("decode_head.context", "decoder.context"),
        _mmseg_channels(
            "decode_head.bottleneck.conv.weight",
            key_channels=_width("decode_head.fusion.stages.0.key_project.conv.weight"),
            value_channels=_width("decode_head.fusion.stages.0.value_project.weight"),
        ),
        zeros=(
            "decoder.fusion.query.0.bias",
            "decoder.fusion.key.0.bias",
            "decoder.fusion.fusion.0.bias",
            "decoder.reduce.0.bias",
            "decoder.context.query.0.bias",
            "decoder.context.key.0.bias",
            "decoder.context.fusion.0.bias",
        ),
    ),
    _mmseg(
        "fcn",
        "decode_head.conv_cat.",
        _module("decode_head.convs.{}", "decoder.context.{}")
        | _module("decode_head.conv_cat", "decoder.fuse"),
        _mmseg_channels(
            "decode_head.conv_cat.conv.weight",
            convolutions=lambda shapes, _: shapes.count("decode_head.convs"),
            concat=lambda *_: True,
        ),
    ),
    _mmseg(
        "fcn",
        "decode_head.convs.0.",
        _module("decode_head.convs.0", "decoder"),
        _mmseg_channels(
            "decode_head.convs.0.conv.weight",
            kernel_size=lambda shapes, _: shapes["decode_head.convs.0.conv.weight"][2],
        ),
    ),
    Recipe(
        "mmsegmentation",
        "ocrnet",
        ("backbone.", "decode_head.1.object_context_block."),
        _prefixed(_PLAIN_RESNET | STEM | _HRNET, "backbone.")
        | _module("decode_head.0.convs.0", "regions.0")
        | {"decode_head.0.conv_seg": "regions.1.1", "decode_head.1.conv_seg": "classifier.1"}
        | _module("decode_head.1.bottleneck", "decoder.reduce")
        | _module(f"{_OCR_BLOCK}.query_project.0", "decoder.query")
        | {
            f"{_OCR_BLOCK}.query_project.1.conv": "decoder.query.3",
            f"{_OCR_BLOCK}.query_project.1.bn": "decoder.query.4",
            f"{_OCR_BLOCK}.key_project.1.conv": "decoder.key.3",
            f"{_OCR_BLOCK}.key_project.1.bn": "decoder.key.4",
        }
        | _module(f"{_OCR_BLOCK}.key_project.0", "decoder.key")
        | _module(f"{_OCR_BLOCK}.value_project", "decoder.value")
        | _module(f"{_OCR_BLOCK}.out_project", "decoder.out")
        | _module(f"{_OCR_BLOCK}.bottleneck", "decoder.fuse"),
        _ocr_arguments,
    ),
]

# torchvision --------------------------------------------------------------------------------------


def _torchvision_fcn(shapes: Shapes) -> dict[str, object]:
    auxiliary = "aux_classifier.0.weight"
    return _resnet(shapes, "backbone.", "backbone.conv1.0") | {
        "num_classes": shapes["classifier.4.weight"][0],
        "channels": shapes["classifier.0.weight"][0],
        "align_corners": False,
        "auxiliary_channels": shapes[auxiliary][0] if auxiliary in shapes else 0,
    }


_TORCHVISION = [
    Recipe(
        "torchvision",
        "fcn",
        ("backbone.layer4.", "classifier.0.weight"),
        _prefixed(_PLAIN_RESNET, "backbone.")
        | {
            "classifier.0": "decoder.0",
            "classifier.1": "decoder.1",
            "classifier.4": "classifier.1",
            "aux_classifier.0": "auxiliary.0.0",
            "aux_classifier.1": "auxiliary.0.1",
            "aux_classifier.4": "auxiliary.1.1",
        },
        _torchvision_fcn,
    )
]

# The code released with ANN and GALD -------------------------------------------------------------


def _released_auxiliary(shapes: Shapes) -> dict[str, object]:
    if not shapes.has("dsn"):
        return {"auxiliary_channels": 0}
    return {"auxiliary_channels": shapes["dsn.0.weight"][0], "auxiliary_bias": True}


def _ann_block(theirs: str, ours: str) -> dict[str, str]:
    """A block of ANN; its norm and ReLU are one module, or two in a list."""
    stage = f"{theirs}.stages.0"
    names = {f"{stage}.f_value": f"{ours}.value", f"{stage}.W": f"{ours}.out"}
    for embedding in ("query", "key"):
        names |= {
            f"{stage}.f_{embedding}.0": f"{ours}.{embedding}.0",
            f"{stage}.f_{embedding}.1": f"{ours}.{embedding}.1",
            f"{stage}.f_{embedding}.1.0": f"{ours}.{embedding}.1",
        }
    return names | {
        f"{theirs}.conv_bn_dropout.0": f"{ours}.fusion.0",
        f"{theirs}.conv_bn_dropout.1": f"{ours}.fusion.1",
        f"{theirs}.conv_bn_dropout.1.0": f"{ours}.fusion.1",
    }


def _ann_arguments(shapes: Shapes) -> dict[str, object]:
    stem = "resinit" if shapes.has("backbone.resinit") else "prefix"
    return (
        _resnet(shapes, "backbone.", f"backbone.{stem}.conv1")
        | _released_auxiliary(shapes)
        | {
            "num_classes": shapes["cls.weight"][0],
            "channels": shapes["context.0.weight"][0],
            "key_channels": shapes["fusion.stages.0.f_key.0.weight"][0],
            "value_channels": shapes["fusion.stages.0.f_value.weight"][0],
            "ceil_mode": True,
        }
    )


def _gald_arguments(shapes: Shapes) -> dict[str, object]:
    return (
        _resnet(shapes, "", "conv1.0")
        | _released_auxiliary(shapes)
        | {
            "num_classes": shapes["head.bottleneck.3.weight"][0],
            "channels": shapes["head.conva.0.weight"][0],
            "ceil_mode": True,
            "contract_dilation": False,
            "multi_grid": (1, 2, 4),
        }
    )


_RELEASED = [
    Recipe(
        "ann",
        "ann",
        ("fusion.stages.0.f_key.", "context.2.stages.0.f_value."),
        _prefixed({name: name for name in _STAGES}, "backbone.")
        | _prefixed(_NAMED_STEM, "backbone.prefix.")
        | _prefixed(_NAMED_STEM, "backbone.resinit.")
        | _ann_block("fusion", "decoder.fusion")
        | {
            "context.0": "decoder.reduce.0",
            "context.1": "decoder.reduce.1",
            "context.1.0": "decoder.reduce.1",
        }
        | _ann_block("context.2", "decoder.context")
        | {
            "cls": "classifier.1",
            "dsn.0": "auxiliary.0.0",
            "dsn.1": "auxiliary.0.1",
            "dsn.1.0": "auxiliary.0.1",
            "dsn.3": "auxiliary.1.1",
        },
        _ann_arguments,
    ),
    Recipe(
        "gald",
        "gald",
        ("head.a2block.",),
        _prefixed(_PLAIN_RESNET, "")
        | {
            "head.conva.0": "decoder.context.0.0",
            "head.conva.1": "decoder.context.0.1",
            "head.a2block.down.0": "decoder.context.1.down.0.0",
            "head.a2block.down.1": "decoder.context.1.down.0.1",
            "head.a2block.long_relation.t": "decoder.context.1.global_aggregation.theta",
            "head.a2block.long_relation.p": "decoder.context.1.global_aggregation.phi",
            "head.a2block.long_relation.g": "decoder.context.1.global_aggregation.g",
            "head.a2block.long_relation.z": "decoder.context.1.global_aggregation.z",
            "head.a2block.long_relation.gn": "decoder.context.1.global_aggregation.norm",
            "head.convb.0": "decoder.context.2.0",
            "head.convb.1": "decoder.context.2.1",
            "head.bottleneck.0": "decoder.fuse.0",
            "head.bottleneck.1": "decoder.fuse.1",
            "head.bottleneck.3": "classifier.1",
        }
        | {
            f"head.a2block.local_attention.dconv{i + 1}.{j}": (
                f"decoder.context.1.local_distribution.down.{i}.{j}"
            )
            for i in range(3)
            for j in range(2)
        }
        | {"dsn.0": "auxiliary.0.0", "dsn.1": "auxiliary.0.1", "dsn.4": "auxiliary.1.1"},
        _gald_arguments,
    ),
]

RECIPES = [*_MMSEG, *_TORCHVISION, *_RELEASED]
