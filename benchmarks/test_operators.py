# SPDX-License-Identifier: Apache-2.0
"""The operators at a small size under pytest-benchmark: `pytest benchmarks --benchmark-autosave`,
then `--benchmark-compare` on another commit. What torch compiles is left to operators.py."""

import dataclasses

import pytest
import torch

from harness import Case, Contender, Effort, Options, check_case
from operators import OPERATORS

_OPTIONS = Options(torch.device("cpu"), torch.float32, Effort(), quick=True)


def _pairs() -> list:
    """Each uncompiled contender of each case, together with the case's first."""
    return [
        pytest.param(case, contender, id=f"{case.title}-{contender.label}")
        for operator in OPERATORS.values()
        for case in operator.cases(operator.quick_shape, _OPTIONS)
        for contender in case.contenders
        if not contender.compile
    ]


@pytest.mark.parametrize(("case", "contender"), _pairs())
def test_operator(benchmark, case: Case, contender: Contender):
    case = dataclasses.replace(case, contenders=(case.contenders[0], contender))
    _, entry = check_case(case, _OPTIONS.device, _OPTIONS.dtype)
    if entry.left_out:
        pytest.skip(entry.left_out)
    benchmark(entry.runner)
