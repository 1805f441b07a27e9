# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF012 (nobody writes to what a contract declares)
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import ctxops
from ctxops.ops.pyramid_pool.reference import reference
from numerics import LAYOUTS, check_operator, random_like
from ops.contract import OperatorContract

SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 1, 17),
    (1, 5, 13, 1),
    (2, 16, 7, 11),
    (1, 70, 29, 31),
    (2, 300, 16, 24),
    (3, 2, 97, 33),
    (1, 2, 5, 600),
]
MODES = ["avg", "max"]


SIZES = (1, 3, 6, 8)
BAD_SIZES = [
    ((1, 0), ValueError, "must be in 1 ... 32768, got 0"),
    ((-2,), ValueError, "must be in 1 ... 32768, got -2"),
    ((40000,), ValueError, "must be in .* got 40000"),
    ((), ValueError, "must hold 1 to 32"),
    ((1,) * 33, ValueError, "must hold 1 to 32"),
    (6, TypeError, "must be a sequence .* got 6"),
    ({1, 2}, TypeError, "must be a sequence"),
    (None, TypeError, "must be a sequence .* got None"),
    ((1.5,), TypeError, "must hold integers, got 1.5"),
    (("3",), TypeError, "must hold integers, got '3'"),
]
BAD_MAPS = [
    ([1.0], TypeError, "must be a torch.Tensor, got list"),
    (torch.ones(1, 2, 3, 3).long(), TypeError, "must be float32.*int64"),
    (torch.ones(1, 2, 3, 3).cfloat(), TypeError, "must be .*complex64"),
    (torch.ones(1, 2, 3, 3).to_sparse(), TypeError, "must be a dense, strided tensor"),
    (torch.ones(2, 3, 3), ValueError, r"must have shape \(B, C, H, W\), got \(2, 3, 3\)"),
    (torch.ones(1, 0, 3, 3), ValueError, r"must have C, H and W.*\(1, 0, 3, 3\)"),
    (torch.ones(1, 2, 0, 3), ValueError, r"must have C, H and W.*\(1, 2, 0, 3\)"),
    (
        torch.empty(1).expand(1, 1, 2**16, 2**15),
        ValueError,
        "must have fewer than 2147483647 positions",
    ),
]


class TestPyramidPool(OperatorContract):
    name = "pyramid_pool"
    cases = [(shape, SIZES) for shape in SHAPES]
    modes = MODES
    drawn = st.tuples(
        st.tuples(
            st.tuples(*(st.integers(1, n) for n in (3, 20, 40, 40))),
            st.lists(st.integers(1, 45), min_size=1, max_size=5),
        ),
        st.sampled_from(MODES),
    )
    valid = {"input": torch.ones(1, 2, 3, 3)}
    products = [
        ({"mode": mode}, {"pyramid_pool": 0, "pyramid_pool_backward": 0}) for mode in ("avg", "max")
    ]
    errors = (
        *(({"input": x}, error, f"input {message}") for x, error, message in BAD_MAPS),
        *(({"output_sizes": n}, error, f"output_sizes {text}") for n, error, text in BAD_SIZES),
        ({"mode": "median"}, ValueError, "mode must be 'avg' or 'max', got 'median'"),
    )
    without = {
        "test_maps_of_different_layouts": "it takes one map",
        "test_the_first_map_decides_on_the_memory_format": "it gives no map",
    }

    def case(self, *shape):
        return shape, SIZES if shape[2] > 5 else (1, 3)

    def make(self, case, mode, **options):
        return [torch.randn(case[0], **options)]

    def functions(self, case, mode):
        options = {"output_sizes": case[1], "mode": mode}
        return partial(ctxops.pyramid_pool, **options), partial(reference, **options)

    def opchecks(self, inputs, case, mode):
        (x,) = inputs
        maximum, sizes = mode == "max", [1, 2]
        yield "pyramid_pool", (x, sizes, maximum, False)
        yield "pyramid_pool", (x.clone().requires_grad_(), sizes, maximum, maximum)
        y, argmax = torch.ops.ctxops.pyramid_pool(x, sizes, maximum, maximum)
        argmax = argmax if maximum else None
        channels_last = not x.is_contiguous()
        yield "pyramid_pool_backward", (random_like(y), argmax, sizes, *x.shape[2:], channels_last)


def check(x, sizes=SIZES, mode="avg"):
    pool, plain = (
        partial(f, output_sizes=sizes, mode=mode) for f in (ctxops.pyramid_pool, reference)
    )
    check_operator(pool, plain, [x])


def torch_pools(x, sizes, mode):
    pool = F.adaptive_avg_pool2d if mode == "avg" else F.adaptive_max_pool2d
    return torch.cat([pool(x, n).flatten(2) for n in sizes], dim=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_torchs_adaptive_pooling(shape, mode):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours, theirs = reference(x, (1, 3, 6, 8), mode), torch_pools(x, (1, 3, 6, 8), mode)
    torch.testing.assert_close(ours, theirs)
    upstream = random_like(ours)
    (a,), (b,) = torch.autograd.grad(ours, x, upstream), torch.autograd.grad(theirs, x, upstream)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sizes",
    [(1,), (7,), (2, 2), (6, 3, 1), (40,), (1, 50, 13), (150, 200), tuple(range(1, 33))],
    ids=str,
)
def test_grids(sizes, mode, device):
    check(torch.randn(1, 3, 31, 260, device=device), sizes, mode)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_thousands_of_bins_that_share_a_position(mode, device):
    for seed in range(20):
        torch.manual_seed(seed)
        check(torch.randn(1, 3, 1, 1, device=device), (1, 1, 1, 44, 45), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ties_go_to_the_first_maximum(layout, mode, device):
    x = torch.randint(-1, 2, (2, 5, 12, 9), device=device).float()
    check(LAYOUTS[layout](x), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_values_that_are_not_finite_stay_in_their_bins(value, layout, mode, device):
    x = torch.randn(1, 3, 24, 24, device=device)
    x[0, 1, 5, 7] = value
    output = ctxops.pyramid_pool(LAYOUTS[layout](x), mode=mode)
    expected = reference(x, (1, 3, 6, 8), mode)
    torch.testing.assert_close(output, expected, equal_nan=True)
    assert output[0, [0, 2]].isfinite().all()
    assert output[0, 1].isfinite().sum() >= 100


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_of_half_precision_do_not_overflow(layout, device):
    x = LAYOUTS[layout](torch.full((1, 2, 64, 64), 60000.0, dtype=torch.float16, device=device))
    assert torch.equal(ctxops.pyramid_pool(x), x[:, :, 0, :1].expand(1, 2, 110))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_half_precision_value_is_read_and_rounded_as_torch_does(layout, dtype, device):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    pairs = torch.stack([values, values[torch.randperm(2**16)]], dim=-1)
    x = LAYOUTS[layout](pairs[None, :, None, :].to(device))
    expected = x.float().mean(dim=3).to(dtype)
    torch.testing.assert_close(
        ctxops.pyramid_pool(x, (1,)), expected, rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(
        ctxops.pyramid_pool(x[..., :1], (1,)), x[..., 0], rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_of_large_cells_stay_exact(layout, dtype, device):
    x = torch.full((1, 2, 700, 1100), 0.1, dtype=dtype, device=device)
    output = ctxops.pyramid_pool(LAYOUTS[layout](x), (1, 2))
    torch.testing.assert_close(output, x[:, :, 0, :5], rtol=5e-7, atol=0)
    check(LAYOUTS[layout](torch.randn(1, 2, 400, 500, dtype=dtype, device=device)), (1,))


def test_more_ones_than_a_float_can_count():
    assert ctxops.pyramid_pool(torch.ones(1, 1, 4200, 4200), (1,)) == 1


def test_subnormal_halves_survive_flushing():
    try:
        assert torch.set_flush_denormal(True)
        assert ctxops.pyramid_pool(torch.full((1, 1, 1, 1), 6e-6).half(), (1,)) > 0
    finally:
        torch.set_flush_denormal(False)


def test_backward_of_maxima_on_a_grid_larger_than_the_map():
    x = torch.randn(1, 4, 2, 1, requires_grad=True)
    y = ctxops.pyramid_pool(x, (128,), mode="max")
    start = time.process_time()
    y.sum().backward()
    assert time.process_time() - start < 1
    assert x.grad.sum() == 4 * 128 * 128


@pytest.mark.parametrize("mode", MODES)
def test_many_tiny_maps(mode, device):
    x = torch.randn(70_000, 1, 2, 3, device=device)
    torch.testing.assert_close(
        ctxops.pyramid_pool(x, (1, 2), mode=mode), reference(x, (1, 2), mode)
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_of_what_vmap_returns(mode):
    pool = partial(ctxops.pyramid_pool, output_sizes=(1, 2), mode=mode)
    x = torch.randn(4, 2, 3, 5, 6, requires_grad=True)
    y = torch.vmap(pool)(x)
    torch.testing.assert_close(y, torch.stack([pool(each) for each in x]))
    assert y.requires_grad


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements():
    x = torch.zeros(1, 3, 27_000, 27_000, device="cuda", dtype=torch.float16)
    x[0, 2, -1, -1] = 8192
    x.requires_grad_()
    y = ctxops.pyramid_pool(x, (1, 8), mode="max")
    assert y[0, 2, 0] == 8192
    assert y[0, 2, -1] == 8192
    y[0, 2, -1].backward()
    assert x.grad[0, 2, -1, -1] == 1
