# SPDX-License-Identifier: Apache-2.0
"""Table 3 of MCIBI (Jin et al., ICCV 2021): parameters, operations and time of context modules, on
a map of 1 x 2048 x 128 x 128, beside the paper's figures.

    python benchmarks/papers/context_modules.py --quick
    python benchmarks/papers/context_modules.py --json contexts.json

The modules compute different things: each row is compared with its own result in the other memory
format, and with the paper's time only as the ratio between two rows.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import _path  # noqa: F401
from baselines.released import randomize
from ctxops.nn import (
    ASPP,
    AdaptiveContext,
    AsymmetricNonLocalContext,
    ConcatContext,
    DatasetContextAggregation,
    DisentangledNonLocal,
    DualAttention,
    PyramidPooling,
    RecurrentCrissCrossAttention,
)
from ctxops.nn.cbr import cbr
from harness import (
    Case,
    Contender,
    Options,
    Report,
    Verdict,
    add_options,
    both_formats,
    flop_counter,
    milliseconds,
    parse_size,
    ratio_verdicts,
    read_options,
    run_benchmark,
)
from papers.conventions import count_operations
from papers.network_cases import parameters

LOW_CHANNELS, IN_CHANNELS, CHANNELS, CLASSES = 1024, 2048, 512, 19
SIZE = (128, 128)
TABLE = "MCIBI, Table 3"


class OnLastMap(nn.Module):
    """A context module as a function of the backbone's last two maps: only ANN wants the first."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, low: Tensor, x: Tensor) -> Tensor:
        return self.module(x)


class DatasetContext(nn.Module):
    """Dataset-level context, perhaps over a module for that within the image.

    What is no part of it costs nothing: the memory is a constant, and the logits, which a head
    outside makes, are the first channels of the reduced map.
    """

    def __init__(self, within: nn.Module | None = None, **arguments: object) -> None:
        super().__init__()
        width = 0 if within is None else CHANNELS
        self.within = within
        self.dca = DatasetContextAggregation(IN_CHANNELS, CHANNELS, width, **arguments)
        self.register_buffer("memory", torch.ones(CLASSES, CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        r = self.dca.reduce(x)
        within = [] if self.within is None else [self.within(x)]
        return self.dca(r, r[:, :CLASSES], self.memory, *within)


def _concat(attention: nn.Module) -> nn.Module:
    """DNL's head: two convolutions around the block, and one over the map beside its context."""
    layers = [
        cbr(IN_CHANNELS, CHANNELS, 3, nn.BatchNorm2d),
        attention,
        cbr(CHANNELS, CHANNELS, 3, nn.BatchNorm2d),
    ]
    return ConcatContext(nn.Sequential(*layers), IN_CHANNELS, CHANNELS, CHANNELS)


def _criss_cross() -> nn.Module:
    context = RecurrentCrissCrossAttention(IN_CHANNELS, CHANNELS)
    return ConcatContext(context, IN_CHANNELS, CHANNELS, CHANNELS)


def asymmetric(fold: bool = True) -> nn.Module:
    return AsymmetricNonLocalContext(LOW_CHANNELS, IN_CHANNELS, CHANNELS, bias=False, fold=fold)


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of the table, on a V100: millions of parameters, GFLOPs, milliseconds."""

    parameters: str
    gflops: str
    milliseconds: float
    build: Callable[[], nn.Module]
    # Where what the paper counted is not what we run.
    build_counted: Callable[[], nn.Module] | None = None


TABLE_3 = {
    "ASPP": Published("42.21", "674.47", 101.44, lambda: OnLastMap(ASPP(IN_CHANNELS, CHANNELS))),
    "PPM": Published(
        "23.07", "309.45", 29.57, lambda: OnLastMap(PyramidPooling(IN_CHANNELS, CHANNELS))
    ),
    "CCNet": Published("23.92", "397.38", 56.90, lambda: OnLastMap(_criss_cross())),
    "DANet": Published(
        "23.92", "392.02", 62.64, lambda: OnLastMap(DualAttention(IN_CHANNELS, CHANNELS))
    ),
    "ANN": Published("20.32", "335.24", 49.66, asymmetric, lambda: asymmetric(fold=False)),
    "DNL": Published(
        "24.12", "395.25", 68.62, lambda: OnLastMap(_concat(DisentangledNonLocal(CHANNELS)))
    ),
    "APCNet": Published(
        "30.46", "413.12", 54.20, lambda: OnLastMap(AdaptiveContext(IN_CHANNELS, CHANNELS))
    ),
    "DCA": Published("14.82", "242.80", 47.64, lambda: OnLastMap(DatasetContext())),
    "ASPP+DCA": Published(
        "45.63", "730.56", 125.03, lambda: OnLastMap(DatasetContext(ASPP(IN_CHANNELS, CHANNELS)))
    ),
}
# The text says that DCA adds so much to ASPP; the table has 3.42 M and 56.09 G.
TEXT_ADDS = {"parameters": "2.5", "operations": "40.94"}


def maps(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Like what a backbone's last two stages give: noise after a ReLU."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, channels, height, width, generator=generator).relu()
        for channels in (LOW_CHANNELS, IN_CHANNELS)
    )


def count_verdicts() -> list[Verdict]:
    """Every published parameter and operation count beside ours."""
    verdicts = []
    with torch.device("meta"):
        inputs = tuple(torch.empty(1, c, *SIZE) for c in (LOW_CHANNELS, IN_CHANNELS))
        counts = {}
        for name, row in TABLE_3.items():
            module = (row.build_counted or row.build)().eval()
            counts[name] = parameters(module), count_operations(module, *inputs)
            verdicts += _verdicts(name, row.parameters, row.gflops, *counts[name])
        text = OnLastMap(DatasetContext(ASPP(IN_CHANNELS, CHANNELS), within_attention=False)).eval()
        added = [
            ours - aspp
            for ours, aspp in zip(
                (parameters(text), count_operations(text, *inputs)), counts["ASPP"], strict=True
            )
        ]
    return verdicts + _verdicts("ASPP+DCA, added, text", *TEXT_ADDS.values(), *added)


def _verdicts(name: str, millions: str, gigas: str, count: int, operations: int) -> list[Verdict]:
    return [
        Verdict(TABLE, f"{name}, parameters", millions, count / 1e6, "M", f"{count:,}"),
        Verdict(TABLE, f"{name}, FLOPs", gigas, operations / 1e9, "G", "convention T"),
    ]


def multiply_accumulates() -> dict[str, float]:
    """Billions of multiply-accumulates with the attentions' products, as we run the modules."""
    counts = {}
    with torch.device("meta"), torch.no_grad():
        inputs = tuple(torch.empty(1, c, *SIZE) for c in (LOW_CHANNELS, IN_CHANNELS))
        for name, row in TABLE_3.items():
            with flop_counter() as counter:
                row.build().eval()(*inputs)
            counts[name] = counter.get_total_flops() / 2e9
    return counts


def product_lines() -> list[str]:
    counts = multiply_accumulates()
    cheaper = [name for name in counts if counts[name] < counts["DCA"]]
    listed = ", ".join(f"{name} {count:.1f}" for name, count in counts.items())
    return [
        f"at {SIZE[0]} x {SIZE[1]} with the attentions' products, which the paper's tool leaves "
        f"out, in GMAC as executed: {listed}.",
        f"so counted, {' and '.join(cheaper)} cost less than DCA, which has the fewest in the "
        "paper.",
    ]


def build_case(size: tuple[int, int], options: Options) -> Case:
    height, width = size

    def row(name: str, build: Callable[[], nn.Module]) -> Contender:
        # The widest concatenation, twice, and as much again for what it is made of.
        peak_bytes = options.dtype.itemsize * 4 * 2 * IN_CHANNELS * height * width
        return Contender(
            name,
            lambda: randomize(build()).to(options.dtype).eval(),
            peak_bytes=peak_bytes,
            family=name,
        )

    def inputs() -> tuple[Tensor, Tensor]:
        return tuple(x.to(options.device, options.dtype) for x in maps(height, width))

    rows = both_formats(*(row(name, published.build) for name, published in TABLE_3.items()))
    title = f"MCIBI, Table 3, map of {height} x {width}"
    return Case(title, inputs, (1, CHANNELS, height, width), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="of the timed map (default: 128x128)"
    )
    add_options(parser)
    chosen = parser.parse_args(arguments)
    options = read_options(chosen)
    size = chosen.size or ((24, 24) if chosen.quick else SIZE)
    case = build_case(size, options)
    times = {name: row.milliseconds for name, row in TABLE_3.items()}

    def complete(report: Report, checked: object) -> None:
        (result,) = report.results
        report.lines[case.title] = product_lines()
        report.verdicts += count_verdicts()
        report.verdicts += ratio_verdicts(TABLE, "time", times, "DCA", result, milliseconds)

    return run_benchmark("context_modules", [case], options, {"size": size}, complete)


if __name__ == "__main__":
    sys.exit(main())
