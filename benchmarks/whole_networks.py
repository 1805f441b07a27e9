# SPDX-License-Identifier: Apache-2.0
"""Table 2 of ANN (Zhu et al., ICCV 2019): time, memory and parameters of whole networks; and, with
--heads, what stands behind the backbone in five networks, against the same in eager torch.

    python benchmarks/whole_networks.py --quick
    python benchmarks/whole_networks.py --size 1024x2048 --device cuda --json table2.json
    python benchmarks/whole_networks.py --heads
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

import torch
from ctxops.models import Encoder, SegmentationNetwork
from torch import Tensor, nn

import gald_efficiency
import gff_cost
from ctxops.nn import AsymmetricNonLocalContext, DatasetContextAggregation
from ctxops.nn.cbr import cbr
from eager import eager_twin
from harness import (
    Case,
    Contender,
    Options,
    Report,
    Verdict,
    add_options,
    both_formats,
    parse_size,
    read_options,
    run_benchmark,
)
from networks import (
    megabytes,
    milliseconds,
    network_case,
    parameters,
    ratio_verdicts,
    statistics,
)
from released import randomize

CHANNELS, CLASSES = 512, 19
PAPER_SIZE = (1024, 2048)


@dataclasses.dataclass(frozen=True)
class Network:
    """A row of Table 2, on one Titan Xp: seconds, MB, millions of parameters."""

    build: Callable[[], nn.Module]
    seconds: float
    megabytes: float
    parameters: str


def ann() -> SegmentationNetwork:
    context = AsymmetricNonLocalContext(1024, 2048, CHANNELS)
    encoder = Encoder("resnet101s", 8)
    options = {"levels": (-2, -1), "auxiliary_channels": 0}
    return SegmentationNetwork(encoder, context, CHANNELS, CLASSES, **options)


TABLE_2 = {"ANN": Network(ann, 0.611, 3375, "63.17")}


def count_verdicts() -> list[Verdict]:
    """Parameters, with the running statistics of batch norm, which the other rows' figures hold."""
    verdicts = []
    for name, row in TABLE_2.items():
        with torch.device("meta"):
            network = row.build()
        count, moving = parameters(network), statistics(network)
        for total, how in ((count + moving, "with running statistics"), (count, "without them")):
            verdicts.append(
                Verdict(
                    "ANN, Table 2",
                    f"{name}, parameters",
                    row.parameters,
                    total / 1e6,
                    "M",
                    f"{total:,}, {how}, no auxiliary head",
                )
            )
    return verdicts


class DCAHead(nn.Module):
    """MCIBI's network behind its backbone: the memory's context, by the first head's classes."""

    def __init__(self) -> None:
        super().__init__()
        self.dca = DatasetContextAggregation(2048, CHANNELS)
        self.first = cbr(CHANNELS, CHANNELS, 1, nn.BatchNorm2d).append(
            nn.Conv2d(CHANNELS, CLASSES, 1)
        )
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("memory", torch.randn(CLASSES, CHANNELS, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        r = self.dca.reduce(x)
        return self.dca(r, self.first(r), self.memory)


# What stands between the backbone's maps and the classifier, and the channels of the maps it takes.
HEADS = {
    "APNB": (lambda: AsymmetricNonLocalContext(1024, 2048, CHANNELS), (1024, 2048)),
    "LDv2": (gald_efficiency.TABLE_4["ASPP + LDv2"].decoder, (2048,)),
    "GFF": (lambda: gff_cost.GFFDecoder(pyramid=True), (256, 512, 1024, 2048)),
    "criss-cross": (gald_efficiency.TABLE_6["CCNet"][1], (2048,)),
    "DCA": (DCAHead, (2048,)),
}


def head_case(name: str, image: tuple[int, int], options: Options) -> Case:
    """Ours and its twin in eager torch, on a backbone's maps of an image of that size."""
    build, widths = HEADS[name]
    # Of 256 channels at a quarter of the side, all others at an eighth.
    shapes = [
        (1, width, *(side // (4 if width == 256 else 8) for side in image)) for width in widths
    ]

    def head() -> nn.Module:
        return randomize(build()).to(options.dtype).eval()

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        maps = (torch.randn(shape, generator=generator).relu() for shape in shapes)
        return tuple(x.to(options.device, options.dtype) for x in maps)

    with torch.device("meta"):
        output_shape = build().eval()(*(torch.empty(shape) for shape in shapes)).shape
    # Some maps as wide as all inputs and the output together.
    positions = image[0] * image[1] // 16
    peak_bytes = 4 * options.dtype.itemsize * positions * (sum(widths) + output_shape[1])
    eager = Contender("eager torch", lambda: eager_twin(head()), peak_bytes)
    ours = Contender("ctxops", head, peak_bytes, ours=True)
    title = f"head of {name}, image of {image[0]} x {image[1]}"
    return Case(title, inputs, tuple(output_shape), (*both_formats(eager), *both_formats(ours)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="HxW",
        help="of the image (default: 512x512; on CUDA the table's 1024x2048)",
    )
    parser.add_argument("--heads", action="store_true", help="heads alone, ours against eager")
    add_options(parser)
    chosen = parser.parse_args(arguments)
    options = read_options(chosen)
    size = chosen.size or _default_size(options, heads=chosen.heads)
    settings = {"size": size, "heads": chosen.heads}
    if chosen.heads:
        cases = [head_case(name, size, options) for name in HEADS]
        return run_benchmark("whole_networks", cases, options, settings)
    title = f"ANN, Table 2, image of {size[0]} x {size[1]}"
    builders = {name: row.build for name, row in TABLE_2.items()}
    case = network_case(title, builders, size, options, classes=CLASSES)

    def complete(report: Report, checked: object) -> None:
        (result,) = report.results
        if size != PAPER_SIZE:
            report.lines[title] = [
                "The table's image is 1024 x 2048: --size 1024x2048, which takes minutes on a CPU."
            ]
        report.verdicts += count_verdicts()
        for what, papers, figure in (
            ("time", {name: row.seconds for name, row in TABLE_2.items()}, milliseconds),
            ("memory", {name: row.megabytes for name, row in TABLE_2.items()}, megabytes),
        ):
            report.verdicts += ratio_verdicts("ANN, Table 2", what, papers, "ANN", result, figure)

    return run_benchmark("whole_networks", [case], options, settings, complete)


def _default_size(options: Options, *, heads: bool) -> tuple[int, int]:
    if options.quick:
        return (256, 256) if heads else (128, 256)
    return PAPER_SIZE if options.device.type == "cuda" and not heads else (512, 512)


if __name__ == "__main__":
    sys.exit(main())
