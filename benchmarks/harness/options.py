# SPDX-License-Identifier: Apache-2.0
"""The flags that every benchmark has."""

import argparse
import dataclasses
import importlib
import types
from pathlib import Path

import torch

from harness.timing import Effort

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# With a budget, so many samples are enough of any row.
_MOST = 20


@dataclasses.dataclass(frozen=True)
class Options:
    device: torch.device
    dtype: torch.dtype
    effort: Effort
    json: Path | None = None
    plot: Path | None = None
    quick: bool = False


def add_options(parser: argparse.ArgumentParser, budget: float | None = None) -> None:
    """``budget``: seconds for the whole program by default, where it has a time to keep."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=default, help="cpu or cuda[:index] (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=_count, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--rounds", type=_count, default=100, help="at most so many samples per row"
    )
    parser.add_argument("--seconds", type=_duration, help="time to spend on the rounds of a case")
    if budget is not None:
        which = parser.add_mutually_exclusive_group()
        which.add_argument(
            "--budget",
            type=_duration,
            metavar="SECONDS",
            help=f"time for the whole program (default: {budget:g})",
        )
        which.add_argument(
            "--thorough",
            action="store_true",
            help="time every row in both memory formats at least five times, however long it takes",
        )
    parser.set_defaults(default_budget=budget)
    parser.add_argument("--quick", action="store_true", help="a small case, within a minute")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write every number")
    parser.add_argument("--plot", type=output_file, metavar="FILE.png", help="draw time and memory")


def read_options(arguments: argparse.Namespace) -> Options:
    """The common options; sets torch's threads, and float32 products to full precision."""
    require("rich")
    if arguments.plot:
        require("matplotlib")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(arguments.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit(f"--device {arguments.device}: torch sees no CUDA device")
        torch.cuda.set_device(device)
    effort = _read_effort(arguments)
    dtype = DTYPES[arguments.dtype]
    return Options(device, dtype, effort, arguments.json, arguments.plot, arguments.quick)


def _read_effort(arguments: argparse.Namespace) -> Effort:
    seconds = arguments.seconds or (4.0 if arguments.quick else 60.0)
    budget = getattr(arguments, "budget", None)
    if budget is None and not (
        arguments.quick or arguments.seconds or getattr(arguments, "thorough", False)
    ):
        budget = arguments.default_budget
    fewest = min(arguments.rounds, 3 if arguments.quick else 5)
    if budget is None:
        return Effort(seconds, fewest, arguments.rounds)
    return Effort(seconds, fewest, min(arguments.rounds, _MOST), budget)


def require(name: str) -> types.ModuleType:
    """A module of the extra ``bench``; where it is missing, the program ends and names the cure."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise SystemExit(
            f'the benchmarks need {name}, which is not installed: pip install "ctxops[bench]"'
        ) from None


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _duration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def output_file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def parse_size(text: str) -> tuple[int, int]:
    """HxW, such as 96x96."""
    return _parse_extents(text, "HxW, such as 96x96", 2)


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """BxCxHxW, such as 1x256x96x96."""
    return _parse_extents(text, "BxCxHxW, such as 1x256x96x96", 4)


def _parse_extents(text: str, form: str, count: int) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) != count or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"must be {form}, got {text!r}")
    return tuple(int(p) for p in parts)
