# SPDX-License-Identifier: Apache-2.0
import copy
import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctxops import models
from ctxops.models import (
    Encoder,
    SegmentationNetwork,
    SegmentationOutput,
    create_model,
    list_models,
    model_options,
    register_model,
    registry,
)
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
COMMON = {
    "auxiliary_channels",
    "auxiliary_dilation",
    "auxiliary_bias",
    "dropout",
    "align_corners",
}


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
    for option in options.keys() - COMMON:
        assert option in registry._entries[name].build.__doc__, f"{option} is not explained"


@networks
def test_builders_are_public_and_name_all_their_arguments(name):
    build = registry._entries[name].build
    assert build.__name__ in models.__all__
    assert getattr(models, build.__name__) is build
    encoder, *others = inspect.signature(build).parameters.values()
    assert encoder.name == "encoder"
    for parameter in others:
        assert parameter.name == "num_classes" or (
            parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
        )


@networks
def test_a_builder_makes_the_decoder_alone(name):
    """With its own defaults, as those of the network."""
    build = registry._entries[name].build
    arguments = {"num_classes": 19} if "num_classes" in inspect.signature(build).parameters else {}
    with torch.device("meta"):
        decoder = build(Encoder("test_resnet", 8), **arguments)
        network = create_model(name, "test_resnet", output_stride=8)
    assert settings(decoder.module) == settings(network.decoder)


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


def settings(network):
    """What tells networks apart: each module's class, plain attributes and shapes of weights."""
    kept = {}
    for path, module in network.named_modules():
        plain = {n: x for n, x in vars(module).items() if isinstance(x, PLAIN) and n[0] != "_"}
        weights = {n: tuple(x.shape) for n, x in module.named_parameters(recurse=False)}
        for what, value in (plain | weights | {"class": type(module).__name__}).items():
            kept[path, what] = value
    return kept


PLAIN = (bool, int, float, str, tuple, type(None))


@functools.cache
def meta_encoder():
    with torch.device("meta"):
        return Encoder("test_resnet", 8)


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, copy.deepcopy(meta_encoder()), **options)


# For each option a value that is nobody's default. Options of one name mean one thing.
OTHER = {
    "align_corners": None,  # the other
    "arrangement": "ldga",
    "aspp_dilations": (2, 3),
    "attention": "nb",
    "attention_bias": False,
    "auxiliary_bias": None,
    "auxiliary_channels": 24,
    "auxiliary_dilation": 6,
    "bias": False,
    "boundary_refinement": False,
    "branch_activation": False,
    "branch_channels": 24,
    "channels": 48,
    "classifier_kernel_size": 3,
    "concat": True,
    "context": "denseaspp",
    "context_channels": 24,
    "convolutions": 3,
    "dense_pyramid": False,
    "dilation": 2,
    "dilations": (2, 3),
    "downsample": 4,
    "dropout": 0.3,
    "fold": False,
    "fuse": "add",
    "fuse_kernel_size": 1,
    "fuse_stages": (2, 4),
    "fusion": "add",
    "gate_from": "reduced",
    "global_aggregation": "aspp",
    "global_backbone": True,
    "hard": True,
    "hidden_channels": 24,
    "image_norm": False,
    "kernel_size": 9,
    "key_channels": 24,
    "key_from": "global",
    "literal": True,
    "local_distribution": "ldv2",
    "mask_downsample": "avg",
    "mask_size": (5, 7),
    "memory_options": {"total_steps": 77},
    "mid_channels": 24,
    "out_channels": 24,
    "out_norm": True,
    "output_sizes": (1, 4),
    "projection_layers": 1,
    "query_from": "global",
    "recurrence": 3,
    "reduced_channels": 24,
    "reduction": 4,
    "refine": True,
    "region_bias": True,
    "region_channels": 24,
    "region_kernel_size": 5,
    "sampling": "max",
    "score": "conv",
    "share": "key_value",
    "shrink_factor": 3,
    "temperature": 0.5,
    "use_scale": False,
    "value_channels": 24,
    "variant": "paper",
    "within_attention": False,
}
# Where it is another, as the network knows no other, or none of this type.
OTHER_OF = {
    ("ann", "fusion"): "common",
    ("apcnet", "fusion"): False,
    ("gff", "fusion"): "concat",
    ("mcibi", "context"): "ppm",
    ("ocrnet", "fuse_kernel_size"): 3,
    ("psanet", "variant"): "mmsegmentation",
}
# With what an option has an effect.
NEEDS = {
    ("denseaspp", "auxiliary_bias"): {"auxiliary_channels": 24},
    ("denseaspp", "auxiliary_dilation"): {"auxiliary_channels": 24},
    ("gald", "aspp_dilations"): {"global_aggregation": "aspp"},
    **{
        ("gald", option): {"local_distribution": "ldv2"}
        for option in ("kernel_size", "dilation", "query_from", "key_from")
    },
    ("gcn", "mid_channels"): {"score": "stack"},
}
# Choices of modules, which are tested with their networks.
CHOICES = {"attention", "context", "fusion", "global_aggregation", "local_distribution", "score"}
CHOICES |= {"boundary_refinement", "concat", "dense_pyramid", "global_backbone", "literal"}

# Network, options, and what a part of it must then be, where an option's value shows nowhere or in
# several places.
REACHED = [
    ("fcn", {"convolutions": 3}, lambda n: len(n.decoder), 3),
    ("fcn", {"kernel_size": 1, "concat": True}, lambda n: n.decoder.fuse[0].kernel_size, (1, 1)),
    ("gcn", {"kernel_size": 9}, lambda n: n.decoder.score[0].vertical_first[0].kernel_size, (9, 1)),
    ("pspnet", {"branch_activation": False}, lambda n: len(n.decoder.branches[0]), 2),
    ("pspnet", {"image_norm": False}, lambda n: len(n.decoder.branches[0]), 2),
    ("deeplabv3", {"refine": True}, lambda n: len(n.decoder), 2),
    ("deeplabv3", {"out_channels": 24}, lambda n: n.classifier[1].in_channels, 24),
    ("ccnet", {"reduction": 4}, lambda n: n.decoder.context.attention.query.out_channels, 128),
    ("nonlocal", {}, lambda n: n.decoder.context[1].scale, 256**-0.5),
    ("nonlocal", {}, lambda n: n.decoder.context[1].variant, "paper"),
    ("nonlocal", {}, lambda n: n.decoder.context[1].fuse, "add"),
    ("nonlocal", {"use_scale": False}, lambda n: n.decoder.context[1].scale, 1.0),
    ("nonlocal", {"key_channels": 24}, lambda n: n.decoder.context[1].value.out_channels, 24),
    ("apcnet", {"fusion": False}, lambda n: type(n.decoder.contexts[0].fuse), nn.Identity),
    ("danet", {"attention_bias": False}, lambda n: n.decoder.position[1].value.bias, None),
    ("ocrnet", {"region_bias": True}, lambda n: n.regions[0][0].bias is None, False),
    ("denseaspp", {}, lambda n: len(n.decoder[0]), 2),
    ("gff", {"context": "denseaspp"}, lambda n: len(n.decoder.context[0]), 2),
    ("ann", {"bias": False}, lambda n: n.decoder.reduce[0].bias, None),
    ("ann", {"out_norm": True}, lambda n: type(n.decoder.fusion.out_norm), nn.BatchNorm2d),
    ("ann", {"fuse_stages": (2, 4)}, lambda n: list(n.levels), [-4, -2, -1]),
    ("mcibi", {"memory_options": {"total_steps": 77}}, lambda n: n.bank.total_steps, 77),
]


@pytest.mark.parametrize(("name", "options", "part", "expected"), REACHED)
def test_options_reach_their_parts(name, options, part, expected):
    assert part(on_meta(name, **options)) == expected


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in list_models() for option in model_options(name)]
)
def test_every_option_reaches_a_part(name, option):
    """Its value stands there where it did not stand before."""
    default, value = model_options(name)[option], OTHER_OF.get((name, option), OTHER[option])
    value = not default if value is None else value
    assert value != default
    needs = NEEDS.get((name, option), {})
    network, other = (settings(on_meta(name, **needs, **x)) for x in ({}, {option: value}))
    assert network != other, f"{option} changes nothing"
    listed = {(row, option) for row, options, *_ in REACHED for option in options}
    if option not in CHOICES | COMMON and (name, option) not in listed:
        # Compared with their types: True is no 1.
        values = {(type(x), x) for _, x in other.items() - network.items()}
        assert values & {(type(value), value), (tuple, (value, value))}, f"{option} shows nowhere"


@networks
def test_defaults_are_those_of_the_network(name):
    assert settings(on_meta(name)) == settings(on_meta(name, **model_options(name)))


# What brings further parts that resize or drop.
VARIANTS = {
    "ann": {"fusion": "common"},
    "gald": {"global_aggregation": "ppm"},
    "gff": {"fusion": "gated_fpn"},
    "mcibi": {"context": "uper"},
}


@networks
@pytest.mark.parametrize("align_corners", [False, True])
def test_align_corners_reaches_every_resize(name, align_corners):
    if "align_corners" not in model_options(name):
        pytest.skip("it has none")
    for options in ({}, VARIANTS.get(name, {})):
        network = on_meta(name, align_corners=align_corners, **options)
        assert network.align_corners is align_corners
        for module in network.modules():
            assert getattr(module, "align_corners", align_corners) is align_corners, module


@networks
def test_dropout_reaches_every_classifier(name):
    if "dropout" not in model_options(name):
        pytest.skip("it has none")
    network = on_meta(name, dropout=0.3)
    network.encoder = None
    drops = [m.p for m in network.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    assert set(drops) == {0.3}
    heads = [m for m in network.modules() if isinstance(m, models.base.Classifier)]
    assert len(drops) == len(heads) + (name == "ann")


@networks
@pytest.mark.parametrize("bias", [False, True])
def test_the_auxiliary_head_stands_on_the_last_map_but_one(name, bias):
    if "auxiliary_channels" not in model_options(name):
        pytest.skip("it has none")
    network = on_meta(name, auxiliary_channels=24, auxiliary_bias=bias)
    convolution = network.auxiliary[0][0]
    assert convolution.out_channels == 24
    assert convolution.in_channels == network.encoder.channels[-2]
    assert (convolution.bias is not None) is bias


def test_the_auxiliary_head_stands_on_the_only_map():
    network = create_model("fcn", "hrnet_w18_small", output_stride=4, auxiliary_channels=24)
    assert network.auxiliary[0][0].in_channels == network.encoder.channels[0]


def test_takes_an_encoder():
    encoder = Encoder("test_resnet", 16, in_channels=5)
    network = create_model("gff", encoder, 7).eval()
    assert network.encoder is encoder
    assert network(torch.randn(1, 5, 33, 37)).logits.shape == (1, 7, 33, 37)


@pytest.mark.parametrize(
    "argument",
    [{"output_stride": 8}, {"pretrained": True}, {"in_channels": 5}, {"multi_grid": (1, 2)},
     {"stage_dilations": (1, 1, 1, 1)}, {"shortcut_pools": False},
     {"ceil_mode": True}, {"contract_dilation": False}, {"dilate_both": False},
     {"bilinear_branches": True}, {"backbone_options": {"out_indices": (2, 4)}}],
    ids=str,
)  # fmt: skip
def test_an_encoder_has_its_arguments(argument):
    (name,) = argument
    with pytest.raises(ValueError, match=f"{name} is an argument of the Encoder that is given"):
        create_model("fcn", Encoder("test_resnet", 16), **argument)


def test_a_network_by_hand():
    encoder = Encoder("test_resnet", 8)
    decoder = models.gff(encoder, channels=16, fusion="fpn")
    network = SegmentationNetwork(
        encoder, decoder.module, decoder.channels, 5, levels=decoder.levels, auxiliary_channels=8
    )
    output = network(images(33, 37, batch=2))
    assert output.logits.shape == output.auxiliary["auxiliary"].shape == (2, 5, 33, 37)


def test_a_builder_of_one_s_own(monkeypatch):
    def identity(encoder, *, scale=2, dropout=0.2, norm_layer=nn.BatchNorm2d):
        seen.append((scale, dropout, norm_layer))
        return made

    made, seen = models.Decoder(nn.Identity(), 48, levels=(1,)), []
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registered = register_model("own", backbone="test_resnet", output_stride=16, dropout=0.4)
    assert registered(identity) is identity
    assert model_options("own") == {
        "scale": 2, "dropout": 0.2, "align_corners": True, "auxiliary_bias": False,
        "auxiliary_channels": 512, "auxiliary_dilation": 1,
    }  # fmt: skip
    network = create_model("own", scale=3, norm_layer=nn.InstanceNorm2d).eval()
    assert seen == [(3, 0.2, nn.InstanceNorm2d)]
    assert (network.classifier[0].p, network.encoder.strides[-1]) == (0.2, 16)
    assert network(images(33, 37)).logits.shape == (1, 19, 33, 37)
    made = nn.Identity()
    with pytest.raises(TypeError, match="builder of 'own' must return a Decoder, got Identity"):
        create_model("own")
    with pytest.raises(ValueError, match="unknown default 'channels'"):
        register_model("own", channels=4)


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
