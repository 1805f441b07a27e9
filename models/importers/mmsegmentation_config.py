# SPDX-License-Identifier: Apache-2.0
"""The configurations of mmsegmentation: read as data, and what they tell that shapes do not.

A configuration is Python, of which nothing runs: its assignments of plain values are read, and what
else it holds is an :class:`Unread`, which no option takes.
"""

import ast
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctxops.models.importers.importer import Shapes

_BASES = "_base_"
_DELETE = "_delete_"


@dataclasses.dataclass(frozen=True, repr=False)
class Unread:
    """A part of a configuration that is more than plain values."""

    source: str

    def __repr__(self) -> str:
        return self.source


def parse_config(text: str) -> dict[str, Any]:
    """The ``model`` of a configuration without bases, such as checkpoints hold.

    Raises:
        ValueError: no Python, a configuration with bases, or none of a model.
    """
    names = _names(text, "the configuration")
    if _BASES in names:
        raise ValueError(
            f"the configuration has the bases {names[_BASES]!r}, relative to its file: give the "
            f"file's path to load_config or --config"
        )
    return _model(names, "the configuration")


def load_config(path: str | os.PathLike) -> dict[str, Any]:
    """The ``model`` of a configuration file of mmsegmentation, merged with its bases.

    Raises:
        OSError: no such file, or no such base.
        ValueError: as :func:`parse_config`, or a base that is no path.
    """
    return _model(_load(Path(path)), repr(os.fspath(path)))


def _load(path: Path) -> dict[str, Any]:
    names = _names(path.read_text(encoding="utf-8"), repr(str(path)))
    bases = names.pop(_BASES, ())
    merged: dict[str, Any] = {}
    for base in (bases,) if isinstance(bases, str) else bases if isinstance(bases, tuple) else ():
        if not isinstance(base, str) or ":" in base:
            bases = Unread(repr(base))
            break
        merged = _merge(merged, _load(path.parent / base))
    if isinstance(bases, Unread):
        raise ValueError(f"{str(path)!r} has the base {bases!r}, which is no path")
    return _merge(merged, names)


def _model(names: Mapping[str, Any], what: str) -> dict[str, Any]:
    model = names.get("model", Unread("none"))
    if not isinstance(model, dict):
        raise ValueError(f"{what} must have a model of plain values, got {model!r}")
    return model


def _merge(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the other in the place of the base's; dictionaries are merged."""
    merged = dict(base)
    for name, value in other.items():
        old = merged.get(name)
        if isinstance(value, dict) and isinstance(old, dict) and not value.get(_DELETE):
            value = _merge(old, value)
        merged[name] = value
    return merged


def _names(text: str, what: str) -> dict[str, Any]:
    """What a configuration assigns to names; lists are tuples."""
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no Python: {error}") from error
    names: dict[str, Any] = {}
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)]):
                names[name] = _value(statement.value, names)
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                pass
            case _:  # it may change every name that it mentions
                mentioned = (n.id for n in ast.walk(statement) if isinstance(n, ast.Name))
                names |= dict.fromkeys(mentioned, Unread(ast.unparse(statement)))
    return names


def _value(node: ast.AST, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return tuple(_value(element, names) for element in elements)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Dict(keys=keys, values=values):
            constants = [key.value for key in keys if isinstance(key, ast.Constant)]
            if len(constants) == len(values):
                return dict(zip(constants, (_value(x, names) for x in values), strict=True))
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(
            keyword.arg for keyword in keywords
        ):
            return {keyword.arg: _value(keyword.value, names) for keyword in keywords}
    return Unread(ast.unparse(node))


# What networks are told ---------------------------------------------------------------------------

# What says nothing about what is computed, or what shapes tell.
_OF_MODELS = {"auxiliary_head", "backbone", "data_preprocessor", "decode_head", "init_cfg"}
_OF_MODELS |= {"num_stages", "pretrained", "test_cfg", "train_cfg"}
_OF_HEADS = {"align_corners", "channels", "concat_input", "drop_out_ratio", "dropout_ratio"}
_OF_HEADS |= {"fusion", "ignore_index", "in_channels", "init_cfg", "kernel_size", "loss_decode"}
_OF_HEADS |= {"num_classes", "num_convs", "ocr_channels", "out_channels", "pam_channels"}
_OF_HEADS |= {"pool_scales", "project_channels", "reduction", "sampler", "threshold"}
_OF_RESNETS = {
    "avg_down",
    "base_channels",
    "base_width",
    "contract_dilation",
    "deep_stem",
    "depth",
    "dilations",
}
_OF_RESNETS |= {"frozen_stages", "in_channels", "init_cfg", "multi_grid", "norm_eval"}
_OF_RESNETS |= {"pretrained", "stage_with_dcn", "stem_channels", "strides", "with_cp"}
_OF_RESNETS |= {"zero_init_residual"}
_OF_HRNETS = {"extra", "frozen_stages", "in_channels", "init_cfg", "norm_eval", "pretrained"}
_OF_HRNETS |= {"with_cp", "zero_init_residual"}

# What it may be, besides its default, which comes first.
_RELU = ({"type": "ReLU"}, {"type": "ReLU", "inplace": True})
_RESNET = {
    "avg_down_stride": (True,),
    "conv_cfg": (None,),
    "dcn": (None,),
    "groups": (1,),
    "num_stages": (4,),
    "out_indices": ((0, 1, 2, 3),),
    "plugins": (None,),
    "radix": (2,),
    "reduction_factor": (4,),
    "style": ("pytorch",),
}
_HRNET = {"conv_cfg": (None,), "multiscale_output": (True,)}
_HEAD = {"act_cfg": _RELU, "conv_cfg": (None,)}
_DROPOUT = ("dropout_ratio", "drop_out_ratio")  # also in the first versions

# The strides of stages that an output stride stands for, and the dilations that make up for them.
_STRIDES = {(1, 2, 1, 1): 8, (1, 2, 2, 1): 16, (1, 2, 2, 2): 32}
_DILATIONS = {8: (1, 1, 2, 4), 16: (1, 1, 1, 2), 32: (1, 1, 1, 1)}


@dataclasses.dataclass(frozen=True)
class _Head:
    """The head of a network.

    Attributes:
        type: its class there.
        options: from its arguments to their default there and to our name.
        values: of further arguments, those that ours computes, the default first.
        usual: arguments of the configurations where they are not the class's.
        strides: of the stages of a ResNet in most configurations.
    """

    type: str
    options: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    values: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    usual: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    strides: tuple[int, int, int, int] = (1, 2, 1, 1)


_UNDILATED = {"dilation": (1,)}
_EMBEDDED = {"mode": ("embedded_gaussian",)} | _UNDILATED
_FCN = _Head("FCNHead", {"dilation": (1, "dilation")})
_HEADS = {
    "ann": _Head(
        "ANNHead",
        {"key_pool_scales": ((1, 3, 6, 8), "output_sizes")},
        {"query_scales": ((1,),)},
    ),
    "apcnet": _Head("APCHead"),
    "ccnet": _Head("CCHead", {"recurrence": (2, "recurrence")}, _UNDILATED),
    "danet": _Head("DAHead"),
    "deeplabv3": _Head(
        "ASPPHead",
        {"dilations": ((1, 6, 12, 18), "dilations")},
        usual={"dilations": (1, 12, 24, 36)},
    ),
    "dnlnet": _Head(
        "DNLHead",
        {"use_scale": (True, "use_scale"), "temperature": (0.05, "temperature")},
        _EMBEDDED,
    ),
    "fcn": _FCN,
    "nonlocal": _Head("NLHead", {"use_scale": (True, "use_scale")}, _EMBEDDED),
    "ocrnet": _Head("OCRHead", values={"scale": (1,)}),
    "psanet": _Head(
        "PSAHead",
        {"mask_size": (None, "mask_size"), "shrink_factor": (2, "shrink_factor")},
        {
            "psa_type": ("bi-direction",),
            "compact": (False,),
            "normalization_factor": (1.0,),
            "psa_softmax": (True,),
        },
    ),
    "pspnet": _Head("PSPHead", {"pool_scales": ((1, 2, 3, 6), "output_sizes")}),
    "upernet": _Head(
        "UPerHead", {"pool_scales": ((1, 2, 3, 6), "output_sizes")}, strides=(1, 2, 2, 2)
    ),
}


def untold(model: str, shapes: Shapes, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of a network that shapes do not tell: the configuration's, or the usual ones.

    Raises:
        ValueError: a configuration of something that no option here gives; it names that.
    """
    if config is None:
        config = _usual(model, shapes)
    else:
        refused = _refused(model, config)
        if refused:
            raise ValueError(
                f"no {model} here is what the configuration tells: {', '.join(refused)}"
            )
    backbone, head = config["backbone"], _heads(config)[-1]
    dropout = next((head[name] for name in _DROPOUT if name in head), 0.1)
    options = {
        "align_corners": head.get("align_corners", False),
        "dropout": max(dropout, 0),
        **({} if _type(backbone) == "HRNet" else _dilated(backbone)),
    }
    if config.get("auxiliary_head") is not None:
        options["auxiliary_dilation"] = config["auxiliary_head"].get("dilation", 1)
    for theirs, (default, ours) in _HEADS[model].options.items():
        options[ours] = head.get(theirs, default)
    if model == "deeplabv3":
        options["dilations"] = options["dilations"][1:]
    return {name: value for name, value in options.items() if value is not None}


def _usual(model: str, shapes: Shapes) -> dict[str, Any]:
    """What most configurations of the network have."""
    strides = _HEADS[model].strides
    backbone = {
        "type": "ResNet",
        "strides": strides,
        "dilations": _DILATIONS[_STRIDES[strides]],
    }
    hrnet = shapes.has("backbone.stage4")
    return {
        "backbone": {"type": "HRNet"} if hrnet else backbone | {"contract_dilation": True},
        "decode_head": {**_HEADS[model].usual, "dropout_ratio": -1 if hrnet else 0.1},
        "auxiliary_head": {} if shapes.has("auxiliary_head") else None,
    }


def _dilated(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Strides and dilations of a ResNet."""
    stride = _STRIDES[backbone.get("strides", (1, 2, 2, 2))]
    dilations, grid = backbone.get("dilations", (1, 1, 1, 1)), backbone.get("multi_grid")
    if grid is not None:  # there in the place of the stage's dilation, here its factors
        dilations = (*dilations[:3], 1)
    return {
        "output_stride": stride,
        "stage_dilations": None if dilations == _DILATIONS[stride] else dilations,
        "contract_dilation": backbone.get("contract_dilation", False),
        "multi_grid": grid,
    }


def _heads(config: Mapping[str, Any]) -> tuple:
    heads = config["decode_head"]
    return heads if isinstance(heads, tuple) else (heads,)


def _type(part: Mapping[str, Any]) -> object:
    """The class, without its module or registry."""
    name = part.get("type")
    return name.rpartition(".")[2] if isinstance(name, str) else name


def _refused(model: str, config: Mapping[str, Any]) -> list[str]:
    """What a configuration has that no option here gives, as ``part.argument=value``."""
    values = {"type": ("EncoderDecoder", "CascadeEncoderDecoder"), "neck": (None,)}
    refused = _differing("model", config, values, _OF_MODELS)
    parts = {"backbone": config.get("backbone")}
    heads = _heads(config) if "decode_head" in config else (None,)
    parts |= {f"decode_head[{i}]" if heads[1:] else "decode_head": x for i, x in enumerate(heads)}
    if config.get("auxiliary_head") is not None:
        parts["auxiliary_head"] = config["auxiliary_head"]
    wrong = [
        f"{len(part)} heads in {name}" if isinstance(part, tuple) else f"{name}={part!r}"
        for name, part in parts.items()
        if not isinstance(part, dict)
    ]
    if len(heads) != (2 if model == "ocrnet" else 1):
        wrong.append(f"{len(heads)} decode heads")
    if wrong:
        return refused + wrong
    hrnet = _type(parts["backbone"]) == "HRNet"
    align_corners = (False,) if hrnet else (heads[-1].get("align_corners", False),)
    for name, part in parts.items():
        if name == "backbone":
            refused += _refused_backbone(part, hrnet)
            continue
        main = part is heads[-1]
        head = _HEADS[model] if main else _FCN
        indices: tuple = (3, -1) if main else (2, -2)
        if main:
            indices = {"ann": ((2, 3),), "upernet": ((0, 1, 2, 3),)}.get(model, indices)
        told: dict[str, tuple] = {"align_corners": align_corners} if hrnet or not main else {}
        if hrnet:
            told |= {"in_index": ((0, 1, 2, 3),), "input_transform": ("resize_concat",)}
        else:
            told |= {"in_index": indices, "input_transform": (None,)}
        if name == "decode_head[0]":
            told |= _UNDILATED
        told |= {"type": (head.type,), **head.values, **_HEAD}
        refused += _differing(name, part, told, _OF_HEADS | head.options.keys())
        refused += _refused_norm(name, part.get("norm_cfg"))
        refused += _unread(name, part, {"align_corners", *_DROPOUT, *head.options})
    first = heads[-1].get("dilations", (1,)) if model == "deeplabv3" else (1,)
    if not isinstance(first, tuple) or first[:1] != (1,):
        refused.append(f"decode_head.dilations={first!r}")
    return refused


def _refused_backbone(backbone: Mapping[str, Any], hrnet: bool) -> list[str]:
    if hrnet:
        refused = _differing("backbone", backbone, _HRNET | {"type": ("HRNet",)}, _OF_HRNETS)
    else:
        values = _RESNET | {"type": ("ResNet", "ResNetV1c", "ResNetV1d", "ResNeSt")}
        refused = _differing("backbone", backbone, values, _OF_RESNETS)
        strides = backbone.get("strides", (1, 2, 2, 2))
        if strides not in list(_STRIDES):
            refused.append(f"backbone.strides={strides!r}")
        refused += _unread("backbone", backbone, {"contract_dilation", "dilations", "multi_grid"})
    return refused + _refused_norm("backbone", backbone.get("norm_cfg", {"type": "BN"}))


def _differing(
    name: str, part: Mapping[str, Any], values: Mapping[str, tuple], others: set[str]
) -> list[str]:
    """Arguments of a part with other values than these, or that nothing here is known of."""
    known = others | values.keys() | {"norm_cfg", _DELETE}
    if _type(part) not in values["type"]:
        return [f"{name}.type={part.get('type')!r}"]  # whose arguments are others
    rest = {argument: allowed for argument, allowed in values.items() if argument != "type"}
    given = {argument: part.get(argument, allowed[0]) for argument, allowed in rest.items()}
    wrong = [argument for argument, value in given.items() if value not in values[argument]]
    wrong += [argument for argument in part if argument not in known]
    return [f"{name}.{argument}={part.get(argument)!r}" for argument in wrong]


def _unread(name: str, part: Mapping[str, Any], options: set[str]) -> list[str]:
    """Options whose values are no numbers."""
    numbers = {argument: value for argument, value in part.items() if argument in options}
    return [
        f"{name}.{argument}={value!r}"
        for argument, value in numbers.items()
        for each in [value if isinstance(value, tuple) else (value,)]
        if not all(x is None or isinstance(x, (int, float)) for x in each)
    ]


def _refused_norm(name: str, norm: object) -> list[str]:
    """Batch norms alone, of torch's epsilon; how they are trained says nothing."""
    if isinstance(norm, dict) and _type(norm) in ("BN", "BN2d", "SyncBN", "MMSyncBN"):
        trained = {"type", "requires_grad", "momentum", _DELETE}
        if norm.get("eps", 1e-5) == 1e-5 and norm.keys() <= trained | {"eps"}:
            return []
    return [f"{name}.norm_cfg={norm!r}"]
