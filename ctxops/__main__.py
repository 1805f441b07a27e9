# SPDX-License-Identifier: Apache-2.0
"""The console command ``ctxops``."""

import argparse
import importlib.util
import sys
from collections.abc import Sequence

import torch

import ctxops
from ctxops import _library


def _info() -> str:
    """What was built (operators x backends x architectures) and what of it runs here."""
    build = ctxops.build_info()
    lines = [
        f"ctxops       {ctxops.__version__}",
        f"torch        {torch.__version__}, {torch.get_num_threads()} threads",
        f"python       {sys.version.split()[0]}",
    ]
    if build["extension"]:
        cuda = "not built"
        if build["cuda_compiler"]:
            cuda = f"{build['cuda_compiler']} for {build['cuda_archs']}"
        lines += [
            f"extension    {build['compiler']}; CUDA kernels {cuda}",
            f"CPU          {', '.join(build['cpu'])} (the last one is used)",
            f"CUDA driver  {_driver(build)}",
        ]
    else:
        lines.append(f"extension    none ({build['error']}): the references serve")
    lines.append(f"GPU          {_gpu()}")
    lines.append(f"triton       {'yes' if importlib.util.find_spec('triton') else 'no'}")
    lines.append("")
    lines.append(f"{'operator':<24}{'here on the CPU':<20}on CUDA")
    for operator in _library.operators.values():
        if not operator.name.endswith("_bwd"):
            cpu, cuda = _backends(operator, build)
            lines.append(f"{operator.name:<24}{cpu:<20}{cuda}")
    lines += [f"{name:<24}{'torch':<20}torch" for name in ("nonlocal_attention", "sample_anchors")]
    return "\n".join(lines)


def _backends(operator: _library.Operator, build: dict[str, object]) -> tuple[str, str]:
    """What serves an operator, forward and backward, on the CPU and on CUDA."""
    native = f"{operator.name}_forward" in build.get("kernels", ())
    cpu = f"C++ {build['cpu'][-1]}" if native else "torch, in blocks"
    triton = "Triton" if importlib.util.find_spec("triton") else "torch, in blocks"
    cuda = "C++" if native else triton
    return (
        cpu if "cpu" in operator.devices else "reference",
        cuda if "cuda" in operator.devices else "reference (no CUDA kernels, or no driver)",
    )


def _driver(build: dict[str, object]) -> str:
    if build["cuda_driver"] is None:
        return "none"
    verdict = "" if build["cuda"] or not build["cuda_compiler"] else ", too old for this build"
    return f"for CUDA {build['cuda_driver']}{verdict}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ctxops", description="Context operators.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was built and what of it runs here")
    parser.parse_args(arguments)
    print(_info())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
