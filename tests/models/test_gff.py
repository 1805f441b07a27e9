# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("timm")

from ctxops.models import create_model
from ctxops.nn import DenseASPP
from modules import randomise

WIDTHS = (32, 48, 192, 96)


def count(name="gff", **options):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **options).parameters())


def network(**options):
    model = create_model("gff", "test_resnet", 5, channels=8, context_channels=16, **options)
    return randomise(model).double().eval()


def maps():
    sizes = ((17, 19), (9, 10), (9, 10), (9, 10))
    return [
        torch.randn(2, width, *size, dtype=torch.float64)
        for width, size in zip(WIDTHS, sizes, strict=True)
    ]


def at_finest(x):
    return F.interpolate(x, (17, 19), mode="bilinear", align_corners=True)


def test_parameters():
    """The authors' PSPNet, and what the text builds on it."""
    baseline = count("pspnet", branch_activation=False, auxiliary_channels=0)
    assert baseline == 65_707_475
    levels = sum(width * 256 + 2 * 256 + width + 1 for width in (256, 512, 1024, 2048))
    refinements = 4 * 2 * (256 * 256 * 9 + 2 * 256)
    fused = count(dense_pyramid=False, auxiliary_channels=0)
    assert fused - baseline == levels + refinements + 4 * 256 * 19
    assert round(fused / 1e6, 2) == 71.44
    dense = count(literal=True, auxiliary_channels=0)
    assert dense - fused == 788_992 - 256 * 19 - refinements // 4
    assert round(dense / 1e6, 2) == 71.04


@pytest.mark.parametrize("fusion", ["concat", "addition", "gff"])
@pytest.mark.parametrize("gate_from", ["input", "reduced"])
def test_every_parameter_gets_a_gradient(fusion, gate_from):
    """One that does not stops DistributedDataParallel."""
    model = network(fusion=fusion, gate_from=gate_from, literal=True).train()
    output = model(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    sum(y.square().mean() for y in (output.logits, *output.auxiliary.values())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("fusion", ["fpn", "gated_fpn"])
def test_feature_pyramids_are_not_literal(fusion):
    with pytest.raises(ValueError, match=f"literal=True .* fusion='{fusion}'"):
        network(fusion=fusion, literal=True)


@pytest.mark.parametrize("fusion", ["concat", "addition", "fpn", "gated_fpn", "gff"])
def test_maps_in_front_of_the_classifier(fusion):
    decoder = network(fusion=fusion, dense_pyramid=False).decoder
    features = maps()
    context = decoder.context(features[-1])
    top = [context] if "fpn" in fusion else []
    fused = decoder.fusion([*features, *top])
    levels = [refine(fused[level]) for level, refine in enumerate(decoder.refine)]
    expected = torch.cat([at_finest(x) for x in (context, *levels)], dim=1)
    torch.testing.assert_close(decoder(*features), expected)
    assert expected.shape[1] == 16 + 4 * 8


@pytest.mark.parametrize("literal", [False, True])
def test_dense_pyramid_sees_refined_levels_and_context(literal):
    decoder = network(literal=literal).decoder
    features = maps()
    context = decoder.context(features[-1])
    levels = [refine(x) for refine, x in zip(decoder.refine, decoder.fusion(features), strict=True)]
    expected = torch.cat(decoder.pyramid(levels, context), dim=1)
    torch.testing.assert_close(decoder(*features), expected)
    assert decoder.pyramid.literal == literal
    assert expected.shape[1] == 5 * 8


def test_gates_of_reduced_maps():
    assert network(gate_from="reduced").decoder.fusion.gate_from == "reduced"


def test_branches_of_the_context_have_no_relu():
    branches = network().decoder.context.branches
    assert not any(isinstance(layer, torch.nn.ReLU) for branch in branches for layer in branch)


@pytest.mark.parametrize("dense_pyramid", [False, True])
def test_dense_aspp_as_context(dense_pyramid):
    decoder = network(context="denseaspp", dense_pyramid=dense_pyramid).decoder
    assert isinstance(decoder.context[1], DenseASPP)
    features = maps()
    width = 8 if dense_pyramid else WIDTHS[-1] // 2 + 5 * 128
    assert decoder(*features).shape == (2, width + 4 * 8, 17, 19)


def test_errors():
    with pytest.raises(ValueError, match="context must be one of"):
        network(context="psp")
    with pytest.raises(ValueError, match="fusion must be one of"):
        network(fusion="sum")
    with torch.device("meta"), pytest.raises(ValueError, match="'hrnet_w18_small' has 1"):
        create_model("gff", "hrnet_w18_small", 5, output_stride=4)
