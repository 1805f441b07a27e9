# SPDX-License-Identifier: Apache-2.0
"""From an image to the class of every pixel: whole, in windows, at several scales, in tiles."""

import copy
import dataclasses
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxops import _layout
from ctxops._checks import FLOATING, check_choice, check_flags, check_sizes
from ctxops.models.base import SegmentationNetwork
from ctxops.models.encoder import Encoder
from ctxops.nn.bands import map_in_bands, reach
from ctxops.nn.resize import resize_rows

Context = Literal["image", "window"]
Average = Literal["probabilities", "logits"]
# Scores that are resized to the image at once.
_BAND = 1 << 20
# Rows that the decoder takes at once at least.
_LEAST_ROWS = 8
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
def segment(
    network: SegmentationNetwork, image: Tensor, *, probabilities: Tensor | None = None, **options
) -> Tensor:
    r"""The class of every pixel.

    Args:
        network: in evaluation mode.
        image: as it is in a file, see :func:`standardise`.
        probabilities: is filled with those of the classes, ``(B, K, H, W)``; a memory-mapped file
            will do.
        options: :class:`Inference`.

    Memory beside image and result, with a window and the context of the image: for each pixel

    .. math::
        4 \sum_l C_l / s_l^2 + 8 K / s^2 \text{ bytes}

    for the maps that the decoder takes, of :math:`C_l` channels and stride :math:`s_l`, and for the
    logits at the decoder's stride s; and what encoder and decoder take for an image of
    ``window + 2 * halo`` pixels a side. The scores of the image's pixels are never held. The
    decoder goes through its maps in bands of rows where its context is a sum over positions, and
    sees the whole maps at once otherwise (:func:`ctxops.nn.bands.reach`). Networks with an
    upsampling of their own (``gcn``) hold their scores. With ``context="window"`` it is the scores
    of as many rows as two windows have.

    Shape: ``(B, in_channels, H, W)`` -> ``(B, H, W)``, uint8; int64 for more than 256 classes.

    Raises:
        TypeError, ValueError: as :class:`Inference` and :func:`standardise`; a network in training
            mode; probabilities of another shape; a window larger than the image, with context
            "window"; an encoder whose maps depend on the whole image, in tiles without ``halo``.
    """
    inference = Inference(**options)
    if network.training:
        raise ValueError("network must be in evaluation mode: call network.eval()")
    expected = (image.shape[0], network.num_classes, *image.shape[2:])
    if probabilities is not None and probabilities.shape != expected:
        raise ValueError(
            f"probabilities must have shape {expected}, got {tuple(probabilities.shape)}"
        )
    size, passes = image.shape[2:], []

    def standard(x: Tensor) -> Tensor:
        return standardise(x, network)

    for scale, mirrored in itertools.product(inference.scales, (False, True)[: 1 + inference.flip]):
        x, prepare = image, standard
        if scale != 1:
            sides, prepare = [max(1, round(side * scale)) for side in size], _identity
            x = F.interpolate(
                standard(image), sides, mode="bilinear", align_corners=False, antialias=True
            )
        rows = _scores(network, x.flip(-1) if mirrored else x, prepare, size, inference)
        passes.append(_mirrored(rows) if mirrored else rows)
    slides = inference.context == "window" and inference.window is not None
    activate = _identity if slides or inference.average == "logits" else _softmax
    if len(passes) == 1 and probabilities is None:
        activate = _identity  # the order of the scores is all that counts
    labels = torch.empty(
        (len(image), *size),
        dtype=torch.uint8 if network.num_classes <= 256 else torch.int64,
        device=next(network.parameters()).device,
    )
    height, width = size
    step = max(1, _BAND // (len(image) * network.num_classes * width))
    for top in range(0, height, step):
        band = range(top, min(top + step, height))
        own = (..., slice(band.start, band.stop), slice(None))
        scores = functools.reduce(torch.add, (activate(score(band)) for score in passes))
        labels[own] = scores.argmax(1)
        if probabilities is not None:
            scores = scores / len(passes)
            probabilities[own] = scores.softmax(1) if inference.average == "logits" else scores
    return labels


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


# From some rows of the image to their scores (B, K, rows, W).
_Rows = Callable[[range], Tensor]


def _mirrored(rows: _Rows) -> _Rows:
    return lambda band: rows(band).flip(-1)


def _scores(
    network: SegmentationNetwork,
    x: Tensor,
    prepare: Callable[[Tensor], Tensor],
    size: Sequence[int],
    inference: Inference,
) -> _Rows:
    """The scores of an image's rows: logits, in windows what is averaged.

    ``x`` is the image, scaled and mirrored, ``size`` the one of the labels. The rows must be asked
    for from the top down.
    """
    if inference.window is None:
        logits = network.predict(network.encoder(prepare(x))).logits
    elif inference.context == "image":
        logits = _predict_in_tiles(network, x, prepare, inference.window, inference.halo)
    else:
        activate = _softmax if inference.average == "probabilities" else _identity
        finished = _slide(network, x, prepare, inference.window, inference.overlap, activate)
        return _Sliding(finished, x.shape[2], size, network.align_corners)
    if type(network)._resize is not SegmentationNetwork._resize:
        logits = network._resize(logits, x.shape[2:])
    return lambda rows: resize_rows(logits, size, rows, network.align_corners)


def _slide(
    network: SegmentationNetwork,
    x: Tensor,
    prepare: Callable[[Tensor], Tensor],
    window: int,
    overlap: float,
    activate: Callable[[Tensor], Tensor],
) -> Iterator[Tensor]:
    """The average over the windows that see each pixel, the rows that are finished at a time.

    The last windows end with the image.
    """
    height, width = x.shape[2:]
    if window > min(height, width):
        raise ValueError(
            f"window must be at most the sides of the (scaled) image, {(height, width)}, "
            f"got {window}"
        )
    step = max(1, round(window * (1 - overlap)))
    tops, lefts = ([*range(0, side - window, step), side - window] for side in (height, width))
    rows, columns = (
        torch.tensor([sum(start <= i < start + window for start in starts) for i in range(side)])
        for starts, side in ((tops, height), (lefts, width))
    )
    unfinished: Tensor | None = None
    for top, following in itertools.pairwise([*tops, height]):
        total = None
        for left in lefts:
            part = (..., slice(left, left + window))
            scores = activate(network(prepare(x[..., top : top + window, :][part])).logits)
            if total is None:
                total = scores.new_zeros((*scores.shape[:3], width))
                if unfinished is not None:
                    total[:, :, : unfinished.shape[2]] = unfinished
            total[part] += scores
        assert total is not None
        finished = following - top
        count = rows[top:following, None] * columns
        yield total[:, :, :finished] / count.to(total)
        unfinished = total[:, :, finished:]


class _Sliding:
    """Rows of the image, made of those of the scaled image as these are finished.

    Args:
        finished: the scaled image's rows, from the top down.
        height: of the scaled image.
        size, align_corners: of the resize to the image.
    """

    def __init__(
        self, finished: Iterator[Tensor], height: int, size: Sequence[int], align_corners: bool
    ) -> None:
        self.finished, self.height = finished, height
        self.size, self.align_corners = size, align_corners
        self.kept, self.first = next(finished), 0  # rows of the scaled image, from which on

    def __call__(self, rows: range) -> Tensor:
        # Where the rows' end lies, to the next row of a resize with either align_corners.
        end = rows.stop * self.height / self.size[0]
        while self.first + self.kept.shape[2] < min(math.ceil(end) + 2, self.height):
            self.kept = torch.cat([self.kept, next(self.finished)], dim=2)
        y = resize_rows(
            self.kept,
            self.size,
            rows,
            self.align_corners,
            first=self.first,
            height=self.height,
        )
        passed = max(math.floor(end) - 2 - self.first, 0)
        self.kept, self.first = self.kept[:, :, passed:], self.first + passed
        return y


def _predict_in_tiles(
    network: SegmentationNetwork,
    x: Tensor,
    prepare: Callable[[Tensor], Tensor],
    window: int,
    halo: int | None,
) -> Tensor:
    """The logits at the decoder's size; the decoder goes through the maps in bands if it can."""
    strides, around = network.encoder.strides, reach(network)
    levels = list(range(len(strides)))
    # Another class's own predict may take other maps than those of the decoder.
    if around < math.inf or type(network).predict is SegmentationNetwork.predict:
        levels = sorted({level % len(strides) for level in network.levels})
    maps = encode_in_tiles(network.encoder, x, window, halo, levels=levels, prepare=prepare)

    def predict(*parts: Tensor) -> Tensor:
        by_level: list[Any] = [None] * len(strides)
        for level, part in zip(levels, parts, strict=True):
            by_level[level] = part
        return network.predict(by_level).logits

    height, width = maps[-1].shape[2:]
    if around < math.inf:
        # What strides inside the decoder divide.
        unit = math.prod(
            module.stride[0]
            for module in network.decoder.modules()
            if isinstance(module, nn.Conv2d)
        )
        # As many positions as a tile has, but no fewer rows than come with them as halo.
        rows = max((window // strides[levels[-1]]) ** 2 // width, around, _LEAST_ROWS)
        rows, around = (math.ceil(side / unit) * unit for side in (rows, around))
        if rows + around < height and around < width:
            multiples = [strides[levels[-1]] // strides[level] for level in levels]
            return map_in_bands(predict, maps, rows, around, multiples)
    return predict(*maps)


def encode_in_tiles(
    encoder: Encoder,
    image: Tensor,
    tile: int,
    halo: int | None = None,
    *,
    levels: Sequence[int] | None = None,
    prepare: Callable[[Tensor], Tensor] = _identity,
) -> list[Tensor]:
    """The encoder's maps of the whole image, made of those of tiles.

    Args:
        encoder: in evaluation mode.
        image: ``(B, in_channels, H, W)``.
        tile: side of the tiles, rounded up to a multiple of the largest stride.
        halo: what the encoder sees around each tile, rounded up likewise; None:
            :func:`receptive_radius`.
        levels: which of the maps; None: all.
        prepare: what the image still lacks, pixel by pixel.

    With a halo of at least :func:`receptive_radius` the maps are those of the whole image, to
    rounding; those of an HRNet with ``bilinear_branches`` where 32 divides the image's sides. With
    less they deviate near the edges of the tiles, and everywhere where the encoder pools the whole
    image (squeeze-and-excitation, group norm, attention).

    Raises:
        ValueError: no halo given, and no size of it suffices.
    """
    if halo is None:
        halo = receptive_radius(encoder)
    levels = range(len(encoder.strides)) if levels is None else levels
    unit = math.lcm(encoder.multiple, *encoder.strides)
    tile, halo = (-(-side // unit) * unit for side in (tile, halo))
    height, width = image.shape[2:]
    whole: dict[int, Tensor] = {}
    # The last tile comes first: it says how large the maps are.
    for y, x in itertools.product(*(reversed(range(0, side, tile)) for side in (height, width))):
        top, left = max(y - halo, 0), max(x - halo, 0)
        bottom, right = y + tile, x + tile
        maps = encoder(prepare(image[:, :, top : bottom + halo, left : right + halo]))
        for level in levels:
            s = encoder.strides[level]
            # What the last tile has beyond its side belongs to the image, rounded up.
            part = maps[level][
                :,
                :,
                (y - top) // s : None if bottom >= height else (bottom - top) // s,
                (x - left) // s : None if right >= width else (right - left) // s,
            ]
            begin, end = (y // s, x // s), (y // s + part.shape[2], x // s + part.shape[3])
            if level not in whole:
                whole[level] = _layout.empty_map((*part.shape[:2], *end), like=maps[level])
            whole[level][:, :, begin[0] : end[0], begin[1] : end[1]] = part
        del maps, part  # before the next tile needs the memory
    return [whole[level] for level in levels]


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
