# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF012 (nobody writes to what a contract declares)
import re
from functools import partial

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

import ctxops
from ctxops import _native, _operator
from ctxops.ops.criss_cross_attention import op
from ctxops.ops.criss_cross_attention.reference import reference, reference_weights
from numerics import DTYPES, LAYOUTS, check_operator, random_like
from ops.contract import OperatorContract, each_value_once

# (B, C, H, W), Cv
CASES = [
    ((1, 1, 1, 1), 1),
    ((2, 8, 7, 5), 8),
    ((1, 16, 1, 23), 3),
    ((1, 5, 19, 1), 40),
    ((3, 33, 13, 11), 65),
    ((1, 6, 2, 2), 130),
]


def make(shape, value_channels, dtype=torch.float32, device="cpu", layout="contiguous"):
    batch, _, *size = shape
    shapes = (shape, shape, (batch, value_channels, *size))
    return [LAYOUTS[layout](torch.randn(s, dtype=dtype, device=device)) for s in shapes]


def attend(query, key, value, scale=0.3):
    return ctxops.criss_cross_attention(query, key, value, scale=scale)


def check(inputs, scale=0.3):
    check_operator(partial(attend, scale=scale), partial(reference, scale=scale), inputs)


@st.composite
def _drawn(draw):
    shape = draw(st.tuples(*(st.integers(1, n) for n in (3, 20, 12, 12))))
    # Of one position the gradients of query and key are zero by cancellation, of two they are one
    # difference, which the reference may get right to the last bit: no measure of ours.
    assume(shape[2] * shape[3] > 2)
    return (shape, draw(st.integers(1, 90))), "one"


ONES = torch.ones(2, 4, 3, 5)
SCALE = (TypeError, "scale must be a number or None, got")
# What both operators refuse, and what the one with values refuses.
ERRORS = [
    ({"query": torch.ones(2, 4, 9)}, ValueError, r"query must have shape \(B, C, H, W\)"),
    ({"query": torch.ones(2, 4, 0, 3)}, ValueError, "query must have C, H and W"),
    ({"query": ONES.int()}, TypeError, "query must be float32.*int32"),
    ({"key": None}, TypeError, "key must be a torch.Tensor, got NoneType"),
    ({"key": ONES.mT}, ValueError, r"key .* \(2, 4, 3, 5\), got \(2, 4, 5, 3\)"),
    ({"key": ONES[..., :4]}, ValueError, r"key .* \(2, 4, 3, 5\), got \(2, 4, 3, 4\)"),
    ({"key": ONES[:, :3]}, ValueError, r"key .* \(2, 4, 3, 5\), got \(2, 3,"),
    ({"key": ONES.half()}, TypeError, "key must have the dtype of query"),
    ({"key": ONES.double()}, TypeError, "key must have the dtype of query"),
    *(({"scale": scale}, *SCALE) for scale in (torch.tensor(0.5), "0.5", [1.0], 1j, True)),
]
ERRORS_OF_VALUES = [
    ({"value": torch.ones(2, 6, 4, 5)}, ValueError, r"value .* \(2, any, 3, 5\), got \(2, 6"),
    ({"value": torch.ones(1, 6, 3, 5)}, ValueError, r"value .* \(2, any, 3, 5\), got \(1, 6"),
    ({"value": ONES[:, :0]}, ValueError, "value must have at least one channel"),
    ({"value": ONES.to("meta")}, ValueError, "value must be on .* meta"),
    ({"value": ONES.double()}, TypeError, "value must have the dtype of query"),
]


class TestCrissCrossAttention(OperatorContract):
    name = "criss_cross_attention"
    cases = CASES
    native = False
    autocast = "down"
    drawn = _drawn()
    valid = {"query": ONES, "key": ONES, "value": torch.ones(2, 6, 3, 5)}
    # 30 positions, 7 in a cross, 4 and 6 channels; backward three times the 4 and twice the 6
    products = (
        ({}, {"criss_cross_attention": 4200, "criss_cross_attention_backward": 10080}),
    )  # fmt: skip
    errors = ERRORS + ERRORS_OF_VALUES

    def case(self, *shape):
        return shape, shape[1] // 2 + 3

    def make(self, case, _, **options):
        return make(*case, **options)

    def functions(self, case, _):
        return attend, partial(reference, scale=0.3)

    def opchecks(self, inputs, case, _):
        forward = "criss_cross_attention"
        yield forward, (*inputs, 0.3)
        yield forward, (*(x.clone().requires_grad_() for x in inputs), 0.3)
        output, lse = torch.ops.ctxops.criss_cross_attention(*inputs, 0.3)
        yield "criss_cross_attention_backward", (random_like(output), *inputs, output, lse, 0.3)


class TestCrissCrossAttentionWeights(TestCrissCrossAttention):
    name = "criss_cross_attention_weights"
    stem = "criss_cross_attention"
    derivatives = "all"
    drawn = _drawn()
    valid = {"query": ONES, "key": ONES}
    products = ()
    errors = ERRORS
    without = {
        "test_opcheck": "it is not registered",
        "test_compiles_once_for_all_sizes": "they are plain torch's, which dynamo traces for 8 s",
        "test_compiled_by_inductor": "they are plain torch's, for which inductor takes a minute",
        "test_use_reference": "it is its reference",
        "test_the_first_map_decides_on_the_memory_format": "its output is no feature map",
        "test_memory_format_of_the_gradients": "they are plain torch's",
        "test_backward_under_autocast": "plain torch's products are cast down there",
    }

    def make(self, case, _, **options):
        return make(*case, **options)[:2]

    def functions(self, case, _):
        weigh = partial(ctxops.criss_cross_attention_weights, scale=0.3)
        return weigh, lambda *x: reference_weights(*x, 0.3).permute(0, 3, 1, 2)


def each_position(query, key, value, scale):
    """Position by position: weights (B, H + W - 1, H, W) and output."""
    batch, _, height, width = query.shape
    weights = query.new_zeros(batch, height + width - 1, height, width)
    output = torch.zeros_like(value)
    for b in range(batch):
        for h in range(height):
            for w in range(width):
                keys = [(i, w) for i in range(height)]
                keys += [(h, j) for j in range(width) if j != w]
                logits = [scale * (query[b, :, h, w] @ key[b, :, i, j]) for i, j in keys]
                p = torch.stack(logits).softmax(0)
                weights[b, :, h, w] = p
                output[b, :, h, w] = sum(p[n] * value[b, :, i, j] for n, (i, j) in enumerate(keys))
    return weights, output


@pytest.mark.parametrize("size", [(4, 5), (5, 3), (1, 6), (4, 1), (1, 1)], ids=str)
def test_reference_is_a_loop_over_positions(size):
    inputs = make((2, 3, *size), 4, torch.float64)
    weights, output = each_position(*inputs, 0.7)
    torch.testing.assert_close(reference(*inputs, 0.7), output)
    actual = ctxops.criss_cross_attention_weights(*inputs[:2], scale=0.7)
    torch.testing.assert_close(actual, weights)


@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("others", ["contiguous", "channels_last"])
def test_maps_of_different_layouts(others, which, device):
    inputs = make((2, 6, 7, 8), 70, device=device, layout=others)
    inputs[which] = LAYOUTS["channels_last" if others == "contiguous" else "contiguous"](
        inputs[which]
    )
    check(inputs)


@pytest.mark.parametrize("scale", [0.0, -1.5, 1.0, None], ids=str)
def test_scales(scale, device):
    inputs = make((2, 9, 4, 5), 3, torch.float64, device)
    expected = reference(*inputs, 9**-0.5 if scale is None else scale)
    torch.testing.assert_close(attend(*inputs, scale=scale), expected)
    weights = ctxops.criss_cross_attention_weights(*inputs[:2], scale=scale)
    column = torch.einsum("bihw,bviw->bvhw", weights[:, :4], inputs[2])
    first_of_row = torch.einsum("bjh,bvhj->bvh", weights[:, 4:, :, 0], inputs[2][..., 1:])
    torch.testing.assert_close(column[..., 0] + first_of_row, expected[..., 0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_blocks_give_the_same(layout, dtype, monkeypatch):
    monkeypatch.setattr(op, "BLOCK_BYTES", 3_000)
    monkeypatch.setattr(op, "COPIED_CHANNELS", 4)
    assert len(list(op._blocks(torch.empty(13, 17, 6), 17 * 17))) > 4
    check(make((2, 6, 17, 13), 9, dtype, layout=layout))


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_up_to_the_range_of_half_precision(sign, device):
    query, key, value = make((1, 8, 6, 6), 4, torch.float16, device)
    inputs = [query * 100, key * 100, value]
    assert reference(*inputs, 1.0).isnan().any()
    expected = reference(*(x.double() for x in inputs), sign).half()
    torch.testing.assert_close(attend(*inputs, scale=sign), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_logit_very_negative(dtype, device):
    """Nothing stands in for the position that the row leaves out: no number would be small enough.

    All logits are alike, -60000 (nearly the least float16), up to their own rounding."""
    query = torch.full((1, 1, 3, 4), 240.0, dtype=dtype, device=device)
    value = torch.arange(12, dtype=dtype, device=device).view(1, 1, 3, 4)
    keys = (value.sum(2, keepdim=True) + value.sum(3, keepdim=True) - value) / 6
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    rtol = torch.finfo(dtype).eps + 60_000 * torch.finfo(accumulator).eps
    for y in (attend(query, -query - 10, value, 1.0), reference(query, -query - 10, value, 1.0)):
        torch.testing.assert_close(y, keys, rtol=rtol, atol=0)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("size", [(4, 5), (3, 2), (2, 3)], ids=str)
def test_values_that_are_not_finite(size, which, number, device):
    inputs = make((2, 4, *size), 4, device=device)
    inputs[which][1, 2, 1, 1] = number
    expected = reference(*inputs, 0.3)
    assert size != (4, 5) or not expected[1].isfinite().all()
    assert expected[0].isfinite().all()
    torch.testing.assert_close(attend(*inputs), expected, equal_nan=True)


@pytest.mark.parametrize("where", ["column", "row", "map"])
@pytest.mark.parametrize("size", [(3, 4), (1, 4), (3, 1), (1, 1)], ids=str)
def test_lines_of_which_every_logit_is_minus_infinity(size, where, device):
    """The other line decides; NaN only where every logit of the cross is -inf."""
    query, key, value = make((2, 2, *size), 3, device=device)
    lines = {"column": key[1, ..., 0], "row": key[1, :, 0], "map": key[1]}
    lines[where].fill_(-torch.inf)
    inputs = [x.requires_grad_() for x in (query.abs(), key, value)]
    y, expected = attend(*inputs), reference(*inputs, 0.3)
    torch.testing.assert_close(y, expected, equal_nan=True)
    upstream = random_like(y)
    grads = (torch.autograd.grad(f, inputs, upstream) for f in (y, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_one_position(device):
    """It attends to itself: the gradients of query and key are zero, by cancellation."""
    inputs = [x.requires_grad_() for x in make((2, 7, 1, 1), 30, device=device)]
    y = attend(*inputs)
    torch.testing.assert_close(y, inputs[2])
    upstream = random_like(y)
    dq, dk, dv = torch.autograd.grad(y, inputs, upstream)
    torch.testing.assert_close(dv, upstream)
    torch.testing.assert_close(dq, torch.zeros_like(dq), rtol=0, atol=1e-5)
    torch.testing.assert_close(dk, torch.zeros_like(dk), rtol=0, atol=1e-5)


@each_value_once(
    size=[(4, 3), (1, 3), (3, 1), (1, 2), (2, 1)], layout=["contiguous", "channels_last"]
)
def test_gradcheck_of_lines(size, layout, device):
    inputs = make((2, 3, *size), 2, torch.float64, device, layout)
    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in inputs])


def test_the_log_sum_exp_has_no_gradient(device):
    inputs = [x.requires_grad_() for x in make((1, 2, 3, 4), 2, device=device)]
    output, lse = torch.ops.ctxops.criss_cross_attention(*inputs, 0.3)
    assert output.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("isa", _native.INSTRUCTION_SETS)
@pytest.mark.parametrize("size", [(1, 1), (16, 32), (35, 21), (7, 50)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_turn(isa, size, dtype, monkeypatch):
    """The columns of a map become rows, in whole vectors and what is left of them, and back."""
    if not hasattr(_native.extension, isa):
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(_native, "cpu", getattr(_native.extension, isa))
    height, width = size
    whole = torch.randn(3, height, width + 2, dtype=dtype)
    planes = whole[..., 1:-1]
    turned = planes.new_full((width, 3, height), torch.nan)
    op._turn(planes, turned.transpose(0, 1))
    assert torch.equal(turned, planes.permute(2, 0, 1))
    every_other = planes.new_empty(width, 3, 2 * height)[..., ::2]
    op._turn(planes, every_other.transpose(0, 1))
    assert torch.equal(every_other, turned)
    back = torch.zeros_like(whole)
    op._turn(turned.transpose(0, 1), back[..., 1:-1])
    assert torch.equal(back[..., 1:-1], planes)
    assert not back[..., [0, -1]].any()


@pytest.mark.parametrize(
    ("planes", "output", "text"),
    [
        (ONES[0].mT, ONES[0], "input must be (C, M, N) with unit stride along N"),
        (ONES[0], ONES[0], "output must be (C, N, M) with unit stride along M"),
        (ONES[0], torch.ones(4, 3, 5).mT, "output must be (C, N, M) with unit stride along M"),
        (ONES[0], torch.ones(4, 5, 3).double(), "in the input's dtype"),
        (ONES[0].half(), torch.ones(4, 5, 3).half(), "input must be float32 or float64"),
    ],
)
def test_turn_checks_what_it_is_handed(planes, output, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        _operator.launch("criss_cross_attention_turn", planes, input=planes, output=output)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_without_the_extension(layout, monkeypatch):
    monkeypatch.setattr(_native, "cpu", None)
    check(make((2, 8, 7, 5), 8, layout=layout))
