# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

import ctxops
from ctxops.nn import ChannelAttention, DualAttention, PositionAttention
from modules import assert_same, cbr, count, randomise


def project(layer, x):
    y = torch.einsum("oi,bihw->bohw", layer.weight.flatten(1), x)
    return y if layer.bias is None else y + layer.bias[:, None, None]


def position_formula(block, x):
    query, key, value = (project(p, x).flatten(2) for p in (block.query, block.key, block.value))
    affinity = torch.einsum("bci,bcj->bij", query, key).exp()
    weights = affinity / affinity.sum(2, keepdim=True)
    attended = torch.einsum("bij,bcj->bci", weights, value).unflatten(2, x.shape[2:])
    return x + block.gamma * attended


def channel_formula(block, x):
    affinity = torch.einsum("bchw,bdhw->bcd", x, x)
    distance = (affinity.max(2, keepdim=True).values - affinity).exp()
    weights = distance / distance.sum(2, keepdim=True)
    return x + block.gamma * torch.einsum("bcd,bdhw->bchw", weights, x)


def branches_formula(head, x):
    reduce, attention, out = head.position
    position = cbr(out, position_formula(attention, cbr(reduce, x)))
    reduce, attention, out = head.channel
    return position, cbr(out, channel_formula(attention, cbr(reduce, x)))


@pytest.mark.parametrize("size", [(5, 4), (1, 7), (1, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_position_attention_is_its_formula(bias, size):
    block = randomise(PositionAttention(6, 3, bias=bias)).double()
    assert_same(block, [torch.randn(2, 6, *size)], lambda x: position_formula(block, x))


@pytest.mark.parametrize("size", [(5, 4), (1, 7), (1, 1)], ids=str)
def test_channel_attention_is_its_formula(size):
    block = randomise(ChannelAttention(6)).double()
    assert_same(block, [torch.randn(2, 6, *size)], lambda x: channel_formula(block, x))


@pytest.mark.parametrize("training", [True, False])
def test_head_is_its_formula(training):
    head = randomise(DualAttention(7, 6, reduction=2)).double().train(training)
    # Features of the size that a network has: larger ones make an attention of one channel.
    x = 0.3 * torch.randn(2, 7, 4, 5)
    assert_same(head, [x], lambda x: sum(branches_formula(head, x)))
    for actual, expected in zip(
        head.eval().branches(x.double()), branches_formula(head, x.double()), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_starts_as_the_identity():
    x = torch.randn(2, 16, 5, 4)
    for block in (PositionAttention(16), ChannelAttention(16)):
        assert torch.equal(block(x), x)
        block(x).backward(torch.randn_like(x))
        assert block.gamma.grad.abs() > 0
        assert "gamma starts at zero" in repr(block)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_channel_attention_of_many_positions_in_half_precision(dtype, autocast, device):
    """The products of channels that resemble each other sum to 90,000: beyond float16, and in
    bfloat16 only to 512, where their differences decide."""
    block = ChannelAttention(4).to(device)
    nn.init.constant_(block.gamma, 10)
    x = 3 * torch.randn(1, 1, 100, 100) + 0.3 * torch.randn(1, 4, 100, 100)
    x = x.to(device, dtype)
    expected = channel_formula_in_float64(block, x)
    if autocast:
        with torch.autocast(device, dtype=dtype):
            y = block(x)
    else:
        y = block.to(dtype)(x)
    assert y.isfinite().all()
    assert (y - expected).norm() < 0.01 * expected.norm()


def channel_formula_in_float64(block, x):
    """By the softmax of torch: the exponentials of such sums leave the range of float64 too."""
    rows = x.double().flatten(2)
    weights = (-rows @ rows.mT).softmax(2)
    return x.double() + block.gamma.double() * (weights @ rows).unflatten(2, x.shape[2:])


def test_uses_the_operator_with_scale_one(monkeypatch):
    calls = []
    module = __import__("ctxops.nn.dual_attention", fromlist=["dual_attention"])

    def attend(*maps, scale):
        calls.append(scale)
        return ctxops.nonlocal_attention(*maps, scale=scale)

    monkeypatch.setattr(module, "nonlocal_attention", attend)
    DualAttention(8, 8)(torch.randn(2, 8, 3, 4))
    assert calls == [1.0]


def test_parameter_counts():
    with torch.device("meta"):
        assert count(DualAttention(2048)) == 23_924_738
        assert count(DualAttention(2048, bias=True)) == 23_924_738 + 64 + 64 + 512


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: PositionAttention(8, 9),
            ValueError,
            "reduction must be at most the channels, 8, got 9",
        ),
        (lambda: ChannelAttention(0), ValueError, "channels must be at least 1, got 0"),
        (lambda: DualAttention(4, 2.0), TypeError, r"channels must be an integer, got 2\.0"),
        (
            lambda: DualAttention(4, 8).branches(torch.ones(1, 5, 2, 2)),
            ValueError,
            r"x must have shape \(B, 4, H, W\), got \(1, 5, 2, 2\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
