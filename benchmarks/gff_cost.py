# SPDX-License-Identifier: Apache-2.0
"""Table 3 of GFF (Li et al., AAAI 2020): operations and parameters of PSPNet, of gated fully fusion
on it, and of the dense feature pyramid besides, for an image of 512 x 512.

    python benchmarks/gff_cost.py
    python benchmarks/gff_cost.py --json gff.json

Nothing is computed but shapes: everything runs on the meta device.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

import torch
from ctxops.models import Encoder, SegmentationNetwork
from torch import Tensor, nn

from conventions import count_operations
from ctxops.nn import DenseFeaturePyramid, GatedFullyFusion, PyramidPooling
from ctxops.nn.cbr import cbr
from ctxops.nn.feature_fusion import resize
from harness import Verdict, output_file, report_verdicts
from networks import parameters

IMAGE = (1, 3, 512, 512)
IN_CHANNELS, CHANNELS, CONTEXT, CLASSES = (256, 512, 1024, 2048), 256, 512, 19


class GFFDecoder(nn.Module):
    """The decoder as the text has it: gated fusion of four levels, two 3 x 3 CBR for each; then all
    maps and the context map, or all of the dense pyramid, concatenated at the finest size."""

    def __init__(self, *, pyramid: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d
        self.context = context_module()
        self.fuse = GatedFullyFusion(IN_CHANNELS, CHANNELS)
        self.refine = nn.ModuleList(
            cbr(CHANNELS, CHANNELS, 3, norm).extend(cbr(CHANNELS, CHANNELS, 3, norm))
            for _ in IN_CHANNELS
        )
        self.pyramid = (
            DenseFeaturePyramid([CHANNELS] * len(IN_CHANNELS), CONTEXT, CHANNELS, literal=True)
            if pyramid
            else None
        )
        levels = CHANNELS * len(IN_CHANNELS)
        self.channels = levels + (CHANNELS if pyramid else CONTEXT)

    def forward(self, *maps: Tensor) -> Tensor:
        context = self.context(maps[-1])
        fused = [refine(x) for refine, x in zip(self.refine, self.fuse(maps), strict=True)]
        if self.pyramid is not None:
            return torch.cat(self.pyramid(fused, context), dim=1)
        size = fused[0].shape[2:]
        return torch.cat([resize(x, size, align_corners=True) for x in (*fused, context)], dim=1)


@dataclasses.dataclass(frozen=True)
class Row:
    """``operations`` in 10^9, ``parameters`` in millions, as printed. ``auxiliary``: was the
    auxiliary head among the operations? It fits the first row alone."""

    network: Callable[[], SegmentationNetwork]
    operations: str
    parameters: str
    auxiliary: bool


def context_module() -> PyramidPooling:
    return PyramidPooling(IN_CHANNELS[-1], CONTEXT, activation=False, align_corners=True)


def pspnet() -> SegmentationNetwork:
    return _network(context_module(), CONTEXT, levels=(-1,))


def gff(*, pyramid: bool) -> SegmentationNetwork:
    decoder = GFFDecoder(pyramid=pyramid)
    return _network(decoder, decoder.channels, levels=(0, 1, 2, 3))


def _network(decoder: nn.Module, channels: int, levels: Sequence[int]) -> SegmentationNetwork:
    encoder = Encoder("resnet101s", 8, ceil_mode=True)
    options = {"levels": levels, "auxiliary_bias": True}
    return SegmentationNetwork(encoder, decoder, channels, CLASSES, **options).eval()


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
    table, made = "GFF, Table 3", []
    for name, row in TABLE_3.items():
        with torch.device("meta"):
            network = row.network()
        count = operations(network, auxiliary=row.auxiliary) / 1e9
        head = "with" if row.auxiliary else "without"
        how = f"{count:.2f}, convention F, stem pooling to 129 x 129, {head} auxiliary head"
        made.append(Verdict(table, f"{name}, FLOPs", row.operations, count, "G", how))
        count = parameters(network) - parameters(network.auxiliary)
        how = f"{count:,}, without auxiliary head"
        made.append(Verdict(table, f"{name}, parameters", row.parameters, count / 1e6, "M", how))
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every number")
    report_verdicts("gff_cost", verdicts(), parser.parse_args(arguments).json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
