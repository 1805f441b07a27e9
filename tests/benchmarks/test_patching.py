# SPDX-License-Identifier: Apache-2.0
"""The blocks that benchmarks/patching.py times, where their packages are installed."""

import pytest
import torch

import mmcv_operators  # noqa: F401
from harness import Effort, Options, check_case
from patching import BLOCKS, IN_FLOAT64, Block, cases, difference_in_float64, installed

OPTIONS = Options(torch.device("cpu"), torch.float32, Effort())


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_original_and_patched(block):
    if not installed([block]):
        pytest.skip(f"{block.package} is not installed")
    assert difference_in_float64(block, OPTIONS) < IN_FLOAT64
    for case in cases(block, (6, 5), OPTIONS):
        rows = check_case(case, OPTIONS.device, OPTIONS.dtype)
        modules = [row.runner.function for row in rows]
        patched = ["forward" in vars(m) for module in modules for m in module.modules()]
        assert any(patched)
        assert not all(patched)
        assert [row.contender.ours for row in rows] == [False, False, True, True]


def test_what_is_not_installed_is_left_out_by_name(capsys):
    missing = [Block(f"{module}.Block", {}, [8], 8) for module in ("torch.nn", "nothing_there")]
    assert installed(missing) == []
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("left out: Block, for ") for line in lines)
    assert "nothing_there" in lines[1]
