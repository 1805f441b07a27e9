"""Networks of sssegmentation, where it is installed, against what their checkpoints become.

The package has no configurations: these are its networks at small widths, and its other networks.
"""

import contextlib
import copy
import functools
import importlib.machinery
import importlib.util
import sys
import unittest.mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from checkpoints import listing, psa_mask, random_state_dict

pytest.importorskip("timm")
if importlib.util.find_spec("ssseg") is None:
    pytest.skip("sssegmentation is not installed", allow_module_level=True)

from ctxops.models import import_checkpoint

# What the package imports and no network of these needs.
OPTIONAL = {"chainercv", "cv2", "dill", "mmcv", "pandas", "pycocotools", "scipy", "sklearn", "tqdm"}


class StandIns:
    """Finds the optional packages that are missing."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return unittest.mock.MagicMock(__path__=[], __name__=spec.name, __spec__=spec)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def stand_ins():
    """While the package is imported, and no longer: other tests ask for the same packages."""
    before, finder = set(sys.modules), StandIns()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], unittest.mock.MagicMock):
                del sys.modules[name]


with stand_ins():
    from ssseg.modules.models.backbones import Scale, hrnet
    from ssseg.modules.models.segmentors import BuildSegmentor, ccnet, psanet
    from ssseg.modules.utils import SSSegInputStructure

hrnet.HRModule.use_checkpoint = False  # which its constructor forgets


class PlainCrissCross(nn.Module):
    """In the place of mmcv's."""

    def __init__(self, channels):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = Scale(0)

    def forward(self, x):
        q, k, v = self.query_conv(x), self.key_conv(x), self.value_conv(x)
        height, width = x.shape[2:]
        row, column = torch.arange(height * width) // width, torch.arange(height * width) % width
        seen = (row[:, None] == row) | (column[:, None] == column)
        logits = (q.flatten(2).mT @ k.flatten(2)).masked_fill(~seen, -torch.inf)
        return self.gamma((v.flatten(2) @ logits.softmax(2).mT).view_as(v)) + x


class PlainMask(nn.Module):
    """In the place of mmcv's."""

    def __init__(self, kind, mask_size):
        super().__init__()
        self.mask = functools.partial(psa_mask, kind, mask_size=tuple(mask_size))

    def forward(self, mask):
        return self.mask(mask)


ccnet.ccnet.CrissCrossAttention = PlainCrissCross
psanet.psanet.PSAMask = PlainMask

RESNET = {"type": "ResNet", "depth": 18, "structure_type": "resnet18", "outstride": 8}
RESNET |= {"pretrained": False, "use_conv3x3_stem": False, "selected_indices": (2, 3)}
HRNET = {"type": "HRNet", "structure_type": "hrnetv2_w18", "arch": "hrnetv2_w18"}
HRNET |= {"pretrained": False, "selected_indices": (0, 0)}
BOTTLENECKS = {"depth": 50, "use_conv3x3_stem": True}
RESNEST = {"type": "ResNeSt", "structure_type": "resnest50", **BOTTLENECKS}
ALL = {"selected_indices": (0, 1, 2, 3), "outstride": 32}
MODE = {"use_scale": True, "mode": "embeddedgaussian", "reduction": 2}
PYRAMID = {"pool_scales": [1, 2, 3, 6]}
ASPP = {"dilations": [1, 12, 24, 36]}


def configuration(kind, backbone=None, auxiliary=256, **head):
    return {
        "type": kind,
        "num_classes": 7,
        "align_corners": False,
        "backbone": RESNET | (backbone or {}) if backbone is not HRNET else HRNET,
        "norm_cfg": {"type": "BatchNorm2d"},
        "act_cfg": {"type": "ReLU", "inplace": True},
        "head": {"in_channels": 512, "feats_channels": 16, "dropout": 0.1, **head},
        "auxiliary": auxiliary and {"in_channels": auxiliary, "out_channels": 12, "dropout": 0.1},
        "losses": {},
    }


def mcibi(context=None, **options):
    within = {"is_on": context is not None, "type": context or "aspp", "cfg": options}
    return configuration(
        "MCIBI",
        out_channels=16,
        transform_channels=8,
        num_feats_per_cls=1,
        use_hard_aggregate=False,
        downsample_backbone={"stride": 1},
        context_within_image=within,
    )


# What they are here, and their configuration.
EQUAL = {
    "ann": configuration(
        "ANNNet", in_channels_list=[256, 512], transform_channels=8, query_scales=(1,),
        key_pool_scales=(1, 3, 6, 8),
    ),
    "apcnet": configuration("APCNet", **PYRAMID),
    "ccnet": configuration("CCNet", num_recurrence=2),
    "danet": configuration("DANet", transform_channels=4),
    "deeplabv3": configuration("Deeplabv3", **ASPP),
    "dnlnet": configuration("DNLNet", temperature=0.05, **MODE),
    "fcn": configuration("FCN", num_convs=2),
    "fcn of one convolution": configuration("FCN", auxiliary=None, num_convs=1),
    "fcn on HRNet": configuration("FCN", HRNET, None, in_channels=270, num_convs=1),
    "mcibi": mcibi(),
    "mcibi over aspp": mcibi("aspp", **ASPP),
    "mcibi over ppm": mcibi("ppm", **PYRAMID),
    "nonlocal": configuration("NonLocalNet", **MODE),
    "ocrnet": configuration("OCRNet", transform_channels=8, scale=1),
    "ocrnet on ResNet-50": configuration(
        "OCRNet", BOTTLENECKS, 1024, in_channels=2048, transform_channels=8, scale=1
    ),
    "psanet": configuration(
        "PSANet", type="bi-direction", compact=False, shrink_factor=2, mask_size=(9, 9),
        normalization_factor=1.0, psa_softmax=True,
    ),
    "pspnet": configuration("PSPNet", **PYRAMID),
    "pspnet on ResNeSt-50": configuration("PSPNet", RESNEST, 1024, in_channels=2048, **PYRAMID),
    "upernet": configuration(
        "UPerNet", ALL, in_channels_list=[64, 128, 256, 512], **PYRAMID
    ),
}  # fmt: skip

# Networks and backbones that are none of ours, and what the error says of them.
REFUSED = {
    "deeplabv3+": (
        configuration("Deeplabv3Plus", ALL, in_channels=[64, 512], shortcut_channels=8, **ASPP),
        "does not fit sssegmentation's",
    ),
    "dmnet": (
        configuration("DMNet", filter_sizes=[1, 3], is_fusion=True),
        "does not fit sssegmentation's fcn",
    ),
    "emanet": (
        configuration("EMANet", num_bases=4, num_stages=3, momentum=0.1),
        "does not fit sssegmentation's fcn",
    ),
    "gcnet": (
        configuration(
            "GCNet", ratio=0.25, pooling_type="att", fusion_types=("channel_add",)
        ),
        "does not fit sssegmentation's fcn",
    ),
    "isanet": (
        configuration("ISANet", isa_channels=8, down_factor=(8, 8)),
        "EncNet, PointRend or another network, which is not imported",
    ),
    "segformer": (
        configuration("Segformer", ALL, None, in_channels_list=[64, 128, 256, 512]),
        "does not fit sssegmentation's fcn",
    ),
    "mcibi with a row of its own for each part": (
        mcibi() | {"head": mcibi()["head"] | {"num_feats_per_cls": 2}},
        r"bank\.memory \(7, 2, 16\) instead of \(7, 16\)",
    ),
}  # fmt: skip


def build(config):
    return BuildSegmentor(segmentor_cfg=copy.deepcopy(config), mode="TEST").eval()


def randomise(original):
    """Random weights and statistics."""
    names = original.state_dict(keep_vars=True)
    numbers = random_state_dict(listing(names))
    # Modules under two names have the numbers of the first.
    first = {}
    for name, tensor in names.items():
        numbers[name] = numbers.get(first.setdefault(id(tensor), name), tensor)
    original.load_state_dict(numbers)


@pytest.mark.parametrize("name", EQUAL)
@torch.no_grad()
def test_equal(name):
    original = build(EQUAL[name])
    randomise(original)
    imported = import_checkpoint(original.state_dict())
    assert (imported.source, imported.model) == ("sssegmentation", name.partition(" ")[0])
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 65, 97, generator=generator)
    structure = SSSegInputStructure(images=image, mode="TEST")
    expected = F.interpolate(original(structure).seg_logits, image.shape[2:], mode="bilinear")
    assert expected.std() > 0.1
    torch.testing.assert_close(imported.build()(image).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        import_checkpoint(build(config).state_dict())
