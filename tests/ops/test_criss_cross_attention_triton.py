# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of criss-cross attention, on a GPU or in the interpreter."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

import triton_interpreter
from ctxops import _operator
from ctxops.ops.criss_cross_attention import op, triton_kernels
from ctxops.ops.criss_cross_attention.reference import reference
from numerics import LAYOUTS, assert_close

slow = pytest.mark.slow
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# numpy, inside the interpreter, warns where the tests want infinities and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

if INTERPRETED:
    triton_interpreter.widen_bfloat16_dot()
    triton_interpreter.index_with_scalars()
elif not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)


def run_kernels(inputs, scale, grad):
    """Both passes, into outputs full of NaN."""
    query = inputs[0]
    output, *gradients = (torch.full_like(x, float("nan")) for x in (grad, *inputs))
    lse = query.new_full((len(query), *query.shape[2:]), float("nan"), dtype=torch.float32)
    triton_kernels.forward(*inputs, scale, output, lse)
    triton_kernels.backward(grad, *inputs, scale, output, lse, *gradients)
    return [output, *gradients]


def plain(inputs, scale, grad, dtype):
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    output = reference(*inputs, scale)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad.to(dtype))]


def draw(B, C, Cv, H, W, dtype=torch.float32, layout="channels_last"):
    """query, key, value and an upstream gradient."""
    maps = [torch.randn(B, c, H, W).to(DEVICE, dtype) for c in (C, C, Cv, Cv)]
    *inputs, grad = [LAYOUTS[layout](x) for x in maps]
    return inputs, grad


def check(inputs, scale, grad):
    actual = run_kernels(inputs, scale, grad)
    exact = plain(inputs, scale, grad, torch.float64)
    same = plain(inputs, scale, grad, inputs[0].dtype)
    for name, a, s, e in zip(("output", "query", "key", "value"), actual, same, exact, strict=True):
        assert_close(a, s, e, name)


@pytest.fixture
def _small_tiles(monkeypatch):
    """Several tiles of everything on maps that the interpreter can afford."""
    tiles = triton_kernels.Tiles(16, 16, 16, 16, 4, 2)
    monkeypatch.setattr(triton_kernels, "_TILES", dict.fromkeys(triton_kernels._TILES, tiles))


SIZES = [  # B, C, Cv, H, W
    pytest.param((2, 4, 5, 3, 5), id="one-tile"),
    pytest.param((1, 16, 8, 1, 18), id="one-row", marks=slow),
    pytest.param((1, 8, 20, 18, 1), id="one-column", marks=slow),
    pytest.param((2, 20, 37, 2, 3), id="channel-tiles", marks=slow),
    pytest.param((1, 5, 3, 2, 19), id="position-tiles-of-rows", marks=slow),
    pytest.param((1, 5, 3, 19, 2), id="position-tiles-of-columns"),
    pytest.param((1, 5, 3, 35, 2), id="three-position-tiles-of-columns", marks=slow),
]


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients(sizes):
    inputs, grad = draw(*sizes)
    check(inputs, sizes[1] ** -0.5, grad)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        pytest.param(torch.float32, "contiguous", marks=slow),
        pytest.param(torch.float32, "channels_last", marks=slow),
        (torch.float16, "contiguous"),
        pytest.param(torch.float16, "channels_last", marks=slow),
        pytest.param(torch.bfloat16, "contiguous", marks=slow),
        (torch.bfloat16, "channels_last"),
    ],
    ids=str,
)
def test_dtypes(dtype, layout):
    inputs, grad = draw(1, 20, 37, 4, 5, dtype, layout)
    check(inputs, 0.2, grad)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(x, marks=() if x in ("every_other_column", "transposed") else slow)
        for x in LAYOUTS
    ],
)
def test_strided_maps(layout):
    inputs, grad = draw(2, 4, 5, 2, 3, layout=layout)
    check(inputs, -0.7, grad)


def test_more_value_channels_than_any_tile():
    inputs, grad = draw(1, 4, 261, 2, 2, torch.float16)
    check(inputs, 0.5, grad)


def test_one_position():
    """It attends to itself: the gradients of query and key are zero, by cancellation."""
    inputs, grad = draw(1, 3, 5, 1, 1)
    output, dq, dk, dv = run_kernels(inputs, 0.5, grad)
    torch.testing.assert_close(output, inputs[2])
    torch.testing.assert_close(dv, grad)
    torch.testing.assert_close(dq, torch.zeros_like(dq), rtol=0, atol=1e-5)
    torch.testing.assert_close(dk, torch.zeros_like(dk), rtol=0, atol=1e-5)


def test_a_zero_scale_averages():
    inputs, grad = draw(1, 4, 6, 3, 2)
    inputs = [x.double() for x in inputs]
    output, dq, dk, dv = run_kernels([x.float() for x in inputs], 0.0, grad)
    value = inputs[2]
    expected = (value.sum(2, keepdim=True) + value.sum(3, keepdim=True) - value) / 4
    torch.testing.assert_close(output, expected.float())
    expected = (grad.sum(2, keepdim=True) + grad.sum(3, keepdim=True) - grad) / 4
    torch.testing.assert_close(dv, expected)
    assert not dq.any()
    assert not dk.any()


@pytest.mark.parametrize(
    ("where", "number"),
    [
        pytest.param("query", float("nan"), marks=slow),
        pytest.param("query", float("inf"), marks=slow),
        pytest.param("query", -float("inf"), marks=slow),
        pytest.param("key", float("nan"), marks=slow),
        ("key", float("inf")),
        pytest.param("key", -float("inf"), marks=slow),
        pytest.param("value", float("nan"), marks=slow),
        pytest.param("value", float("inf"), marks=slow),
        ("value", -float("inf")),
        ("grad", float("nan")),
        pytest.param("grad", float("inf"), marks=slow),
        pytest.param("grad", -float("inf"), marks=slow),
    ],
)
def test_nan_and_inf_propagate_as_in_torch(where, number):
    inputs, grad = draw(2, 4, 3, 2, 3)
    maps = dict(zip(("query", "key", "value"), inputs, strict=True), grad=grad)
    maps[where][1, 2, 1, 2] = number
    actual, expected = run_kernels(inputs, 0.5, grad), plain(inputs, 0.5, grad, torch.float32)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5, equal_nan=True)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        # what one infinity makes NaN differs with the order of products; the other image is clean
        assert torch.equal(a[1].isfinite().all(), e[1].isfinite().all())
        torch.testing.assert_close(a[0], e[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "where"),
    [
        ((2, 3), "column"),
        pytest.param((2, 3), "row", marks=slow),
        pytest.param((2, 3), "map", marks=slow),
        pytest.param((1, 3), "column", marks=slow),
        ((1, 3), "row"),
        pytest.param((1, 3), "map", marks=slow),
        ((2, 1), "column"),
        pytest.param((2, 1), "row", marks=slow),
        pytest.param((2, 1), "map", marks=slow),
    ],
    ids=str,
)
def test_lines_of_which_every_logit_is_minus_infinity(size, where):
    """The other line decides; NaN only where every logit of the cross is -inf."""
    (query, key, value), grad = draw(2, 2, 3, *size)
    lines = {"column": key[1, ..., 0], "row": key[1, :, 0], "map": key[1]}
    lines[where].fill_(-float("inf"))
    inputs = [query.abs(), key, value]
    actual, expected = run_kernels(inputs, 0.5, grad), plain(inputs, 0.5, grad, torch.float32)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_logits_far_apart():
    """The column's weight vanishes beside the row's, and the other way round."""
    inputs, grad = draw(1, 4, 6, 4, 5)
    inputs[1][:, :, ::2] *= 30
    largest = torch.einsum("bchw,bcij->bhwij", *inputs[:2]).abs().max()
    actual, exact = run_kernels(inputs, 1.0, grad), plain(inputs, 1.0, grad, torch.float64)
    assert_close(actual[0], plain(inputs, 1.0, grad, torch.float32)[0], exact[0])
    for a, e in zip(actual[1:], exact[1:], strict=True):
        # The log-sum-exp is rounded, and exp makes its absolute error a relative one.
        bound = 4 * torch.finfo(a.dtype).eps * largest * e.abs().max()
        assert (a - e).abs().max() <= bound


def test_logits_all_very_negative():
    """Beyond a ragged end logits are 0 and exp(0 - lse) is inf, which must not meet the zeros."""
    inputs, grad = draw(1, 1, 3, 3, 5)
    inputs[0].fill_(20)
    inputs[1].mul_(0.01).sub_(20)
    actual, exact = run_kernels(inputs, 1.0, grad), plain(inputs, 1.0, grad, torch.float64)
    for a, e in zip(actual, exact, strict=True):
        # the log-sum-exp, 400, is rounded; gradients of query and key are 20 times what it errs
        torch.testing.assert_close(a, e.float(), rtol=1e-3, atol=2e-3)


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 64, 512, 97, 97), (2, 70, 261, 9, 400)], ids=str)
def test_full_sizes(sizes, dtype):
    inputs, grad = draw(*sizes, dtype)
    check(inputs, 0.125, grad)


@pytest.mark.slow  # the interpreter has one order; a GPU may have several
def test_same_bits_twice():
    inputs, grad = draw(1, 20, 37, 3, 4, torch.bfloat16)
    first, second = (run_kernels(inputs, 0.2, grad) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_nothing_to_attend_from():
    inputs, grad = draw(0, 4, 6, 3, 5)
    assert all(x.numel() == 0 for x in run_kernels(inputs, 1.0, grad))


def test_operator_and_kernels_agree():
    """What autograd keeps of the blocks on the CPU serves these kernels."""
    inputs, grad = draw(1, 6, 10, 2, 3)
    leaves = [x.cpu().requires_grad_() for x in inputs]
    output, lse = torch.ops.ctxops.criss_cross_attention(*leaves, 0.3)
    mine, state = torch.empty_like(grad), torch.empty_like(lse, device=DEVICE)
    triton_kernels.forward(*inputs, 0.3, mine, state)
    torch.testing.assert_close(mine.cpu(), output)
    torch.testing.assert_close(state.cpu(), lse)


def test_operator_launches_them_on_maps_of_a_gpu(monkeypatch):
    """The dispatch inside the operator, on the interpreter's tensors."""
    if not INTERPRETED:
        pytest.skip("on a GPU every test of the operator shows that")
    monkeypatch.setattr(_operator, "uses_triton", lambda query: True)
    calls = []
    for name in ("forward", "backward"):
        kernel = getattr(triton_kernels, name)
        monkeypatch.setattr(
            triton_kernels, name, lambda *a, _k=kernel, _n=name: (calls.append(_n), _k(*a))
        )
    inputs, grad = draw(2, 6, 10, 2, 3, layout="contiguous")
    leaves = [x.requires_grad_() for x in inputs]
    output = op.criss_cross_attention(*leaves, scale=0.3)
    expected = reference(*leaves, 0.3)
    torch.testing.assert_close(output, expected)
    for a, b in zip(
        torch.autograd.grad(output, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert calls == ["forward", "backward"]


def test_large_batches_fit_the_grid(monkeypatch):
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("forward", "delta", "backward"):
        monkeypatch.setattr(triton_kernels, f"criss_cross_attention_{name}_kernel", Recorder())
    inputs, grad = draw(35_000, 1, 1, 1, 2, torch.float16)
    run_kernels(inputs, 1.0, grad)
    assert grids[0] == (70_000, 1)
    assert all(max(grid[1:], default=1) <= 65_535 for grid in grids)


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_large_batches():
    inputs, grad = draw(70_000, 3, 5, 2, 3)
    check(inputs, 1.0, grad)


def test_tf32_only_where_torch_allows_it():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        assert triton_kernels.dot_precision(torch.float32) == "tf32"
        assert triton_kernels.dot_precision(torch.bfloat16) == "ieee"
        matmul.allow_tf32 = False
        assert triton_kernels.dot_precision(torch.float32) == "ieee"
    finally:
        matmul.allow_tf32 = before
