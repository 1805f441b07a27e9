# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops.nn import (
    AdditionFusion,
    ConcatFusion,
    DenseFeaturePyramid,
    FeaturePyramidFusion,
    GatedFeaturePyramidFusion,
    GatedFullyFusion,
)
from modules import activate, assert_same, mostly_slow, randomise
from numerics import LAYOUTS, random_like

CHANNELS = (3, 5, 4, 6)
SIZES = {
    "33": [(33, 33), (17, 17), (9, 9), (5, 5)],
    "backbone": [(12, 10), (6, 5), (6, 5), (6, 5)],
    "one size": [(6, 7), (6, 7), (6, 7)],
    "any": [(5, 8), (9, 3), (1, 1)],
    "two": [(2, 3), (7, 3)],
}
sizes = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
corners = pytest.mark.parametrize("align_corners", [True, False])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Flat(nn.Module):
    """A fusion from maps to one vector: what assert_same compares."""

    def __init__(self, fusion, levels, **arguments):
        super().__init__()
        self.fusion, self.levels, self.arguments = fusion, levels, arguments

    def forward(self, *maps):
        features, rest = maps[: self.levels], maps[self.levels :]
        return flatten(self.fusion(features, *rest, **self.arguments))


def flatten(maps):
    return torch.cat([x.flatten() for x in maps])


def draw(size, channels=CHANNELS, batch=3):
    return [torch.randn(batch, c, *s) for c, s in zip(channels, size, strict=False)]


def resize(x, size, align_corners):
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def convolve(x, layer):
    y = torch.einsum("oi,bihw->bohw", layer.weight.flatten(1), x)
    return y if layer.bias is None else y + layer.bias[:, None, None]


def reduce(fusion, features):
    return [
        activate(convolve(x, layer[0]), layer[1])
        for layer, x in zip(fusion.reduce, features, strict=True)
    ]


def gates(fusion, features, closed=()):
    if getattr(fusion, "gate_from", "input") == "reduced":
        features = reduce(fusion, features)
    return [
        (level not in closed) / (1 + (-convolve(x, layer)).exp())
        for level, (layer, x) in enumerate(zip(fusion.gate, features, strict=True))
    ]


def gated_fully(fusion, features, closed=()):
    """Eq. 5, level by level."""
    maps, g = reduce(fusion, features), gates(fusion, features, closed)
    fused = []
    for k, x in enumerate(maps):
        received = torch.zeros_like(x)
        for i, other in enumerate(maps):
            if i != k:
                received = received + resize(g[i] * other, x.shape[2:], fusion.align_corners)
        fused.append((1 + g[k]) * x + (1 - g[k]) * received)
    return fused


def concat(fusion, features):
    """Eq. 2."""
    maps = reduce(fusion, features)
    return [
        torch.cat([resize(x, level.shape[2:], fusion.align_corners) for x in maps], 1)
        for level in maps
    ]


def addition(fusion, features):
    """Eq. 3."""
    maps = reduce(fusion, features)
    return [sum(resize(x, level.shape[2:], fusion.align_corners) for x in maps) for level in maps]


def feature_pyramid(fusion, features):
    """Eq. 4."""
    maps = reduce(fusion, features)
    for k in range(len(maps) - 2, -1, -1):
        maps[k] = maps[k] + resize(maps[k + 1], maps[k].shape[2:], fusion.align_corners)
    return maps


def gated_feature_pyramid(fusion, features):
    maps, g = reduce(fusion, features), gates(fusion, features)
    for k in range(len(maps) - 2, -1, -1):
        received = resize(g[k + 1] * maps[k + 1], maps[k].shape[2:], fusion.align_corners)
        maps[k] = (1 + g[k]) * maps[k] + (1 - g[k]) * received
    return maps


def dense_pyramid(pyramid, features, context):
    """Eq. 6: everything at the size of the finest map, then concatenated, then convolved."""
    y = activate(convolve(context, pyramid.reduce[0]), pyramid.reduce[1])
    maps = [resize(x, features[0].shape[2:], pyramid.align_corners) for x in (y, *features[::-1])]
    fused = [maps[0]]
    for i, fuse in enumerate(pyramid.fuse, start=1):
        seen = maps[:i] if pyramid.literal else maps[: i + 1]
        fused.append(activate(convolve(torch.cat(seen, 1), fuse.conv), fuse.norm))
    return fused


BASELINES = {
    ConcatFusion: concat,
    AdditionFusion: addition,
    FeaturePyramidFusion: feature_pyramid,
    GatedFeaturePyramidFusion: gated_feature_pyramid,
}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@modes
@corners
@sizes
@pytest.mark.parametrize("gate_from", ["input", "reduced"])
def test_gated_fully_fusion_is_equation_5(gate_from, size, align_corners, training):
    levels = len(size)
    fusion = GatedFullyFusion(CHANNELS[:levels], 4, gate_from, align_corners=align_corners)
    fusion = randomise(fusion).double().train(training)
    assert_same(Flat(fusion, levels), draw(size), lambda *x: flatten(gated_fully(fusion, x)))


@pytest.mark.parametrize("closed", [(0,), [1, 3], (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("gate_from", ["input", "reduced"])
def test_closed_gates(gate_from, closed):
    fusion = randomise(GatedFullyFusion(CHANNELS, 4, gate_from)).double().eval()
    features = draw(SIZES["backbone"])

    def formula(*features):
        return flatten(gated_fully(fusion, features, closed))

    assert_same(Flat(fusion, 4, closed=closed), features, formula)


@pytest.mark.parametrize("gate_from", ["input", "reduced"])
def test_what_is_closed_sends_nothing(gate_from):
    """Not even a little: what the level holds is without influence on the others."""
    fusion = randomise(GatedFullyFusion(CHANNELS, 4, gate_from)).eval()
    features = draw(SIZES["backbone"])
    others = [features[0], 1e4 * torch.randn_like(features[1]), *features[2:]]
    for level, (y, other) in enumerate(
        zip(fusion(features, closed=[1]), fusion(others, closed=[1]), strict=True)
    ):
        assert torch.equal(y, other) == (level != 1)
        assert not torch.equal(fusion(features)[level], fusion(others)[level])


@pytest.mark.parametrize("gate_from", ["input", "reduced"])
def test_gates_to_look_at(gate_from):
    fusion = randomise(GatedFullyFusion(CHANNELS, 4, gate_from)).double().eval()
    features = [x.double() for x in draw(SIZES["33"])]
    for gate, expected, x in zip(
        fusion.gates(features), gates(fusion, features), features, strict=True
    ):
        assert gate.shape == (3, 1, *x.shape[2:])
        assert 0 < gate.min() < gate.max() < 1
        torch.testing.assert_close(gate, expected)


@pytest.mark.parametrize("closed", [(), (1,)], ids=str)
def test_a_hook_on_a_gate_counts_in_the_single_pass_form(closed):
    """A parametrisation, pruning or an adapter changes what the gate computes."""
    fusion = randomise(GatedFullyFusion(CHANNELS, 4, "reduced")).double().eval()
    features = [x.double() for x in draw(SIZES["backbone"])]
    before = flatten(gated_fully(fusion, features, (0, *closed)))
    fusion.gate[0].register_forward_hook(lambda module, inputs, logits: logits - 1e9)
    torch.testing.assert_close(flatten(fusion(features, closed=closed)), before)


@modes
@corners
@sizes
@pytest.mark.parametrize("kind", BASELINES)
def test_baseline_is_its_equation(kind, size, align_corners, training):
    levels = len(size)
    fusion = kind(CHANNELS[:levels], 4, align_corners=align_corners)
    fusion = randomise(fusion).double().train(training)
    assert_same(Flat(fusion, levels), draw(size), lambda *x: flatten(BASELINES[kind](fusion, x)))


@modes
@corners
@sizes
@pytest.mark.parametrize("literal", [False, True])
def test_dense_feature_pyramid_is_equation_6(literal, size, align_corners, training):
    levels, context = len(size), torch.randn(3, 7, 4, 5)
    pyramid = DenseFeaturePyramid(
        CHANNELS[:levels], 7, 4, literal=literal, align_corners=align_corners
    )
    pyramid = randomise(pyramid).double().train(training)
    assert len(pyramid([x.double() for x in draw(size)], context.double())) == levels + 1
    assert_same(
        Flat(pyramid, levels),
        [*draw(size), context],
        lambda *x: flatten(dense_pyramid(pyramid, x[:levels], x[levels])),
    )


def test_literal_pyramid_does_without_the_finest_map():
    features, context = draw(SIZES["backbone"]), torch.randn(3, 7, 6, 5)
    for literal in (False, True):
        pyramid = randomise(DenseFeaturePyramid(CHANNELS, 7, 4, literal=literal)).eval()
        same = [
            torch.equal(a, b)
            for a, b in zip(
                pyramid(features, context),
                pyramid([features[0] + 1, *features[1:]], context),
                strict=True,
            )
        ]
        assert same == [True, True, True, True, literal]


def test_parameters_of_the_text():
    """ResNet's four stages and a context map of 512 channels, all reduced to 256."""
    widths = (256, 512, 1024, 2048)
    with torch.device("meta"):
        reductions = parameters(AdditionFusion(widths))
        assert reductions == sum(widths) * 256 + 4 * 2 * 256 == 985_088
        assert parameters(ConcatFusion(widths)) == reductions
        assert parameters(FeaturePyramidFusion((*widths, 512))) == reductions + 512 * 256 + 512
        assert parameters(GatedFeaturePyramidFusion(widths)) == reductions + sum(widths) + 4
        fusion = parameters(GatedFullyFusion(widths))
        assert fusion == reductions + sum(widths) + 4 == 988_932
        assert parameters(GatedFullyFusion(widths, gate_from="reduced")) == reductions + 4 * 257
        pyramid = parameters(DenseFeaturePyramid([256] * 4, 512, literal=True))
        assert pyramid == 788_992
        assert parameters(DenseFeaturePyramid([256] * 4, 512)) == 1_051_136
    # PSPNet-101, two 3 x 3 convolutions a level, and a classifier of all levels beside the context.
    network = 65_707_475 + fusion + 4 * 2 * (9 * 256 * 256 + 512) + 4 * 256 * 19
    assert round(network / 1e6, 2) == 71.44
    # The classifier then sees y_0 in the context map's place.
    assert round((network + pyramid - 256 * 19) / 1e6, 2) == 72.22


WIDTHS = (3, 5, 4)
BLOCKS = {
    "GatedFullyFusion": lambda: GatedFullyFusion(WIDTHS, 4),
    "GatedFullyFusion-reduced": lambda: GatedFullyFusion(WIDTHS, 4, "reduced"),
    "ConcatFusion": lambda: ConcatFusion(WIDTHS, 4),
    "AdditionFusion": lambda: AdditionFusion(WIDTHS, 4),
    "FeaturePyramidFusion": lambda: FeaturePyramidFusion(WIDTHS, 4),
    "GatedFeaturePyramidFusion": lambda: GatedFeaturePyramidFusion(WIDTHS, 4),
    "DenseFeaturePyramid": lambda: DenseFeaturePyramid(WIDTHS, 7, 4),
}
blocks = pytest.mark.parametrize("name", BLOCKS)


def make(name, device="cpu"):
    return randomise(BLOCKS[name]()).to(device)


def levels_of(height, width, name, device="cpu"):
    """Three maps, the first twice as fine, and where it belongs to the inputs the context map."""
    size = [(2 * height, 2 * width), (height, width), (height, width)]
    features = [x.to(device) for x in draw(size, WIDTHS, batch=2)]
    if name != "DenseFeaturePyramid":
        return (features,)
    return features, torch.randn(2, 7, height, width, device=device)


@blocks
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_memory_format(name, layout, device):
    features, *context = levels_of(5, 7, name, device)
    change = LAYOUTS[layout]
    for y in make(name, device)([change(x) for x in features], *map(change, context)):
        assert y.stride() == change(y).stride()


@blocks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name, layout, device):
    block, (features, *context) = make(name, device).eval(), levels_of(5, 7, name, device)
    features, context = ([LAYOUTS[layout](x) for x in maps] for maps in (features, context))
    dense = [[x.contiguous() for x in maps] for maps in (features, context)]
    for y, expected in zip(block(features, *context), block(dense[0], *dense[1]), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@blocks
def test_one_image(name):
    block, (features, *context) = make(name).eval(), levels_of(1, 1, name)
    alone = block([x[1:] for x in features], *(x[1:] for x in context))
    for y, expected in zip(alone, block(features, *context), strict=True):
        torch.testing.assert_close(y, expected[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["GatedFullyFusion", "GatedFullyFusion-reduced", "DenseFeaturePyramid"], "GatedFullyFusion"
    ),
)
def test_compiles_once_for_all_sizes(name, device):
    torch._dynamo.reset()
    block = make(name, device).eval()
    # The exports trace what is behind dynamo's graph.
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        # Sizes that no count of channels shares: dynamo takes equal numbers for one.
        for size in ((11, 13), (16, 17)):
            inputs = levels_of(*size, name, device)
            for y, expected in zip(compiled(*inputs), block(*inputs), strict=True):
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("gate_from", ["input", "reduced"])
def test_compiled_in_training(gate_from, device):
    torch._dynamo.reset()
    block = randomise(GatedFullyFusion((3, 5), 4, gate_from)).to(device)
    features = [x.to(device).requires_grad_() for x in draw([(6, 9), (4, 5)])]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    leaves = [*features, *block.parameters()]
    expected = flatten(block(features))
    upstream = random_like(expected)
    expected_grads = torch.autograd.grad(expected, leaves, upstream)
    actual = flatten(compiled(features))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(actual, leaves, upstream)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", mostly_slow([*BLOCKS], "DenseFeaturePyramid"))
def test_exports_with_dynamic_sizes(name):
    block, inputs = make(name).eval(), levels_of(6, 5, name)
    height, width = (torch.export.Dim(n, min=2, max=4096) for n in ("height", "width"))
    coarse = {2: height, 3: width}
    shapes = [[{2: 2 * height, 3: 2 * width}, coarse, coarse], coarse][: len(inputs)]
    program = torch.export.export(block, inputs, dynamic_shapes=shapes)
    for size in ((17, 23), (2, 40)):
        inputs = levels_of(*size, name)
        for y, expected in zip(program.module()(*inputs), block(*inputs), strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GatedFullyFusion-reduced", "DenseFeaturePyramid"])
def test_exports_levels_of_independent_sizes(name):
    def inputs_of(*size):
        features = draw(size, WIDTHS, batch=1)
        return (features, torch.randn(1, 7, *size[2])) if "Pyramid" in name else (features,)

    block, inputs = make(name).eval(), inputs_of((33, 31), (17, 16), (9, 8))
    whichever = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    shapes = [[whichever] * 3, whichever][: len(inputs)]
    program = torch.export.export(block, inputs, dynamic_shapes=shapes)
    for size in (((65, 41), (33, 21), (17, 11)), ((9, 12), (5, 12), (3, 3))):
        inputs = inputs_of(*size)
        for y, expected in zip(program.module()(*inputs), block(*inputs), strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@blocks
def test_autocast(name, device):
    block, inputs = make(name, device).eval(), levels_of(6, 5, name, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = block(*inputs)
    for y, expected in zip(actual, block(*inputs), strict=True):
        assert (y - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("gate_from", ["input", "reduced"])
def test_autocast_with_closed_gates(gate_from, device):
    fusion = randomise(GatedFullyFusion(WIDTHS, 4, gate_from)).to(device).eval()
    (features,) = levels_of(6, 5, "", device)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = fusion(features, closed=(1,))
        open_dtypes = [y.dtype for y in fusion(features)]
    assert [y.dtype for y in actual] == open_dtypes
    for y, expected in zip(actual, fusion(features, closed=(1,)), strict=True):
        assert (y - expected).norm() < 0.03 * expected.norm()


@blocks
def test_bfloat16(name, device):
    block, inputs = make(name, device).eval(), levels_of(6, 5, name, device)
    expected = block(*inputs)
    features, *context = inputs
    actual = block.bfloat16()([x.bfloat16() for x in features], *(x.bfloat16() for x in context))
    for y, z in zip(actual, expected, strict=True):
        assert y.dtype == torch.bfloat16
        assert (y - z).norm() < 0.05 * z.norm()


def test_keys():
    def keys(module):
        return {key for key in module.state_dict() if "norm" not in key and "track" not in key}

    fusion = keys(GatedFullyFusion((3, 5), 4, norm_layer=lambda channels: nn.Identity()))
    reductions = {"reduce.0.0.weight", "reduce.1.0.weight"}
    gate = {"gate.0.weight", "gate.0.bias", "gate.1.weight", "gate.1.bias"}
    assert fusion == reductions | gate
    pyramid = DenseFeaturePyramid((3, 5), 7, 4, norm_layer=lambda channels: nn.Identity())
    assert keys(pyramid) == {"reduce.0.weight", "fuse.0.conv.weight", "fuse.1.conv.weight"}


@blocks
def test_state_dict_round_trip(name):
    block, other, inputs = make(name).eval(), make(name).eval(), levels_of(6, 5, name)
    other.load_state_dict(block.state_dict())
    for y, expected in zip(other(*inputs), block(*inputs), strict=True):
        torch.testing.assert_close(y, expected)


def test_says_what_it_is():
    fusion = GatedFullyFusion([3, 5], 4, "reduced", align_corners=False)
    assert "(3, 5), channels=4, align_corners=False, gate_from='reduced'" in repr(fusion)
    assert "(3, 5), context_channels=7, channels=4, literal=True" in repr(
        DenseFeaturePyramid((3, 5), 7, 4, literal=True)
    )


def maps(*shapes):
    return [torch.ones(shape) for shape in shapes]


FUSIONS = [GatedFullyFusion, *BASELINES, lambda widths, *rest: DenseFeaturePyramid(widths, 7)]
GOOD = [(1, 3, 4, 4), (1, 5, 2, 2)]


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize(
    ("widths", "error", "message"),
    [
        ([3], ValueError, r"in_channels must have at least two levels, got \[3\]"),
        (3, TypeError, "in_channels must be a list or tuple of integers, got 3"),
        ([3, 0], ValueError, r"in_channels\[1\] must be at least 1, got 0"),
        ([3, 5.0], TypeError, r"in_channels\[1\] must be an integer, got 5\.0"),
    ],
)
def test_bad_levels(kind, widths, error, message):
    with pytest.raises(error, match=message):
        kind(widths)


@pytest.mark.parametrize("kind", FUSIONS)
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 3, 4, 4)], "features must have 2 levels, got 1"),
        ([*GOOD, (1, 6, 2, 2)], "features must have 2 levels, got 3"),
        (
            [(1, 3, 4, 4), (1, 4, 2, 2)],
            r"features\[1\] must have shape \(B, 5, H, W\), got \(1, 4, 2, 2\)",
        ),
        (
            [(1, 3, 4, 4), (2, 5, 2, 2)],
            r"features\[1\] must have the batch and device of features\[0\], 1 on cpu, got 2 on",
        ),
        (
            [(1, 3, 4, 4), (1, 5, 0, 2)],
            r"features\[1\] must have C, H and W of at least 1, got \(1, 5, 0, 2\)",
        ),
        ([(1, 3, 4, 4), (5, 2, 2)], r"features\[1\] must have shape \(B, C, H, W\)"),
    ],
)
def test_bad_features(kind, shapes, message):
    fusion = kind([3, 5])
    context = maps((1, 7, 2, 2)) if isinstance(fusion, DenseFeaturePyramid) else []
    with pytest.raises(ValueError, match=message):
        fusion(maps(*shapes), *context)


@pytest.mark.parametrize("kind", FUSIONS)
def test_features_that_are_no_list(kind):
    fusion = kind([3, 5])
    context = maps((1, 7, 2, 2)) if isinstance(fusion, DenseFeaturePyramid) else []
    with pytest.raises(TypeError, match="features must be a list or tuple of tensors, got Tensor"):
        fusion(torch.ones(2, 3, 4, 4), *context)
    with pytest.raises(TypeError, match=r"features\[0\] must be a torch\.Tensor, got list"):
        fusion([[1], [2]], *context)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: GatedFullyFusion([3, 5], 4, "output"),
            ValueError,
            r"gate_from must be one of \('input', 'reduced'\), got 'output'",
        ),
        (lambda: GatedFullyFusion([3, 5], 0), ValueError, "channels must be at least 1, got 0"),
        (
            lambda: GatedFullyFusion([3, 5])(maps(*GOOD), closed=(2,)),
            ValueError,
            r"closed must be a list or tuple of levels from 0 to 1, got \(2,\)",
        ),
        (
            lambda: GatedFullyFusion([3, 5])(maps(*GOOD), closed=(1.0,)),
            ValueError,
            r"closed must be a list or tuple of levels from 0 to 1, got \(1.0,\)",
        ),
        (
            lambda: GatedFullyFusion([3, 5])(maps(*GOOD), closed=0),
            ValueError,
            "closed must be a list or tuple of levels from 0 to 1, got 0",
        ),
        (
            lambda: GatedFullyFusion([3, 5]).gates(maps((1, 3, 4, 4))),
            ValueError,
            "features must have 2 levels, got 1",
        ),
        (
            lambda: DenseFeaturePyramid([3, 5], 0),
            ValueError,
            "context_channels must be at least 1, got 0",
        ),
        (
            lambda: DenseFeaturePyramid([3, 5], 7)(maps(*GOOD), torch.ones(1, 6, 2, 2)),
            ValueError,
            r"context must have shape \(B, 7, H, W\), got \(1, 6, 2, 2\)",
        ),
        (
            lambda: DenseFeaturePyramid([3, 5], 7)(maps(*GOOD), torch.ones(2, 7, 2, 2)),
            ValueError,
            r"context must have the batch and device of features\[0\], 1 on cpu, got 2 on cpu",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
