# SPDX-License-Identifier: Apache-2.0
"""What all networks share: encoder, decoder, classifier, and what a forward returns."""

import dataclasses
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops._checks import check_kernel_size, check_maps, check_sizes
from ctxops.models.encoder import Encoder
from ctxops.nn.bands import reach
from ctxops.nn.cbr import cbr


@dataclasses.dataclass(eq=False)
class SegmentationOutput(dict):
    """What a network returns: a dataclass, and a dictionary of the attributes that hold something.

    Tools that look into a network's output know dictionaries: ``output["logits"]``, ``**output``.
    As in other libraries an integer or a slice counts the values: ``output[0]`` are the logits. The
    first argument may be another output's items, as those who rebuild a dictionary give them.

    Attributes:
        logits: ``(B, num_classes, H, W)``, at the size of the image.
        auxiliary: in training the logits of further heads, by name, of the same shape; else empty.
            What is put into an empty one is no item: assign a dictionary that holds something.
        features: in training what the network's own loss or memory needs, ``(B, C, h, w)``; the
            network says what it is.
    """

    logits: Tensor
    auxiliary: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    features: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.logits, (Mapping, ItemsView, Iterator, list)):
            items, self.auxiliary, self.features = dict(self.logits), {}, None
            for name, value in items.items():
                self[name] = value

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if value is None or (isinstance(value, dict) and not value):
            super().pop(name, None)
        elif name in _FIELDS:  # other names are attributes alone
            super().__setitem__(name, value)

    def __setitem__(self, name: str, value: object) -> None:
        if name not in _FIELDS:
            raise KeyError(f"{name!r}; an output has {', '.join(_FIELDS)}")
        setattr(self, name, value)

    def __delitem__(self, name: str) -> None:
        self.pop(name)

    def pop(self, name: str, *default: object) -> object:
        value = super().pop(name, *default)
        if name in _FIELDS:
            setattr(self, name, {} if name == "auxiliary" else None)
        return value

    def __ior__(  # type: ignore[override, misc]
        self, items: Mapping | Iterable[tuple[str, object]]
    ) -> "SegmentationOutput":
        self.update(items)
        return self

    # A dictionary's own would change the items and leave the attributes.
    update, setdefault = MutableMapping.update, MutableMapping.setdefault
    popitem, clear = MutableMapping.popitem, MutableMapping.clear

    def __getitem__(self, key: str | int | slice) -> object:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        """The values of what holds something, the logits first."""
        return tuple(self[name] for name in _FIELDS if name in self)


_FIELDS = tuple(field.name for field in dataclasses.fields(SegmentationOutput))

torch.export.register_dataclass(
    SegmentationOutput, serialized_type_name="ctxops.SegmentationOutput"
)


class Classifier(nn.Sequential):
    """Dropout of whole channels, and the convolution to the classes."""

    def __init__(
        self, channels: int, num_classes: int, dropout: float, kernel_size: int = 1
    ) -> None:
        check_kernel_size(kernel_size)
        convolution = nn.Conv2d(channels, num_classes, kernel_size, padding=kernel_size // 2)
        super().__init__(nn.Dropout2d(dropout), convolution)
        nn.init.normal_(convolution.weight, std=0.01)
        nn.init.zeros_(convolution.bias)


class FCNHead(nn.Sequential):
    """Convolution, norm, ReLU, classifier: the deep supervision of most networks."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        *,
        dropout: float,
        norm_layer: Callable[[int], nn.Module],
        kernel_size: int = 3,
        dilation: int = 1,
        bias: bool = False,
    ) -> None:
        check_kernel_size(kernel_size)
        check_sizes(dilation=dilation)
        super().__init__(
            cbr(in_channels, channels, kernel_size, norm_layer, dilation=dilation, bias=bias),
            Classifier(channels, num_classes, dropout),
        )


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What the builder of a network returns: the part between encoder and classifier.

    Attributes:
        module: takes the maps of ``levels``, one argument each, to ``(B, channels, h, w)``.
        channels: of that map.
        levels: which of the encoder's maps it takes; negative ones count from the last.
        parts: further arguments of the network's class, by name.
    """

    module: nn.Module
    channels: int
    levels: Sequence[int] = (-1,)
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class SegmentationNetwork(nn.Module):
    """An image's maps, one map of context made of them, and the scores of its positions.

    Args:
        encoder: gives the maps.
        decoder: takes the maps of ``levels``, one argument each, to ``(B, channels, h, w)``.
        channels: of the decoder's map.
        num_classes: K.
        levels: which of the encoder's maps the decoder takes; negative ones count from the last.
        auxiliary_channels: width of the auxiliary head, a :class:`FCNHead` on the last but one of
            the encoder's maps (on the only one, where there is one); 0: no such head.
        auxiliary_dilation, auxiliary_bias: dilation of, and a bias in, the head's 3 x 3
            convolution.
        dropout: of the classifiers.
        align_corners: of the resize of all logits to the image.
        norm_layer: makes a norm from a number of channels.
        classifier: from the decoder's map to the scores; None: :class:`Classifier`.

    Shape: ``(B, in_channels, H, W)`` of any size -> :class:`SegmentationOutput`.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: nn.Module,
        channels: int,
        num_classes: int,
        *,
        levels: Sequence[int] = (-1,),
        auxiliary_channels: int = 512,
        auxiliary_dilation: int = 1,
        auxiliary_bias: bool = False,
        dropout: float = 0.1,
        align_corners: bool = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        classifier: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_sizes(channels=channels, num_classes=num_classes)
        self.levels, self.num_classes, self.align_corners = levels, num_classes, align_corners
        self.encoder, self.decoder = encoder, decoder
        self.classifier = (
            Classifier(channels, num_classes, dropout) if classifier is None else classifier
        )
        self.auxiliary = None
        if auxiliary_channels:
            check_sizes(auxiliary_channels=auxiliary_channels)
            self.auxiliary = FCNHead(
                encoder.channels[-2:][0],
                auxiliary_channels,
                num_classes,
                dropout=dropout,
                norm_layer=norm_layer,
                dilation=auxiliary_dilation,
                bias=auxiliary_bias,
            )

    def forward(self, image: Tensor) -> SegmentationOutput:
        check_maps(image=(image, self.encoder.in_channels))
        maps = self.encoder(image)
        output = self.predict(maps)
        if self.training and self.auxiliary is not None:
            output.auxiliary["auxiliary"] = self.auxiliary(maps[-2:][0])
        size = image.shape[2:]
        auxiliary = {name: self._resize(x, size) for name, x in output.auxiliary.items()}
        return SegmentationOutput(self._resize(output.logits, size), auxiliary, output.features)

    def reach(self) -> float:
        """What :meth:`predict` sees around a position, see :func:`ctxops.nn.bands.reach`."""
        return reach(self.decoder, self.classifier)

    def predict(self, maps: Sequence[Tensor]) -> SegmentationOutput:
        """The logits at the size of the decoder's map, before the resize."""
        y = self.decoder(*(maps[level] for level in self.levels))
        return SegmentationOutput(self.classifier(y))

    def _resize(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners)


class LogitsOnly(nn.Module):
    """A network whose forward returns the logits alone, a tensor: for deployment.

    Shape: ``(B, in_channels, H, W)`` -> ``(B, num_classes, H, W)``.
    """

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image).logits
