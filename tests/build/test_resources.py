# SPDX-License-Identifier: Apache-2.0
"""No kernel takes more registers, or spills more of them, than docs/kernels.md says."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "resources", Path(__file__).with_name("resources.py")
)
resources = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(resources)

PAGE = resources.ROOT / "docs" / "kernels.md"
SOURCES, limits = resources.SOURCES, resources.limits
SAID = """
ptxas info    : Compiling entry function '_Z1fIfEvPT_' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compiling entry function '_Z1fIfEvPT_' for 'sm_90'
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : Compiling entry function '_Z1gv' for 'sm_80'
ptxas info    : Used 6 registers
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90'
ptxas info    : Used 7 registers
"""


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt")
def test_the_page_of_what_ptxas_says():
    launches = {"op": [("at 8", "bfloat16", "2 x `f<float>`", "1056", "320", "1000")]}
    written = resources.page(resources.parse("op", SAID), launches, "1.2")
    assert "| `f` | float32 | 1 | 30 / 32 | 0 + 0 / 8 + 12 | 64 / 0 | 0 / 16 |" in written
    assert "| `g` | any | 1 | 6 / 7 | 0 + 0 / 0 + 0 | 0 / 0 | 0 / 0 |" in written
    assert "| at 8 | bfloat16 | 2 x `f<float>` | 1056 | 320 | 1000 | 6 / 6 | 1.33 |" in written
    assert limits(written, 90) == {
        ("op", "f", "float32"): (32, 8, 12),
        ("op", "g", "any"): (7, 0, 0),
    }


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 256, 0, (8, 8)),  # 64 warps
        (33, 256, 0, (6, 6)),  # as 40 registers
        (128, 384, 0, (1, 1)),  # 16 warps, where 12 are a block
        (255, 32, 0, (8, 8)),
        (16, 32, 0, (32, 32)),
        (32, 32, 4000, (32, 32)),
        (32, 32, 20 * 1024, (7, 10)),
        (32, 256, 48 * 1024, (3, 4)),
        (32, 33, 7 * 1024 + 1, (20, 28)),  # 8320 bytes with CUDA's
    ],
)
def test_blocks_that_a_multiprocessor_holds(registers, threads, shared, blocks):
    """By the rules of NVIDIA's occupancy calculator."""
    half = shared // 2
    held = [
        resources.resident_blocks(
            resources.Kernel("op", "f", arch, registers, 0, 0, half, 0), threads, shared - half
        )
        for arch in (80, 90)
    ]
    assert tuple(held) == blocks


def test_every_source_is_on_the_page():
    assert {operator for operator, *_ in limits(PAGE.read_text(), 90)} == {
        source.parent.name for source in SOURCES
    }


@pytest.mark.slow
@pytest.mark.skipif(resources.find_nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_no_kernel_takes_more(source):
    """To write the page again: resources.py says how."""
    text = PAGE.read_text()
    version = re.search(r"nvcc ([\d.]+)", text)[1]
    if version != resources.nvcc_version():
        pytest.skip(f"the page is of nvcc {version}")
    arch = resources.ARCHS[-1]
    allowed = {row: x for row, x in limits(text, arch).items() if row[0] == source.parent.name}
    found = resources.rows(resources.compile_kernels(source, [arch]))
    assert sorted(found) == sorted(allowed)
    more = [
        f"{k.name}: {k.registers} registers, spills {k.stores} + {k.loads}, allowed {limit}"
        for row, limit in allowed.items()
        for k in found[row]
        if any(x > y for x, y in zip((k.registers, k.stores, k.loads), limit, strict=True))
    ]
    assert not more
