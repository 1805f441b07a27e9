# SPDX-License-Identifier: Apache-2.0
"""Table 1 of ANN (Zhu et al., ICCV 2019): a non-local block (NB) against its asymmetric pyramid
form (APNB), beside what this machine measures.

    python benchmarks/nonlocal_vs_apnb.py
    python benchmarks/nonlocal_vs_apnb.py --quick
    python benchmarks/nonlocal_vs_apnb.py --thorough --json table1.json --plot table1.png
    python benchmarks/nonlocal_vs_apnb.py --size 96x96 --backward --train
    python benchmarks/nonlocal_vs_apnb.py --size 256x128 --breakdown
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from baselines.functions import SDPA_BACKENDS
from baselines.released import ReleasedAPNB, ReleasedNonLocal2d, SdpaNonLocal2d, randomize
from ctxops.nn import APNB, NonLocal2d
from harness import (
    Case,
    Contender,
    Entry,
    Options,
    Oracle,
    Paper,
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
    time_by_operation,
)
from harness.measure import Result
from papers.conventions import count_operations

# Seconds that the program takes on two cores unless it is told otherwise.
BUDGET = 150.0
# Positions at which the rows are judged against float64, which needs no N x N matrix there.
SAMPLED_POSITIONS = 256
# Calls on larger maps take seconds. A probe on a smaller one tells the faster memory format.
PROBED_POSITIONS = 2**13
PROBE_SIZE = (48, 48)

# Table 1, on a Titan Xp: C = 2048, C^ = 256, batch 1.
TABLE_1 = {
    ("NB", (96, 96)): Paper(58.0, 609, 19.5),
    ("APNB", (96, 96)): Paper(15.5, 150, 12.4),
    ("NB", (256, 128)): Paper(601.4, 7797, 179.4),
    ("APNB", (256, 128)): Paper(43.5, 277, 30.8),
}


@dataclasses.dataclass(frozen=True)
class Block:
    """One configuration of the blocks: B, C, C^ (keys and values), H, W."""

    batch: int
    channels: int
    key_channels: int
    height: int
    width: int

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def maps(self) -> tuple[int, int]:
        """Elements of an input map and of an embedded map."""
        positions = self.batch * self.positions
        return positions * self.channels, positions * self.key_channels

    def paper(self, family: str) -> Paper | None:
        if (self.batch, self.channels, self.key_channels) != (1, 2048, 256):
            return None
        return TABLE_1.get((family, (self.height, self.width)))

    def paper_count(self, family: str) -> int:
        """The count of the authors' tool, which Table 1 prints as FLOPs."""
        widths = (self.channels, self.key_channels, self.key_channels)
        with torch.device("meta"):
            x = torch.empty(self.batch, self.channels, self.height, self.width)
            block = NonLocal2d(*widths) if family == "NB" else APNB(*widths, fold=False)
            return count_operations(block, x, convention="S")

    def peak_bytes(self, family: str, itemsize: int, backward: bool) -> int:
        """An upper bound of what a call holds beyond its input.

        Forward: the output, the embedded maps and what stands between convolution, batch norm and
        ReLU, and for NB two N x N matrices. The backward keeps one of these and needs two more.
        """
        large, small = self.maps
        square = self.batch * self.positions**2 if family == "NB" else 0
        if backward:
            return itemsize * (3 * large + 12 * small + 3 * square)
        return itemsize * (large + 6 * small + 2 * square)

    def sampled_peak_bytes(self) -> int:
        """The same, of the float64 form at SAMPLED_POSITIONS; its input is float64 as well."""
        large, small = self.maps
        return 8 * (large + 6 * small + 3 * SAMPLED_POSITIONS * self.positions * self.batch)


def build_case(block: Block, options: Options, backward: bool, train: bool) -> Case:
    """NB and APNB as released, NB on SDPA (on a GPU also on single backends), APNB compiled, and
    ours, in both memory formats."""
    c, k = block.channels, block.key_channels
    weights = randomize(ReleasedNonLocal2d(c, k, k)).state_dict()
    itemsize = options.dtype.itemsize

    def module(kind: Callable[..., nn.Module], dtype: torch.dtype) -> nn.Module:
        block = kind(c, k, k)
        block.load_state_dict(weights)
        # Rounded to the benchmark's dtype first, so that float64 computes with the same weights.
        return block.to(options.dtype).to(dtype).to(options.device).train(train)

    def row(name: str, kind: Callable[..., nn.Module], family: str, peak_family: str) -> Contender:
        return Contender(
            name,
            lambda: module(kind, options.dtype),
            block.peak_bytes(peak_family, itemsize, backward),
            family=family,
        )

    def inputs() -> tuple[Tensor]:
        # Noise alone would pool to equal anchors, and any attention to their mean. Regions make
        # anchors that differ, and queries that prefer some of them.
        generator = torch.Generator().manual_seed(2)
        size = (block.height, block.width)
        regions = torch.randn(block.batch, c, 8, 8, generator=generator)
        noise = torch.randn(block.batch, c, *size, generator=generator)
        x = 2 * F.interpolate(regions, size, mode="bilinear", align_corners=True) + noise
        return (x.to(options.device, options.dtype),)

    nb = dataclasses.replace(
        row("NB as released", ReleasedNonLocal2d, "NB", "NB"), paper=block.paper("NB")
    )
    sdpa = [row("NB on SDPA", SdpaNonLocal2d, "NB", "APNB")]
    if options.device.type == "cuda":
        sdpa += [
            row(f"NB on {name}", functools.partial(_nb_on, backend), "NB", "APNB")
            for name, backend in SDPA_BACKENDS.items()
        ]
    apnb = row("APNB as released", ReleasedAPNB, "APNB", "APNB")
    compiled = dataclasses.replace(apnb, name="APNB compiled", compile=True)
    apnb = dataclasses.replace(apnb, paper=block.paper("APNB"))
    ours = dataclasses.replace(row("ctxops APNB", APNB, "APNB", "APNB"), ours=True)

    def oracle(family: str, kind: type[nn.Module]) -> Oracle:
        if backward:  # a gradient is a sum over all positions
            peak = block.peak_bytes(family, 8, backward) + 8 * block.maps[0]
            return Oracle(lambda: module(kind, torch.float64), peak)
        generator = torch.Generator().manual_seed(3)
        positions = torch.randperm(block.positions, generator=generator)[:SAMPLED_POSITIONS]
        positions = positions.to(options.device)

        def build() -> Callable[[Tensor], Tensor]:
            return functools.partial(module(kind, torch.float64).at, positions=positions)

        return Oracle(build, block.sampled_peak_bytes(), positions)

    height, width = PROBE_SIZE
    probed = dataclasses.replace(block, height=height, width=width)
    return Case(
        _title(block, backward, train),
        inputs,
        (block.batch, c, block.height, block.width),
        both_formats(nb, *sdpa, apnb, compiled, ours),
        {"NB": oracle("NB", ReleasedNonLocal2d), "APNB": oracle("APNB", ReleasedAPNB)},
        backward,
        _make_probe(probed, options, train) if block.positions > PROBED_POSITIONS else None,
    )


def _nb_on(backend: SDPBackend, *widths: int) -> nn.Module:
    block = SdpaNonLocal2d(*widths)
    block.backend = backend
    return block


@functools.cache
def _make_probe(block: Block, options: Options, train: bool) -> Callable[[], Case]:
    """One function for all sizes, so that the harness probes once."""

    def probe() -> Case:
        case = build_case(block, options, False, train)
        return dataclasses.replace(case, title=f"{block.height} x {block.width}")

    return probe


def _title(block: Block, backward: bool, train: bool) -> str:
    passes = "forward + backward" if backward else "forward"
    batch = f", batch {block.batch}" if block.batch > 1 else ""
    mode = ", training mode" if train else ""
    return (
        f"{block.height} x {block.width}, C = {block.channels}, C^ = {block.key_channels}{batch}, "
        f"{passes}{mode}"
    )


def accuracy_line(entries: Sequence[Entry]) -> str | None:
    """The error of ours beside that of the released form, where both were judged by float64."""
    errors: dict[str, float] = {}
    for e in entries:
        if e.against == "float64":
            errors[e.contender.name] = max(e.error, errors.get(e.contender.name, 0.0))
    if not {"ctxops APNB", "APNB as released"} <= errors.keys():
        return None
    return (
        "relative L2 error against the released APNB in float64: "
        f"ctxops {errors['ctxops APNB']:.2e}, as released {errors['APNB as released']:.2e}."
    )


def counting_lines(block: Block) -> list[str]:
    """Table 1's GFLOPs beside the same count of this configuration."""
    nb, apnb = block.paper_count("NB") / 1e9, block.paper_count("APNB") / 1e9
    lines = [
        f"In the paper's count NB has {nb:.1f} and APNB {apnb:.1f} GFLOPs: convolutions once, as "
        "multiply-accumulates (APNB's query and key are one), bias, batch norm and ReLU; matrix "
        "products at 2, but only one of NB's two."
    ]
    if block.paper("APNB") == TABLE_1["APNB", (256, 128)]:
        convolutions = 3 * block.positions * block.channels * block.key_channels / 1e9
        lines.append(
            "The 43.5 GFLOPs that Table 1 prints for APNB do not follow from the paper's formula: "
            f"the three 1x1 convolutions alone are {convolutions:.1f}."
        )
    return lines


def count_verdicts() -> list[Verdict]:
    """Table 1's operations, as the authors' tool counts them."""
    verdicts = []
    for (family, size), paper in TABLE_1.items():
        count = Block(1, 2048, 256, *size).paper_count(family) / 1e9
        what = f"{family}, {size[0]} x {size[1]}, FLOPs"
        how = f"{count:.3f}, convention S"
        verdicts.append(Verdict("ANN, Table 1", what, f"{paper.gflops}", count, "G", how))
    return verdicts


def block_ratios(block: Block, result: Result) -> list[Verdict]:
    """NB over APNB, as released and ours; where the table has not the size, beside 96 x 96."""
    size = (block.height, block.width)
    nb, apnb = (TABLE_1.get((name, size), TABLE_1[name, (96, 96)]) for name in ("NB", "APNB"))
    verdicts = []
    for reference in ("APNB as released", "ctxops APNB"):
        for what, papers, figure in (
            ("time", (nb.milliseconds, apnb.milliseconds), milliseconds),
            ("memory", (nb.megabytes, apnb.megabytes), megabytes),
        ):
            names = dict(zip(("NB as released", reference), papers, strict=True))
            verdicts += ratio_verdicts("ANN, Table 1", what, names, reference, result, figure)
    return verdicts


def add_breakdown(report: Report, checked: Sequence[list[Entry]], options: Options) -> None:
    """Figure 2: time by operation, each of NB, APNB and ours in its faster memory format."""
    for result in report.results:
        names = ("NB as released", "APNB as released", "ctxops APNB")
        rows = [row for name in names if (row := result.fastest(name))]
        report.breakdown[result.case.title] = {
            row.name: time_by_operation(row.entry.runner, options.device) for row in rows
        }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--size", type=parse_size, action="append", metavar="HxW", help="repeatable"
    )
    parser.add_argument("--channels", type=int, default=2048, help="C (default: %(default)s)")
    parser.add_argument("--key-channels", type=int, default=256, help="C^ (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--train", action="store_true", help="batch norm in training mode")
    parser.add_argument("--breakdown", action="store_true", help="time by operation (Figure 2)")
    add_options(parser, BUDGET)
    chosen = parser.parse_args(arguments)
    options = read_options(chosen)
    sizes = chosen.size or ([(48, 48)] if chosen.quick else [(96, 96), (256, 128)])
    blocks = [Block(chosen.batch, chosen.channels, chosen.key_channels, *size) for size in sizes]
    cases = [build_case(block, options, chosen.backward, chosen.train) for block in blocks]

    def complete(report: Report, checked: Sequence[list[Entry]]) -> None:
        for block, case, entries in zip(blocks, cases, checked, strict=True):
            accuracy = accuracy_line(entries)
            report.lines[case.title] = [accuracy] * (accuracy is not None) + counting_lines(block)
        report.verdicts += count_verdicts()
        if not (chosen.backward or chosen.train):
            for block, result in zip(blocks, report.results, strict=True):
                report.verdicts += block_ratios(block, result)
        if chosen.breakdown:
            add_breakdown(report, checked, options)

    settings = {
        "sizes": sizes,
        "channels": chosen.channels,
        "key_channels": chosen.key_channels,
        "batch": chosen.batch,
        "backward": chosen.backward,
        "train": chosen.train,
        "paper": "Table 1: GFLOPs, MB and ms on a Titan Xp; its count is named in each summary",
    }
    return run_benchmark("nonlocal_vs_apnb", cases, options, settings, complete)


if __name__ == "__main__":
    sys.exit(main())
