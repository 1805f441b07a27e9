# SPDX-License-Identifier: Apache-2.0
import inspect

import pytest
import torch
from torch import nn

from ctxops.models import SegmentationOutput, create_model, list_models, model_options
from networks import images, networks


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


def test_sync_batchnorm():
    network = create_model("fcn", "test_resnet", sync_batchnorm=True)
    assert not any(type(module) is nn.BatchNorm2d for module in network.modules())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())


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
