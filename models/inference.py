# SPDX-License-Identifier: Apache-2.0
"""From an image to the class of every pixel: whole, in windows, at several scales, in tiles."""

import copy
import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops._checks import FLOATING, check_choice, check_flags, check_sizes
from ctxops.models.base import SegmentationNetwork
from ctxops.models.encoder import Encoder

Context = Literal["image", "window"]
Average = Literal["probabilities", "logits"]
# Rows whose scores are resized at once.
_BAND = 64
# Sides of the images on which a receptive field is measured.
_PROBES = (256, 512, 1024, 2048, 4096)
_PROBE_WIDTH = 32


@dataclasses.dataclass(frozen=True)
class Inference:
    """The options of :func:`segment`.

    Attributes:
        window: side of the part of the image that is looked at at once; None: the whole image.
        context: with a window, what each pixel sees. "image": the encoder goes through the image in
            tiles, and the decoder sees the maps of all of them. "window": the window alone, as in
            the papers' sliding evaluation.
        overlap: of neighbouring windows, a share of their side, with context "window".
        halo: rows and columns around each tile that the encoder sees too, with context "image".
            None: as many as its receptive field needs, so that the maps are those of the whole
            image.
        scales: of the image, one pass for each.
        flip: every pass once more on the mirror image.
        average: what is averaged over windows, scales and mirror images.
    """

    window: int | None = None
    context: Context = "image"
    overlap: float = 1 / 3
    halo: int | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    average: Average = "probabilities"

    def __post_init__(self) -> None:
        check_choice("context", self.context, Context)
        check_choice("average", self.average, Average)
        check_flags(flip=self.flip)
        if self.window is not None:
            check_sizes(window=self.window)
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be at least 0 and below 1, got {self.overlap}")
        if self.halo is not None and (not isinstance(self.halo, int) or self.halo < 0):
            raise ValueError(f"halo must be an integer of at least 0, got {self.halo!r}")
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales must be numbers above 0, got {self.scales!r}")


@torch.no_grad()
def segment(network: SegmentationNetwork, image: Tensor, **options) -> Tensor:
    """The class of every pixel.

    Args:
        network: in evaluation mode.
        image: as it is in a file, see :func:`standardise`.
        options: :class:`Inference`.

    The scores of all passes are resized to the image and averaged a band of rows at a time, so that
    the scores of all pixels are never held, except with ``context="window"`` and by networks that
    have an upsampling of their own (``gcn``). In tiles the decoder still works on the maps of the
    whole image, and needs the memory for that.

    Shape: ``(B, in_channels, H, W)`` -> ``(B, H, W)``, uint8; int64 for more than 256 classes.

    Raises:
        TypeError, ValueError: as :class:`Inference` and :func:`standardise`; a network in training
            mode; a window larger than the image, with context "window"; an encoder whose maps
            depend on the whole image, in tiles without ``halo``.
    """
    inference = Inference(**options)
    if network.training:
        raise ValueError("network must be in evaluation mode: call network.eval()")
    x = standardise(image, network)
    size = x.shape[2:]
    probabilities = inference.average == "probabilities"
    passes = []
    for scale, mirrored in itertools.product(inference.scales, (False, True)[: 1 + inference.flip]):
        scaled = x
        if scale != 1:
            sides = [max(1, round(side * scale)) for side in size]
            scaled = F.interpolate(x, sides, mode="bilinear", align_corners=False, antialias=True)
        scores = _scores(network, scaled.flip(-1) if mirrored else scaled, inference)
        passes.append(scores.flip(-1) if mirrored else scores)
    # Of one pass the order of the scores is all that counts; those of windows are averages already.
    averaged = len(passes) == 1 or (inference.context == "window" and inference.window is not None)
    activate = _softmax if probabilities and not averaged else _identity
    return _label(passes, size, network.align_corners, activate)


def standardise(image: Tensor, network: SegmentationNetwork) -> Tensor:
    """An image as the weights of timm's backbones want it: less their mean, over their deviation.

    Shape: ``(B, in_channels, H, W)``, uint8, or floating in [0, 1] -> the same, in the dtype and on
        the device of the network. A backbone for other channels than red, green and blue: mean and
        deviation 0.5.

    Raises:
        TypeError: an image of another dtype.
    """
    if image.dtype != torch.uint8 and image.dtype not in FLOATING:
        raise TypeError(f"image must be uint8, or floating in [0, 1], got {image.dtype}")
    parameter = next(network.parameters())
    image = image.to(parameter.device, parameter.dtype) / (255 if image.dtype == torch.uint8 else 1)
    known = getattr(network.encoder.body, "pretrained_cfg", None) or {}
    mean, deviation = known.get("mean", ()), known.get("std", ())
    if len(mean) != network.encoder.in_channels:
        mean = deviation = (0.5,) * network.encoder.in_channels
    mean, deviation = (image.new_tensor(x)[:, None, None] for x in (mean, deviation))
    return (image - mean) / deviation


def _identity(x: Tensor) -> Tensor:
    return x


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(1)


def _scores(network: SegmentationNetwork, x: Tensor, inference: Inference) -> Tensor:
    """Logits at the decoder's size or the image's; in windows what is averaged, at the image's."""
    if inference.window is None:
        maps = network.encoder(x)
    elif inference.context == "image":
        maps = encode_in_tiles(network.encoder, x, inference.window, inference.halo)
    else:
        activate = _softmax if inference.average == "probabilities" else _identity
        return _slide(network, x, inference.window, inference.overlap, activate)
    logits = network.predict(maps).logits
    if type(network)._resize is not SegmentationNetwork._resize:
        logits = network._resize(logits, x.shape[2:])
    return logits


def _slide(
    network: SegmentationNetwork,
    x: Tensor,
    window: int,
    overlap: float,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """The average over the windows that see each pixel; the last ones end with the image."""
    height, width = x.shape[2:]
    if window > min(height, width):
        raise ValueError(
            f"window must be at most the sides of the (scaled) image, {(height, width)}, "
            f"got {window}"
        )
    step = max(1, round(window * (1 - overlap)))
    rows, columns = ([*range(0, side - window, step), side - window] for side in (height, width))
    total, count = x.new_zeros(()), x.new_zeros((1, 1, height, width))
    for top, left in itertools.product(rows, columns):
        part = (..., slice(top, top + window), slice(left, left + window))
        scores = activate(network(x[part]).logits)
        if total.dim() == 0:
            total = scores.new_zeros((*scores.shape[:2], height, width))
        total[part] += scores
        count[part] += 1
    return total / count


def encode_in_tiles(
    encoder: Encoder, image: Tensor, tile: int, halo: int | None = None
) -> list[Tensor]:
    """The encoder's maps of the whole image, made of those of tiles.

    Args:
        encoder: in evaluation mode.
        image: ``(B, in_channels, H, W)``.
        tile: side of the tiles, rounded up to a multiple of the largest stride.
        halo: what the encoder sees around each tile, rounded up likewise; None:
            :func:`receptive_radius`.

    With a halo of at least :func:`receptive_radius` the maps are those of the whole image, to
    rounding. With less they deviate near the edges of the tiles, and everywhere where the encoder
    pools the whole image (squeeze-and-excitation, group norm, attention).

    Raises:
        ValueError: no halo given, and no size of it suffices.
    """
    if halo is None:
        halo = receptive_radius(encoder)
    unit = math.lcm(encoder.multiple, *encoder.strides)
    tile, halo = (-(-side // unit) * unit for side in (tile, halo))
    height, width = image.shape[2:]
    rows = []
    for y in range(0, height, tile):
        columns = []
        for x in range(0, width, tile):
            top, left = max(y - halo, 0), max(x - halo, 0)
            bottom, right = y + tile, x + tile
            maps = encoder(image[:, :, top : bottom + halo, left : right + halo])
            columns.append(
                [
                    # What the last tile has beyond its side belongs to the image, rounded up.
                    part[
                        :,
                        :,
                        (y - top) // s : None if bottom >= height else (bottom - top) // s,
                        (x - left) // s : None if right >= width else (right - left) // s,
                    ]
                    for part, s in zip(maps, encoder.strides, strict=True)
                ]
            )
        rows.append([torch.cat(level, dim=3) for level in zip(*columns, strict=True)])
    return [torch.cat(level, dim=2) for level in zip(*rows, strict=True)]


_radii: weakref.WeakKeyDictionary[Encoder, int] = weakref.WeakKeyDictionary()


def receptive_radius(encoder: Encoder) -> int:
    """How far from a position, in pixels, the encoder's maps see.

    Measured by a gradient, on a copy with positive weights, in which no path cancels another.

    Raises:
        ValueError: an encoder whose positions see the whole image, however large, whose attention
            is bound to windows, or whose padding depends on the image's size, as TensorFlow's.
    """
    if encoder not in _radii:
        _radii[encoder] = _measure_radius(encoder)
    return _radii[encoder]


@torch.inference_mode(False)
@torch.enable_grad()
def _measure_radius(encoder: Encoder) -> int:
    bound = any(map(_is_bound, encoder.modules()))
    probe = copy.deepcopy(encoder).to("cpu", torch.float64).eval()
    generator = torch.Generator().manual_seed(0)

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5

    with torch.no_grad():
        for name, tensor in itertools.chain(probe.named_parameters(), probe.named_buffers()):
            if name.endswith(("bias", "running_mean")):
                tensor.zero_()
            elif tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
                tensor.copy_(positive(*tensor.shape) / fan_in)
    for side in () if bound else _PROBES:
        # So small that no activation is saturated.
        image = positive(1, encoder.in_channels, side, _PROBE_WIDTH).mul_(1e-6).requires_grad_()
        middle = side // 2
        maps = probe(image)
        centre = sum(x[:, :, middle // s].sum() for x, s in zip(maps, encoder.strides, strict=True))
        (gradient,) = torch.autograd.grad(centre, image)
        seen = gradient.abs().amax((0, 1, 3)).nonzero()
        first, last = int(seen[0]), int(seen[-1])
        if first > 0 and last < side - 1:
            return max(middle - first, last - middle)
    raise ValueError(
        f"the maps of backbone {encoder.name!r} depend on the whole image or on where a tile "
        f"begins: give a halo to approximate them in tiles, or no window"
    )


def _is_bound(module: nn.Module) -> bool:
    """Does the layer see another neighbourhood in a tile than in the image, however wide the halo?

    Attention has windows of the whole image, and a stride with "same" padding begins where the
    image's size says.
    """
    name, stride = type(module).__name__, getattr(module, "stride", 1)
    return "Attention" in name or ("Same" in name and stride not in (1, (1, 1), [1, 1]))


def _label(
    passes: Sequence[Tensor],
    size: Sequence[int],
    align_corners: bool,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """The class with the largest sum of scores at each pixel, a band of rows at a time."""
    first, (height, width) = passes[0], size
    dtype = torch.uint8 if first.shape[1] <= 256 else torch.int64
    labels = torch.empty((first.shape[0], height, width), dtype=dtype, device=first.device)
    for top in range(0, height, _BAND):
        band = slice(top, min(top + _BAND, height))
        scores = [activate(_resize_rows(x, size, band, align_corners)) for x in passes]
        labels[:, band] = functools.reduce(torch.add, scores).argmax(1)
    return labels


def _resize_rows(x: Tensor, size: Sequence[int], band: slice, align_corners: bool) -> Tensor:
    """The rows ``band`` of a map that is resized bilinearly to ``size``."""
    (height, width), source = size, x.shape[2]
    if tuple(x.shape[2:]) == (height, width):
        return x[:, :, band]
    row = torch.arange(band.start, band.stop, device=x.device, dtype=torch.float64)
    if align_corners:
        position = row * ((source - 1) / max(height - 1, 1))
    else:
        position = ((row + 0.5) * (source / height) - 0.5).clamp_min(0)
    low = position.long().clamp_max(source - 1)
    high = (low + 1).clamp_max(source - 1)
    rows = torch.lerp(x[:, :, low], x[:, :, high], (position - low).to(x.dtype)[:, None])
    return F.interpolate(rows, (len(row), width), mode="bilinear", align_corners=align_corners)
