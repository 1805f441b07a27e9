# SPDX-License-Identifier: Apache-2.0
"""Tables IV and VI of GALD (Li et al., TIP 2021): what local distribution costs, in parameters and
in time, beside the paper's figures.

    python benchmarks/papers/gald_efficiency.py --quick
    python benchmarks/papers/gald_efficiency.py --json gald.json

The head of Table IV is not described; the one here, our reading, is among those that give the 47.5
M parameters of its second row: 3 x 3 convolution to 512 channels, ASPP of 256, an auxiliary head.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn

import _path  # noqa: F401
from ctxops.models import Encoder, SegmentationNetwork, create_model
from ctxops.nn import ASPP, GALD, LDv1, LDv2
from ctxops.nn.cbr import cbr
from harness import (
    Report,
    Verdict,
    add_options,
    milliseconds,
    parse_size,
    ratio_verdicts,
    read_options,
    run_benchmark,
)
from papers.network_cases import network_case, parameters

IN_CHANNELS, CHANNELS, CLASSES = 2048, 512, 19


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """A row of Table IV, on one V100 at 512 x 512; ``parameters`` in millions."""

    backbone: str
    decoder: Callable[[], nn.Module]
    milliseconds: float
    parameters: str = ""


def _reduce() -> nn.Module:
    return cbr(IN_CHANNELS, CHANNELS, 3, nn.BatchNorm2d)


def _aspp() -> nn.Module:
    return ASPP(CHANNELS, 256, out_channels=CHANNELS)


def _distributed(local_distribution: nn.Module) -> nn.Module:
    gald = GALD(_aspp(), local_distribution, downsample=1, channels=CHANNELS, residual=False)
    return nn.Sequential(_reduce(), gald)


TABLE_4 = {
    "FCN": Arrangement("resnet50s", _reduce, 60),
    "ASPP": Arrangement("resnet50s", lambda: nn.Sequential(_reduce(), _aspp()), 65, "47.5"),
    "ASPP + LDv1": Arrangement("resnet50s", lambda: _distributed(LDv1(CHANNELS)), 70),
    "ASPP + LDv2": Arrangement(
        "resnet50s", lambda: _distributed(LDv2(CHANNELS, CHANNELS, CHANNELS)), 82
    ),
    "ASPP, ResNet-101": Arrangement(
        "resnet101s", lambda: nn.Sequential(_reduce(), _aspp()), 120, "65.4"
    ),
}
# What LDv1 and LDv2 add, in millions.
TABLE_4_ADDED = {"ASPP + LDv1": "0.4", "ASPP + LDv2": "2.3"}


# Millions of parameters, and the network on its own backbone. Of SPyGR and DGCNet, which the table
# counts too, there is none here.
TABLE_6 = {
    "PSPNet": ("42.1", "pspnet", {}),
    "DenseASPP": ("35.7", "denseaspp", {}),
    "CCNet": ("66.5", "ccnet", {}),
    "DANet": ("66.6", "danet", {}),
    "GFFNet": ("70.5", "gff", {}),
    "GALDv1": ("65.3", "gald", {}),
    "GALDv2": ("66.8", "gald", {"global_aggregation": "aspp", "local_distribution": "ldv2"}),
}


def network(row: Arrangement, *, auxiliary: bool = False) -> SegmentationNetwork:
    width = CHANNELS if auxiliary else 0
    encoder = Encoder(row.backbone, 8)
    return SegmentationNetwork(encoder, row.decoder(), CHANNELS, CLASSES, auxiliary_channels=width)


def count_verdicts() -> list[Verdict]:
    """The parameters of both tables. No head fits both ASPP rows of Table IV: their difference is
    17.9 M, that of the backbones 19.0 M."""
    verdicts = []
    with torch.device("meta"):
        for name, row in TABLE_4.items():
            if row.parameters:
                count = parameters(network(row, auxiliary=True))
                verdicts.append(_verdict("IV", name, row.parameters, count, "auxiliary head too"))
        aspp = parameters(TABLE_4["ASPP"].decoder())
        for name, paper in TABLE_4_ADDED.items():
            count = parameters(TABLE_4[name].decoder()) - aspp
            verdicts.append(
                _verdict("IV", f"{name}, added", paper, count, f"{CHANNELS} channels throughout")
            )
        for name, (paper, model, arguments) in TABLE_6.items():
            counted = create_model(model, num_classes=CLASSES, auxiliary_channels=0, **arguments)
            count = parameters(counted)
            verdicts.append(_verdict("VI", name, paper, count, "no auxiliary head"))
    return verdicts


def _verdict(table: str, name: str, paper: str, count: int, convention: str) -> Verdict:
    how = f"{count:,}, {convention}"
    return Verdict(f"GALD, Table {table}", f"{name}, parameters", paper, count / 1e6, "M", how)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="of the image (default: 512x512)"
    )
    add_options(parser)
    chosen = parser.parse_args(arguments)
    options = read_options(chosen)
    size = chosen.size or ((128, 128) if chosen.quick else (512, 512))
    builders = {name: functools.partial(network, row) for name, row in TABLE_4.items()}
    title = f"GALD, Table IV, image of {size[0]} x {size[1]}"
    case = network_case(title, builders, size, options, classes=CLASSES)
    times = {name: row.milliseconds for name, row in TABLE_4.items()}

    def complete(report: Report, checked: object) -> None:
        (result,) = report.results
        report.verdicts += count_verdicts()
        report.verdicts += ratio_verdicts(
            "GALD, Table IV", "time", times, "ASPP", result, milliseconds
        )

    return run_benchmark("gald_efficiency", [case], options, {"size": size}, complete)


if __name__ == "__main__":
    sys.exit(main())
