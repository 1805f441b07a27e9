# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF012 (nobody writes to what a contract declares)
import threading
from functools import partial

import pytest
import torch
from hypothesis import strategies as st

import ctxops
from ctxops.ops.nonlocal_attention.reference import reference
from numerics import check_operator
from ops.contract import OperatorContract

# query (B, C, H, W), key's H2, W2, value's Cv
CASES = [
    ((1, 1, 1, 1), (1, 1), 1),
    ((2, 8, 7, 5), (7, 5), 8),
    ((1, 16, 1, 23), (5, 3), 3),
    ((2, 5, 19, 1), (4, 9), 40),
    ((1, 33, 13, 11), (1, 17), 65),
    ((2, 1, 3, 5), (4, 3), 1),
]


def make(shape, size, value_channels, dtype=torch.float32, device="cpu"):
    batch, channels, _, _ = shape
    shapes = (shape, (batch, channels, *size), (batch, value_channels, *size))
    return [torch.randn(s, dtype=dtype, device=device) for s in shapes]


def attend(query, key, value, scale=0.3):
    return ctxops.nonlocal_attention(query, key, value, scale=scale)


def check(inputs):
    check_operator(attend, partial(reference, scale=0.3), inputs)


class TestNonlocalAttention(OperatorContract):
    name = "nonlocal_attention"
    cases = CASES
    native = False
    autocast = "down"
    modes = ("equal", "wider")  # the value's channels: on the CPU fused, and in blocks
    # The first is scaled_dot_product_attention's.
    second_derivative_error = (RuntimeError, "not implemented|use_reference")
    drawn = st.tuples(
        st.tuples(
            st.tuples(*(st.integers(1, n) for n in (3, 20, 9, 9))),
            st.tuples(st.integers(2, 9), st.integers(1, 9)),
            st.integers(1, 40),
        ),
        st.sampled_from(modes),
    )
    valid = dict(zip(("query", "key", "value"), make((2, 4, 3, 3), (2, 5), 4), strict=True))
    errors = (
        ({"query": torch.ones(4, 3, 3)}, ValueError, r"query must have shape \(B, C, H, W\)"),
        ({"key": torch.ones(2, 3, 2, 5)}, ValueError, r"key .* \(2, 4, any, any\), got"),
        ({"key": torch.ones(2, 4, 0, 5)}, ValueError, "key must have C, H and W"),
        ({"key": torch.ones(2, 4, 2, 5, device="meta")}, ValueError, "key must be on"),
        ({"value": torch.ones(2, 6, 5, 2)}, ValueError, r"value .* \(2, any, 2, 5\), got"),
        ({"value": torch.ones(2, 6, 2, 5).double()}, TypeError, "value must have the dtype"),
        ({"value": torch.ones(2, 6, 2, 5).bool()}, TypeError, "value must be float32"),
    )
    without = {
        "test_opcheck": "it is not registered",
        "test_memory_format_of_the_gradients": "they are torch's",
        "test_saved_tensors_may_come_back_in_another_layout": (
            "it is torch that saves, and its flash attention on the CPU computes other gradients"
        ),
    }

    def case(self, *shape):
        return shape, (shape[3], shape[2]), 5

    def make(self, case, mode, **options):
        shape, size, value_channels = case
        return make(shape, size, shape[1] if mode == "equal" else value_channels, **options)

    def functions(self, case, _):
        return attend, partial(reference, scale=0.3)


def test_threads_leave_torchs_backends_as_they_were():
    inputs = make((1, 4, 3, 3), (3, 3), 4)
    before = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()

    def work():
        for _ in range(100):
            attend(*inputs)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    assert after == before


@pytest.mark.cuda
@pytest.mark.parametrize(("channels", "value_channels"), [(64, 600), (300, 300), (300, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_heads(channels, value_channels, dtype):
    check(make((1, channels, 9, 7), (5, 11), value_channels, dtype, "cuda"))


@pytest.mark.parametrize("scale", [0.0, -1.5, 1.0, None], ids=str)
def test_scales(scale, device):
    query, key, value = make((2, 9, 4, 5), (3, 3), 4, device=device)
    expected = reference(query, key, value, 9**-0.5 if scale is None else scale)
    torch.testing.assert_close(attend(query, key, value, scale=scale), expected)
