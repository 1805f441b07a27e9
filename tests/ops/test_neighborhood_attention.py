# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ctxops
from ctxops import _native
from ctxops.ops.neighborhood_attention.reference import reference, reference_weights
from numerics import DTYPES, LAYOUTS, assert_close, check_operator, random_like

BORDERS = ["zeros", "mask", "shift"]

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
    ours = partial(
        ctxops.neighborhood_attention,
        kernel_size=kernel_size,
        dilation=dilation,
        scale=scale,
        border=border,
        num_heads=heads,
    )
    return ours, lambda q, k, v: reference(q, k, v, *options)


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


def check(case, border, layout="contiguous", **options):
    shape, value_channels, heads, kernel_size, dilation = case
    ours, plain = operator_and_reference(heads, kernel_size, dilation, border)
    check_operator(ours, plain, inputs(shape, value_channels, layout, **options))


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


def test_reference_of_heads_is_one_call_each():
    query, key, value = inputs((2, 6, 5, 7), 4)
    options = ((3, 3), (1, 2), 0.3, "mask")
    together = reference(query, key, value, *options, 2)
    each = [reference(q, k, v, *options, 1) for q, k, v in zip(
        query.chunk(2, 1), key.chunk(2, 1), value.chunk(2, 1), strict=True)]  # fmt: skip
    torch.testing.assert_close(together, torch.cat(each, 1))


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, layout, dtype, border, device):
    if border == "shift" and not fits(case[0], *case[3:]):
        pytest.skip("the window does not fit")
    check(case, border, layout, dtype=dtype, device=device)


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_windows_larger_than_the_map(case, border, device):
    check(case, border, device=device)


@pytest.mark.parametrize(
    "case",
    [
        ((1, 256, 2, 300), 256, 1, (1, 7), (1, 2)),
        ((1, 300, 130, 3), 5, 1, (7, 1), (1, 1)),
        ((1, 2, 66, 71), 1, 1, (64, 64), (1, 1)),
        ((1, 2, 1, 900), 1, 1, (1, 800), (1, 1)),
        ((1, 2, 1200, 1), 1, 1, (600, 1), (2, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("border", BORDERS)
def test_more_than_a_tile_holds(case, border):
    """Of columns, of rows, and of the weights of several queries."""
    if case[3] == (64, 64) and border != "shift":
        pytest.skip("its reference takes long; test_windows_larger_than_the_map has this window")
    check(case, border, "channels_last")


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, border, device):
    check(((2, 20, 19, 14), 6, 2, (3, 3), (1, 2)), border, layout, device=device)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("isa", _native.INSTRUCTION_SETS)
def test_every_instruction_set(isa, border, monkeypatch):
    kernels = getattr(_native.extension, isa, None)
    if kernels is None:
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(_native, "cpu", kernels)
    for dtype in (torch.float32, torch.float64):
        for kernel in ((3, 3), (4, 7)):
            check(((1, 38, 19, 27), 21, 1, kernel, (2, 1)), border, "channels_last", dtype=dtype)


@settings(deadline=None, max_examples=50)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 20, 24, 24))),
    value_channels=st.integers(1, 20),
    heads=st.integers(1, 3),
    kernel_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    dilation=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    layout=st.sampled_from(list(LAYOUTS)),
    border=st.sampled_from(BORDERS),
)
def test_drawn_shapes(shape, value_channels, heads, kernel_size, dilation, layout, border):
    torch.manual_seed(0)  # a failure is to be found again
    assume(border != "shift" or fits(shape, kernel_size, dilation))
    shape = (shape[0], shape[1] * heads, *shape[2:])
    check((shape, value_channels * heads, heads, kernel_size, dilation), border, layout)


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


def test_batch_of_zero(device):
    leaves = [x.requires_grad_() for x in inputs((0, 4, 5, 7), 6, device=device)]
    y = ctxops.neighborhood_attention(*leaves, 3)
    assert y.shape == (0, 6, 5, 7)
    y.backward(y)
    assert all(x.grad.shape == x.shape for x in leaves)
    assert ctxops.neighborhood_attention_weights(*leaves[:2], 3).shape == (0, 1, 9, 5, 7)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_weights(layout, dtype, border, device):
    query, key, _ = inputs((2, 6, 12, 11), 1, layout, dtype=dtype, device=device)
    options = {"scale": 0.3, "border": border, "num_heads": 2}
    weights = ctxops.neighborhood_attention_weights(query, key, (3, 2), (2, 3), **options)
    assert weights.shape == (2, 2, 6, 12, 11)
    exact = reference_weights(query.double(), key.double(), (3, 2), (2, 3), 0.3, border, 2)
    same_dtype = reference_weights(query, key, (3, 2), (2, 3), 0.3, border, 2)
    assert_close(weights, same_dtype.flatten(2, 3), exact.flatten(2, 3))


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


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout, border, device):
    leaves = [
        x.requires_grad_()
        for x in inputs((2, 4, 6, 7), 2, layout, dtype=torch.float64, device=device)
    ]
    attend = partial(ctxops.neighborhood_attention, kernel_size=(3, 2), border=border, num_heads=2)
    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_opcheck(layout, save, device):
    tensors = inputs((2, 4, 7, 9), 6, layout, device=device)
    options = ([3, 2], [1, 2], 0.3, "mask", 2)
    operators = torch.ops.ctxops
    forward = operators.neighborhood_attention.default
    torch.library.opcheck(forward, (*tensors, *options, save))
    torch.library.opcheck(forward, (*(x.clone().requires_grad_() for x in tensors), *options, save))
    torch.library.opcheck(forward, (*tensors[:2], None, *options, True))
    y, weights = forward(*tensors, *options, True)
    backward = operators.neighborhood_attention_bwd.default
    torch.library.opcheck(backward, (random_like(y), *tensors, weights, *options))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_formats(layout, device):
    query, key, value = (x.requires_grad_() for x in inputs((2, 4, 7, 9), 6, layout, device=device))
    y = ctxops.neighborhood_attention(query, key, value, 3)
    assert y.stride() == value.stride()
    y.backward(random_like(y).contiguous())
    assert all(x.grad.stride() == x.stride() for x in (query, key, value))


def test_saved_tensors_that_come_back_in_another_layout(device):
    leaves = [x.requires_grad_() for x in inputs((2, 4, 5, 6), 4, "channels_last", device=device)]
    upstream = torch.randn(2, 4, 5, 6, device=device)

    def run():
        return ctxops.neighborhood_attention(*leaves, 3, num_heads=2)

    expected = torch.autograd.grad(run(), leaves, upstream)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        output = run()
    assert all(map(torch.equal, torch.autograd.grad(output, leaves, upstream), expected))


@pytest.mark.parametrize("border", BORDERS)
def test_compiles_once_for_all_sizes(border, device):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def attend(q, k, v):
        return ctxops.neighborhood_attention(q.relu(), k, v, 3, 2, border=border).sin()

    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((12, 10), (17, 9), (31, 45)):
            leaves = [x.requires_grad_() for x in inputs((2, 4, *size), 6, device=device)]
            q, k, v = leaves
            y = ctxops.neighborhood_attention(q.relu(), k, v, 3, 2, border=border).sin()
            torch.testing.assert_close(attend(*leaves), y)
            for a, b in zip(
                torch.autograd.grad(attend(*leaves), leaves, y.detach()),
                torch.autograd.grad(y, leaves, y.detach()),
                strict=True,
            ):
                torch.testing.assert_close(a, b)


def test_trains_after_an_export_without_gradients():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return ctxops.neighborhood_attention(q, k, v, 3, border="mask")

    leaves = inputs((2, 4, 7, 5), 6)
    exported = torch.export.export(Attend(), tuple(leaves)).module()
    leaves = [x.requires_grad_() for x in leaves]
    for a, b in zip(
        torch.autograd.grad((exported(*leaves) ** 2).sum(), leaves),
        torch.autograd.grad((Attend()(*leaves) ** 2).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_transforms_of_torch_func():
    attend = partial(ctxops.neighborhood_attention, kernel_size=3)
    q, k, v = (torch.randn(3, 2, 4, 5, 6) for _ in range(3))
    expected = torch.stack([attend(*each) for each in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.vmap(attend)(q, k, v), expected)
    gradient = torch.func.grad(lambda x: (attend(x, k[0], v[0]) ** 2).sum())(q[0])
    leaf = q[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad((attend(leaf, k[0], v[0]) ** 2).sum(), leaf)
    torch.testing.assert_close(gradient, expected)


def test_autocast_casts_down(device):
    tensors = inputs((1, 4, 5, 5), 4, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ctxops.neighborhood_attention(*tensors, 3)
        weights = ctxops.neighborhood_attention_weights(*tensors[:2], 3)
    assert y.dtype == weights.dtype == torch.bfloat16


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_deterministic(layout, border, device):
    leaves = [x.requires_grad_() for x in inputs((2, 20, 33, 47), 12, layout, device=device)]
    upstream = torch.randn(2, 12, 33, 47, device=device)
    threads = torch.get_num_threads()

    def run():
        y = ctxops.neighborhood_attention(*leaves, 5, 3, border=border)
        return y, *torch.autograd.grad(y, leaves, upstream)

    first = run()
    try:
        for repetition in range(20):
            torch.set_num_threads(1 + repetition % 3)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_backward_without_values_is_refused():
    query, key, _ = inputs((1, 4, 8, 8), 1)
    options = ([3, 3], [1, 1], 0.3, "mask", 1)
    _, weights = torch.ops.ctxops.neighborhood_attention(query, key, None, *options, True)
    value = torch.empty(1, 0, 8, 8)
    with pytest.raises(ValueError, match="value has no elements"):
        torch.ops.ctxops.neighborhood_attention_bwd(query, query, key, value, weights, *options)


def test_no_value():
    query = torch.ones(1, 4, 5, 6)
    with pytest.raises(TypeError, match=r"value must be .* got NoneType"):
        ctxops.neighborhood_attention(query, query, None, 3)


def call(shape=(1, 4, 5, 6), key=None, value=None, kernel_size=3, dilation=1, **options):
    query = torch.ones(shape)
    key = torch.ones(shape) if key is None else key
    value = torch.ones(shape) if value is None else value
    return ctxops.neighborhood_attention(query, key, value, kernel_size, dilation, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shape": (4, 5, 6)}, ValueError, r"query must have shape .*, got \(4, 5, 6\)"),
        ({"shape": (1, 0, 5, 6)}, ValueError, r"query must have C, H and W of at least 1"),
        ({"key": [1.0]}, TypeError, "key must be a torch.Tensor, got list"),
        ({"key": torch.ones(1, 4, 5, 7)}, ValueError, r"key must have shape .* got \(1, 4, 5, 7\)"),
        ({"key": torch.ones(1, 3, 5, 6)}, ValueError, r"key must have shape .* got \(1, 3, 5, 6\)"),
        (
            {"value": torch.ones(1, 4, 6, 6)},
            ValueError,
            r"value must have shape .* got \(1, 4, 6, 6\)",
        ),
        (
            {"value": torch.ones(1, 4, 5, 6).double()},
            TypeError,
            "value must have the dtype of query, torch.float32, got torch.float64",
        ),
        ({"value": torch.ones(1, 4, 5, 6).int()}, TypeError, "value must be float32.*int32"),
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1 .* got 0"),
        ({"kernel_size": (3, -1)}, ValueError, "kernel_size must be at least 1 .* got -1"),
        ({"kernel_size": (3, 3, 3)}, TypeError, r"kernel_size must be an integer or two"),
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
            {"num_heads": 2, "value": torch.ones(1, 3, 5, 6)},
            ValueError,
            r"value must have a multiple of num_heads = 2 channels, got \(1, 3, 5, 6\)",
        ),
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
    ],
    ids=lambda x: None,
)  # fmt: skip
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


def test_compiled_shift_on_a_map_that_is_too_small():
    attend = torch.compile(partial(call, (1, 4, 5, 6), border="shift", dilation=2), fullgraph=True)
    with pytest.raises(Exception, match="the map is too small to shift the window"):
        attend()


def test_second_derivatives(device):
    leaves = [
        x.requires_grad_() for x in inputs((1, 2, 4, 5), 2, dtype=torch.float64, device=device)
    ]

    def cubed(*tensors):
        return ctxops.neighborhood_attention(*tensors, 3, border="mask") ** 3

    grads = torch.autograd.grad(cubed(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"neighborhood_attention.*use_reference"):
        sum(g.sum() for g in grads).backward()
    with ctxops.use_reference():
        assert torch.autograd.gradgradcheck(cubed, leaves)


def test_forward_mode_raises():
    tensors = inputs((1, 2, 4, 5), 2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[1], tensors[1])
        with pytest.raises(NotImplementedError, match="neighborhood_attention has no forward-mode"):
            ctxops.neighborhood_attention(tensors[0], dual, tensors[2], 3)


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    maps = [torch.zeros(1, 5, 21_000, 21_000, device="cuda", dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last) for _ in range(3)]  # fmt: skip
    maps[2][0, 4, -1, -1] = 9
    y = ctxops.neighborhood_attention(*maps, 3, border="mask")
    torch.testing.assert_close(y[0, 4, -1, -1].item(), 9 / 4, rtol=1e-2, atol=0)


@pytest.mark.cuda
def test_graph_capture_on_a_side_stream():
    tensors = inputs((2, 16, 40, 30), 8, "channels_last", device="cuda")
    expected = ctxops.neighborhood_attention(*tensors, 5, 2)
    static = [torch.zeros_like(x) for x in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ctxops.neighborhood_attention(*static, 5, 2)
    for to, x in zip(static, tensors, strict=True):
        to.copy_(x)
    graph.replay()
    torch.testing.assert_close(y, expected)
