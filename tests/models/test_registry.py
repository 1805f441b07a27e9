# SPDX-License-Identifier: Apache-2.0
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops.models import SegmentationOutput, create_model, list_models, model_options
from networks import images, make, networks


def count(name, **options):
    """Trainable numbers without the auxiliary head, 19 classes, the network's own backbone."""
    with torch.device("meta"):
        network = create_model(name, auxiliary_channels=0, **options)
    return sum(p.numel() for p in network.parameters())


# resnet101s, the head's module as Jin et al. (ICCV 2021), Table 3, count it, and the classifier.
BACKBONE, CLASSIFIER = 42_623_936, 512 * 19 + 19


@pytest.mark.parametrize(
    ("name", "options", "head"),
    [
        ("pspnet", {}, 23_073_792),
        ("pspnet", {"branch_activation": False}, 23_073_792),
        ("deeplabv3", {}, 42_211_328),
        ("ccnet", {}, 23_924_353),
        ("danet", {"attention_bias": False}, 23_924_738 + 2 * CLASSIFIER),
        ("dnlnet", {}, 24_122_625),
        # DNL less its mask, with a bias in W_o.
        ("nonlocal", {}, 24_122_625 - 513 + 512),
        ("apcnet", {}, 30_455_858),
    ],
    ids=str,
)
def test_published_counts(name, options, head):
    assert count(name, **options) == BACKBONE + head + CLASSIFIER


def test_count_of_pspnet_101():
    assert count("pspnet") == 65_707_475


# What create_model explains.
COMMON = {"auxiliary_channels", "auxiliary_bias", "dropout", "align_corners"}


def test_counts_of_ann_table_2():
    """Zhu et al. (ICCV 2019) count the running statistics, and PSANet's auxiliary head."""

    def count(name, **options):
        with torch.device("meta"):
            network = create_model(name, **options)
        tensors = [*network.parameters(), *network.buffers()]
        return sum(x.numel() for x in tensors if x.is_floating_point())

    assert count("psanet", mask_size=(129, 257)) == 102_664_678
    assert count("denseaspp") == 35_634_083


@networks
@pytest.mark.parametrize(("width", "error"), [("x", TypeError), (-1, ValueError)])
def test_widths_are_checked(name, width, error):
    for option in {"channels", "key_channels"} & model_options(name).keys():
        with pytest.raises(error, match=f"{option} must be "):
            create_model(name, "test_resnet", **{option: width})


@networks
def test_options_are_known_and_explained(name):
    options = model_options(name)
    assert not {"encoder", "num_classes", "norm_layer", "common"} & options.keys()
    entry = inspect.getmodule(create_model)._entries[name]
    for option in options.keys() - COMMON:
        assert option in entry.build.__doc__, f"{option} is not explained"


def test_list_models():
    names = list_models()
    assert names == sorted(names)
    assert {"fcn", "pspnet", "deeplabv3", "ocrnet", "nonlocal", "danet", "dnlnet"} <= set(names)
    assert {"apcnet", "ccnet"} <= set(names)


def test_norm_layer_reaches_every_norm_behind_the_backbone():
    def norm(channels):
        return nn.GroupNorm(1, channels)

    for name in list_models():
        with torch.device("meta"):
            network = create_model(name, "test_resnet", norm_layer=norm)
        for what, module in network.named_modules():
            if not what.startswith("encoder."):
                assert not isinstance(module, nn.BatchNorm2d), f"{name}: {what}"


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet"])
def test_sync_batchnorm(backbone):
    """Some of timm's norms have their activation inside."""
    plain = create_model("fcn", backbone, dropout=0.0)
    network = create_model("fcn", backbone, dropout=0.0, sync_batchnorm=True)
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    network.load_state_dict(plain.state_dict())
    image = images(33, 33, batch=2)
    torch.testing.assert_close(network(image).logits, plain(image).logits, rtol=0, atol=0)


# Network, options, and what a part of it must then be.
REACHED = [
    ("fcn", {"convolutions": 3}, lambda n: len(n.decoder), 3),
    ("fcn", {"kernel_size": 1}, lambda n: n.decoder[0].kernel_size, (1, 1)),
    ("fcn", {"kernel_size": 1, "concat": True}, lambda n: n.decoder.fuse[0].kernel_size, (1, 1)),
    ("pspnet", {}, lambda n: n.auxiliary[0][0].out_channels, 256),
    ("pspnet", {"output_sizes": (1, 4)}, lambda n: n.decoder.output_sizes, (1, 4)),
    ("pspnet", {"branch_activation": False}, lambda n: len(n.decoder.branches[0]), 2),
    ("deeplabv3", {"dilations": (2, 3)}, lambda n: n.decoder.dilations, (2, 3)),
    ("deeplabv3", {"fuse_kernel_size": 1}, lambda n: n.decoder.fuse[0].kernel_size, (1, 1)),
    ("deeplabv3", {"out_channels": 24}, lambda n: n.classifier[1].in_channels, 24),
    ("ccnet", {"recurrence": 3}, lambda n: n.decoder.context.recurrence, 3),
    ("ccnet", {"reduction": 4}, lambda n: n.decoder.context.attention.query.out_channels, 128),
    ("dnlnet", {"temperature": 0.5}, lambda n: n.decoder.context[1].temperature, 0.5),
    ("dnlnet", {"use_scale": False}, lambda n: n.decoder.context[1].use_scale, False),
    ("dnlnet", {"key_channels": 24}, lambda n: n.decoder.context[1].key_channels, 24),
    ("nonlocal", {}, lambda n: n.decoder.context[1].scale, 256**-0.5),
    ("nonlocal", {}, lambda n: n.decoder.context[1].variant, "paper"),
    ("nonlocal", {}, lambda n: n.decoder.context[1].fuse, "add"),
    ("nonlocal", {"use_scale": False}, lambda n: n.decoder.context[1].scale, 1.0),
    ("nonlocal", {"key_channels": 24}, lambda n: n.decoder.context[1].value.out_channels, 24),
    ("psanet", {"mask_size": (5, 7)}, lambda n: n.decoder.context.mask_size, (5, 7)),
    ("psanet", {"shrink_factor": 3}, lambda n: n.decoder.context.shrink_factor, 3),
    ("psanet", {"align_corners": False}, lambda n: n.decoder.context.align_corners, False),
    ("apcnet", {"output_sizes": (1, 4)}, lambda n: n.decoder.output_sizes, (1, 4)),
    ("apcnet", {"fusion": False}, lambda n: type(n.decoder.contexts[0].fuse), nn.Identity),
    ("danet", {"reduction": 4}, lambda n: n.decoder.position[1].reduction, 4),
    ("danet", {"attention_bias": False}, lambda n: n.decoder.position[1].value.bias, None),
    ("danet", {"dropout": 0.3}, lambda n: n.position_classifier[0].p, 0.3),
    ("danet", {"dropout": 0.3}, lambda n: n.channel_classifier[0].p, 0.3),
    ("ocrnet", {"dropout": 0.3}, lambda n: n.regions[1][0].p, 0.3),
    ("ocrnet", {"dropout": 0.3}, lambda n: n.classifier[0].p, 0.3),
    ("ocrnet", {"align_corners": False}, lambda n: n.align_corners, False),
    ("ocrnet", {"key_channels": 24}, lambda n: n.decoder.key_channels, 24),
    ("ocrnet", {"region_bias": True}, lambda n: n.regions[0][0].bias is None, False),
    ("denseaspp", {}, lambda n: len(n.decoder[0]), 2),
    ("gff", {"context": "denseaspp"}, lambda n: len(n.decoder.context[0]), 2),
    ("denseaspp", {"dilations": (2, 3)}, lambda n: n.decoder[1].dilations, (2, 3)),
    ("denseaspp", {"reduced_channels": 24}, lambda n: n.decoder[1].in_channels, 24),
    ("ann", {"bias": False}, lambda n: n.decoder.reduce[0].bias, None),
    ("ann", {"dropout": 0.3}, lambda n: n.classifier[0].p, 0.3),
    (
        "gald",
        {"global_aggregation": "aspp", "aspp_dilations": (2, 3)},
        lambda n: n.decoder.context[1].global_aggregation.dilations,
        (2, 3),
    ),
    (
        "gald",
        {"global_aggregation": "ppm"},
        lambda n: n.decoder.context[1].global_aggregation.align_corners,
        True,
    ),
    ("mcibi", {"context": "ppm", "align_corners": True}, lambda n: n.within.align_corners, True),
    ("gald", {"auxiliary_bias": False}, lambda n: n.auxiliary[0][0].bias, None),
    ("gff", {"auxiliary_bias": False}, lambda n: n.auxiliary[0][0].bias, None),
    ("gff", {"align_corners": False}, lambda n: n.align_corners, False),
    ("gff", {"align_corners": False}, lambda n: n.decoder.align_corners, False),
    ("gff", {"align_corners": False}, lambda n: n.decoder.fusion.align_corners, False),
    ("gff", {"align_corners": False}, lambda n: n.decoder.context.align_corners, False),
    ("gff", {"align_corners": False}, lambda n: n.decoder.pyramid.align_corners, False),
    ("mcibi", {"kernel_size": 3}, lambda n: n.decoder.kernel_size, 3),
    ("mcibi", {"dropout": 0.3}, lambda n: n.first_classifier[1][0].p, 0.3),
    ("mcibi", {"align_corners": True}, lambda n: n.align_corners, True),
]


@pytest.mark.parametrize(("name", "options", "part", "expected"), REACHED)
def test_options_reach_their_parts(name, options, part, expected):
    with torch.device("meta"):
        assert part(create_model(name, "test_resnet", **options)) == expected


def test_align_corners_and_dropout_reach_the_network():
    network = create_model("pspnet", "test_resnet", dropout=0.3, align_corners=False)
    assert network.classifier[0].p == network.auxiliary[1][0].p == 0.3
    assert network.align_corners is network.decoder.align_corners is False


def test_the_auxiliary_head_stands_on_the_last_map_but_one():
    network = create_model("fcn", "test_resnet", auxiliary_channels=24, auxiliary_bias=True)
    convolution = network.auxiliary[0][0]
    assert convolution.in_channels == network.encoder.channels[-2]
    assert convolution.bias is not None
    network = create_model("fcn", "hrnet_w18_small", output_stride=4, auxiliary_channels=24)
    assert network.auxiliary[0][0].in_channels == network.encoder.channels[0]


def test_danet_classifies_the_sum_and_in_training_both_summands():
    network = make("danet", dropout=0.0).double().train()
    maps = network.encoder(images(37, 53, batch=2).double())
    output = network.predict(maps)
    position, channel = network.decoder.branches(maps[-1])
    torch.testing.assert_close(output.logits, network.classifier(position + channel))
    for name, head, branch in (
        ("position", network.position_classifier, position),
        ("channel", network.channel_classifier, channel),
    ):
        torch.testing.assert_close(output.auxiliary[name], head(branch))


def test_classifiers_drop_channels_and_start_small():
    network = create_model("fcn", "test_resnet", 50)
    for dropout, convolution in (network.classifier, network.auxiliary[1]):
        assert isinstance(dropout, nn.Dropout2d)
        assert 0.009 < convolution.weight.std() < 0.011
        assert not convolution.bias.any()


def test_defaults_of_the_common_options():
    options = model_options("fcn")
    explicit = create_model("fcn", "test_resnet", **{name: options[name] for name in COMMON})
    network = create_model("fcn", "test_resnet")
    assert str(explicit) == str(network)
    assert explicit.align_corners is network.align_corners is True


@pytest.mark.parametrize("align_corners", [False, True])
def test_ocrnet_attends_to_the_regions_of_its_first_head(align_corners):
    network = make("ocrnet", output_stride=32, align_corners=align_corners).double()
    *_, low, high = network.encoder(images(97, 129).double())
    regions = F.interpolate(
        network.regions(low), high.shape[2:], mode="bilinear", align_corners=align_corners
    )
    expected = network.classifier(network.decoder(high, regions))
    torch.testing.assert_close(network.predict((low, high)).logits, expected)


def test_ocrnet_on_one_map_and_on_maps_of_two_sizes():
    options = {"channels": 16, "region_channels": 8, "region_kernel_size": 1}
    network = create_model("ocrnet", "hrnet_w18_small", output_stride=4, **options).eval()
    assert network(images(33, 41)).logits.shape == (1, 19, 33, 41)
    network = create_model("ocrnet", "test_resnet", output_stride=32, **options)
    output = network(images(65, 97, batch=2))
    assert output.auxiliary["regions"].shape == output.logits.shape == (2, 19, 65, 97)


def test_output_is_a_pytree_that_exports():
    output = SegmentationOutput(torch.ones(1), {"auxiliary": torch.zeros(1)})
    leaves, spec = torch.utils._pytree.tree_flatten(output)
    assert len(leaves) >= 2
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.auxiliary.keys() == {"auxiliary"}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: create_model("pspnt"), ValueError, "'pspnt', the closest is 'pspnet'; choose"),
        (lambda: create_model("fcn", "resnet1O1s"), ValueError, "'resnet1O1s', the closest is '"),
        (
            lambda: create_model("fcn", "test_resnet", chanels=4),
            ValueError,
            "unknown option of model 'fcn': 'chanels', the closest is 'channels'; choose from",
        ),
        (lambda: model_options("fnc"), ValueError, "unknown model 'fnc', the closest is 'fcn'"),
        (
            lambda: create_model("fcn", "test_resnet", 0),
            ValueError,
            "num_classes must be at least 1, got 0",
        ),
        (
            lambda: create_model("fcn", "test_resnet", 2.5),
            TypeError,
            r"num_classes must be an integer, got 2\.5",
        ),
        (
            lambda: create_model("fcn", "test_resnet", align_corners="false"),
            TypeError,
            "align_corners must be True or False, got 'false'",
        ),
        (
            lambda: create_model("fcn", "test_resnet", sync_batchnorm=1),
            TypeError,
            "sync_batchnorm must be True or False, got 1",
        ),
        (
            lambda: create_model("fcn", "test_resnet", ceil_mode="no"),
            TypeError,
            "ceil_mode must be True or False, got 'no'",
        ),
        (
            lambda: create_model("fcn", "test_vit"),
            ValueError,
            r"'test_vit' has no map of output_stride=8.* choose output_stride=16",
        ),
        (
            lambda: create_model("fcn", "test_resnet", auxiliary_channels=-1),
            ValueError,
            "auxiliary_channels must be at least 1, got -1",
        ),
        (
            lambda: create_model("ocrnet", "test_resnet", region_kernel_size=2),
            ValueError,
            "kernel_size must be odd and at least 1, got 2",
        ),
        (
            lambda: create_model("fcn", "test_resnet")(torch.ones(3, 32, 32)),
            ValueError,
            r"image must have shape \(B, C, H, W\), got \(3, 32, 32\)",
        ),
        (
            lambda: create_model("fcn", "test_resnet")(torch.ones(1, 3, 32, 32).byte()),
            TypeError,
            "image must be float32",
        ),
        (
            lambda: create_model("fcn", "test_resnet")(torch.ones(1, 4, 32, 32)),
            ValueError,
            r"image must have shape \(B, 3, H, W\), got \(1, 4, 32, 32\)",
        ),
    ],
)  # fmt: skip
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
