# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF012 (nobody writes to what a contract declares)
import pytest
import torch
from hypothesis import strategies as st

import ctxops
from numerics import LAYOUTS, random_like
from ops.contract import OperatorContract

INDICES = (0, 19, 7, 7, 5)


def formula(x, indices):
    return torch.stack([x[:, :, i // x.shape[3], i % x.shape[3]] for i in indices], dim=2)


class TestSampleAnchors(OperatorContract):
    name = "sample_anchors"
    cases = [((2, 3, 4, 5), INDICES), ((1, 1, 1, 1), (0, 0)), ((3, 40, 1, 7), (6, 2))]
    native = False
    derivatives = "all"
    drawn = st.tuples(
        st.tuples(st.tuples(*(st.integers(1, n) for n in (3, 20, 9, 9)))).flatmap(
            lambda shape: st.tuples(
                st.just(shape[0]),
                st.lists(st.integers(0, shape[0][2] * shape[0][3] - 1), min_size=1, max_size=9),
            )
        ),
        st.just("one"),
    )
    valid = {"input": torch.ones(1, 2, 3, 4), "indices": torch.tensor([0, 11])}
    errors = (
        ({"indices": [0, 1]}, TypeError, "indices must be an int64 tensor, got list"),
        (
            {"indices": torch.tensor([0.0])},
            TypeError,
            "indices must be an int64 tensor, got torch.float32",
        ),
        (
            {"indices": torch.tensor([[0]])},
            ValueError,
            r"indices must have shape \(S,\), got \(1, 1\)",
        ),
        (
            {"indices": torch.tensor([0, 12])},
            ValueError,
            "indices must be in 0 ... 11, got 0 ... 12",
        ),
        (
            {"indices": torch.tensor([-1])},
            ValueError,
            "indices must be in 0 ... 11, got -1 ... -1",
        ),
        (
            {"indices": torch.tensor([0], device="meta")},
            ValueError,
            "indices must be on the map's device",
        ),
    )
    without = {
        "test_maps_of_different_layouts": "it takes one map",
        "test_the_first_map_decides_on_the_memory_format": "it gives no map",
        "test_memory_format_of_the_gradients": "they are those of torch's indexing",
        "test_opcheck": "it is not registered",
        "test_use_reference": "it is its reference",
    }

    def case(self, *shape):
        last = shape[2] * shape[3] - 1
        return shape, (3, last, 3, 0)

    def make(self, case, _, **options):
        return [torch.randn(case[0], **options)]

    def functions(self, case, _):
        indices = torch.tensor(case[1])
        return (
            lambda x: ctxops.sample_anchors(x, indices.to(x.device)),
            lambda x: formula(x, case[1]),
        )


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


def test_bad_sizes():
    with pytest.raises(
        ValueError, match="height and width must be integers of at least 1, got 0 and 4"
    ):
        ctxops.random_anchor_indices(0, 4, (1,))
    with pytest.raises(ValueError, match=r"output_sizes must be in .* got 0"):
        ctxops.random_anchor_indices(4, 4, (1, 0))
