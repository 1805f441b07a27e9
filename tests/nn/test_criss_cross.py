# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

import ctxops
from ctxops.nn import CrissCrossAttention, RecurrentCrissCrossAttention
from modules import assert_same, cbr, count, randomise
from numerics import LAYOUTS


def project(layer, x):
    return torch.einsum("oi,bihw->bohw", layer.weight.flatten(1), x) + layer.bias[:, None, None]


def formula(block, x):
    """By the affinity of all positions, those outside the cross left out."""
    _, _, height, width = x.shape
    query, key, value = (project(p, x).flatten(2) for p in (block.query, block.key, block.value))
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    cross = (rows[:, None] == rows) | (columns[:, None] == columns)
    logits = (query.mT @ key).masked_fill(~cross, -torch.inf)
    attended = (value @ logits.softmax(2).mT).unflatten(2, (height, width))
    return x + block.gamma * attended


def recurrent_formula(block, x):
    x = cbr(block.reduce, x)
    for _ in range(block.recurrence):
        x = formula(block.attention, x)
    return cbr(block.out, x)


@pytest.mark.parametrize("size", [(5, 4), (1, 7), (6, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("reduction", [1, 5, 12])
def test_is_its_formula(reduction, size):
    block = randomise(CrissCrossAttention(12, reduction)).double()
    assert_same(block, [torch.randn(2, 12, *size)], lambda x: formula(block, x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recurrence", [1, 2, 3])
def test_recurrent_is_its_formula(recurrence, training):
    block = RecurrentCrissCrossAttention(12, 8, 6, recurrence=recurrence, reduction=4)
    block = randomise(block).double().train(training)
    assert_same(block, [torch.randn(2, 12, 5, 4)], lambda x: recurrent_formula(block, x))


def test_two_rounds_see_the_whole_map():
    block = randomise(RecurrentCrissCrossAttention(4, 4, reduction=2)).double().eval()
    with torch.no_grad():
        for stage in (block.reduce, block.out):
            stage[0].weight.copy_(torch.eye(4)[:, :, None, None] * torch.ones(3, 3).mul(0.1))

    def seen(rounds):
        block.recurrence = rounds
        x = torch.rand(1, 4, 7, 9, dtype=torch.float64, requires_grad=True)
        y = block.attention(x)
        for _ in range(rounds - 1):
            y = block.attention(y)
        (grad,) = torch.autograd.grad(y[0, :, 2, 3].sum(), x)
        return grad.abs().sum(1)[0] > 0

    assert seen(1).sum() == 7 + 9 - 1
    assert seen(2).all()


def test_starts_as_the_identity():
    x = torch.randn(2, 16, 5, 4)
    block = CrissCrossAttention(16)
    assert torch.equal(block(x), x)
    block(x).backward(torch.randn_like(x))
    assert block.gamma.grad.abs() > 0


def test_parameter_counts_of_the_published_head():
    assert count(CrissCrossAttention(512)) == 2 * (512 * 64 + 64) + 512 * 512 + 512 + 1
    head = RecurrentCrissCrossAttention(2048)
    fusion = (2048 + 512) * 512 * 9 + 2 * 512
    assert count(head) + fusion == 23_924_353
    assert count(RecurrentCrissCrossAttention(2048, recurrence=5)) == count(head)


def test_sizes_inside():
    block = RecurrentCrissCrossAttention(32, reduction=2)
    assert block(torch.randn(2, 32, 5, 6)).shape == (2, 8, 5, 6)
    block = RecurrentCrissCrossAttention(32, 16, 24, reduction=4)
    assert block.attention.query.out_channels == 4
    assert block(torch.randn(2, 32, 5, 6)).shape == (2, 24, 5, 6)


def blocks():
    return [CrissCrossAttention(16, 4), RecurrentCrissCrossAttention(16, 8, reduction=4)]


@pytest.mark.parametrize("block", blocks(), ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_keeps_the_memory_format(layout, block, device):
    x = LAYOUTS[layout](torch.randn(2, 16, 7, 9, device=device))
    y = block.to(device)(x)
    assert y.stride() == LAYOUTS[layout](y).stride()


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks(), ids=lambda b: type(b).__name__)
def test_compiles_once_for_all_sizes(block, device):
    torch._dynamo.reset()
    block = randomise(block).to(device).eval()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((12, 10), (17, 9), (31, 33)):
            x = torch.randn(2, 16, *size, device=device)
            torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("block", blocks(), ids=lambda b: type(b).__name__)
def test_exports_with_dynamic_sizes(block):
    block = randomise(block).eval()
    height, width = (torch.export.Dim(n, min=2, max=4096) for n in ("height", "width"))
    program = torch.export.export(
        block, (torch.randn(1, 16, 12, 10),), dynamic_shapes=[{2: height, 3: width}]
    )
    for size in ((17, 23), (2, 40)):
        x = torch.randn(1, 16, *size)
        torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("block", blocks(), ids=lambda b: type(b).__name__)
def test_autocast(block, device):
    block = randomise(block).to(device).eval()
    x = torch.randn(2, 16, 12, 9, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = block(x)
    expected = block(x)
    assert (y - expected).norm() < 0.05 * expected.norm()


def test_bfloat16(device):
    block = randomise(CrissCrossAttention(16, 4)).to(device)
    x = torch.randn(2, 16, 12, 9, device=device)
    expected = block(x)
    y = block.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.05 * expected.norm()


def test_uses_the_operator_with_scale_one(monkeypatch):
    calls = []
    module = __import__("ctxops.nn.criss_cross", fromlist=["criss_cross"])

    def attend(*maps, scale):
        calls.append(scale)
        return ctxops.criss_cross_attention(*maps, scale=scale)

    monkeypatch.setattr(module, "criss_cross_attention", attend)
    RecurrentCrissCrossAttention(16, reduction=2)(torch.randn(2, 16, 3, 4))
    assert calls == [1.0, 1.0]


def test_state_dict_round_trip():
    block, other = (randomise(RecurrentCrissCrossAttention(8, reduction=2)) for _ in range(2))
    block, other = block.eval(), other.eval()
    x = torch.randn(2, 8, 5, 6)
    assert not torch.allclose(block(x), other(x))
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x), other(x))


def test_takes_another_norm():
    block = RecurrentCrissCrossAttention(8, reduction=2, norm_layer=lambda c: nn.GroupNorm(1, c))
    assert isinstance(block.out[1], nn.GroupNorm)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in block.modules())


def test_says_what_it_is():
    block = RecurrentCrissCrossAttention(64, 16, recurrence=3, reduction=4)
    assert "recurrence=3" in repr(block)
    assert "in_channels=16, reduction=4, gamma starts at zero" in repr(block)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CrissCrossAttention(0), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: CrissCrossAttention(8, 2.0), TypeError, r"reduction must be an integer, got 2\.0"),
        (
            lambda: CrissCrossAttention(8, 9),
            ValueError,
            "reduction must be at most the channels, 8, got 9",
        ),
        (
            lambda: CrissCrossAttention(8)(torch.ones(1, 7, 5, 5)),
            ValueError,
            r"x must have shape \(B, 8, H, W\), got \(1, 7, 5, 5\)",
        ),
        (lambda: CrissCrossAttention(8)([1]), TypeError, r"x must be a torch\.Tensor, got list"),
        (
            lambda: RecurrentCrissCrossAttention(64, recurrence=0),
            ValueError,
            "recurrence must be at least 1, got 0",
        ),
        (
            lambda: RecurrentCrissCrossAttention(64, 0),
            ValueError,
            "channels must be at least 1, got 0",
        ),
        (
            lambda: RecurrentCrissCrossAttention(64, 16, 2.5),
            TypeError,
            r"out_channels must be an integer, got 2\.5",
        ),
        (
            lambda: RecurrentCrissCrossAttention(16),
            ValueError,
            "reduction must be at most the channels, 4, got 8",
        ),
        (
            lambda: RecurrentCrissCrossAttention(64)(torch.ones(1, 7, 5, 5)),
            ValueError,
            r"x must have shape \(B, 64, H, W\), got \(1, 7, 5, 5\)",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
