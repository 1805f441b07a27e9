"""Networks of mmsegmentation, where it is installed, against what their checkpoints become."""

from pathlib import Path

import pytest
import torch

from checkpoints import listing, random_state_dict, read_listings

pytest.importorskip("timm")
pytest.importorskip("mmseg")

import mmseg
from mmengine import Config
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules

from ctxops.models import import_checkpoint

CONFIGS = Path(mmseg.__file__).parent / ".mim" / "configs" / "_base_" / "models"
THEIR_NAMES = {"dnlnet": "dnl"}
LISTINGS = read_listings(Path(__file__).with_name("mmsegmentation_r50.txt"))


def configuration(model, backbone="r50-d8"):
    """The network's base configuration, with norms for one process."""
    config = Config.fromfile(CONFIGS / f"{THEIR_NAMES.get(model, model)}_{backbone}.py").model
    config.pretrained = None

    def replace_norms(part):
        for key, value in list(part.items()):
            if key == "norm_cfg":
                part[key] = {"type": "BN", "requires_grad": True}
            for child in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(child, dict):
                    replace_norms(child)

    replace_norms(config)
    return config


def build(config):
    register_all_modules()
    return MODELS.build(config)


@torch.no_grad()
def assert_imports(original, model, size=(65, 97), **options):
    """With random weights and statistics, the imported network's logits are the original's."""
    names = original.state_dict(keep_vars=True)
    numbers = random_state_dict(listing(names))
    # Modules under two names have the numbers of the first.
    first = {}
    for name, tensor in names.items():
        numbers[name] = numbers[first.setdefault(id(tensor), name)]
    original.load_state_dict(numbers)
    imported = import_checkpoint(original.state_dict(), **options)
    assert (imported.source, imported.model) == ("mmsegmentation", model)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = original.eval().encode_decode(image, [{"img_shape": image.shape[2:]}])
    assert expected.std() > 0.1
    network = imported.build()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = image.to(memory_format=memory_format)
        logits = network.to(memory_format=memory_format)(x).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", sorted(LISTINGS))
def test_network(model):
    original = build(configuration(model))
    assert listing(original.state_dict()) == LISTINGS[model]
    assert_imports(original, model)


@pytest.mark.parametrize(("backbone", "depth"), [("ResNetV1c", 18), ("ResNet", 50)])
def test_backbone(backbone, depth):
    """Stems of one and of three convolutions, basic blocks."""
    config = configuration("pspnet")
    config.backbone.update(type=backbone, depth=depth)
    if depth == 18:
        config.decode_head.update(in_channels=512, channels=128)
        config.auxiliary_head.update(in_channels=256, channels=64)
    assert_imports(build(config), "pspnet")


def test_output_stride():
    """Dilations do not show in shapes."""
    config = configuration("deeplabv3")
    config.backbone.update(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))
    config.decode_head.update(dilations=(1, 6, 12, 18))
    options = {"output_stride": 16, "dilations": (6, 12, 18)}
    assert_imports(build(config), "deeplabv3", **options)


@pytest.mark.parametrize("model", ["fcn", "ocrnet"])
def test_hrnet(model):
    """On images that need no padding: of others it pads the image, where the original resizes."""
    assert_imports(build(configuration(model, "hr18")), model, (64, 96))


def test_fcn_of_one_convolution():
    config = configuration("fcn")
    config.decode_head.update(num_convs=1, concat_input=False)
    config.pop("auxiliary_head")
    assert_imports(build(config), "fcn")
