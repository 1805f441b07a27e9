# SPDX-License-Identifier: Apache-2.0
"""Every line of ``ctxops info`` says what really runs."""

import importlib
import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import ctxops
from ctxops import __main__, _native, _operator
from ctxops._checks import FLOATING
from ops.contract import contracts

NO_OPERATORS = {
    "build_info",
    "flop_formulas",
    "patch",
    "random_anchor_indices",
    "unpatch",
    "use_reference",
}
CONTRACTS = contracts()


def call(name, device="cpu", dtype=torch.float32, grad=False, **replaced):
    """Calls the operator, forward and where asked for backward."""
    results = getattr(ctxops, name)(**CONTRACTS[name].arguments(device, dtype, grad, **replaced))
    results = results if isinstance(results, tuple) else (results,)
    if grad and results[0].requires_grad:
        sum(y.sum() for y in results).backward()


@pytest.fixture
def ran(monkeypatch):
    """What has served since this set was emptied."""
    seen = set()

    def watch(module, function, what):
        if hasattr(module, function):
            original = getattr(module, function)

            def watched(*arguments, **named):
                seen.add(what)
                return original(*arguments, **named)

            monkeypatch.setattr(module, function, watched)

    launch = _operator.launch

    def launched(kernel, *arguments, **named):
        if kernel != "criss_cross_attention_turn":  # it lays maps out and computes nothing
            seen.add("C++")
        return launch(kernel, *arguments, **named)

    monkeypatch.setattr(_operator, "launch", launched)
    for name in {contract.stem or name for name, contract in CONTRACTS.items()}:
        op = importlib.import_module(f"ctxops.ops.{name}.op")
        for function in ("_forward_in_blocks", "_backward_in_blocks"):
            watch(op, function, "torch, in blocks")
        if name != "sample_anchors":  # whose one reading the reference is
            watch(op, "reference", "reference")
        if name != "criss_cross_attention":  # likewise, for the weights
            watch(op, "reference_weights", "reference")
        if _operator.has_triton() and name in ("asymmetric_attention", "criss_cross_attention"):
            kernels = importlib.import_module(f"ctxops.ops.{name}.triton_kernels")
            for function in ("forward", "backward"):
                watch(kernels, function, "Triton")
    watch(torch.nn.functional, "scaled_dot_product_attention", "torch, fused")
    return seen


def table() -> dict[str, list[str]]:
    """The cells of every line of the table, by operator."""
    _, lines = __main__._info().split("\n\n")
    header, *lines = lines.split("\n")
    names = ("operator", "here on the CPU", "on CUDA", "except")
    assert tuple(part.strip() for part in header.split("  ") if part) == names
    starts = [header.index(name) for name in names] + [None]
    rows = {}
    for line in lines:
        cells = [line[slice(*ends)] for ends in itertools.pairwise(starts)]
        assert all(not cell or cell.endswith("  ") for cell in cells[:2])  # nothing runs together
        name, *served = (cell.strip() for cell in cells)
        assert name not in rows
        rows[name] = served
    return rows


def claimed(cell: str) -> set[str]:
    """What ``ran`` holds if the cell is true."""
    if cell.startswith("C++ "):
        assert cell == f"C++ {ctxops.build_info()['cpu'][-1]}"
        return {"C++"}
    return set() if cell == "torch" else {cell}


def test_the_table_has_every_operator():
    assert set(table()) == set(_operator.served) == set(ctxops.__all__) - NO_OPERATORS


@pytest.mark.slow
def test_the_command_prints_the_table():
    done = subprocess.run(
        [sys.executable, "-m", "ctxops", "info"], capture_output=True, text=True, check=True
    )
    assert all(f"\n{name} " in done.stdout for name in _operator.served)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", _operator.served)
def test_what_serves_on_the_cpu(name, grad, ran):
    cell, _, but = table()[name]
    if grad and but == "with gradient: reference":
        cell = "reference"
    call(name, grad=grad)
    assert ran == claimed(cell)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", _operator.served)
def test_what_serves_on_cuda(name, dtype, ran):
    _, cell, but = table()[name]
    if dtype == torch.float64 and "float64 on CUDA: " in but:
        cell = but.partition("float64 on CUDA: ")[2]
    call(name, "cuda", dtype, grad=but != "with gradient: reference")
    assert ran == claimed(cell)


def test_the_exceptions(ran):
    rows = {name: but for name, (_, _, but) in table().items() if but}
    x, gate = torch.ones(1, 4, 5, 6), torch.ones(1, 1, 5, 6)
    for levels, served in ((8, "C++"), (9, "reference")):
        others = {
            "gated_fusion": {"gates": [gate] * levels},
            "self_gated_fusion": {"weight": torch.ones(levels, 4)},
        }
        for name, replaced in others.items():
            assert rows[name] == "more than 8 levels: reference"
            ran.clear()
            call(name, features=[x] * levels, **replaced)
            assert ran == {served}
    del rows["gated_fusion"], rows["self_gated_fusion"]
    x, wide, half = torch.ones(1, 4, 5, 6), torch.ones(1, 8, 5, 6), torch.bfloat16
    maps = {"query": x, "key": x, "value": x}
    name, in_blocks = "nonlocal_attention", "torch, in blocks"
    assert rows.pop(name) == (
        f"C != Cv on the CPU, half precision with gradient there, float64 on CUDA: {in_blocks}"
    )
    for options, served in (
        (maps, "torch, fused"),
        (maps | {"value": wide}, in_blocks),
        (maps | {"dtype": half}, "torch, fused"),
        (maps | {"dtype": half, "grad": True}, in_blocks),
    ):
        ran.clear()
        call(name, **options)
        assert ran == {served}, options
    # tested with a gradient above
    assert rows.pop("neighborhood_attention_weights") == "with gradient: reference"
    assert set(rows.values()) == {"float64 on CUDA: torch, in blocks"}
    assert set(rows) == {"asymmetric_attention", "criss_cross_attention"}


@pytest.mark.parametrize("name", ["asymmetric_attention", "criss_cross_attention"])
def test_triton_serves_where_the_table_says_so(name, ran, monkeypatch):
    """On CUDA, whose tensors can be had without a GPU as long as nothing computes."""
    pytest.importorskip("triton")
    assert table()[name][1] == "Triton"
    with FakeTensorMode():
        for dtype in FLOATING:
            x = torch.empty(1, device="cuda", dtype=dtype)
            assert _operator.uses_triton(x) == (dtype != torch.float64)
    if torch.cuda.is_available():
        return  # run above
    monkeypatch.setattr(_operator, "uses_triton", lambda x: True)
    call(name, grad=True)
    assert ran == {"Triton"}


def pretend(
    monkeypatch, *, nvcc="nvcc 13.0.88", driver=13000, archs="80 86-real 90-real", gpu=None
):
    """Another build on another machine; without ``nvcc`` one for the CPU, with None none at all."""
    extension = None
    if nvcc is not None:
        extension = SimpleNamespace(
            compiler="g++", cuda_compiler=nvcc, cuda_archs=archs, baseline=_native.cpu
        )
        if nvcc:
            extension.cuda = object()
    versions = (13000, driver) if nvcc else (0, 0)
    monkeypatch.setattr(_native, "extension", extension)
    monkeypatch.setattr(_native, "_cuda_versions", lambda: versions)
    for name, value in (("cpu", _native._best_cpu()), ("cuda", _native._usable_cuda())):
        monkeypatch.setattr(_native, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
    properties = gpu and SimpleNamespace(major=gpu[0], minor=gpu[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def native(column):
    """The one text that this column has for all operators with C++ kernels."""
    rows = table()
    (cell,) = {
        rows[name][column] for name, served in _operator.served.items() if served.cpu == "C++"
    }
    return cell


@pytest.mark.parametrize(
    ("machine", "cpu", "cuda"),
    [
        ({"nvcc": None}, "reference", "reference (no extension)"),
        ({"nvcc": ""}, "C++ baseline", "reference (not built)"),
        ({"driver": 0}, "C++ baseline", "reference (no driver)"),
        ({"driver": 12090}, "C++ baseline", "reference (driver too old)"),
        ({}, "C++ baseline", "C++"),
        ({"gpu": (8, 0)}, "C++ baseline", "C++"),
        ({"gpu": (8, 9), "archs": "80-real 86-real"}, "C++ baseline", "C++"),
        ({"gpu": (12, 0)}, "C++ baseline", "C++"),  # by the PTX for 80
        ({"gpu": (7, 5)}, "C++ baseline", "reference (the kernels need compute capability 8.0)"),
        ({"gpu": (8, 0), "archs": "90"}, "C++ baseline", "an error (not built for this GPU)"),
        ({"gpu": (8, 0), "archs": "86-real"}, "C++ baseline", "an error (not built for this GPU)"),
        ({"gpu": (12, 0), "archs": "90-real"}, "C++ baseline", "an error (not built for this GPU)"),
        ({"gpu": (9, 0), "archs": "80-virtual"}, "C++ baseline", "C++"),
        # A driver of a later minor version compiles this PTX, an earlier one does not.
        (
            {"gpu": (12, 0), "nvcc": "nvcc 13.1.1"},
            "C++ baseline",
            "an error (not built for this GPU)",
        ),
        ({"gpu": (9, 0), "nvcc": "nvcc 13.1.1"}, "C++ baseline", "C++"),
        ({"gpu": (12, 0), "nvcc": "nvcc 13.1.1", "driver": 13020}, "C++ baseline", "C++"),
        ({"gpu": (12, 0), "archs": "all"}, "C++ baseline", "C++"),
    ],
    ids=str,
)
def test_what_other_machines_are_told(machine, cpu, cuda, monkeypatch):
    pretend(monkeypatch, **machine)
    assert native(0) == cpu
    assert native(1) == cuda
    # What the dispatcher is given agrees.
    devices = _operator.native_devices(print)
    assert ("cpu" in devices) == cpu.startswith("C++")
    assert ("cuda" in devices and _operator.has_kernels()) == (not cuda.startswith("reference"))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(_operator, "has_triton", lambda: False)
    rows = table()
    for name in ("asymmetric_attention", "criss_cross_attention"):
        assert rows[name][1] == "torch, in blocks"
    with FakeTensorMode():
        assert not _operator.uses_triton(torch.empty(1, device="cuda"))


@pytest.mark.parametrize("allowed", ["default", "avx2", "AVX512", "", "altivec"])
def test_torchs_variable_limits_the_instruction_set(allowed, monkeypatch):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    present = _native.build_info()["cpu"]
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", allowed)
    last = {"default": 1, "avx2": 2}.get(allowed, 3)
    assert _native.build_info()["cpu"] == present[:last]
    assert _native._best_cpu() is getattr(_native.extension, present[:last][-1])
