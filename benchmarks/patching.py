# SPDX-License-Identifier: Apache-2.0
"""Blocks of other packages before and after ``ctxops.patch``.

    python benchmarks/patching.py --quick
    python benchmarks/patching.py mmcv timm --size 64x64 --json patching.json

The blocks are the packages' own: those of packages that are not installed are left out by name.
Before anything is timed, outputs and gradients are compared, in float64 too.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ctxops
from baselines.released import randomize
from harness import (
    Case,
    Contender,
    Options,
    add_options,
    both_formats,
    parse_size,
    read_options,
    relative_error,
    run_benchmark,
)

# Of outputs and gradients. DNL's softmax of a temperature of 0.05 amplifies rounding.
IN_FLOAT64, SIZE_IN_FLOAT64 = 1e-6, (24, 20)
_NORM = {"type": "BN"}
_ANN = {
    "channels": 256,
    "query_scales": (1,),
    "key_pool_scales": (1, 3, 6, 8),
    "conv_cfg": None,
    "norm_cfg": _NORM,
    "act_cfg": {"type": "ReLU"},
}


class Block(NamedTuple):
    """A class by its full name, its arguments, channels of its maps in and out."""

    cls: str
    arguments: dict[str, Any]
    inputs: Sequence[int]
    output: int

    @property
    def package(self) -> str:
        return self.cls.partition(".")[0]

    @property
    def name(self) -> str:
        return self.cls.rpartition(".")[2]


# As in the networks of the packages, behind a ResNet of bottlenecks.
BLOCKS = [
    Block("mmcv.ops.cc_attention.CrissCrossAttention", {"in_channels": 512}, [512], 512),
    Block(
        "mmcv.cnn.bricks.non_local.NonLocal2d", {"in_channels": 512, "norm_cfg": _NORM}, [512], 512
    ),
    Block(
        "mmseg.models.decode_heads.dnl_head.DisentangledNonLocal2d",
        {"in_channels": 512, "norm_cfg": _NORM, "temperature": 0.05},
        [512],
        512,
    ),
    Block(
        "mmseg.models.decode_heads.ann_head.AFNB",
        {"low_in_channels": 1024, "high_in_channels": 2048, "out_channels": 2048, **_ANN},
        [1024, 2048],
        2048,
    ),
    Block(
        "mmseg.models.decode_heads.ann_head.APNB",
        {"in_channels": 512, "out_channels": 512, **_ANN},
        [512],
        512,
    ),
    Block(
        "segmentation_models_pytorch.decoders.pspnet.decoder.PSPModule",
        {"in_channels": 2048},
        [2048],
        4096,
    ),
    Block("timm.layers.non_local_attn.NonLocalAttn", {"in_channels": 1024}, [1024], 1024),
]


def find(block: Block) -> type[nn.Module]:
    """The class; ImportError where its package, or a part of it, is missing."""
    module, _, name = block.cls.rpartition(".")
    return getattr(importlib.import_module(module), name)


def build(block: Block, options: Options, patched: bool) -> nn.Module:
    """The block in evaluation mode, with the same weights each time."""
    module = randomize(find(block)(**block.arguments))
    if patched:
        for swap in ctxops.patch(module):
            if swap.refused:
                raise ValueError(f"ctxops.patch refuses {swap.cls}: {swap.refused}")
    return module.eval().to(options.device, options.dtype)


def make_inputs(
    block: Block, size: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, channels, *size) for channels in block.inputs]
    return tuple(
        torch.randn(shape, generator=generator).relu().to(device, dtype) for shape in shapes
    )


def difference_in_float64(block: Block, options: Options) -> float:
    """The largest relative error of the output and of a gradient of the patched block."""
    size = SIZE_IN_FLOAT64
    options = dataclasses.replace(options, dtype=torch.float64)
    results = []
    for patched in (False, True):
        module = build(block, options, patched)
        inputs = make_inputs(block, size, options.device, options.dtype)
        inputs = tuple(x.requires_grad_() for x in inputs)
        output = module(*inputs)
        upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
        output.backward(upstream.view_as(output))
        parameters = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        results.append([output.detach(), *(x.grad for x in inputs), torch.cat(parameters)])
    return max(relative_error(ours, theirs) for theirs, ours in zip(*results, strict=True))


def cases(block: Block, size: tuple[int, int], options: Options) -> list[Case]:
    """Of the forward, and of forward and backward."""
    positions, item = size[0] * size[1], options.dtype.itemsize
    maps = item * positions * (sum(block.inputs) + block.output)

    def case(backward: bool) -> Case:
        # The original holds the weights of all pairs several times.
        peak = (2 + backward) * (2 * maps + 2 * item * positions**2)
        rows = (
            Contender("original", partial(build, block, options, False), peak),
            Contender("patched", partial(build, block, options, True), peak, ours=True),
        )
        passes = "forward + backward" if backward else "forward"
        height, width = size
        return Case(
            f"{block.package}'s {block.name}, {' + '.join(map(str, block.inputs))} x {height} x "
            f"{width}, {passes}",
            partial(make_inputs, block, size, options.device, options.dtype),
            (1, block.output, *size),
            both_formats(*rows),
            backward=backward,
            kinked=True,
        )

    return [case(False), case(True)]


def installed(blocks: Sequence[Block], say: Callable[[str], object] = print) -> list[Block]:
    """Those whose class is there; what is missing is said."""
    found = []
    for block in blocks:
        try:
            find(block)
        except (ImportError, AttributeError) as error:
            say(f"left out: {block.name}, for {error}")
        else:
            found.append(block)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    packages = list(dict.fromkeys(block.package for block in BLOCKS))
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog=f"packages: {', '.join(packages)}"
    )
    parser.add_argument("packages", nargs="*", metavar="package", help="default: all")
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="of the maps")
    add_options(parser)
    chosen = parser.parse_args(arguments)
    for package in chosen.packages:
        if package not in packages:
            parser.error(f"there is no package {package!r}; choose from {', '.join(packages)}")
    options = read_options(chosen)
    size = chosen.size or ((16, 16) if chosen.quick else (64, 64))
    blocks = installed([b for b in BLOCKS if b.package in (chosen.packages or packages)])
    if not blocks:
        print("nothing to measure: install one of these packages", file=sys.stderr)
        return 1
    for block in blocks:
        difference = difference_in_float64(block, options)
        print(f"{block.name} in float64: the patched one differs by {difference:.1e}")
        if not difference <= IN_FLOAT64:
            print("nothing was measured, results differ", file=sys.stderr)
            return 1
    every = [case for block in blocks for case in cases(block, size, options)]
    return run_benchmark("patching", every, options, {"size": size})


if __name__ == "__main__":
    sys.exit(main())
