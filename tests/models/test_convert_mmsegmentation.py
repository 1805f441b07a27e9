"""Networks of mmsegmentation, where it is installed, against what their checkpoints become."""

import collections
import functools
import os
from pathlib import Path

import pytest
import torch

import mmcv_operators  # noqa: F401
from checkpoints import listing, psa_mask, random_state_dict, read_listings

pytest.importorskip("timm")
pytest.importorskip("mmseg")

import mmseg
from mmengine import Config
from mmengine.logging import MessageHub
from mmseg.models.decode_heads import psa_head
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules

from ctxops.models import convert_checkpoint, import_checkpoint, load_config

CONFIGS = Path(mmseg.__file__).parent / ".mim" / "configs"
THEIR_NAMES = {"dnlnet": "dnl"}
LISTINGS = read_listings(Path(__file__).with_name("mmsegmentation_r50.txt"))


def configuration(model, backbone="r50-d8"):
    """The network's base configuration, with norms for one process."""
    name = f"{THEIR_NAMES.get(model, model)}_{backbone}.py"
    return for_one_process(Config.fromfile(CONFIGS / "_base_" / "models" / name).model)


def for_one_process(config):
    config.pretrained = None

    def replace_norms(part):
        for key, value in list(part.items()):
            if key == "norm_cfg" and value is not None:
                part[key] = value | {"type": "BN"}
            for child in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(child, dict):
                    replace_norms(child)

    replace_norms(config)
    return config


class PlainMask(torch.nn.Module):
    """In the place of mmcv's operator, which mmcv-lite does not have."""

    def __init__(self, kind, mask_size):
        super().__init__()
        self.mask = functools.partial(psa_mask, kind, mask_size=mask_size)

    def forward(self, mask):
        return self.mask(mask)


def build(config):
    register_all_modules()
    psa_head.PSAMask = PlainMask
    return MODELS.build(config)


def randomise(original):
    """Random weights and statistics."""
    names = original.state_dict(keep_vars=True)
    numbers = random_state_dict(listing(names))
    # Modules under two names have the numbers of the first.
    first = {}
    for name, tensor in names.items():
        numbers[name] = numbers[first.setdefault(id(tensor), name)]
    original.load_state_dict(numbers)


@torch.no_grad()
def assert_imports(original, model, size=(65, 97), **options):
    """With random weights and statistics, the imported network's logits are the original's."""
    randomise(original)
    imported = import_checkpoint(original.state_dict(), **options)
    assert (imported.source, imported.model) == ("mmsegmentation", model)
    image, expected = logits_of(original, size)
    network = imported.build()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = image.to(memory_format=memory_format)
        logits = network.to(memory_format=memory_format)(x).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def logits_of(original, size):
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    expected = original.eval().encode_decode(image, [{"img_shape": image.shape[2:]}])
    assert expected.std() > 0.1
    return image, expected


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


@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
@pytest.mark.parametrize("model", ["fcn", "ocrnet"])
def test_hrnet(model, size):
    assert_imports(build(configuration(model, "hr18")), model, size)


def test_fcn_of_one_convolution():
    config = configuration("fcn")
    config.decode_head.update(num_convs=1, concat_input=False)
    config.pop("auxiliary_head")
    assert_imports(build(config), "fcn")


# The census ---------------------------------------------------------------------------------------

HEADS = {"ANNHead", "APCHead", "ASPPHead", "CCHead", "DAHead", "DNLHead", "FCNHead", "NLHead"}
HEADS |= {"OCRHead", "PSAHead", "PSPHead", "UPerHead"}
# Backbones of ours, whose numbers are random.
OURS = {"HRNet", "ResNet", "ResNetV1c", "ResNetV1d", "ResNeSt"}
# What says nothing about what a network computes, or what shapes tell of its numbers.
OF_TRAINING = {
    "channels",
    "data_preprocessor",
    "init_cfg",
    "loss_decode",
    "num_classes",
    "pretrained",
}
OF_TRAINING |= {"sampler", "test_cfg", "train_cfg", "zero_init_residual"}


def architecture(part):
    if isinstance(part, dict):
        return tuple((k, architecture(x)) for k, x in sorted(part.items()) if k not in OF_TRAINING)
    return tuple(map(architecture, part)) if isinstance(part, (list, tuple)) else part


def architectures():
    """The configurations with a head of ours, by what they build: name of the first, how many."""
    found, counts = {}, collections.Counter()
    for path in sorted(CONFIGS.glob("*/*.py")):
        if path.parent.name in ("_base_", "dsdl"):
            continue
        config = load_config(path)
        heads = config.get("decode_head")
        head = heads[-1] if isinstance(heads, tuple) else heads
        if head is not None and head["type"] in HEADS:
            make_small(config)
            key = architecture(config)
            found.setdefault(key, path)
            counts[key] += 1
    return [(path, counts[key]) for key, path in found.items()]


def make_small(config):
    """ResNets of 50 blocks, narrow heads on them: names and shapes tell both. To save time."""
    backbone, heads = config["backbone"], config["decode_head"]
    if "ResNet" in backbone["type"]:
        backbone["depth"] = min(backbone["depth"], 50)
        heads = [*heads] if isinstance(heads, (list, tuple)) else [heads]
        for head in [*heads, config["auxiliary_head"]] if config.get("auxiliary_head") else heads:
            head["channels"] = 64


def save_as_runner(path, original, config):
    """As mmengine's Runner after some steps, its averages of the loss and its optimizer with it."""
    hub = MessageHub.get_instance("census")
    hub.update_scalar("train/loss", 0.5)
    optimizer = torch.optim.SGD(original.parameters(), 0.1, momentum=0.9)
    saved = {
        "meta": {"cfg": config.pretty_text, "iter": 80000, "mmengine_version": "0.10.7"},
        "state_dict": original.state_dict(),
        "message_hub": hub.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(saved, path)


@pytest.mark.slow
@torch.no_grad()
def test_census(tmp_path, capsys):
    """Every network is imported as it is or refused, by its checkpoint alone."""
    path, outcomes, different = tmp_path / "checkpoint.pth", collections.Counter(), []
    for file, number in architectures():
        name, config = file.stem, Config.fromfile(file, import_custom_modules=False)
        make_small(config.model)
        text = Config(config.to_dict())
        try:
            original = build(for_one_process(config.model))
        except (ImportError, KeyError, RuntimeError) as error:  # of packages that are missing
            outcome = f"not built: {error}"
        else:
            if config.model.backbone.type in OURS:
                randomise(original)
            save_as_runner(path, original, text)
            outcome = "equal"
            try:
                network = convert_checkpoint(path, os.devnull).build()
            except ValueError as error:
                outcome = f"refused: {error}"
            else:
                image, expected = logits_of(original, (33, 65))
                difference = (network(image).logits - expected).abs().max().item()
                if not difference < 1e-4:
                    outcome = f"different by {difference:.1e}"
                    different.append(name)
        outcomes[outcome.partition(":")[0]] += 1
        outcomes[outcome.partition(":")[0] + ", configurations"] += number
        with capsys.disabled():
            print(f"{name} ({number} configurations): {outcome}", flush=True)
    with capsys.disabled():
        print(dict(outcomes))
    assert not different
