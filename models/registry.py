# SPDX-License-Identifier: Apache-2.0
"""Networks by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from ctxops._checks import check_flags, check_known, check_sizes
from ctxops.models._timm import require_timm
from ctxops.models.base import SegmentationNetwork
from ctxops.models.encoder import Encoder

Builder = Callable[..., SegmentationNetwork]


class _Entry(NamedTuple):
    build: Builder
    backbone: str
    output_stride: int


_entries: dict[str, _Entry] = {}

# What every builder may hand on to SegmentationNetwork as it comes.
_COMMON = {"auxiliary_channels", "auxiliary_bias", "dropout", "align_corners"}


def register_model(
    name: str, *, backbone: str = "resnet101s", output_stride: int = 8
) -> Callable[[Builder], Builder]:
    """Makes a builder known by a name, with the backbone and stride that are its default.

    A builder takes an :class:`Encoder`, ``num_classes``, ``norm_layer`` and options of its own, all
    by keyword and with defaults, and returns the network. ``**common`` are options of
    :class:`SegmentationNetwork`.
    """

    def register(build: Builder) -> Builder:
        _entries[name] = _Entry(build, backbone, output_stride)
        return build

    return register


def list_models() -> list[str]:
    """The names that :func:`create_model` knows."""
    return sorted(_entries)


def model_options(name: str) -> dict[str, object]:
    """The options of a network beyond those of :func:`create_model`, with their defaults."""
    check_known("model", name, _entries)
    parameters = dict(inspect.signature(_entries[name].build).parameters)
    own = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    own.pop("norm_layer", None)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        base = inspect.signature(SegmentationNetwork).parameters
        own |= {name: base[name].default for name in sorted(_COMMON - own.keys())}
    return own


def create_model(
    name: str,
    backbone: str | None = None,
    num_classes: int = 19,
    *,
    output_stride: int | None = None,
    pretrained: bool = False,
    in_channels: int = 3,
    multi_grid: Sequence[int] | None = None,
    ceil_mode: bool = False,
    contract_dilation: bool = True,
    dilate_both: bool = True,
    bilinear_branches: bool = False,
    backbone_options: Mapping[str, object] | None = None,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    sync_batchnorm: bool = False,
    **options,
) -> SegmentationNetwork:
    """A network by its name: ``create_model("ann", backbone="resnet101s", num_classes=19)``.

    Args:
        name: one of :func:`list_models`.
        backbone: a timm model; None: the network's own, as in its paper.
        num_classes: K.
        output_stride: of the backbone's last map; None: the network's own.
        pretrained: loads timm's weights into the backbone.
        in_channels, multi_grid, ceil_mode, contract_dilation, dilate_both, bilinear_branches: as in
            :class:`Encoder`.
        backbone_options: further arguments of ``timm.create_model``.
        norm_layer: makes the norms of everything behind the backbone from a number of channels.
        sync_batchnorm: replaces every batch norm, the backbone's too, by an ``nn.SyncBatchNorm``.
        options: the network's own, and ``auxiliary_channels`` (0: no auxiliary head),
            ``auxiliary_bias``, ``dropout``, ``align_corners`` where it has them. The builder's
            docstring explains them, :func:`model_options` gives their defaults.

    The backbone starts as timm starts it, classifiers with a standard deviation of 0.01, and all
    between as its modules say.

    Raises:
        ImportError: timm is missing.
        TypeError, ValueError: an unknown model, backbone or option (the closest name is given), an
            output stride that the backbone does not have, values that its parts refuse.
    """
    known = model_options(name)
    for option in options:
        check_known(f"option of model {name!r}:", option, known)
    check_flags(
        sync_batchnorm=sync_batchnorm,
        **{option: x for option, x in options.items() if isinstance(known[option], bool)},
    )
    check_sizes(num_classes=num_classes)
    entry = _entries[name]
    encoder = Encoder(
        entry.backbone if backbone is None else backbone,
        entry.output_stride if output_stride is None else output_stride,
        pretrained=pretrained,
        in_channels=in_channels,
        multi_grid=multi_grid,
        ceil_mode=ceil_mode,
        contract_dilation=contract_dilation,
        dilate_both=dilate_both,
        bilinear_branches=bilinear_branches,
        options=backbone_options,
    )
    network = entry.build(encoder, num_classes, norm_layer=norm_layer, **options)
    if sync_batchnorm:
        # That of torch would drop the activations inside timm's norms.
        network = require_timm().layers.convert_sync_batchnorm(network)
    return network
