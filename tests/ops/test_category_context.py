# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF012 (nobody writes to what a contract declares)
from functools import partial

import pytest
import torch
from hypothesis import strategies as st

import ctxops
from ctxops.ops.category_context.reference import reference
from numerics import DTYPES, LAYOUTS, check_operator, random_like
from ops.contract import OperatorContract, first

# logits (B, K, h, w), memory's C
CASES = [
    ((1, 1, 1, 1), 1),
    ((2, 3, 7, 5), 8),
    ((3, 19, 6, 9), 5),
    ((1, 2, 1, 23), 33),
    ((2, 5, 19, 1), 1),
]


def make(shape, channels, dtype=torch.float32, device="cpu"):
    logits = 2 * torch.randn(shape, dtype=dtype, device=device)
    return logits, torch.randn(shape[1], channels, dtype=dtype, device=device)


class TestCategoryContext(OperatorContract):
    name = "category_context"
    cases = CASES
    modes = {"soft": False}
    native = False
    autocast = "down"
    derivatives = "all"
    drawn = st.tuples(
        st.tuples(st.tuples(*(st.integers(1, n) for n in (3, 20, 12, 12))), st.integers(1, 40)),
        st.just(False),
    )
    valid = {"logits": torch.ones(1, 4, 3, 3), "memory": torch.ones(4, 2)}
    errors = (
        ({"logits": torch.ones(4, 3, 3)}, ValueError, r"logits must have shape \(B, C, H, W"),
        ({"logits": torch.ones(1, 4, 0, 3)}, ValueError, "logits must have C, H and W of"),
        ({"logits": torch.ones(1, 4, 3, 3).long()}, TypeError, "logits must be float32"),
        (
            {"memory": torch.ones(5, 2)},
            ValueError,
            r"memory must have shape \(K, C\) = \(4, any\), got \(5, 2\)",
        ),
        ({"memory": torch.ones(4)}, ValueError, r"memory must have shape \(K, C\) ="),
        ({"memory": [1.0]}, TypeError, r"memory must be a torch\.Tensor, got list"),
        (
            {"memory": torch.ones(4, 2).double()},
            TypeError,
            r"memory must have the dtype of logits, torch\.float32, got torch\.float64",
        ),
        (
            {"memory": torch.ones(4, 2, device="meta")},
            ValueError,
            "memory must be on the device cpu, got meta",
        ),
    )
    without = {
        "test_maps_of_different_layouts": "it takes one map",
        "test_opcheck": "it is not registered",
        "test_backward_under_autocast": "plain torch's products are cast down there",
    }

    def case(self, *shape):
        return shape, 5

    def make(self, case, hard, **options):
        return list(make(*case, **options))

    def functions(self, case, hard):
        return partial(ctxops.category_context, hard=hard), partial(reference, hard=hard)


class TestHardCategoryContext(TestCategoryContext):
    modes = {"hard": True}
    constants = (0,)  # the logits choose a row
    without = TestCategoryContext.without | {
        "test_memory_format_of_the_gradients": "the map has none",
    }
    drawn = TestCategoryContext.drawn.map(lambda drawn: (drawn[0], True))


def formula(logits, memory, hard):
    """Eq. 11-12 position by position."""
    batch, classes, height, width = logits.shape
    output = logits.new_zeros(batch, memory.shape[1], height, width)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                scores = logits[b, :, i, j]
                if hard:
                    output[b, :, i, j] = memory[scores.tolist().index(scores.max())]
                    continue
                exponentials = (scores - scores.max()).exp()
                for k in range(classes):
                    output[b, :, i, j] += exponentials[k] / exponentials.sum() * memory[k]
    return output


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 7, 1, 4)], ids=str)
def test_reference_is_its_formula(shape, hard):
    logits, memory = make(shape, 6, torch.float64)
    torch.testing.assert_close(reference(logits, memory, hard), formula(logits, memory, hard))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, device):
    logits, memory = make((2, 6, 7, 8), 5, device=device)
    for rows in (memory, memory.t().contiguous().t(), memory.repeat_interleave(2, dim=0)[::2]):
        inputs = LAYOUTS[layout](logits), rows
        check_operator(ctxops.category_context, partial(reference, hard=False), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hard_takes_rows(layout, dtype, device):
    logits, memory = make((3, 6, 5, 4), 7, dtype, device)
    logits, memory = LAYOUTS[layout](logits), memory.requires_grad_()
    y = ctxops.category_context(logits, memory, hard=True)
    assert torch.equal(y, formula(logits, memory, hard=True))
    upstream = random_like(y)
    (grad,) = torch.autograd.grad(y, memory, upstream)
    expected = torch.stack(
        [upstream.movedim(1, 3)[logits.argmax(1) == k].double().sum(0) for k in range(6)]
    )
    tolerance = {"rtol": 30 * torch.finfo(dtype).eps, "atol": 30 * torch.finfo(dtype).eps}
    torch.testing.assert_close(grad.double(), expected, **tolerance)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_hard_reads_no_other_row(layout, value, device):
    logits, memory = make((2, 4, 3, 5), 6, device=device)
    logits[:, 2] -= 1e9
    memory[2] = value
    for context in (torch.no_grad(), ctxops.use_reference()):
        with context:
            y = ctxops.category_context(LAYOUTS[layout](logits), memory, hard=True)
        assert torch.equal(y, formula(logits, memory, hard=True))


def test_hard_has_no_gradient_for_the_logits(device):
    logits, memory = make((2, 4, 3, 5), 6, device=device)
    assert not ctxops.category_context(logits.requires_grad_(), memory, hard=True).requires_grad
    y = ctxops.category_context(logits, memory.requires_grad_(), hard=True)
    y.backward(random_like(y))
    assert logits.grad is None
    assert memory.grad.abs().sum() > 0


def test_confident_logits_are_hard():
    logits, memory = make((2, 4, 3, 5), 6, torch.float64)
    y = ctxops.category_context(1e6 * logits, memory)
    torch.testing.assert_close(y, ctxops.category_context(logits, memory, hard=True))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.slow
def test_compiles_in_every_format(layout, dtype, hard, device):
    torch._dynamo.reset()
    operator = partial(ctxops.category_context, hard=hard)
    compiled = torch.compile(operator, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((12, 10), (17, 9), (31, 45)):
            logits, memory = make((2, 8, *size), 5, dtype, device)
            logits = LAYOUTS[layout](logits)
            torch.testing.assert_close(compiled(logits, memory), operator(logits, memory))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_autocast_of_scores_that_come_cast(layout, hard, device):
    logits, memory = make((2, 8, 7, 8), 5, device=device)
    logits = LAYOUTS[layout](logits)
    with torch.autocast(device, dtype=torch.bfloat16):
        # As under a head: the scores come cast, the memory does not.
        y = ctxops.category_context(logits.bfloat16(), memory, hard=hard)
        assert torch.equal(y, ctxops.category_context(logits, memory, hard=hard))
    assert y.dtype == torch.bfloat16
    expected = ctxops.category_context(logits.bfloat16(), memory.bfloat16(), hard=hard)
    torch.testing.assert_close(y, expected)


class Context(torch.nn.Module):
    def __init__(self, hard):
        super().__init__()
        self.hard = hard

    def forward(self, logits, memory):
        return ctxops.category_context(logits, memory, hard=self.hard)


@first(hard=[False, True])
def test_exports_with_dynamic_sizes(hard):
    module = Context(hard)
    height, width = (torch.export.Dim(n, min=2, max=4096) for n in ("height", "width"))
    program = torch.export.export(
        module, make((1, 8, 12, 10), 5), dynamic_shapes=[{2: height, 3: width}, None]
    )
    for size in ((17, 23), (2, 40)):
        inputs = make((1, 8, *size), 5)
        torch.testing.assert_close(program.module()(*inputs), module(*inputs))
