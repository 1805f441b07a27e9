# SPDX-License-Identifier: Apache-2.0
"""The console command ``ctxops``."""

import argparse
import ast
import importlib
import shlex
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch

import ctxops
from ctxops import _operator


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
    lines.append(f"triton       {'yes' if _operator.has_triton() else 'no'}")
    lines.append("")
    table = [("operator", "here on the CPU", "on CUDA", "except")]
    table += [(name, *_backends(served, build)) for name, served in _operator.served.items()]
    widths = [max(map(len, column)) + 2 for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("".join(cells).rstrip())
    return "\n".join(lines)


def _backends(served: _operator.Served, build: dict[str, Any]) -> tuple[str, str, str]:
    """What serves an operator here, on the CPU and on CUDA, and which calls something else does."""
    cpu, cuda, but = served
    if cuda in ("C++", "Triton") and not _operator.has_kernels():
        cuda = f"reference (the kernels need compute capability {_operator.OLDEST_CAPABILITY}.0)"
    if cpu == "C++":
        cpu = f"C++ {build['cpu'][-1]}" if build["extension"] else "reference"
    if cuda == "C++" and not build.get("cuda"):
        cuda = f"reference ({_why_no_cuda(build)})"
    elif cuda == "C++" and not _built_for_gpu(build):
        cuda = "an error (not built for this GPU)"
    elif cuda == "Triton" and not _operator.has_triton():
        cuda = "torch, in blocks"
    return cpu, cuda, but


def _why_no_cuda(build: dict[str, Any]) -> str:
    if not build["extension"]:
        return "no extension"
    if not build["cuda_compiler"]:
        return "not built"
    return "driver too old" if build["cuda_driver"] else "no driver"


def _built_for_gpu(build: dict[str, Any]) -> bool:
    """Has the build machine code for the current GPU, or PTX that its driver can compile?"""
    if not torch.cuda.is_available():
        return True
    major, minor = torch.cuda.get_device_capability()
    compiler = build["cuda_compiler"].removeprefix("nvcc ")
    ptx = _version(build["cuda_driver"]) >= _version(compiler)
    for arch in build["cuda_archs"].split():
        number, _, kind = arch.partition("-")
        if not number.isdecimal():  # such as "all": nvcc knows
            return True
        built = divmod(int(number), 10)
        if kind != "virtual" and built[0] == major and built[1] <= minor:
            return True
        if kind != "real" and ptx and built <= (major, minor):
            return True
    return False


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _driver(build: dict[str, Any]) -> str:
    if build["cuda_driver"] is None:
        return "none" if build["cuda_compiler"] else "not asked for"
    return f"for CUDA {build['cuda_driver']}{'' if build['cuda'] else ', too old for this build'}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}"


def _convert(arguments: argparse.Namespace) -> str:
    """Converts a checkpoint; what became of it."""
    # The networks need more than torch, which the other commands do without.
    from ctxops.models import convert_checkpoint
    from ctxops.models.convert import spell

    if arguments.check is not None:
        checksum = _import("checksum", "models")
        image = checksum.check_image(arguments.check)  # what cannot be read is said at once
    imported = convert_checkpoint(
        arguments.checkpoint,
        arguments.converted,
        ema=arguments.ema,
        config=arguments.config,
        source=arguments.source,
        model=arguments.model,
        **dict(arguments.option),
    )
    options = ", ".join(f"{name}={value!r}" for name, value in imported.arguments.items())
    lines = [
        f"{imported.source}'s {imported.model}: create_model({imported.model!r}, {options})",
        f"all tensors of the checkpoint are used, {len(imported.state_dict)} are written to "
        f"{arguments.converted}",
    ]
    if imported.left_out:
        lines[1:] = [
            f"{len(imported.state_dict)} tensors are written to {arguments.converted}",
            f"left out, for the logits do not depend on them: {spell(imported.left_out)}",
        ]
    if imported.assumed:
        assumed = (f"--option {shlex.quote(f'{n}={x!r}')}" for n, x in imported.assumed.items())
        lines.append(
            f"assumed, for neither shapes nor a configuration tell: {' '.join(assumed)}; others: "
            f"give these options, or --config FILE"
        )
    if imported.zeros:
        lines.append(f"zero, for the checkpoint has none: {', '.join(imported.zeros)}")
    if arguments.check is not None:
        numbers = checksum.checksum(imported.build(), image)
        lines.append(f"check of {arguments.check}: {numbers}")
    return "\n".join(lines)


def _option(text: str) -> tuple[str, object]:
    """``name=value``; the value as Python writes it, or a word."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _import(module: str, extra: str) -> types.ModuleType:
    """A module of ``ctxops.models``, for the commands that need more than torch."""
    try:
        return importlib.import_module(f"ctxops.models.{module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "ctxops").partition(".")[0]
        if missing == "ctxops":
            raise
        raise ImportError(
            f'this needs {missing}, which is not installed: pip install "ctxops[{extra}]"'
        ) from None


def _check_data(arguments: argparse.Namespace) -> int:
    """Prints what is in a data set; without its folder, what should be in it."""
    data = _import("data", "models")
    spec = data.find_spec(arguments.spec, arguments.root)
    if arguments.root is None:
        print(data.expected(spec))
        return 0
    report, well = data.check_data(spec, arguments.root, arguments.split)
    print(report)
    return 0 if well else 1


def _predict(arguments: argparse.Namespace) -> None:
    """Segments images and prints the names of the files that it writes."""
    options = vars(arguments).copy()
    del options["command"]
    for path in _import("predict", "models").predict_files(**options):
        print(path, flush=True)


def _look(arguments: argparse.Namespace) -> None:
    """Draws what a network does with an image and prints the name of the file."""
    options = vars(arguments).copy()
    del options["command"]
    print(_import("pictures", "look").look(**options))


_TRAINING = {
    "fit": "trains a network; without options on synthetic scenes",
    "resume": "goes on with a run that was stopped: ctxops resume RUN",
    "validate": "scores a checkpoint: ctxops validate CHECKPOINT [--KEY VALUE]...",
    "test": "scores it on the test split: ctxops test CHECKPOINT [--KEY VALUE]...",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ctxops", description="Context operators.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was built and what of it runs here")
    convert = commands.add_parser("convert", help="a checkpoint of other code as a network of ours")
    convert.add_argument("checkpoint", metavar="IN", help="what the other code saved")
    convert.add_argument("converted", metavar="OUT", help="to write: ctxops.models.load_model(OUT)")
    convert.add_argument(
        "--source", help="mmsegmentation, torchvision, ann or gald; default: told from the names"
    )
    convert.add_argument("--model", help="the network's name here; default: told from the names")
    convert.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of create_model that shapes do not tell: --option output_stride=16",
    )
    convert.add_argument(
        "--config",
        metavar="FILE",
        help="mmsegmentation's configuration, which tells what shapes do not; default: the one in "
        "the checkpoint, where there is one",
    )
    convert.add_argument(
        "--ema", action="store_true", help="take the averaged weights, not the last ones"
    )
    convert.add_argument(
        "--check",
        metavar="IMAGE",
        help="print numbers of the logits of an image, to compare with the original's: "
        "docs/checkpoints.md has the script",
    )
    for command, text in _TRAINING.items():
        commands.add_parser(command, help=text, add_help=False)
    predict = commands.add_parser("predict", help="the classes of images, as PNG files")
    predict.add_argument("checkpoint", help="of ctxops fit or ctxops convert")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, patterns")
    predict.add_argument("-o", "--out", default="out", help="the folder to write to; default: out")
    predict.add_argument("--overlay", action="store_true", help="the image under its colours too")
    predict.add_argument(
        "--probabilities", action="store_true", help="those of the classes too, as .npy files"
    )
    predict.add_argument("--device", help="default: a GPU if there is one")
    predict.add_argument(
        "--window", type=int, help="side of the parts of the image looked at; default: the whole"
    )
    predict.add_argument(
        "--context",
        choices=("image", "window"),
        default="image",
        help="what each pixel sees, with --window: the whole image, or the window alone",
    )
    predict.add_argument("--halo", type=int, help="what the encoder sees around each tile")
    predict.add_argument("--overlap", type=float, default=1 / 3, help="share, of sliding windows")
    predict.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="SCALE")
    predict.add_argument("--flip", action="store_true", help="mirror images too")
    predict.add_argument("--average", choices=("probabilities", "logits"), default="probabilities")
    look = commands.add_parser("look", help="what a network does with an image, as a picture")
    look.add_argument(
        "kind", help="overlay, errors, field, attention, gates, masks, heads or memory"
    )
    look.add_argument("checkpoint", help="of ctxops fit or ctxops convert")
    look.add_argument("image", help="a file")
    look.add_argument("-o", "--out", default="look.png", help="to write; default: look.png")
    look.add_argument(
        "--at",
        type=int,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="the pixel that is asked about; default: the middle",
    )
    look.add_argument("--labels", help="a file with the class of every pixel")
    look.add_argument("--device", help="default: a GPU if there is one")
    data = commands.add_parser("data", help="looks at data sets")
    checks = data.add_subparsers(dest="action", required=True)
    check = checks.add_parser("check", help="reads all pairs: what is missing, wrong, how frequent")
    check.add_argument("spec", help="such as cityscapes, or folder: your own")
    check.add_argument("root", nargs="?", help="its folder; without: what it should have")
    check.add_argument("--split", nargs="+", default=[], help="default: all that are there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    trains = bool(arguments) and arguments[0] in _TRAINING  # whose options are Lightning's to read
    parsed = None if trains else _parser().parse_args(arguments)
    try:
        if trains:
            train = _import("training.cli", "train").main
        elif parsed.command == "info":
            print(_info())
        elif parsed.command == "convert":
            print(_convert(parsed))
        elif parsed.command == "predict":
            _predict(parsed)
        elif parsed.command == "look":
            _look(parsed)
        else:
            return _check_data(parsed)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"ctxops {arguments[0]}: {error}", file=sys.stderr)
        return 1
    return train(arguments) if trains else 0


if __name__ == "__main__":
    raise SystemExit(main())
