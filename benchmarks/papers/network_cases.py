# SPDX-License-Identifier: Apache-2.0
"""Whole networks as the rows of a benchmark."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from baselines.released import randomize
from ctxops.models import LogitsOnly
from harness import Case, Contender, Options, both_formats

# What a network holds at most in evaluation, in values for each pixel: three of a ResNet's widest
# maps at a quarter of the side, and some of thousands of channels at an eighth.
VALUES_PER_PIXEL = 600


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def statistics(module: nn.Module) -> int:
    """Running means and variances, which some papers count among the parameters."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return sum(2 * norm.num_features for norm in norms)


def network_case(
    title: str,
    builders: Mapping[str, Callable[[], nn.Module]],
    size: tuple[int, int],
    options: Options,
    *,
    classes: int = 19,
) -> Case:
    """Networks in evaluation on one image, each compared with nothing but its other format."""
    height, width = size

    def image() -> tuple[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 3, height, width, generator=generator)
        return (x.to(options.device, options.dtype),)

    def row(name: str, build: Callable[[], nn.Module]) -> Contender:
        return Contender(
            name,
            lambda: LogitsOnly(randomize(build())).to(options.dtype).eval(),
            peak_bytes=options.dtype.itemsize * VALUES_PER_PIXEL * height * width,
            family=name,
        )

    rows = both_formats(*(row(name, build) for name, build in builders.items()))
    return Case(title, image, (1, classes, height, width), rows)
