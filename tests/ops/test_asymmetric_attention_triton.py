# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of asymmetric attention, on a GPU or in the interpreter."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")

import triton_interpreter
from covering import each_value_once, product
from ctxops.ops.asymmetric_attention import triton_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

# numpy, inside the interpreter, warns where the tests want infinities and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

if INTERPRETED:
    triton_interpreter.widen_bfloat16_dot()
    triton_interpreter.index_with_scalars()
elif not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)


def attention(query, key, value, bias, scale):
    """The definition in plain torch, in the dtype of its inputs."""
    logits = scale * torch.einsum("bchw,bcs->bhws", query, key)
    if bias is not None:
        logits = logits + bias[:, None, None]
    output = torch.einsum("bhws,bvs->bvhw", logits.softmax(-1), value)
    return output, logits.logsumexp(-1).flatten(1)


def attention_and_gradients(inputs, scale, grad, dtype):
    inputs = [None if x is None else x.to(dtype).requires_grad_() for x in inputs]
    output, lse = attention(*inputs, scale)
    wanted = [x for x in inputs if x is not None]
    gradients = torch.autograd.grad(output, wanted, grad.to(dtype))
    return [output.detach(), lse.detach(), *gradients]


def run_kernels(inputs, scale, grad):
    """Both passes, into outputs full of NaN."""

    def poison(x):
        return None if x is None else torch.full_like(x, float("nan"))

    query = inputs[0]
    output, gradients = poison(grad), [poison(x) for x in inputs]
    lse = query.new_full((query.shape[0], query[:1, 0].numel()), float("nan"), dtype=torch.float32)
    triton_kernels.forward(*inputs, scale, output, lse)
    triton_kernels.backward(grad, *inputs, scale, lse, *gradients)
    return [output, lse, *(x for x in gradients if x is not None)]


def draw(B, C, Cv, H, W, S, dtype=torch.float32, layout="nchw", bias=True):
    """query, key, value, bias and an upstream gradient."""
    generator = torch.Generator().manual_seed(B + C + Cv + H + W + S)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    maps = [normal(B, c, H, W).contiguous(memory_format=LAYOUTS[layout]) for c in (C, Cv)]
    inputs = [maps[0], normal(B, C, S), normal(B, Cv, S), normal(B, S) if bias else None]
    return inputs, maps[1]


def assert_as_exact_as_torch(actual, exact, rounded):
    """Four times the error of plain torch in the same dtype, and the noise of four roundings."""
    eps = torch.finfo(actual.dtype).eps
    for size in (torch.Tensor.norm, lambda x: x.abs().max()):
        # a single anchor has gradients that are zero by cancellation of terms of this order
        scale = size(exact) if exact.any() else 64.0
        bound = 4 * size(rounded.double() - exact) + 4 * eps * scale
        error = size(actual.double() - exact)
        assert error <= bound, f"error {error:.2e}, bound {bound:.2e}"


def check(inputs, scale, grad):
    dtype = inputs[0].dtype
    actual = run_kernels(inputs, scale, grad)
    exact = attention_and_gradients(inputs, scale, grad, torch.float64)
    rounded = attention_and_gradients(inputs, scale, grad, dtype)
    rounded[1] = attention_and_gradients(inputs, scale, grad, torch.float32)[1]  # lse is float32
    for a, e, r in zip(actual, exact, rounded, strict=True):
        assert_as_exact_as_torch(a, e, r)


SIZES = {  # B, C, Cv, H, W, S
    "one-anchor": (3, 16, 130, 1, 67, 1),
    "channel-tails": (2, 37, 70, 5, 17, 7),
    "one-tile": (2, 70, 257, 9, 15, 110),
    "one-wide-tile-one-channel": (1, 1, 1, 13, 11, 200),
    "many-tiles": (2, 20, 140, 7, 11, 300),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@each_value_once(sizes=SIZES, dtype=DTYPES, layout=list(LAYOUTS))
def test_values_and_gradients(sizes, dtype, layout):
    inputs, grad = draw(*sizes, dtype, layout)
    check(inputs, sizes[1] ** -0.5, grad)


@pytest.mark.parametrize("S", [110, 300])
def test_without_bias(S):
    inputs, grad = draw(2, 16, 24, 5, 6, S, bias=False)
    check(inputs, 0.3, grad)


@pytest.mark.parametrize("scale", [0.0, -1.5])
@pytest.mark.parametrize("S", [9, 260])
def test_any_scale(scale, S):
    inputs, grad = draw(1, 5, 6, 3, 7, S)
    check(inputs, scale, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("S", [110, 225])
def test_value_channels_split_over_programs(monkeypatch, S, dtype):
    monkeypatch.setattr(triton_kernels, "_device_limits", lambda index: (227 << 10, 132))
    inputs, grad = draw(1, 16, 200, 4, 9, S, dtype)
    check(inputs, 0.25, grad)


@product(
    positions={"part-of-item": 64, "two-items": 2 * 7 * 19, "odd": 2 * 7 * 19 + 1},
    S=[20, 150],
    layout=list(LAYOUTS),
)
def test_backward_in_blocks(monkeypatch, positions, S, layout):
    SP = 32 if S == 20 else 256
    monkeypatch.setattr(triton_kernels, "WORKSPACE_BYTES", 2 * 4 * SP * (positions + 63))
    inputs, grad = draw(3, 18, 12, 7, 19, S, layout=layout)
    check(inputs, 0.3, grad)


def test_keys_and_values_with_any_strides():
    inputs, grad = draw(2, 16, 24, 5, 6, 32)
    inputs[1:3] = [x.mT.contiguous().mT for x in inputs[1:3]]
    check(inputs, 0.3, grad)


def assert_same_with_nan(inputs, scale, grad):
    actual = run_kernels(inputs, scale, grad)
    expected = attention_and_gradients(inputs, scale, grad, torch.float32)
    # an infinite logit makes its whole row of P NaN; so does a NaN as log-sum-exp
    expected[1][expected[1] == float("inf")] = float("nan")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5, equal_nan=True)


@product(
    where=["query", "key", "value", "grad"],
    number=[float("nan"), float("inf"), -float("inf")],
    S=[30, 300],
)
def test_nan_and_inf_propagate_as_in_torch(where, number, S):
    inputs, grad = draw(2, 8, 6, 3, 5, S)
    x = dict(zip(("query", "key", "value", "bias"), inputs, strict=True), grad=grad)[where]
    x[(1, 3, 1, 2)[: x.ndim]] = number
    assert_same_with_nan(inputs, 0.5, grad)


@pytest.mark.parametrize("S", [30, 300])
@pytest.mark.parametrize("closed", ["first", "all"])
def test_anchors_closed_by_the_bias(closed, S):
    inputs, grad = draw(2, 8, 6, 3, 5, S)
    inputs[3][0, : S if closed == "all" else S - 10] = -float("inf")
    assert_same_with_nan(inputs, 0.5, grad)


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 4, 0, 5)], ids=["no-item", "no-position"])
def test_nothing_to_attend_from(shape):
    B, C, H, W = shape
    inputs, grad = draw(B, C, 6, H, W, 7)
    output, _, grad_query, *gradients = run_kernels(inputs, 1.0, grad)
    assert output.numel() == grad_query.numel() == 0
    for x in gradients:
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.slow  # the interpreter has one order; a GPU may have several
def test_same_bits_twice():
    inputs, grad = draw(2, 37, 70, 9, 17, 110, torch.bfloat16)
    first, second = (run_kernels(inputs, 0.2, grad) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("S", [7, 300])
def test_same_output_without_lse(S):
    inputs, grad = draw(2, 8, 6, 3, 5, S)
    output = torch.full_like(grad, float("nan"))
    triton_kernels.forward(*inputs, 0.5, output, None)
    assert torch.equal(output, run_kernels(inputs, 0.5, grad)[0])


@pytest.mark.parametrize("S", [4, 130])
def test_large_batches_fit_the_grid(monkeypatch, S):
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    # as little shared memory as makes 130 anchors too many for one tile
    monkeypatch.setattr(triton_kernels, "_device_limits", lambda index: (99 << 10, 1))
    for name in ("forward", "forward_online", "backward"):
        monkeypatch.setattr(triton_kernels, f"asymmetric_attention_{name}_kernel", Recorder())
    inputs, grad = draw(1, 1, 1, 1, 1, S, torch.float16)
    *inputs, grad = (x.expand(70_000, *x.shape[1:]) for x in (*inputs, grad))
    run_kernels(inputs, 1.0, grad)
    assert grids[0] == (70_000, 1)
    assert all(max(grid[1:], default=1) <= 65_535 for grid in grids)


@pytest.mark.cuda
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_large_batches():
    inputs, grad = draw(70_000, 3, 5, 2, 3, 4)
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
