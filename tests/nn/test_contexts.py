# SPDX-License-Identifier: Apache-2.0
"""What holds for every module that gives a map its context."""

import inspect

import pytest
import torch
from torch import nn

from ctxops.nn import (
    ASPP,
    AdaptiveContext,
    AsymmetricNonLocalContext,
    ChannelAttention,
    CommonFusion,
    ConcatContext,
    DenseASPP,
    DisentangledNonLocal,
    DualAttention,
    GatedFullyFusion,
    LevelFusionDecoder,
    ObjectContext,
    PointwiseSpatialAttention,
    PositionAttention,
    PyramidPooling,
    SummedFusions,
    UPerDecoder,
)
from ctxops.nn.cbr import cbr
from modules import mostly_slow, randomise
from numerics import LAYOUTS

# The maker, with a norm layer where it takes one, and the channels of the inputs.
CONTEXTS = {
    "ASPP": (lambda **norm: ASPP(8, 6, (2, 3), **norm), [8]),
    "PyramidPooling": (lambda **norm: PyramidPooling(8, 6, (1, 2, 3), **norm), [8]),
    "PositionAttention": (lambda: PositionAttention(8, 2), [8]),
    "ChannelAttention": (lambda: ChannelAttention(8), [8]),
    "DualAttention": (lambda **norm: DualAttention(8, 6, reduction=2, **norm), [8]),
    "DisentangledNonLocal": (lambda **norm: DisentangledNonLocal(8, temperature=5, **norm), [8]),
    "AdaptiveContext": (lambda **norm: AdaptiveContext(8, 6, (1, 3), **norm), [8]),
    "ObjectContext": (lambda **norm: ObjectContext(8, 6, 4, **norm), [8, 3]),
    "AsymmetricNonLocalContext": (
        lambda **norm: AsymmetricNonLocalContext(
            4, 8, 6, key_channels=4, value_channels=4, output_sizes=(1, 2), **norm
        ),
        [4, 8],
    ),
    "DenseASPP": (lambda **norm: DenseASPP(8, 6, 4, (1, 2), **norm), [8]),
    "PointwiseSpatialAttention": (
        lambda **norm: PointwiseSpatialAttention(8, 6, (5, 7), **norm), [8],
    ),
    "ConcatContext": (lambda **norm: ConcatContext(nn.Conv2d(8, 4, 1), 8, 4, 6, **norm), [8]),
    "CommonFusion": (lambda **norm: CommonFusion(4, 8, **norm), [4, 8]),
    "SummedFusions": (
        lambda **norm: SummedFusions([CommonFusion(4, 8, **norm), CommonFusion(6, 8, **norm)]),
        [4, 6, 8],
    ),
    "LevelFusionDecoder": (
        lambda **norm: LevelFusionDecoder(
            PyramidPooling(6, 5, (1, 2), align_corners=True, **norm),
            GatedFullyFusion([4, 6], 8, **norm),
            [cbr(8, 3, 3, norm.get("norm_layer", nn.BatchNorm2d)) for _ in range(2)],
        ),
        [4, 6],
    ),
    "UPerDecoder": (lambda **norm: UPerDecoder([4, 6, 8], 5, (1, 2), **norm), [4, 6, 8]),
}  # fmt: skip
NORMED = [name for name in CONTEXTS if not name.startswith(("Position", "Channel"))]

contexts = pytest.mark.parametrize("name", CONTEXTS)


def make(name, size=(7, 9), batch=2, device="cpu"):
    """The module with nothing at zero, and its inputs."""
    build, widths = CONTEXTS[name]
    inputs = [torch.randn(batch, width, *size, device=device) for width in widths]
    return randomise(build()).to(device).eval(), inputs


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1)], ids=str)
@contexts
def test_any_size(name, size):
    module, inputs = make(name, size, batch=1)
    y = module(*inputs)
    assert y.shape[2:] == size
    assert y.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@contexts
def test_keeps_the_memory_format(name, layout, device):
    module, inputs = make(name, device=device)
    y = module(*map(LAYOUTS[layout], inputs))
    assert y.stride() == LAYOUTS[layout](y).stride()
    torch.testing.assert_close(y, module(*inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", mostly_slow([*CONTEXTS], "ConcatContext"))
def test_compiles_once_for_all_sizes(name, device):
    torch._dynamo.reset()
    module, _ = make(name, device=device)
    # The exports trace what is behind dynamo's graph.
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((12, 10), (17, 9), (3, 3)):
            _, inputs = make(name, size, device=device)
            torch.testing.assert_close(compiled(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", mostly_slow([*CONTEXTS], "PyramidPooling", "ChannelAttention"))
def test_exports_with_open_sizes(name, device):
    """Those of the pyramids' grids and a batch of one are like any other."""
    module, inputs = make(name, (12, 10), device=device)
    sizes = (dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),) * len(inputs)
    if len(inspect.signature(module.forward).parameters) < len(inputs):
        sizes = (sizes,)  # of forward(*maps)
    exported = torch.export.export(module, tuple(inputs), dynamic_shapes=sizes).module()
    for size, batch in (((17, 9), 3), ((3, 3), 2), ((6, 5), 1)):
        _, inputs = make(name, size, batch, device)
        torch.testing.assert_close(exported(*inputs), module(*inputs), rtol=1e-4, atol=1e-4)


@contexts
def test_autocast(name, device):
    module, inputs = make(name, device=device)
    expected = module(*inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = module(*inputs)
    assert (y - expected).norm() < 0.05 * expected.norm()


@contexts
def test_bfloat16(name, device):
    module, inputs = make(name, device=device)
    expected = module(*inputs)
    y = module.bfloat16()(*(x.bfloat16() for x in inputs))
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", NORMED)
def test_takes_another_norm(name):
    build, widths = CONTEXTS[name]
    module = build(norm_layer=lambda channels: nn.GroupNorm(1, channels))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    module(*(torch.randn(1, width, 3, 4) for width in widths))


@pytest.mark.parametrize("name", sorted(CONTEXTS.keys() - {"ChannelAttention"}))
def test_refuses_a_map_of_other_channels(name):
    module, inputs = make(name)
    wrong = torch.ones(2, 7, 7, 9)
    with pytest.raises(ValueError, match=r"must have shape \(B, \d, H, W\), got \(2, 7, 7, 9\)"):
        module(wrong, *inputs[1:])
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
        module([1], *inputs[1:])
