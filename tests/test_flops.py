# SPDX-License-Identifier: Apache-2.0
"""What torch's FlopCounterMode counts for our operators."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import ctxops
from ctxops import _operator
from modules import flop_counter


def make(*shape, device="cpu"):
    return torch.randn(shape, device=device, requires_grad=True)


def labels(device):
    return torch.randint(0, 4, (2, 8, 10), device=device)


# Each a call on a device, and what it counts, forward and backward.
CASES = {
    "asymmetric_attention": (
        lambda device: ctxops.asymmetric_attention(
            make(2, 3, 4, 5, device=device),
            make(2, 3, 7, device=device),
            make(2, 6, 7, device=device),
            bias=make(2, 7, device=device),
        ),
        # 40 positions, 7 anchors, 3 and 6 channels; backward three times the 3 and twice the 6
        {"asymmetric_attention": 5040, "asymmetric_attention_backward": 11760},
    ),
    "criss_cross_attention": (
        lambda device: ctxops.criss_cross_attention(
            make(2, 3, 4, 5, device=device),
            make(2, 3, 4, 5, device=device),
            make(2, 7, 4, 5, device=device),
        ),
        # 40 positions, 8 in a cross, 3 and 7 channels; backward three times the 3 and twice the 7
        {"criss_cross_attention": 6400, "criss_cross_attention_backward": 14720},
    ),
    "neighborhood_attention": (
        lambda device: ctxops.neighborhood_attention(
            make(2, 4, 5, 6, device=device),
            make(2, 4, 5, 6, device=device),
            make(2, 6, 5, 6, device=device),
            (3, 2),
            num_heads=2,
        ),
        # 60 positions, 6 in a window, 4 and 6 channels; backward both twice
        {"neighborhood_attention": 7200, "neighborhood_attention_backward": 14400},
    ),
    "neighborhood_attention_weights": (
        lambda device: ctxops.neighborhood_attention_weights(
            make(2, 4, 5, 6, device=device).detach(), make(2, 4, 5, 6, device=device).detach(), 3
        ),
        {"neighborhood_attention": 4320},
    ),
    "pyramid_pool avg": (
        lambda device: ctxops.pyramid_pool(make(2, 3, 9, 7, device=device), (1, 3)),
        {"pyramid_pool": 0, "pyramid_pool_backward": 0},
    ),
    "pyramid_pool max": (
        lambda device: ctxops.pyramid_pool(make(2, 3, 9, 7, device=device), (1, 3), mode="max"),
        {"pyramid_pool": 0, "pyramid_pool_backward": 0},
    ),
    "gated_fusion": (
        lambda device: ctxops.gated_fusion(
            [make(2, 3, 4, 5, device=device), make(2, 3, 2, 3, device=device)],
            [make(2, 1, 4, 5, device=device), make(2, 1, 2, 3, device=device)],
        ),
        {"gated_fusion": 0, "gated_fusion_backward": 0},
    ),
    "self_gated_fusion": (
        lambda device: ctxops.self_gated_fusion(
            [make(2, 3, 4, 5, device=device), make(2, 3, 2, 3, device=device)],
            make(2, 3, device=device),
            make(2, device=device),
        ),
        # 52 positions of 3 channels; backward twice
        {"gated_fusion": 312, "gated_fusion_backward": 624},
    ),
    "category_statistics without a memory": (
        lambda device: ctxops.category_statistics(
            make(2, 3, 4, 5, device=device), labels(device), num_classes=4
        ),
        # 40 positions of 3 channels, once
        {"category_statistics": 240},
    ),
    "category_statistics": (
        lambda device: ctxops.category_statistics(
            make(2, 3, 4, 5, device=device), labels(device), make(4, 3, device=device)
        ),
        # seven times
        {"category_statistics": 1680},
    ),
}


def counted(function):
    """Calls it, and the backward with random gradients; counts by the name of our operators."""
    with flop_counter() as counter:
        outputs = function()
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        outputs = [y for y in outputs if y.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
    counts = {str(packet): n for packet, n in counter.get_flop_counts()["Global"].items()}
    ours = {name: n for name, n in counts.items() if name.startswith("ctxops.")}
    assert counter.get_total_flops() == sum(counts.values())
    assert sum(counts.values()) == sum(ours.values())
    return {name.removeprefix("ctxops."): n for name, n in ours.items()}


@pytest.mark.parametrize("where", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", CASES)
def test_counts(name, where):
    call, expected = CASES[name]
    assert counted(lambda: call(where)) == expected


def test_every_operator_has_a_formula_and_a_case():
    tested = {name for _, expected in CASES.values() for name in expected}
    assert tested == set(_operator.operators)
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
    features = [make(2, 3, 4, 5), make(2, 3, 2, 3)]
    with flop_counter() as counter:
        for x in features:
            gate = F.conv2d(x, make(1, 3, 1, 1))
            gate.backward(torch.randn_like(gate))
    assert counter.get_total_flops() == 312 + 624


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
