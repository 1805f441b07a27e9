# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import ctxops
from numerics import LAYOUTS, random_like


@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_the_vectors_at_the_positions(layout, device):
    x = LAYOUTS[layout](torch.randn(2, 3, 4, 5, device=device))
    indices = torch.tensor([0, 19, 7, 7, 5], device=device)
    expected = torch.stack([x[:, :, i // 5, i % 5] for i in indices.tolist()], dim=2)
    assert torch.equal(ctxops.sample_anchors(x, indices), expected)


def test_gradient_adds_up_over_repetitions():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([3, 11, 3])
    y = ctxops.sample_anchors(x, indices)
    upstream = random_like(y)
    y.backward(upstream)
    expected = torch.zeros(1, 2, 12, dtype=torch.float64)
    expected[:, :, 3] = upstream[:, :, 0] + upstream[:, :, 2]
    expected[:, :, 11] = upstream[:, :, 1]
    torch.testing.assert_close(x.grad.flatten(2), expected)
    assert torch.autograd.gradgradcheck(lambda x: ctxops.sample_anchors(x, indices) ** 2, x)


def test_random_indices():
    generator = torch.Generator().manual_seed(3)
    indices = ctxops.random_anchor_indices(4, 6, (1, 3, 6, 8), generator)
    assert indices.shape == (110,)
    assert indices.dtype == torch.int64
    assert set(indices.tolist()) <= set(range(24))
    again = ctxops.random_anchor_indices(4, 6, (1, 3, 6, 8), generator.manual_seed(3))
    assert torch.equal(indices, again)
    # With replacement: 10,000 draws of 24 positions are near uniform and never a permutation.
    counts = ctxops.random_anchor_indices(4, 6, (100,), generator).bincount(minlength=24)
    assert (counts - 10_000 / 24).abs().max() < 110


def test_compiles(device):
    compiled = torch.compile(ctxops.sample_anchors, fullgraph=True, dynamic=True)
    x, indices = torch.randn(2, 3, 4, 5, device=device), torch.tensor([3, 1], device=device)
    torch.testing.assert_close(compiled(x, indices), ctxops.sample_anchors(x, indices))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 1], TypeError, "indices must be an int64 tensor, got list"),
        (torch.tensor([0.0]), TypeError, "indices must be an int64 tensor, got torch.float32"),
        (torch.tensor([[0]]), ValueError, r"indices must have shape \(S,\), got \(1, 1\)"),
        (torch.tensor([0, 12]), ValueError, r"indices must be in 0 ... 11, got 0 ... 12"),
        (torch.tensor([-1]), ValueError, r"indices must be in 0 ... 11, got -1 ... -1"),
        (torch.tensor([0], device="meta"), ValueError, "indices must be on the map's device"),
    ],
    ids=lambda x: None,
)
def test_bad_indices(indices, error, message):
    with pytest.raises(error, match=message):
        ctxops.sample_anchors(torch.ones(1, 2, 3, 4), indices)


def test_bad_sizes():
    with pytest.raises(
        ValueError, match="height and width must be integers of at least 1, got 0 and 4"
    ):
        ctxops.random_anchor_indices(0, 4, (1,))
    with pytest.raises(ValueError, match=r"output_sizes must be in .* got 0"):
        ctxops.random_anchor_indices(4, 4, (1, 0))
