# SPDX-License-Identifier: Apache-2.0
"""Table 3 of GFF (Li et al., AAAI 2020): operations and parameters of PSPNet, of gated fully fusion
on it, and of the dense feature pyramid besides, for an image of 512 x 512.

    python benchmarks/papers/gff_cost.py
    python benchmarks/papers/gff_cost.py --json gff.json

Nothing is computed but shapes: everything runs on the meta device.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence

import torch

import _path  # noqa: F401
from ctxops.models import SegmentationNetwork, create_model
from harness import Verdict, run_counts
from papers.conventions import count_operations
from papers.network_cases import parameters

IMAGE, CLASSES = (1, 3, 512, 512), 19


@dataclasses.dataclass(frozen=True)
class Row:
    """``operations`` in 10^9, ``parameters`` in millions, as printed. ``auxiliary``: is the
    auxiliary head among the operations? That fits the first row alone."""

    network: Callable[[], SegmentationNetwork]
    operations: str
    parameters: str
    auxiliary: bool


def _network(name: str, **options: object) -> SegmentationNetwork:
    common = {"ceil_mode": True, "auxiliary_channels": 512, "auxiliary_bias": True}
    return create_model(name, "resnet101s", CLASSES, **common, **options).eval()


def pspnet() -> SegmentationNetwork:
    return _network("pspnet", branch_activation=False)


def gff(*, pyramid: bool) -> SegmentationNetwork:
    return _network("gff", dense_pyramid=pyramid, literal=pyramid)


TABLE_3 = {
    "PSPNet": Row(pspnet, "580.1", "65.6", auxiliary=True),
    "PSPNet + GFF": Row(lambda: gff(pyramid=False), "600.1", "69.7", auxiliary=False),
    "PSPNet + GFF + DFP": Row(lambda: gff(pyramid=True), "625.5", "70.5", auxiliary=False),
}


def operations(network: SegmentationNetwork, *, auxiliary: bool) -> int:
    """By convention F, in evaluation; the auxiliary head, which that leaves out, by itself."""
    image = torch.empty(IMAGE, device="meta")
    count = count_operations(network, image, convention="F")
    if auxiliary:
        count += count_operations(network.auxiliary, network.encoder(image)[-2], convention="F")
    return count


def verdicts() -> list[Verdict]:
    table, rows = "GFF, Table 3", []
    for name, row in TABLE_3.items():
        with torch.device("meta"):
            network = row.network()
        count = operations(network, auxiliary=row.auxiliary) / 1e9
        head = "with" if row.auxiliary else "without"
        how = f"{count:.2f}, convention F, stem pooling to 129 x 129, {head} auxiliary head"
        rows.append(Verdict(table, f"{name}, FLOPs", row.operations, count, "G", how))
        count = parameters(network) - parameters(network.auxiliary)
        how = f"{count:,}, without auxiliary head"
        rows.append(Verdict(table, f"{name}, parameters", row.parameters, count / 1e6, "M", how))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    return run_counts("gff_cost", __doc__, verdicts, arguments)


if __name__ == "__main__":
    sys.exit(main())
