# SPDX-License-Identifier: Apache-2.0
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ctxops
from ctxops import _native
from ctxops.ops.gated_fusion.reference import reference, reference_gates
from numerics import DTYPES, LAYOUTS, check_operator, random_like

# The sizes (H, W) of the levels.
PYRAMIDS = {
    "one_size": [(7, 9)] * 3,
    "one_position": [(1, 1), (1, 1)],
    "paper": [(33, 17), (17, 9), (9, 5), (9, 5)],
    "coarse_first": [(3, 4), (19, 33), (40, 70)],
    "to_one_position": [(20, 31), (1, 1)],
    "lines": [(1, 40), (40, 1), (1, 40)],
    "most_levels": [(5, 6), (6, 5)] * 4,
    "more_than_a_block": [(40, 30), (30, 41)],
}


def features_of(sizes, channels=5, batch=2, layout="contiguous", **options):
    maps = (torch.randn(batch, channels, *size, **options) for size in sizes)
    return [LAYOUTS[layout](x) for x in maps]


def gates_of(features):
    return [torch.rand_like(x[:, :1]) for x in features]


def weight_and_bias(features):
    x = features[0]
    weight = torch.randn(len(features), x.shape[1], dtype=x.dtype, device=x.device)
    return weight / x.shape[1] ** 0.5, torch.randn_like(weight[:, 0])


def joined(fused):
    """All levels as one vector: what the comparisons take."""
    return torch.cat([y.flatten() for y in fused])


def check_given(features, align_corners=False):
    levels = len(features)
    check_operator(
        lambda *t: joined(ctxops.gated_fusion(t[:levels], t[levels:], align_corners=align_corners)),
        lambda *t: joined(reference(t[:levels], t[levels:], align_corners)),
        [*features, *gates_of(features)],
    )


def check_self(features, align_corners=False, with_bias=True):
    levels = len(features)
    weight, bias = weight_and_bias(features)

    def plain(*t):
        gates = reference_gates(t[:levels], t[levels], t[levels + 1] if with_bias else None)
        return joined(reference(t[:levels], gates, align_corners))

    check_operator(
        lambda *t: joined(
            ctxops.self_gated_fusion(t[:levels], *t[levels:], align_corners=align_corners)
        ),
        plain,
        [*features, weight, bias] if with_bias else [*features, weight],
    )


def resize_matrix(size, new_size, align_corners):
    """(new_size, size): linear interpolation along an axis, position by position."""
    matrix = torch.zeros(new_size, size, dtype=torch.float64)
    for i in range(new_size):
        if align_corners:
            x = i * (size - 1) / (new_size - 1) if new_size > 1 else 0.0
        else:
            x = max((i + 0.5) * size / new_size - 0.5, 0.0)
        low = min(int(x), size - 1)
        high = min(low + 1, size - 1)
        matrix[i, low] += 1 - (x - low)
        matrix[i, high] += x - low
    return matrix


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("sizes", PYRAMIDS.values(), ids=PYRAMIDS)
def test_equation_5(sizes, align_corners):
    features = features_of(sizes, dtype=torch.float64)
    gates = gates_of(features)
    expected = []
    for x, gate in zip(features, gates, strict=True):
        total = torch.zeros_like(x)
        for other, sent in zip(features, gates, strict=True):
            if other is not x:
                rows = resize_matrix(other.shape[2], x.shape[2], align_corners)
                columns = resize_matrix(other.shape[3], x.shape[3], align_corners)
                total += rows @ (sent * other) @ columns.T
        expected.append((1 + gate) * x + (1 - gate) * total)
    for fuse in (reference, lambda f, g, a: ctxops.gated_fusion(f, g, align_corners=a)):
        for y, exact in zip(fuse(features, gates, align_corners), expected, strict=True):
            torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)


def test_gates_of_the_maps():
    features = features_of(PYRAMIDS["paper"], dtype=torch.float64)
    weight, bias = weight_and_bias(features)
    gates = [
        torch.sigmoid(torch.einsum("bchw,c->bhw", x, w) + b)[:, None]
        for x, w, b in zip(features, weight, bias, strict=True)
    ]
    expected = ctxops.gated_fusion(features, gates)
    for y, exact in zip(ctxops.self_gated_fusion(features, weight, bias), expected, strict=True):
        torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", PYRAMIDS.values(), ids=PYRAMIDS)
def test_values_and_gradients(sizes, layout, dtype, align_corners, device):
    features = features_of(sizes, 37, 2, layout, dtype=dtype, device=device)
    check_given(features, align_corners)
    check_self(features, align_corners, with_bias=align_corners)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [PYRAMIDS["one_size"], PYRAMIDS["paper"]], ids=["one", "paper"])
def test_layouts(sizes, layout, device):
    check_given(features_of(sizes, 6, 2, layout, device=device))
    check_self(features_of(sizes, 6, 2, layout, device=device))


def test_layouts_of_all_kinds_together(device):
    features = features_of([(6, 9)] * len(LAYOUTS), device=device)
    features = [layout(x) for layout, x in zip(LAYOUTS.values(), features, strict=True)]
    check_self(features)
    check_self(features[::-1])


@pytest.mark.parametrize("isa", _native.INSTRUCTION_SETS)
def test_every_instruction_set(isa, monkeypatch):
    kernels = getattr(_native.extension, isa, None)
    if kernels is None:
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setattr(_native, "cpu", kernels)
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last"):
            for sizes in (PYRAMIDS["one_size"], PYRAMIDS["paper"]):
                check_self(features_of(sizes, 37, 2, layout, dtype=dtype))


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 45), st.integers(1, 45)), min_size=2, max_size=5),
    batch=st.integers(1, 3),
    channels=st.integers(1, 70),
    layout=st.sampled_from(list(LAYOUTS)),
    align_corners=st.booleans(),
)
def test_drawn_shapes(sizes, batch, channels, layout, align_corners):
    torch.manual_seed(0)  # a failure is to be found again
    check_given(features_of(sizes, channels, batch, layout), align_corners)
    check_self(features_of(sizes, channels, batch, layout), align_corners)


def test_gradients_of_biases_that_cancel():
    """Plain torch is exact by luck, now and then, in a sum of few terms that nearly cancel: ours
    errs as it does over many draws."""

    def ours(*t):
        return joined(ctxops.self_gated_fusion(t[:2], *t[2:]))

    def plain(*t):
        return joined(reference(t[:2], reference_gates(t[:2], *t[2:]), False))

    def gradient(function, inputs, upstream):
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves[-1], upstream)[0].double()

    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(200):
        torch.manual_seed(seed)
        features = features_of([(1, 29), (1, 1)], 1, 1)
        inputs, upstream = [*features, *weight_and_bias(features)], torch.randn(30)
        exact = gradient(plain, [x.double() for x in inputs], upstream.double())
        for i, function in enumerate((ours, plain)):
            squares[i] += (gradient(function, inputs, upstream) - exact).square().sum()
    assert squares[0] <= 1.5**2 * squares[1]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("offset", [0, 1])
def test_results_larger_than_the_caches(layout, offset, device):
    """They take another way to memory; with an offset, no vector of theirs is aligned."""
    sizes = [(128, 129 + offset)] * 2
    features = features_of(sizes, 260 + offset, 1, layout, device=device)
    assert sum(x.nbytes for x in features) > 32 * 2**20
    weight, bias = weight_and_bias(features)
    leaves = [x.requires_grad_() for x in (*features, weight, bias)]
    upstream = [random_like(x) for x in features]

    def run(fuse):
        fused = fuse()
        return [*fused, *torch.autograd.grad(fused, leaves, upstream)]

    ours = run(lambda: ctxops.self_gated_fusion(features, weight, bias))
    plain = run(lambda: reference(features, reference_gates(features, weight, bias), False))
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_position_that_many_look_at(layout, device):
    """Its gradient is a sum over the whole of the other map."""
    features = features_of([(300, 200), (1, 1), (2, 1)], 3, 1, layout, device=device)
    check_given([x.abs() for x in features])
    check_given([x.abs() for x in features], align_corners=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [PYRAMIDS["one_size"], PYRAMIDS["paper"]], ids=["one", "paper"])
def test_closed_and_open_gates(sizes, layout, device):
    """A bias of -inf closes a gate exactly, one of inf opens it; logits of any size are legal."""
    features = features_of(sizes, layout=layout, device=device)
    weight, _ = weight_and_bias(features)
    biases = torch.tensor([float("-inf"), float("inf"), 1e30, -1e30][: len(sizes)], device=device)
    bits = (biases > 0).float()
    gates = [
        x.new_full((x.shape[0], 1, *x.shape[2:]), b) for x, b in zip(features, bits, strict=True)
    ]
    for x in features:
        x.requires_grad_()
    fused = ctxops.self_gated_fusion(features, weight, biases)
    expected = ctxops.gated_fusion(features, gates)
    assert all(map(torch.equal, fused, expected))
    upstream = [random_like(y) for y in fused]
    for a, b in zip(
        torch.autograd.grad(fused, features, upstream),
        torch.autograd.grad(expected, features, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_values_at_the_end_of_the_range(device):
    features = [x.sign() * 3e38 for x in features_of([(5, 4)] * 2, device=device)]
    gates = [torch.zeros_like(x[:, :1]) for x in features]
    for y, x in zip(ctxops.gated_fusion(features, gates), features, strict=True):
        assert torch.equal(y, x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("align_corners", [True, False])
def test_gradcheck(layout, align_corners, device):
    sizes = [(5, 4), (3, 3), (3, 3)]
    features = features_of(sizes, 3, 1, layout, dtype=torch.float64, device=device)
    leaves = [x.requires_grad_() for x in (*features, *weight_and_bias(features))]
    gates = [g.requires_grad_() for g in gates_of(features)]
    assert torch.autograd.gradcheck(
        lambda *t: ctxops.self_gated_fusion(t[:3], *t[3:], align_corners=align_corners), leaves
    )
    assert torch.autograd.gradcheck(
        lambda *t: ctxops.gated_fusion(t[:3], t[3:], align_corners=align_corners),
        [*leaves[:3], *gates],
    )


def test_one_output_is_enough(device):
    features = [x.requires_grad_() for x in features_of(PYRAMIDS["paper"], device=device)]
    weight, bias = (x.requires_grad_() for x in weight_and_bias(features))
    leaves = [*features, weight, bias]
    ours = ctxops.self_gated_fusion(features, weight, bias)[2]
    plain = reference(features, reference_gates(features, weight, bias), False)[2]
    upstream = random_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(plain, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sizes", [[(1, 1), (1, 1)], [(1, 1), (4, 3)], [(4, 1), (1, 3)]])
def test_gradients_without_strides(sizes, device):
    """What .sum().backward() sends: one number, expanded."""
    features = [x.requires_grad_() for x in features_of(sizes, device=device)]
    gates = gates_of(features)
    ours, plain = ctxops.gated_fusion(features, gates), reference(features, gates, False)
    for a, b in zip(
        torch.autograd.grad([y.sum() for y in ours], features),
        torch.autograd.grad([y.sum() for y in plain], features),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_what_was_saved_may_come_back_with_gaps(device):
    features = [x.requires_grad_() for x in features_of([(6, 5), (3, 3)], device=device)]
    leaves = [*features, *(x.requires_grad_() for x in weight_and_bias(features))]
    expected = ctxops.self_gated_fusion(features, *leaves[2:])
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: torch.stack([x, x], dim=-1), lambda x: x[..., 0]
    ):
        fused = ctxops.self_gated_fusion(features, *leaves[2:])
    for a, b in zip(
        torch.autograd.grad(fused, leaves, expected),
        torch.autograd.grad(expected, leaves, expected),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", range(4))
def test_gradient_of_a_part_of_the_inputs(wanted, device):
    features = features_of([(6, 5), (3, 3)], device=device)
    weight, bias = weight_and_bias(features)
    leaves = [*features, weight, bias]
    leaves[wanted].requires_grad_()
    ours = joined(ctxops.self_gated_fusion(leaves[:2], *leaves[2:]))
    plain = joined(reference(leaves[:2], reference_gates(leaves[:2], *leaves[2:]), False))
    upstream = random_like(ours)
    (gradient,) = torch.autograd.grad(ours, leaves[wanted], upstream)
    (expected,) = torch.autograd.grad(plain, leaves[wanted], upstream)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("sizes", [PYRAMIDS["one_size"], PYRAMIDS["paper"]], ids=["one", "paper"])
def test_opcheck(sizes, layout, save, device):
    features = features_of(sizes, layout=layout, device=device)
    weight, bias = weight_and_bias(features)
    gates = joined(gates_of(features))
    forward = torch.ops.ctxops.gated_fusion.default
    backward = torch.ops.ctxops.gated_fusion_bwd.default
    for arguments in ((None, weight, bias), (None, weight, None), (gates, None, None)):
        torch.library.opcheck(forward, (features, *arguments, False, save))
        leaves = [x.clone().requires_grad_() for x in features]
        torch.library.opcheck(forward, (leaves, *arguments, False, save))
        fused, made, sums = forward(features, *arguments, False, True)
        grads = [random_like(y) for y in fused]
        kept = gates if arguments[1] is None else made
        torch.library.opcheck(backward, (grads, features, kept, arguments[1], sums, False))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_formats(layout, device):
    features = features_of(PYRAMIDS["paper"], layout=layout, device=device)
    others = [x.contiguous() for x in features[1:]]
    leaves = [x.requires_grad_() for x in (features[0], *others)]
    fused = ctxops.gated_fusion(leaves, gates_of(leaves))
    assert all(y.stride() == LAYOUTS[layout](y).stride() for y in fused)
    gradients = torch.autograd.grad(fused, leaves, [random_like(y).contiguous() for y in fused])
    assert all(g.shape == x.shape for g, x in zip(gradients, leaves, strict=True))
    with ctxops.use_reference():
        plain = ctxops.gated_fusion(leaves, gates_of(leaves))
    assert [y.stride() for y in plain] == [y.stride() for y in fused]


@pytest.mark.parametrize("sizes", [((8, 9), (8, 9)), ((8, 9), (7, 4))], ids=["one", "two"])
def test_compiles_once_for_all_sizes(sizes, device):
    torch._dynamo.reset()

    def fuse(a, b, weight, bias):
        first, second = ctxops.self_gated_fusion([a.relu(), b], weight, bias)
        return first.sin(), second

    compiled = torch.compile(fuse, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for add in (0, 3, 10):
            features = features_of([(h + add, w + 2 * add) for h, w in sizes], device=device)
            leaves = [x.requires_grad_() for x in (*features, *weight_and_bias(features))]
            expected = fuse(*leaves)
            upstream = [random_like(y) for y in expected]
            for a, b in zip(
                torch.autograd.grad(compiled(*leaves), leaves, upstream),
                torch.autograd.grad(expected, leaves, upstream),
                strict=True,
            ):
                torch.testing.assert_close(a, b)


def test_compiled_by_inductor(device):
    torch._dynamo.reset()
    features = features_of([(9, 8), (4, 5)], device=device)
    leaves = [x.requires_grad_() for x in (*features, *weight_and_bias(features))]

    def fuse(a, b, weight, bias):
        first, second = ctxops.self_gated_fusion([a.relu(), b], weight, bias)
        return first.sin(), second

    expected, compiled = fuse(*leaves), torch.compile(fuse, fullgraph=True)(*leaves)
    upstream = [random_like(y) for y in expected]
    for a, b in zip(
        [*compiled, *torch.autograd.grad(compiled, leaves, upstream)],
        [*expected, *torch.autograd.grad(expected, leaves, upstream)],
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_trains_after_an_export_without_gradients():
    class Fuse(torch.nn.Module):
        def forward(self, a, b, weight, bias):
            return ctxops.self_gated_fusion([a, b], weight, bias)

    features = features_of([(7, 5), (4, 4)])
    leaves = [*features, *weight_and_bias(features)]
    exported = torch.export.export(Fuse(), tuple(leaves)).module()
    leaves = [x.requires_grad_() for x in leaves]
    for a, b in zip(
        torch.autograd.grad((joined(exported(*leaves)) ** 2).sum(), leaves),
        torch.autograd.grad((joined(Fuse()(*leaves)) ** 2).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_transforms_of_torch_func():
    a, b = torch.randn(3, 2, 4, 5, 6), torch.randn(3, 2, 4, 3, 3)
    weight = torch.randn(2, 4)

    def fuse(a, b):
        return ctxops.self_gated_fusion([a, b], weight)

    expected = [
        torch.stack(y) for y in zip(*(fuse(*each) for each in zip(a, b, strict=True)), strict=True)
    ]
    for y, exact in zip(torch.vmap(fuse)(a, b), expected, strict=True):
        torch.testing.assert_close(y, exact)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [[(33, 47)] * 3, PYRAMIDS["paper"]], ids=["one", "paper"])
def test_deterministic(sizes, layout, device):
    features = features_of(sizes, 20, 2, layout, device=device)
    leaves = [x.requires_grad_() for x in (*features, *weight_and_bias(features))]
    upstream = [random_like(x) for x in features]
    threads = torch.get_num_threads()

    def run():
        fused = ctxops.self_gated_fusion(features, *leaves[len(features) :])
        return [*fused, *torch.autograd.grad(fused, leaves, upstream)]

    first = run()
    try:
        for repetition in range(20):
            torch.set_num_threads(1 + repetition % 3)
            assert all(map(torch.equal, first, run()))
    finally:
        torch.set_num_threads(threads)


def test_gradient_of_the_bias_does_not_depend_on_threads():
    """Of long sums: torch's own depend on them."""
    features = features_of([(300, 200)] * 2, 2)
    leaves = [x.requires_grad_() for x in weight_and_bias(features)]
    upstream = [random_like(x) for x in features]
    threads, gradients = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            fused = ctxops.self_gated_fusion(features, *leaves)
            gradients.append(torch.autograd.grad(fused, leaves, upstream))
    finally:
        torch.set_num_threads(threads)
    for gradient in gradients[1:]:
        assert all(map(torch.equal, gradients[0], gradient))


def test_autocast_promotes(device):
    features = features_of([(5, 6), (3, 3)], device=device)
    weight, bias = weight_and_bias(features)
    mixed = [features[0].bfloat16(), features[1]]
    with torch.autocast(device, dtype=torch.bfloat16):
        fused = ctxops.self_gated_fusion(mixed, weight, bias)
        given = ctxops.gated_fusion(mixed, gates_of(features))
        halves = [x.bfloat16() for x in features]
        low = ctxops.gated_fusion(halves, gates_of(halves))
        low += ctxops.self_gated_fusion(halves, weight, bias)
    assert all(y.dtype == torch.float32 for y in (*fused, *given))
    assert all(y.dtype == torch.bfloat16 for y in low)
    expected = ctxops.self_gated_fusion([x.float() for x in mixed], weight, bias)
    assert all(map(torch.equal, fused, expected))


def test_more_levels_than_the_kernels_take(device):
    features = features_of([(4, 5)] * 5 + [(2, 3)] * 4, device=device)
    check_given(features)
    check_self(features)


def test_empty_batch(device):
    features = features_of([(5, 6), (3, 3)], batch=0, device=device)
    leaves = [x.requires_grad_() for x in (*features, *weight_and_bias(features))]
    fused = ctxops.self_gated_fusion(features, *leaves[2:])
    assert [y.shape for y in fused] == [x.shape for x in features]
    gradients = torch.autograd.grad(fused, leaves, fused)
    assert torch.equal(gradients[2], torch.zeros_like(leaves[2]))
    assert torch.equal(gradients[3], torch.zeros_like(leaves[3]))


def test_second_derivatives(device):
    features = features_of([(3, 4), (2, 2)], 2, 1, dtype=torch.float64, device=device)
    leaves = [x.requires_grad_() for x in (*features, *weight_and_bias(features))]

    def cubed(*leaves):
        return joined(ctxops.self_gated_fusion(leaves[:2], *leaves[2:])) ** 3

    (grad,) = torch.autograd.grad(cubed(*leaves).sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"gated_fusion.*use_reference"):
        grad.backward(random_like(grad))
    with ctxops.use_reference():
        assert torch.autograd.gradgradcheck(cubed, leaves)


def test_forward_mode_raises():
    features = features_of([(3, 4), (2, 2)])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(features[1], features[1])
        with pytest.raises(NotImplementedError, match="gated_fusion has no forward-mode"):
            ctxops.gated_fusion([features[0], dual], gates_of(features))
        with pytest.raises(NotImplementedError, match="self_gated_fusion has no forward-mode"):
            ctxops.self_gated_fusion([features[0], dual], torch.ones(2, 5))


A, B = torch.ones(2, 3, 6, 5), torch.ones(2, 3, 4, 4)
GATES = [torch.ones(2, 1, 6, 5), torch.ones(2, 1, 4, 4)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([A], GATES[:1]), ValueError, "features must have at least two levels, got 1"),
        (([], []), ValueError, "features must have at least two levels, got 0"),
        ((A, GATES), TypeError, "features must be a list or tuple of tensors, got Tensor"),
        (([A, None], GATES), TypeError, r"features\[1\] must be a torch.Tensor, got NoneType"),
        (([A, B.int()], GATES), TypeError, r"features\[1\] must be float32.* got torch.int32"),
        (
            ([A, B.double()], GATES),
            TypeError,
            r"features\[1\] must have the dtype of features\[0\]",
        ),
        (([A, B[:, :2]], GATES), ValueError, r"features\[1\] must have shape .*got \(2, 2, 4, 4\)"),
        (([A, B[:1]], GATES), ValueError, r"features\[1\] must have shape .* got \(1, 3, 4, 4\)"),
        (([A, B[0]], GATES), ValueError, r"features\[1\] must have shape \(B, C, H, W\), got"),
        (([A, B[:, :, :0]], GATES), ValueError, r"features\[1\] must have C, H and W of at least"),
        (
            ([A, B.to("meta")], GATES),
            ValueError,
            r"features\[1\] must be on .* device cpu, got meta",
        ),
        (([A, B], GATES[:1]), ValueError, "gates must be as many as the features, 2, got 1"),
        (([A, B], GATES[0]), TypeError, "gates must be a list or tuple of tensors, got Tensor"),
        (([A, B], GATES[::-1]), ValueError, r"gates\[0\] must have shape .*\(2, 1, 6, 5\), got"),
        (([A, B], [GATES[0], B]), ValueError, r"gates\[1\] must have shape .*\(2, 1, 4, 4\), got"),
        (([A, B], [GATES[0], GATES[1].double()]), TypeError, r"gates\[1\] must have the dtype of"),
    ],
    ids=lambda x: None,
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        ctxops.gated_fusion(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([A], torch.ones(1, 3)), ValueError, "features must have at least two levels, got 1"),
        (
            ([A, B], torch.ones(3, 3)),
            ValueError,
            r"weight must have shape \(L, C\) = \(2, 3\), got",
        ),
        (([A, B], torch.ones(2, 4)), ValueError, r"weight must have shape .* got \(2, 4\)"),
        (([A, B], None), TypeError, "weight must be a torch.Tensor, got NoneType"),
        (([A, B], torch.ones(2, 3).double()), TypeError, "weight must have the dtype of features"),
        (
            ([A, B], torch.ones(2, 3), torch.ones(3)),
            ValueError,
            r"bias must have shape \(L,\) = \(2\), got \(3,\)",
        ),
        (
            ([A, B], torch.ones(2, 3), torch.ones(2).half()),
            TypeError,
            "bias must have the dtype of features",
        ),
    ],
    ids=lambda x: None,
)
def test_bad_input_of_the_self_gated(arguments, error, message):
    with pytest.raises(error, match=message):
        ctxops.self_gated_fusion(*arguments)


def test_kernels_refuse_what_the_operator_never_sends():
    fuse = partial(torch.ops.ctxops.gated_fusion, align_corners=False, save=True)
    with pytest.raises(ValueError, match="gates must hold one accumulator for every position"):
        fuse([A, B], torch.ones(3), None, None)
    with pytest.raises(ValueError, match="weight must be"):
        fuse([A, B], None, torch.ones(2, 4), None)
    with pytest.raises(ValueError, match="bias must be"):
        fuse([A, B], None, torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="levels must have one batch and as many channels"):
        fuse([A, B[:, :2]], None, torch.ones(2, 3), None)
    with pytest.raises(ValueError, match="too many tensors"):
        fuse([A] * 9, None, torch.ones(9, 3), None)


@pytest.mark.cuda
def test_graph_capture_on_a_side_stream():
    features = features_of([(20, 30), (10, 15)], 64, device="cuda")
    weight, bias = weight_and_bias(features)
    expected = ctxops.self_gated_fusion(features, weight, bias)
    graph, static = torch.cuda.CUDAGraph(), [torch.zeros_like(x) for x in features]
    with torch.cuda.graph(graph):
        fused = ctxops.self_gated_fusion(static, weight, bias)
    for x, y in zip(static, features, strict=True):
        x.copy_(y)
    graph.replay()
    for a, b in zip(fused, expected, strict=True):
        torch.testing.assert_close(a, b)
