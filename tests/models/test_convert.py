"""Checkpoints of other code compute here what they computed there.

The other code's networks are written out from their checkpoints' names, which are the originals':
``mmsegmentation_r50.txt``, and the lists below for the code released with ANN and GALD.
"""

import collections
import contextlib
import functools
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoints import (
    Original,
    anchors,
    attention,
    listing,
    psa_mask,
    random_state_dict,
    read_listings,
)
from modules import mostly_slow

pytest.importorskip("timm")

from ctxops.__main__ import main
from ctxops.models import (
    Encoder,
    convert_checkpoint,
    create_model,
    import_checkpoint,
    load_backbone,
    load_checkpoint,
    load_config,
    load_model,
)

LISTINGS = read_listings(Path(__file__).with_name("mmsegmentation_r50.txt"))
# Half of it is even: the released code's pooling rounds up where others round down.
SIZE = (35, 43)


# Their networks, written out ----------------------------------------------------------------------


STAGES = [1] * 3, [1] * 4, [1] + [2] * 5, [2] + [4] * 2


def mmseg_backbone(o, image, dilations=STAGES, strides=(1, 2, 1, 1)):
    numbers = (0, 3, 6), (1, 4, 7)
    x = o.stem(*([f"backbone.stem.{i}" for i in part] for part in numbers), image)
    x = F.max_pool2d(x, 3, 2, 1)
    return o.stages("backbone.", x, dilations, strides)[2:]


def mmseg_asymmetric(o, name, low, high, scale):
    block = f"{name}.stages.0"
    query = o.cbr(f"{block}.query_project", high)
    key = anchors(o.cbr(f"{block}.key_project", low))
    value = anchors(o.conv(f"{block}.value_project", low))
    context = o.conv(f"{block}.out_project", attention(query, key, value, scale))
    return o.cb(f"{name}.bottleneck", torch.cat([context, high], 1))


def mmseg_ann(o, low, high):
    h = "decode_head"
    x = mmseg_asymmetric(o, f"{h}.fusion", low, high, 256**-0.5)
    x = o.cbr(f"{h}.bottleneck", x)
    return mmseg_asymmetric(o, f"{h}.context", x, x, 256**-0.5).relu()


def mmseg_apcnet(o, low, x):
    maps = [x]
    for i, n in enumerate((1, 2, 3, 6)):
        name = f"decode_head.acm_modules.{i}"
        grid = o.cbr(f"{name}.pooled_redu_conv", F.adaptive_avg_pool2d(x, n)).flatten(2)
        y = o.cbr(f"{name}.input_redu_conv", x)
        mean = o.cbr(f"{name}.global_info", y.mean((2, 3), keepdim=True))
        affinity = o.conv(f"{name}.gla", y + mean).sigmoid()
        z = (grid @ affinity.flatten(2)).unflatten(2, y.shape[2:])
        z = (o.cbr(f"{name}.residual_conv", z) + y).relu()
        maps.append(o.cbr(f"{name}.fusion_conv", z))
    return o.cbr("decode_head.bottleneck", torch.cat(maps, 1))


def mmseg_concat(o, x, block, dilation=1):
    y = block(o.cbr("decode_head.convs.0", x, dilation))
    y = o.cbr("decode_head.convs.1", y, dilation)
    return o.cbr("decode_head.conv_cat", torch.cat([x, y], 1))


def mmseg_ccnet(o, low, x):
    def criss_cross(x):
        name = "decode_head.cca"
        q, k, v = (o.conv(f"{name}.{part}_conv", x) for part in ("query", "key", "value"))
        column = torch.einsum("bchw,bciw->bhwi", q, k)
        row = torch.einsum("bchw,bchj->bhwj", q, k)
        height = x.shape[2]
        itself = torch.eye(height, dtype=torch.bool)[:, None, :]
        column = column.masked_fill(itself, -torch.inf)  # the row has it
        weights = torch.cat([column, row], 3).softmax(3)
        y = torch.einsum("bciw,bhwi->bchw", v, weights[..., :height])
        y = y + torch.einsum("bchj,bhwj->bchw", v, weights[..., height:])
        return o.tensors[f"{name}.gamma.scale"] * y + x

    return mmseg_concat(o, x, lambda y: criss_cross(criss_cross(y)))


def mmseg_danet(o, low, x):
    def project(part):
        return o.conv(f"decode_head.pam.{part}_project", position)

    position = o.cbr("decode_head.pam_in_conv", x)
    attended = attention(project("query"), project("key"), project("value"))
    position = o.tensors["decode_head.pam.gamma.scale"] * attended + position
    channel = o.cbr("decode_head.cam_in_conv", x)
    rows = channel.flatten(2)
    energy = rows @ rows.mT
    weights = (energy.amax(2, keepdim=True) - energy).softmax(2)
    attended = (weights @ rows).unflatten(2, x.shape[2:])
    channel = o.tensors["decode_head.cam.gamma.scale"] * attended + channel
    outs = o.cbr("decode_head.pam_out_conv", position), o.cbr("decode_head.cam_out_conv", channel)
    return sum(outs)


def mmseg_deeplabv3(o, low, x, dilations=(1, 12, 24, 36)):
    image = o.cbr("decode_head.image_pool.1", x.mean((2, 3), keepdim=True)).expand_as(x[:, :512])
    maps = [o.cbr(f"decode_head.aspp_modules.{i}", x, d) for i, d in enumerate(dilations)]
    return o.cbr("decode_head.bottleneck", torch.cat([image, *maps], 1))


def mmseg_dnlnet(o, low, x, scale=256**-0.5 / 0.05):
    name = "decode_head.dnl_block"

    def block(x):
        q, k, v = (o.conv(f"{name}.{part}.conv", x) for part in ("theta", "phi", "g"))
        q, k = (y - y.mean((2, 3), keepdim=True) for y in (q, k))
        pairwise = attention(q, k, v, scale)
        mask = o.conv(f"{name}.conv_mask", x).flatten(2).softmax(2)
        return x + o.cb(f"{name}.conv_out", pairwise + (v.flatten(2) @ mask.mT).unsqueeze(3))

    return mmseg_concat(o, x, block)


def mmseg_fcn(o, low, x, dilation=1):
    return mmseg_concat(o, x, lambda y: y, dilation)


def mmseg_nonlocal(o, low, x, scale=256**-0.5):
    name = "decode_head.nl_block"

    def block(x):
        q, k, v = (o.conv(f"{name}.{part}.conv", x) for part in ("theta", "phi", "g"))
        return x + o.cb(f"{name}.conv_out", attention(q, k, v, scale))

    return mmseg_concat(o, x, block)


def mmseg_ocrnet(o, low, x):
    regions = o.conv("decode_head.0.conv_seg", o.cbr("decode_head.0.convs.0", low))
    pixels = o.cbr("decode_head.1.bottleneck", x)
    objects = (pixels.flatten(2) @ regions.flatten(2).softmax(2).mT).unsqueeze(3)
    name = "decode_head.1.object_context_block"
    query = o.cbr(f"{name}.query_project.1", o.cbr(f"{name}.query_project.0", pixels))
    key = o.cbr(f"{name}.key_project.1", o.cbr(f"{name}.key_project.0", objects))
    value = o.cbr(f"{name}.value_project", objects)
    context = o.cbr(f"{name}.out_project", attention(query, key, value, 256**-0.5))
    return o.cbr(f"{name}.bottleneck", torch.cat([context, pixels], 1))


def mmseg_psanet(o, low, x):
    """On a map with an even side."""
    size = tuple(side // 2 for side in x.shape[2:])
    maps = []
    for kind, end in ("collect", ""), ("distribute", "_p"):
        y = F.interpolate(o.cbr(f"decode_head.reduce{end}", x), size, mode="bilinear")
        mask = o.cbr(f"decode_head.attention{end}.0", y)
        logits = psa_mask(kind, o.conv(f"decode_head.attention{end}.1", mask), (97, 97))
        weights = logits.softmax(1).flatten(2)
        maps.append((y.flatten(2) @ weights).unflatten(2, size))
    y = o.cbr("decode_head.proj", F.pad(torch.cat(maps, 1), (1, 1, 1, 1)))
    y = F.interpolate(y, x.shape[2:], mode="bilinear")
    return o.cbr("decode_head.bottleneck", torch.cat([x, y], 1))


def mmseg_pspnet(o, low, x):
    maps = [x]
    for i, n in enumerate((1, 2, 3, 6)):
        grid = o.cbr(f"decode_head.psp_modules.{i}.1", F.adaptive_avg_pool2d(x, n))
        maps.append(o.resize(grid, x.shape[2:]))
    return o.cbr("decode_head.bottleneck", torch.cat(maps, 1))


MMSEG_HEADS = {
    "ann": mmseg_ann,
    "apcnet": mmseg_apcnet,
    "ccnet": mmseg_ccnet,
    "danet": mmseg_danet,
    "deeplabv3": mmseg_deeplabv3,
    "dnlnet": mmseg_dnlnet,
    "fcn": mmseg_fcn,
    "nonlocal": mmseg_nonlocal,
    "ocrnet": mmseg_ocrnet,
    "psanet": mmseg_psanet,
    "pspnet": mmseg_pspnet,
}


def mmseg_hrnet(o, image):
    """Its branches at the finest one's size. The names tell how many blocks and modules it has."""

    def layers(name, x, stride=1):
        return o.norm(f"{name}.1", o.conv(f"{name}.0", x, stride=stride, padding=1))

    def blocks(name, x):
        i = 0
        while f"{name}.{i}.conv1.weight" in o.tensors:
            block = f"{name}.{i}"
            y = o.norm(f"{block}.bn1", o.conv(f"{block}.conv1", x, padding=1)).relu()
            y = o.norm(f"{block}.bn2", o.conv(f"{block}.conv2", y, padding=1))
            x, i = (x + y).relu(), i + 1
        return x

    def fuse(name, maps, i):
        total = 0
        for j, x in enumerate(maps):
            part = f"{name}.{i}.{j}"
            if j > i:
                x = o.norm(f"{part}.1", o.conv(f"{part}.0", x))
                x = F.interpolate(x, scale_factor=2 ** (j - i), mode="bilinear")
                x = F.interpolate(x, maps[i].shape[2:], mode="bilinear")
            for k in range(i - j):
                x = layers(f"{part}.{k}", x, 2)
                x = x.relu() if k < i - j - 1 else x
            total = total + x
        return total.relu()

    x = image
    for i in (1, 2):
        name = f"backbone.conv{i}"
        x = o.norm(f"backbone.bn{i}", o.conv(name, x, stride=2, padding=1)).relu()
    maps = o.stages("backbone.", x, [[1, 1]])
    for stage in (2, 3, 4):
        transition = f"backbone.transition{stage - 1}"
        sources = [*maps, maps[-1]]
        for i in range(stage):
            if f"{transition}.{i}.0.weight" in o.tensors:
                sources[i] = layers(f"{transition}.{i}", sources[i]).relu()
            elif f"{transition}.{i}.0.0.weight" in o.tensors:
                sources[i] = layers(f"{transition}.{i}.0", sources[i], 2).relu()
        maps, module = sources[:stage], 0
        while f"backbone.stage{stage}.{module}.branches.0.0.conv1.weight" in o.tensors:
            name = f"backbone.stage{stage}.{module}"
            maps = [blocks(f"{name}.branches.{i}", x) for i, x in enumerate(maps)]
            maps = [fuse(f"{name}.fuse_layers", maps, i) for i in range(stage)]
            module += 1
    return torch.cat([o.resize(x, maps[0].shape[2:]) for x in maps], 1)


def released_listing(head, stem):
    """A head behind ResNet-50 with a stem of 64, 64 and 128 channels, its layers named by pairs."""
    widths = 3, 64, 64, 128
    lines = []
    for (conv, norm), i, o in zip(stem, widths[:-1], widths[1:], strict=True):
        lines += [f"conv {conv} {o} {i} 3 3", f"norm {norm} {o}"]
    for line in LISTINGS["ann"]:
        kind, module, *sizes = line.split()
        if module.startswith("backbone.layer"):
            if kind == "conv" and module.startswith("backbone.layer1.0") and sizes[1] == "64":
                sizes[1] = "128" if module.endswith(("conv1", "downsample.0")) else "64"
            lines.append(" ".join([kind, module, *sizes]))
    return lines + head.split("\n")[1:-1]


ANN_STEM = [(f"backbone.prefix.conv{i}", f"backbone.prefix.bn{i}") for i in (1, 2, 3)]
ANN_HEAD = """
conv fusion.stages.0.f_key.0 256 1024 1 1 bias
norm fusion.stages.0.f_key.1.0 256
conv fusion.stages.0.f_query.0 256 2048 1 1 bias
norm fusion.stages.0.f_query.1.0 256
conv fusion.stages.0.f_value 256 1024 1 1 bias
conv fusion.stages.0.W 2048 256 1 1 bias
conv fusion.conv_bn_dropout.0 2048 4096 1 1 bias
norm fusion.conv_bn_dropout.1 2048
conv context.0 512 2048 3 3 bias
norm context.1.0 512
conv context.2.stages.0.f_key.0 256 512 1 1 bias
norm context.2.stages.0.f_key.1.0 256
conv context.2.stages.0.f_value 256 512 1 1 bias
conv context.2.stages.0.W 512 256 1 1 bias
conv context.2.conv_bn_dropout.0 512 1024 1 1 bias
norm context.2.conv_bn_dropout.1.0 512
conv cls 19 512 1 1 bias
conv dsn.0 512 1024 3 3 bias
norm dsn.1.0 512
conv dsn.3 19 512 1 1 bias
"""

GALD_STEM = [("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1")]
GALD_HEAD = """
conv head.conva.0 512 2048 3 3
norm head.conva.1 512
conv head.a2block.down.0 512 1 3 3 bias
norm head.a2block.down.1 512
conv head.a2block.long_relation.t 256 512 1 1
conv head.a2block.long_relation.p 256 512 1 1
conv head.a2block.long_relation.g 256 512 1 1
conv head.a2block.long_relation.z 512 32 1 1
affine head.a2block.long_relation.gn 512
conv head.a2block.local_attention.dconv1.0 512 1 3 3 bias
norm head.a2block.local_attention.dconv1.1 512
conv head.a2block.local_attention.dconv2.0 512 1 3 3 bias
norm head.a2block.local_attention.dconv2.1 512
conv head.a2block.local_attention.dconv3.0 512 1 3 3 bias
norm head.a2block.local_attention.dconv3.1 512
conv head.convb.0 512 512 3 3
norm head.convb.1 512
conv head.bottleneck.0 512 2560 3 3
norm head.bottleneck.1 512
conv head.bottleneck.3 19 512 1 1 bias
conv dsn.0 512 1024 3 3 bias
norm dsn.1 512
conv dsn.4 19 512 1 1 bias
"""


def released_backbone(o, stem, prefix, image, dilations):
    x = o.stem(*zip(*stem, strict=True), image)
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    return o.stages(prefix, x, dilations)[2:]


def released_ann_block(o, name, low, high, norms):
    block = f"{name}.stages.0"
    query = o.cbr(f"{block}.f_query", high)
    key, value = anchors(o.cbr(f"{block}.f_key", low)), anchors(o.conv(f"{block}.f_value", low))
    context = o.conv(f"{block}.W", attention(query, key, value, 256**-0.5))
    x = o.conv(f"{name}.conv_bn_dropout.0", torch.cat([context, high], 1))
    return o.norm(f"{name}.conv_bn_dropout.{norms}", x)


def released_ann(o, image):
    dilations = [1] * 3, [1] * 4, [1] + [2] * 5, [2] + [4] * 2
    low, high = released_backbone(o, ANN_STEM, "backbone.", image, dilations)
    x = released_ann_block(o, "fusion", low, high, "1")
    x = o.norm("context.1.0", o.conv("context.0", x, padding=1)).relu()
    return o.conv("cls", released_ann_block(o, "context.2", x, x, "1.0").relu())


def released_gald(o, image):
    dilations = [1] * 3, [1] * 4, [2] * 6, [4, 8, 16]
    _, x = released_backbone(o, GALD_STEM, "", image, dilations)

    def halve(name, x):
        return o.norm(f"{name}.1", o.conv(f"{name}.0", x, stride=2)).relu()

    def at(i):
        return "{}." + str(i)

    o.names = at(0), at(1)
    y = o.cbr("head.conva", x)
    size, name = y.shape[2:], "head.a2block.long_relation"
    y = halve("head.a2block.down", y)
    t, p, g = (o.conv(f"{name}.{part}", y).unflatten(1, (8, -1)) for part in "tpg")
    gain = (p * g).sum((2, 3, 4), keepdim=True)
    z = o.conv(f"{name}.z", (gain * t).flatten(1, 2))
    affine = o.tensors[f"{name}.gn.weight"], o.tensors[f"{name}.gn.bias"]
    y = o.resize(F.group_norm(z, 8, *affine) + y, size)
    mask = y
    for i in (1, 2, 3):
        mask = halve(f"head.a2block.local_attention.dconv{i}", mask)
    y = 2 * y + y * o.resize(mask, size).sigmoid()
    y = o.cbr("head.convb", y)
    return o.conv("head.bottleneck.3", o.cbr("head.bottleneck", torch.cat([x, y], 1)))


# What the tests share -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def mmseg_checkpoint(model):
    state_dict = random_state_dict(LISTINGS[model])
    # One convolution under two names.
    for name in [n for n in state_dict if n.startswith("decode_head.context.stages.0.query_proj")]:
        state_dict[name] = state_dict[name.replace("query_project", "key_project")]
    return state_dict


@torch.no_grad()
def assert_computes(imported, image, expected):
    network = imported.build()
    assert not network.training
    assert expected.std() > 0.1
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = image.to(memory_format=memory_format)
        logits = network.to(memory_format=memory_format)(x).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    return network


# Networks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", mostly_slow(sorted(LISTINGS), "ann"))
@torch.no_grad()
def test_mmsegmentation(model, image):
    state_dict = mmseg_checkpoint(model)
    imported = import_checkpoint(state_dict)
    assert (imported.source, imported.model) == ("mmsegmentation", model)
    o = Original(state_dict)
    low, high = mmseg_backbone(o, image)
    head = "decode_head.1" if model == "ocrnet" else "decode_head"
    logits = o.conv(f"{head}.conv_seg", MMSEG_HEADS[model](o, low, high))
    network = assert_computes(imported, image, o.resize(logits, SIZE))
    if model != "ocrnet":
        expected = o.conv("auxiliary_head.conv_seg", o.cbr("auxiliary_head.convs.0", low))
        torch.testing.assert_close(network.auxiliary(low), expected, rtol=0, atol=1e-4)


def test_classifiers_of_danet():
    """Those of the branches, which the logits do without."""
    state_dict = mmseg_checkpoint("danet")
    imported = import_checkpoint(state_dict).state_dict
    for theirs, ours in ("pam_conv_seg", "position"), ("cam_conv_seg", "channel"):
        for leaf in ("weight", "bias"):
            expected = state_dict[f"decode_head.{theirs}.{leaf}"]
            assert imported[f"{ours}_classifier.1.{leaf}"].equal(expected)


def ann_checkpoint():
    state_dict = random_state_dict(released_listing(ANN_HEAD, ANN_STEM))
    shared = "context.2.stages.0.f_key"
    for name in [n for n in state_dict if n.startswith(shared)]:
        state_dict[name.replace("f_key", "f_query")] = state_dict[name]
    return state_dict


@torch.no_grad()
def test_released_ann(image):
    state_dict = ann_checkpoint()
    imported = import_checkpoint({f"module.{name}": x for name, x in state_dict.items()})
    assert (imported.source, imported.model) == ("ann", "ann")
    o = Original(state_dict, conv="{}.0", norm="{}.1.0", align_corners=True)
    assert_computes(imported, image, o.resize(released_ann(o, image), SIZE))


def test_released_ann_by_its_other_names():
    """The stem's second name, and norms that are one module with their ReLU."""
    state_dict = ann_checkpoint()
    expected = import_checkpoint(state_dict).state_dict
    renamed = {
        name.replace("backbone.prefix.", "backbone.resinit.").replace(".1.0.", ".1."): x
        for name, x in state_dict.items()
    }
    assert len(renamed.keys() - state_dict.keys()) == 3 + 5 * 3 + 5 * 7
    actual = import_checkpoint(renamed).state_dict
    assert actual.keys() == expected.keys()
    assert all(x.equal(expected[name]) for name, x in actual.items())


@pytest.mark.slow
@torch.no_grad()
def test_released_gald():
    # The released code's mask needs maps of at least 15 x 15.
    image = torch.randn(1, 3, 123, 131, generator=torch.Generator().manual_seed(1))
    state_dict = random_state_dict(released_listing(GALD_HEAD, GALD_STEM))
    state_dict = {name.removeprefix("backbone."): x for name, x in state_dict.items()}
    imported = import_checkpoint(state_dict)
    assert (imported.source, imported.model) == ("gald", "gald")
    o = Original(state_dict, align_corners=True)
    assert_computes(imported, image, o.resize(released_gald(o, image), image.shape[2:]))


@pytest.mark.parametrize("auxiliary", mostly_slow([True, False], "True"))
@torch.no_grad()
def test_torchvision_fcn(auxiliary, image):
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    original = segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=auxiliary)
    original.load_state_dict(random_state_dict(listing(original.state_dict())))
    imported = import_checkpoint(original.state_dict())
    assert (imported.source, imported.model) == ("torchvision", "fcn")
    expected = original.eval()(image)
    network = assert_computes(imported, image, expected["out"])
    if auxiliary:
        logits = network.auxiliary(network.encoder(image)[-2])
        logits = F.interpolate(logits, SIZE, mode="bilinear")
        torch.testing.assert_close(logits, expected["aux"], rtol=0, atol=1e-4)


# Configurations -----------------------------------------------------------------------------------


def configuration(head, backbone=(), auxiliary=(), **options):
    """As mmsegmentation's of a dilated ResNet-50, with other values in its parts."""
    norm = {"type": "SyncBN", "requires_grad": True}
    shared = {"norm_cfg": norm, "num_classes": 19, "loss_decode": {"type": "CrossEntropyLoss"}}
    dilated = {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "contract_dilation": True}
    return {
        "type": "EncoderDecoder",
        "pretrained": None,
        "backbone": {"type": "ResNetV1c", "depth": 50, "norm_cfg": norm, **dilated}
        | dict(backbone),
        "decode_head": {"in_channels": 2048, "in_index": 3, "channels": 512, **shared} | dict(head),
        "auxiliary_head": {"type": "FCNHead", "in_index": 2, "num_convs": 1, **shared}
        | dict(auxiliary),
        "test_cfg": {"mode": "slide", "stride": (513, 513)},
    } | options


STRIDE_16 = {"strides": (1, 2, 2, 1), "dilations": (1, 1, 1, 2)}
# What the configuration has, what mmsegmentation then computes.
CONFIGURED = {
    "corners": (
        "pspnet",
        configuration(
            {"type": "PSPHead", "align_corners": True}, auxiliary={"align_corners": True}
        ),
        {},
        mmseg_pspnet,
    ),
    "multi-grid": (
        "deeplabv3",
        configuration(
            {"type": "ASPPHead", "dilations": (1, 6, 12, 18)},
            STRIDE_16 | {"multi_grid": (1, 2, 4), "contract_dilation": False},
        ),
        {"dilations": ([1] * 3, [1] * 4, [1] * 6, [1, 2, 4]), "strides": (1, 2, 2, 1)},
        lambda o, low, x: mmseg_deeplabv3(o, low, x, (1, 6, 12, 18)),
    ),
    "head-dilation": (
        "fcn",
        configuration({"type": "FCNHead", "dilation": 6}, STRIDE_16, {"dilation": 6}),
        {"dilations": ([1] * 3, [1] * 4, [1] * 6, [1, 2, 2]), "strides": (1, 2, 2, 1)},
        lambda o, low, x: mmseg_fcn(o, low, x, 6),
    ),
    "stride-32": (
        "pspnet",
        configuration({"type": "mmseg.PSPHead"}, {"strides": (1, 2, 2, 2)}),
        {"dilations": STAGES, "strides": (1, 2, 2, 2)},
        mmseg_pspnet,
    ),
    "not-contracted": (
        "fcn",
        configuration({"type": "FCNHead"}, {"contract_dilation": False}),
        {"dilations": ([1] * 3, [1] * 4, [2] * 6, [4] * 3)},
        mmseg_fcn,
    ),
    "temperature": (
        "dnlnet",
        configuration({"type": "DNLHead", "temperature": 0.5, "use_scale": False}),
        {},
        lambda o, low, x: mmseg_dnlnet(o, low, x, 1 / 0.5),
    ),
    "scale": (
        "nonlocal",
        configuration({"type": "NLHead", "use_scale": False}),
        {},
        lambda o, low, x: mmseg_nonlocal(o, low, x, 1.0),
    ),
}


@pytest.mark.parametrize(
    ("model", "config", "backbone", "head"),
    mostly_slow(CONFIGURED, "multi-grid"),
)
@torch.no_grad()
def test_configuration(model, config, backbone, head, image):
    """What shapes do not tell, the text in a checkpoint does."""
    state_dict = mmseg_checkpoint(model)
    imported = import_checkpoint(state_dict, config=f"crop_size = (769, 769)\nmodel = {config!r}")
    assert (imported.model, imported.assumed) == (model, {})
    corners = config["decode_head"].get("align_corners", False)
    o = Original(state_dict, align_corners=corners)
    low, high = mmseg_backbone(o, image, **backbone)
    logits = o.conv("decode_head.conv_seg", head(o, low, high))
    network = assert_computes(imported, image, o.resize(logits, SIZE))
    dilation = config["auxiliary_head"].get("dilation", 1)
    expected = o.conv("auxiliary_head.conv_seg", o.cbr("auxiliary_head.convs.0", low, dilation))
    torch.testing.assert_close(network.auxiliary(low), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (configuration({"type": "PSPHead"}, {"style": "caffe"}), r"backbone\.style='caffe'$"),
        (configuration({"type": "PSPHead"}, {"type": "ResNeXt"}), r"type='ResNeXt'$"),
        (configuration({"type": "PSPHead"}, {"radix": 4}), r"backbone\.radix=4$"),
        (
            configuration({"type": "PSPHead"}, {"strides": (1, 1, 2, 1)}),
            r"backbone\.strides=\(1, 1, 2, 1\)$",
        ),
        (
            configuration({"type": "PSPHead"}, {"norm_cfg": {"type": "BN", "eps": 0.001}}),
            r"backbone\.norm_cfg={'type': 'BN', 'eps': 0\.001}$",
        ),
        (
            configuration({"type": "PSPHead", "act_cfg": {"type": "GELU"}, "new": 3}),
            r"decode_head\.act_cfg={'type': 'GELU'}, decode_head\.new=3$",
        ),
        (configuration({"type": "UPerHead"}), r"decode_head\.type='UPerHead'$"),
        (configuration({"type": "PSPHead", "in_index": 2}), r"decode_head\.in_index=2$"),
        (
            configuration({"type": "PSPHead"}, (), {"align_corners": True}),
            r"auxiliary_head\.align_corners=True$",
        ),
        (configuration({"type": "PSPHead"}, neck={"type": "JPU"}), r"model\.neck={'type': 'JPU'}$"),
        (configuration({}, decode_head=[1, 2]), r"decode_head\[0\]=1, .*, 2 decode heads$"),
        (configuration({}, auxiliary_head=[{}, {}]), r"2 heads in auxiliary_head$"),
    ],
)
def test_configuration_without_an_option_here(config, message, pspnet):
    message = rf"no pspnet here is what the configuration tells: .*{message}"
    with pytest.raises(ValueError, match=message):
        import_checkpoint(pspnet, config=f"model = {config!r}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = dict(", "the configuration is no Python: "),
        ("_base_ = ['a.py']", r"has the bases \('a.py',\), relative to its file: give the file's"),
        ("optimizer = dict()", "must have a model of plain values, got none"),
        ("model = build()", r"must have a model of plain values, got build\(\)"),
        ("model = {config}\nmodel['neck'] = 3", r"plain values, got model\['neck'\] = 3"),
        ("model = {config}\nmodel.update(a=3)", r"plain values, got model\.update\(a=3\)"),
        ("import os\nmodel = dict(backbone=os.environ)", r"backbone=os\.environ"),
        ("model = {config}\nmodel = dict(**model)", r"plain values, got dict\(\*\*model\)"),
        (
            "model = {config}".replace("'PSPHead'", "'PSPHead', 'pool_scales': range(3)"),
            r"^(?!.*align_corners).*decode_head\.pool_scales=range\(3\)$",
        ),
    ],
)
def test_configuration_that_is_more_than_data(text, message, pspnet):
    config = repr(configuration({"type": "PSPHead"}))
    if "pool_scales" in message:
        config = config.replace("'PSPHead'", "'PSPHead', 'pool_scales': range(3)")
    with pytest.raises(ValueError, match=message):
        import_checkpoint(pspnet, config=text.replace("{config}", config))


def test_configurations_are_mmsegmentations():
    with pytest.raises(ValueError, match="checkpoints of ann have no config: leave it out"):
        import_checkpoint(on_meta(ann_checkpoint()), config=configuration({"type": "ANNHead"}))


def test_configuration_file(tmp_path):
    """Bases are read relative to the file that names them; dictionaries are merged or replaced."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base.py").write_text(
        "# a comment\nnorm = dict(type='BN', eps=-1e-3)\n"
        "model = dict(backbone=dict(depth=50, norm_cfg=norm), head=[1, dict(a=2)], kept=None)\n"
    )
    (tmp_path / "models" / "other.py").write_text("_base_ = './base.py'\nmodel = {'new': 'word'}\n")
    path = tmp_path / "config.py"
    path.write_text(
        "_base_ = ['models/other.py']\ncrop = (3, 4)\n"
        "model = dict(backbone=dict(_delete_=True, depth=101, crop=crop), head=dict(b=[3]))\n"
    )
    backbone = {"_delete_": True, "depth": 101, "crop": (3, 4)}
    expected = {"backbone": backbone, "head": {"b": (3,)}, "kept": None, "new": "word"}
    assert load_config(path) == expected
    path.write_text("_base_ = 'models/other.py'\nmodel = dict(backbone=dict(depth=101))\n")
    expected["backbone"] = {"depth": 101, "norm_cfg": {"type": "BN", "eps": -1e-3}}
    assert load_config(path) == expected | {"head": (1, {"a": 2})}
    for base in "'mmseg::base.py'", "['models/other.py', 3]", "make()":
        path.write_text(f"_base_ = {base}")
        with pytest.raises(ValueError, match=r"config.py' has the base .*, which is no path"):
            load_config(path)
    path.write_text("_base_ = 'models/none.py'")
    with pytest.raises(FileNotFoundError):
        load_config(path)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["cfg", "config"])
def test_configuration_in_a_file(key, tmp_path, pspnet, capsys):
    """The checkpoint's own counts, a file that is given more, and an option most."""
    theirs, ours, file = tmp_path / "pspnet.pth", tmp_path / "pspnet.pt", tmp_path / "config.py"
    text = f"model = {configuration({'type': 'PSPHead'}, STRIDE_16)!r}"
    torch.save({"meta": {key: text}, "state_dict": pspnet}, theirs)
    assert main(["convert", str(theirs), str(ours)]) == 0
    assert "assumed" not in capsys.readouterr().out
    assert load_model(ours).encoder.strides[-1] == 16
    file.write_text(f"model = {configuration({'type': 'PSPHead'})!r}")
    assert main(["convert", str(theirs), str(ours), "--config", str(file)]) == 0
    assert load_model(ours).encoder.strides[-1] == 8
    option = ["--option", "output_stride=32"]
    assert main(["convert", str(theirs), str(ours), "--config", str(file), *option]) == 0
    assert load_model(ours).encoder.strides[-1] == 32


def test_what_is_assumed(tmp_path, pspnet, capsys):
    """Without a configuration, as options that can be given."""
    theirs, ours = tmp_path / "pspnet.pth", tmp_path / "pspnet.pt"
    torch.save(pspnet, theirs)
    assert main(["convert", str(theirs), str(ours), "--option", "output_stride=16"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("assumed, for"))
    options = shlex.split(line.partition("tell: ")[2].partition(";")[0])
    assert "--option align_corners=False" in line
    assert "output_stride" not in line
    assert main(["convert", str(theirs), str(ours), *options]) == 0
    assert "output_stride=8" in capsys.readouterr().out.splitlines()[-1]


def other_resnet(lines, kind):
    """A list with average pooling on the shortcuts, and split attention, in place of ResNet's."""
    changed = []
    for line in lines:
        line = re.sub(r"downsample\.([01])", lambda m: f"downsample.{int(m[1]) + 1}", line)
        name, _, sizes = line.partition(" ")[2].partition(" ")
        if kind == "ResNeSt" and re.fullmatch(r"backbone\.layer.*conv2", name):
            n = int(sizes.split()[0])
            inner = max(n // 2, 32)
            line = f"conv {name}.conv {2 * n} {n // 2} 3 3\nnorm {name}.bn0 {2 * n}\n"
            line += f"conv {name}.fc1 {inner} {n} 1 1 bias\nnorm {name}.bn1 {inner}\n"
            line += f"conv {name}.fc2 {2 * n} {inner} 1 1 bias"
        elif kind == "ResNeSt" and re.fullmatch(r"backbone\.layer.*bn2", name):
            continue
        changed += line.split("\n")
    return changed


@pytest.mark.parametrize(
    ("kind", "backbone", "stride"),
    [
        pytest.param("ResNetV1d", "resnet50d", 8, marks=pytest.mark.slow),
        pytest.param("ResNeSt", "resnest50d", 8, marks=pytest.mark.slow),
        pytest.param("ResNeSt", "resnest50d", 32, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_resnets_with_pools_on_shortcuts(kind, backbone, stride, image):
    """The shortcuts of dilated stages have none in mmsegmentation."""
    state_dict = random_state_dict(other_resnet(LISTINGS["fcn"], kind))
    strides = {"strides": (1, 2, 2, 2), "dilations": (1, 1, 1, 1)} if stride == 32 else {}
    config = configuration({"type": "FCNHead"}, {"type": kind, **strides})
    imported = import_checkpoint(state_dict, config=config)
    assert imported.arguments["backbone"] == backbone
    o = Original(state_dict)
    options = {"dilations": ([1] * 3, [1] * 4, [1] * 6, [1] * 3), "strides": (1, 2, 2, 2)}
    low, high = mmseg_backbone(o, image, **(options if stride == 32 else {}))
    logits = o.conv("decode_head.conv_seg", mmseg_fcn(o, low, high))
    assert_computes(imported, image, o.resize(logits, SIZE))


@pytest.mark.parametrize(
    ("name", "stem", "backbone", "options"),
    [
        ("resnet18d", 32, "resnet18d", None),
        ("resnet50d", 64, "resnet50", {"avg_down": True, "stem_type": "deep", "stem_width": 64}),
        ("resnest50d", 64, "resnest50d", {"stem_width": 64}),
        pytest.param("resnest101e", 64, "resnest101e", None, marks=pytest.mark.slow),
        pytest.param("resnest200e", 64, "resnest200e", None, marks=pytest.mark.slow),
    ],
)
def test_names_of_resnets_with_pools_on_shortcuts(name, stem, backbone, options):
    with torch.device("meta"):
        encoder = Encoder(name, 8, options={"stem_width": stem})
        network = create_model("fcn", encoder, auxiliary_channels=0)
    names = {"conv1.0": "stem.0", "conv1.1": "stem.1", "conv1.3": "stem.3", "conv1.4": "stem.4"}
    names |= {"conv1.6": "stem.6", "bn1": "stem.7"}
    theirs = {}
    for key, x in mmseg_fcn_names(network.state_dict()).items():
        module, _, leaf = key.rpartition(".")
        ours = module.removeprefix("backbone.")
        theirs[f"backbone.{names[ours]}.{leaf}" if ours in names else key] = x
    arguments = import_checkpoint(theirs).arguments
    assert (arguments["backbone"], arguments.get("backbone_options")) == (backbone, options)
    assert not arguments["shortcut_pools"]


def test_unknown_resnest():
    state_dict = on_meta(random_state_dict(other_resnet(LISTINGS["fcn"], "ResNeSt")))
    without = {n: x for n, x in state_dict.items() if not n.startswith("backbone.stem.")}
    with pytest.raises(ValueError, match="this ResNeSt of depth 50 is not imported: timm has none"):
        import_checkpoint(without)


# Options that shapes tell -------------------------------------------------------------------------


def on_meta(state_dict):
    return {name: x.to("meta") for name, x in state_dict.items()}


@pytest.mark.parametrize("model", ["pspnet", "ann"])
def test_without_auxiliary_head(model):
    state_dict = mmseg_checkpoint(model)
    without = {n: x for n, x in state_dict.items() if not n.startswith("auxiliary_head.")}
    assert import_checkpoint(without).arguments["auxiliary_channels"] == 0
    assert import_checkpoint(state_dict).arguments["auxiliary_channels"] == 256


def test_released_without_auxiliary_head():
    without = {n: x for n, x in ann_checkpoint().items() if not n.startswith("dsn.")}
    assert import_checkpoint(without).arguments["auxiliary_channels"] == 0


BACKBONES = {
    "resnet18": {"output_stride": 8, "dilate_both": False},
    "resnet34": {"output_stride": 8, "dilate_both": False},
    "resnet101": {"output_stride": 8},
    "resnet152": {"output_stride": 8},
    "hrnet_w18_small_v2": {"output_stride": 4, "bilinear_branches": True},
    "hrnet_w18": {"output_stride": 4, "bilinear_branches": True},
    "hrnet_w48": {"output_stride": 4, "bilinear_branches": True},
}


def mmseg_fcn_names(state_dict):
    """Those of an FCN of one convolution."""
    names = {
        "encoder.body.": "backbone.",
        "decoder.0.": "decode_head.convs.0.conv.",
        "decoder.1.": "decode_head.convs.0.bn.",
        "classifier.1.": "decode_head.conv_seg.",
    }

    def theirs(name):
        (ours,) = (prefix for prefix in names if name.startswith(prefix))
        return names[ours] + name.removeprefix(ours)

    return {theirs(n): x for n, x in state_dict.items()}


@pytest.mark.parametrize(
    ("backbone", "options"),
    mostly_slow(
        {name: (name, options) for name, options in BACKBONES.items()},
        "resnet18",
        "resnet101",
        "hrnet_w18_small_v2",
    ),
)
def test_backbones_of_mmsegmentation(backbone, options):
    """Their names are timm's, behind a prefix; here an FCN of one convolution on each."""
    ours = {"channels": 270, "kernel_size": 1, "auxiliary_channels": 0}
    with torch.device("meta"):
        network = create_model("fcn", backbone, 11, **ours, **options)
    imported = import_checkpoint(mmseg_fcn_names(network.state_dict()))
    assert (imported.source, imported.model) == ("mmsegmentation", "fcn")
    expected = {"backbone": backbone, "num_classes": 11, "align_corners": False}
    usual = {"auxiliary_bias": False, "dilation": 1, "dropout": 0}
    if backbone.startswith("resnet"):
        usual |= {"contract_dilation": True, "dropout": 0.1}
    assert imported.arguments == usual | expected | ours | options
    assert imported.assumed.keys() == imported.arguments.keys() & (
        {"align_corners", "contract_dilation", "dilation", "dropout"}
        | ({"output_stride"} if backbone.startswith("resnet") else set())
    )


@pytest.mark.parametrize("size", [(37, 53), pytest.param((64, 96), marks=pytest.mark.slow)])
@torch.no_grad()
def test_hrnet_of_mmsegmentation(size):
    """Its branches are resized where 32 does not divide the image's sides."""
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.device("meta"):
        network = create_model(
            "fcn",
            "hrnet_w18_small_v2",
            11,
            channels=270,
            kernel_size=1,
            auxiliary_channels=0,
            **BACKBONES["hrnet_w18_small_v2"],
        )
    state_dict = random_state_dict(listing(mmseg_fcn_names(network.state_dict())))
    o = Original(state_dict)
    logits = o.conv("decode_head.conv_seg", o.cbr("decode_head.convs.0", mmseg_hrnet(o, image)))
    assert_computes(import_checkpoint(state_dict), image, o.resize(logits, size))


def test_stem_of_another_width(pspnet):
    """Which timm has no name for."""
    narrow = {"stem.0": 16, "stem.1": 16, "stem.3": 16, "stem.4": 16, "stem.6": 32, "stem.7": 32}
    state_dict = on_meta(pspnet)
    for name, x in state_dict.items():
        module, _, _ = name.removeprefix("backbone.").rpartition(".")
        sizes = list(x.shape)
        if module in narrow and sizes:
            sizes[0] = narrow[module]
        if module in ("stem.3", "stem.6"):
            sizes[1] = 16
        if module in ("layer1.0.conv1", "layer1.0.downsample.0"):
            sizes[1] = 32
        state_dict[name] = torch.empty(sizes, device="meta")
    arguments = import_checkpoint(state_dict).arguments
    assert arguments["backbone"] == "resnet50"
    assert arguments["backbone_options"] == {"stem_type": "deep", "stem_width": 16}


def test_grids_of_apcnet():
    state_dict = on_meta(mmseg_checkpoint("apcnet"))
    dropped = "decode_head.acm_modules.3."
    smaller = {
        n: x for n, x in state_dict.items() if not n.startswith(dropped) and "fusion_conv" not in n
    }
    smaller["decode_head.bottleneck.conv.weight"] = torch.empty(512, 3584, 3, 3, device="meta")
    arguments = import_checkpoint(smaller).arguments
    assert (arguments["output_sizes"], arguments["fusion"]) == ((1, 2, 3), False)
    arguments = import_checkpoint(state_dict).arguments
    assert (arguments["output_sizes"], arguments["fusion"]) == ((1, 2, 3, 6), True)


@pytest.mark.parametrize(
    "prefix",
    mostly_slow(
        ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."], "_orig_mod.module."
    ),
)
def test_prefixes(prefix, pspnet):
    """Of data-parallel and compiled networks, in either order."""
    state_dict = {prefix + name: x for name, x in on_meta(pspnet).items()}
    assert import_checkpoint(state_dict).model == "pspnet"
    encoder = Encoder("resnet50c", 8)
    load_backbone(encoder, {prefix + name: x for name, x in pspnet.items()})
    expected = pspnet["backbone.layer4.2.bn3.running_var"]
    assert encoder.state_dict()["body.layer4.2.bn3.running_var"].equal(expected)


@pytest.mark.parametrize("dtype", mostly_slow([torch.float16, torch.float64], "torch.float16"))
def test_other_dtypes(dtype, pspnet, tmp_path):
    """A file keeps its dtype, a network has torch's default one."""
    half = {n: x.to(dtype) if x.is_floating_point() else x for n, x in pspnet.items()}
    imported = import_checkpoint(half)
    assert imported.state_dict["classifier.1.weight"].dtype == dtype
    imported.save(tmp_path / "out.pt")
    weight = load_model(tmp_path / "out.pt").classifier[1].weight
    assert weight.dtype == torch.float32
    assert weight.equal(half["decode_head.conv_seg.weight"].float())


@pytest.mark.slow
def test_parameters_are_tensors_too(tmp_path):
    """What a network's ``named_parameters`` give, or what was computed from them."""
    state_dict = mmseg_checkpoint("danet")
    parameters = {
        n: torch.nn.Parameter(x) * 1 if x.is_floating_point() else x for n, x in state_dict.items()
    }
    imported = import_checkpoint(parameters)
    assert not any(x.requires_grad for x in imported.state_dict.values())
    imported.save(tmp_path / "out.pt")
    assert load_model(tmp_path / "out.pt").decoder.position[1].gamma.requires_grad


# Backbones ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@torch.no_grad()
def test_torchvision_backbone(name, image):
    models = pytest.importorskip("torchvision.models")
    original = models.get_model(name, weights=None)
    original.load_state_dict(random_state_dict(listing(original.state_dict())), strict=False)
    encoder = Encoder(name, 32)
    unused = load_backbone(encoder, original.state_dict())
    assert unused == ["fc.weight", "fc.bias"]
    x = original.eval().maxpool(original.relu(original.bn1(original.conv1(image))))
    for stage, actual in enumerate(encoder.eval()(image)[-4:], 1):
        x = getattr(original, f"layer{stage}")(x)
        torch.testing.assert_close(actual, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "stride", "unused"),
    [
        ("test_resnet", 32, {"fc"}),
        ("test_convnext", 32, {"head"}),
        ("test_efficientnet", 32, {"conv_head", "bn2", "classifier"}),
        ("test_vit", 16, {"norm", "head"}),
    ],
)
@torch.no_grad()
def test_timm_backbone(name, stride, unused):
    """A classifier's file fits the feature extractor, whose names timm makes different."""
    timm = pytest.importorskip("timm")
    original = timm.create_model(name).eval()
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    encoder = Encoder(name, stride).eval()
    left = load_backbone(encoder, original.state_dict())
    assert {name.split(".")[0] for name in left} == unused
    image = torch.randn(1, 3, 160, 160)
    expected = original.forward_intermediates(image, intermediates_only=True)[-1]
    torch.testing.assert_close(encoder(image)[-1], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_mmsegmentation_backbone():
    """mmsegmentation numbers the stem; the network's file serves as the backbone's too."""
    state_dict = mmseg_checkpoint("fcn")
    encoder = Encoder("resnet50c", 8)
    unused = load_backbone(encoder, state_dict)
    assert unused == [name for name in state_dict if not name.startswith("backbone.")]
    loaded = encoder.body.state_dict()
    assert loaded["conv1.3.weight"].equal(state_dict["backbone.stem.3.weight"])
    assert loaded["bn1.running_var"].equal(state_dict["backbone.stem.7.running_var"])


@pytest.mark.parametrize("prefix", ["backbone.", "backbone_net.", "encoder.", "encoder.body."])
def test_backbone_of_a_network(prefix):
    encoder, other = Encoder("resnet18", 32), Encoder("resnet18", 32)
    state_dict = {prefix + name: x for name, x in other.body.state_dict().items()}
    assert load_backbone(encoder, state_dict | {"head.weight": torch.ones(1)}) == ["head.weight"]
    assert encoder.body.conv1.weight.equal(other.body.conv1.weight)


def test_another_backbone():
    """The message names the keys, and nothing is loaded."""
    encoder = Encoder("resnet18", 32)
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit backbone 'resnet18'.*layer1\.0\.conv3"):
        load_backbone(encoder, Encoder("resnet50", 32).body.state_dict())
    with pytest.raises(
        ValueError, match=r"missing conv1\.weight; unexpected layer1\.0.* more; shapes"
    ):
        load_backbone(encoder, Encoder("resnet50c", 32).body.state_dict())
    assert all(x.equal(before[name]) for name, x in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("test_convnext", {"contract_dilation": False}, "contract_dilation is for ResNets"),
        ("test_convnext", {"dilate_both": False}, "dilate_both is for ResNets"),
        ("resnet50", {"dilate_both": False}, "dilate_both is for basic blocks"),
        ("resnet18", {"bilinear_branches": True}, "bilinear_branches is for HRNets"),
    ],
)
def test_options_for_other_backbones(name, option, message):
    with pytest.raises(ValueError, match=message):
        Encoder(name, 32, **option)


def test_dilations():
    """timm dilates both convolutions of a basic block, and the first block of a stage by half."""

    def dilations(**options):
        stage = Encoder("resnet18", 8, **options).body["layer4"]
        return [(block.conv1.dilation[0], block.conv2.dilation[0]) for block in stage]

    assert dilations() == [(2, 4), (4, 4)]
    assert dilations(contract_dilation=False) == [(4, 4), (4, 4)]
    assert dilations(dilate_both=False) == [(2, 1), (4, 1)]


# Checkpoints that do not fit ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pspnet():
    return mmseg_checkpoint("pspnet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("decode_head.bottleneck.bn.running_mean"),
            r"mmsegmentation's pspnet: missing decoder\.fuse\.1\.running_mean$",
        ),
        (
            lambda s: s.pop("decode_head.bottleneck.conv.weight"),
            r"mmsegmentation's pspnet: missing decode_head\.bottleneck\.conv\.weight$",
        ),
        (
            lambda s: s.update({"decode_head.extra.conv.weight": torch.zeros(1)}),
            r"mmsegmentation's pspnet: unexpected decode_head\.extra\.conv\.weight$",
        ),
        (
            lambda s: s.update({"backbone.layer4.2.conv4.weight": torch.zeros(1)}),
            r"unexpected backbone\.layer4\.2\.conv4\.weight$",
        ),
        (
            lambda s: s.update({"decode_head.conv_seg.bias": torch.zeros(18)}),
            r"shapes classifier\.1\.bias \(18,\) instead of \(19,\)$",
        ),
        (
            lambda s: [s.pop(n) for n in list(s) if n.startswith("backbone.layer4.2.")],
            r"missing backbone\.layer4 of a ResNet: its stages have \[3, 4, 6, 2\] blocks$",
        ),
    ],
    ids=["missing", "missing-width", "unexpected", "unexpected-ours", "shape", "depth"],
)
def test_changed_checkpoint(change, message, pspnet):
    state_dict = dict(pspnet)
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(state_dict)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("nonlocal", "decode_head.nl_block.conv_out.conv.weight"),
        ("ann", "decode_head.fusion.stages.0.query_project.conv.weight"),
        ("ann", "decode_head.context.bottleneck.conv.weight"),
    ],
)
def test_only_biases_may_be_missing(model, name):
    """The convolutions whose bias is zero have a weight all the same."""
    state_dict = on_meta(mmseg_checkpoint(model))
    del state_dict[name]
    with pytest.raises(ValueError, match=rf"does not fit mmsegmentation's {model}: missing \S+$"):
        import_checkpoint(state_dict)


@pytest.mark.parametrize("name", ["backbone.bn1.weight", "backbone.conv1.6.weight"])
def test_two_names_for_one_tensor(name, pspnet):
    with pytest.raises(ValueError, match=f"pspnet: unexpected {re.escape(name)}$"):
        import_checkpoint(pspnet | {name: torch.zeros(64)})


def test_another_architecture(pspnet):
    with pytest.raises(ValueError, match=r"danet: missing .*; unexpected decode_head\.psp_modules"):
        import_checkpoint(pspnet, model="danet")
    known = r"mmsegmentation upernet, mmsegmentation pspnet, .* gald"
    with pytest.raises(ValueError, match=rf"no known architecture \({known}\): .*uper\.x"):
        import_checkpoint({"backbone.norm0.weight": torch.zeros(1), "uper.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="unknown source 'mmsegmentaton', the closest is 'mmseg"):
        import_checkpoint(pspnet, source="mmsegmentaton")
    with pytest.raises(
        ValueError, match="unknown imported model 'pspent', the closest is 'pspnet'"
    ):
        import_checkpoint(pspnet, model="pspent")
    with pytest.raises(ValueError, match=r"unknown option .*'output_strides'"):
        import_checkpoint(pspnet, output_strides=16)


def test_twins_that_differ():
    """ANN's query and key are one convolution: a checkpoint where they differ is another's."""
    with pytest.raises(ValueError, match="differs from its twin"):
        import_checkpoint(random_state_dict(LISTINGS["ann"]))


def test_counts_of_batches_may_be_missing(pspnet):
    """Old checkpoints have none."""
    old = {name: x for name, x in pspnet.items() if not name.endswith("num_batches_tracked")}
    imported = import_checkpoint(old)
    assert len(imported.zeros) == len(pspnet) - len(old)
    assert all(name.endswith("num_batches_tracked") for name in imported.zeros)


def test_options_override(pspnet):
    imported = import_checkpoint(pspnet, output_stride=16, align_corners=True)
    network = imported.build()
    assert network.encoder.strides[-1] == 16
    assert network.align_corners


# Files --------------------------------------------------------------------------------------------


def test_convert(tmp_path, pspnet, image, capsys):
    """The command's file holds the network, whatever the checkpoint was wrapped in."""
    theirs, ours = tmp_path / "pspnet.pth", tmp_path / "pspnet.pt"
    torch.save({"meta": {"epoch": 80}, "state_dict": pspnet}, theirs)
    assert main(["convert", str(theirs), str(ours), "--option", "output_stride=16"]) == 0
    printed = capsys.readouterr().out
    assert "mmsegmentation's pspnet: create_model('pspnet', backbone='resnet50c'" in printed
    network = load_model(ours)
    assert not network.training
    with torch.no_grad():
        expected = import_checkpoint(pspnet, output_stride=16).build()(image).logits
        torch.testing.assert_close(network(image).logits, expected, rtol=0, atol=0)


def test_convert_reports_what_is_zero(tmp_path, capsys):
    theirs, ours = tmp_path / "nonlocal.pth", tmp_path / "nonlocal.pt"
    torch.save(mmseg_checkpoint("nonlocal"), theirs)
    assert main(["convert", str(theirs), str(ours)]) == 0
    assert capsys.readouterr().out.endswith("has none: decoder.context.1.out.bias\n")


def test_convert_fails(tmp_path, pspnet, capsys):
    """One line on stderr, and no file."""
    theirs, ours = tmp_path / "in.pth", tmp_path / "out.pt"
    torch.save(pspnet, theirs)
    assert main(["convert", str(theirs), str(ours), "--model", "ccnet"]) == 1
    assert capsys.readouterr().err.startswith("ctxops convert: the checkpoint does not fit")
    assert main(["convert", str(tmp_path / "none"), str(ours)]) == 1
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(theirs), str(ours), "--option", "output_stride"])
    assert "expected NAME=VALUE, got 'output_stride'" in capsys.readouterr().err
    assert main(["convert", str(theirs), str(ours), "--option", "align_corners=false"]) == 1
    assert "align_corners must be True or False, got 'false'" in capsys.readouterr().err
    assert not ours.exists()
    assert main(["convert", str(theirs), str(tmp_path / "none" / "out.pt")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_the_checkpoint_is_not_overwritten(tmp_path, pspnet, capsys):
    path, link = tmp_path / "in.pth", tmp_path / "link.pth"
    torch.save(pspnet, path)
    link.symlink_to(path)
    content = path.read_bytes()
    for converted in path, link:
        assert main(["convert", str(path), str(converted)]) == 1
        assert "is the checkpoint itself" in capsys.readouterr().err
    assert path.read_bytes() == content


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_wrappers(wrapper, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({wrapper: {"a": torch.ones(2), "epoch": 3}, "optimizer": {"state": {}}}, path)
    assert load_checkpoint(path).keys() == {"a"}


class _Anything:
    """What a checkpoint must not bring to life."""

    def __setstate__(self, state):
        raise AssertionError("an object of the checkpoint came to life")


class _Reduced:
    """What pickle turns into a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """For pickle calls what ``function`` is made of, if that is one of these too."""


class _Mapping(dict):
    """A mapping that torch fills only where it is its own."""


_FOREIGN = {
    "object": lambda trace: _Anything(),
    "number": lambda trace: np.float64(3),
    "array": lambda trace: np.arange(3),
    "defaultdict": lambda trace: collections.defaultdict(list, {1: [2]}),
    "optimizer": lambda trace: torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], 0.1),
    "eval": lambda trace: _Reduced(eval, f"open({str(trace)!r}, 'w')"),
    "download": lambda trace: _Reduced(torch.hub.load, "nobody/nothing", "model"),
    "class": lambda trace: _Anything,
}


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("kind", _FOREIGN)
def test_objects_in_a_file_stay_inert(kind, new_format, tmp_path):
    path, trace = tmp_path / "checkpoint.pth", tmp_path / "trace"
    content = {"state_dict": {"a": torch.ones(2)}, "hook": _FOREIGN[kind](trace), "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    assert load_checkpoint(path).keys() == {"a"}
    assert not trace.exists()


_TENSOR = torch._utils._rebuild_tensor_v2
_TYPED = torch._tensor._rebuild_from_type_v2
_PARAMETER = torch._utils._rebuild_parameter
# A call of ``eval`` in a place where torch's reader works on what the file tells.
_NESTED = {
    "meta": lambda call, x: {"meta": {"hooks": [{"log": [call]}]}, "state_dict": {"a": x}},
    "value": lambda call, x: collections.OrderedDict(a=x, b=call),
    "pairs": lambda call, x: {"a": x, "b": _Reduced(collections.OrderedDict, [("b", call)])},
    "partial": lambda call, x: {"a": x, "b": functools.partial(print, call)},
    "call-of-partial": lambda call, x: {
        "a": x,
        "b": _Reduced(_Reduced(functools.partial, eval, *call.call[1])),
    },
    "typed": lambda call, x: {"a": x, "b": _Reduced(_TYPED, eval, eval, call.call[1], {})},
    "typed-state": lambda call, x: {"a": _Reduced(_TYPED, _Reduced, torch.Tensor, (x,), call)},
    "subclass": lambda call, x: {"a": _Reduced(_TYPED, eval, torch.Tensor, call.call[1], {})},
    "class": lambda call, x: {"a": _Reduced(_TYPED, _TENSOR, _Anything, (call,), {})},
    "hooks": lambda call, x: {"a": _Reduced(_PARAMETER, x, True, {0: call})},
    "call-of-hooks": lambda call, x: {"a": _Reduced(_PARAMETER, x, True, call)},
    "parameter": lambda call, x: {"a": _Reduced(_PARAMETER, call, True, {})},
    "state": lambda call, x: {
        "a": _Reduced(torch._utils._rebuild_parameter_with_state, x, True, {}, {"b": call})
    },
    "storage": lambda call, x: {"a": _Reduced(_TENSOR, call, 0, (2,), (1,), False, {})},
    "size": lambda call, x: {"a": _Reduced(_TENSOR, x.storage(), 0, (call,), (1,), False, {})},
    "metadata": lambda call, x: {
        "a": _Reduced(_TENSOR, x.storage(), 0, (2,), (1,), False, {0: call}, call)
    },
    "sparse": lambda call, x: {
        "a": _Reduced(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, (call, x, (2,)))
    },
    "wrapper": lambda call, x: {
        "a": _Reduced(
            torch._utils._rebuild_wrapper_subclass,
            *(_Anything, torch.float32, (2,), (1,), 0, torch.strided, call, False),
        )
    },
    "array": lambda call, x: {
        "a": _Reduced(
            torch._utils._rebuild_device_tensor_from_numpy, call, torch.float32, "cpu", False
        )
    },
}
# Those of them whose tensor is there all the same.
_READ = {"meta", "value", "pairs", "partial", "typed"}
_READ |= {"hooks", "call-of-hooks", "state"}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("place", _NESTED)
def test_calls_in_nested_places_stay_inert(place, new_format, tmp_path):
    """The file is read without them, or not at all: nothing ran."""
    path, trace = tmp_path / "checkpoint.pth", tmp_path / "trace"
    call = _Reduced(eval, f"open({str(trace)!r}, 'w')")
    content = _NESTED[place](call, torch.ones(2))
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    if place in _READ:
        assert torch.equal(load_checkpoint(path)["a"], torch.ones(2))
    else:
        with pytest.raises(ValueError, match=r"checkpoint\.pth' (is damaged|holds)"):
            load_checkpoint(path)
    assert not trace.exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
def test_other_protocols_of_pickle(protocol, new_format, tmp_path):
    """Which name functions in another way."""
    path, trace = tmp_path / "checkpoint.pth", tmp_path / "trace"
    content = {"a": torch.ones(2), "b": _Reduced(eval, f"open({str(trace)!r}, 'w')")}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": new_format}
    torch.save(content, path, **options)
    with pytest.raises(ValueError, match=r"another protocol than torch\.save's own: save it"):
        load_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda trace: _Reduced(os.system, f"touch {trace}"), r"names \w+\.system, which could"),
        (lambda trace: _Mapping(a=1), r"cannot be left out, among \S*_Mapping: save its tensors"),
    ],
    ids=["command", "mapping"],
)
def test_objects_that_no_file_may_hold(content, message, new_format, tmp_path):
    path, trace = tmp_path / "checkpoint.pth", tmp_path / "trace"
    torch.save(
        {"state_dict": {"a": torch.ones(2)}, "hook": content(trace)},
        path,
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({0: torch.zeros(1)}, "holds no state dict"),
        ({"state_dict": _Anything()}, "holds no state dict"),
    ],
    ids=["list", "no-tensors", "numbers", "object"],
)
def test_files_of_another_kind(content, message, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(path, tmp_path / "out.pt")


def test_file_of_no_network(tmp_path):
    path = tmp_path / "checkpoint.pth"
    for saved in (
        {"state_dict": {}},
        {"model": "fcn", "arguments": _Anything(), "state_dict": {}},
    ):
        torch.save(saved, path)
        with pytest.raises(ValueError, match="no saved network; checkpoints of other code: ctxops"):
            load_model(path)


@pytest.mark.parametrize("load", [load_checkpoint, load_model])
@pytest.mark.parametrize("new_format", [True, False])
def test_bytes_that_are_no_file_of_tensors(load, new_format, tmp_path):
    """Torn anywhere: torch's reader has an error of its own for most places."""
    path = tmp_path / "checkpoint.pth"
    torch.save({"a": torch.arange(1999.0)}, path, _use_new_zipfile_serialization=new_format)
    content = path.read_bytes()
    torn = [content[:length] for length in range(61, len(content) - 1, 61)]
    for wrong in [b"not a checkpoint", *torn]:
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"checkpoint.pth' is damaged, or neither torch.save"):
            load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>", "is a web page and no checkpoint: the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
    ],
    ids=["empty", "page", "pointer"],
)
def test_what_comes_in_the_place_of_a_file(content, message, tmp_path):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(3.0)}, path)
    assert torch.equal(load_checkpoint(path)["a"], torch.arange(3.0))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(path)


@pytest.mark.slow
def test_averaged_weights(tmp_path, pspnet, capsys):
    """mmcv's copies beside the weights, others' state dict beside theirs."""
    path, ours = tmp_path / "theirs.pth", tmp_path / "ours.pt"
    name = "backbone.layer1.0.bn1.weight"
    tensors = dict(pspnet)
    averaged = tensors[name] + 1
    copies = {"ema_" + name.replace(".", "_"): averaged, "data_preprocessor.mean": torch.ones(3)}
    torch.save({"state_dict": tensors | copies}, path)
    assert torch.equal(load_checkpoint(path)[name], tensors[name])
    assert torch.equal(load_checkpoint(path, ema=True)[name], averaged)
    assert main(["convert", str(path), str(ours)]) == 0
    assert (
        f"left out, for the logits do not depend on them: {', '.join(copies)}"
        in capsys.readouterr().out
    )
    assert main(["convert", str(path), str(ours), "--ema"]) == 0
    assert torch.equal(load_model(ours).encoder.body.state_dict()["layer1.0.bn1.weight"], averaged)

    torch.save({"model": {"state_dict": tensors}, "model_ema": {name: averaged}}, path)
    assert torch.equal(load_checkpoint(path)[name], tensors[name])
    assert torch.equal(load_checkpoint(path, ema=True)[name], averaged)
    torch.save({"model": tensors}, path)
    with pytest.raises(ValueError, match="has no averaged weights"):
        load_checkpoint(path, ema=True)
