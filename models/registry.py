# SPDX-License-Identifier: Apache-2.0
"""Networks by name: their builders, and how a network is assembled from what these return."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ctxops._checks import check_flags, check_known, check_sizes
from ctxops.models._timm import require_timm
from ctxops.models.base import Decoder, SegmentationNetwork
from ctxops.models.encoder import Encoder

Builder = TypeVar("Builder", bound=Callable[..., Decoder])


class _Entry(NamedTuple):
    build: Callable[..., Decoder]
    network: type[SegmentationNetwork]
    backbone: str
    output_stride: int
    defaults: Mapping[str, Any]  # of the network's own arguments, where its class has others


_entries: dict[str, _Entry] = {}

# The arguments of a network's class that are options of create_model.
_COMMON = (
    "align_corners",
    "auxiliary_bias",
    "auxiliary_channels",
    "auxiliary_dilation",
    "dropout",
)


def register_model(
    name: str,
    *,
    backbone: str = "resnet101s",
    output_stride: int = 8,
    network: type[SegmentationNetwork] = SegmentationNetwork,
    **defaults: object,
) -> Callable[[Builder], Builder]:
    """Makes a builder known by a name; the builder stays as it is.

    A builder takes an :class:`Encoder`, ``num_classes`` if it names it, and by keyword, with
    defaults, ``norm_layer`` and its options. It returns a :class:`Decoder`, from which
    :func:`create_model` assembles the network.

    Args:
        name: of the network.
        backbone, output_stride: the network's own, as in its paper.
        network: the class that encoder and decoder are put into. Its arguments ``align_corners``,
            ``auxiliary_bias``, ``auxiliary_channels``, ``auxiliary_dilation`` and ``dropout`` are
            options of the network, as far as it has them. What a builder names too, both are given.
        defaults: of these, where they are not the class's; a builder's own come first.

    Raises:
        ValueError: defaults of anything else.
    """
    for option in defaults:
        check_known("default", option, _COMMON)

    def register(build: Builder) -> Builder:
        _entries[name] = _Entry(build, network, backbone, output_stride, defaults)
        return build

    return register


def list_models() -> list[str]:
    """The names that :func:`create_model` knows."""
    return sorted(_entries)


def model_options(name: str) -> dict[str, Any]:
    """The options of a network beyond those of :func:`create_model`, with their defaults."""
    check_known("model", name, _entries)
    entry = _entries[name]
    parameters = inspect.signature(entry.build).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    options.pop("norm_layer", None)
    of_network = _parameters(entry.network)
    defaults = {n: of_network[n].default for n in _COMMON if n in of_network}
    return options | {n: x for n, x in {**defaults, **entry.defaults}.items() if n not in options}


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Those of a builder or a network's class; ``**options`` are :class:`SegmentationNetwork`'s."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return {**inspect.signature(SegmentationNetwork).parameters, **parameters}
    return parameters


def _taken(function: Callable, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function has."""
    return {name: arguments[name] for name in arguments.keys() & _parameters(function).keys()}


def create_model(
    name: str,
    backbone: str | Encoder | None = None,
    num_classes: int = 19,
    *,
    output_stride: int | None = None,
    pretrained: bool = False,
    in_channels: int = 3,
    stage_dilations: Sequence[int] | None = None,
    multi_grid: Sequence[int] | None = None,
    ceil_mode: bool = False,
    contract_dilation: bool = True,
    dilate_both: bool = True,
    shortcut_pools: bool = True,
    bilinear_branches: bool = False,
    backbone_options: Mapping[str, Any] | None = None,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    sync_batchnorm: bool = False,
    **options,
) -> SegmentationNetwork:
    """A network by its name: ``create_model("ann", backbone="resnet101s", num_classes=19)``.

    Args:
        name: one of :func:`list_models`.
        backbone: a timm model; None: the network's own, as in its paper. Or an :class:`Encoder`,
            which becomes part of the network as it is and has had its arguments.
        num_classes: K.
        output_stride: of the backbone's last map; None: the network's own.
        pretrained: loads timm's weights into the backbone.
        in_channels, stage_dilations, multi_grid, ceil_mode, contract_dilation, dilate_both,
            shortcut_pools, bilinear_branches: as in :class:`Encoder`.
        backbone_options: further arguments of ``timm.create_model``.
        norm_layer: makes the norms of everything behind the backbone from a number of channels.
        sync_batchnorm: replaces every batch norm, the backbone's too, by an ``nn.SyncBatchNorm``.
        options: the network's own, and ``auxiliary_channels`` (0: no auxiliary head),
            ``auxiliary_bias``, ``auxiliary_dilation``, ``dropout``, ``align_corners`` where it has
            them. The builder's
            docstring explains them, :func:`model_options` gives their defaults.

    The backbone starts as timm starts it, classifiers with a standard deviation of 0.01, and all
    between as its modules say.

    Raises:
        ImportError: timm is missing.
        TypeError, ValueError: an unknown model, backbone or option (the closest name is given), an
            output stride that the backbone does not have, an argument of the backbone besides an
            :class:`Encoder`, values that its parts refuse.
    """
    values = model_options(name)
    for option in options:
        check_known(f"option of model {name!r}:", option, values)
    check_flags(
        sync_batchnorm=sync_batchnorm,
        **{option: x for option, x in options.items() if isinstance(values[option], bool)},
    )
    check_sizes(num_classes=num_classes)
    values |= options
    entry = _entries[name]
    encoder = _encoder(
        entry,
        backbone,
        output_stride=output_stride,
        pretrained=pretrained,
        in_channels=in_channels,
        stage_dilations=stage_dilations,
        multi_grid=multi_grid,
        ceil_mode=ceil_mode,
        contract_dilation=contract_dilation,
        dilate_both=dilate_both,
        shortcut_pools=shortcut_pools,
        bilinear_branches=bilinear_branches,
        backbone_options=backbone_options,
    )
    shared = {"num_classes": num_classes, "norm_layer": norm_layer}
    decoder = entry.build(encoder, **_taken(entry.build, values | shared))
    if not isinstance(decoder, Decoder):
        raise TypeError(
            f"the builder of {name!r} must return a Decoder, got {type(decoder).__name__}"
        )
    shared |= {option: values[option] for option in _COMMON if option in values}
    network = entry.network(
        encoder,
        decoder.module,
        decoder.channels,
        **_taken(entry.network, shared | {"levels": decoder.levels}),
        **decoder.parts,
    )
    if sync_batchnorm:
        # That of torch would drop the activations inside timm's norms.
        network = require_timm().layers.convert_sync_batchnorm(network)
    return network


def _encoder(entry: _Entry, backbone: str | Encoder | None, **arguments: Any) -> Encoder:
    """The encoder that was given, or one made of these arguments of :func:`create_model`."""
    if not isinstance(backbone, Encoder):
        name = entry.backbone if backbone is None else backbone
        if arguments["output_stride"] is None:
            arguments["output_stride"] = entry.output_stride
        return Encoder(name, options=arguments.pop("backbone_options"), **arguments)
    defaults = inspect.signature(create_model).parameters
    for argument, value in arguments.items():
        if value != defaults[argument].default:
            raise ValueError(
                f"{argument} is an argument of the Encoder that is given as backbone: it must not "
                f"be given here, got {value!r}"
            )
    return backbone
