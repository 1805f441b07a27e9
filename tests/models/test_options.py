# SPDX-License-Identifier: Apache-2.0
"""Options of networks that show in nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("timm")

from networks import images, make


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
