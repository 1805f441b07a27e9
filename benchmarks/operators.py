# SPDX-License-Identifier: Apache-2.0
"""The operators of ctxops against the best of plain torch.

    python benchmarks/operators.py --quick
    python benchmarks/operators.py pyramid_pool --json pyramid_pool.json
    python benchmarks/operators.py asymmetric_attention --shape 1x256x128x256 --dtype bfloat16
    python benchmarks/operators.py neighborhood_attention --shape 8x64x97x97 --window 5x6

An operator is one entry: a function from shape and options to cases.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import ctxops
from baselines.functions import (
    IGNORED,
    SDPA_BACKENDS,
    adaptive_pools,
    category_means_as_released,
    category_means_factorised,
    class_means_by_convolution,
    class_means_by_einsum,
    cross_by_bmm,
    cross_by_einsum,
    fuse_by_convolutions,
    fuse_by_sums,
    make_bin_product,
    make_windows_by_flex,
    sdpa,
    sdpa_on,
    softmax_attention,
    windows_by_natten,
    windows_by_shifts,
    windows_by_unfold,
)
from harness import (
    Case,
    Options,
    Rival,
    add_options,
    compare,
    parse_shape,
    read_options,
    run_benchmark,
)

Shape = tuple[int, int, int, int]

LEVELS = 4  # of self_gated_fusion
OUTPUT_SIZES = (1, 3, 6, 8)
ANCHORS = sum(n * n for n in OUTPUT_SIZES)
# (kernel_size, dilation) of neighborhood_attention
WINDOWS = ((5, 6), (3, 1), (7, 3))


class Benchmark(NamedTuple):
    """``cases`` makes the comparisons for a map of a shape (B, C, H, W)."""

    cases: Callable[..., list[Case]]
    shape: Shape
    quick_shape: Shape


OPERATORS: dict[str, Benchmark] = {}


def operator(shape: Shape, quick_shape: Shape) -> Callable[[Callable], Callable]:
    """Enters a function that makes cases, under the name of the operator that it has."""

    def enter(cases: Callable[..., list[Case]]) -> Callable[..., list[Case]]:
        OPERATORS[cases.__name__] = Benchmark(cases, shape, quick_shape)
        return cases

    return enter


def random(options: Options, *shapes: Sequence[int]) -> tuple[Tensor, ...]:
    return tuple(
        torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(
            options.device, options.dtype
        )
        for seed, shape in enumerate(shapes)
    )


@operator((1, 2048, 96, 96), (1, 256, 48, 48))
def pyramid_pool(shape: Shape, options: Options) -> list[Case]:
    """Bytes: map and anchors once, twice with the backward, which needs no map but makes one."""
    batch, channels = shape[:2]
    x = options.dtype.itemsize * math.prod(shape)
    anchors = options.dtype.itemsize * batch * channels * ANCHORS
    product = partial(make_bin_product, shape[2:], OUTPUT_SIZES, options.device, options.dtype)

    def pool(mode: str) -> list[Case]:
        pools = partial(adaptive_pools, output_sizes=OUTPUT_SIZES, mode=mode)
        rivals = [Rival("adaptive pools", lambda: pools)]
        if mode == "avg":
            rivals.append(Rival("bin matrices", product))
        return compare(
            f"pyramid_pool {mode}",
            shape,
            partial(ctxops.pyramid_pool, output_sizes=OUTPUT_SIZES, mode=mode),
            rivals,
            lambda: random(options, shape),
            (batch, channels, ANCHORS),
            peak_bytes=(x, 4 * x),
            traffic=(x + anchors, 2 * (x + anchors)),
        )

    return pool("avg") + pool("max")


@operator((1, 256, 96, 96), (1, 64, 48, 48))
def asymmetric_attention(shape: Shape, options: Options) -> list[Case]:
    """110 anchors, values as wide as keys."""
    batch, channels, height, width = shape
    anchors = (batch, channels, ANCHORS)
    per_value = options.dtype.itemsize * batch * height * width
    rivals = [
        Rival("softmax", lambda: softmax_attention),
        Rival("SDPA", lambda: sdpa, compiled=False),
    ]
    if options.device.type == "cuda":
        rivals += [
            Rival(name, lambda backend=backend: partial(sdpa_on, backend=backend), compiled=False)
            for name, backend in SDPA_BACKENDS.items()
        ]
    return compare(
        "asymmetric_attention",
        shape,
        ctxops.asymmetric_attention,
        rivals,
        lambda: random(options, shape, anchors, anchors),
        shape,
        peak_bytes=[per_value * (maps * channels + 4 * ANCHORS) for maps in (3, 8)],
    )


@operator((1, 256, 128, 128), (1, 32, 40, 40))
def neighborhood_attention(
    shape: Shape, options: Options, windows: Sequence[tuple[int, int]] = ()
) -> list[Case]:
    """Windows are kernel size and dilation; by default WINDOWS, or the first of them with --quick.

    FLOPs: the products of a window, whoever computes them; three times with the backward."""
    batch, channels, height, width = shape
    positions = batch * height * width

    def attend(kernel: int, dilation: int, border: str) -> list[Case]:
        window, neighbours = {"kernel": kernel, "dilation": dilation}, kernel * kernel
        copies = [maps * 4 * positions * neighbours * channels for maps in (3, 5)]
        flex = partial(make_windows_by_flex, shape[2:], options.device, **window)
        rivals = {
            "zeros": [
                Rival("unfold", lambda: partial(windows_by_unfold, **window), peak_bytes=copies),
                Rival("shifts", lambda: partial(windows_by_shifts, **window), peak_bytes=copies),
                # On the CPU it has no backward.
                Rival("FlexAttention", flex, compiled=False, backward=options.device.type != "cpu"),
            ],
            "shift": [
                Rival("NATTEN", lambda: partial(windows_by_natten, **window), compiled=False)
            ],
        }
        return compare(
            f"neighborhood_attention {kernel} x {kernel}, dilation {dilation}, {border}",
            shape,
            partial(
                ctxops.neighborhood_attention, kernel_size=kernel, dilation=dilation, border=border
            ),
            rivals[border],
            lambda: random(options, shape, shape, shape),
            shape,
            peak_bytes=[4 * positions * (maps * channels + 4 * neighbours) for maps in (3, 8)],
            flops=[4 * passes * positions * neighbours * channels for passes in (1, 3)],
        )

    windows = windows or (WINDOWS[:1] if options.quick else WINDOWS)
    borders = ("zeros", "shift") if importlib.util.find_spec("natten") else ("zeros",)
    return [case for border in borders for window in windows for case in attend(*window, border)]


@operator((1, 512, 97, 97), (1, 128, 48, 48))
def criss_cross_attention(shape: Shape, options: Options) -> list[Case]:
    """Queries and keys have an eighth of the channels, as in CCNet."""
    batch, channels, height, width = shape
    narrow = (batch, max(1, channels // 8), height, width)
    peak = 4 * batch * height * width * (8 * channels + 6 * (height + width - 1))
    return compare(
        "criss_cross_attention",
        shape,
        ctxops.criss_cross_attention,
        [Rival("einsum", lambda: cross_by_einsum), Rival("permute + bmm", lambda: cross_by_bmm)],
        lambda: random(options, narrow, narrow, shape),
        shape,
        peak_bytes=(peak, 2 * peak),
    )


@operator((2, 512, 64, 128), (1, 64, 16, 32))
def category_statistics(shape: Shape, options: Options) -> list[Case]:
    """The weighted means of MCIBI's eq. 10. First for some numbers of classes, then for labels and
    channels of other sizes, without the released procedure.

    The labels are patches of a thirty-second of the map's side, one in twenty is ignored."""
    batch, channels, height, width = shape

    def ours(features: Tensor, labels: Tensor, memory: Tensor) -> Tensor:
        sums, weights, _ = ctxops.category_statistics(
            features, labels, memory, ignore_index=IGNORED
        )
        return (sums / weights.clamp_min(1e-12)[:, None]).to(features.dtype)

    def means(classes: int, scale: int, channels: int, *, released: bool = False) -> list[Case]:
        sized, label_size = (batch, channels, height, width), (height * scale, width * scale)
        pixels = batch * math.prod(label_size)

        def inputs() -> tuple[Tensor, ...]:
            generator = torch.Generator().manual_seed(0)
            patches = torch.randint(0, classes, (batch, 1, 32, 32), generator=generator)
            patches[torch.rand(patches.shape, generator=generator) < 0.05] = IGNORED
            labels = F.interpolate(patches.double(), label_size).long().squeeze(1)
            features, memory = random(options, sized, (classes, channels))
            return features, labels.to(options.device), memory

        copies = [4 * options.dtype.itemsize * pixels * channels]
        as_released = Rival(
            "as released", lambda: category_means_as_released, compiled=False, peak_bytes=copies
        )
        rivals = [Rival("factorised", lambda: category_means_factorised)]
        return compare(
            f"category_statistics, {classes} classes, labels {label_size[0]} x {label_size[1]}",
            sized,
            ours,
            [as_released, *rivals] if released else rivals,
            inputs,
            (classes, channels),
            peak_bytes=[256 * pixels],
        )

    numbers = (19,) if options.quick else (19, 150, 171)
    cases = [means(classes, 8, channels, released=True) for classes in numbers]
    if not options.quick:
        cases += [means(19, scale, channels) for scale in (1, 2, 4, 16)]
        cases += [means(19, 8, width) for width in (channels // 2, 2 * channels)]
    return [case for each in cases for case in each]


@operator((2, 19, 128, 256), (1, 19, 64, 64))
def category_context(shape: Shape, options: Options) -> list[Case]:
    """A memory of 512 channels, as MCIBI's, for so many classes as the map has channels."""
    batch, classes, height, width = shape
    channels = 512
    maps = batch * height * width * options.dtype.itemsize
    return compare(
        "category_context",
        shape,
        ctxops.category_context,
        [
            Rival("einsum", lambda: class_means_by_einsum),
            Rival("convolution", lambda: class_means_by_convolution),
        ],
        lambda: random(options, shape, (classes, channels)),
        (batch, channels, height, width),
        peak_bytes=[maps * (2 * channels + passes * classes) for passes in (3, 8)],
    )


@operator((1, 256, 128, 128), (1, 64, 64, 64))
def self_gated_fusion(shape: Shape, options: Options) -> list[Case]:
    """Four levels of one size. Bytes: every map read and written once; with the backward, features
    and gradients read and gradients written once more."""
    channels, levels = shape[1], [shape] * LEVELS
    maps = LEVELS * options.dtype.itemsize * math.prod(shape)

    def on_levels(fuse: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda *inputs: fuse(inputs[:-2], *inputs[-2:])

    def inputs() -> tuple[Tensor, ...]:
        *features, weight, bias = random(options, *levels, (LEVELS, channels), (LEVELS,))
        return *features, weight / channels**0.5, bias

    return compare(
        f"self_gated_fusion {LEVELS} x",
        shape,
        on_levels(ctxops.self_gated_fusion),
        [
            Rival("convolutions", lambda: on_levels(fuse_by_convolutions)),
            Rival("sums", lambda: on_levels(fuse_by_sums), eager=False),
        ],
        inputs,
        tuple(levels),
        peak_bytes=(4 * maps, 8 * maps),
        traffic=(2 * maps, 5 * maps),
    )


def _parse_window(text: str) -> tuple[int, int]:
    kernel, _, dilation = text.partition("x")
    if not (kernel.isdecimal() and dilation.isdecimal() and int(kernel) % 2 and int(dilation)):
        raise argparse.ArgumentTypeError(f"must be an odd kernel size x dilation, got {text!r}")
    return int(kernel), int(dilation)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog=f"operators: {', '.join(OPERATORS)}"
    )
    parser.add_argument("operators", nargs="*", metavar="operator", help="default: all")
    parser.add_argument("--shape", type=parse_shape, metavar="BxCxHxW")
    parser.add_argument(
        "--window",
        type=_parse_window,
        action="append",
        metavar="KxD",
        help="kernel size and dilation of neighborhood_attention (repeatable)",
    )
    add_options(parser)
    chosen = parser.parse_args(arguments)
    for name in chosen.operators:
        if name not in OPERATORS:
            parser.error(f"there is no operator {name!r}; choose from {', '.join(OPERATORS)}")
    options = read_options(chosen)
    shapes, cases = {}, []
    for name in chosen.operators or OPERATORS:
        benchmark = OPERATORS[name]
        shapes[name] = chosen.shape or (benchmark.quick_shape if chosen.quick else benchmark.shape)
        windowed = chosen.window and name == "neighborhood_attention"
        more = {"windows": chosen.window} if windowed else {}
        cases += benchmark.cases(shapes[name], options, **more)
    return run_benchmark("operators", cases, options, {"shapes": shapes})


if __name__ == "__main__":
    sys.exit(main())
