"""DeepLabv3 of torchvision and of segmentation_models.pytorch, which has torchvision's ASPP.

Both are written out in plain torch; torchvision 0.29 and segmentation_models.pytorch 0.6 have these
names. The heads are narrow.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from checkpoints import Original, random_state_dict, read_listings

pytest.importorskip("timm")

from ctxops.models import import_checkpoint

STEM = ["conv {}conv1 64 3 7 7", "norm {}bn1 64"]


def backbone(file, theirs, ours):
    """The stages of a list's backbone, with the stem of torchvision."""
    lines = next(iter(read_listings(Path(__file__).with_name(file)).values()))
    stages = [line.replace(theirs, ours) for line in lines if f" {theirs}layer" in line]
    if ours == "backbone.":  # its stem has one convolution, as wide as the last of three
        stages[0] = f"conv {ours}layer1.0.conv1 64 64 1 1"
    return [line.format(ours) for line in STEM] + stages


def aspp_listing(name, width):
    lines = []
    for i in range(4):
        size = 3 if i else 1
        lines += [f"conv {name}.convs.{i}.0 8 {width} {size} {size}", f"norm {name}.convs.{i}.1 8"]
    lines += [f"conv {name}.convs.4.1 8 {width} 1 1", f"norm {name}.convs.4.2 8"]
    return [*lines, f"conv {name}.project.0 8 40 1 1", f"norm {name}.project.1 8"]


TORCHVISION = [
    *backbone("mmsegmentation_r50.txt", "backbone.", "backbone."),
    *aspp_listing("classifier.0", 2048),
    "conv classifier.1 8 8 3 3",
    "norm classifier.2 8",
    "conv classifier.4 5 8 1 1 bias",
    "conv aux_classifier.0 6 1024 3 3",
    "norm aux_classifier.1 6",
    "conv aux_classifier.4 5 6 1 1 bias",
]
SMP = [
    *backbone("sssegmentation_r18.txt", "backbone_net.", "encoder."),
    *aspp_listing("decoder.aspp", 512),
    "conv decoder.conv 8 8 3 3",
    "norm decoder.bn 8",
    "conv segmentation_head.0 5 8 1 1 bias",
]

SMP_PSPNET = [
    *backbone("sssegmentation_r18.txt", "backbone_net.", "encoder."),
    *(f"conv decoder.psp.blocks.{i}.pool.1.0 32 128 1 1{' bias' * (i == 0)}" for i in range(4)),
    *(f"norm decoder.psp.blocks.{i}.pool.1.1 32" for i in (1, 2, 3)),
    "conv decoder.conv.0 8 256 1 1",
    "norm decoder.conv.1 8",
    "conv segmentation_head.0 5 8 3 3 bias",
]


def stem(o, prefix, image):
    x = o.conv(f"{prefix}conv1", image, stride=2, padding=3)
    return F.max_pool2d(o.norm(f"{prefix}bn1", x).relu(), 3, 2, 1)


def aspp(o, name, x):
    y = [o.cbr(f"{name}.convs.{i}", x, d) for i, d in enumerate((1, 12, 24, 36))]
    image = o.conv(f"{name}.convs.4.1", x.mean((2, 3), keepdim=True))
    y.append(o.norm(f"{name}.convs.4.2", image).relu().expand_as(y[0]))
    return o.cbr(f"{name}.project", torch.cat(y, 1))


def torchvision_logits(o, image):
    dilations = [1] * 3, [1] * 4, [1] + [2] * 5, [2] + [4] * 2
    *_, low, x = o.stages("backbone.", stem(o, "backbone.", image), dilations)
    x = o.conv("classifier.1", aspp(o, "classifier.0", x), padding=1)
    x = o.conv("classifier.4", o.norm("classifier.2", x).relu())
    return o.resize(x, image.shape[2:]), low


def smp_encoder(o, image, dilations):
    """Of ResNet-18, as many stages as dilations."""
    x = stem(o, "encoder.", image)
    for stage, d in enumerate(dilations, 1):
        for i in (0, 1):
            name = f"encoder.layer{stage}.{i}"
            stride = 2 if stage == 2 and i == 0 else 1
            y = o.conv(f"{name}.conv1", x, stride=stride, padding=d, dilation=d)
            y = o.conv(f"{name}.conv2", o.norm(f"{name}.bn1", y).relu(), padding=d, dilation=d)
            if f"{name}.downsample.0.weight" in o.tensors:
                x = o.conv(f"{name}.downsample.0", x, stride=stride)
                x = o.norm(f"{name}.downsample.1", x)
            x = (x + o.norm(f"{name}.bn2", y)).relu()
    return x


def smp_logits(o, image):
    x = smp_encoder(o, image, (1, 1, 2, 4))
    x = o.conv("decoder.conv", aspp(o, "decoder.aspp", x), padding=1)
    x = o.conv("segmentation_head.0", o.norm("decoder.bn", x).relu())
    return F.interpolate(x, scale_factor=8.0, mode="bilinear", align_corners=True)


@torch.no_grad()
def test_torchvision():
    state_dict = random_state_dict(TORCHVISION)
    imported = import_checkpoint(state_dict)
    assert (imported.source, imported.model) == ("torchvision", "deeplabv3")
    image = torch.randn(1, 3, 35, 43, generator=torch.Generator().manual_seed(1))
    o = Original(state_dict, conv="{}.0", norm="{}.1")
    expected, low = torchvision_logits(o, image)
    assert expected.std() > 0.1
    network = imported.build()
    torch.testing.assert_close(network(image).logits, expected, rtol=0, atol=1e-5)
    expected = o.conv("aux_classifier.4", o.cbr("aux_classifier", low))
    torch.testing.assert_close(network.auxiliary(low), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_segmentation_models_pytorch():
    state_dict = random_state_dict(SMP)
    imported = import_checkpoint(state_dict)
    assert (imported.source, imported.model) == ("segmentation_models.pytorch", "deeplabv3")
    image = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    expected = smp_logits(Original(state_dict, conv="{}.0", norm="{}.1"), image)
    assert expected.std() > 0.05
    torch.testing.assert_close(imported.build()(image).logits, expected, rtol=0, atol=1e-5)


def smp_pspnet_logits(o, image):
    x = smp_encoder(o, image, (1, 1))
    maps = []
    for i, n in enumerate((1, 2, 3, 6)):
        name = f"decoder.psp.blocks.{i}.pool.1"
        y = o.conv(f"{name}.0", F.adaptive_avg_pool2d(x, n))
        y = (o.norm(f"{name}.1", y) if i else y).relu()
        maps.append(F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True))
    x = o.cbr("decoder.conv", torch.cat([*maps, x], 1))
    x = o.conv("segmentation_head.0", x, padding=1)
    return F.interpolate(x, scale_factor=8.0, mode="bilinear", align_corners=True)


@torch.no_grad()
def test_pspnet_of_segmentation_models_pytorch():
    """On the map of stride 8; the stages behind it are in the checkpoint all the same."""
    state_dict = random_state_dict(SMP_PSPNET)
    imported = import_checkpoint(state_dict)
    assert (imported.source, imported.model) == ("segmentation_models.pytorch", "pspnet")
    assert {name.split(".")[1] for name in imported.left_out} == {"layer3", "layer4"}
    image = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    expected = smp_pspnet_logits(Original(state_dict, conv="{}.0", norm="{}.1"), image)
    assert expected.std() > 0.05
    torch.testing.assert_close(imported.build()(image).logits, expected, rtol=0, atol=1e-5)


def test_pspnet_on_another_map():
    """Of another depth: its width tells the stage, unless that has the stem's stride or width."""
    state_dict = {name: x.to("meta") for name, x in random_state_dict(SMP_PSPNET).items()}
    for width, stride in (256, 16), (512, 32):
        for i in range(4):
            name = f"decoder.psp.blocks.{i}.pool.1.0.weight"
            state_dict[name] = torch.empty(32, width, 1, 1, device="meta")
        state_dict["decoder.conv.0.weight"] = torch.empty(8, width + 128, 1, 1, device="meta")
        imported = import_checkpoint(state_dict)
        assert imported.arguments["output_stride"] == stride
        assert any(name.startswith("encoder.layer4") for name in imported.left_out) == (width < 512)
    name = "decoder.psp.blocks.0.pool.1.0.weight"
    with pytest.raises(ValueError, match="depth 1 or 2, on a map of 64 channels, is not imported"):
        import_checkpoint(state_dict | {name: torch.empty(16, 64, 1, 1, device="meta")})


def test_old_names_of_segmentation_models_pytorch():
    """The decoder was a list."""
    new = {name: x.to("meta") for name, x in random_state_dict(SMP).items()}
    parts = {
        "decoder.aspp.": "decoder.0.",
        "decoder.conv.": "decoder.1.",
        "decoder.bn.": "decoder.2.",
    }
    old = {}
    for name, x in new.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), "")
        old[parts.get(prefix, "") + name.removeprefix(prefix)] = x
    imported = import_checkpoint(old)
    expected = import_checkpoint(new)
    assert (imported.source, imported.arguments) == (expected.source, expected.arguments)
    assert imported.state_dict.keys() == expected.state_dict.keys()


def test_pools_on_shortcuts():
    """Whose dilated stages are another network's."""
    state_dict = {name: x.to("meta") for name, x in random_state_dict(SMP).items()}
    state_dict["encoder.layer2.0.downsample.1.weight"] = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="average pooling on their shortcuts are not imported"):
        import_checkpoint(state_dict)


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["backbone.0.0.weight", "classifier.cbr.0.weight"], "torchvision's lraspp"),
        (
            ["backbone.0.0.weight", "classifier.0.convs.0.0.weight"],
            "torchvision's deeplabv3 on Mob",
        ),
        (
            [
                "encoder.conv1.weight",
                "decoder.blocks.0.conv1.0.weight",
                "segmentation_head.0.weight",
            ],
            r"segmentation_models\.pytorch's Unet, FPN or another",
        ),
    ],
    ids=["lraspp", "mobilenet", "unet"],
)
def test_other_networks_are_refused_by_name(names, refused):
    with pytest.raises(ValueError, match=f"the checkpoint is of {refused}.* is not imported"):
        import_checkpoint({name: torch.zeros(1) for name in names})
