# SPDX-License-Identifier: Apache-2.0
"""The operators of ctxops against the best of plain torch.

    python benchmarks/operators.py --quick
    python benchmarks/operators.py pyramid_pool --json pyramid_pool.json
    python benchmarks/operators.py asymmetric_attention --shape 1x256x128x256 --dtype bfloat16

An operator is one entry of OPERATORS: a function from shape and options to cases.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import ctxops
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

OUTPUT_SIZES = (1, 3, 6, 8)
ANCHORS = sum(n * n for n in OUTPUT_SIZES)


@dataclasses.dataclass(frozen=True)
class Operator:
    """``cases`` makes the comparisons for a map of a shape (B, C, H, W)."""

    cases: Callable[[Shape, Options], list[Case]]
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
    """Bytes: the map and the anchors once, twice with the backward (it needs no map, it makes one).
    FLOPs of ours: one addition or comparison for each element."""
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
        contenders.append(row("ctxops", lambda: ours, ours=True, flops=passes * elements))
        return Case(
            _title(f"pyramid_pool {mode}", shape, backward),
            lambda: (_random(shape, options, 0),),
            output_shape,
            _in_both_formats(*contenders),
            backward=backward,
        )

    return [case(mode, backward) for mode in ("avg", "max") for backward in (False, True)]


def _rows(x: Tensor) -> Tensor:
    """(B, C, ...) as (B, 1, N, C), each row contiguous."""
    return x.flatten(2).transpose(1, 2).contiguous().unsqueeze(1)


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scaled = query.flatten(2).transpose(1, 2) * query.shape[1] ** -0.5
    weights = (scaled @ key).softmax(dim=-1)
    return (weights @ value.transpose(1, 2)).transpose(1, 2).unflatten(2, query.shape[2:])


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    context = F.scaled_dot_product_attention(_rows(query), _rows(key), _rows(value))
    return context.squeeze(1).transpose(1, 2).unflatten(2, query.shape[2:])


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
            row("softmax", lambda: _softmax_attention),
            row("softmax compiled", lambda: _softmax_attention, compile=True),
            row("SDPA", lambda: _sdpa),
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


OPERATORS = {
    "pyramid_pool": Operator(pyramid_pool_cases, (1, 2048, 96, 96), (1, 256, 48, 48)),
    "asymmetric_attention": Operator(asymmetric_attention_cases, (1, 256, 96, 96), (1, 64, 48, 48)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog=f"operators: {', '.join(OPERATORS)}"
    )
    parser.add_argument("operators", nargs="*", metavar="operator", help="default: all")
    parser.add_argument("--shape", type=parse_shape, metavar="BxCxHxW")
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
        cases += operator.cases(shapes[name], options)
    return run_benchmark("operators", cases, options, {"shapes": shapes})


if __name__ == "__main__":
    sys.exit(main())
