# SPDX-License-Identifier: Apache-2.0
"""Each operator needs no more memory, beyond inputs and results, than its docstring says."""

import pytest
import torch

import ctxops
from covering import product
from ctxops.ops.asymmetric_attention.op import BLOCK_BYTES
from ctxops.ops.criss_cross_attention.op import BLOCK_BYTES as CRISS_CROSS_BYTES
from harness import peak_memory
from numerics import LAYOUTS

KIB = 1024


@pytest.fixture(autouse=True)
def _no_poison():
    """Filling with NaN allocates nothing, but deterministic variants of torch's operators do."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


def peak(function, *inputs, device):
    def call():
        output = function(*inputs)
        return output if isinstance(output, tuple) else (output,)

    return peak_memory(call, torch.device(device))


def peak_of_backward(function, *inputs, device):
    leaves = [x.requires_grad_() for x in inputs]
    output = function(*leaves)
    upstream = torch.randn_like(output)
    return peak_memory(lambda: torch.autograd.grad(output, leaves, upstream), torch.device(device))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channel_slice"])
def test_pyramid_pool(layout, device):
    x = LAYOUTS[layout](torch.randn(2, 64, 96, 96, device=device))
    cells = 2 * 64 * 12 * 12 * 4  # boundaries every 8, 12, 16 or 32 positions make 12 cells
    pooled = 2 * 64 * 110 * 4
    with torch.no_grad():
        assert peak(ctxops.pyramid_pool, x, device=device) <= cells + KIB
        assert peak(lambda x: ctxops.pyramid_pool(x, mode="max"), x, device=device) <= cells + KIB
    assert peak_of_backward(ctxops.pyramid_pool, x, device=device) <= cells + pooled + KIB

    def maximum(x):
        return ctxops.pyramid_pool(x, mode="max")

    # The positions of the maxima and of the cells' while it runs, then those of the maxima.
    assert peak(maximum, x.requires_grad_(), device=device) <= 2 * cells + pooled + KIB
    assert peak_of_backward(maximum, x.detach(), device=device) <= pooled + KIB


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_asymmetric_attention_in_blocks(layout, dtype):
    query = LAYOUTS[layout](torch.randn(1, 32, 256, 256).to(dtype))
    key, value = torch.randn(1, 32, 110).to(dtype), torch.randn(1, 64, 110).to(dtype)
    anchors = 110 * (32 + 64) * 4 * 4
    with torch.no_grad():
        assert 65536 * 110 * 4 > BLOCK_BYTES
        assert peak(ctxops.asymmetric_attention, query, key, value, device="cpu") <= (
            BLOCK_BYTES + anchors + KIB
        )
    used = peak_of_backward(ctxops.asymmetric_attention, query, key, value, device="cpu")
    assert used <= BLOCK_BYTES + 2 * anchors + KIB


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value_channels", [16, 48])
def test_nonlocal_attention_never_forms_the_square(layout, value_channels, device):
    query = LAYOUTS[layout](torch.randn(1, 16, 96, 64, device=device))
    value = LAYOUTS[layout](torch.randn(1, value_channels, 96, 64, device=device))
    square = 6144 * 6144 * 4
    with torch.no_grad():
        used = peak(ctxops.nonlocal_attention, query, query, value, device=device)
    assert used < square / 8
    used = peak_of_backward(ctxops.nonlocal_attention, query, query.clone(), value, device=device)
    assert used < square / 8


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neighborhood_attention(layout, dtype, device):
    query, key, value = (
        LAYOUTS[layout](torch.randn(2, 32, 48, 40, device=device).to(dtype)) for _ in range(3)
    )
    weights = 2 * 2 * 15 * 48 * 40 * 4
    copy = 2 * 32 * 48 * 40 * (4 if device == "cpu" else dtype.itemsize)
    half = dtype != torch.float32
    copied = half and layout == "channels_last" if device == "cpu" else layout == "contiguous"
    copies = copy if copied else 0

    def attend(query, key, value):
        return ctxops.neighborhood_attention(query, key, value, (3, 5), 2, num_heads=2)

    with torch.no_grad():
        assert peak(attend, query, key, value, device=device) <= 4 * copies + KIB
    used = peak_of_backward(attend, query, key, value, device=device)
    assert used <= weights + 7 * copies + KIB
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    assert peak(attend, *leaves, device=device) <= weights + 4 * copies + KIB


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [[(48, 40)] * 3, [(48, 40), (24, 20), (24, 20)]], ids=str)
def test_gated_fusion(sizes, layout, device):
    features = [LAYOUTS[layout](torch.randn(2, 32, *size, device=device)) for size in sizes]
    weight, bias = torch.randn(3, 32, device=device), torch.randn(3, device=device)
    values = 4 * sum(2 * height * width for height, width in sizes)
    maps = sum(4 * 2 * 32 * height * width for height, width in set(sizes)) * (len(set(sizes)) > 1)
    parts = 2 * -(-48 * 40 // 64) * 3 * 32 * 4

    def fuse(*tensors):
        return ctxops.self_gated_fusion(tensors[:3], *tensors[3:])

    def measure(function, *inputs):
        return peak_memory(lambda: function(*inputs), torch.device(device))

    def measure_backward(function, *inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        upstream = [torch.randn_like(y) for y in outputs]
        return measure(torch.autograd.grad, outputs, leaves, upstream)

    with torch.no_grad():
        kept = values * (maps > 0)
        assert measure(fuse, *features, weight, bias) <= maps + kept + KIB
        gates = [torch.rand(2, 1, *size, device=device) for size in sizes]
        used = measure(lambda *t: ctxops.gated_fusion(t[:3], t[3:]), *features, *gates)
        assert used <= maps + values + KIB
    leaves = [x.detach().requires_grad_() for x in (*features, weight, bias)]
    assert measure(fuse, *leaves) <= maps + values + KIB
    used = measure_backward(fuse, *features, weight, bias)
    assert used <= 2 * maps + values + parts + 2 * KIB


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [19, 171])
def test_category_statistics(classes, dtype, layout, device):
    features = LAYOUTS[layout](torch.randn(2, 256, 32, 64, dtype=dtype, device=device))
    labels = torch.randint(0, classes, (2, 256, 512), device=device)
    memory = torch.randn(classes, 256, dtype=dtype, device=device)
    rows = 2 * 8 * classes * (256 + 1)
    parts = 8 * 8 * classes * (256 + 2)
    if device == "cpu":
        columns = 65
        scratch = columns * (2 * 256 * dtype.itemsize + 48 * classes + 96) + 16 * (512 + columns)
        extra = 8 * scratch
    else:
        copy = 0 if layout == "channels_last" else features.nbytes
        extra = dtype.itemsize * labels.numel() + copy
    used = peak(ctxops.category_statistics, features, labels, memory, device=device)
    assert used <= parts + extra + rows + KIB


def test_category_statistics_of_many_classes_and_few_channels():
    features, labels = torch.randn(1, 7, 64, 512), torch.randint(0, 1000, (1, 64, 512))
    memory = torch.randn(1000, 7)
    rows, parts = 2 * 8 * 1000 * (7 + 1), 8 * 8 * 1000 * (7 + 2)
    columns = 1 + -(-512 // 12)
    scratch = columns * (2 * 7 * 4 + 48 * 1000 + 96) + 16 * (512 + columns)
    used = peak(ctxops.category_statistics, features, labels, memory, device="cpu")
    assert used <= parts + 8 * scratch + rows + KIB


@product(
    channels=[(64, 512), (8, 3)],
    dtype=[torch.float32, torch.bfloat16],
    layout=["contiguous", "channels_last"],
)
def test_criss_cross_attention_in_blocks(channels, layout, dtype):
    query, key, value = (
        LAYOUTS[layout](torch.randn(2, c, 97, 97).to(dtype)) for c in (channels[0], *channels)
    )
    positions = 97 * 97
    states = 2 * positions * 4
    widened = 0 if dtype == torch.float32 else 2 * sum(channels) * positions * 4
    attend = ctxops.criss_cross_attention
    if dtype == torch.float32:
        assert CRISS_CROSS_BYTES + 2 * states < 2 * (97 + 97) * positions * 4
    with torch.no_grad():
        used = peak(attend, query, key, value, device="cpu")
    # Of numbers for each position there are the sums and maxima of a block.
    assert used <= CRISS_CROSS_BYTES + widened + 4 * states
    # Of the query, the key, the value and their gradients, and of that of the output.
    widened = widened and (4 * channels[0] + 3 * channels[1]) * positions * 4
    used = peak_of_backward(attend, query, key, value, device="cpu")
    assert used <= CRISS_CROSS_BYTES + widened + 4 * states


@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_criss_cross_attention_in_blocks_with_one_map_of_another_layout(which):
    """Whichever map it is: columns of planes are copied a few channels at a time."""
    inputs = [
        LAYOUTS["contiguous" if i == which else "channels_last"](torch.randn(1, c, 97, 97))
        for i, c in enumerate((64, 64, 512))
    ]
    states = 97 * 97 * 4
    with torch.no_grad():
        used = peak(ctxops.criss_cross_attention, *inputs, device="cpu")
    assert used <= CRISS_CROSS_BYTES + 4 * states
    used = peak_of_backward(ctxops.criss_cross_attention, *inputs, device="cpu")
    assert used <= CRISS_CROSS_BYTES + 4 * states


def test_criss_cross_attention_holds_one_block_at_a_time():
    inputs = [LAYOUTS["channels_last"](torch.randn(1, 4, 200, 200)) for _ in range(3)]
    states = 200 * 200 * 4
    assert 200 * states > 2 * CRISS_CROSS_BYTES
    with torch.no_grad():
        used = peak(ctxops.criss_cross_attention, *inputs, device="cpu")
    assert used <= CRISS_CROSS_BYTES + 4 * states
    used = peak_of_backward(ctxops.criss_cross_attention, *inputs, device="cpu")
    assert used <= CRISS_CROSS_BYTES + 4 * states


def test_criss_cross_attention_puts_no_two_lines_into_a_block_for_one():
    channels, side = 93_000, 16
    line = side * 2 * channels * 4  # of query and key
    assert 0.9 * CRISS_CROSS_BYTES < line < CRISS_CROSS_BYTES
    inputs = [torch.randn(1, c, side, side) for c in (channels, channels, 8)]
    states = side * side * 4
    with torch.no_grad():
        used = peak(ctxops.criss_cross_attention, *inputs, device="cpu")
    assert used <= CRISS_CROSS_BYTES + 4 * states
    used = peak_of_backward(ctxops.criss_cross_attention, *inputs, device="cpu")
    assert used <= CRISS_CROSS_BYTES + 4 * states


@pytest.mark.cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_criss_cross_attention_copies_each_map_once(layout):
    query, key, value = (
        LAYOUTS[layout](torch.randn(2, c, 97, 97, device="cuda")) for c in (64, 64, 512)
    )
    position = 2 * 97 * 97 * 4
    with torch.no_grad():
        used = peak(ctxops.criss_cross_attention, query, key, value, device="cuda")
    copies = 0 if layout == "channels_last" else 2 * (64 + 512) * position
    assert used <= copies + 2 * position + 8 * KIB
    used = peak_of_backward(ctxops.criss_cross_attention, query, key, value, device="cuda")
    copies = 0 if layout == "channels_last" else (4 * 64 + 4 * 512) * position
    assert used <= copies + position + 8 * KIB


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_category_context(layout, device):
    logits = LAYOUTS[layout](torch.randn(2, 19, 64, 64, device=device))
    memory = torch.randn(19, 256, device=device)
    weights, positions, output = 2 * 19 * 4096 * 4, 2 * 4096 * 8, 2 * 256 * 4096 * 4
    with torch.no_grad():
        assert peak(ctxops.category_context, logits, memory, device=device) <= weights + KIB

        def hard(logits, memory):
            return ctxops.category_context(logits, memory, hard=True)

        used = peak(hard, logits, memory, device=device)
    assert used <= positions + (output if layout == "contiguous" else 0) + KIB
