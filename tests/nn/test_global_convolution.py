# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops.nn import BoundaryRefinement, ConvolutionStack, GCNBottleneck, GlobalConvolution
from modules import assert_same, flop_counter, mostly_slow, randomise
from numerics import LAYOUTS, random_like


def taps(x, weight, bias, stride=1):
    """A zero-padded convolution of any kernel as a sum over its taps."""
    (kh, kw), (height, width) = weight.shape[2:], x.shape[2:]
    stride_h, stride_w = (stride if k > 1 else 1 for k in (kh, kw))
    x = F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2))
    y = 0 if bias is None else bias[:, None, None]
    for i in range(kh):
        for j in range(kw):
            shifted = x[:, :, i : i + height : stride_h, j : j + width : stride_w]
            y = y + torch.einsum("oc,bchw->bohw", weight[:, :, i, j], shifted)
    return y


def normalise(norm, x):
    if norm.training:
        mean = x.mean((0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
    else:
        mean, variance = norm.running_mean, norm.running_var
    gain = norm.weight / (variance + norm.eps).sqrt()
    return gain[:, None, None] * (x - mean[:, None, None]) + norm.bias[:, None, None]


def global_convolution(block, x):
    y = 0
    for first, second in (block.vertical_first, block.horizontal_first):
        y = y + taps(taps(x, first.weight, first.bias), second.weight, second.bias)
    return y


def boundary_refinement(block, x):
    y = taps(x, block.conv1.weight, block.conv1.bias)
    return x + taps(y * (y > 0), block.conv2.weight, block.conv2.bias)


def bottleneck(block, x, stride):
    total = 0
    for branch in (block.vertical_first, block.horizontal_first):
        y = x
        for convolution, norm, _ in branch:
            y = normalise(norm, taps(y, convolution.weight, None, stride))
            y = y * (y > 0)
        total = total + y
    y = normalise(block.out[1], taps(total, block.out[0].weight, None))
    if isinstance(block.shortcut, nn.Identity):
        y = y + x
    else:
        convolution, norm = block.shortcut
        shortcut = taps(x[:, :, ::stride, ::stride], convolution.weight, None)
        y = y + normalise(norm, shortcut)
    return y * (y > 0)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", [(7, 9), (16, 16), (1, 1), (2, 13)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [1, 3, 9, 15])
def test_is_its_formula(k, bias, size):
    """The last two kernels are larger than three of the maps."""
    block = randomise(GlobalConvolution(5, 3, k, bias)).double()
    assert_same(block, [torch.randn(2, 5, *size)], lambda x: global_convolution(block, x))


@pytest.mark.parametrize(
    ("make", "biases"),
    [
        (lambda bias: GlobalConvolution(5, 3, 3, bias), 4 * 3),
        (lambda bias: ConvolutionStack(5, 3, 7, 4, bias), 4 + 4 + 3),
        (lambda bias: BoundaryRefinement(5, bias), 2 * 5),
    ],
    ids=["GlobalConvolution", "ConvolutionStack", "BoundaryRefinement"],
)
def test_biases(make, biases):
    assert parameters(make(True)) - parameters(make(False)) == biases


@pytest.mark.parametrize("k", [3, 5, 7, 9, 11, 13, 15])
def test_is_a_dense_convolution(k):
    """Nothing lies between the convolutions, and the border is that of the k x k convolution."""
    block = randomise(GlobalConvolution(4, 3, k)).double()
    (w1, w2), (w3, w4) = (
        [convolution.weight.detach().flatten(2) for convolution in branch]
        for branch in (block.vertical_first, block.horizontal_first)
    )
    kernel = torch.einsum("omj,mci->ocij", w2, w1) + torch.einsum("omi,mcj->ocij", w4, w3)
    for size in ((16, 16), (4, 31)):
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        torch.testing.assert_close(block(x), F.conv2d(x, kernel, padding=k // 2))


@pytest.mark.parametrize("k", [3, 5, 7, 9, 11])
def test_stack_has_the_window_of_k(k):
    stack = randomise(ConvolutionStack(2, 3, k, 4))
    assert len(stack) == (k - 1) // 2
    x = torch.randn(1, 2, 15, 15, requires_grad=True)
    stack(x)[0, :, 7, 7].backward(torch.randn(3))
    rows, columns = x.grad.abs().amax((0, 1)).nonzero().T
    assert rows.unique().tolist() == list(range(7 - k // 2, 8 + k // 2))
    assert columns.unique().tolist() == list(range(7 - k // 2, 8 + k // 2))


@pytest.mark.parametrize("bias", [False, True])
def test_stack_is_its_formula(bias):
    stack = randomise(ConvolutionStack(3, 2, 7, bias=bias)).double()

    def formula(x):
        for convolution in stack:
            x = taps(x, convolution.weight, convolution.bias)
        return x

    assert [c.in_channels for c in stack] == [3, 3, 3]
    assert_same(stack, [torch.randn(2, 3, 6, 5)], formula)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(6, 5), (1, 1)], ids=str)
def test_boundary_refinement(size, bias):
    block = randomise(BoundaryRefinement(4, bias)).double()
    assert_same(block, [torch.randn(2, 4, *size)], lambda x: boundary_refinement(block, x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("in_channels", "stride"), [(8, 1), (6, 1), (6, 2), (8, 2)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("size", [(9, 8), (1, 5), (1, 1)], ids=str)
def test_bottleneck(size, in_channels, stride, training):
    block = randomise(GCNBottleneck(in_channels, 3, 8, 5, stride)).double().train(training)
    x = torch.randn(3, in_channels, *size)
    assert_same(block, [x], lambda x: bottleneck(block, x, stride))


def test_parameters_of_table_2():
    with torch.device("meta"):
        ours = [parameters(GlobalConvolution(2048, 21, k)) for k in (3, 5, 7, 9)]
        dense = [parameters(nn.Conv2d(2048, 21, k, bias=False)) for k in (3, 5, 7, 9)]
    assert ours == [260_694, 434_490, 608_286, 782_082]
    assert dense == [387_072, 1_075_200, 2_107_392, 3_483_648]


def test_parameters_of_table_4():
    with torch.device("meta"):
        stacks = [parameters(ConvolutionStack(2048, 21, 7, m)) for m in (None, 1024, 210)]
    assert stacks == [75_884_544, 28_505_088, 4_307_310]


def stages_of_table_11():
    """res-4 and res-5 of ResNet50-GCN: channels in, of the branches, out, k, blocks."""
    for in_channels, channels, out_channels, k, depth in (
        (512, 85, 1024, 5, 6),
        (1024, 128, 2048, 7, 3),
    ):
        yield nn.Sequential(
            GCNBottleneck(in_channels, channels, out_channels, k, 2),
            *(GCNBottleneck(out_channels, channels, out_channels, k) for _ in range(1, depth)),
        )


def weights_of_convolutions(module):
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))


def test_costs_of_table_11():
    with torch.device("meta"):
        stages = list(stages_of_table_11())
        assert weights_of_convolutions(stages[0][1]) == 1_029_690
        x, macs = torch.empty(1, 512, 28, 28), []
        for stage, size in zip(stages, (14, 7), strict=True):
            with flop_counter() as counter:
                x = stage(x)
            assert x.shape[2:] == (size, size)
            macs.append(counter.get_total_flops() / 2e6)
    assert macs == pytest.approx([1313.7, 714.5], abs=0.05)
    # conv1, res-2 and res-3 of ResNet-50; 20.45 M with the two stages.
    common = 9_408 + 212_992 + 1_212_416
    assert common + sum(map(weights_of_convolutions, stages)) == pytest.approx(20.45e6, abs=5e3)


BLOCKS = {
    "GlobalConvolution": lambda: randomise(GlobalConvolution(8, 5, 7)),
    "GlobalConvolution-bias": lambda: randomise(GlobalConvolution(8, 5, 15, bias=True)),
    "ConvolutionStack": lambda: randomise(ConvolutionStack(8, 5, 7, 6)),
    "BoundaryRefinement": lambda: randomise(BoundaryRefinement(8)),
    "GCNBottleneck": lambda: randomise(GCNBottleneck(8, 3, 8, 5)),
    "GCNBottleneck-stride": lambda: randomise(GCNBottleneck(8, 3, 12, 5, 2)),
}
blocks = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)


@blocks
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_memory_format(make, layout, device):
    x = LAYOUTS[layout](torch.randn(2, 8, 7, 9, device=device))
    y = make().to(device)(x)
    assert y.stride() == LAYOUTS[layout](y).stride()


@blocks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(make, layout, device):
    block, x = make().to(device).eval(), torch.randn(2, 8, 7, 9, device=device)
    x = LAYOUTS[layout](x)
    torch.testing.assert_close(block(x), block(x.contiguous()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["GlobalConvolution-bias", "BoundaryRefinement", "GCNBottleneck-stride"],
        "GlobalConvolution-bias",
    ),
)
def test_compiles_once_for_all_sizes(name, device):
    torch._dynamo.reset()
    block = BLOCKS[name]().to(device).eval()
    # The exports trace what is behind dynamo's graph.
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for size in ((13, 10), (17, 9), (31, 33)):
            x = torch.randn(2, 8, *size, device=device)
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_in_training(device):
    torch._dynamo.reset()
    block = randomise(GCNBottleneck(8, 3, 12, 5, 2)).to(device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 11, 13, device=device, requires_grad=True)
    leaves, expected = [x, *block.parameters()], block(x)
    upstream = random_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, upstream)
    grads = torch.autograd.grad(compiled(x), leaves, upstream)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", mostly_slow(BLOCKS, "GlobalConvolution", "GCNBottleneck-stride"))
def test_exports_with_dynamic_sizes(make):
    block = make().eval()
    height, width = (torch.export.Dim(n, min=3, max=4096) for n in ("height", "width"))
    program = torch.export.export(
        block, (torch.randn(1, 8, 12, 10),), dynamic_shapes=[{2: height, 3: width}]
    )
    for size in ((17, 23), (3, 40)):
        x = torch.randn(1, 8, *size)
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-5)


@blocks
def test_autocast(make, device):
    block, x = make().to(device).eval(), torch.randn(2, 8, 12, 9, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = block(x)
    expected = block(x)
    assert (y - expected).norm() < 0.03 * expected.norm()


@blocks
def test_state_dict_round_trip(make):
    block, other, x = make().eval(), make().eval(), torch.randn(2, 8, 7, 6)
    assert not torch.allclose(block(x), other(x))
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), other(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GlobalConvolution(0, 4, 3), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: GlobalConvolution(8, 0, 3), ValueError, "out_channels must be at least 1, got 0"),
        (
            lambda: GlobalConvolution(8, 4, 4),
            ValueError,
            "kernel_size must be odd and at least 1, got 4",
        ),
        (lambda: GlobalConvolution(8, 4, 0), ValueError, "kernel_size must be at least 1, got 0"),
        (
            lambda: GlobalConvolution(8, 4, (3, 5)),
            TypeError,
            r"kernel_size must be an integer, got \(3, 5\)",
        ),
        (
            lambda: GlobalConvolution(8, 4, 3)(torch.ones(1, 7, 5, 5)),
            ValueError,
            r"x must have shape \(B, 8, H, W\), got \(1, 7, 5, 5\)",
        ),
        (
            lambda: GlobalConvolution(8, 4, 3)(torch.ones(1, 8, 0, 5)),
            ValueError,
            r"x must have C, H and W of at least 1, got \(1, 8, 0, 5\)",
        ),
        (
            lambda: GlobalConvolution(8, 4, 3)([1]),
            TypeError,
            r"x must be a torch\.Tensor, got list",
        ),
        (
            lambda: ConvolutionStack(8, 4, 1),
            ValueError,
            "kernel_size must be odd and at least 3, got 1",
        ),
        (
            lambda: ConvolutionStack(8, 4, 6),
            ValueError,
            "kernel_size must be odd and at least 3, got 6",
        ),
        (lambda: ConvolutionStack(8, 4, 3, 0), ValueError, "mid_channels must be at least 1"),
        (lambda: BoundaryRefinement(0), ValueError, "channels must be at least 1, got 0"),
        (
            lambda: BoundaryRefinement(4)(torch.ones(4, 5, 5)),
            ValueError,
            r"x must have shape \(B, C, H, W\), got \(4, 5, 5\)",
        ),
        (lambda: GCNBottleneck(8, 3, 8, 2), ValueError, "kernel_size must be odd"),
        (lambda: GCNBottleneck(8, 3, 8, 3, 0), ValueError, "stride must be at least 1, got 0"),
        (
            lambda: GCNBottleneck(8, 3, 8, 3)(torch.ones(1, 3, 5, 5)),
            ValueError,
            r"x must have shape \(B, 8, H, W\), got \(1, 3, 5, 5\)",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
