# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

pytest.importorskip("timm")

from ctxops.models import create_model
from ctxops.nn import AsymmetricNonLocalContext, CommonFusion, SummedFusions
from modules import randomise

# What makes a network on the tiny backbone small.
SMALL = {"channels": 16, "key_channels": 8, "value_channels": 12}
WIDTHS = (32, 48, 192, 96)


def network(**options):
    model = create_model("ann", "test_resnet", 5, **SMALL, **options)
    return randomise(model).double().eval()


def maps():
    sizes = ((17, 19), (9, 10), (9, 10), (9, 10))
    return [
        torch.randn(2, width, *size, dtype=torch.float64)
        for width, size in zip(WIDTHS, sizes, strict=True)
    ]


def count(**options):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model("ann", **options).parameters())


def test_parameters_of_the_released_network():
    assert count(auxiliary_channels=0) == 62_964_435
    assert count() == 62_964_435 + 1024 * 512 * 9 + 512 + 2 * 512 + 512 * 19 + 19


def test_decoder_is_the_context_module():
    decoder = network().decoder
    context = AsymmetricNonLocalContext(WIDTHS[2], WIDTHS[3], **SMALL).double().eval()
    context.load_state_dict(decoder.state_dict())
    *_, low, high = maps()
    torch.testing.assert_close(decoder(low, high), context(low, high))


@pytest.mark.parametrize("align_corners", [False, True])
def test_common_fusion_of_a_finer_map(align_corners):
    model = network(fusion="common", fuse_stages=(2,), align_corners=align_corners)
    fusion = model.decoder.fusion
    assert fusion.align_corners is model.align_corners is align_corners
    assert isinstance(fusion, CommonFusion)
    assert fusion.low_channels == WIDTHS[0]


@pytest.mark.parametrize("fusion", ["common", "fnb", "afnb"])
def test_fusions_of_several_stages_are_added(fusion):
    decoder = network(fusion=fusion, fuse_stages=(2, 3, 4)).decoder
    assert isinstance(decoder.fusion, SummedFusions)
    *lows, high = maps()
    expected = sum(one(low, high) for one, low in zip(decoder.fusion, lows, strict=True))
    torch.testing.assert_close(decoder.fusion(*lows, high), expected)


def test_baseline_has_one_convolution():
    decoder = network(fusion=None, attention=None).decoder
    high = maps()[-1]
    torch.testing.assert_close(decoder.train()(high), decoder.reduce(high))


def test_dropout_follows_the_fusion():
    assert network(dropout=0.5).decoder.dropout.p == 0.5
    assert network(dropout=0.5, fusion=None).decoder.dropout.p == 0


@pytest.mark.parametrize("blocks", [("afnb", "apnb"), ("fnb", "nb")])
def test_options_reach_the_blocks(blocks):
    fusion, attention = blocks
    options = {"share": None, "fuse": "add", "variant": "paper", "bias": False, "out_norm": True}
    anchors = {"output_sizes": (2, 4), "sampling": "max", "fold": False}
    small = {"channels": 12, "key_channels": 8, "value_channels": 12}
    model = create_model(
        "ann", "test_resnet", 5, fusion=fusion, attention=attention, **small, **options, **anchors
    )
    decoder = model.decoder
    for block in (decoder.fusion, decoder.context):
        assert (block.share, block.fuse, block.variant) == (None, "add", "paper")
        assert block.value.bias is None
        if attention == "apnb":
            assert (block.output_sizes, block.sampling, block.fold) == ((2, 4), "max", False)
    assert decoder.fusion.out_norm is not None
    assert decoder.context.out_norm is None


@pytest.mark.parametrize("attention", ["nb", "apnb"])
def test_sharing_reaches_the_attention(attention):
    options = SMALL | {"value_channels": 8}
    model = create_model("ann", "test_resnet", attention=attention, share="key_value", **options)
    assert model.decoder.context.share == "key_value"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "sum"}, "fusion must be one of"),
        ({"attention": "nonlocal"}, "attention must be one of"),
        ({"fuse_stages": (5,)}, r"fuse_stages must be .* out of \[2, 3, 4\] .*got \(5,\)"),
        ({"fuse_stages": ()}, r"fuse_stages must be .*got \(\)"),
        ({"fuse_stages": (4, 4)}, r"fuse_stages must be different"),
        ({"fuse_stages": 4}, r"fuse_stages must be .*got 4"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("ann", "test_resnet", 5, **options)
