# SPDX-License-Identifier: Apache-2.0
"""Table 2 of ANN (Zhu et al., ICCV 2019): time, memory and parameters of whole networks; and, with
--heads, what stands behind the backbone in five networks, against the same in eager torch.

    python benchmarks/papers/whole_networks.py --quick
    python benchmarks/papers/whole_networks.py --size 1024x2048 --device cuda --json table2.json
    python benchmarks/papers/whole_networks.py --heads
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import _path  # noqa: F401
from baselines.eager import eager_twin
from baselines.released import randomize
from ctxops.models import SegmentationNetwork, create_model
from harness import (
    Case,
    Contender,
    Options,
    Report,
    Verdict,
    add_options,
    both_formats,
    megabytes,
    milliseconds,
    parse_size,
    ratio_verdicts,
    read_options,
    run_benchmark,
)
from papers.network_cases import network_case, parameters, statistics

CLASSES = 19
PAPER_SIZE = (1024, 2048)


@dataclasses.dataclass(frozen=True)
class Network:
    """A row of Table 2, on one Titan Xp: arguments of create_model beyond the classes, seconds, MB,
    millions of parameters."""

    arguments: dict[str, object]
    seconds: float
    megabytes: float
    parameters: str

    def build(self) -> nn.Module:
        return create_model(num_classes=CLASSES, **self.arguments)


# PSANet's figure counts its auxiliary head, the others have none.
TABLE_2 = {
    "DenseASPP": Network({"name": "denseaspp", "backbone": "densenet161"}, 0.568, 7973, "35.63"),
    "PSANet": Network(
        {"name": "psanet", "backbone": "resnet101s", "mask_size": (129, 257)},
        0.672,
        5233,
        "102.66",
    ),
    "ANN": Network(
        {"name": "ann", "backbone": "resnet101s", "auxiliary_channels": 0}, 0.611, 3375, "63.17"
    ),
}


def count_verdicts() -> list[Verdict]:
    """Parameters with the running statistics of batch norm, as the table counts, and without."""
    verdicts = []
    for name, row in TABLE_2.items():
        with torch.device("meta"):
            network = row.build()
        head = "no auxiliary head" if network.auxiliary is None else "with its auxiliary head"
        count, moving = parameters(network), statistics(network)
        for total, how in ((count + moving, "with running statistics"), (count, "without them")):
            verdicts.append(
                Verdict(
                    "ANN, Table 2",
                    f"{name}, parameters",
                    row.parameters,
                    total / 1e6,
                    "M",
                    f"{total:,}, {how}, {head}",
                )
            )
    return verdicts


class Head(nn.Module):
    """A network without its backbone: from the maps that it takes to the logits."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        network.encoder = nn.Identity()
        self.network = network

    def forward(self, *maps: Tensor) -> Tensor:
        return self.network.predict(maps).logits


# A network, its options, and the channels of the maps that its head takes, of a ResNet's.
HEADS = {
    "APNB": ("ann", {}, (1024, 2048)),
    "LDv2": ("gald", {"global_aggregation": "aspp", "local_distribution": "ldv2"}, (2048,)),
    "GFF": ("gff", {}, (256, 512, 1024, 2048)),
    "criss-cross": ("ccnet", {}, (2048,)),
    "DCA": ("mcibi", {"context": None}, (2048,)),
}


def head_case(name: str, image: tuple[int, int], options: Options) -> Case:
    """Ours and its twin in eager torch, on a backbone's maps of an image of that size."""
    model, arguments, widths = HEADS[name]
    # Of 256 channels at a quarter of the side, all others at an eighth.
    shapes = [
        (1, width, *(side // (4 if width == 256 else 8) for side in image)) for width in widths
    ]

    def build() -> Head:
        network = create_model(model, "resnet50", CLASSES, auxiliary_channels=0, **arguments)
        return Head(network).eval()

    def head() -> nn.Module:
        module = randomize(build())
        if model == "mcibi":
            memory = module.network.bank.memory
            memory.copy_(torch.randn(memory.shape, generator=torch.Generator().manual_seed(1)))
        return module.to(options.dtype)

    def inputs() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        maps = (torch.randn(shape, generator=generator).relu() for shape in shapes)
        return tuple(x.to(options.device, options.dtype) for x in maps)

    with torch.device("meta"):
        output_shape = build()(*(torch.empty(shape) for shape in shapes)).shape
    # Some maps at a quarter of the side, as wide as the inputs together.
    peak_bytes = 4 * options.dtype.itemsize * (image[0] * image[1] // 16) * sum(widths)
    eager = Contender("eager torch", lambda: eager_twin(head()), peak_bytes)
    ours = Contender("ctxops", head, peak_bytes, ours=True)
    title = f"head of {name}, image of {image[0]} x {image[1]}"
    return Case(title, inputs, tuple(output_shape), both_formats(eager, ours))


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
