# SPDX-License-Identifier: Apache-2.0
import threading
from functools import partial

import pytest
import torch

import ctxops
from ctxops.ops.nonlocal_attention.reference import reference
from numerics import DTYPES, LAYOUTS, check_operator

# query (B, C, H, W), key's H2, W2, value's Cv
CASES = [
    ((1, 1, 1, 1), (1, 1), 1),
    ((2, 8, 7, 5), (7, 5), 8),
    ((1, 16, 1, 23), (5, 3), 3),
    ((2, 5, 19, 1), (4, 9), 40),
    ((1, 33, 13, 11), (1, 17), 65),
    ((2, 1, 3, 5), (4, 3), 1),
]


def make(shape, size, value_channels, dtype=torch.float32, device="cpu"):
    batch, channels, _, _ = shape
    shapes = (shape, (batch, channels, *size), (batch, value_channels, *size))
    return [torch.randn(s, dtype=dtype, device=device) for s in shapes]


def attend(query, key, value, scale=0.3):
    return ctxops.nonlocal_attention(query, key, value, scale=scale)


def check(inputs):
    check_operator(attend, partial(reference, scale=0.3), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, layout, dtype, device):
    check([LAYOUTS[layout](x) for x in make(*case, dtype, device)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, device):
    check([LAYOUTS[layout](x) for x in make((2, 6, 7, 8), (3, 5), 4, device=device)])


def test_threads_leave_torchs_backends_as_they_were():
    inputs = make((1, 4, 3, 3), (3, 3), 4)
    before = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()

    def work():
        for _ in range(100):
            attend(*inputs)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    assert after == before


@pytest.mark.cuda
@pytest.mark.parametrize(("channels", "value_channels"), [(64, 600), (300, 300), (300, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_heads(channels, value_channels, dtype):
    check(make((1, channels, 9, 7), (5, 11), value_channels, dtype, "cuda"))


@pytest.mark.parametrize("scale", [0.0, -1.5, 1.0, None], ids=str)
def test_scales(scale, device):
    query, key, value = make((2, 9, 4, 5), (3, 3), 4, device=device)
    expected = reference(query, key, value, 9**-0.5 if scale is None else scale)
    torch.testing.assert_close(attend(query, key, value, scale=scale), expected)


def test_batch_of_zero(device):
    assert attend(*make((0, 4, 3, 3), (2, 2), 5, device=device)).shape == (0, 5, 3, 3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_memory_format(layout, device):
    query, key, value = make((2, 6, 7, 8), (3, 5), 4, device=device)
    y = attend(LAYOUTS[layout](query), key, value)
    assert y.stride() == LAYOUTS[layout](y).stride()


def test_gradcheck():
    inputs = [x.requires_grad_() for x in make((2, 3, 3, 2), (2, 2), 4, torch.float64)]
    assert torch.autograd.gradcheck(attend, inputs)


def test_compiles_once_for_all_sizes(device):
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((12, 10), (17, 9), (31, 45)):
            inputs = make((2, 8, *size), (size[1], size[0]), 5, device=device)
            torch.testing.assert_close(compiled(*inputs), attend(*inputs))


def test_autocast_casts_down(device):
    inputs = make((2, 8, 7, 8), (3, 4), 8, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = attend(*inputs)
    torch.testing.assert_close(y, attend(*(x.bfloat16() for x in inputs)))


def replaced(index, tensor):
    inputs = make((2, 4, 3, 3), (2, 5), 6)
    inputs[index] = tensor
    return inputs


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (replaced(0, torch.ones(4, 3, 3)), ValueError, r"query must have shape \(B, C, H, W\)"),
        (replaced(1, torch.ones(2, 3, 2, 5)), ValueError, r"key .* \(2, 4, any, any\), got"),
        (replaced(1, torch.ones(2, 4, 0, 5)), ValueError, "key must have C, H and W"),
        (replaced(2, torch.ones(2, 6, 5, 2)), ValueError, r"value .* \(2, any, 2, 5\), got"),
        (replaced(2, torch.ones(2, 6, 2, 5).double()), TypeError, "value must have the dtype"),
        (replaced(2, torch.ones(2, 6, 2, 5).bool()), TypeError, "value must be float32"),
        (replaced(1, torch.ones(2, 4, 2, 5, device="meta")), ValueError, "key must be on"),
    ],
    ids=lambda x: None,
)
def test_bad_input(inputs, error, message):
    with pytest.raises(error, match=message):
        attend(*inputs)


def test_derivatives_of_higher_order():
    inputs = [x.requires_grad_() for x in make((1, 2, 3, 2), (2, 2), 2, torch.float64)]
    grads = torch.autograd.grad(attend(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        grads[0].backward(torch.randn_like(grads[0]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs[0].detach(), inputs[0].detach())
        with pytest.raises(NotImplementedError, match="nonlocal_attention has no forward-mode"):
            attend(dual, *inputs[1:])
    with ctxops.use_reference():
        assert torch.autograd.gradgradcheck(attend, inputs)
