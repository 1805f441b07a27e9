# SPDX-License-Identifier: Apache-2.0
"""The options of the networks: their defaults, and that each is passed on."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("timm")

from ctxops.models import list_models, model_options
from networks import images, make

DEFAULTS = {
    "ann": {
        "fusion": "afnb",
        "attention": "apnb",
        "fuse_stages": (4,),
        "output_sizes": (1, 3, 6, 8),
        "sampling": "avg",
        "channels": 512,
        "key_channels": 256,
        "value_channels": 256,
        "share": "query_key",
        "fuse": "concat",
        "out_norm": False,
        "variant": "released",
        "fold": True,
        "bias": True,
        "auxiliary_bias": True,
        "dropout": 0.05,
        "align_corners": True,
        "auxiliary_channels": 512,
    },
    "apcnet": {
        "channels": 512,
        "output_sizes": (1, 2, 3, 6),
        "fusion": True,
        "auxiliary_channels": 256,
        "align_corners": True,
        "auxiliary_bias": False,
        "dropout": 0.1,
    },
    "ccnet": {
        "channels": 512,
        "recurrence": 2,
        "reduction": 8,
        "auxiliary_channels": 256,
        "align_corners": True,
        "auxiliary_bias": False,
        "dropout": 0.1,
    },
    "danet": {
        "channels": 512,
        "reduction": 8,
        "attention_bias": True,
        "auxiliary_channels": 256,
        "align_corners": True,
        "auxiliary_bias": False,
        "dropout": 0.1,
    },
    "deeplabv3": {
        "channels": 512,
        "dilations": (12, 24, 36),
        "out_channels": None,
        "fuse_kernel_size": 3,
        "auxiliary_channels": 256,
        "align_corners": True,
        "auxiliary_bias": False,
        "dropout": 0.1,
    },
    "denseaspp": {
        "reduced_channels": None,
        "hidden_channels": 512,
        "channels": 128,
        "dilations": (3, 6, 12, 18, 24),
        "auxiliary_channels": 0,
        "align_corners": True,
        "auxiliary_bias": False,
        "dropout": 0.1,
    },
    "dnlnet": {
        "channels": 512,
        "key_channels": None,
        "temperature": 0.05,
        "use_scale": True,
        "auxiliary_channels": 256,
        "align_corners": True,
        "auxiliary_bias": False,
        "dropout": 0.1,
    },
    "fcn": {
        "channels": 512,
        "kernel_size": 3,
        "convolutions": 1,
        "concat": False,
        "align_corners": True,
        "auxiliary_bias": False,
        "auxiliary_channels": 512,
        "dropout": 0.1,
    },
    "gald": {
        "global_aggregation": "cgnl",
        "local_distribution": "ldv1",
        "arrangement": "gald",
        "downsample": 2,
        "channels": 512,
        "aspp_dilations": (6, 12, 18),
        "mask_downsample": "conv",
        "kernel_size": 5,
        "dilation": 3,
        "query_from": "both",
        "key_from": "both",
        "auxiliary_bias": True,
        "align_corners": True,
        "auxiliary_channels": 512,
        "dropout": 0.1,
    },
    "gcn": {
        "score": "gcn",
        "kernel_size": 15,
        "mid_channels": None,
        "boundary_refinement": True,
        "global_backbone": False,
    },
    "gff": {
        "context": "ppm",
        "fusion": "gff",
        "dense_pyramid": True,
        "literal": False,
        "gate_from": "input",
        "channels": 256,
        "context_channels": 512,
        "auxiliary_bias": True,
        "align_corners": True,
        "auxiliary_channels": 512,
        "dropout": 0.1,
    },
    "mcibi": {
        "context": "aspp",
        "channels": 512,
        "fusion": "concat",
        "within_attention": True,
        "projection_layers": 2,
        "kernel_size": None,
        "hard": False,
        "memory_options": None,
        "dropout": 0.1,
        "align_corners": False,
        "auxiliary_bias": False,
        "auxiliary_channels": 512,
    },
    "nonlocal": {
        "channels": 512,
        "key_channels": None,
        "use_scale": True,
        "auxiliary_channels": 256,
        "align_corners": True,
        "auxiliary_bias": False,
        "dropout": 0.1,
    },
    "ocrnet": {
        "channels": 512,
        "key_channels": 256,
        "region_channels": 256,
        "region_kernel_size": 3,
        "region_bias": False,
        "dropout": 0.1,
        "align_corners": True,
    },
    "psanet": {
        "channels": 512,
        "mask_size": (97, 97),
        "shrink_factor": 2,
        "auxiliary_channels": 256,
        "align_corners": True,
        "auxiliary_bias": False,
        "dropout": 0.1,
    },
    "pspnet": {
        "channels": 512,
        "output_sizes": (1, 2, 3, 6),
        "branch_activation": True,
        "auxiliary_channels": 256,
        "align_corners": True,
        "auxiliary_bias": False,
        "dropout": 0.1,
    },
}


def test_defaults():
    found = {
        name: {
            option: f"torch.{value.__name__}" if isinstance(value, type) else value
            for option, value in model_options(name).items()
        }
        for name in list_models()
    }
    assert found == DEFAULTS


@pytest.mark.parametrize("align_corners", [True, False])
def test_the_logits_are_resized_as_asked(align_corners):
    network, image = make("fcn", align_corners=align_corners), images(37, 53)
    logits = network.predict(network.encoder(image)).logits
    expected = F.interpolate(logits, (37, 53), mode="bilinear", align_corners=align_corners)
    assert torch.equal(network(image).logits, expected)


@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("convolutions", [1, 2, 3])
def test_convolutions_of_fcn(convolutions, concat):
    network = make("fcn", convolutions=convolutions, concat=concat)
    windows = [m for m in network.decoder.modules() if isinstance(m, nn.Conv2d)]
    assert len(windows) == convolutions + concat


@pytest.mark.parametrize(("use_scale", "scale"), [(True, 16**-0.5), (False, 1.0)])
def test_scale_of_nonlocal(use_scale, scale):
    network = make("nonlocal", key_channels=16, use_scale=use_scale)
    (block,) = (m for m in network.decoder.modules() if hasattr(m, "scale"))
    assert block.scale == scale
