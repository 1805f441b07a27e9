# SPDX-License-Identifier: Apache-2.0
"""The operators of ctxops against the best of plain torch.

    python benchmarks/operators.py --quick
    python benchmarks/operators.py pyramid_pool --json pyramid_pool.json
    python benchmarks/operators.py asymmetric_attention --shape 1x256x128x256 --dtype bfloat16
    python benchmarks/operators.py neighborhood_attention --shape 8x64x97x97 --window 5x6

An operator is one entry of OPERATORS: a function from shape and options to cases.
"""

import argparse
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import ctxops
from baselines.eager import (
    as_rows,
    cross_by_bmm,
    cross_by_einsum,
    fuse_levels,
    sdpa,
    softmax_attention,
    windows_by_shifts,
    windows_by_unfold,
)
from harness import (
    Case,
    Contender,
    Options,
    add_options,
    both_formats,
    parse_shape,
    read_options,
    run_benchmark,
)

Shape = tuple[int, int, int, int]

IGNORED = 255  # the label, of category_statistics
LEVELS = 4  # of self_gated_fusion
OUTPUT_SIZES = (1, 3, 6, 8)
ANCHORS = sum(n * n for n in OUTPUT_SIZES)
# (kernel_size, dilation) of neighborhood_attention
WINDOWS = ((5, 6), (3, 1), (7, 3))


@dataclasses.dataclass(frozen=True)
class Operator:
    """``cases`` makes the comparisons for a map of a shape (B, C, H, W)."""

    cases: Callable[..., list[Case]]
    shape: Shape
    quick_shape: Shape


def _random(shape: Sequence[int], options: Options, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(options.device, options.dtype)


def _title(name: str, shape: Shape, backward: bool) -> str:
    passes = "forward + backward" if backward else "forward"
    return f"{name}, {' x '.join(map(str, shape))}, {passes}"


def _in_both_formats(*contenders: Contender) -> tuple[Contender, ...]:
    return tuple(row for contender in contenders for row in both_formats(contender))


def _pools(x: Tensor, mode: str) -> Tensor:
    pool = F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d
    return torch.cat([pool(x, n).flatten(2) for n in OUTPUT_SIZES], dim=2)


def _bin_averages(extent: int, n: int) -> Tensor:
    """(n, extent): row i averages the positions of torch's adaptive bin i."""
    matrix = torch.zeros(n, extent)
    for i in range(n):
        start, end = i * extent // n, -(-(i + 1) * extent // n)
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def _bin_product(shape: Shape, options: Options) -> Callable[[Tensor], Tensor]:
    """Average pooling as products with two matrices; one for the rows of all grids together."""
    _, _, height, width = shape
    rows = torch.cat([_bin_averages(height, n) for n in OUTPUT_SIZES])
    columns = [_bin_averages(width, n) for n in OUTPUT_SIZES]
    rows = rows.to(options.device, options.dtype)
    columns = [column.to(rows) for column in columns]

    def pool(x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        if x.is_contiguous():
            parts = (rows @ x).split(OUTPUT_SIZES, dim=2)
            pooled = [part @ c.t() for part, c in zip(parts, columns, strict=True)]
            return torch.cat([p.flatten(2) for p in pooled], dim=2)
        lines = rows @ x.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
        parts = lines.unflatten(2, (width, channels)).split(OUTPUT_SIZES, dim=1)
        pooled = [c @ part for part, c in zip(parts, columns, strict=True)]
        return torch.cat([p.flatten(1, 2) for p in pooled], dim=1).transpose(1, 2)

    return pool


def pyramid_pool_cases(shape: Shape, options: Options) -> list[Case]:
    """Bytes: map and anchors once, twice with the backward, which needs no map but makes one."""
    batch, channels, height, width = shape
    elements = batch * channels * height * width
    output_shape = (batch, channels, ANCHORS)

    def case(mode: str, backward: bool) -> Case:
        passes = 2 if backward else 1
        row = functools.partial(
            Contender,
            peak_bytes=options.dtype.itemsize * (4 * elements if backward else elements),
            traffic=passes * options.dtype.itemsize * (elements + batch * channels * ANCHORS),
        )
        pools = functools.partial(_pools, mode=mode)
        ours = functools.partial(ctxops.pyramid_pool, output_sizes=OUTPUT_SIZES, mode=mode)
        contenders = [
            row("adaptive pools", lambda: pools),
            row("adaptive pools compiled", lambda: pools, compile=True),
        ]
        if mode == "avg":
            product = functools.partial(_bin_product, shape, options)
            contenders += [
                row("bin matrices", product),
                row("bin matrices compiled", product, compile=True),
            ]
        contenders.append(row("ctxops", lambda: ours, ours=True))
        return Case(
            _title(f"pyramid_pool {mode}", shape, backward),
            lambda: (_random(shape, options, 0),),
            output_shape,
            _in_both_formats(*contenders),
            backward=backward,
        )

    return [case(mode, backward) for mode in ("avg", "max") for backward in (False, True)]


def asymmetric_attention_cases(shape: Shape, options: Options) -> list[Case]:
    """110 anchors, values as wide as keys."""
    batch, channels, height, width = shape
    anchors = (batch, channels, ANCHORS)
    positions = batch * height * width

    def case(backward: bool) -> Case:
        maps = 8 if backward else 3
        row = functools.partial(
            Contender,
            peak_bytes=options.dtype.itemsize * positions * (maps * channels + 4 * ANCHORS),
        )
        contenders = [
            row("softmax", lambda: softmax_attention),
            row("softmax compiled", lambda: softmax_attention, compile=True),
            row("SDPA", lambda: sdpa),
            row("ctxops", lambda: ctxops.asymmetric_attention, ours=True),
        ]
        return Case(
            _title("asymmetric_attention", shape, backward),
            lambda: tuple(_random(s, options, i) for i, s in enumerate((shape, anchors, anchors))),
            shape,
            _in_both_formats(*contenders),
            backward=backward,
        )

    return [case(False), case(True)]


def _flex(shape: Shape, options: Options, kernel: int, dilation: int) -> Callable[..., Tensor]:
    """FlexAttention to the positions of maps that are padded with zeros, masked to the window."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    height, width = shape[2:]
    padding = kernel // 2 * dilation
    rows, columns = height + 2 * padding, width + 2 * padding

    def in_window(batch, head, query, key):
        down, right = key // columns - query // width, key % columns - query % width
        rows_fit = (down >= 0) & (down <= 2 * padding) & (down % dilation == 0)
        return rows_fit & (right >= 0) & (right <= 2 * padding) & (right % dilation == 0)

    # Uncompiled it would make the whole mask, height * width * rows * columns numbers.
    mask = torch.compile(create_block_mask)(
        in_window, None, None, height * width, rows * columns, device=options.device
    )

    compiled = torch.compile(flex_attention, dynamic=False)

    # Compiled together with what lays out its operands, it fails on the CPU (torch 2.15).
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (as_rows(F.pad(x, (padding,) * 4)) for x in (key, value))
        context = compiled(as_rows(query), key, value, block_mask=mask)
        return context.squeeze(1).transpose(1, 2).unflatten(2, (height, width))

    return attend


def _natten(query: Tensor, key: Tensor, value: Tensor, *, kernel: int, dilation: int) -> Tensor:
    """NATTEN, one head: maps (B, H, W, heads, C)."""
    import natten

    query, key, value = (x.permute(0, 2, 3, 1).unsqueeze(3) for x in (query, key, value))
    context = natten.na2d(query, key, value, kernel_size=kernel, dilation=dilation)
    return context.squeeze(3).permute(0, 3, 1, 2)


def neighborhood_attention_cases(
    shape: Shape, options: Options, windows: Sequence[tuple[int, int]] = ()
) -> list[Case]:
    """Windows are kernel size and dilation; by default WINDOWS, or the first of them with --quick.

    FLOPs: the products of a window, whoever computes them; three times with the backward."""
    windows = windows or (WINDOWS[:1] if options.quick else WINDOWS)
    batch, channels, height, width = shape
    positions = batch * height * width

    def case(kernel: int, dilation: int, backward: bool, border: str = "zeros") -> Case:
        window = {"kernel": kernel, "dilation": dilation}
        neighbours, passes = kernel * kernel, 3 if backward else 1
        maps = 8 if backward else 3
        row = functools.partial(
            Contender,
            peak_bytes=4 * positions * (maps * channels + 4 * neighbours),
            flops=4 * passes * positions * neighbours * channels,
        )
        copies = 4 * positions * neighbours * channels * (5 if backward else 3)
        unfold = functools.partial(windows_by_unfold, **window)
        shifts = functools.partial(windows_by_shifts, **window)
        attend = functools.partial(
            ctxops.neighborhood_attention, kernel_size=kernel, dilation=dilation, border=border
        )
        ours = row("ctxops", lambda: attend, ours=True)
        if border == "shift":
            natten = functools.partial(_natten, **window)
            contenders = [row("NATTEN", lambda: natten), ours]
        else:
            contenders = [
                row("unfold", lambda: unfold, peak_bytes=copies),
                row("unfold compiled", lambda: unfold, compile=True, peak_bytes=copies),
                row("shifts", lambda: shifts, peak_bytes=copies),
                row("shifts compiled", lambda: shifts, compile=True, peak_bytes=copies),
                ours,
            ]
        # On the CPU it has no backward.
        if border == "zeros" and not (backward and options.device.type == "cpu"):
            flex = functools.partial(_flex, shape, options, kernel, dilation)
            contenders.insert(-1, row("FlexAttention", flex))
        title = f"neighborhood_attention {kernel} x {kernel}, dilation {dilation}, {border}"
        return Case(
            _title(title, shape, backward),
            lambda: tuple(_random(shape, options, i) for i in range(3)),
            shape,
            _in_both_formats(*contenders),
            backward=backward,
        )

    borders = ["zeros", *["shift"] * (importlib.util.find_spec("natten") is not None)]
    return [
        case(*window, backward, border)
        for border in borders
        for window in windows
        for backward in (False, True)
    ]


def _gates(features: Sequence[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    """1 x 1 convolutions to one channel, and sigmoid."""
    return [
        F.conv2d(x, w[None, :, None, None], b[None]).sigmoid()
        for x, w, b in zip(features, weight, bias, strict=True)
    ]


def _sums(features: Sequence[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    """The same gates as sums of products, which a compiler can fuse."""
    return [
        ((x * w[:, None, None]).sum(dim=1, keepdim=True) + b).sigmoid()
        for x, w, b in zip(features, weight, bias, strict=True)
    ]


def self_gated_fusion_cases(shape: Shape, options: Options) -> list[Case]:
    """Four levels of one size. Bytes: every map read and written once; with the backward, features
    and gradients read and gradients written once more."""
    batch, channels, height, width = shape
    maps = LEVELS * options.dtype.itemsize * batch * channels * height * width

    def torch_form(gates: Callable[..., list[Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
        def fuse(*inputs: Tensor) -> tuple[Tensor, ...]:
            *features, weight, bias = inputs
            return fuse_levels(features, gates(features, weight, bias))

        return fuse

    def ours(*inputs: Tensor) -> tuple[Tensor, ...]:
        *features, weight, bias = inputs
        return ctxops.self_gated_fusion(features, weight, bias)

    def inputs() -> tuple[Tensor, ...]:
        features = [_random(shape, options, level) for level in range(LEVELS)]
        weight = _random((LEVELS, channels), options, LEVELS) / channels**0.5
        return *features, weight, _random((LEVELS,), options, LEVELS + 1)

    def case(backward: bool) -> Case:
        row = functools.partial(
            Contender,
            peak_bytes=(8 if backward else 4) * maps,
            traffic=(5 if backward else 2) * maps,
        )
        convolutions = functools.partial(torch_form, _gates)
        sums = functools.partial(torch_form, _sums)
        contenders = [
            row("convolutions", convolutions),
            row("convolutions compiled", convolutions, compile=True),
            row("sums compiled", sums, compile=True),
            row("ctxops", lambda: ours, ours=True),
        ]
        return Case(
            _title(f"self_gated_fusion {LEVELS} x", shape, backward),
            inputs,
            (shape,) * LEVELS,
            _in_both_formats(*contenders),
            backward=backward,
        )

    return [case(False), case(True)]


def criss_cross_attention_cases(shape: Shape, options: Options) -> list[Case]:
    """Queries and keys have an eighth of the channels, as in CCNet."""
    batch, channels, height, width = shape
    narrow = (batch, max(1, channels // 8), height, width)
    positions, keys = batch * height * width, height + width - 1

    def case(backward: bool) -> Case:
        row = functools.partial(
            Contender,
            peak_bytes=4 * positions * (8 * channels + 6 * keys) * (2 if backward else 1),
        )
        contenders = [
            row("einsum", lambda: cross_by_einsum),
            row("einsum compiled", lambda: cross_by_einsum, compile=True),
            row("permute + bmm", lambda: cross_by_bmm),
            row("permute + bmm compiled", lambda: cross_by_bmm, compile=True),
            row("ctxops", lambda: ctxops.criss_cross_attention, ours=True),
        ]
        return Case(
            _title("criss_cross_attention", shape, backward),
            lambda: tuple(_random(s, options, i) for i, s in enumerate((narrow, narrow, shape))),
            shape,
            _in_both_formats(*contenders),
            backward=backward,
        )

    return [case(False), case(True)]


def _axis_taps(size: int, labels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Along an axis: the two positions around each pixel of the labels, the share of the second."""
    at = (torch.arange(labels, device=device, dtype=torch.float64) + 0.5) * (size / labels) - 0.5
    at = at.clamp(0, size - 1)
    low = at.floor().long()
    return low, (low + 1).clamp(max=size - 1), (at - low).float()


def _means_as_released(features: Tensor, labels: Tensor, memory: Tensor) -> Tensor:
    """The procedure of the released code: upsample, then class by class."""
    pixels = F.interpolate(features, labels.shape[1:], mode="bilinear", align_corners=False)
    pixels = pixels.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    labels = labels.flatten()
    means = torch.zeros_like(memory)
    for k in labels.unique().tolist():
        if k == IGNORED:
            continue
        own = pixels[labels == k]
        weights = 1 - F.cosine_similarity(own, memory[k].expand_as(own), dim=1)
        means[k] = ((weights / weights.sum())[:, None] * own).sum(dim=0)
    return means


def _means_factorised(features: Tensor, labels: Tensor, memory: Tensor) -> Tensor:
    """The products of neighbours and with the memory on the features' own grid, and a matrix of
    coefficients (K, positions): nothing is upsampled but scalars."""
    batch, _, height, width = features.shape
    classes = len(memory)
    x = features.permute(0, 2, 3, 1).contiguous()
    up, low = x[:, :-1], x[:, 1:]

    def products_of(a: Tensor, b: Tensor) -> Tensor:
        """Of vectors; 0 where the map ends, and the share of the second is 0 too."""
        rows, columns = height - a.shape[1], width - a.shape[2]
        return F.pad((a * b).sum(dim=3), (0, columns, 0, rows)).flatten(1)

    own = products_of(x, x)
    to_right = products_of(x[:, :, :-1], x[:, :, 1:])
    to_down = products_of(up, low)
    to_across = products_of(up[:, :, :-1], low[:, :, 1:])
    anti = products_of(up[:, :, 1:], low[:, :, :-1])
    products = x.flatten(1, 2) @ F.normalize(memory, dim=1).t()
    top, bottom, v = _axis_taps(height, labels.shape[1], x.device)
    left, beside, u = _axis_taps(width, labels.shape[2], x.device)
    v = v[:, None]
    corners = [top[:, None] * width + left, top[:, None] * width + beside]
    corners += [bottom[:, None] * width + left, bottom[:, None] * width + beside]
    shares = [(1 - v) * (1 - u), (1 - v) * u, v * (1 - u), v * u]
    a, b, c, d = shares
    square = sum(share * share * own[:, at] for share, at in zip(shares, corners, strict=True))
    square = square + 2 * (
        a * b * to_right[:, corners[0]]
        + c * d * to_right[:, corners[2]]
        + a * c * to_down[:, corners[0]]
        + b * d * to_down[:, corners[1]]
        + a * d * to_across[:, corners[0]]
        + b * c * anti[:, corners[0]]
    )
    valid = labels != IGNORED
    labels = labels.masked_fill(~valid, 0)
    image = torch.arange(batch, device=x.device)[:, None, None]
    cosine = sum(
        share * products[image, at, labels] for share, at in zip(shares, corners, strict=True)
    )
    weights = (1 - cosine / square.clamp_min(0).sqrt().clamp_min(1e-8)) * valid
    coefficients = weights.new_zeros(batch, classes * height * width)
    for share, at in zip(shares, corners, strict=True):
        index = (labels * (height * width) + at).flatten(1)
        coefficients.scatter_add_(1, index, (weights * share).flatten(1))
    coefficients = coefficients.view(batch, classes, height * width)
    sums = (coefficients @ x.flatten(1, 2)).sum(dim=0)
    return sums / coefficients.sum(dim=(0, 2)).clamp_min(1e-12)[:, None]


def _means(features: Tensor, labels: Tensor, memory: Tensor) -> Tensor:
    sums, weights, _ = ctxops.category_statistics(features, labels, memory, ignore_index=IGNORED)
    return sums / weights.clamp_min(1e-12)[:, None]


def category_statistics_cases(shape: Shape, options: Options) -> list[Case]:
    """The weighted means of MCIBI's eq. 10. First for some numbers of classes, then for labels and
    channels of other sizes, without the released procedure.

    The labels are patches of a thirty-second of the map's side, one in twenty is ignored."""

    def case(classes: int, scale: int, channels: int, *, released: bool) -> Case:
        batch, _, height, width = shape
        sized = (batch, channels, height, width)
        height, width = height * scale, width * scale
        pixels = batch * height * width

        def inputs() -> tuple[Tensor, ...]:
            generator = torch.Generator().manual_seed(0)
            patches = torch.randint(0, classes, (batch, 1, 32, 32), generator=generator)
            patches[torch.rand(patches.shape, generator=generator) < 0.05] = IGNORED
            labels = F.interpolate(patches.double(), (height, width)).long().squeeze(1)
            memory = _random((classes, channels), options, 1)
            return _random(sized, options, 0), labels.to(options.device), memory

        row = functools.partial(Contender, peak_bytes=256 * pixels)
        contenders = [
            row("factorised", lambda: _means_factorised),
            row("factorised compiled", lambda: _means_factorised, compile=True),
            row("ctxops", lambda: _means, ours=True),
        ]
        if released:
            copies = 4 * options.dtype.itemsize * pixels * channels
            contenders.insert(0, row("as released", lambda: _means_as_released, peak_bytes=copies))
        title = f"category_statistics, {classes} classes, labels {height} x {width}"
        return Case(
            _title(title, sized, backward=False),
            inputs,
            (classes, channels),
            _in_both_formats(*contenders),
        )

    cases = [case(classes, 8, shape[1], released=True) for classes in (19, 150, 171)]
    if options.quick:
        return cases[:1]
    cases += [case(19, scale, shape[1], released=False) for scale in (1, 2, 4, 16)]
    return cases + [
        case(19, 8, channels, released=False) for channels in (shape[1] // 2, 2 * shape[1])
    ]


OPERATORS = {
    "pyramid_pool": Operator(pyramid_pool_cases, (1, 2048, 96, 96), (1, 256, 48, 48)),
    "asymmetric_attention": Operator(asymmetric_attention_cases, (1, 256, 96, 96), (1, 64, 48, 48)),
    "neighborhood_attention": Operator(
        neighborhood_attention_cases, (1, 256, 128, 128), (1, 32, 40, 40)
    ),
    "criss_cross_attention": Operator(
        criss_cross_attention_cases, (1, 512, 97, 97), (1, 128, 48, 48)
    ),
    "category_statistics": Operator(category_statistics_cases, (2, 512, 64, 128), (1, 64, 16, 32)),
    "self_gated_fusion": Operator(self_gated_fusion_cases, (1, 256, 128, 128), (1, 64, 64, 64)),
}


_WINDOWED = ("neighborhood_attention",)


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
    names = chosen.operators or list(OPERATORS)
    shapes, cases = {}, []
    for name in names:
        operator = OPERATORS[name]
        default = operator.quick_shape if chosen.quick else operator.shape
        shapes[name] = chosen.shape or default
        windows = {"windows": chosen.window} if chosen.window and name in _WINDOWED else {}
        cases += operator.cases(shapes[name], options, **windows)
    return run_benchmark("operators", cases, options, {"shapes": shapes})


if __name__ == "__main__":
    sys.exit(main())
