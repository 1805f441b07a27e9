# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF012 (nobody writes to what a contract declares)
from functools import partial

import pytest
import torch
from hypothesis import strategies as st

import ctxops
from ctxops import _operator
from ctxops.ops.asymmetric_attention import op
from ctxops.ops.asymmetric_attention.reference import reference
from modules import flop_counter
from numerics import LAYOUTS, check_operator, random_like
from ops.contract import OperatorContract

# (B, C, H, W), S, Cv
CASES = [
    ((1, 1, 1, 1), 1, 1),
    ((2, 8, 7, 5), 11, 8),
    ((1, 16, 1, 23), 110, 3),
    ((1, 5, 19, 1), 7, 40),
    ((3, 33, 13, 11), 50, 65),
]


def make(shape, anchors, value_channels, dtype=torch.float32, device="cpu", bias=True):
    batch, channels, _, _ = shape
    options = {"dtype": dtype, "device": device}
    return [
        torch.randn(shape, **options),
        torch.randn(batch, channels, anchors, **options),
        torch.randn(batch, value_channels, anchors, **options),
        torch.randn(batch, anchors, **options) if bias else None,
    ]


def attend(query, key, value, bias=None, scale=0.3):
    return ctxops.asymmetric_attention(query, key, value, bias=bias, scale=scale)


def check(inputs, scale=0.3):
    check_operator(partial(attend, scale=scale), partial(reference, scale=scale), inputs)


SCALE = (TypeError, "scale must be a number or None, got")


class TestAsymmetricAttention(OperatorContract):
    name = "asymmetric_attention"
    cases = CASES
    modes = {"bias": True, "no_bias": False}
    native = False
    autocast = "down"
    drawn = st.tuples(
        st.tuples(
            st.tuples(*(st.integers(1, n) for n in (3, 20, 12, 12))),
            st.integers(1, 40),
            st.integers(1, 20),
        ),
        st.booleans(),
    )
    valid = dict(zip(("query", "key", "value", "bias"), make((2, 4, 3, 3), 5, 6), strict=True))
    # 18 positions, 5 anchors, 4 and 6 channels; backward twice the 4 and the 6. Triton makes the
    # logits anew, but not in float64.
    products = (
        (
            {name: x.double() for name, x in valid.items()},
            {"asymmetric_attention": 1800, "asymmetric_attention_backward": 3600},
        ),
    )
    errors = (
        ({"query": torch.ones(2, 4, 9)}, ValueError, r"query must have shape \(B, C, H, W\)"),
        ({"query": torch.ones(2, 4, 0, 3)}, ValueError, "query must have C, H and W"),
        ({"query": torch.ones(2, 4, 3, 3).int()}, TypeError, "query must be float32.*int32"),
        ({"key": None}, TypeError, "key must be a torch.Tensor, got NoneType"),
        ({"key": torch.ones(2, 3, 5)}, ValueError, r"key .* \(2, 4, any\), got \(2, 3, 5\)"),
        ({"key": torch.ones(1, 4, 5)}, ValueError, r"key .* \(2, 4, any\), got \(1, 4, 5\)"),
        ({"key": torch.ones(2, 4, 0)}, ValueError, "key must have at least one anchor"),
        ({"key": torch.ones(2, 4, 5).half()}, TypeError, "key must have the dtype of query"),
        ({"value": torch.ones(2, 6, 4)}, ValueError, r"value .* \(2, any, 5\), got \(2, 6, 4\)"),
        ({"value": torch.ones(2, 0, 5)}, ValueError, "value must have at least one channel"),
        ({"value": torch.ones(2, 6, 5, device="meta")}, ValueError, "value must be on .* meta"),
        ({"bias": torch.ones(5)}, ValueError, r"bias .* \(2, 5\), got \(5,\)"),
        ({"bias": torch.ones(2, 5).double()}, TypeError, "bias must have the dtype of query"),
        *(({"scale": scale}, *SCALE) for scale in (torch.tensor(0.5), "0.5", [1.0], 1j, True)),
    )
    without = {"test_maps_of_different_layouts": "it takes one map"}

    def case(self, *shape):
        return shape, 9, 5

    def make(self, case, bias, **options):
        return make(*case, bias=bias, **options)

    def functions(self, case, bias):
        return attend, partial(reference, scale=0.3)

    def opchecks(self, inputs, case, bias):
        forward = "asymmetric_attention"
        save = _operator.uses_triton(inputs[0])
        leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
        yield forward, (*inputs, 0.3, save)
        yield forward, (*leaves, 0.3, save)
        output, lse = torch.ops.ctxops.asymmetric_attention(*inputs, 0.3, save)
        yield "asymmetric_attention_backward", (random_like(output), *inputs, lse, 0.3)


def test_strided_anchors(device):
    query, key, value, bias = make((2, 6, 7, 8), 9, 5, device=device)
    key = key.transpose(1, 2).contiguous().transpose(1, 2)
    check([query, key, value.repeat(1, 2, 1)[:, ::2], bias[:1].expand(2, -1)])


@pytest.mark.parametrize("scale", [0.0, -1.5, 1.0, None], ids=str)
def test_scales(scale, device):
    query, key, value, _ = make((2, 9, 4, 5), 6, 3, torch.float64, device)
    expected = reference(query, key, value, None, 9**-0.5 if scale is None else scale)
    torch.testing.assert_close(attend(query, key, value, scale=scale), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [("BLOCK_BYTES", 3000), ("BLOCK_POSITIONS", 40)], ids=str)
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "anew"])
def test_many_blocks_give_the_same(limit, layout, dtype, keeps, monkeypatch):
    inputs = make((2, 6, 17, 13), 9, 5, dtype)
    inputs[0] = LAYOUTS[layout](inputs[0])
    monkeypatch.setattr(op, *limit)
    if not keeps:
        monkeypatch.setattr(op, "KEPT_BYTES", 0)
    kept = op._allocate(*inputs, 1.0, save=True)[1]
    assert kept.shape == ((2, 17 * 13, 16) if keeps else (0,))
    anchors = op._Anchors.of(*(x[0] for x in inputs[1:]), 1.0, torch.float32)
    assert len(list(op._blocks(17 * 13, anchors, others=0, kept=None))) > 5
    check(inputs)


@pytest.mark.parametrize(
    ("device", "limit", "products"),
    [
        ("cpu", 4 * 12 * 16, 2 + 4),
        ("cpu", 4 * 12 * 16 - 1, 2 + 5),
        pytest.param("cuda", 4 * 12 * 16, 2 + 5, marks=pytest.mark.cuda),
    ],
)
def test_products_of_weights_that_are_kept_or_not(device, limit, products, monkeypatch):
    monkeypatch.setattr(op, "KEPT_BYTES", limit)
    query, key, value, _ = make((1, 4, 3, 4), 5, 4, device=device, bias=False)
    with flop_counter() as counter:
        output = attend(query.requires_grad_(), key, value)
        output.backward(torch.randn_like(output))
    assert counter.get_total_flops() == products * 2 * 12 * 5 * 4


def test_logits_up_to_the_range_of_half_precision(device):
    query, key, value, _ = make((1, 8, 6, 6), 20, 4, torch.float16, device, bias=False)
    inputs = [query * 100, key * 100, value]
    assert reference(*inputs, None, 1.0).isnan().any()
    expected = reference(*(x.double() for x in inputs), None, 1.0).half()
    torch.testing.assert_close(attend(*inputs, scale=1.0), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_values_that_are_not_finite(which, value, device):
    inputs = make((2, 4, 3, 3), 5, 4, device=device, bias=False)
    inputs[which].view(-1)[0] = value
    torch.testing.assert_close(attend(*inputs), reference(*inputs, 0.3), equal_nan=True)


def test_a_bias_of_minus_infinity_takes_an_anchor_out(device):
    query, key, value, bias = make((2, 4, 3, 3), 5, 4, device=device)
    bias[:, 2] = -torch.inf
    kept = [0, 1, 3, 4]
    expected = attend(query, key[..., kept], value[..., kept], bias[:, kept])
    torch.testing.assert_close(attend(query, key, value, bias), expected)


@pytest.mark.cuda
def test_many_tiny_maps():
    inputs = make((70_000, 4, 2, 2), 3, 4, device="cuda")
    torch.testing.assert_close(attend(*inputs), reference(*inputs, 0.3))
