# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from ctxops.nn import CGNL
from modules import assert_same, mostly_slow, randomise
from numerics import LAYOUTS


def formula(block, x):
    """By the affinity matrix between all entries, channels and positions, of a group."""
    theta, phi, g = (
        torch.einsum("oi,bihw->bohw", layer.weight.flatten(1), x)
        for layer in (block.theta, block.phi, block.g)
    )
    groups, y = block.groups, []
    for weight, *maps in zip(
        block.z.weight.chunk(groups), *(m.chunk(groups, 1) for m in (theta, phi, g)), strict=True
    ):
        theta_k, phi_k, g_k = (m.flatten(1) for m in maps)
        affinity = theta_k[:, :, None] * phi_k[:, None, :]
        if block.use_scale:
            affinity = affinity / theta_k.shape[1] ** 0.5
        aggregated = (affinity @ g_k[:, :, None]).reshape(maps[0].shape)
        y.append(torch.einsum("oi,bihw->bohw", weight.flatten(1), aggregated))
    if isinstance(block.norm, nn.Identity):
        return x + torch.cat(y, 1)
    for k, z in enumerate(y):
        mean = z.mean((1, 2, 3), keepdim=True)
        variance = (z - mean).square().mean((1, 2, 3), keepdim=True)
        y[k] = (z - mean) / (variance + block.norm.eps).sqrt()
    gain, shift = (p[:, None, None] for p in (block.norm.weight, block.norm.bias))
    return x + torch.cat(y, 1) * gain + shift


@pytest.mark.parametrize("size", [(5, 4), (1, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("use_scale", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_is_its_formula(groups, use_scale, size):
    block = randomise(CGNL(12, 6, groups, use_scale=use_scale)).double()
    # The norm cancels the group's number but for its sign, unless epsilon is of its order.
    block.norm.eps = 0.5
    assert_same(block, [torch.randn(2, 12, *size)], lambda x: formula(block, x))


@pytest.mark.parametrize("use_scale", [False, True])
def test_without_norm(use_scale):
    block = CGNL(12, 6, 3, use_scale=use_scale, norm_layer=lambda channels: nn.Identity())
    block = randomise(block).double()
    assert_same(block, [torch.randn(2, 12, 4, 5)], lambda x: formula(block, x))


def test_parameter_count_of_the_released_block():
    block = CGNL(512, 256, groups=8)
    assert sum(p.numel() for p in block.parameters()) == 410_624


def test_never_an_affinity_matrix():
    """4 million entries of a group would have an affinity matrix of 1.6e13."""
    block = CGNL(4, 4, groups=1)
    assert block(torch.randn(1, 4, 1000, 1000)).shape == (1, 4, 1000, 1000)


def test_half_precision_of_large_maps():
    """The number of a group leaves the range of float16; under autocast it must not matter."""
    block = CGNL(16, 16, groups=2).eval()
    for layer in (block.phi, block.g):
        nn.init.constant_(layer.weight, 0.25)
    x = 1 + torch.rand(1, 16, 64, 64)
    with torch.autocast("cpu", dtype=torch.float16):
        y = block(x)
    expected = block(x)
    assert (y - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_memory_format(layout, device):
    x = LAYOUTS[layout](torch.randn(2, 16, 7, 9, device=device))
    y = CGNL(16, 8, 4).to(device)(x)
    assert y.stride() == LAYOUTS[layout](y).stride()


@pytest.mark.slow
def test_compiles_once_for_all_sizes(device):
    torch._dynamo.reset()
    block = randomise(CGNL(16, 8, 4, use_scale=True)).to(device)
    # The inductors of torch 2.8 and 2.14 cannot order the open sizes of the group's sum.
    backend = "inductor" if torch.__version__ >= (2, 15) else "aot_eager"
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((12, 10), (17, 9), (31, 33)):
            x = torch.randn(2, 16, *size, device=device)
            torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("use_scale", mostly_slow([False, True], "True"))
def test_exports_with_dynamic_sizes(use_scale):
    block = randomise(CGNL(8, 4, 2, use_scale=use_scale)).eval()
    height, width = (torch.export.Dim(n, min=2, max=4096) for n in ("height", "width"))
    program = torch.export.export(
        block, (torch.randn(1, 8, 12, 10),), dynamic_shapes=[{2: height, 3: width}]
    )
    for size in ((17, 23), (2, 40)):
        x = torch.randn(1, 8, *size)
        torch.testing.assert_close(program.module()(x), block(x))


def test_autocast(device):
    block = randomise(CGNL(16, 8, 4)).to(device).eval()
    x = torch.randn(2, 16, 12, 9, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = block(x)
    expected = block(x)
    assert (y - expected).norm() < 0.03 * expected.norm()


def test_bfloat16(device):
    block = randomise(CGNL(16, 8, 4)).to(device).eval()
    x = torch.randn(2, 16, 12, 9, device=device)
    expected = block(x)
    y = block.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.05 * expected.norm()


def test_state_dict_round_trip():
    block, other = (randomise(CGNL(8, 4, 2)) for _ in range(2))
    x = torch.randn(2, 8, 5, 6)
    assert not torch.allclose(block(x), other(x))
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), other(x))


def test_says_what_it_is():
    assert "groups=2, use_scale=True" in repr(CGNL(8, 4, 2, use_scale=True))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CGNL(0, 4), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: CGNL(8, 4.0), TypeError, r"channels must be an integer, got 4\.0"),
        (lambda: CGNL(8, 4, 0), ValueError, "groups must be at least 1, got 0"),
        (lambda: CGNL(9, 4, 2), ValueError, "groups must divide in_channels, 9, got 2"),
        (lambda: CGNL(8, 5, 2), ValueError, "groups must divide channels, 5, got 2"),
        (
            lambda: CGNL(8, 4, 2)(torch.ones(1, 7, 5, 5)),
            ValueError,
            r"x must have shape \(B, 8, H, W\), got \(1, 7, 5, 5\)",
        ),
        (
            lambda: CGNL(8, 4, 2)(torch.ones(8, 5, 5)),
            ValueError,
            r"x must have shape \(B, C, H, W\), got \(8, 5, 5\)",
        ),
        (lambda: CGNL(8, 4, 2)([1]), TypeError, r"x must be a torch\.Tensor, got list"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
