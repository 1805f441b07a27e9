# SPDX-License-Identifier: Apache-2.0
"""ctxops.patch on the packages' own heads, where they are installed."""

import copy
import importlib
from collections import Counter

import pytest
import torch
from torch import nn

import ctxops
from ctxops.patching import KNOWN
from modules import randomise

NORM = {"type": "BN"}
MMSEG, SSSEG = "mmseg.models.decode_heads", "ssseg.modules.models.segmentors"
SEQUENCES = {
    "norm_cfg": {"type": "BatchNorm2d"},
    "act_cfg": {"type": "ReLU", "inplace": True},
}


def head(channels, **options):
    """A head of mmsegmentation behind maps of these channels."""
    many = isinstance(channels, list)
    index = list(range(len(channels))) if many else 0
    return {
        "in_channels": channels, "in_index": index, "channels": 16, "num_classes": 3,
        "norm_cfg": NORM, **options,
    }  # fmt: skip


# The class, its arguments, the shapes of its inputs, and what is swapped in it.
CASES = {
    f"{MMSEG}.cc_head.CCHead": (head(12), [[(2, 12, 5, 7)]], ["CrissCrossAttention"]),
    f"{MMSEG}.nl_head.NLHead": (head(12), [[(2, 12, 5, 7)]], ["NonLocal2d"]),
    f"{MMSEG}.dnl_head.DNLHead": (head(12), [[(2, 12, 5, 7)]], ["DisentangledNonLocal2d"]),
    f"{MMSEG}.da_head.DAHead": (head(12, pam_channels=4), [[(2, 12, 5, 7)]], ["PAM", "CAM"]),
    f"{MMSEG}.ann_head.ANNHead": (
        head([6, 12], project_channels=8, key_pool_scales=(1, 3)),
        [[(2, 6, 9, 8), (2, 12, 5, 7)]],
        ["AFNB", "SelfAttentionBlock", "APNB", "SelfAttentionBlock"],
    ),
    f"{MMSEG}.ocr_head.OCRHead": (
        head(12, ocr_channels=8), [[(2, 12, 5, 7)], (2, 3, 5, 7)], ["ObjectAttentionBlock"],
    ),
    f"{MMSEG}.psp_head.PSPHead": (head(12), [[(2, 12, 5, 7)]], ["PPM"]),
    f"{MMSEG}.uper_head.UPerHead": (
        head([6, 12]), [[(2, 6, 10, 14), (2, 12, 5, 7)]], ["PPM"],
    ),
    f"{SSSEG}.nonlocalnet.nonlocalblock.NonLocal2d": (
        {"in_channels": 12, **SEQUENCES}, [(2, 12, 5, 7)], ["NonLocal2d"],
    ),
    f"{SSSEG}.dnlnet.dnlblock.DisentangledNonLocal2d": (
        {"in_channels": 12, "temperature": 0.05, **SEQUENCES},
        [(2, 12, 5, 7)],
        ["DisentangledNonLocal2d"],
    ),
    f"{SSSEG}.annnet.afnblock.AFNBlock": (
        {
            "low_in_channels": 6, "high_in_channels": 12, "transform_channels": 4,
            "out_channels": 12, "query_scales": (1,), "key_pool_scales": (1, 3), **SEQUENCES,
        },
        [(2, 6, 9, 8), (2, 12, 5, 7)],
        ["AFNBlock", "SelfAttentionBlock"],
    ),
    f"{SSSEG}.annnet.apnblock.APNBlock": (
        {
            "in_channels": 12, "transform_channels": 4, "out_channels": 12,
            "query_scales": (1,), "key_pool_scales": (1, 3), **SEQUENCES,
        },
        [(2, 12, 5, 7)],
        ["APNBlock", "SelfAttentionBlock"],
    ),
    f"{SSSEG}.danet.pam.PositionAttentionModule": (
        {"in_channels": 12, "transform_channels": 4},
        [(2, 12, 5, 7)],
        ["PositionAttentionModule"],
    ),
    f"{SSSEG}.danet.cam.ChannelAttentionModule": (
        {}, [(2, 12, 5, 7)], ["ChannelAttentionModule"],
    ),
    f"{SSSEG}.ocrnet.objectcontext.ObjectContextBlock": (
        {"in_channels": 12, "transform_channels": 4, "scale": 1, **SEQUENCES},
        [(2, 12, 5, 7), (2, 12, 3, 1)],
        ["ObjectContextBlock"],
    ),
    f"{SSSEG}.pspnet.ppm.PyramidPoolingModule": (
        {"in_channels": 12, "out_channels": 4, "pool_scales": (1, 2, 3), **SEQUENCES},
        [(2, 12, 5, 7)],
        ["PyramidPoolingModule"],
    ),
    "segmentation_models_pytorch.decoders.pspnet.decoder.PSPDecoder": (
        {"encoder_channels": [3, 12], "out_channels": 8},
        [[(2, 3, 9, 9), (2, 12, 5, 7)]],
        ["PSPModule"],
    ),
    "timm.layers.non_local_attn.NonLocalAttn": (
        {"in_channels": 16}, [(2, 16, 5, 7)], ["NonLocalAttn"],
    ),
}  # fmt: skip


def find(name):
    module, _, cls = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), cls)
    except ImportError as error:
        pytest.skip(str(error))


def results(block, inputs):
    block = copy.deepcopy(block)
    leaves = [
        [x.clone().requires_grad_() for x in maps] if isinstance(maps, list)
        else maps.clone().requires_grad_()
        for maps in inputs
    ]  # fmt: skip
    output = block(*leaves)
    y = torch.cat([x.flatten() for x in (output if isinstance(output, tuple) else [output])])
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    flat = [x for leaf in leaves for x in (leaf if isinstance(leaf, list) else [leaf])]
    gradients = torch.autograd.grad(
        y, [*flat, *block.parameters()], upstream, allow_unused=True, materialize_grads=True
    )
    return [y], gradients, [*block.buffers(), torch.ones(1)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_equals_original(case, training):
    options, shapes, swapped = CASES[case]
    block = randomise(find(case)(**options)).double().train(training)
    for module in block.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    # This head rounds the temperature and the root of the width to float32.
    tolerance = 1e-6 if case.endswith("DNLHead") else 1e-12
    inputs = [
        [torch.randn(s, dtype=torch.float64) for s in shape] if isinstance(shape, list)
        else torch.randn(shape, dtype=torch.float64)
        for shape in shapes
    ]  # fmt: skip
    expected = results(block, inputs)
    keys = list(block.state_dict())
    swaps = ctxops.patch(block)
    assert Counter(swap.cls.rpartition(".")[2] for swap in swaps) == Counter(swapped)
    assert not any(swap.refused for swap in swaps)
    assert list(block.state_dict()) == keys
    for theirs, ours in zip(expected, results(block, inputs), strict=True):
        scale = max(x.abs().max() for x in theirs)
        for x, y in zip(theirs, ours, strict=True):
            torch.testing.assert_close(y, x, rtol=0, atol=tolerance * scale.item())
    ctxops.unpatch(block)
    assert not any("forward" in module.__dict__ for module in block.modules())


@pytest.mark.parametrize("name", KNOWN)
def test_class_exists(name):
    assert issubclass(find(name), nn.Module)
