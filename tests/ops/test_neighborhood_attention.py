# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF012 (nobody writes to what a contract declares)
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st

import ctxops
from ctxops.ops.neighborhood_attention.reference import reference, reference_weights
from numerics import LAYOUTS, check_operator, random_like
from ops.contract import FORMATS, OF_GRADIENTS, OperatorContract, each_value_once

BORDERS = ["zeros", "mask", "shift"]
# The border, and is there a bias? test_bias has the others.
MODES = {border: (border, False) for border in BORDERS} | {"shift-biased": ("shift", True)}

# (B, C, H, W), channels of the value, heads, kernel_size, dilation
CASES = [
    ((3, 1, 1, 1), 1, 1, (1, 1), (1, 1)),
    ((1, 8, 1, 17), 4, 2, (1, 3), (1, 2)),
    ((2, 6, 13, 1), 6, 3, (4, 1), (3, 1)),
    ((2, 37, 20, 23), 10, 1, (5, 5), (2, 3)),
    ((1, 64, 31, 29), 48, 4, (3, 3), (6, 6)),
    ((1, 130, 12, 40), 70, 1, (2, 7), (1, 3)),
    ((2, 20, 17, 19), 20, 2, (6, 4), (1, 1)),
    ((1, 5, 41, 43), 3, 1, (20, 20), (1, 2)),
]
# Windows that leave the map on both sides, and classes that have no position.
WIDE = [
    ((1, 20, 7, 5), 9, 1, (9, 9), (1, 1)),
    ((1, 4, 6, 3), 4, 2, (5, 3), (4, 7)),
    ((2, 3, 2, 2), 2, 1, (64, 64), (1, 1)),
    ((1, 2, 1, 700), 1, 1, (1, 600), (1, 1)),
    ((1, 3, 4, 5), 3, 1, (3, 3), (2**31 - 1, 1000)),
]


def operator_and_reference(heads, kernel_size, dilation, border, scale=0.3):
    options = (kernel_size, dilation, scale, border, heads)
    attend = partial(
        ctxops.neighborhood_attention,
        kernel_size=kernel_size,
        dilation=dilation,
        scale=scale,
        border=border,
        num_heads=heads,
    )
    return (
        lambda q, k, v, bias=None: attend(q, k, v, rel_pos_bias=bias),
        lambda q, k, v, bias=None: reference(q, k, v, *options, bias),
    )


def fits(shape, kernel_size, dilation):
    """Has every residue class the positions of a window?"""
    return all(
        len(range(residue, extent, d)) >= k
        for extent, k, d in zip(shape[2:], kernel_size, dilation, strict=True)
        for residue in range(min(d, extent))
    )


def inputs(shape, value_channels, layout="contiguous", **options):
    batch, _, *size = shape
    shapes = (shape, shape, (batch, value_channels, *size))
    return [LAYOUTS[layout](torch.randn(s, **options)) for s in shapes]


def bias_of(heads, kernel_size, **options):
    return torch.randn(heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1, **options)


def check(case, border, layout="contiguous", biased=False, scale=0.3, **options):
    shape, value_channels, heads, kernel_size, dilation = case
    ours, plain = operator_and_reference(heads, kernel_size, dilation, border, scale)
    bias = [bias_of(heads, kernel_size, **options)] if biased else []
    check_operator(ours, plain, [*inputs(shape, value_channels, layout, **options), *bias])


@st.composite
def _drawn(draw):
    shape = draw(st.tuples(*(st.integers(1, n) for n in (2, 20, 24, 24))))
    heads, value_channels = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    kernel_size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    dilation = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    border = draw(st.sampled_from(BORDERS))
    assume(border != "shift" or fits(shape, kernel_size, dilation))
    shape = (shape[0], shape[1] * heads, *shape[2:])
    biased = draw(st.booleans())
    return (shape, value_channels * heads, heads, kernel_size, dilation), (border, biased)


ONES = torch.ones(1, 4, 5, 6)
# What both operators refuse, and what the one with values refuses.
ERRORS = [
    ({"query": torch.ones(4, 5, 6)}, ValueError, r"query must have shape .*, got \(4, 5, 6\)"),
    ({"query": ONES[:, :0]}, ValueError, "query must have C, H and W of at least 1"),
    ({"key": [1.0]}, TypeError, "key must be a torch.Tensor, got list"),
    ({"key": torch.ones(1, 4, 5, 7)}, ValueError, r"key must have shape .* got \(1, 4, 5, 7\)"),
    ({"key": torch.ones(1, 3, 5, 6)}, ValueError, r"key must have shape .* got \(1, 3, 5, 6\)"),
    ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1 .* got 0"),
    ({"kernel_size": (3, -1)}, ValueError, "kernel_size must be at least 1 .* got -1"),
    ({"kernel_size": (3, 3, 3)}, TypeError, "kernel_size must be an integer or two"),
    ({"kernel_size": 2.5}, TypeError, "kernel_size must be an integer or two, got 2.5"),
    ({"kernel_size": True}, TypeError, "kernel_size must hold integers, got True"),
    ({"kernel_size": (65, 64)}, ValueError, "kernel_size must have at most 4096.* 65 x 64"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1 .* got 0"),
    ({"dilation": (1, "2")}, TypeError, "dilation must hold integers, got '2'"),
    ({"border": "reflect"}, ValueError, "border must be one of .* got 'reflect'"),
    ({"num_heads": 3}, ValueError, "num_heads must divide the query's 4 channels, got 3"),
    ({"num_heads": 0}, ValueError, "num_heads must divide the query's 4 channels, got 0"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an integer, got 2.0"),
    (
        {"border": "shift", "dilation": 2},
        ValueError,
        "border='shift' needs .*: H of at least 6 for kernel_size 3 and dilation 2, got 5; use",
    ),
    (
        {"border": "shift", "kernel_size": (1, 7)},
        ValueError,
        "border='shift' needs .*: W of at least 7 for kernel_size 7 and dilation 1, got 6; use",
    ),
    ({"scale": "1"}, TypeError, "scale must be a number or None, got str"),
    (
        {"rel_pos_bias": torch.ones(1, 3, 3)},
        ValueError,
        r"rel_pos_bias must have shape .* = \(1, 5, 5\), got \(1, 3, 3\)",
    ),
    ({"rel_pos_bias": torch.ones(1, 5, 5).half()}, TypeError, "rel_pos_bias must have the dtype"),
]
ERRORS_OF_VALUES = [
    ({"value": None}, TypeError, "value must be .* got NoneType"),
    (
        {"value": torch.ones(1, 4, 6, 6)},
        ValueError,
        r"value must have shape .* got \(1, 4, 6, 6\)",
    ),
    (
        {"value": ONES.double()},
        TypeError,
        "value must have the dtype of query, torch.float32, got torch.float64",
    ),
    ({"value": ONES.int()}, TypeError, "value must be float32.*int32"),
    (
        {"num_heads": 2, "value": torch.ones(1, 3, 5, 6)},
        ValueError,
        r"value must have a multiple of num_heads = 2 channels, got \(1, 3, 5, 6\)",
    ),
]


class TestNeighborhoodAttention(OperatorContract):
    name = "neighborhood_attention"
    cases = CASES
    modes = MODES
    autocast = "down"
    drawn = _drawn()
    valid = {"query": ONES, "key": ONES, "value": ONES, "kernel_size": 3}
    # 30 positions, 6 in a window, 4 and 6 channels; backward both twice; heads and a bias change
    # nothing
    products = tuple(
        (
            {"value": torch.ones(1, 6, 5, 6), "kernel_size": (3, 2), "num_heads": heads} | bias,
            {"neighborhood_attention": 3600, "neighborhood_attention_backward": 7200},
        )
        for heads, bias in ((1, {}), (2, {}), (2, {"rel_pos_bias": torch.ones(2, 5, 3)}))
    )
    errors = ERRORS + ERRORS_OF_VALUES

    def case(self, batch, channels, height, width):
        # With every border the window fits.
        window, dilation = ((3, 2), (1, 1)) if width < 6 else ((4, 3), (1, 2))
        return (batch, channels, height, width), channels + 2, 2, window, dilation

    def make(self, case, mode, **options):
        shape, value_channels, heads, kernel_size, _ = case
        batch, _, *size = shape
        maps = [torch.randn(s, **options) for s in (shape, shape, (batch, value_channels, *size))]
        return [*maps, bias_of(heads, kernel_size, **options)] if mode[1] else maps

    def functions(self, case, mode):
        return operator_and_reference(*case[2:], mode[0])

    def opchecks(self, inputs, case, mode):
        (border, biased), (*_, heads, kernel_size, dilation) = mode, case
        options = (list(kernel_size), list(dilation), 0.3, border, heads)
        maps, bias = inputs[:3], inputs[3:]
        forward = "neighborhood_attention"
        leaves = [x.clone().requires_grad_() for x in inputs]
        for save in (True, False):
            yield forward, (*maps, *options, save, *bias)
            yield forward, (*leaves[:3], *options, save, *leaves[3:])
        yield forward, (*maps[:2], None, *options, True, *bias)
        y, weights = torch.ops.ctxops.neighborhood_attention(*maps, *options, True, *bias)
        backward = (random_like(y), *maps, weights, *options, biased)
        yield "neighborhood_attention_backward", backward


class TestNeighborhoodAttentionWeights(TestNeighborhoodAttention):
    name = "neighborhood_attention_weights"
    stem = "neighborhood_attention"
    # Where a gradient is wanted the reference serves: test_weights_have_gradients.
    constants = (0, 1, 2)
    drawn = _drawn()
    valid = {"query": ONES, "key": ONES, "kernel_size": 3}
    products = (({}, {"neighborhood_attention": 2160}),)  # 30 positions, 9 in a window, 4 channels
    errors = ERRORS
    without = dict.fromkeys(OF_GRADIENTS, "its gradients are the reference's") | {
        "test_opcheck": "it is neighborhood_attention without a value",
        "test_the_first_map_decides_on_the_memory_format": "it gives no map",
    }

    def make(self, case, mode, **options):
        query, key, _, *bias = super().make(case, mode, **options)
        return [query, key, *bias]

    def functions(self, case, mode):
        _, _, heads, kernel_size, dilation = case
        options = {
            "kernel_size": kernel_size, "dilation": dilation, "scale": 0.3, "border": mode[0],
            "num_heads": heads,
        }  # fmt: skip
        weigh = partial(ctxops.neighborhood_attention_weights, **options)
        plain = partial(reference_weights, **options)
        return (
            lambda q, k, bias=None: weigh(q, k, rel_pos_bias=bias),
            lambda q, k, bias=None: plain(q, k, rel_pos_bias=bias).flatten(2, 3),
        )


def unfolded(query, key, value, kernel, dilation):
    """LDv2 as it is usually written: unfold with zero padding, one head, an odd window."""
    batch, _, height, width = query.shape
    padding = kernel // 2 * dilation

    def windows(x):
        columns = F.unfold(x, kernel, dilation, padding)
        return columns.view(batch, x.shape[1], kernel * kernel, height, width)

    weights = (query[:, :, None] * windows(key)).sum(1).mul(0.3).softmax(1)
    return (weights[:, None] * windows(value)).sum(2)


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 4), (5, 2), (7, 6)])
def test_reference_is_attention_over_unfolded_windows(kernel, dilation):
    leaves = [x.requires_grad_() for x in inputs((2, 6, 9, 14), 4, dtype=torch.float64)]
    window, step = (kernel, kernel), (dilation, dilation)
    ours = reference(*leaves, window, step, 0.3, "zeros", 1)
    theirs = unfolded(*leaves, kernel, dilation)
    torch.testing.assert_close(ours, theirs)
    upstream = random_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_reference_of_a_window_that_slides_by_hand():
    key = torch.arange(7.0).view(1, 1, 1, 7)
    average = partial(reference, kernel_size=(1, 3), dilation=(1, 2), scale=0.0, num_heads=1)
    # The even positions are 0 2 4 6, the odd ones 1 3 5.
    shifted = average(key, key, key, border="shift").flatten()
    torch.testing.assert_close(shifted, torch.tensor([2.0, 3, 2, 3, 4, 3, 4]))
    masked = average(key, key, key, border="mask").flatten()
    torch.testing.assert_close(masked, torch.tensor([1.0, 2, 2, 3, 4, 4, 5]))
    zeros = average(key, key, key, border="zeros").flatten()
    torch.testing.assert_close(zeros, torch.tensor([2.0, 4, 6, 9, 12, 8, 10]) / 3)
    even = reference(key, key, key, (1, 2), (1, 1), 0.0, "mask", 1).flatten()
    torch.testing.assert_close(even, torch.tensor([0.0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5]))


@pytest.mark.parametrize("border", BORDERS)
def test_reference_of_a_bias_by_hand(border):
    value, bias = torch.randn(7), torch.randn(5)
    expected = []
    for position in range(7):
        first = position - 2
        while border == "shift" and first < 0:
            first += 2
        while border == "shift" and first + 4 >= 7:
            first -= 2
        logits, values = [], []
        for neighbour in (first, first + 2, first + 4):
            if 0 <= neighbour < 7:
                logits.append(bias[(neighbour - position) // 2 + 2])
                values.append(value[neighbour])
            elif border == "zeros":
                logits.append(torch.zeros(()))
                values.append(torch.zeros(()))
        expected.append((torch.stack(logits).softmax(0) * torch.stack(values)).sum())
    row = value.view(1, 1, 1, 7)
    ours = reference(row, row, row, (1, 3), (1, 2), 0.0, border, 1, bias.view(1, 1, 5))
    torch.testing.assert_close(ours.flatten(), torch.stack(expected))


def test_reference_of_heads_is_one_call_each():
    query, key, value = inputs((2, 6, 5, 7), 4)
    options = ((3, 3), (1, 2), 0.3, "mask")
    together = reference(query, key, value, *options, 2)
    each = [reference(q, k, v, *options, 1) for q, k, v in zip(
        query.chunk(2, 1), key.chunk(2, 1), value.chunk(2, 1), strict=True)]  # fmt: skip
    torch.testing.assert_close(together, torch.cat(each, 1))


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_windows_larger_than_the_map(case, border, device):
    check(case, border, device=device)


@each_value_once(
    case=[
        ((1, 256, 2, 300), 256, 1, (1, 7), (1, 2)),
        ((1, 300, 130, 3), 5, 1, (7, 1), (1, 1)),
        ((1, 2, 1, 900), 1, 1, (1, 800), (1, 1)),
        ((1, 2, 1200, 1), 1, 1, (600, 1), (2, 1)),
    ],
    border=BORDERS,
)
def test_more_than_a_tile_holds(case, border):
    """Of columns, of rows, and of the weights of several queries."""
    for layout in FORMATS:
        check(case, border, layout)


@each_value_once(case=[*WIDE[:2], *CASES[1:]], border=BORDERS, scale=[0.3, 0.0])
def test_bias(case, border, scale, device):
    if border != "shift" or fits(case[0], *case[3:]):
        for layout in FORMATS:
            check(case, border, layout, biased=True, scale=scale, device=device)


@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_entries_of_a_bias_that_no_window_reaches(border, device):
    tensors = inputs((1, 4, 9, 10), 4, device=device)
    bias = torch.full((2, 7, 5), torch.nan, device=device)
    bias[:, 1:5, 1:4] = 0  # an even window reaches further up
    bias.requires_grad_()
    ours, _ = operator_and_reference(2, (4, 3), (1, 2), border)
    output = ours(*tensors, bias)
    torch.testing.assert_close(output, ours(*tensors))
    (gradient,) = torch.autograd.grad(output, bias, torch.randn_like(output))
    assert torch.equal(gradient != 0, ~bias.isnan())


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "layout"), [(64, "channels_last"), (45, "contiguous")])
def test_more_weights_of_a_window_than_a_tile_holds(kernel, layout):
    """With the other borders its reference takes long; test_windows_larger_than_the_map has it."""
    check(((1, 2, 66, 71), 1, 1, (kernel, kernel), (1, 1)), "shift", layout)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [32, 33])
def test_results_larger_than_the_caches(channels, device):
    """They take another way to memory, in whole vectors that are aligned."""
    assert 4 * 4 * channels * 260 * 260 > 32 * 2**20
    check(
        ((1, channels, 260, 260), channels, 1, (3, 3), (1, 1)),
        "zeros",
        "channels_last",
        device=device,
    )


@pytest.mark.slow
def test_many_tiny_maps(device):
    check(((70_000, 2, 4, 4), 2, 1, (2, 3), (1, 1)), "mask", device=device)


@pytest.mark.parametrize("border", BORDERS)
# float64 would be judged by itself: where weights are 1 or 0, gradients are what cancels.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_values(dtype, border, device):
    """Logits of some thousands: the largest must be taken off."""
    ours, plain = operator_and_reference(1, (3, 3), (1, 1), border, scale=1.0)
    tensors = [x * 30 for x in inputs((1, 8, 9, 9), 8, dtype=dtype, device=device)]
    check_operator(ours, plain, tensors)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_values_that_are_not_finite_reach_the_windows_that_hold_them(which, value, border, device):
    tensors = inputs((1, 4, 15, 16), 3, device=device)
    tensors[which][0, 1, 7, 8] = value
    for kernel, dilation in (((3, 3), (1, 1)), ((2, 5), (2, 1)), ((5, 1), (3, 1))):
        ours, plain = operator_and_reference(1, kernel, dilation, border)
        output = ours(*tensors)
        torch.testing.assert_close(output, plain(*tensors), equal_nan=True)
        assert (~output.isfinite()).any(1).sum() <= kernel[0] * kernel[1]
    # A key of -inf only takes its own position out where the logit is -inf, not +inf or NaN.
    if torch.isnan(tensors[which]).any():
        assert not output.isfinite().all()


@pytest.mark.parametrize("border", BORDERS)
def test_every_logit_far_below_that_of_a_zero_outside(border, device):
    query, _, value = inputs((1, 4, 9, 10), 3, device=device)
    ours, plain = operator_and_reference(1, (3, 3), (2, 2), border)
    tensors = query.abs() + 1, -1e3 * query.abs() - 1e3, value
    output = ours(*tensors)
    torch.testing.assert_close(output, plain(*tensors), rtol=1e-3, atol=1e-5)
    assert output.isfinite().all()


@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_logits_of_minus_infinity(border, device):
    query, key, value = inputs((1, 1, 5, 5), 2, device=device)
    query, key = query.abs(), torch.full_like(key, -torch.inf)
    ours, plain = operator_and_reference(1, (3, 3), (1, 1), border)
    torch.testing.assert_close(ours(query, key, value), plain(query, key, value), equal_nan=True)


def test_weights_are_those_of_the_operator(device):
    query, key, value = inputs((1, 4, 9, 10), 3, device=device)
    weights = ctxops.neighborhood_attention_weights(query, key, 3, 2, border="mask")
    windows = F.unfold(value, 3, 2, 2).view(1, 3, 9, 9, 10)
    expected = ctxops.neighborhood_attention(query, key, value, 3, 2, border="mask")
    torch.testing.assert_close((weights * windows).sum(2), expected)


def test_weights_have_gradients():
    query, key = (torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True) for _ in "qk")
    weigh = partial(ctxops.neighborhood_attention_weights, kernel_size=3, num_heads=2)
    assert torch.autograd.gradcheck(weigh, (query, key))


def test_saved_channels_last_weights_that_come_back_contiguous(device):
    """To the last bit. The contract lets maps come back so too: they have sums in another order."""
    leaves = [x.requires_grad_() for x in inputs((2, 4, 5, 6), 4, "channels_last", device=device)]
    upstream = torch.randn(2, 4, 5, 6, device=device)

    def run():
        return ctxops.neighborhood_attention(*leaves, 3, num_heads=2)

    def contiguous_weights(x):
        return x.contiguous() if x.dim() == 5 else x

    expected = torch.autograd.grad(run(), leaves, upstream)
    with torch.autograd.graph.saved_tensors_hooks(contiguous_weights, lambda x: x):
        output = run()
    assert all(map(torch.equal, torch.autograd.grad(output, leaves, upstream), expected))


def test_a_backward_without_values_is_refused():
    query, key, _ = inputs((1, 4, 8, 8), 1)
    options = ([3, 3], [1, 1], 0.3, "mask", 1)
    _, weights = torch.ops.ctxops.neighborhood_attention(query, key, None, *options, True)
    value = torch.empty(1, 0, 8, 8)
    with pytest.raises(ValueError, match="value has no elements"):
        torch.ops.ctxops.neighborhood_attention_backward(
            query, query, key, value, weights, *options
        )


def test_a_bias_of_another_window_is_refused():
    options = ([3, 3], [1, 1], 0.3, "mask", 1, True)
    with pytest.raises(ValueError, match=r"bias must be a dense \(heads, 2 \* kh - 1"):
        torch.ops.ctxops.neighborhood_attention(ONES, ONES, None, *options, torch.ones(1, 3, 3))


def test_compiled_shift_on_a_map_that_is_too_small():
    attend, _ = operator_and_reference(1, (3, 3), (2, 2), "shift")
    attend = torch.compile(attend, fullgraph=True)
    with pytest.raises(Exception, match="the map is too small to shift the window"):
        attend(ONES, ONES, ONES)


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    maps = [torch.zeros(1, 5, 21_000, 21_000, device="cuda", dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last) for _ in range(3)]  # fmt: skip
    maps[2][0, 4, -1, -1] = 9
    y = ctxops.neighborhood_attention(*maps, 3, border="mask")
    torch.testing.assert_close(y[0, 4, -1, -1].item(), 9 / 4, rtol=1e-2, atol=0)
