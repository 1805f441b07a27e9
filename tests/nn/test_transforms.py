# SPDX-License-Identifier: Apache-2.0
"""Modules under torch.func's transforms, and with keys of fewer channels."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from ctxops.nn import (
    AFNB,
    APNB,
    ASPP,
    CGNL,
    GALD,
    AdaptiveContext,
    AdditionFusion,
    ConcatFusion,
    CrissCrossAttention,
    DatasetContextAggregation,
    DenseASPP,
    DenseFeaturePyramid,
    DisentangledNonLocal,
    DualAttention,
    FeaturePyramidFusion,
    FusionNonLocal2d,
    GatedFeaturePyramidFusion,
    GatedFullyFusion,
    GlobalConvolution,
    LDv1,
    LDv2,
    NonLocal2d,
    ObjectContext,
    PointwiseSpatialAttention,
    PyramidPooling,
)
from modules import randomise

LOW, HIGH = (6, 5, 7), (8, 6, 9)
SAME = (6, 6, 9)
# A module and the (C, H, W) of its maps; a list of them where it takes a list.
MODULES = {
    "APNB": (lambda: APNB(8, 4, 4, output_sizes=(1, 2), fuse="concat"), [HIGH]),
    "APNB max": (lambda: APNB(8, 4, 4, output_sizes=(1, 2), sampling="max"), [HIGH]),
    "APNB paper": (lambda: APNB(8, 4, 4, output_sizes=(1, 2), variant="paper"), [HIGH]),
    "AFNB": (lambda: AFNB(6, 8, 4, 4, output_sizes=(1, 2), fuse="concat"), [LOW, HIGH]),
    "NonLocal2d": (lambda: NonLocal2d(8, 4, 4, fuse="add"), [HIGH]),
    "FusionNonLocal2d": (lambda: FusionNonLocal2d(6, 8, 4, 4), [LOW, HIGH]),
    "ASPP": (lambda: ASPP(8, 4, (2, 3)), [HIGH]),
    "AdaptiveContext": (lambda: AdaptiveContext(8, 4, (1, 2)), [HIGH]),
    "CGNL": (lambda: CGNL(8, 8), [HIGH]),
    "CrissCrossAttention": (lambda: CrissCrossAttention(8, 2), [HIGH]),
    "DenseASPP": (lambda: DenseASPP(8, 6, 4, (1, 2)), [HIGH]),
    "DisentangledNonLocal": (lambda: DisentangledNonLocal(8, temperature=5), [HIGH]),
    "DualAttention": (lambda: DualAttention(8, 6, reduction=2), [HIGH]),
    "GALD": (lambda: GALD(CGNL(8, 8), LDv2(8, 8, 8, 3), channels=8), [HIGH]),
    "GlobalConvolution": (lambda: GlobalConvolution(8, 4, 5), [HIGH]),
    "LDv1": (lambda: LDv1(8, ratio=2), [HIGH]),
    "LDv2": (lambda: LDv2(6, 8, 4, 3), [SAME, HIGH]),
    "PyramidPooling": (lambda: PyramidPooling(8, 4, (1, 2)), [HIGH]),
    "PointwiseSpatialAttention": (lambda: PointwiseSpatialAttention(8, 6, (5, 7)), [HIGH]),
    "AdditionFusion": (lambda: AdditionFusion([6, 8], 4), [[LOW, HIGH]]),
    "ConcatFusion": (lambda: ConcatFusion([6, 8], 4), [[LOW, HIGH]]),
    "FeaturePyramidFusion": (lambda: FeaturePyramidFusion([6, 8], 4), [[LOW, HIGH]]),
    "GatedFeaturePyramidFusion": (lambda: GatedFeaturePyramidFusion([6, 8], 4), [[LOW, HIGH]]),
    "GatedFullyFusion": (lambda: GatedFullyFusion([6, 8], 4), [[LOW, HIGH]]),
    "GatedFullyFusion reduced": (lambda: GatedFullyFusion([6, 8], 4, "reduced"), [[LOW, HIGH]]),
    "DenseFeaturePyramid": (lambda: DenseFeaturePyramid([6, 8], 8, 4), [[LOW, HIGH], HIGH]),
}

modules = pytest.mark.parametrize("name", MODULES)


def made(name):
    """The module in evaluation, in float64, and three samples of a batch of two."""
    build, shapes = MODULES[name]

    def draw(shape):
        if isinstance(shape, list):
            return [draw(each) for each in shape]
        return torch.randn(3, 2, *shape, dtype=torch.float64)

    return randomise(build()).double().eval(), [draw(shape) for shape in shapes]


def sample(inputs, i):
    return [sample(x, i) if isinstance(x, list) else x[i] for x in inputs]


def flat(output):
    return torch.cat([y.flatten() for y in output]) if isinstance(output, tuple) else output


@modules
def test_vmap_is_a_loop(name):
    module, inputs = made(name)
    expected = torch.stack([flat(module(*sample(inputs, i))) for i in range(3)])
    torch.testing.assert_close(vmap(lambda *x: flat(module(*x)))(*inputs), expected)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", [n for n, (_, shapes) in MODULES.items() if len(shapes) == 2])
def test_vmap_over_one_map_alone(name, which):
    module, inputs = made(name)
    fixed = sample(inputs, 0)
    axes = tuple(0 if i == which else None for i in range(2))
    mapped = [inputs[i] if i == which else fixed[i] for i in range(2)]
    expected = torch.stack(
        [
            flat(module(*[sample(inputs, k)[i] if i == which else fixed[i] for i in range(2)]))
            for k in range(3)
        ]
    )
    torch.testing.assert_close(vmap(lambda *x: flat(module(*x)), axes)(*mapped), expected)


@modules
def test_gradients_of_each_sample(name):
    module, inputs = made(name)
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def loss(parameters, *inputs):
        return flat(functional_call(module, parameters, inputs)).square().mean()

    axes = (None, *[0] * len(inputs))
    actual = vmap(grad(loss), axes)(parameters, *inputs)
    for i in range(3):
        module.zero_grad()
        flat(module(*sample(inputs, i))).square().mean().backward()
        for n, p in module.named_parameters():
            torch.testing.assert_close(actual[n][i], p.grad, rtol=1e-6, atol=1e-9, msg=n)


# A module that attends, its inputs, and the layers that make its query and key.
ATTENDING = {
    "AFNB": (
        lambda: AFNB(6, 8, 4, 4, output_sizes=(1, 2)),
        [LOW, HIGH],
        lambda module: [module.query, module.key],
    ),
    "APNB": (lambda: APNB(8, 4, 4, output_sizes=(1, 2)), [HIGH], lambda module: [module.key]),
    "DatasetContextAggregation": (
        lambda: DatasetContextAggregation(8, 8),
        [HIGH, (5, *HIGH[1:]), None],
        lambda module: [module.attention.query[3:], module.attention.key[3:]],
    ),
    "DisentangledNonLocal": (
        lambda: DisentangledNonLocal(8, 4, temperature=5),
        [HIGH],
        lambda module: [[module.query], [module.key]],
    ),
    "LDv2": (
        lambda: LDv2(6, 8, 4, 3, scale=None),
        [SAME, HIGH],
        lambda module: [[module.query], [module.key]],
    ),
    "NonLocal2d": (lambda: NonLocal2d(8, 4, 4), [HIGH], lambda module: [module.key]),
    "ObjectContext": (
        lambda: ObjectContext(8, 6, 4),
        [HIGH, (5, *HIGH[1:])],
        lambda module: [module.query[3:], module.key[3:]],
    ),
}


@pytest.mark.parametrize("name", ATTENDING)
def test_keys_that_lose_channels_of_zeros_attend_as_before(name):
    build, shapes, layers = ATTENDING[name]
    module = randomise(build()).double().eval()
    # Large, that attention is sharp.
    inputs = [
        5 * torch.randn((5, 8) if shape is None else (2, *shape), dtype=torch.float64)
        for shape in shapes
    ]
    made = [layer for part in layers(module) for layer in part if hasattr(layer, "weight")]
    with torch.no_grad():
        for tensor in (tensor for layer in made for tensor in layer.parameters()):
            tensor[:2] = 3 * tensor[:2].abs()
            tensor[2:] = 0
    before = module(*inputs)
    for layer in made:
        for name, tensor in layer.named_parameters():
            setattr(layer, name, nn.Parameter(tensor[:2]))
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean, layer.running_var = layer.running_mean[:2], layer.running_var[:2]
    torch.testing.assert_close(module(*inputs), before)


@modules
def test_traced_modules_take_other_sizes(name):
    module, inputs = made(name)
    inputs = sample(inputs, 0)
    traced = torch.jit.trace(module, tuple(inputs), check_trace=False)

    def doubled(x):
        return [doubled(y) for y in x] if isinstance(x, list) else torch.cat([x, x.flip(3)], dim=3)

    inputs = [doubled(x) for x in inputs]
    torch.testing.assert_close(flat(traced(*inputs)), flat(module(*inputs)))
