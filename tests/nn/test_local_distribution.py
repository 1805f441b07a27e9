# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ctxops
from ctxops.nn import CGNL, GALD, LDv1, LDv2
from modules import assert_same, mostly_slow, randomise
from numerics import LAYOUTS, random_like

# Sides below the 15 that three halvings need, at it and beyond; batch norm wants two positions.
SIZES = [(1, 1), (2, 3), (14, 15), (15, 40), (24, 23)]


def axis_matrix(size, source, align_corners):
    """Bilinear interpolation along one axis, of shape (size, source)."""
    position = torch.arange(size, dtype=torch.float64)
    if align_corners:
        position = position * (source - 1) / max(1, size - 1)
    else:
        position = ((position + 0.5) * source / size - 0.5).clamp(min=0)
    distance = (position[:, None] - torch.arange(source)).abs()
    inside = (1 - distance).clamp(min=0)
    inside[:, -1] += 1 - inside.sum(1)  # what lies beyond the last position
    return inside


def resize(x, size, align_corners):
    rows, columns = (
        axis_matrix(n, m, align_corners) for n, m in zip(size, x.shape[2:], strict=True)
    )
    return rows @ x @ columns.T


def replicate(x, height, width):
    """``height`` x ``width`` positions around the map, which stands in the middle."""
    for axis, side in ((2, height), (3, width)):
        index = torch.arange(side) - (side - x.shape[axis]) // 2
        x = x.index_select(axis, index.clamp(0, x.shape[axis] - 1))
    return x


def halve(stage, x):
    """Depth-wise convolution by its nine taps, batch norm, ReLU."""
    convolution, norm, _ = stage
    height, width = ((side - 3) // 2 + 1 for side in x.shape[2:])
    y = convolution.bias[:, None, None]
    for i in range(3):
        for j in range(3):
            tap = x[:, :, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
            y = y + convolution.weight[:, 0, i, j, None, None] * tap
    if norm.training:
        mean = y.mean((0, 2, 3))
        variance = (y - mean[:, None, None]).square().mean((0, 2, 3))
    else:
        mean, variance = norm.running_mean, norm.running_var
    gain = norm.weight / (variance + norm.eps).sqrt()
    return (gain[:, None, None] * (y - mean[:, None, None]) + norm.bias[:, None, None]).relu()


def downsample(stages, x):
    smallest = 2 ** (len(stages) + 1) - 1
    x = replicate(x, *(max(side, smallest) for side in x.shape[2:]))
    for stage in stages:
        x = halve(stage, x)
    return x


def ldv1(block, x):
    if block.downsample == "conv":
        y = downsample(block.down, x)
    else:
        small = [-(-side // block.ratio) for side in x.shape[2:]]
        if block.downsample == "bilinear":
            y = resize(x, small, block.align_corners)
        else:
            rows, columns = (
                torch.stack(
                    [
                        sum(
                            F.one_hot(torch.tensor(min(i * block.ratio + k, side - 1)), side)
                            for k in range(block.ratio)
                        ).double()
                        / block.ratio
                        for i in range(n)
                    ]
                )
                for n, side in zip(small, x.shape[2:], strict=True)
            )
            y = rows @ x @ columns.T
    mask = 1 / (1 + (-resize(y, x.shape[2:], block.align_corners)).exp())
    return mask * x + x


def project(layer, x):
    y = torch.einsum("oi,bihw->bohw", layer.weight.flatten(1), x)
    return y if layer.bias is None else y + layer.bias[:, None, None]


def ldv2(block, x_global, x_local=None):
    """Eq. 7 and 8 by unfolding the projections of the concatenation."""
    maps = (x_global,) if x_local is None else (x_global, x_local)
    sources = {"both": torch.cat(maps, 1), "global": maps[0], "local": maps[-1]}
    query = project(block.query, sources[block.query_from])
    key = project(block.key, sources[block.key_from])
    value = project(block.value, sources[block.value_from])
    batch, _, height, width = query.shape
    heads, (kh, kw), (dh, dw) = block.num_heads, block.kernel_size, block.dilation

    def windows(x):  # (B, heads, C, kh * kw, H * W)
        x = F.unfold(x, (kh, kw), (dh, dw), padding=(kh // 2 * dh, kw // 2 * dw))
        return x.view(batch, heads, -1, kh * kw, height * width)

    query = query.view(batch, heads, -1, 1, height * width)
    logits = block.scale * (query * windows(key)).sum(2)
    if block.border == "mask":
        ones = F.unfold(
            torch.ones_like(x_global[:1, :1]), (kh, kw), (dh, dw), (kh // 2 * dh, kw // 2 * dw)
        )
        logits = logits.masked_fill(ones.view(1, 1, kh * kw, -1) == 0, -torch.inf)
    y = (logits.softmax(2)[:, :, None] * windows(value)).sum(3)
    return y.view(batch, -1, height, width)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("way", ["conv", "bilinear", "avg"])
def test_ldv1_is_its_formula(way, align_corners, size, training):
    block = randomise(LDv1(3, way, align_corners=align_corners)).double().train(training)
    assert_same(block, [torch.randn(3, 3, *size)], lambda x: ldv1(block, x))


@pytest.mark.parametrize("ratio", [2, 4, 16])
@pytest.mark.parametrize("way", ["conv", "bilinear", "avg"])
def test_ldv1_of_other_ratios(way, ratio):
    block = randomise(LDv1(3, way, ratio)).double()
    assert_same(block, [torch.randn(2, 3, 9, 35)], lambda x: ldv1(block, x))


@pytest.mark.parametrize("way", ["bilinear", "avg"])
def test_ldv1_of_a_ratio_that_is_no_power_of_two(way):
    block = LDv1(3, way, 3).double()
    assert parameters(block) == 0
    assert_same(block, [torch.randn(2, 3, 7, 8)], lambda x: ldv1(block, x))


def test_mask_of_ldv1():
    block, x = randomise(LDv1(4)), torch.randn(2, 4, 20, 17)
    mask = block.eval().mask(x)
    assert mask.shape == x.shape
    assert 0 < mask.min() < mask.max() < 1
    torch.testing.assert_close(block(x), mask * x + x)


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(7, 9), (1, 1), (2, 13)], ids=str)
def test_ldv2_is_its_formula(size, bias, border):
    block = randomise(LDv2(5, 3, 4, border=border, bias=bias)).double()
    inputs = [torch.randn(2, 5, *size), torch.randn(2, 3, *size)]
    assert_same(block, inputs, lambda *maps: ldv2(block, *maps))


def test_ldv2_is_equation_8_without_bias():
    """Zero-padded maps, then the projections: the same as projections that are padded."""
    block = randomise(LDv2(5, 3, 4, 3, 2)).double()

    def literal(x_global, x_local):
        x = torch.cat([x_global, x_local], 1)
        padded = F.pad(x, (2, 2, 2, 2))
        height, width = x.shape[2:]
        query, key, value = (
            project(layer, padded) for layer in (block.query, block.key, block.value)
        )
        shifts = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)]
        keys, values = (
            torch.stack([m[:, :, i : i + height, j : j + width] for i, j in shifts])
            for m in (key, value)
        )
        weights = (query[:, :, 2:-2, 2:-2] * keys).sum(2).softmax(0)
        return (weights[:, :, None] * values).sum(0)

    assert_same(block, [torch.randn(2, 5, 6, 7), torch.randn(2, 3, 6, 7)], literal)


@pytest.mark.parametrize("query_from", ["both", "global", "local"])
@pytest.mark.parametrize("key_from", ["both", "global", "local"])
@pytest.mark.parametrize("value_from", ["both", "global", "local"])
def test_ldv2_of_table_2c(query_from, key_from, value_from):
    block = LDv2(5, 3, 4, 3, query_from=query_from, key_from=key_from, value_from=value_from)
    block = randomise(block).double()
    widths = {"both": 8, "global": 5, "local": 3}
    assert parameters(block) == 4 * sum(widths[s] for s in (query_from, key_from, value_from))
    inputs = [torch.randn(2, 5, 6, 7), torch.randn(2, 3, 6, 7)]
    assert_same(block, inputs, lambda *maps: ldv2(block, *maps))


@pytest.mark.parametrize("scale", [None, 0.0, 0.3])
def test_ldv2_of_other_shapes(scale):
    block = LDv2(5, 3, 6, (3, 5), (2, 1), key_channels=4, num_heads=2, scale=scale)
    assert block.scale == (2**-0.5 if scale is None else scale)
    block = randomise(block).double()
    inputs = [torch.randn(2, 5, 6, 7), torch.randn(2, 3, 6, 7)]
    assert_same(block, inputs, lambda *maps: ldv2(block, *maps))


@pytest.mark.parametrize("source", ["both", "local"])
def test_ldv2_without_global_aggregation(source):
    block = randomise(LDv2(0, 3, 4, key_from=source)).double()
    assert parameters(block) == 3 * 3 * 4
    assert_same(block, [torch.randn(2, 3, 7, 8)], lambda x: ldv2(block, x))


def test_ldv2_hands_its_border_on():
    block = randomise(LDv2(5, 3, 4, 3, 2, border="shift")).double()
    maps = [torch.randn(2, c, 7, 8, dtype=torch.float64) for c in (5, 3)]
    x = torch.cat(maps, 1)
    expected = ctxops.neighborhood_attention(
        *(project(layer, x) for layer in (block.query, block.key, block.value)),
        3,
        2,
        scale=1.0,
        border="shift",
    )
    torch.testing.assert_close(block(*maps), expected)


def aggregation(channels):
    """A stand-in for any GA: not linear, and of any size."""
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh())


def gald(block, x):
    """Eq. 1-3 and Fig. 6, one after the other."""

    def ga(x):
        if block.global_aggregation is None:
            return x
        y = x if block.downsample == 1 else downsample(block.down, x)
        return resize(block.global_aggregation(y), x.shape[2:], block.align_corners)

    def ld(x, x_local=None):
        if block.local_distribution is None:
            return x
        if isinstance(block.local_distribution, LDv2):
            return ldv2(block.local_distribution, *(m for m in (x, x_local) if m is not None))
        return ldv1(block.local_distribution, x) + (x if block.residual else 0)

    if block.arrangement == "gald":
        two = isinstance(block.local_distribution, LDv2) and block.global_aggregation is not None
        y = ld(ga(x), x) if two else ld(ga(x))
    elif block.arrangement == "ldga":
        y = ga(ld(x))
    else:
        y = torch.cat([ga(x), ld(x)], 1)
    return torch.cat([y, x], 1) if block.concat else y


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("residual", [None, False])
@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("arrangement", ["gald", "ldga", "parallel"])
def test_gald_with_ldv1(arrangement, factor, residual, concat):
    block = GALD(
        aggregation(4), LDv1(4), arrangement, factor, channels=4, residual=residual, concat=concat
    )
    assert block.residual == (residual is None)
    block = randomise(block).double()
    assert_same(block, [torch.randn(2, 4, 24, 17)], lambda x: gald(block, x))


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("arrangement", ["gald", "ldga", "parallel"])
def test_gald_with_ldv2(arrangement, factor, concat):
    distribution = LDv2(4 if arrangement == "gald" else 0, 4, 6, 3)
    width = 6 if arrangement == "ldga" else 4
    block = GALD(aggregation(width), distribution, arrangement, factor, channels=4, concat=concat)
    block = randomise(block).double()
    assert_same(block, [torch.randn(2, 4, 8, 9)], lambda x: gald(block, x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: GALD(None, LDv1(4), channels=4),
        lambda: GALD(None, LDv2(0, 4, 6), channels=4, concat=True),
        lambda: GALD(aggregation(4), None, channels=4),
    ],
    ids=["LDv1", "LDv2", "GA"],
)
def test_gald_of_one_part(make):
    block = randomise(make()).double()
    assert_same(block, [torch.randn(2, 4, 24, 17)], lambda x: gald(block, x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gald_of_small_maps(size, align_corners, training):
    block = GALD(aggregation(4), LDv1(4), channels=4, align_corners=align_corners)
    block = randomise(block).double().train(training)
    assert_same(block, [torch.randn(3, 4, *size)], lambda x: gald(block, x))


def test_parameter_counts_of_the_released_block():
    assert parameters(LDv1(512)) == 18_432
    block = GALD(CGNL(512, 256, groups=8), LDv1(512), downsample=2, channels=512)
    assert parameters(block) == 435_200
    assert block.residual
    assert not block.concat


def released():
    """The released block, small: 2 X_g + M * X_g."""
    return randomise(GALD(CGNL(8, 4, 2), LDv1(8), channels=8))


BLOCKS = {
    "LDv1": lambda: randomise(LDv1(8)),
    "LDv1-bilinear": lambda: LDv1(8, "bilinear"),
    "LDv1-avg": lambda: LDv1(8, "avg"),
    "LDv2": lambda: randomise(LDv2(0, 8, 4, 3)),
    "GALD": released,
    "GALDv2": lambda: randomise(GALD(CGNL(8, 4, 2), LDv2(8, 8, 4, 3), channels=8, concat=True)),
}
blocks = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
traced_blocks = pytest.mark.parametrize("make", mostly_slow(BLOCKS, "LDv1-avg", "LDv2"))
# Tracing takes long: those that hold all the others' code.
compiled_blocks = pytest.mark.parametrize(
    "make", mostly_slow({name: BLOCKS[name] for name in ("LDv1", "LDv2", "GALD")}, "LDv2")
)


@blocks
@pytest.mark.parametrize("size", [(1, 1), (24, 17)], ids=str)
def test_one_map(make, size):
    x, block = torch.randn(1, 8, *size), make().eval()
    assert block(x).shape[2:] == size
    torch.testing.assert_close(block(x.expand(3, -1, -1, -1))[1:2], block(x), rtol=1e-4, atol=1e-5)


@blocks
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(7, 9), (40, 33)], ids=str)
def test_keeps_the_memory_format(make, layout, size, device):
    x = LAYOUTS[layout](torch.randn(2, 8, *size, device=device))
    y = make().to(device)(x)
    assert y.stride() == LAYOUTS[layout](y).stride()


@torch.no_grad()
@traced_blocks
def test_compiles_once_for_all_larger_sizes(make, device):
    torch._dynamo.reset()
    block = make().to(device).eval()
    # The exports and the training trace what is behind dynamo's graph.
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
    # torch 2.8 compiles average pooling anew for other remainders of the size.
    strict = torch.__version__ >= (2, 9) or getattr(block, "downsample", None) != "avg"
    with torch._dynamo.config.patch(error_on_recompile=strict):
        for size in ((26, 25), (31, 45), (40, 23)):
            x = torch.randn(2, 8, *size, device=device)
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


@compiled_blocks
def test_compiled_in_training(make, device):
    torch._dynamo.reset()
    block = make().to(device)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((26, 25), (31, 45)):
            x = torch.randn(2, 8, *size, device=device, requires_grad=True)
            leaves = [x, *block.parameters()]
            upstream = random_like(block(x))
            expected = torch.autograd.grad(block(x), leaves, upstream)
            grads = torch.autograd.grad(compiled(x), leaves, upstream)
            for a, b in zip(grads, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@compiled_blocks
def test_compiled_on_small_maps(make, device):
    torch._dynamo.reset()
    block = make().to(device).eval()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
    for size in ((14, 15), (2, 3)):
        x = torch.randn(2, 8, *size, device=device)
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)


@traced_blocks
def test_exports_with_dynamic_sizes(make, request):
    if torch.__version__ < (2, 9) and request.node.callspec.id in ("LDv1-avg", "GALD", "GALDv2"):
        pytest.skip("torch 2.8 binds the sizes of pooled and strided maps, of no operator of ours")
    block, smallest = make().eval(), 23
    height, width = (torch.export.Dim(n, min=smallest, max=4096) for n in ("height", "width"))
    program = torch.export.export(
        block, (torch.randn(1, 8, 30, 34),), dynamic_shapes=[{2: height, 3: width}]
    )
    for size in ((23, 40), (25, 24), (64, 33)):
        x = torch.randn(1, 8, *size)
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-5)


@traced_blocks
def test_exports_small_maps(make):
    block, x = make().eval(), torch.randn(1, 8, 6, 5)
    program = torch.export.export(block, (x,))
    torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-5)


@blocks
def test_autocast(make, device):
    block, x = make().to(device).eval(), torch.randn(2, 8, 24, 17, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = block(x)
    expected = block(x)
    assert (y - expected).norm() < 0.03 * expected.norm()


def test_ldv2_of_two_maps_keeps_the_local_format():
    block = LDv2(8, 4, 6)
    x_global, x_local = torch.randn(2, 8, 9, 7), torch.randn(2, 4, 9, 7)
    for layout in (LAYOUTS["contiguous"], LAYOUTS["channels_last"]):
        y = block(x_global, layout(x_local))
        assert y.stride() == layout(y).stride()


@blocks
def test_state_dict_round_trip(make):
    block, other = make().eval(), make().eval()
    x = torch.randn(2, 8, 20, 17)
    if parameters(block) > 0:
        assert not torch.allclose(block(x), other(x))
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), other(x))


def test_norm_layer():
    block = GALD(
        aggregation(4),
        LDv1(4, norm_layer=lambda c: nn.GroupNorm(2, c)),
        channels=4,
        norm_layer=lambda c: nn.GroupNorm(4, c),
    )
    norms = [m.num_groups for m in block.modules() if isinstance(m, nn.GroupNorm)]
    assert norms == [4, 2, 2, 2]


def test_say_what_they_are():
    assert "downsample='avg', ratio=4, align_corners=False" in repr(
        LDv1(4, "avg", 4, align_corners=False)
    )
    text = repr(LDv2(4, 4, 4, 3, key_from="global"))
    assert "kernel_size=(3, 3), dilation=(3, 3), scale=1, border='zeros'" in text
    assert "key_from='global'" in text
    assert "arrangement='gald', downsample=2, residual=True, concat=False" in repr(released())


def ones(channels, height=5, width=5, batch=1):
    return torch.ones(batch, channels, height, width)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LDv1(0), ValueError, "channels must be at least 1, got 0"),
        (lambda: LDv1(4, "max"), ValueError, "downsample must be one of .* got 'max'"),
        (lambda: LDv1(4, ratio=6), ValueError, "ratio must be a power of two of at least 2, got 6"),
        (lambda: LDv1(4, ratio=1), ValueError, "ratio must be a power of two of at least 2, got 1"),
        (lambda: LDv1(4, "avg", 0), ValueError, "ratio must be at least 1, got 0"),
        (lambda: LDv1(4, "avg", 2.0), TypeError, r"ratio must be an integer, got 2\.0"),
        (lambda: LDv1(4)(ones(5)), ValueError, r"x must have shape \(B, 4, H, W\), got"),
        (lambda: LDv1(4).mask(ones(4)[0]), ValueError, r"x must have shape \(B, C, H, W\), got"),
        (lambda: LDv1(4)(ones(4).long()), TypeError, "x must be float32, .* got torch.int64"),
        (lambda: LDv2(-1, 4, 4), ValueError, "global_channels must be at least 1, got -1"),
        (lambda: LDv2(4, 0, 4), ValueError, "local_channels must be at least 1, got 0"),
        (lambda: LDv2(4, 4, "4"), TypeError, "channels must be an integer, got '4'"),
        (lambda: LDv2(4, 4, 4, key_channels=0), ValueError, "key_channels must be at least 1"),
        (lambda: LDv2(4, 4, 4, 0), ValueError, "kernel_size must be at least 1 .* got 0"),
        (lambda: LDv2(4, 4, 4, 3, 1.5), TypeError, r"dilation must be an integer or two, got 1\.5"),
        (lambda: LDv2(4, 4, 4, scale="1"), TypeError, "scale must be a number or None, got str"),
        (lambda: LDv2(4, 4, 4, border="wrap"), ValueError, "border must be one of .* got 'wrap'"),
        (
            lambda: LDv2(4, 4, 4, key_channels=3, num_heads=2),
            ValueError,
            "num_heads must divide key_channels, 3, got 2",
        ),
        (lambda: LDv2(4, 4, 5, key_channels=4, num_heads=2), ValueError, "divide channels, 5, got"),
        (lambda: LDv2(4, 4, 4, key_from="x"), ValueError, "key_from must be one of .* got 'x'"),
        (
            lambda: LDv2(0, 4, 4, query_from="global"),
            ValueError,
            "query_from='global' needs global_channels of at least 1, got 0",
        ),
        (
            lambda: LDv2(4, 3, 4)(ones(4), ones(3, 6)),
            ValueError,
            r"x_local must have the height and width of x_global, \(5, 5\), got \(6, 5\)",
        ),
        (
            lambda: LDv2(4, 3, 4)(ones(4), ones(3, batch=2)),
            ValueError,
            "x_local must have the batch and device of x_global, 1 on cpu, got 2 on cpu",
        ),
        (lambda: LDv2(4, 3, 4)(ones(3), ones(3)), ValueError, r"x_global .* \(B, 4, H, W\), got"),
        (lambda: LDv2(4, 3, 4)(ones(4), ones(4)), ValueError, r"x_local .* \(B, 3, H, W\), got"),
        (
            lambda: LDv2(4, 3, 4)(ones(4)),
            TypeError,
            r"x_local must be a torch.Tensor, got NoneType",
        ),
        (lambda: LDv2(0, 3, 4)(ones(4)), ValueError, r"x_local must .* \(B, 3, H, W\), got"),
        (lambda: LDv2(0, 3, 4)(ones(3), ones(3)), TypeError, "takes x_local alone, got two maps"),
        (lambda: GALD(None, None, channels=4), ValueError, "must not both be None"),
        (
            lambda: GALD(F.relu, LDv1(4), channels=4),
            TypeError,
            "global_aggregation must be Module or None, got function",
        ),
        (
            lambda: GALD(None, nn.ReLU(), channels=4),
            TypeError,
            "local_distribution must be LDv1, LDv2 or None, got ReLU",
        ),
        (
            lambda: GALD(nn.ReLU(), LDv1(4), "galds", channels=4),
            ValueError,
            "arrangement must be one of .* got 'galds'",
        ),
        (
            lambda: GALD(None, LDv1(4), "ldga", channels=4),
            ValueError,
            "arrangement='ldga' needs global_aggregation and local_distribution, got None",
        ),
        (
            lambda: GALD(nn.ReLU(), LDv1(4), downsample=3, channels=4),
            ValueError,
            "downsample must be a power of two of at least 1, got 3",
        ),
        (lambda: GALD(nn.ReLU(), LDv1(4), channels=0), ValueError, "channels must be at least 1"),
        (
            lambda: GALD(nn.ReLU(), LDv2(4, 5, 4), channels=4),
            ValueError,
            "local_distribution must have local_channels equal to channels, 4, got 5",
        ),
        (
            lambda: GALD(nn.ReLU(), LDv2(0, 4, 4), channels=4),
            ValueError,
            "must have global_channels of at least 1 for arrangement='gald' .* got 0",
        ),
        (
            lambda: GALD(nn.ReLU(), LDv2(4, 4, 4), "parallel", channels=4),
            ValueError,
            "must have global_channels of 0 for arrangement='parallel' .* got 4",
        ),
        (
            lambda: GALD(nn.ReLU(), LDv1(5), "ldga", channels=4),
            ValueError,
            "local_distribution must have channels equal to those of x, 4, got 5",
        ),
        (
            lambda: GALD(nn.ReLU(), LDv2(4, 4, 4), channels=4, residual=True),
            ValueError,
            "residual=True needs an LDv1 as local_distribution, got LDv2",
        ),
        (
            lambda: GALD(nn.ReLU(), LDv1(4), channels=4)(ones(5)),
            ValueError,
            r"x must have shape \(B, 4, H, W\), got \(1, 5, 5, 5\)",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
