# SPDX-License-Identifier: Apache-2.0
"""Every network, small enough for a test."""

import copy
import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

from ctxops.models import Encoder, SegmentationNetwork, create_model, list_models, model_options
from ctxops.models.base import Classifier

NUM_CLASSES = 5

networks = pytest.mark.parametrize("name", list_models())


def make(name: str, **options) -> SegmentationNetwork:
    """The network on a tiny backbone, in evaluation. Nothing starts at zero, logits differ."""
    if "channels" in model_options(name):
        options = {"channels": 16} | options
    network = create_model(name, "test_resnet", NUM_CLASSES, **options)
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        if tensor.is_floating_point() and not tensor.any():
            nn.init.normal_(tensor, std=0.3)
    for module in network.modules():
        if isinstance(module, Classifier):
            nn.init.normal_(module[1].weight)
    return network.eval()


@functools.cache
def _make_once(name: str) -> SegmentationNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(name)


def network_of(name: str) -> SegmentationNetwork:
    """A copy of :func:`make`'s network with its default options."""
    return copy.deepcopy(_make_once(name))


class _StridedConvolutions(nn.Module):
    """A convolution for each map of an encoder, of its channels and strides."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.in_channels = encoder.in_channels
        channels, strides = (encoder.in_channels, *encoder.channels), (1, *encoder.strides)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, out, 3, stride=stride // before, padding=1)
            for (width, out), (before, stride) in zip(
                itertools.pairwise(channels), itertools.pairwise(strides), strict=True
            )
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = [image]
        for convolution in self.convolutions:
            maps.append(convolution(maps[-1]).relu())
        return maps[1:]


def traceable(name: str) -> SegmentationNetwork:
    """:func:`network_of`, for tracing: with its backbone, half of the work, in one network only."""
    network = network_of(name)
    if name != "fcn":
        network.encoder = _StridedConvolutions(network.encoder)
    return network


def images(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width)
