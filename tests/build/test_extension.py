# SPDX-License-Identifier: Apache-2.0
"""The extension as it was built: what it holds, what it refuses, what it must not contain."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.dlpack import to_dlpack

import ctxops
from ctxops import _native

ROOT = Path(__file__).parents[2]
KERNELS = sorted(name for name in vars(_native.extension.baseline) if not name.startswith("_"))
# What has kernels of its own for the CPU alone.
TRITON_ON_CUDA = "criss_cross_attention"


def test_build_info():
    info = ctxops.build_info()
    assert info["extension"]
    assert info["error"] is None
    assert info["kernels"] == KERNELS
    assert info["cpu"][0] == "baseline"
    assert getattr(_native.extension, info["cpu"][-1]) is _native.cpu


@pytest.mark.parametrize("isa", [*_native.INSTRUCTION_SETS, "cuda"])
def test_every_backend_has_every_kernel(isa):
    backend = getattr(_native.extension, isa, None)
    if backend is None:
        pytest.skip(f"no {isa} here")
    kernels = set(KERNELS)
    if isa == "cuda":
        kernels -= {kernel for kernel in KERNELS if kernel.startswith(TRITON_ON_CUDA)}
    assert {name for name in vars(backend) if not name.startswith("_")} == kernels


def test_every_kernel_source_is_an_operators():
    stems = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    for stem in stems - {"common", "third_party"}:
        names = {path.name for path in (ROOT / "csrc" / stem).iterdir()}
        further = {name for name in names if re.fullmatch(rf"{stem}_\w+_cpu\.cpp", name)}
        for_cuda = set() if stem == TRITON_ON_CUDA else {f"{stem}_cuda.cu"}
        assert names - further == {f"{stem}.h", f"{stem}_cpu.cpp"} | for_cuda
        assert (ROOT / "ctxops" / "ops" / stem / "reference.py").is_file()
        assert any(kernel.startswith(stem) for kernel in KERNELS)


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_links_no_torch():
    done = subprocess.run(
        ["ldd", _native.extension.__file__], capture_output=True, text=True, check=True
    )
    libraries = re.sub(r"\(0x\w+\)", "", done.stdout)  # an address may hold c10
    assert "libgomp" in libraries
    assert not any(name in libraries for name in ("torch", "c10", "cudart"))


@pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("nm") is None, reason="needs g++ and nm"
)
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*/*_cpu.cpp")), ids=lambda p: p.stem)
def test_no_symbol_is_shared_by_two_instruction_sets(source, tmp_path):
    """The linker would keep one copy of it, which this processor may not be able to run."""
    target = tmp_path / "kernels.o"
    flags = ["-std=c++17", "-O2", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-fno-exceptions", "-DCTXOPS_ISA=avx2", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, "-c", source, "-o", target], check=True)
    done = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True)
    symbols = [line[17:].split(" ", 1) for line in done.stdout.splitlines()]
    assert not [name for kind, name in symbols if kind in "VWu"]
    public = [name for kind, name in symbols if kind in "BDRT"]
    assert public
    assert all(name.startswith("ctxops::avx2::") for name in public)


def pool(leave_out=(), **changed):
    """Hands the kernel good arguments but for these; what it made of ones."""
    nothing = torch.empty(0, dtype=torch.int32)
    arguments = {
        "input": torch.ones(1, 2, 3, 3),
        "output": torch.empty(1, 2, 1),
        "argmax": nothing,
        "cells": torch.empty(1, 1, 1, 2),
        "cell_argmax": nothing,
        "sizes": [1],
        "maximum": False,
    } | changed
    handed = {
        name: to_dlpack(a) if isinstance(a, torch.Tensor) else a
        for name, a in arguments.items()
        if name not in leave_out
    }
    _native.cpu.pyramid_pool_forward(handed, 1)
    return arguments["output"]


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"output": torch.empty(1, 2, 2)}, "output must be (B, C, S) of the map"),
        ({"output": torch.empty(1, 2, 1).double()}, "output must be (B, C, S) of the map"),
        ({"cells": torch.empty(1, 1, 1, 1)}, "cells must be (B, R, Q, C)"),
        ({"argmax": torch.empty(1, 1, 2, dtype=torch.int32)}, "argmax is of use with maxima only"),
        ({"sizes": []}, "sizes is empty"),
        ({"sizes": [1] * (_native.extension.max_ints + 1)}, "too many integers"),
        ({"input": torch.ones(1, 1, 1, 1, 1, 1)}, "too many dimensions"),
    ],
    ids=str,
)
def test_a_kernel_checks_what_it_is_handed(changed, text):
    assert torch.equal(pool(), torch.ones(1, 2, 1))
    with pytest.raises(ValueError, match=re.escape(text)):
        pool(**changed)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"input": 1}, "input must be PyCapsule, got int"),
        ({"sizes": ["1"]}, "sizes must be Sequence[int], got list"),
        ({"maximum": "no"}, "maximum must be bool, got str"),
        ({"leave_out": ["cells"]}, "cells is missing"),
        ({"leave_out": ["cells"], "cels": 1}, "cells is missing"),
        ({"cels": 1}, "cels is no argument of this kernel"),
    ],
    ids=str,
)
def test_a_kernel_takes_its_arguments_by_name(changed, text):
    with pytest.raises(TypeError, match=re.escape(f"pyramid_pool_forward: {text}")):
        pool(**changed)


def capsule_on_gpu(x: torch.Tensor, device: int) -> object:
    """A capsule that says of memory on the CPU that it lies on a GPU."""
    capsule = to_dlpack(x)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    # DLTensor begins with the address of the data, then type and number of the device; 2 is CUDA.
    where = pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
    (ctypes.c_int32 * 2).from_address(where)[:] = (2, device)
    return capsule


@pytest.mark.skipif(not hasattr(_native.extension, "cuda"), reason="built without CUDA")
@pytest.mark.parametrize("device", [0, 99])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel would read the CPU's memory")
def test_a_failure_of_cuda_is_a_runtime_error(device):
    """There is no GPU here. Wrong arguments are a ValueError on CUDA too."""
    tensors = {
        "input": torch.ones(1, 2, 3, 3),
        "output": torch.empty(1, 2, 1),
        "argmax": torch.empty(0, dtype=torch.int32),
        "cells": torch.empty(1, 1, 1, 2),
        "cell_argmax": torch.empty(0, dtype=torch.int32),
    }

    def pool(sizes):
        capsules = {name: capsule_on_gpu(x, device) for name, x in tensors.items()}
        _native.extension.cuda.pyramid_pool_forward(
            capsules | {"sizes": sizes, "maximum": False}, 0
        )

    with pytest.raises(RuntimeError, match=r"^pyramid_pool_forward: "):
        pool([1])
    with pytest.raises(ValueError, match=r"^pyramid_pool_forward: sizes is empty$"):
        pool([])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_names_the_first_argument_that_it_misses(kernel):
    with pytest.raises(TypeError, match=f"{kernel}: \\w+ is missing"):
        getattr(_native.cpu, kernel)({}, 1)


def test_a_broken_extension_leaves_the_references(tmp_path):
    """A package whose extension cannot be loaded warns once, and computes."""
    package = tmp_path / "ctxops"
    shutil.copytree(ROOT / "ctxops", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_C.so").write_bytes(b"no extension")
    program = (
        "import warnings, torch\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import ctxops\n"
        "assert len([w for w in caught if 'without its compiled kernels' in str(w.message)]) == 1\n"
        "assert not ctxops.build_info()['extension']\n"
        "x = torch.randn(1, 2, 5, 5, requires_grad=True)\n"
        "y, upstream = ctxops.pyramid_pool(x, (1,)), torch.randn(1, 2, 1)\n"
        "torch.testing.assert_close(y, x.mean((2, 3))[..., None])\n"
        "(grad,) = torch.autograd.grad(y, x, upstream)\n"
        "torch.testing.assert_close(grad, (upstream / 25)[..., None].expand(1, 2, 5, 5))\n"
        "torch.testing.assert_close(ctxops.neighborhood_attention(x, x, x, 1), x)\n"
        "from ctxops import __main__\n"
        "row = __main__._info().split('pyramid_pool')[1].split('\\n')[0]\n"
        "assert 'reference  ' in row and '(no extension)' in row, row\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
