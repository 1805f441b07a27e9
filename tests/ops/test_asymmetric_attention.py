# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ctxops
from ctxops import _library
from ctxops.ops.asymmetric_attention import op
from ctxops.ops.asymmetric_attention.reference import reference
from numerics import DTYPES, LAYOUTS, check_operator, random_like

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


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, layout, dtype, bias, device):
    query, *others = make(*case, dtype, device, bias)
    check([LAYOUTS[layout](query), *others])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_queries(layout, device):
    query, *others = make((2, 6, 7, 8), 9, 5, device=device)
    check([LAYOUTS[layout](query), *others])


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
def test_many_blocks_give_the_same(layout, dtype, monkeypatch):
    inputs = make((2, 6, 17, 13), 9, 5, dtype)
    inputs[0] = LAYOUTS[layout](inputs[0])
    monkeypatch.setattr(op, "BLOCK_BYTES", 2000)
    assert len(list(op._blocks(17 * 13, 72))) > 5
    check(inputs)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 20, 12, 12))),
    anchors=st.integers(1, 40),
    value_channels=st.integers(1, 20),
    layout=st.sampled_from(list(LAYOUTS)),
)
def test_drawn_shapes(shape, anchors, value_channels, layout):
    torch.manual_seed(0)  # a failure is to be found again
    query, *others = make(shape, anchors, value_channels)
    check([LAYOUTS[layout](query), *others])


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


def test_batch_of_zero(device):
    inputs = [x.requires_grad_() for x in make((0, 4, 3, 3), 5, 2, device=device)]
    y = attend(*inputs)
    assert y.shape == (0, 2, 3, 3)
    y.backward(random_like(y))
    assert all(x.grad.shape == x.shape for x in inputs)


@pytest.mark.cuda
def test_many_tiny_maps():
    inputs = make((70_000, 4, 2, 2), 3, 4, device="cuda")
    torch.testing.assert_close(attend(*inputs), reference(*inputs, 0.3))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout, device):
    query, *others = make((2, 3, 4, 3), 4, 2, torch.float64, device)
    inputs = [x.requires_grad_() for x in (LAYOUTS[layout](query), *others)]
    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_opcheck(layout, bias, device):
    query, *others = make((2, 3, 4, 5), 6, 2, device=device, bias=bias)
    inputs = (LAYOUTS[layout](query), *others)
    forward = torch.ops.ctxops.asymmetric_attention.default
    leaves = tuple(None if x is None else x.clone().requires_grad_() for x in inputs)
    save = _library.uses_triton(query)
    torch.library.opcheck(forward, (*inputs, 0.3, save))
    torch.library.opcheck(forward, (*leaves, 0.3, save))
    output, lse = forward(*inputs, 0.3, save)
    backward = torch.ops.ctxops.asymmetric_attention_bwd.default
    torch.library.opcheck(backward, (random_like(output), *inputs, lse, 0.3))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_format_of_output_and_gradient(layout, device):
    query, *others = make((2, 6, 7, 8), 9, 5, device=device)
    query = LAYOUTS[layout](query).requires_grad_()
    y = attend(query, *others)
    assert torch.equal(y, LAYOUTS[layout](y))
    assert y.stride() == LAYOUTS[layout](y).stride()
    y.backward(random_like(y).contiguous())
    assert query.grad.stride() == query.stride()


def test_compiles_once_for_all_sizes(device):
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((12, 10), (17, 9), (31, 45)):
            inputs = [x.requires_grad_() for x in make((2, 6, *size), 9, 5, device=device)]
            y, expected = compiled(*inputs), attend(*inputs)
            torch.testing.assert_close(y, expected)
            grads = (torch.autograd.grad(f, inputs, expected.detach()) for f in (y, expected))
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b)


def test_autocast_casts_down(device):
    inputs = [x.requires_grad_() for x in make((2, 6, 7, 8), 9, 5, device=device)]
    with torch.autocast(device, dtype=torch.bfloat16):
        y = attend(*inputs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, attend(*(x.bfloat16() for x in inputs)))
    y.backward(random_like(y))
    assert all(x.grad.dtype == torch.float32 for x in inputs)


def test_autocast_leaves_float64_alone(device):
    inputs = make((2, 6, 7, 8), 9, 5, torch.float64, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(attend(*inputs), reference(*inputs, 0.3))


def test_transforms_of_torch_func():
    inputs = [x.requires_grad_() for x in make((2, 3, 4, 3), 4, 2, torch.float64)]
    expected = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    function = torch.func.grad(lambda *x: attend(*x).square().sum(), argnums=(0, 1, 2, 3))
    for a, b in zip(function(*(x.detach() for x in inputs)), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [torch.tensor(0.5), "0.5", [1.0], 1j, True], ids=str)
def test_a_scale_that_is_no_number(scale):
    with pytest.raises(TypeError, match="scale must be a number or None, got"):
        attend(*make((2, 4, 3, 3), 5, 6), scale=scale)


def test_deterministic(device):
    inputs = [x.requires_grad_() for x in make((2, 33, 37, 29), 110, 65, device=device)]

    def run():
        y = attend(*inputs)
        return y, *torch.autograd.grad(y, inputs, y.detach())

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def replaced(index, tensor):
    inputs = make((2, 4, 3, 3), 5, 6)
    inputs[index] = tensor
    return inputs


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (replaced(0, torch.ones(2, 4, 9)), ValueError, r"query must have shape \(B, C, H, W\)"),
        (replaced(0, torch.ones(2, 4, 0, 3)), ValueError, "query must have C, H and W"),
        (replaced(0, torch.ones(2, 4, 3, 3).int()), TypeError, "query must be float32.*int32"),
        (replaced(1, None), TypeError, "key must be a torch.Tensor, got NoneType"),
        (replaced(1, torch.ones(2, 3, 5)), ValueError, r"key .* \(2, 4, any\), got \(2, 3, 5\)"),
        (replaced(1, torch.ones(1, 4, 5)), ValueError, r"key .* \(2, 4, any\), got \(1, 4, 5\)"),
        (replaced(1, torch.ones(2, 4, 0)), ValueError, "key must have at least one anchor"),
        (replaced(1, torch.ones(2, 4, 5).half()), TypeError, "key must have the dtype of query"),
        (replaced(2, torch.ones(2, 6, 4)), ValueError, r"value .* \(2, any, 5\), got \(2, 6, 4\)"),
        (replaced(2, torch.ones(2, 0, 5)), ValueError, "value must have at least one channel"),
        (replaced(2, torch.ones(2, 6, 5, device="meta")), ValueError, "value must be on .* meta"),
        (replaced(3, torch.ones(5)), ValueError, r"bias .* \(2, 5\), got \(5,\)"),
        (replaced(3, torch.ones(2, 5).double()), TypeError, "bias must have the dtype of query"),
    ],
    ids=lambda x: None,
)
def test_bad_input(inputs, error, message):
    with pytest.raises(error, match=message):
        attend(*inputs)


def test_second_derivatives(device):
    inputs = [x.requires_grad_() for x in make((1, 2, 3, 2), 3, 2, torch.float64, device)]
    grads = torch.autograd.grad(attend(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"asymmetric_attention.*use_reference"):
        grads[0].backward(random_like(grads[0]))
    with ctxops.use_reference():
        assert torch.autograd.gradgradcheck(attend, inputs)


def test_forward_mode_raises():
    query, key, value, _ = make((1, 2, 3, 2), 3, 2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(key, key)
        with pytest.raises(NotImplementedError, match="asymmetric_attention has no forward-mode"):
            attend(query, dual, value)
