# SPDX-License-Identifier: Apache-2.0
"""Modules with fewer channels than they were built with."""

import inspect

import pytest
import torch
from torch import nn

import ctxops.nn
from ctxops.nn import (
    AFNB,
    APNB,
    ASPP,
    CGNL,
    GALD,
    AdaptiveContext,
    AdditionFusion,
    AsymmetricNonLocalContext,
    BilinearDeconvolution,
    BoundaryRefinement,
    ChannelAttention,
    CommonFusion,
    ConcatContext,
    ConcatFusion,
    ConvolutionStack,
    CrissCrossAttention,
    DatasetContextAggregation,
    DenseASPP,
    DenseFeaturePyramid,
    DisentangledNonLocal,
    DualAttention,
    FeatureMemory,
    FeaturePyramidFusion,
    FusionNonLocal2d,
    GatedFeaturePyramidFusion,
    GatedFullyFusion,
    GCNBottleneck,
    GlobalConvolution,
    LDv1,
    LDv2,
    NonLocal2d,
    ObjectContext,
    PointwiseSpatialAttention,
    PositionAttention,
    ProgressiveUpsampling,
    PyramidPooling,
    RecurrentCrissCrossAttention,
    ScorePyramid,
    UPerDecoder,
)
from modules import randomise

LABELS = torch.arange(35).reshape(1, 5, 7) % 3


# A module built with c channels here and there, and what it takes then: channels of maps, or the
# arguments themselves. The scales of attention are given, or their widths stay: a scale is that of
# the width that was trained.
CASES = {
    "APNB": (lambda c: APNB(2 * c, c, c, None, (1, 2), fuse="concat", scale=1), lambda c: [2 * c]),
    "APNB add": (lambda c: APNB(c, c, 3, None, (1, 2), fuse="add", scale=1), lambda c: [c]),
    "APNB paper": (
        lambda c: APNB(c, c, 3, None, (1, 2), variant="paper", share=None), lambda c: [c],
    ),
    "AFNB": (lambda c: AFNB(c, 2 * c, 4, c, None, (1, 2), fuse="concat"), lambda c: [c, 2 * c]),
    "NonLocal2d": (lambda c: NonLocal2d(2 * c, 4, c, fuse="concat"), lambda c: [2 * c]),
    "FusionNonLocal2d": (lambda c: FusionNonLocal2d(c, 2 * c, 4, c), lambda c: [c, 2 * c]),
    "ASPP": (lambda c: ASPP(2 * c, c, (2, 3)), lambda c: [2 * c]),
    "CGNL": (lambda c: CGNL(2 * c, 4 * c, 2), lambda c: [2 * c]),
    "GALD": (
        lambda c: GALD(CGNL(2 * c, 4, 2), LDv2(2 * c, 2 * c, c, 3), channels=2 * c),
        lambda c: [2 * c],
    ),
    "GALD ldga": (
        lambda c: GALD(CGNL(6, 4, 2), LDv2(0, c, 6, 3), "ldga", channels=c), lambda c: [c],
    ),
    "GALD parallel": (
        lambda c: GALD(CGNL(c, 2, 1), LDv1(c, ratio=2), "parallel", 1, channels=c), lambda c: [c],
    ),
    "GALD without convolutions": (lambda c: GALD(None, LDv1(c, "avg"), channels=c), lambda c: [c]),
    "AdaptiveContext": (lambda c: AdaptiveContext(2 * c, c, (1, 2)), lambda c: [2 * c]),
    "AdditionFusion": (lambda c: AdditionFusion([c, 2 * c], c), lambda c: [[c, 2 * c]]),
    "AsymmetricNonLocalContext": (
        lambda c: AsymmetricNonLocalContext(
            c, 2 * c, c, key_channels=4, value_channels=c, output_sizes=(1, 2)
        ),
        lambda c: [c, 2 * c],
    ),
    "BilinearDeconvolution": (BilinearDeconvolution, lambda c: [c, (9, 13)]),
    "BoundaryRefinement": (BoundaryRefinement, lambda c: [c]),
    "ChannelAttention": (ChannelAttention, lambda c: [c]),
    "CommonFusion": (lambda c: CommonFusion(c, 2 * c), lambda c: [c, 2 * c]),
    "ConcatContext": (
        lambda c: ConcatContext(nn.Conv2d(2 * c, c, 1), 2 * c, c, 6), lambda c: [2 * c],
    ),
    "ConcatContext without convolutions": (
        lambda c: ConcatContext(ChannelAttention(c), c, c, 2 * c), lambda c: [c],
    ),
    "ConcatFusion": (lambda c: ConcatFusion([c, 2 * c], c), lambda c: [[c, 2 * c]]),
    "ConvolutionStack": (lambda c: ConvolutionStack(c, 3, 5, 2 * c), lambda c: [c]),
    "CrissCrossAttention": (lambda c: CrissCrossAttention(2 * c, 2), lambda c: [2 * c]),
    "DatasetContextAggregation": (
        lambda c: DatasetContextAggregation(2 * c, c + 4, 2 * c),
        lambda c: [c + 4, 3, torch.randn(3, c + 4), 2 * c],
    ),
    **{
        f"DatasetContextAggregation {fusion}": (
            lambda c, fusion=fusion, within=within: DatasetContextAggregation(
                2 * c, c + 4, within(c), within_attention=False, fusion=fusion
            ),
            lambda c, within=within: [c + 4, 3, torch.randn(3, c + 4), within(c)],
        )
        for fusion, within in {
            "concat": lambda c: 2 * c,
            "add": lambda c: c + 4,
            "weighted_add": lambda c: c + 4,
        }.items()
    },
    "DenseASPP": (lambda c: DenseASPP(2 * c, 6, c, (1, 2)), lambda c: [2 * c]),
    "DenseFeaturePyramid": (
        lambda c: DenseFeaturePyramid([c, 2 * c], 3 * c, c), lambda c: [[c, 2 * c], 3 * c],
    ),
    "DenseFeaturePyramid literal": (
        lambda c: DenseFeaturePyramid([c, 2 * c], 3 * c, c, literal=True),
        lambda c: [[c, 2 * c], 3 * c],
    ),
    "DisentangledNonLocal": (
        lambda c: DisentangledNonLocal(2 * c, temperature=5, use_scale=False), lambda c: [2 * c],
    ),
    "DualAttention": (lambda c: DualAttention(2 * c, c, reduction=2), lambda c: [2 * c]),
    "FeatureMemory": (
        lambda c: FeatureMemory(3, c, momentum="constant", init="mean"), lambda c: [c, LABELS],
    ),
    "FeaturePyramidFusion": (
        lambda c: FeaturePyramidFusion([c, 2 * c], c), lambda c: [[c, 2 * c]],
    ),
    "GCNBottleneck": (lambda c: GCNBottleneck(2 * c, c, 2 * c, 5), lambda c: [2 * c]),
    "GatedFeaturePyramidFusion": (
        lambda c: GatedFeaturePyramidFusion([c, 2 * c], c), lambda c: [[c, 2 * c]],
    ),
    "GatedFullyFusion": (lambda c: GatedFullyFusion([c, 2 * c], c), lambda c: [[c, 2 * c]]),
    "GatedFullyFusion reduced": (
        lambda c: GatedFullyFusion([c, 2 * c], c, "reduced"), lambda c: [[c, 2 * c]],
    ),
    "GlobalConvolution": (lambda c: GlobalConvolution(2 * c, c, 5), lambda c: [2 * c]),
    "LDv1": (lambda c: LDv1(c, ratio=2), lambda c: [c]),
    "LDv1 without convolutions": (lambda c: LDv1(c, "bilinear"), lambda c: [c]),
    "LDv2": (lambda c: LDv2(c, 2 * c, c, 3), lambda c: [c, 2 * c]),
    "LDv2 with sources": (
        lambda c: LDv2(c, 2 * c, c, 3, query_from="local", key_from="global"), lambda c: [c, 2 * c],
    ),
    "LDv2 without X_g": (lambda c: LDv2(0, 2 * c, c, 3), lambda c: [2 * c]),
    "ObjectContext": (lambda c: ObjectContext(2 * c, c, 4), lambda c: [2 * c, 3]),
    "PointwiseSpatialAttention": (
        lambda c: PointwiseSpatialAttention(2 * c, c, (5, 7)), lambda c: [2 * c],
    ),
    "PositionAttention": (lambda c: PositionAttention(c, 2), lambda c: [c]),
    "ProgressiveUpsampling": (
        lambda c: ProgressiveUpsampling(4, c, lambda: BoundaryRefinement(c)),
        lambda c: [c, (17, 25)],
    ),
    "PyramidPooling": (lambda c: PyramidPooling(2 * c, c, (1, 2)), lambda c: [2 * c]),
    "RecurrentCrissCrossAttention": (
        lambda c: RecurrentCrissCrossAttention(2 * c, c, reduction=2), lambda c: [2 * c],
    ),
    "ScorePyramid": (
        lambda c: ScorePyramid(
            [2 * c, c], [1, 1], c, lambda width: nn.Conv2d(width, c, 1), lambda: nn.Identity()
        ),
        lambda c: [2 * c, c],
    ),
    "UPerDecoder": (lambda c: UPerDecoder([c, 2 * c], c, (1, 2)), lambda c: [c, 2 * c]),
}  # fmt: skip
ANY_WIDTH = {
    "ChannelAttention", "LDv1 without convolutions", "GALD without convolutions",
}  # fmt: skip


def test_every_module_that_takes_channels_is_among_them():
    kinds = {name: getattr(ctxops.nn, name) for name in ctxops.nn.__all__}
    wanted = {
        name
        for name, kind in kinds.items()
        if isinstance(kind, type)
        and any("channels" in p for p in inspect.signature(kind).parameters)
    }
    assert {name.split()[0] for name in CASES} == wanted


def draw(argument):
    if isinstance(argument, list):
        return [draw(each) for each in argument]
    return torch.randn(1, argument, 5, 7) if isinstance(argument, int) else argument


def narrow(module: nn.Module, like: nn.Module) -> None:
    """What a tool that prunes channels does: torch's layers and the bare tensors are others."""
    for wide, other in zip(module.modules(), like.modules(), strict=True):
        if isinstance(other, (nn.modules.conv._ConvNd, nn.BatchNorm2d, nn.GroupNorm)):
            vars(wide).update(vars(other))
        wide._parameters, wide._buffers = other._parameters, other._buffers


def result(module, inputs):
    y = module(*inputs)
    return module.memory.clone() if isinstance(module, FeatureMemory) else y


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_goes_by_its_convolutions(name):
    """It computes what it would have computed if it had been built so."""
    build, arguments = CASES[name]
    module, like = (randomise(build(c)).eval() for c in (5, 4))
    inputs = [draw(argument) for argument in arguments(4)]
    expected = result(like, inputs)
    if name not in ANY_WIDTH:
        with pytest.raises((ValueError, RuntimeError)):
            module(*inputs)
    narrow(module, like)
    if name == "FeatureMemory":
        module.memory.zero_()
    torch.testing.assert_close(result(module, inputs), expected)
    if name not in ANY_WIDTH:
        with pytest.raises((ValueError, RuntimeError)):
            module(*map(draw, arguments(5)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda c: APNB(c, 4, 4), r"x must have shape \(B, 4, H, W\), got \(1, 6, 5, 7\)"),
        (lambda c: GlobalConvolution(c, 3, 5), r"x must have shape \(B, 4, H, W\), got"),
        (
            lambda c: ConcatContext(ChannelAttention(c), c, c, 6),
            r"x and context\(x\) must have 8 channels in all, got \[6, 6\]",
        ),
    ],
)
def test_says_what_a_pruned_convolution_takes(build, message):
    module = build(5)
    narrow(module, build(4))
    with pytest.raises(ValueError, match=message):
        module(torch.randn(1, 6, 5, 7))


@torch.no_grad()
def test_a_pruned_module_compiles():
    build, arguments = CASES["LDv2"]
    module = randomise(build(5)).eval()
    narrow(module, randomise(build(4)).eval())
    inputs = [draw(argument) for argument in arguments(4)]
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), module(*inputs))
