# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

pytest.importorskip("timm")

from ctxops.models import create_model
from ctxops.nn import ASPP, CGNL, LDv1, LDv2, NonLocal2d, PyramidPooling
from modules import randomise

AGGREGATIONS = {
    None: type(None),
    "ppm": PyramidPooling,
    "aspp": ASPP,
    "nonlocal": NonLocal2d,
    "cgnl": CGNL,
}
DISTRIBUTIONS = {None: type(None), "ldv1": LDv1, "ldv2": LDv2}


def count(**options):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model("gald", **options).parameters())


def network(**options):
    model = create_model("gald", "test_resnet", 5, channels=16, **options)
    return randomise(model).double().eval()


def test_parameters_of_the_released_network():
    assert count(auxiliary_channels=0) == 66_664_915
    assert count() == 71_394_790


def test_parameters_of_the_parts():
    whole = count()
    assert whole - count(local_distribution=None) == 18_432
    down = 512 * 9 + 512 + 2 * 512
    assert whole - count(global_aggregation=None) == 410_624 + down


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("arrangement", ["gald", "ldga", "parallel"])
def test_parts_and_their_arrangement(aggregation, distribution, arrangement):
    options = {"global_aggregation": aggregation, "local_distribution": distribution}
    if not (aggregation or distribution) or (
        arrangement != "gald" and not (aggregation and distribution)
    ):
        with pytest.raises(ValueError, match="global_aggregation and local_distribution"):
            network(arrangement=arrangement, **options)
        return
    model = network(arrangement=arrangement, **options)
    _, block, _ = model.decoder.context
    assert type(block.global_aggregation) is AGGREGATIONS[aggregation]
    assert type(block.local_distribution) is DISTRIBUTIONS[distribution]
    assert block.arrangement == arrangement
    assert model(torch.randn(1, 3, 65, 67, dtype=torch.float64)).logits.shape == (1, 5, 65, 67)


def test_head():
    decoder = network().decoder
    x = torch.randn(2, 96, 9, 10, dtype=torch.float64)
    reduce, block, out = decoder.context
    expected = decoder.fuse(torch.cat([x, out(block(reduce(x)))], dim=1))
    torch.testing.assert_close(decoder(x), expected)


def test_nonlocal_block_has_the_residual_and_the_plain_affinity():
    _, block, _ = network(global_aggregation="nonlocal", local_distribution=None).decoder.context
    attention = block.global_aggregation
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    query, key, value = (
        layer(x).flatten(2) for layer in (attention.query, attention.key, attention.value)
    )
    weights = (query.mT @ key).softmax(dim=2)
    context = (value @ weights.mT).unflatten(2, (5, 6))
    torch.testing.assert_close(attention(x), x + attention.out(context))


def test_options_reach_the_local_distribution():
    options = {"kernel_size": 7, "dilation": 6, "query_from": "global", "key_from": "global"}
    _, block, _ = network(local_distribution="ldv2", **options).decoder.context
    distribution = block.local_distribution
    assert (distribution.kernel_size, distribution.dilation) == ((7, 7), (6, 6))
    assert (distribution.query_from, distribution.key_from) == ("global", "global")
    _, block, _ = network(mask_downsample="avg", downsample=4).decoder.context
    assert (block.local_distribution.downsample, block.downsample) == ("avg", 4)


def test_align_corners_reaches_every_resize():
    model = network(global_aggregation="ppm", align_corners=False)
    resizing = [m for m in model.modules() if hasattr(m, "align_corners")]
    assert len(resizing) == 4
    assert not any(m.align_corners for m in resizing)


def test_norm_layer_reaches_the_head():
    model = create_model("gald", "test_resnet", 5, channels=16, norm_layer=nn.InstanceNorm2d)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.decoder.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_aggregation": "psp"}, "global_aggregation must be one of"),
        ({"local_distribution": "ld"}, "local_distribution must be one of"),
        ({"arrangement": "serial"}, "arrangement must be one of"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("gald", "test_resnet", 5, **options)
