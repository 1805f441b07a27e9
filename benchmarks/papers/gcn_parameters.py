# SPDX-License-Identifier: Apache-2.0
"""Tables 2, 4 and 11 of GCN (Peng et al., Large Kernel Matters, CVPR 2017): parameters of global
convolution and of what it is compared with, and the cost of ResNet50-GCN.

    python benchmarks/papers/gcn_parameters.py
    python benchmarks/papers/gcn_parameters.py --json gcn.json

Nothing is computed but shapes: everything runs on the meta device.
"""

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import _path  # noqa: F401
from ctxops.nn import ConvolutionStack, GCNBottleneck, GlobalConvolution
from harness import Verdict, flop_counter, run_counts
from papers.network_cases import parameters

CHANNELS, CLASSES = 2048, 21  # of res-5, and of PASCAL VOC

# Thousands of parameters after res-5, by kernel size.
TABLE_2 = {
    "GCN": {3: 260, 5: 434, 7: 608, 9: 782},
    "Conv": {3: 387, 5: 1075, 7: 2107, 9: 3484},
}
# Thousands of parameters, by the channels m between the convolutions of the stack.
TABLE_4 = {2048: 75_885, 1024: 28_505, 210: 4_307}
TABLE_4_GCN = 608
# MFLOPs of all convolutions, of ResNet50 and of ResNet50-GCN.
TABLE_11 = 3700


class Bottleneck(nn.Module):
    """The bottleneck of ResNet-50, without norms; the stride stands on the first convolution."""

    def __init__(self, in_channels: int, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride, bias=False),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.Conv2d(channels, out_channels, 1, bias=False),
        )
        self.shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


def resnet_stage(
    in_channels: int, channels: int, out_channels: int, depth: int, stride: int
) -> nn.Sequential:
    return nn.Sequential(
        Bottleneck(in_channels, channels, out_channels, stride),
        *(Bottleneck(out_channels, channels, out_channels, 1) for _ in range(1, depth)),
    )


def gcn_stage(
    in_channels: int, channels: int, out_channels: int, kernel_size: int, depth: int
) -> nn.Sequential:
    return nn.Sequential(
        GCNBottleneck(in_channels, channels, out_channels, kernel_size, 2),
        *(
            GCNBottleneck(out_channels, channels, out_channels, kernel_size)
            for _ in range(1, depth)
        ),
    )


def resnet50(*, gcn: bool) -> nn.Sequential:
    """The convolutions of Table 11, conv1 first. res-2 and res-3 are the same in both networks."""
    last = (
        (gcn_stage(512, 85, 1024, 5, 6), gcn_stage(1024, 128, 2048, 7, 3))
        if gcn
        else (resnet_stage(512, 256, 1024, 6, 2), resnet_stage(1024, 512, 2048, 3, 2))
    )
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
        nn.MaxPool2d(3, 2, padding=1),
        resnet_stage(64, 64, 256, 3, 1),
        resnet_stage(256, 128, 512, 4, 2),
        *last,
    )


def multiply_accumulates(module: nn.Module, x: Tensor) -> int:
    with flop_counter() as counter:
        module(x)
    return counter.get_total_flops() // 2


def _thousands(table: str, what: str, paper: int, module: nn.Module) -> Verdict:
    count = parameters(module)
    how = f"{count:,}, no biases"
    title = f"GCN, Table {table}"
    return Verdict(title, f"{what}, parameters", str(paper), count / 1000, "K", how)


def table_2() -> list[Verdict]:
    """Of the 260K, ours has 260,694: the one figure that the paper cut instead of rounding it."""
    modules = {
        "GCN": lambda k: GlobalConvolution(CHANNELS, CLASSES, k),
        "Conv": lambda k: nn.Conv2d(CHANNELS, CLASSES, k, bias=False),
    }
    return [
        _thousands("2", f"{name}, k = {k}", paper, modules[name](k))
        for name, papers in TABLE_2.items()
        for k, paper in papers.items()
    ]


def table_4() -> list[Verdict]:
    """Everything has the window of k = 7."""
    stacks = [
        _thousands("4", f"stack, m = {m}", paper, ConvolutionStack(CHANNELS, CLASSES, 7, m))
        for m, paper in TABLE_4.items()
    ]
    return [*stacks, _thousands("4", "GCN", TABLE_4_GCN, GlobalConvolution(CHANNELS, CLASSES, 7))]


def table_11() -> list[Verdict]:
    """The table has one figure of two digits for both networks, and no count gives it for both."""
    image = torch.empty(1, 3, 224, 224)
    readings = {
        "ResNet50": "stride on the first 1 x 1, shortcuts counted",
        "ResNet50-GCN": "branches summed, each 1-D convolution with the stride of its axis",
    }
    verdicts = []
    for name, reading in readings.items():
        network = resnet50(gcn=name.endswith("GCN"))
        stem = multiply_accumulates(network[0], image)
        for count, how in ((0, reading), (stem, f"{reading}, without conv1")):
            macs = (multiply_accumulates(network, image) - count) / 1e6
            verdicts.append(
                Verdict("GCN, Table 11", f"{name}, convolutions", str(TABLE_11), macs, "MMAC", how)
            )
    return verdicts


def verdicts() -> list[Verdict]:
    with torch.device("meta"):
        return [*table_2(), *table_4(), *table_11()]


def main(arguments: Sequence[str] | None = None) -> int:
    return run_counts("gcn_parameters", __doc__, verdicts, arguments)


if __name__ == "__main__":
    sys.exit(main())
