# SPDX-License-Identifier: Apache-2.0
"""Backbones of every kind at the strides that they have."""

import sys
import threading

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import timm

from ctxops.models import Encoder, create_model
from modules import mostly_slow
from networks import images

# Name, output stride, channels and strides of the maps.
BACKBONES = [
    ("resnet101s", 8, (256, 512, 1024, 2048), (4, 8, 8, 8)),
    ("resnet50c", 16, (256, 512, 1024, 2048), (4, 8, 16, 16)),
    ("resnet18", 32, (64, 128, 256, 512), (4, 8, 16, 32)),
    ("densenet121", 8, (256, 512, 1024, 1024), (4, 8, 8, 8)),
    ("densenet161", 8, (384, 768, 2112, 2208), (4, 8, 8, 8)),
    ("hrnet_w18", 4, (18 + 36 + 72 + 144,), (4,)),
    ("hrnet_w48", 4, (48 + 96 + 192 + 384,), (4,)),
    ("vit_tiny_patch16_224", 16, (192,) * 3, (16,) * 3),
    ("vit_base_patch16_224", 16, (768,) * 3, (16,) * 3),
    ("convnext_tiny", 8, (96, 192, 384, 768), (4, 8, 8, 8)),
    ("efficientnet_b0", 8, (24, 40, 112, 320), (4, 8, 8, 8)),
    ("mobilenetv3_large_100", 8, (24, 40, 112, 960), (4, 8, 8, 8)),
    ("swin_tiny_patch4_window7_224", 32, (96, 192, 384, 768), (4, 8, 16, 32)),
]

# Of their kinds a smaller one is tested as well.
LARGE = ("resnet101s", "densenet161", "hrnet_w18", "hrnet_w48", "vit_base_patch16_224")

# Of each kind one that computes in no time.
SMALL = [
    ("test_resnet", 8),
    ("test_convnext", 8),
    ("test_efficientnet", 8),
    ("test_vit", 16),
    ("densenet121", 8),
    ("hrnet_w18_small", 4),
    ("swin_tiny_patch4_window7_224", 32),
]


@pytest.mark.parametrize(
    ("name", "output_stride", "channels", "strides"),
    [pytest.param(*row, marks=pytest.mark.slow if row[0] in LARGE else ()) for row in BACKBONES],
)
def test_channels_and_strides(name, output_stride, channels, strides):
    with torch.device("meta"):
        encoder = Encoder(name, output_stride).eval()
        maps = encoder(images(64, 96))
    assert encoder.channels == channels
    assert encoder.strides == strides
    assert [tuple(x.shape) for x in maps] == [
        (1, width, 64 // stride, 96 // stride)
        for width, stride in zip(channels, strides, strict=True)
    ]


@pytest.mark.parametrize(("name", "output_stride"), SMALL)
def test_takes_any_size(name, output_stride):
    encoder = Encoder(name, output_stride).eval()
    for size in [(37, 53), (33, 70)]:
        for x, width, stride in zip(
            encoder(images(*size)), encoder.channels, encoder.strides, strict=True
        ):
            assert x.shape[:2] == (1, width)
            for side, of_image in zip(x.shape[2:], size, strict=True):
                assert of_image // stride <= side <= -(-of_image // stride) + 1
            assert x.isfinite().all()


def test_the_images_of_an_hrnet_need_not_divide():
    """A map's positions see the image where they lie: the padding adds none."""
    encoder = Encoder("hrnet_w18_small", 4).eval()
    (x,) = encoder(images(37, 53))
    assert x.shape[2:] == (10, 14)
    image = images(64, 32)
    (exact,) = encoder(image)
    maps = encoder.body(image)
    torch.testing.assert_close(exact[:, : maps[0].shape[1]], maps[0])


@pytest.mark.parametrize(("output_stride", "dilations"), [(8, (1, 1, 2, 4)), (16, (1, 1, 1, 2))])
def test_a_dilated_densenet_sees_what_it_saw(output_stride, dilations):
    """Dilated, it computes between its former positions as well, and there it changes nothing."""
    encoder = Encoder("densenet121", output_stride).eval()
    for level, dilation in enumerate(dilations):
        block = dict(encoder.body.named_children())[f"features_denseblock{level + 1}"]
        assert {layer.conv2.dilation[0] for layer in block.values()} == {dilation}
    plain = Encoder("densenet121", 32).eval()
    plain.load_state_dict(encoder.state_dict())
    assert encoder.strides[-1] == output_stride
    image = images(64, 64)
    for x, expected in zip(encoder(image)[:2], plain(image)[:2], strict=True):
        torch.testing.assert_close(x, expected)


def test_multi_grid_and_ceil_mode():
    encoder = Encoder("resnet50", 8, multi_grid=(1, 2, 4), ceil_mode=True).eval()
    assert [block.conv2.dilation[0] for block in encoder.body["layer4"]] == [4, 8, 16]
    with torch.device("meta"):
        encoder = Encoder("resnet18", 8, ceil_mode=True).eval()
        assert [x.shape[2] for x in encoder(images(512, 512))] == [129, 65, 65, 65]
        encoder = Encoder("resnet18", 8).eval()
        assert [x.shape[2] for x in encoder(images(512, 512))] == [128, 64, 64, 64]


def dilations(stage):
    """Of the 3 x 3 convolutions of every block, whose padding keeps the size."""
    windows = [m for m in stage.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(m.padding == m.dilation for m in windows)
    return [m.dilation[0] for m in windows]


@pytest.mark.parametrize(
    ("name", "options", "layer3", "layer4"),
    [
        ("resnet18", {}, [1, 2, 2, 2], [2, 4, 4, 4]),
        ("resnet18", {"contract_dilation": False}, [2, 2, 2, 2], [4, 4, 4, 4]),
        ("resnet18", {"dilate_both": False}, [1, 1, 2, 1], [2, 1, 4, 1]),
        ("resnet18", {"multi_grid": (1, 2)}, [1, 2, 2, 2], [4, 4, 8, 8]),
        ("resnet18", {"multi_grid": (1, 2), "dilate_both": False}, [1, 1, 2, 1], [4, 1, 8, 1]),
        ("resnet50", {}, [1, 2, 2, 2, 2, 2], [2, 4, 4]),
        ("resnet50", {"contract_dilation": False}, [2] * 6, [4, 4, 4]),
        ("resnet50", {"multi_grid": (2, 3)}, [1, 2, 2, 2, 2, 2], [8, 12, 8]),
        ("resnest26d", {"multi_grid": (3,)}, [1, 2], [12, 12]),
        ("resnet50", {"stage_dilations": (1, 1, 1, 6)}, [1] * 6, [3, 6, 6]),
        (
            "resnet50",
            {"stage_dilations": (1, 1, 2, 5), "contract_dilation": False},
            [2] * 6,
            [5, 5, 5],
        ),
        (
            "resnet50",
            {"stage_dilations": (1, 1, 2, 1), "multi_grid": (1, 2, 4)},
            [1, 2, 2, 2, 2, 2],
            [1, 2, 4],
        ),
        (
            "resnet18",
            {"stage_dilations": (1, 1, 3, 4), "dilate_both": False},
            [1, 1, 3, 1],
            [2, 1, 4, 1],
        ),
    ],
    ids=str,
)
def test_dilations_of_resnets(name, options, layer3, layer4):
    with torch.device("meta"):
        encoder = Encoder(name, 8, **options)
    assert dilations(encoder.body["layer3"]) == layer3
    assert dilations(encoder.body["layer4"]) == layer4


def test_pools_on_shortcuts():
    """Those that keep the size go, the others stay."""
    with torch.device("meta"):
        body = Encoder("resnet18d", 8, shortcut_pools=False).body
    pools = [body[f"layer{stage}"][0].downsample[0] for stage in (2, 3, 4)]
    assert [type(pool) for pool in pools] == [nn.AvgPool2d, nn.Identity, nn.Identity]


def test_dilated_stages_keep_their_strides():
    encoder = Encoder("resnet18", 32, stage_dilations=(1, 1, 2, 4)).eval()
    assert dilations(encoder.body["layer4"]) == [2, 4, 4, 4]
    assert [tuple(x.shape[2:]) for x in encoder(images(37, 70))[-2:]] == [(3, 5), (2, 3)]
    options = {"stage_dilations": (3, 1, 1, 1), "contract_dilation": False}
    assert dilations(Encoder("resnet18", 32, **options).body["layer1"]) == [3, 3, 3, 3]


def test_a_backbone_of_a_hub(monkeypatch):
    """Its architecture counts, wherever its weights are."""
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: create(name.rpartition("/")[2], **options)
    )
    with torch.device("meta"):
        assert Encoder("hf-hub:timm/hrnet_w18_small.ms_in1k", 4).channels == (16 + 32 + 64 + 128,)


def test_pretrained_reaches_timm(monkeypatch):
    create, asked = timm.create_model, []

    def record(name, pretrained, **options):
        asked.append(pretrained)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", record)
    for pretrained in (False, True):
        create_model("fcn", "test_resnet", pretrained=pretrained)
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        ((), ValueError, r"multi_grid must be a list or tuple of factors, got \(\)"),
        (2, ValueError, "multi_grid must be a list or tuple of factors, got 2"),
        ((1, 0), ValueError, r"multi_grid\[1\] must be at least 1, got 0"),
        ((1, 2.0), TypeError, r"multi_grid\[1\] must be an integer, got 2\.0"),
    ],
    ids=str,
)
def test_bad_multi_grid(factors, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        Encoder("resnet18", 8, multi_grid=factors)


def test_other_channels_of_the_image():
    encoder = Encoder("test_resnet", 8, in_channels=5).eval()
    assert encoder(torch.randn(1, 5, 33, 33))[-1].shape[1] == encoder.channels[-1]


def test_options_of_the_backbone():
    encoder = Encoder("test_resnet", 8, options={"out_indices": (2, 4)})
    assert encoder.strides == (8, 8)
    assert len(encoder(images(33, 33, batch=2))) == 2
    with pytest.raises(TypeError, match="unheard_of"):
        Encoder("test_resnet", 8, options={"unheard_of": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet5O", 8), r"unknown backbone 'resnet5O', the closest is '\w*resnet\w*'; timm"),
        (("vgg11", 8), r"'vgg11' has no map of output_stride=8.* choose output_stride=32"),
        (("hrnet_w18_small", 8), r"strides of its maps are \(4,\): choose output_stride=4"),
        (("test_vit", 8), r"strides of its maps are \(16, 16, 16\): choose output_stride=16"),
        (("swin_tiny_patch4_window7_224", 8), "choose output_stride=32"),
        (("densenet121", 5), "choose output_stride=4"),
        (("resnet18", 7), "output_stride=7"),
    ],
    ids=str,
)
def test_unknown_backbones_and_strides(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        Encoder(*arguments)


@pytest.mark.parametrize("argument", [{"multi_grid": (1, 2)}, {"ceil_mode": True}], ids=str)
def test_for_resnets_alone(argument):
    (name,) = argument
    with pytest.raises(ValueError, match=f"{name} is for ResNets: backbone 'test_vit' has no"):
        Encoder("test_vit", 16, **argument)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((nn.Identity(), 8), {}, TypeError, "backbone must be the name of a timm model, got Iden"),
        (("resnet18", "8"), {}, TypeError, "output_stride must be an integer, got '8'"),
        (("resnet18", 8), {"in_channels": 0}, ValueError, "in_channels must be at least 1"),
        (("resnetrs50", 8), {"ceil_mode": True}, ValueError, "ceil_mode .*'resnetrs50' has layers"),
        (("resnet50", 8), {"dilate_both": False}, ValueError, "'resnet50' has bottlenecks"),
        (("resnet50", 8), {"shortcut_pools": False}, ValueError, "backbone 'resnet50' has none"),
        (
            ("res2net50_26w_4s", 8),
            {"multi_grid": (1, 2)},
            ValueError,
            "multi_grid .* backbone 'res2net50_26w_4s' has other blocks",
        ),
        (("resnet18", 8), {"bilinear_branches": True}, ValueError, "bilinear_branches is for HR"),
        (
            ("resnet18", 8),
            {"stage_dilations": (1, 2)},
            ValueError,
            r"stage_dilations must be one for each stage, got \(1, 2\)",
        ),
        (
            ("resnet18", 8),
            {"stage_dilations": 2},
            ValueError,
            "stage_dilations must be a list or tuple of dilations, got 2",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, options, error, message):
    with torch.device("meta"), pytest.raises(error, match=message):
        Encoder(*arguments, **options)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "ctxops\[models\]"'):
        create_model("fcn", "test_resnet")


@pytest.mark.parametrize(
    ("backbone", "stride"),
    mostly_slow(
        {
            "convnext_atto": ("convnext_atto", 8),
            "densenet121": ("densenet121", 8),
            "dla34": ("dla34", 32),
            "edgenext_xx_small": ("edgenext_xx_small", 32),
            "pvt_v2_b0": ("pvt_v2_b0", 32),
            "vgg11": ("vgg11", 32),
        },
        "convnext_atto",
        "dla34",
    ),
)
def test_images_of_any_size(backbone, stride):
    network = create_model("fcn", backbone, 5, output_stride=stride).eval()
    for size in ((61, 75), (7, 9), (3, 2)):
        with torch.no_grad():
            assert network(images(*size)).logits.shape == (1, 5, *size)


@pytest.mark.parametrize(
    ("backbone", "wanted"),
    [("tresnet_m", "sides that are multiples of 32"), ("pit_ti_224", "the size that timm fixes")],
)
def test_an_image_that_the_backbone_cannot_take(backbone, wanted):
    message = rf"image must have {wanted}.* for backbone '{backbone}', got \(61, 75\)"
    with pytest.raises(ValueError, match=message):
        Encoder(backbone, 32).eval()(images(61, 75))


class _Refusing:
    def __init__(self, kind, part):
        self.kind, self.part = kind, part

    def __call__(self, *_):
        raise self.kind("not of the size")


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError, AssertionError])
@pytest.mark.parametrize("part", [None, threading.Lock()], ids=["copied", "not_copied"])
def test_an_error_of_a_hook_is_not_of_the_size(kind, part):
    encoder = Encoder("resnet18", 8).eval()
    encoder.body.layer2.register_forward_hook(_Refusing(kind, part))
    with pytest.raises(kind, match=r"^not of the size$"):
        encoder(images(61, 75))


def test_an_error_with_weights_that_are_made_of_others():
    encoder = Encoder("resnet18", 8)
    weights = {name: 1 * weight for name, weight in encoder.named_parameters()}
    encoder.body.layer2.register_forward_hook(_Refusing(RuntimeError, None))
    with pytest.raises(RuntimeError, match=r"^not of the size$"):
        torch.func.functional_call(encoder, weights, (images(61, 75),))


def test_an_error_that_is_not_of_the_size():
    with pytest.raises(RuntimeError, match=r"should be the same|expected scalar type Double"):
        Encoder("tresnet_m", 32).eval()(images(64, 64).double())
    with pytest.raises(RuntimeError, match=r"should be the same|expected scalar type Double"):
        Encoder("resnet18", 8)(images(61, 75).double())
