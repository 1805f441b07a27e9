# SPDX-License-Identifier: Apache-2.0
"""Loads the extension and says what it was built with. Knows nothing of any operator."""

import ctypes
import functools
import importlib
import math
import os
import types
import warnings
from typing import Any

__all__ = ["INSTRUCTION_SETS", "build_info", "cpu", "cuda", "extension", "limit"]

# Slowest first; the extension has those that this processor can run.
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")

extension: types.ModuleType | None
load_error: str | None = None
try:
    extension = importlib.import_module("ctxops._C")
except ImportError as error:
    extension, load_error = None, str(error)
    warnings.warn(
        f"ctxops runs without its compiled kernels, on the slower references in plain torch, "
        f"because its extension cannot be loaded ({error}). `pip install .` builds it; "
        f"`ctxops info` shows what is there.",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def _cuda_versions() -> tuple[int, int]:
    """CUDA version of the build's runtime and of the driver here, as 1000 * major + 10 * minor."""
    if extension is None or not extension.cuda_compiler:
        return 0, 0
    major, minor = extension.cuda_compiler.removeprefix("nvcc ").split(".")[:2]
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        pass
    return 1000 * int(major) + 10 * int(minor), version.value


def _usable_instruction_sets() -> list[str]:
    """What the processor can run, up to what torch's environment variable allows; slowest first."""
    allowed = os.environ.get("ATEN_CPU_CAPABILITY", "").lower().replace("default", "baseline")
    last = INSTRUCTION_SETS.index(allowed) + 1 if allowed in INSTRUCTION_SETS else None
    return [name for name in INSTRUCTION_SETS[:last] if hasattr(extension, name)]


def _best_cpu() -> types.ModuleType | None:
    usable = _usable_instruction_sets()
    return getattr(extension, usable[-1]) if usable else None


def _usable_cuda() -> types.ModuleType | None:
    runtime, driver = _cuda_versions()
    # Within a major version an older driver runs a newer runtime's machine code.
    return getattr(extension, "cuda", None) if driver // 1000 >= runtime // 1000 > 0 else None


# The kernels of each device, or None: then the references serve. Read them as attributes of this
# module; the tests exchange `cpu`.
cpu: types.ModuleType | None = _best_cpu()
cuda: types.ModuleType | None = _usable_cuda()


def limit(constant: str) -> float:
    """A constant of the extension, at most so much of what its kernels take; without it, no end."""
    return math.inf if extension is None else getattr(extension, constant)


def build_info() -> dict[str, Any]:
    """What was built and what of it runs here.

    Returns a dictionary: ``extension`` (loaded or not), ``error``, ``compiler``, ``kernels`` (the
    names of the C++ kernel entries), ``cpu`` (the instruction sets that run here, the one in use
    last), ``cuda_compiler``, ``cuda_archs``, ``cuda_driver`` (its CUDA version, or None), ``cuda``
    (are the CUDA kernels offered here).
    """
    info: dict[str, Any] = {"extension": extension is not None, "error": load_error}
    if extension is None:
        return info
    _, driver = _cuda_versions()
    return info | {
        "compiler": extension.compiler,
        "kernels": sorted(name for name in vars(extension.baseline) if not name.startswith("_")),
        "cpu": _usable_instruction_sets(),
        "cuda_compiler": extension.cuda_compiler or None,
        "cuda_archs": extension.cuda_archs.replace(";", " ") or None,
        "cuda_driver": f"{driver // 1000}.{driver % 1000 // 10}" if driver else None,
        "cuda": cuda is not None,
    }
