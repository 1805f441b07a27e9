# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("timm")

from ctxops.models import create_model
from ctxops.nn import BoundaryRefinement, GCNBottleneck
from modules import randomise


def network(**options):
    return create_model("gcn", "test_resnet", 5, **({"kernel_size": 3} | options))


def last_score(**options):
    """Parameters of the score layer on the last map, 2048 channels, as in Tables 2 and 4."""
    with torch.device("meta"):
        model = create_model("gcn", "resnet50", 21, **options)
    return sum(p.numel() for p in model.decoder.score[-1].parameters())


@pytest.mark.parametrize(
    ("kernel_size", "gcn", "convolution"),
    [
        (3, 260_694, 387_072),
        (5, 434_490, 1_075_200),
        (7, 608_286, 2_107_392),
        (9, 782_082, 3_483_648),
    ],
)
def test_parameters_of_table_2(kernel_size, gcn, convolution):
    assert last_score(kernel_size=kernel_size) == gcn
    assert last_score(kernel_size=kernel_size, score="conv") == convolution


@pytest.mark.parametrize(
    ("mid_channels", "parameters"), [(None, 75_884_544), (1024, 28_505_088), (210, 4_307_310)]
)
def test_parameters_of_table_4(mid_channels, parameters):
    options = {"score": "stack", "kernel_size": 7, "mid_channels": mid_channels}
    assert last_score(**options) == parameters


def test_resnet50_gcn():
    with torch.device("meta"):
        model = create_model("gcn", "resnet50", 21, global_backbone=True)
    body = model.encoder.body
    convolutions = [m for m in body.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.weight.numel() for m in convolutions) == 20_448_796
    for stage, blocks, width, kernel_size in (("layer3", 6, 85, 5), ("layer4", 3, 128, 7)):
        assert len(body[stage]) == blocks
        for block in body[stage]:
            assert isinstance(block, GCNBottleneck)
            first = block.vertical_first[0][0]
            assert (first.out_channels, first.kernel_size) == (width, (kernel_size, 1))
    assert model.encoder.strides == (4, 8, 16, 32)


def test_norm_layer_reaches_the_global_stages():
    with torch.device("meta"):
        model = create_model("gcn", "resnet50", global_backbone=True, norm_layer=nn.InstanceNorm2d)
    for stage in ("layer3", "layer4"):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.encoder.body[stage].modules())


def test_resnet_gcn_keeps_the_sizes_of_the_maps():
    x = torch.randn(1, 3, 65, 67)
    plain, with_gcn = (
        create_model("gcn", "resnet10t", 5, global_backbone=flag).eval().encoder(x)
        for flag in (False, True)
    )
    assert [y.shape for y in with_gcn] == [y.shape for y in plain]


def test_scores_are_added_from_the_last_level_down():
    model = network(score="pointwise", boundary_refinement=False).eval()
    image = torch.randn(1, 3, 65, 129)
    expected = None
    for x, score in reversed(list(zip(model.encoder(image), model.decoder.score, strict=True))):
        scores = torch.einsum("oc,bchw->bohw", score.weight[:, :, 0, 0], x)
        scores = scores + score.bias[:, None, None]
        if expected is not None:
            scores = scores + F.interpolate(
                expected, x.shape[2:], mode="bilinear", align_corners=True
            )
        expected = scores
    for size in ((33, 65), (65, 129)):
        expected = F.interpolate(expected, size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(model(image).logits, expected)


def test_every_map_of_scores_is_refined():
    model = randomise(network(score="pointwise")).double().eval()
    refinements = [m for m in model.modules() if isinstance(m, BoundaryRefinement)]
    assert len(refinements) == 4 + 3 + 2
    heights = []
    for m in refinements:
        m.register_forward_hook(lambda module, inputs, output: heights.append(output.shape[2]))
    model(torch.randn(1, 3, 65, 67, dtype=torch.float64))
    assert heights == [17, 9, 5, 3, 5, 9, 17, 33, 65]


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (65, 67), (37, 53), (1, 1)])
def test_sizes(size, ceil_mode):
    model = network(ceil_mode=ceil_mode).eval()
    assert model(torch.randn(1, 3, *size)).logits.shape == (1, 5, *size)


def test_backbone_that_rounds_sizes_down():
    model = create_model("gcn", "test_convnext", 5, kernel_size=3).eval()
    assert model(torch.randn(1, 3, 37, 53)).logits.shape == (1, 5, 37, 53)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "dense"}, "score must be one of"),
        ({"kernel_size": 4}, "kernel_size must be odd .* got 4"),
        ({"score": "stack", "kernel_size": 1}, "kernel_size must be odd and at least 3, got 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_global_backbone_is_for_resnets():
    with pytest.raises(ValueError, match=r"global_backbone is for ResNets: .*'test_convnext'"):
        create_model("gcn", "test_convnext", 5, global_backbone=True)
