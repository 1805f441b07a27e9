# SPDX-License-Identifier: Apache-2.0
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ctxops
from ctxops import _native
from ctxops.ops.pyramid_pool.reference import reference
from numerics import DTYPES, LAYOUTS, check_operator, random_like

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


def check(x, sizes=(1, 3, 6, 8), mode="avg"):
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
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, layout, dtype, mode, device):
    check(LAYOUTS[layout](torch.randn(shape, device=device, dtype=dtype)), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, mode, device):
    check(LAYOUTS[layout](torch.randn(2, 20, 9, 14, device=device)), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("isa", _native.INSTRUCTION_SETS)
def test_every_instruction_set(isa, mode, monkeypatch):
    kernels = getattr(_native.extension, isa, None)
    if kernels is None:
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(_native, "cpu", kernels)
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last"):
            check(LAYOUTS[layout](torch.randn(2, 37, 19, 23, dtype=dtype)), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sizes",
    [(1,), (7,), (2, 2), (6, 3, 1), (40,), (1, 50, 13), (150, 200), tuple(range(1, 33))],
    ids=str,
)
def test_grids(sizes, mode, device):
    check(torch.randn(1, 3, 31, 260, device=device), sizes, mode)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 20, 40, 40))),
    sizes=st.lists(st.integers(1, 45), min_size=1, max_size=5),
    layout=st.sampled_from(list(LAYOUTS)),
    mode=st.sampled_from(MODES),
)
def test_drawn_shapes(shape, sizes, layout, mode):
    torch.manual_seed(0)  # a failure is to be found again
    check(LAYOUTS[layout](torch.randn(shape)), tuple(sizes), mode)


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
def test_batch_of_zero(mode, device):
    x = torch.randn(0, 3, 5, 7, device=device, requires_grad=True)
    y = ctxops.pyramid_pool(x, mode=mode)
    assert y.shape == (0, 3, 110)
    y.backward(y)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("mode", MODES)
def test_many_tiny_maps(mode, device):
    x = torch.randn(70_000, 1, 2, 3, device=device)
    torch.testing.assert_close(
        ctxops.pyramid_pool(x, (1, 2), mode=mode), reference(x, (1, 2), mode)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout, mode, device):
    x = LAYOUTS[layout](
        torch.randn(2, 3, 5, 4, dtype=torch.float64, device=device)
    ).requires_grad_()
    assert torch.autograd.gradcheck(
        partial(ctxops.pyramid_pool, output_sizes=(1, 2, 6), mode=mode), x
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_opcheck(layout, mode, device):
    x = LAYOUTS[layout](torch.randn(2, 3, 7, 9, device=device))
    maximum, sizes = mode == "max", [1, 2]
    forward = torch.ops.ctxops.pyramid_pool.default
    for input in (x, x.clone().requires_grad_()):
        torch.library.opcheck(forward, (input, sizes, maximum, maximum and input.requires_grad))
    y, argmax = forward(x, sizes, maximum, maximum)
    argmax = argmax if maximum else None
    arguments = (random_like(y), argmax, sizes, 7, 9, layout == "channels_last")
    torch.library.opcheck(torch.ops.ctxops.pyramid_pool_bwd.default, arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_has_the_memory_format_of_the_input(layout, device):
    x = LAYOUTS[layout](torch.randn(2, 3, 7, 9, device=device)).requires_grad_()
    y = ctxops.pyramid_pool(x)
    y.backward(random_like(y))
    assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("mode", MODES)
def test_compiles_once_for_all_sizes(mode, device):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def pool(x):
        return ctxops.pyramid_pool(x.relu(), mode=mode).sin()

    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((12, 10), (17, 9), (31, 45)):
            x = torch.randn(2, 3, *size, device=device, requires_grad=True)
            y = ctxops.pyramid_pool(x.relu(), mode=mode).sin()
            torch.testing.assert_close(pool(x), y)
            (a,), (b,) = (torch.autograd.grad(f, x, y.detach()) for f in (pool(x), y))
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_trains_after_an_export_without_gradients(mode):
    class Pool(torch.nn.Module):
        def forward(self, x):
            return ctxops.pyramid_pool(x, (1, 2), mode=mode)

    x = torch.randn(2, 3, 7, 5)
    exported = torch.export.export(Pool(), (x,)).module()
    x.requires_grad_()
    (a,), (b,) = (torch.autograd.grad((f(x) ** 2).sum(), x) for f in (exported, Pool()))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_transforms_of_torch_func(mode):
    pool = partial(ctxops.pyramid_pool, output_sizes=(1, 2), mode=mode)
    x = torch.randn(4, 2, 3, 5, 6, requires_grad=True)
    y = torch.vmap(pool)(x)
    torch.testing.assert_close(y, torch.stack([pool(each) for each in x]))
    assert y.requires_grad
    (expected,) = torch.autograd.grad((pool(x[0]) ** 2).sum(), x)
    gradient = torch.func.grad(lambda x: (pool(x) ** 2).sum())(x[0].detach())
    torch.testing.assert_close(gradient, expected[0])


def test_autocast_keeps_the_dtype(device):
    with torch.autocast(device, dtype=torch.bfloat16):
        assert ctxops.pyramid_pool(torch.randn(1, 2, 4, 4, device=device)).dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_deterministic(layout, mode, device):
    x = LAYOUTS[layout](torch.randn(2, 70, 33, 47, device=device)).requires_grad_()
    upstream = torch.randn(2, 70, 110, device=device)
    threads = torch.get_num_threads()

    def run():
        y = ctxops.pyramid_pool(x, mode=mode)
        return y, *torch.autograd.grad(y, x, upstream)

    first = run()
    try:
        for repetition in range(20):
            torch.set_num_threads(1 + repetition % 3)
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "input must be a torch.Tensor, got list"),
        ((torch.ones(1, 2, 3, 3, dtype=torch.int64),), TypeError, "input must be float32.*int64"),
        ((torch.ones(1, 2, 3, 3, dtype=torch.complex64),), TypeError, "input must be .*complex64"),
        (
            (torch.ones(2, 3, 3),),
            ValueError,
            r"input must have shape \(B, C, H, W\), got \(2, 3, 3\)",
        ),
        ((torch.ones(1, 0, 3, 3),), ValueError, r"input must have C, H and W.*\(1, 0, 3, 3\)"),
        ((torch.ones(1, 2, 0, 3),), ValueError, r"input must have C, H and W.*\(1, 2, 0, 3\)"),
        (
            (torch.ones(1, 2, 3, 3), (1, 0)),
            ValueError,
            "output_sizes must be in 1 ... 32768, got 0",
        ),
        (
            (torch.ones(1, 2, 3, 3), (-2,)),
            ValueError,
            "output_sizes must be in 1 ... 32768, got -2",
        ),
        ((torch.ones(1, 2, 3, 3), (40000,)), ValueError, "output_sizes must be in .* got 40000"),
        ((torch.ones(1, 2, 3, 3), ()), ValueError, "output_sizes must hold 1 to 32"),
        ((torch.ones(1, 2, 3, 3), (1,) * 33), ValueError, "output_sizes must hold 1 to 32"),
        ((torch.ones(1, 2, 3, 3), 6), TypeError, "output_sizes must be a sequence .* got 6"),
        ((torch.ones(1, 2, 3, 3), {1, 2}), TypeError, "output_sizes must be a sequence"),
        ((torch.ones(1, 2, 3, 3), None), TypeError, "output_sizes must be a sequence .* got None"),
        ((torch.ones(1, 2, 3, 3).to_sparse(),), TypeError, "input must be a dense, strided tensor"),
        ((torch.ones(1, 2, 3, 3), (1.5,)), TypeError, "output_sizes must hold integers, got 1.5"),
        ((torch.ones(1, 2, 3, 3), ("3",)), TypeError, "output_sizes must hold integers, got '3'"),
    ],
    ids=lambda x: None,
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ctxops.pyramid_pool(*arguments)


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode must be 'avg' or 'max', got 'median'"):
        ctxops.pyramid_pool(torch.ones(1, 2, 3, 3), mode="median")


def test_a_map_of_too_many_positions():
    x = torch.empty(1).expand(1, 1, 2**16, 2**15)
    with pytest.raises(ValueError, match="input must have fewer than 2147483647 positions"):
        ctxops.pyramid_pool(x)


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives(mode, device):
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, device=device, requires_grad=True)

    def cubed(x):
        return ctxops.pyramid_pool(x, (1, 2), mode=mode) ** 3

    (grad,) = torch.autograd.grad(cubed(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"pyramid_pool.*use_reference"):
        grad.backward(random_like(grad))
    with ctxops.use_reference():
        assert torch.autograd.gradgradcheck(cubed, x)


def test_forward_mode_raises():
    x = torch.randn(1, 2, 5, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="pyramid_pool has no forward-mode"):
            ctxops.pyramid_pool(dual)
        ctxops.pyramid_pool(x)
        with ctxops.use_reference():
            y = torch.autograd.forward_ad.unpack_dual(ctxops.pyramid_pool(dual))
        torch.testing.assert_close(y.tangent, y.primal)


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


@pytest.mark.cuda
def test_graph_capture_on_a_side_stream():
    x = torch.randn(2, 64, 40, 30, device="cuda")
    expected = ctxops.pyramid_pool(x)
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        y = ctxops.pyramid_pool(static)
    static.copy_(x)
    graph.replay()
    torch.testing.assert_close(y, expected)
