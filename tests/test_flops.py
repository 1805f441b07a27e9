# SPDX-License-Identifier: Apache-2.0
"""What torch's FlopCounterMode counts for our operators, beside the counts of the contract."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import ctxops
from ctxops import _operator
from modules import flop_counter


def test_every_operator_has_a_formula():
    formulas = {str(packet).removeprefix("ctxops.") for packet in ctxops.flop_formulas}
    assert formulas == set(_operator.operators)


def test_attention_counts_what_its_reference_counts():
    shapes = ((2, 3, 4, 5), (2, 3, 7), (2, 6, 7))
    query, key, value = (torch.randn(shape) for shape in shapes)
    totals = []
    for context in (ctxops.use_reference(), torch.no_grad()):
        with context, flop_counter() as counter:
            ctxops.asymmetric_attention(query, key, value)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 5040


def test_gates_count_what_convolutions_count():
    features = [torch.randn(2, 3, *size, requires_grad=True) for size in ((6, 5), (4, 4))]
    with flop_counter() as counter:
        for x in features:
            gate = F.conv2d(x, torch.randn(1, 3, 1, 1, requires_grad=True))
            gate.backward(torch.randn_like(gate))
    assert counter.get_total_flops() == 552 + 1104


def test_heads_do_not_change_the_count():
    query, key, value = (torch.randn(1, 8, 6, 6) for _ in range(3))
    totals = set()
    for heads in (1, 2, 4):
        with flop_counter() as counter:
            ctxops.neighborhood_attention(query, key, value, 3, num_heads=heads)
        totals.add(counter.get_total_flops())
    assert totals == {2 * 36 * 9 * 16}


COUNTS = [
    "counter.__enter__()",
    "ctxops.asymmetric_attention(*map(torch.ones, [(2, 3, 4, 5), (2, 3, 7), (2, 6, 7)]))",
    "assert counter.get_total_flops() == 5040",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "lines",
    [
        [
            "from torch.utils.flop_counter import FlopCounterMode",
            "import ctxops",
            "counter = FlopCounterMode(display=False)",
        ],
        [  # the counter imports Triton: whoever does not count should not wait for that
            "import ctxops, ctxops.nn",
            "assert 'torch.utils.flop_counter' not in sys.modules",
            "from torch.utils.flop_counter import FlopCounterMode",
            "counter = FlopCounterMode(display=False, custom_mapping=ctxops.flop_formulas)",
        ],
    ],
    ids=["counter first", "ctxops first"],
)
def test_order_of_the_imports(lines):
    program = "\n".join(["import sys, torch", *lines, *COUNTS])
    subprocess.run([sys.executable, "-c", program], check=True)
